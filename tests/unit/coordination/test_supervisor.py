"""The supervisor of daemons: backoff, giving up, obeying by name, and never two of one daemon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from coordination.daemon_manager import MAX_QUICK_DEATHS, Daemon, Supervisor, backoff_seconds
from coordination.daemon_types import DaemonState, DaemonType
from coordination.errors import Refused
from coordination.events import Event, EventBus
from coordination.events import EventType as E

REAPER = DaemonType.JOB_REAPER


class FakeClock:
    def __init__(self) -> None:
        self.mono = 0

    def now_ms(self) -> int:
        return 1_700_000_000_000 + self.mono

    def mono_ms(self) -> int:
        return self.mono


class Loop:
    """A daemon for tests: runs until told to die or cancelled."""

    def __init__(self) -> None:
        self.running = 0
        self.most = 0
        self.runs = 0
        self.started = asyncio.Event()
        self.death: asyncio.Future[None] | None = None

    async def __call__(self) -> None:
        self.runs += 1
        self.running += 1
        self.most = max(self.most, self.running)
        self.death = asyncio.get_running_loop().create_future()
        self.started.set()
        try:
            await self.death
        finally:
            self.running -= 1
            self.started.clear()

    async def die(self, error: BaseException | None = None) -> None:
        await self.started.wait()
        assert self.death is not None
        if isinstance(error, asyncio.CancelledError):
            self.death.cancel()
        elif error is not None:
            self.death.set_exception(error)
        else:
            self.death.set_result(None)
        while self.started.is_set():
            await asyncio.sleep(0)


class Bench:
    """A supervisor with one daemon, its clock, its events and the backoffs it asked for."""

    def __init__(self) -> None:
        self.clock, self.loop = FakeClock(), Loop()
        self.told: list[Event] = []
        self.deaths: list[int] = []
        bus = EventBus()
        bus.subscribe(lambda batch: self.told.extend(event for _, event in batch))
        self.supervisor = Supervisor(self.clock, bus, backoff=self.backoff)
        self.supervisor.add(REAPER, self.loop)
        self.daemon: Daemon = self.supervisor.get("job_reaper")

    def backoff(self, deaths: int) -> float:
        self.deaths.append(deaths)
        return 0.0

    def types(self) -> list[E]:
        return [event.type for event in self.told]


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    await bench.supervisor.stop_all()


async def settled(bench: Bench) -> None:
    assert bench.daemon.task is not None
    await asyncio.wait([bench.daemon.task])


@pytest.mark.parametrize(("deaths", "seconds"), [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (6, 16), (99, 16)])
def test_backoff_doubles_up_to_sixteen_seconds(deaths: int, seconds: float) -> None:
    assert backoff_seconds(deaths) == seconds


async def test_daemon_that_dies_is_started_again(bench: Bench) -> None:
    bench.supervisor.start_all()
    await bench.loop.die(ValueError("bad"))
    await bench.loop.started.wait()
    assert (bench.loop.runs, bench.daemon.restarts, bench.daemon.state) == (2, 1, DaemonState.RUNNING)
    assert bench.daemon.last_error == "ValueError: bad"
    assert bench.types() == [E.DAEMON_RESTARTED]
    assert bench.told[0].fields == {"daemon": "job_reaper", "reason": "ValueError: bad"}


@pytest.mark.parametrize(
    ("death", "error"),
    [
        (None, "it ended without being asked to"),
        (asyncio.CancelledError(), "something it waited for was cancelled"),
        (RuntimeError("x"), "RuntimeError: x"),
    ],
)
async def test_any_end_that_nobody_asked_for_is_a_death(bench: Bench, death: BaseException | None, error: str) -> None:
    bench.supervisor.start_all()
    await bench.loop.die(death)
    await bench.loop.started.wait()
    assert (bench.daemon.restarts, bench.daemon.last_error) == (1, error)


async def test_five_quick_deaths_are_the_end_until_somebody_starts_it(bench: Bench) -> None:
    bench.supervisor.start_all()
    for _ in range(MAX_QUICK_DEATHS):
        await bench.loop.die(ValueError("bad"))
    await settled(bench)
    assert (bench.daemon.state, bench.loop.runs) == (DaemonState.FAILED, MAX_QUICK_DEATHS)
    assert bench.deaths == [1, 2, 3, 4]
    assert bench.types() == [E.DAEMON_RESTARTED] * 4 + [E.DAEMON_FAILED]
    await bench.supervisor.restart(bench.daemon)
    await bench.loop.started.wait()
    assert (bench.daemon.state, bench.daemon.quick_deaths) == (DaemonState.RUNNING, 0)
    await bench.loop.die(ValueError("bad"))
    await bench.loop.started.wait()
    assert bench.deaths[-1] == 1, "a restart by hand gives it all its chances again"


async def test_life_of_a_minute_forgives_the_quick_deaths_before_it(bench: Bench) -> None:
    bench.supervisor.start_all()
    for lived in (0, 59_999, 60_000, 0):
        await bench.loop.started.wait()
        bench.clock.mono += lived
        await bench.loop.die(ValueError("bad"))
    await bench.loop.started.wait()
    assert bench.deaths == [1, 2, 1, 2]


async def test_stop_is_at_once_even_in_backoff(bench: Bench) -> None:
    asked = asyncio.Event()

    def an_hour(deaths: int) -> float:
        asked.set()
        return 3600.0

    supervisor = Supervisor(bench.clock, EventBus(), backoff=an_hour)
    loop = Loop()
    supervisor.add(REAPER, loop)
    supervisor.start_all()
    await loop.die()
    await asked.wait()
    daemon = supervisor.get("job_reaper")
    assert daemon.state is DaemonState.BACKOFF
    async with asyncio.timeout(5):
        await supervisor.stop_all()
    assert daemon.state is DaemonState.STOPPED


async def test_daemon_that_swallows_its_cancellation_still_stops(bench: Bench) -> None:
    started = asyncio.Event()

    async def stubborn() -> None:
        first = not started.is_set()
        started.set()
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            if not first:
                raise

    bench.supervisor.add(DaemonType.WORKER_PULL, stubborn)
    daemon = bench.supervisor.get("worker_pull")
    bench.supervisor.start(daemon)
    await started.wait()
    async with asyncio.timeout(5):
        await bench.supervisor.stop(daemon)
    assert (daemon.state, daemon.restarts) == (DaemonState.STOPPED, 0)


async def test_start_of_a_running_daemon_does_nothing(bench: Bench) -> None:
    bench.supervisor.start_all()
    bench.supervisor.start_all()
    await bench.loop.started.wait()
    assert (bench.loop.runs, bench.loop.most) == (1, 1)


async def test_restart_by_name_is_counted_and_told(bench: Bench) -> None:
    bench.supervisor.start_all()
    await bench.loop.started.wait()
    await bench.supervisor.restart(bench.supervisor.get("JOB_REAPER"))
    await bench.loop.started.wait()
    assert (bench.loop.runs, bench.daemon.restarts) == (2, 1)
    assert bench.told[-1].fields["reason"] == "by hand"


async def test_restarts_at_the_same_time_leave_one_running(bench: Bench) -> None:
    """The second once saw no task to stop while the first was still stopping it, and started another beside it."""
    bench.supervisor.start_all()
    await bench.loop.started.wait()
    await asyncio.gather(*(bench.supervisor.restart(bench.daemon) for _ in range(5)))
    await bench.loop.started.wait()
    assert bench.loop.most == 1
    assert (bench.daemon.state, bench.loop.running) == (DaemonState.RUNNING, 1)


async def test_start_and_stop_stress_leaves_no_second_one_and_no_task(bench: Bench) -> None:
    before = asyncio.all_tasks()
    for n in range(200):
        bench.supervisor.start(bench.daemon)
        for _ in range(n % 4):
            await asyncio.sleep(0)
        if n % 5 == 0:
            await asyncio.gather(bench.supervisor.stop(bench.daemon), bench.supervisor.restart(bench.daemon))
        await bench.supervisor.stop(bench.daemon)
        assert (bench.daemon.state, bench.loop.running) == (DaemonState.STOPPED, 0)
    assert bench.loop.most == 1
    assert asyncio.all_tasks() == before


def test_unknown_name_is_told_with_the_known_ones() -> None:
    supervisor = Supervisor(FakeClock(), EventBus())
    supervisor.add(REAPER, Loop())
    with pytest.raises(Refused, match="no daemon 'reaper'; there are: job_reaper") as refused:
        supervisor.get("reaper")
    assert (refused.value.status, refused.value.field) == (404, "type")
