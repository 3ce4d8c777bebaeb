"""The loop that watches the GPUs: what it tells, whom it ends, and whom it leaves alone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from config.settings import WorkerSettings
from coordination.alerts import AlertBook
from coordination.dispatcher import Room
from coordination.events import EventBus
from coordination.placement import Offer
from p2p.gpu_jobs import identify
from p2p.gpus import Gpu, Holder, Reading, Who
from p2p.loops import gpu_loops, job_loops
from p2p.loops.gpu_loops import GpuWatchLoop
from p2p.loops.job_loops import WorkerPullLoop
from p2p.runner.protocol import ActivitySample, AttemptReport
from p2p.workplace import LocalJob, Workplace

GPU = Gpu(uuid="G1", model="NVIDIA A40", memory_mb=46_000, utilization=0.0)


class Rooms:
    def __init__(self) -> None:
        self.told: list[Room] = []

    def make_room(self, room: Room) -> None:
        self.told.append(room)


class Runner:
    connected = True

    def __init__(self) -> None:
        self.stopped: list[tuple[str, str]] = []

    async def stop(self, job: str, attempt: int, *, reason: str, grace_seconds: float) -> None:
        self.stopped.append((job, reason))


class Box:
    """A worker that has taken up what it has, and the loop beside it."""

    def __init__(self, folder: Path, policy: Any = "warn") -> None:
        self.bus, self.desk, self.runner = EventBus(), Rooms(), Runner()
        self.alerts = AlertBook(self.bus)
        self.reading = Reading(gpus=(GPU,))
        self.place = Workplace("n1", Offer(node="n1", cpus=8), folder, "http://x", 4, gpus=lambda: self.reading)
        self.worker = WorkerPullLoop(
            self.desk,  # type: ignore[arg-type]
            self.place, folder / "runner", WorkerSettings(), heartbeat_seconds=5, lease_seconds=30,
        )  # fmt: skip
        self.worker.runner = self.runner  # type: ignore[assignment]
        self.worker._in_touch = True
        self.loop = GpuWatchLoop(
            self.worker, lambda: self.reading, self.alerts, lambda: 1_000, policy=policy, interval_seconds=3_600
        )

    def job(self, name: str, **requires: Any) -> LocalJob:
        asked = {"gpus": 1, "gpu_memory_mb": 10_000, **requires}
        return self.place.add({"id": name, "attempt": 1, "requires": asked, "gpus": ["G1"], "grace_seconds": 1})

    def hold(self, *holders: Holder) -> None:
        self.reading = Reading(gpus=(replace(GPU, holders=holders),))

    @property
    def standing(self) -> dict[str, str]:
        return {alert["alert"]: alert["message"] for alert in self.alerts.standing()}


def of(job: LocalJob, pid: int, memory_mb: int) -> Holder:
    return Holder(pid, memory_mb, None, Who(1, pid, "python", job.id, job.attempt, str(job.folder)))


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


async def test_an_unhealthy_gpu_is_one_alert_and_its_recovery_another(box: Box) -> None:
    box.reading = Reading(gpus=(replace(GPU, why="Xid 79: it has fallen off the bus"),))
    for _ in range(3):
        await box.loop.run_once()
    assert box.standing == {"gpu_unhealthy_G1": "GPU G1 (NVIDIA A40) is not offered: Xid 79: it has fallen off the bus"}
    box.reading = Reading(gpus=(GPU,))
    await box.loop.run_once()
    assert [event.type for _, event in box.bus.tail()] == ["ALERT_RAISED", "ALERT_CLEARED"]


async def test_a_node_whose_nvml_hangs_tells_so_once_and_not_of_each_gpu(box: Box) -> None:
    box.reading = Reading(gpus=(GPU,)).in_doubt("NVML has not answered for over 10 s")
    await box.loop.run_once()
    assert list(box.standing) == ["gpu_error"]


async def test_a_loop_before_the_first_look_says_nothing(box: Box) -> None:
    box.reading = Reading(sampled=False)
    await box.loop.run_once()
    assert (box.standing, box.desk.told) == ({}, [])


async def test_the_leader_is_told_when_what_is_free_has_changed(box: Box) -> None:
    for _ in range(3):
        await box.loop.run_once()
    assert [room.free.gpus[0].memory_free_mb for room in box.desk.told] == [46_000]
    box.reading = Reading(gpus=(replace(GPU, used_mb=100, utilization=99.0),))
    await box.loop.run_once()
    assert len(box.desk.told) == 1, "a little more or less does not matter"
    box.reading = Reading(gpus=(replace(GPU, used_mb=20_000),))
    await box.loop.run_once()
    assert [room.free.gpus[0].memory_free_mb for room in box.desk.told] == [46_000, 26_000]
    box.reading = Reading(gpus=(replace(GPU, used_mb=20_000, why="Xid 79"),))
    await box.loop.run_once()
    assert not box.desk.told[-1].free.gpus[0].healthy


async def test_memory_beyond_the_grant_is_an_alert_until_it_is_not(box: Box) -> None:
    job = box.job("greedy", gpu_share=0.5)
    box.hold(of(job, 7, 12_000))
    await box.loop.run_once()
    assert "it used 12000 MB of GPU G1, and was granted 10000 MB" in box.standing["gpu_memory_greedy.1"]
    assert box.runner.stopped == []
    box.hold(of(job, 7, 9_000))
    await box.loop.run_once()
    assert box.standing == {}


async def test_by_policy_it_is_the_end_of_the_attempt_told_once_with_the_reason(tmp_path: Path) -> None:
    box = Box(tmp_path, policy="kill")
    job = box.job("greedy", gpu_share=0.5)
    box.job("modest", gpu_share=0.5)
    box.hold(of(job, 7, 12_000))
    for _ in range(3):
        await box.loop.run_once()
    assert box.runner.stopped == [("greedy", "gpu_memory")]
    report = AttemptReport(job="greedy", attempt=1, state="exited", started_ms=1, signal=15, reason="gpu_memory",
                           error="gpu_memory: killed by SIGTERM")  # fmt: skip
    done = job_loops._end_of(box.place, report, job, box.worker._why[job.key])
    assert done.error is not None
    assert done.error.startswith("gpu_memory: killed by SIGTERM: it used 12000 MB of GPU G1")
    assert (done.ok, done.cause, done.retryable) == (False, "gpu_memory", True)
    by_itself = replace(report, reason="exit", exit_code=0, signal=None, error=None)
    assert job_loops._end_of(box.place, by_itself, job, "it used too much").error is None


# -- what ended jobs left behind --------------------------------------------------------------------------------------

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)
MILD = "import time; print('up', flush=True); time.sleep(600)"


class Processes:
    def __init__(self) -> None:
        self.all: list[subprocess.Popen[bytes]] = []

    def start(self, script: str, **marks: str) -> subprocess.Popen[bytes]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("P2P_")}
        process = subprocess.Popen(
            [sys.executable, "-c", script], env={**environment, **marks}, stdout=subprocess.PIPE, start_new_session=True
        )
        self.all.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    monkeypatch.setattr(gpu_loops, "RUNNER_SECONDS", 0.05)
    monkeypatch.setattr(gpu_loops, "GRACE_SECONDS", 0.2)
    made = Processes()
    yield made
    for process in made.all:
        process.kill()
        process.communicate()


def marks(box: Box, job: str, attempt: int = 1, folder: Path | None = None) -> dict[str, str]:
    where = (folder or box.place.folder) / f"{job}.{attempt}"
    return {"P2P_JOB_ID": job, "P2P_ATTEMPT": str(attempt), "P2P_JOB_DIR": str(where)}


def holding(process: subprocess.Popen[bytes]) -> Holder:
    return Holder(process.pid, 1_000, None, identify(process.pid))


async def turns(box: Box, until: Any) -> None:
    async with asyncio.timeout(20):
        while not until():
            await box.loop.run_once()
            await asyncio.sleep(0.02)


async def test_leftovers_are_ended_and_strangers_are_not(box: Box, processes: Processes, tmp_path: Path) -> None:
    mild = processes.start(MILD, **marks(box, "gone"))
    stubborn = processes.start(STUBBORN, **marks(box, "gone", 2))
    elsewhere = processes.start(MILD, **marks(box, "gone", folder=tmp_path / "another-node/jobs"))
    stranger = processes.start(MILD)
    running = box.job("running")
    own = processes.start(MILD, **marks(box, "running"))
    spared = [elsewhere, stranger, own]
    box.hold(*map(holding, [mild, stubborn, *spared]))
    seen: set[str] = set()

    def both_gone() -> bool:
        seen.update(box.standing)
        return mild.poll() is not None and stubborn.poll() is not None

    await turns(box, both_gone)
    assert (mild.returncode, stubborn.returncode) == (-signal.SIGTERM, -signal.SIGKILL)
    assert seen == {"gpu_leftovers"}
    assert [process.poll() for process in spared] == [None] * 3
    assert box.loop.stats["leftovers_ended"] == 2
    assert not running.ended
    box.hold(*map(holding, spared))
    await box.loop.run_once()
    assert box.standing == {}


async def test_nothing_is_left_over_before_it_is_known_what_runs(box: Box, processes: Processes) -> None:
    """After a start the workplace is empty until the runner has told, and every running job looks like an ended one."""
    process = processes.start(MILD, **marks(box, "runs-from-before"))
    box.hold(holding(process))
    box.worker._in_touch = False
    for _ in range(10):
        await box.loop.run_once()
        await asyncio.sleep(0.02)
    assert process.poll() is None
    box.worker._in_touch = True
    await turns(box, lambda: process.poll() is not None)


async def test_a_pid_that_has_passed_to_another_is_not_signalled(box: Box, processes: Processes) -> None:
    process = processes.start(MILD, **marks(box, "gone"))
    held = holding(process)
    assert held.who is not None
    box.hold(held._replace(who=held.who._replace(start=held.who.start - 1)))
    for _ in range(20):
        await box.loop.run_once()
        await asyncio.sleep(0.02)
    assert process.poll() is None
    assert box.loop.stats["leftovers_ended"] == 0


# -- as every loop ----------------------------------------------------------------------------------------------------


async def test_it_stops_at_once_and_survives_being_started_and_stopped(box: Box) -> None:
    for _ in range(30):
        task = asyncio.create_task(box.loop.run())
        await asyncio.sleep(0)
        box.loop.poke()
        await asyncio.sleep(0)
        task.cancel()
        assert (await asyncio.wait([task], timeout=5))[0]
    assert not box.loop.is_running


# -- signs of life ----------------------------------------------------------------------------------------------------


def sample(cpu_seconds: float, output: int = 0) -> ActivitySample:
    return ActivitySample(
        job="j", attempt=1, cpu_seconds=cpu_seconds, rss_mb=1, stdout_bytes=output, stderr_bytes=0, progress_mtime_ms=0
    )


@pytest.mark.parametrize(
    ("use", "busy"), [(None, True), (0.0, False), (4.9, False), (5.0, True), (97.0, True)],
    ids=["cannot be told", "idle", "as good as idle", "works", "works hard"],
)  # fmt: skip
async def test_a_job_with_gpus_is_busy_if_they_are(box: Box, use: float | None, busy: bool) -> None:
    job = box.job("j")
    box.reading = Reading(gpus=(replace(GPU, utilization=use),))
    told = box.worker._gpu_use()
    assert job_loops._signs(job, sample(0), None, told.get(job.key)).busy is busy
    assert job_loops._signs(job, None, None, told.get(job.key)).busy is busy


async def test_a_job_with_gpus_that_only_spins_gives_no_sign_of_life(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    job = box.job("j")
    at = [100.0]
    monkeypatch.setattr(job_loops.time, "monotonic", lambda: at[0])
    told = []
    for n in range(4):
        told.append(job_loops._signs(job, sample(5.0 * n), None, 0.0).cpu_seconds)
        at[0] += 5
    assert told == [0, 0, 0, 0]
    assert job_loops._signs(job, sample(55.0), None, 0.0).cpu_seconds > 30, "many cores at work are a sign"


async def test_a_job_without_gpus_is_judged_by_its_cpu_time_as_ever(box: Box) -> None:
    job = box.place.add({"id": "j", "attempt": 1, "requires": {}})
    signs = job_loops._signs(job, sample(3.5, output=7), None, None)
    assert (signs.busy, signs.cpu_seconds, signs.output_bytes) == (False, 3.5, 7)
