"""What a dispatcher takes up when its term begins, and that no attempt is given up twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from coordination import commands as c
from coordination.dispatcher import Dispatcher
from coordination.events import EventBus
from coordination.kinds import Kinds
from coordination.queue_reads import QueueReader
from coordination.queue_state import QueueState
from tests.unit.coordination.drive import T0, new_job

LEASE = 30_000


class FakeClock:
    def __init__(self) -> None:
        self.now, self.mono = T0, 1_000_000

    def now_ms(self) -> int:
        return self.now

    def mono_ms(self) -> int:
        return self.mono

    def advance(self, ms: int) -> None:
        self.now += ms
        self.mono += ms


def done(work: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(work())
    return future


class Desk:
    """A dispatcher over a real queue whose journal commits at once."""

    def __init__(self, path: str) -> None:
        self.clock, self.bus = FakeClock(), EventBus()
        self.state = QueueState(path)
        self.reader = QueueReader(path)
        self.before_reading: Callable[[], None] = lambda: None
        self.desk = Dispatcher(
            journal=self,
            state=self.state,
            read=self.read,
            kinds=Kinds({}, {}),
            clock=self.clock,
            bus=self.bus,
            lease_ms=LEASE,
        )

    def propose(self, body: bytes) -> Future[Any]:
        ((result, events),) = self.state.apply_batch([(self.state.applied_index + 1, 1, body)])
        self.bus.publish(events)
        return done(lambda: result)

    def query(self, question: Callable[[], Any]) -> Future[Any]:
        return done(question)

    def read(self, question: Callable[[QueueReader], Any]) -> Future[Any]:
        answer = done(lambda: question(self.reader))
        self.before_reading()
        return answer

    def apply(self, command: c.Command) -> Any:
        return self.propose(c.encode(command)).result()


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(str(tmp_path / "state.db"))
    desk.apply(c.Submit(T0, (new_job("a", timeout_ms=1_000), new_job("b"), new_job("c")), "", ""))
    desk.apply(c.Claim(T0, "w", (c.Pick(1, None), c.Pick(2, None))))
    desk.apply(c.Begin(T0, "w", (c.Began("a", 1, T0),)))
    yield desk
    desk.reader.close()
    desk.state.close()


async def test_every_attempt_gets_a_full_lease_from_a_new_leader(desk: Desk) -> None:
    desk.clock.advance(3_600_000)  # an hour without a leader
    await desk.desk.begin_term()
    leases = desk.desk.leases
    assert sorted(leases.by_job) == ["a", "b"]
    desk.clock.advance(LEASE - 1)
    assert leases.lapsed(desk.clock.mono) == []
    assert leases.overdue(desk.clock.now, 0) == []
    assert leases.never_started(desk.clock.now, 1_800_000) == []
    desk.clock.advance(1)
    assert {v.held.job for v in leases.lapsed(desk.clock.mono)} == {"a", "b"}
    assert [v.held.job for v in leases.overdue(desk.clock.now, 0)] == ["a"]
    assert [v.held.job for v in leases.never_started(desk.clock.now, 1_800_000)] == ["b"]


async def test_grant_of_the_moment_is_not_overwritten_by_an_older_reading(desk: Desk) -> None:
    def another_worker_gets_b() -> None:
        desk.before_reading = lambda: None
        desk.apply(c.Release(T0, ("b",), "why"))
        desk.apply(c.Claim(T0, "v", (c.Pick(2, None),)))

    desk.before_reading = another_worker_gets_b
    loop_turns = desk.desk.begin_term()
    await loop_turns
    leases = desk.desk.leases
    await desk.desk.ask(lambda reader: None)
    by_worker = {worker: sorted(jobs) for worker, jobs in leases.by_worker.items()}
    assert (leases.by_job["b"].worker, leases.by_job["b"].attempt) == ("v", 2)
    assert by_worker == {"w": ["a"], "v": ["b"]}


async def test_attempt_that_had_ended_is_given_up_once_and_then_forgotten(desk: Desk) -> None:
    """A reading older than the events left a ghost: given up each cycle, for ever, with no event to end it."""
    await desk.desk.begin_term()
    ghost = desk.desk.leases.by_job["b"]
    desk.state.apply_batch([(desk.state.applied_index + 1, 1, c.encode(c.Cancel(T0, ("b",), "why")))])  # unheard of
    desk.clock.advance(LEASE)
    verdicts = [v for v in desk.desk.leases.lapsed(desk.clock.mono) if v.held is ghost]
    assert await desk.desk.expire(verdicts) == 0
    assert "b" not in desk.desk.leases.by_job
    assert [notice.job for notice in desk.desk.leases.take_notices("w", desk.clock.mono)] == ["b"]


async def test_giving_up_spends_the_attempt_and_tells_its_worker(desk: Desk) -> None:
    await desk.desk.begin_term()
    desk.clock.advance(LEASE)
    assert await desk.desk.expire(desk.desk.leases.lapsed(desk.clock.mono)) == 2
    assert desk.desk.leases.by_job == {}
    assert sorted(notice.job for notice in desk.desk.leases.take_notices("w", desk.clock.mono)) == ["a", "b"]
    assert desk.state.pending_total == 3


async def test_a_returning_worker_is_not_held_up_by_one_attempt_that_has_ended_meanwhile(desk: Desk) -> None:
    await desk.desk.begin_term()
    desk.desk._loop = None  # the events of what follows are lost: the lease table keeps a ghost
    desk.apply(c.Cancel(T0, ("a",), "operator"))
    desk.apply(c.Cancel(T0, ("b",), "operator"))
    del desk.desk.leases.by_worker["w"]["b"]
    assert list(desk.desk.leases.by_worker["w"]) == ["a"]
    assert await desk.desk.heartbeat("w", [], first=True) == ([], [])


async def test_the_step_of_a_clock_that_is_put_right_ends_no_job(desk: Desk) -> None:
    await desk.desk.begin_term()
    desk.clock.advance(LEASE)
    desk.clock.now += 3 * 3_600_000  # booted three hours slow, and corrected
    assert desk.desk.leases.overdue(desk.desk.steady_ms(), 3_600_000) == []
    assert desk.desk.leases.never_started(desk.desk.steady_ms(), 3_600_000) == []
    assert [v.cause for v in desk.desk.stuck(3_600_000)] == []


async def test_a_job_that_begins_to_wait_for_its_time_is_told_of(desk: Desk) -> None:
    told: list[str] = []
    desk.desk.on_waiting = lambda: told.append("waits")
    assert not desk.desk.anything_waits
    await desk.desk.begin_term()
    assert told.pop() == "waits"  # what waited before is a new leader's to wake
    failed = c.AttemptDone("a", 1, "w", False, None, "boom", 1, True, 0, "exit")
    desk.apply(c.Finish(T0, (failed,)))
    await asyncio.sleep(0)
    assert told == []  # its backoff is 0: it is pending again
    assert not desk.desk.anything_waits
    desk.apply(c.Submit(T0, (new_job("d", backoff_ms=5_000, max_attempts=2),), "", ""))
    desk.apply(c.Claim(T0, "w", (c.Pick(4, None),)))
    desk.apply(c.Finish(T0, (failed._replace(id="d"),)))
    await asyncio.sleep(0)
    assert told == ["waits"]
    assert desk.desk.anything_waits
    desk.apply(c.Submit(T0, (new_job("e"), new_job("f", not_before_ms=T0 + 60_000)), "", ""))
    await asyncio.sleep(0)
    assert told == ["waits"] * 2
    desk.desk.end_term()
    assert not desk.desk.anything_waits  # not this node's to wake
