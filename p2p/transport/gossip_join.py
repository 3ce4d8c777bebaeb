"""Asking to be let in, again and again: whom to ask in each round, when a round is over, and what a refusal says.

What is asked and whether it is granted is decided by `p2p.membership.core`, here and at the other end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from p2p.ids import NodeId
from p2p.membership.events import Joined
from p2p.membership.figures import MAX_SEEDS
from p2p.membership.member import MembershipError


class JoinRefused(MembershipError):
    """Why a node may not join, and what to do about it. Both are sentences for a person."""

    def __init__(self, code: str, reason: str, fix: str, address: str, node: NodeId | None = None) -> None:
        super().__init__(f"{address} refused the join: {reason}; {fix}")
        self.code, self.reason, self.fix, self.address, self.node = code, reason, fix, address, node


class NotJoined(MembershipError):
    """No address has let this node in yet."""


class JoinRound:
    """One round of asking. It is over when a member of a cluster has let us in, or when all have answered or not."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.waiting = set(addresses)
        self.joined: list[Joined] = []
        self.settled = asyncio.Event()

    def outcome(self, address: str, joined: Joined | None) -> None:
        self.waiting.discard(address)
        if joined is not None:
            self.joined.append(joined)
        if not self.waiting or (joined is not None and joined.cluster):
            self.settled.set()


def rounds(addresses: Sequence[str]) -> Iterator[list[str]]:
    """For ever: as many as one round asks, beginning where the last one ended."""
    start = 0
    count = min(len(addresses), MAX_SEEDS)
    while True:
        yield [addresses[(start + n) % len(addresses)] for n in range(count)]
        start += count
