"""When to dial, and when to dial again. Decides the pace; `links` decides how, and with whom a link may stand.

A SYN that is lost costs a second, and a probe must not wait that long: after 300 ms a second attempt runs beside the
first and the better one is kept (PROTOCOL §2.17).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from p2p.transport.link import Link
from p2p.transport.outbox import Outbox

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Every span of time on the links; tests shorten them."""

    second_attempt_seconds: float = 0.3
    connect_seconds: float = 2.0  # both attempts, to the end of the HTTP upgrade
    hello_seconds: float = 3.0  # longer than `proof_seconds`, for which a hello may have to wait
    backoff_min_seconds: float = 0.05
    backoff_max_seconds: float = 1.0
    wanted_seconds: float = 5.0  # dialling goes on so long after the last send
    steady_seconds: float = 1.0  # a link that stood this long was a success: the next failure starts from the minimum
    idle_seconds: float = 60.0  # nothing sent or heard for so long: a link that nobody holds is closed
    ping_seconds: float = 10.0  # quiet links are tried, and kept known to the NAT boxes on the way
    proof_seconds: float = 1.0  # how long a link may take to prove that its voter still lives
    close_seconds: float = 0.5
    said_seconds: float = 10.0  # the same refusal is logged once in this time


class Dialer:
    """Keeps one link open while it is wanted. `attempt` dials, lives with the link, and answers for how many seconds it
    stood: 0 if it never did. What is sent meanwhile waits in `outbox` and is dropped when the attempt fails."""

    def __init__(self, attempt: Callable[[Dialer], Awaitable[float]], outbox: Outbox, timing: Timing) -> None:
        self._attempt = attempt
        self._timing = timing
        self._now = asyncio.get_running_loop().time
        self._hurry = asyncio.Event()
        self.outbox = outbox
        self.link: Link | None = None  # the one that stands
        self.task: asyncio.Task[None] | None = None
        self.held = False
        self.wanted_at = self._now()

    def want(self) -> None:
        """There is something to send."""
        self.wanted_at = self._now()

    def hurry(self) -> None:
        """The peer has shown itself: the wait is over."""
        self._hurry.set()

    def end(self) -> None:
        """The node is stopping."""
        if self.task is not None:
            self.task.cancel()

    async def run(self) -> None:
        """Until it is wanted no more."""
        timing = self._timing
        backoff = timing.backoff_min_seconds
        while True:
            self._hurry.clear()
            began = self._now()
            stood = await self._attempt(self)
            self.outbox.clear()
            if stood >= timing.steady_seconds:
                backoff = timing.backoff_min_seconds
            # From one beginning to the next: an attempt that met only silence has waited already, and the next SYN
            # should not come long after the way is free again.
            jitter = random.uniform(0.5, 1.0)  # noqa: S311  (spreads load, guards nothing)
            waited = self._now() - began
            await self._pause(max(backoff * jitter - waited, timing.backoff_min_seconds * jitter))
            if not self.held and self._now() - self.wanted_at > timing.wanted_seconds:
                return
            backoff = min(backoff * 2, timing.backoff_max_seconds)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
        except TimeoutError:
            pass  # nobody came


async def race(
    attempt: Callable[[], Coroutine[Any, Any, T]],
    after: float,
    *,
    own: Callable[[Coroutine[Any, Any, T]], asyncio.Task[T]],
    discard: Callable[[T], None],
) -> T:
    """The first of two attempts to succeed, the second begun after `after` seconds; raises what the first one raised if
    neither does. `own` makes their tasks and answers for their end: the loser is told to stop, not waited for.
    `discard` gets what a loser may still have won, and what nobody waits for any more."""
    racers = [own(attempt())]
    won: asyncio.Task[T] | None = None
    try:
        await asyncio.wait(racers, timeout=after)
        if not racers[0].done():
            racers.append(own(attempt()))
        waiting = set(racers)
        while waiting and won is None:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            won = next((racer for racer in racers if racer in done and racer.exception() is None), None)
        return (won or racers[0]).result()
    finally:
        # Nothing is awaited from here on: a cancellation between the win and the return would lose what was won.
        for racer in racers:
            if racer is not won:
                racer.cancel()
                racer.add_done_callback(partial(_leave, discard))


def _leave(discard: Callable[[T], None], racer: asyncio.Task[T]) -> None:
    if not racer.cancelled() and racer.exception() is None:
        discard(racer.result())
