"""Who leads: the bully decides who stands, votes decide who wins.

Theory of operation. The bully algorithm (Garcia-Molina 1982) lets the highest-ranking live process lead, but it assumes
that silence means death: under a partition it elects two. Raft's election (Ongaro 2014, §3.4, §9.6) is safe whatever
the network does, but does not care who wins. Here each does what it is good at::

    bully                      here                                             who decides
    ELECTION                   PreVote, sent by whoever's turn it is            rank.py: when to stand
    ANSWER ("I am higher")     PreVoteReply(granted=False, reason="higher")     core.py: may delay a pre-vote, once
    COORDINATOR                the first Append of the new term                 the votes (ballot.py), by majority

::

             deadline passed               a majority grants              a majority votes
    follower ───────────────> pre-candidate ───────────────> candidate ───────────────────> leader
        ^            (term unchanged)  │        (term + 1, own vote fsynced)  │                │
        └──────── refused, or a leader is heard, or a higher term ────────────┴── no majority ─┘
                                                                                  heard for E

Invariants: one vote a term, durable before it is told; no vote against the up-to-date rule, whatever the priority
(§3 I13); no vote inside a live leader's lease unless that leader asked for the election; priority can only delay.

`core.py` decides; `ballot.py` counts; `rank.py` is the order of standing and the timers. The term and the persisted
vote belong to `p2p.replica`.
"""
