"""The pointers of the log and when they may move. Sans-IO; the term belongs to `p2p.replica`.

Raft §5.3: a leader appends, counts who holds what, and commits what a majority holds *of its own term* (§5.4.2); what
came before is committed with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from p2p.effects import Apply, Entry
from p2p.ids import Index, NodeId, Term
from p2p.quorum import committed


class JournalCore:
    """The leader's view of the log. `match` maps each voter to the highest index it has on disk."""

    def __init__(self, node: NodeId, voters: Sequence[NodeId], *, last: Index, applied: Index) -> None:
        self.node = node
        self.match: dict[NodeId, Index] = {voter: Index(0) for voter in voters}
        self.match[node] = last
        self.last_index = last
        self.commit_index = applied
        self.applied_index = applied
        self.term_start = Index(last + 1)  # index of this term's no-op: nothing before it commits by count alone

    def append(self, term: Term, bodies: Sequence[bytes]) -> tuple[Entry, ...]:
        """Gives the bodies the next indexes. They are not durable until `persisted` says so."""
        first = self.last_index + 1
        entries = tuple(Entry(Index(first + n), term, body) for n, body in enumerate(bodies))
        self.last_index = Index(self.last_index + len(bodies))
        return entries

    def persisted(self, voter: NodeId, upto: Index) -> Apply | None:
        """`voter` has everything up to `upto` on disk; answers what that commits, if anything."""
        assert upto <= self.last_index, f"{voter} holds {upto}, beyond the last entry {self.last_index}"
        self.match[voter] = max(self.match[voter], upto)
        index = committed(self.match.values())
        if index <= self.commit_index or index < self.term_start:
            return None
        self.commit_index = Index(index)
        return Apply(self.commit_index)

    def applied(self, index: Index) -> None:
        """The state machine has applied everything up to `index`."""
        assert self.applied_index <= index <= self.commit_index, f"applied {index} outside the committed log"
        self.applied_index = index

    def check_invariants(self) -> None:
        """Raises AssertionError if the pointers contradict each other; run after every step under test."""
        assert 0 <= self.applied_index <= self.commit_index <= self.last_index
        assert self.commit_index <= max(committed(self.match.values()), self.applied_index)
        assert all(0 <= index <= self.last_index for index in self.match.values())
