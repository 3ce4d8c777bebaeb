"""The node: who may write, in what order, and how the work gets done on this machine. In reading order:

- `ids`, `quorum`, `messages`, `effects`: the nouns every core shares, and majority arithmetic.
- `membership`: who is alive. SWIM gossip; it reports, and decides nothing about work or votes.
- `election`: who leads. The bully's order says who stands, votes say who wins.
- `journal`: what is true. Append, replicate, persist, commit, apply, compact; snapshots of what was applied.
- `replica`: election and journal behind one ``step()``; the only owner of the term.
- `formation`, `autopilot`: how blank nodes become one cluster, and which change of voters is due. Pure.
- `storage`, `transport`: where entries are kept and how messages travel, each with a simulated twin.
- `driver` (with `writer` and `applier`): carries out what the replica decides: persist, send, apply, answer.
- `peers`, `leadership`: plain requests to other nodes; who leads, as far as this node knows.
- `cluster`: the shell round all of that on one event loop: a node's part in its cluster.
- `runner`: the daemon beside the node that owns the job processes and outlives it.
- `gpus`, `nvml`, `gpu_sampler`, `gpu_jobs`: which GPUs are fit and how much of each is free; who asks the driver, and
  on which thread; which job uses what of them.
- `resources` (with `cgroups`), `workplace`: what this node has, what is free, what a job's process sees.
- `loops`: the background work: pull, reap, populate, maintain, watch.
- `api`: the HTTP API, one file per noun; `forward` decides where a request is answered.
- `node`, `main`: the composition root, and the way in. `cli`: ``p2pctl``, a person's orders through any node.

What the work *is* lives in `coordination`, which imports nothing from here. The runner imports this package too and
must stay small, so nothing is imported on this page.
"""
