"""What is true: append -> persist -> commit -> apply -> compact.

Theory of operation. The journal is one totally ordered sequence of opaque entries, each with a term and an index. An
entry is *committed* once a majority of voters hold it on disk; only committed entries are applied, and only applied
ones are answered. The words and rules are Raft's (Ongaro 2014); a cluster of one voter is the same code with a
majority of one, so commit follows its own fsync.

::

    propose(body) ──> append ──> persist (fsync, group commit) ──> commit (majority) ──> apply ──> answer
                                   p2p.storage                      core.committed       the queue's SQLite
    snapshot (backup of the applied state) ──> compact the log behind it

Invariants (checked after every step under test): entries are append-only within a term; commit_index never exceeds
what a majority holds on disk; applied <= commit <= last; compaction never passes what a durable snapshot covers.

`core.py` decides; `snapshot.py` makes and restores copies of the applied state; where entries are kept is
`p2p.storage`; who may append is `p2p.replica`. Replication to more voters (progress.py) and PostgreSQL as a second
journal slot in behind `core`.
"""
