"""Who leads, as far as this node knows: from its own replica if it hears the leader itself, else from gossip. The later
term wins. Everything that waits for a leader waits here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

from p2p.ids import NodeId, Term

T = TypeVar("T")
LISTEN_SECONDS = 0.5  # how often it is looked whether whoever asked is still there


class Leader(NamedTuple):
    """`node` is None while nobody is known to lead `term`. `address` is None for a leader that cannot be dialled."""

    term: Term
    node: NodeId | None
    address: str | None


NOBODY = Leader(Term(0), None, None)


class Deposed(Exception):
    """Whoever was asked does not lead any more, and has not answered: it may have been done."""


class AskerGone(Exception):
    """Nobody waits for the answer any more."""


class Leadership:
    """Belongs to the event loop."""

    def __init__(self) -> None:
        self.leader = NOBODY
        self.since: float | None = None  # unix seconds: when this node learned of it
        self._changed = asyncio.Event()

    def learn(self, leader: Leader) -> bool:
        """News from the replica or from gossip; whether it was any. Older terms are old news; within a term a name
        beats none, and none beats a name only from the replica itself (`lost`); so it is with addresses."""
        known = self.leader
        if leader.term < known.term or (leader.term == known.term and leader.node is None):
            return False
        if leader == known or leader == known._replace(address=None):
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
        if (leader.term, leader.node) != (self.leader.term, self.leader.node):
            self.since = time.time()
        self.leader = leader
        self.opened()

    def opened(self) -> None:
        """Wakes everybody who waits for a leader: there is another one, or this node's desk has been opened."""
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

    async def unless_deposed(
        self, request: Awaitable[T], *, gone: Callable[[], bool] = lambda: False, last_word: float = 0.0
    ) -> T:
        """What is answered to a request that was made of the leader. Raises Deposed as soon as somebody else is known
        to lead, for one that is cut off cannot say so itself, or `last_word` seconds later; AskerGone soon after `gone`
        says that nobody waits. The request is given up then."""
        before = self.leader
        asking = asyncio.ensure_future(request)
        try:
            while not asking.done():
                change = asyncio.ensure_future(self._changed.wait())
                try:
                    await asyncio.wait((asking, change), timeout=LISTEN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    change.cancel()
                if asking.done():
                    break
                now = self.leader
                if None not in (before.node, now.node) and (now.node, now.term) != (before.node, before.term):
                    await asyncio.wait([asking], timeout=last_word)
                    if not asking.done():
                        raise Deposed(f"{before.node} does not lead any more")
                    break
                if gone():
                    raise AskerGone
            return await asking
        finally:
            if not asking.done():
                asking.cancel()
                await asyncio.wait([asking])
            if not asking.cancelled():
                asking.exception()  # looked at: nobody else will
