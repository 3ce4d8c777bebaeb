"""Who leads, as far as gossip knows: a few bytes that every message carries. A hint, never proof: the term decides.

The bully algorithm's COORDINATOR message is Raft's first append to voters (PROTOCOL §2.1); this is how everybody else
hears of it in well under a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from p2p.ids import NodeId
from p2p.membership.figures import MAX_ADDRESS_CHARS, MAX_TERM
from p2p.membership.member import MalformedMessage, identifier, number


@dataclass(frozen=True, slots=True)
class LeaderHint:
    """The newest term heard of and its leader, None while an election is on. Also the event that tells a core of it."""

    term: int
    leader: NodeId | None
    address: str | None

    def beats(self, other: LeaderHint) -> bool:
        """A higher term wins; in one term a known leader beats none, and a known address beats none."""
        return (self.term, self.leader is not None, self.address is not None) > (
            *(other.term, other.leader is not None, other.address is not None),
        )

    def to_wire(self) -> tuple[int, str | None, str | None]:
        return (self.term, self.leader, self.address)

    @classmethod
    def from_wire(cls, wire: Any) -> LeaderHint:
        """Raises MalformedMessage."""
        match wire:
            case [int() as term, (str() | None) as leader, (str() | None) as address]:
                return cls(
                    number(term, "term", MAX_TERM),
                    None if leader is None else NodeId(identifier(leader, "leader")),
                    None if address is None else identifier(address, "leader's address", limit=MAX_ADDRESS_CHARS),
                )
        raise MalformedMessage("a leader hint is [term, leader, address]")


NO_LEADER = LeaderHint(0, None, None)
