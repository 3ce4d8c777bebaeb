"""Who leads, as far as this node knows: from its own replica if it hears the leader itself, else from gossip. The later
term wins. Everything that waits for a leader waits here.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from p2p.ids import NodeId, Term


class Leader(NamedTuple):
    """`node` is None while nobody is known to lead `term`. `address` is None for a leader that cannot be dialled."""

    term: Term
    node: NodeId | None
    address: str | None


NOBODY = Leader(Term(0), None, None)


class Leadership:
    """Belongs to the event loop."""

    def __init__(self) -> None:
        self.leader = NOBODY
        self._changed = asyncio.Event()

    def learn(self, leader: Leader) -> bool:
        """News from the replica or from gossip; whether it was any. Older terms are old news; within a term a name
        beats none, and none beats a name only from the replica itself (`lost`)."""
        known = self.leader
        if leader.term < known.term or (leader.term == known.term and leader.node is None):
            return False
        if leader == known:
            return False
        self._set(leader)
        return True

    def lost(self, term: Term) -> bool:
        """This node's own replica gave its leader up; whether that is news."""
        if term < self.leader.term or self.leader.node is None:
            return False
        self._set(Leader(term, None, None))
        return True

    def _set(self, leader: Leader) -> None:
        self.leader = leader
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def change(self, seconds: float) -> bool:
        """Waits for any change; whether there was one in time."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True
