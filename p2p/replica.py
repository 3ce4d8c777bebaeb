"""Election and journal behind one ``step()``: the only owner of the term.

Today a cluster has one voter, so the election is the degenerate one: the voter votes for itself in a new term at
start, with the vote persisted before it acts on it, exactly as it will with more. Several code paths that could change
the leader made another system's leaders flap every five minutes; here there is this one.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2p.effects import Apply, Effect, HardState, Persist
from p2p.ids import Index, NodeId, Term
from p2p.journal.core import JournalCore


@dataclass(frozen=True, slots=True)
class Campaign:
    """Stand for election now."""


@dataclass(frozen=True, slots=True)
class Propose:
    """Append these bodies, in order."""

    bodies: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Persisted:
    """This node's disk holds everything up to `upto`, and the newest hard state."""

    upto: Index


@dataclass(frozen=True, slots=True)
class Applied:
    """The state machine holds everything up to `upto`."""

    upto: Index


ReplicaEvent = Campaign | Propose | Persisted | Applied


class NotLeader(Exception):
    """This node does not lead, so it cannot append. Definitely not done."""


class Replica:
    """One voter. `step` is the only way to change it."""

    def __init__(self, node: NodeId, hard_state: HardState, *, last: Index, applied: Index) -> None:
        self.node = node
        self.voters = (node,)
        self.term = hard_state.term
        self.voted_for = hard_state.voted_for
        self.leader: NodeId | None = None
        self.journal = JournalCore(node, self.voters, last=last, applied=applied)

    def step(self, event: ReplicaEvent) -> list[Effect]:
        """Decides; the effects are to be carried out in order, persists before anything that depends on them."""
        match event:
            case Campaign():
                return self._campaign()
            case Propose(bodies):
                if self.leader != self.node:
                    raise NotLeader("this node has no leader yet")
                return [self._append(bodies, None)]
            case Persisted(upto):
                return self._persisted(upto)
            case Applied(upto):
                self.journal.applied(upto)
                return []

    def _campaign(self) -> list[Effect]:
        """A vote of one is a majority of one; the no-op of the new term commits what earlier terms left (§5.4.2)."""
        self.term = Term(self.term + 1)
        self.voted_for = self.node
        self.journal.term_start = Index(self.journal.last_index + 1)
        return [self._append((b"",), HardState(self.term, self.node))]

    def _append(self, bodies: tuple[bytes, ...], hard_state: HardState | None) -> Persist:
        entries = self.journal.append(self.term, bodies)
        return Persist(entries, hard_state, self.journal.commit_index)

    def _persisted(self, upto: Index) -> list[Effect]:
        apply = self.journal.persisted(self.node, upto)
        if apply is None:
            return []
        if self.leader is None and apply.upto >= self.journal.term_start:
            self.leader = self.node
        return [apply]

    def check_invariants(self) -> None:
        self.journal.check_invariants()
        assert self.leader in (None, self.node)


__all__ = ["Applied", "Apply", "Campaign", "NotLeader", "Persisted", "Propose", "Replica", "ReplicaEvent"]
