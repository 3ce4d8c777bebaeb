"""The node: who may write, in what order, and how the work gets done on this machine. In reading order:

- `ids`, `quorum`, `effects`: the nouns every core shares, and majority arithmetic.
- `journal`: what is true. Append, persist, commit, apply, compact; snapshots of what was applied.
- `replica`: election and journal behind one ``step()``; the only owner of the term.
- `storage`: where entries are kept, on a real disk and on a simulated one.
- `driver`: carries out what the replica decides: persist, then apply, then answer.
- `runner`: the daemon beside the node that owns the job processes and outlives it.
- `resources`, `workplace`: what this node has, what is free, what a job's process sees.
- `loops`: the background work: pull, reap, populate, maintain, watch.
- `api`: the HTTP API, one file per noun.
- `node`, `main`: the composition root, and the way in.

What the work *is* lives in `coordination`, which imports nothing from here. The runner imports this package too and
must stay small, so nothing is imported on this page.
"""
