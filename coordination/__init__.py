"""The work: what a job is, what may become of it, and who is asked.

The life of a job (`queue_state.EDGES` is the authority)::

    submit ──> waiting ──(time came, dependencies done)──> pending ──(placed)──> claimed ──(process started)──> running
                  ^                                           ^  ^                  │                             │
                  │                                           │  └──── released ────┴──────────── released ───────┤
                  └───────── attempt failed: backoff ─────────┼────────────────────────────────────────────────── ┤
                                                              │                                                   │
      failed, cancelled ──(retried by hand)───────────────────┘        completed | failed | cancelled <───────────┘

In reading order: `job` (the noun) and `kinds`; `commands`, the only ways to change the queue; `queue_state`, the rules,
and `arrays`; `queue_reads`, the questions; `placement`, `scoring`, `fleet`, `planner`, `leases`, `retry`, `population`,
`health`, the pure decisions; `matching`, the rounds in which claims are given work; `dispatcher`, the leader's desk;
`stalls`, who is told as stalled; `operations`, every order of a person, once; then the operators' API: `work_queue`,
`unified_queue_populator`, `daemon_manager`, `alerts`, with `live` to say where it goes.
"""
