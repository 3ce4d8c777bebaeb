"""When to dial, and the race of two attempts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from p2p.transport.dialer import Dialer, Timing, race
from p2p.transport.outbox import LIMITS, Outbox
from tests.unit.p2p.transport.endpoints import turns


class Attempts:
    """Contestants that end when they are told to."""

    def __init__(self) -> None:
        self.begun: list[asyncio.Future[str]] = []
        self.discarded: list[str] = []
        self.owned: list[asyncio.Task[str]] = []
        self.cancelled = 0
        self.stubborn = False  # wins even while it is being cancelled

    async def attempt(self) -> str:
        mine: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.begun.append(mine)
        try:
            return await mine
        except asyncio.CancelledError:
            self.cancelled += 1
            if self.stubborn:
                return "too late"
            raise

    def race(self, after: float) -> asyncio.Task[str]:
        return asyncio.create_task(race(self.attempt, after, own=self.own, discard=self.discarded.append))

    def own(self, work: Coroutine[Any, Any, str]) -> asyncio.Task[str]:
        self.owned.append(asyncio.create_task(work))
        return self.owned[-1]

    async def settled(self) -> None:
        await asyncio.wait(self.owned)
        await turns()

    async def until(self, number: int) -> None:
        async with asyncio.timeout(5):
            while len(self.begun) < number:
                await asyncio.sleep(0)


async def test_a_quick_first_attempt_stays_alone() -> None:
    attempts = Attempts()
    racing = attempts.race(60)
    await attempts.until(1)
    attempts.begun[0].set_result("first")
    assert await racing == "first"
    assert len(attempts.begun) == 1


async def test_a_lost_syn_is_overtaken_by_the_second_attempt() -> None:
    attempts = Attempts()
    racing = attempts.race(0.001)
    await attempts.until(2)
    attempts.begun[1].set_result("second")
    assert await racing == "second"
    await attempts.settled()
    assert (attempts.cancelled, attempts.discarded) == (1, [])


async def test_a_first_attempt_that_wins_late_is_kept() -> None:
    attempts = Attempts()
    racing = attempts.race(0.001)
    await attempts.until(2)
    attempts.begun[0].set_result("first")
    assert await racing == "first"
    await attempts.settled()
    assert attempts.cancelled == 1


async def test_a_loser_that_wins_all_the_same_is_discarded() -> None:
    attempts = Attempts()
    attempts.stubborn = True
    racing = attempts.race(0.001)
    await attempts.until(2)
    attempts.begun[1].set_result("second")
    assert await racing == "second"
    await attempts.settled()
    assert attempts.discarded == ["too late"]


async def test_one_failure_leaves_the_other_in_the_race() -> None:
    attempts = Attempts()
    racing = attempts.race(0.001)
    await attempts.until(2)
    attempts.begun[0].set_exception(OSError("refused"))
    await turns()
    attempts.begun[1].set_result("second")
    assert await racing == "second"


async def test_a_refused_first_attempt_is_not_repeated_at_once() -> None:
    attempts = Attempts()
    racing = attempts.race(60)
    await attempts.until(1)
    attempts.begun[0].set_exception(ConnectionRefusedError("refused"))
    with pytest.raises(ConnectionRefusedError):
        await racing
    assert len(attempts.begun) == 1


async def test_two_failures_are_told_as_the_first() -> None:
    attempts = Attempts()
    racing = attempts.race(0.001)
    await attempts.until(2)
    attempts.begun[1].set_exception(OSError("second"))
    await turns()
    attempts.begun[0].set_exception(OSError("first"))
    with pytest.raises(OSError, match="first"):
        await racing


@pytest.mark.parametrize("steps", range(6))
async def test_a_race_cancelled_at_any_moment_keeps_nothing(steps: int) -> None:
    attempts = Attempts()
    attempts.stubborn = True
    racing = attempts.race(0.001)
    await attempts.until(2)
    attempts.begun[1].set_result("second")
    await turns(steps)
    finished = racing.done()
    racing.cancel()
    await asyncio.wait({racing})
    await attempts.settled()
    if finished:
        assert racing.result() == "second"
    else:
        assert racing.cancelled()
        assert sorted(attempts.discarded) == ["second", "too late"]


# -- the pace --------------------------------------------------------------------------------------------------------

TIMING = replace(Timing(), backoff_min_seconds=0.001, backoff_max_seconds=0.004, wanted_seconds=0.03)


def dialer(attempt: Callable[[], float], timing: Timing = TIMING) -> Dialer:
    async def begin(_: Dialer) -> float:
        return attempt()

    return Dialer(begin, Outbox(LIMITS["control"]), timing)


async def test_dialling_ends_when_nothing_is_sent_any_more() -> None:
    times = []
    loop = asyncio.get_running_loop()
    began = loop.time()
    await dialer(lambda: times.append(loop.time()) or 0.0).run()  # type: ignore[func-returns-value]
    assert 0.03 <= loop.time() - began < 5
    assert 2 <= len(times) <= 40  # with the backoff; without, hundreds


async def test_a_held_link_is_dialled_for_ever() -> None:
    enough = asyncio.Event()
    seen = []

    def attempt() -> float:
        seen.append(1)
        if len(seen) == 30:
            enough.set()
        return 0.0

    held = dialer(attempt, replace(TIMING, wanted_seconds=0.0))
    held.held = True
    running = asyncio.create_task(held.run())
    async with asyncio.timeout(10):
        await enough.wait()
    running.cancel()
    await asyncio.wait({running})


async def test_a_peer_that_shows_itself_cuts_the_wait_short() -> None:
    twice = asyncio.Event()
    seen = []

    def attempt() -> float:
        seen.append(1)
        if len(seen) == 2:
            twice.set()
        return 0.0

    slow = dialer(attempt, replace(Timing(), backoff_min_seconds=3600.0, backoff_max_seconds=3600.0))
    running = asyncio.create_task(slow.run())
    await turns()
    slow.hurry()
    async with asyncio.timeout(5):
        await twice.wait()
    running.cancel()
    await asyncio.wait({running})


async def test_what_waited_for_a_failed_attempt_is_dropped() -> None:
    failing = dialer(lambda: 0.0)
    failing.outbox.put(b"heartbeat")
    await failing.run()
    assert (len(failing.outbox), failing.outbox.dropped) == (0, 1)


@pytest.mark.parametrize(("stood", "most"), [(0.0, 12), (99.0, 1000)], ids=["fails", "stood"])
async def test_the_backoff_grows_only_while_links_do_not_stand(stood: float, most: int) -> None:
    seen: list[int] = []
    timing = replace(Timing(), backoff_min_seconds=0.001, backoff_max_seconds=1.0, wanted_seconds=0.5)
    await dialer(lambda: seen.append(1) or stood, timing).run()  # type: ignore[func-returns-value]
    assert len(seen) <= most
    assert (len(seen) > 20) is (stood > 0)
