"""What a worker does when its runner or its leader goes away: nothing is forgotten, nothing is started for nothing."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from config.settings import WorkerSettings
from coordination.commands import AttemptDone
from coordination.dispatcher import Beat, Room
from coordination.errors import OutcomeUnknown, Refused
from coordination.leases import Claimant, Notice
from coordination.placement import GpuOffer, Offer
from p2p.loops import job_loops
from p2p.loops.job_loops import WorkerPullLoop
from p2p.runner.client import ActivitySample, AttemptReport, RunnerUnavailable, StartSpec
from p2p.runner.protocol import VERSION
from p2p.workplace import Key, Workplace

SECONDS = 10.0


class FakeRunner:
    """Remembers what it was asked. `lose` drops the connection; what `deaf` names fails as a lost connection does."""

    runner_version = VERSION

    def __init__(self, loop: WorkerPullLoop) -> None:
        self._loop = loop
        self.known: list[AttemptReport] = []
        self.started: list[Key] = []
        self.stopped: list[Key] = []
        self.acked: list[Key] = []
        self.deaf: set[str] = set()
        self.connected = False
        self.connections = 0

    async def connect(self) -> list[AttemptReport]:
        self.connected = True
        self.connections += 1
        return self.known

    def _check(self, what: str) -> None:
        if what in self.deaf:
            self.deaf.discard(what)
            raise RunnerUnavailable(f"lost while asked to {what}")

    async def start(self, specs: list[StartSpec]) -> None:
        self._check("start")
        for _ in range(3):
            await asyncio.sleep(0)  # a full pipe
        self.started.extend(spec.key for spec in specs)

    async def stop(self, job: str, attempt: int, *, reason: str, grace_seconds: float) -> None:
        self._check("stop")
        self.stopped.append((job, attempt))

    async def ack(self, items: list[Key]) -> None:
        self._check("ack")
        self.acked.extend(items)

    async def sample(self) -> list[Any]:
        return []

    async def shutdown(self) -> None: ...

    async def close(self) -> None:
        self.connected = False

    def lose(self) -> None:
        self._loop._on_lost()

    def report(self, *reports: AttemptReport) -> None:
        self._loop._on_report(list(reports))


class FakeDesk:
    """A leader that says what it is told to say."""

    def __init__(self) -> None:
        self.claims: asyncio.Queue[tuple[list[dict[str, Any]], list[Notice]]] = asyncio.Queue()
        self.beats: list[tuple[list[Claimant], bool]] = []
        self.stale: list[str] = []
        self.finished: list[AttemptDone] = []
        self.reports: list[int] = []
        self.describing = asyncio.Event()
        self.describing.set()
        self.finish_errors: list[Exception] = []
        self.leaves: list[float] = []
        self.nobody_leads = False

    def make_room(self, room: Room) -> None: ...

    async def claim(self, worker: str, *, wait_seconds: float) -> tuple[list[dict[str, Any]], list[Notice]]:
        return await self.claims.get()

    async def heartbeat(
        self, worker: str, beats: list[Beat], *, first: bool, whole: bool = False
    ) -> tuple[list[str], list[str]]:
        self.beats.append(([Claimant(beat.signs.job, beat.signs.attempt) for beat in beats], first))
        return list(self.stale), []

    async def describe(self, keys: list[Key]) -> dict[Key, dict[str, Any]]:
        await self.describing.wait()
        return {key: {"id": key[0], "attempt": key[1], "requires": {}} for key in keys}

    async def finish(self, items: tuple[AttemptDone, ...]) -> list[Refused | None]:
        if self.finish_errors:
            raise self.finish_errors.pop(0)
        self.finished.extend(items)
        self.reports.append(len(items))
        return [None] * len(items)

    def mono_ms(self) -> int:
        return 0

    async def leave(self, worker: str, seconds: float) -> None:
        self.leaves.append(seconds)
        if self.nobody_leads:
            raise Refused(503, "nobody is known to lead; nothing was done")

    def give(self, job: str, attempt: int = 1) -> None:
        self.claims.put_nowait(([{"id": job, "attempt": attempt, "command": ["true"], "requires": {}}], []))

    @property
    def first_beats(self) -> list[list[Claimant]]:
        return [beats for beats, first in self.beats if first]


class Worker:
    def __init__(self, folder: Path) -> None:
        self.desk = FakeDesk()
        place = Workplace("n1", Offer(node="n1", cpus=64), folder, "http://127.0.0.1:1", 64)
        self.loop = WorkerPullLoop(
            self.desk, place, folder, WorkerSettings(), heartbeat_seconds=3_600, lease_seconds=30
        )
        self.runner = FakeRunner(self.loop)
        self.loop.runner = self.runner  # type: ignore[assignment]

    async def until(self, what: Any) -> None:
        async with asyncio.timeout(SECONDS):
            while not what():
                await asyncio.sleep(0.001)

    async def holds(self, job: str) -> None:
        """Claims a job and has it started."""
        self.desk.give(job)
        await self.until(lambda: (job, 1) in self.runner.started)


@pytest.fixture
async def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Worker]:
    monkeypatch.setattr(job_loops, "RETRY_SECONDS", 0.001)
    made = Worker(tmp_path)
    made.loop.interval_seconds = 0.001
    task = asyncio.create_task(made.loop.run())
    yield made
    task.cancel()
    assert (await asyncio.wait([task], timeout=SECONDS))[0]


def running(job: str, attempt: int = 1) -> AttemptReport:
    return AttemptReport(job=job, attempt=attempt, state="running", pid=1, started_ms=5)


def ended(job: str, code: int = 0) -> AttemptReport:
    return AttemptReport(job=job, attempt=1, state="exited", started_ms=5, ended_ms=6, exit_code=code, reason="exit")


async def test_the_first_beat_of_a_connection_lists_all_that_is_there(worker: Worker) -> None:
    await worker.until(lambda: worker.desk.first_beats == [[]])
    await worker.holds("a")
    worker.runner.known = [running("a")]
    worker.runner.lose()
    await worker.until(lambda: worker.desk.first_beats == [[], [Claimant("a", 1)]])


async def test_what_runs_from_before_this_start_is_taken_up_not_started(worker: Worker) -> None:
    worker.runner.known = [running("old")]
    worker.runner.lose()
    await worker.until(lambda: [Claimant("old", 1)] in worker.desk.first_beats)
    assert worker.runner.started == []
    assert worker.loop.running_jobs() == 1


async def test_a_job_that_ends_while_it_is_taken_up_is_not_forgotten(worker: Worker) -> None:
    await worker.until(lambda: worker.desk.first_beats == [[]])
    worker.desk.describing.clear()
    worker.runner.known = [running("old")]
    worker.runner.lose()
    await worker.until(lambda: worker.runner.connections == 2)
    worker.runner.report(ended("old"))
    worker.desk.describing.set()
    await worker.until(lambda: [item.id for item in worker.desk.finished] == ["old"])
    await worker.until(lambda: worker.loop.running_jobs() == 0)


async def test_a_job_the_runner_never_got_is_started_over_the_next_connection(worker: Worker) -> None:
    worker.runner.deaf = {"start"}
    worker.desk.give("a")
    await worker.until(lambda: worker.runner.connections == 2)
    await worker.until(lambda: worker.runner.started == [("a", 1)])


async def test_a_job_the_runner_has_is_not_started_again(worker: Worker) -> None:
    await worker.holds("a")
    worker.runner.known = [running("a")]
    worker.runner.lose()
    await worker.until(lambda: len(worker.desk.first_beats) == 2)
    assert worker.runner.started == [("a", 1)]


async def test_an_end_is_acknowledged_to_the_runner_only_after_the_leader_took_it(worker: Worker) -> None:
    worker.desk.finish_errors = [OutcomeUnknown("?"), Refused(503, "no"), OutcomeUnknown("?")]
    await worker.holds("a")
    worker.runner.report(ended("a", 3))
    await worker.until(lambda: worker.runner.acked)
    assert worker.desk.finish_errors == []
    assert [(done.id, done.exit_code, done.ok) for done in worker.desk.finished] == [("a", 3, False)]
    assert worker.runner.acked == [("a", 1)]


async def test_an_end_whose_acknowledgement_was_lost_is_told_again(worker: Worker) -> None:
    await worker.holds("a")
    worker.runner.deaf = {"ack"}
    worker.runner.known = [ended("a")]
    worker.runner.report(ended("a"))
    await worker.until(lambda: worker.runner.acked)
    assert [done.id for done in worker.desk.finished] == ["a", "a"]
    await worker.until(lambda: not worker.loop.workplace.jobs)


async def test_an_end_from_before_this_start_is_told(worker: Worker) -> None:
    worker.runner.known = [ended("old", 4)]
    worker.runner.lose()
    await worker.until(lambda: worker.runner.acked == [("old", 1)])
    assert [(done.id, done.exit_code) for done in worker.desk.finished] == [("old", 4)]


async def test_a_kill_that_was_lost_with_its_connection_is_asked_for_again(worker: Worker) -> None:
    await worker.holds("a")
    worker.runner.known = [running("a")]
    worker.runner.deaf = {"stop"}
    worker.desk.stale = ["a"]
    worker.desk.claims.put_nowait(([], [Notice("a", 1)]))
    await worker.until(lambda: worker.runner.stopped == [("a", 1)])


async def test_a_kill_is_asked_for_once_over_one_connection(worker: Worker) -> None:
    await worker.holds("a")
    for _ in range(3):
        worker.desk.claims.put_nowait(([], [Notice("a", 1)]))
    await worker.until(lambda: worker.desk.claims.empty())
    await worker.holds("b")
    assert worker.runner.stopped == [("a", 1)]


async def test_of_two_attempts_of_one_job_the_older_is_killed(worker: Worker) -> None:
    worker.desk.stale = ["a"]
    worker.runner.known = [running("a", 2), running("a", 1)]
    worker.runner.lose()
    await worker.until(lambda: worker.runner.stopped)
    assert worker.runner.stopped == [("a", 1)]


async def test_both_attempts_of_one_job_are_killed_when_both_are_named(worker: Worker) -> None:
    worker.desk.stale = ["a", "a"]
    worker.runner.known = [running("a", 2), running("a", 1)]
    worker.runner.lose()
    await worker.until(lambda: sorted(worker.runner.stopped) == [("a", 1), ("a", 2)])


@pytest.mark.parametrize("steps", range(12))
async def test_a_worker_told_to_stop_at_any_moment_of_a_claim_stops(tmp_path: Path, steps: int) -> None:
    worker = Worker(tmp_path)
    task = asyncio.create_task(worker.loop.run())
    await worker.until(lambda: worker.desk.first_beats)
    worker.desk.give("a")
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    assert (await asyncio.wait([task], timeout=SECONDS))[0]
    assert task.cancelled()
    assert not worker.loop.workplace.jobs or worker.runner.started == [("a", 1)], "claimed, and never handed over"


async def test_results_travel_in_reports_of_bounded_size(worker: Worker) -> None:
    heavy = json.dumps("x" * 1_000_000)
    jobs = [f"j{n}" for n in range(10)]
    for job in jobs:
        folder = worker.loop.workplace.attempt_folder(job, 1)
        folder.mkdir()
        (folder / "result.json").write_text(heavy)
    worker.runner.known = [ended(job) for job in jobs]
    worker.runner.lose()
    await worker.until(lambda: len(worker.desk.finished) == len(jobs))
    assert max(worker.desk.reports) <= 5
    assert sorted(item.id for item in worker.desk.finished) == jobs


async def test_exit_0_completes_whatever_its_result_file_holds(worker: Worker) -> None:
    folder = worker.loop.workplace.attempt_folder("j", 1)
    folder.mkdir()
    (folder / "result.json").write_text("{half")
    worker.runner.known = [ended("j")]
    worker.runner.lose()
    await worker.until(lambda: worker.desk.finished)
    (item,) = worker.desk.finished
    assert (item.ok, item.result) == (True, None)
    assert item.error is not None and "result.json is not JSON" in item.error


async def end_of(worker: Worker, report: AttemptReport, **files: str) -> AttemptDone:
    """What the leader is told of an attempt that left these files."""
    folder = worker.loop.workplace.attempt_folder(report.job, report.attempt)
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("_json", ".json")).write_text(text)
    worker.runner.known = [report]
    worker.runner.lose()
    await worker.until(lambda: worker.desk.finished)
    (item,) = worker.desk.finished
    return item


def stopped(job: str, reason: str) -> AttemptReport:
    return AttemptReport(job=job, attempt=1, state="exited", started_ms=5, ended_ms=6, exit_code=0, reason=reason)


@pytest.mark.parametrize("reason", ["preempted", "drained", "timeout", "cancelled"])
async def test_checkpoint_of_an_attempt_that_was_stopped_travels_with_its_end(worker: Worker, reason: str) -> None:
    item = await end_of(worker, stopped("j", reason), checkpoint_json='{"step": 7}')
    assert (item.ok, item.cause, item.checkpoint) == (False, reason, b'{"step":7}')


async def test_completed_attempt_leaves_no_checkpoint(worker: Worker) -> None:
    item = await end_of(worker, ended("j"), checkpoint_json='{"step": 7}')
    assert (item.ok, item.checkpoint) == (True, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{half", "checkpoint.json is not JSON"), ('"' + "x" * (64 << 10) + '"', "checkpoint.json is larger than 65536")],
)
async def test_checkpoint_that_cannot_be_taken_is_told_in_the_error(worker: Worker, text: str, words: str) -> None:
    item = await end_of(worker, ended("j", 1), checkpoint_json=text)
    assert item.checkpoint is None
    assert item.error is not None and words in item.error


async def test_checkpoint_of_the_attempt_before_is_there_when_the_process_starts(worker: Worker) -> None:
    folder = worker.loop.workplace.attempt_folder("j", 2)
    description = {"id": "j", "attempt": 2, "command": ["true"], "requires": {}, "checkpoint": {"step": 7}}
    worker.desk.claims.put_nowait(([description], []))
    await worker.until(lambda: worker.runner.started == [("j", 2)])
    assert json.loads((folder / "checkpoint.json").read_text()) == {"step": 7}
    assert folder.stat().st_mode & 0o777 == 0o700


async def test_checkpoint_that_the_attempt_itself_wrote_is_not_put_back(worker: Worker) -> None:
    """Its start is asked for again when the connection to the runner was lost, and it may long be running."""
    folder = worker.loop.workplace.attempt_folder("j", 2)
    folder.mkdir()
    (folder / "checkpoint.json").write_text('{"step": 8}')
    description = {"id": "j", "attempt": 2, "command": ["true"], "requires": {}, "checkpoint": {"step": 7}}
    worker.desk.claims.put_nowait(([description], []))
    await worker.until(lambda: worker.runner.started == [("j", 2)])
    assert json.loads((folder / "checkpoint.json").read_text()) == {"step": 8}


OOM = "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
GPUS = (GpuOffer(uuid="GPU-a", memory_mb=80_000), GpuOffer(uuid="GPU-b", memory_mb=24_000))


@pytest.mark.parametrize(
    ("error", "stderr", "gpus", "cause", "memory"),
    [
        pytest.param(f"exit code 1: {OOM}", "", ["GPU-a", "GPU-b"], "cuda_oom", 24_000, id="in the last lines"),
        pytest.param("exit code 1: x", f"{OOM}\n" + "x\n" * 99, ["GPU-a"], "cuda_oom", 80_000, id="further back"),
        pytest.param("exit code 1: x", "segfault", ["GPU-b"], "exit", 24_000, id="another failure"),
        pytest.param("exit code 1: x", f"{OOM}\n" + "x\n" * 20_000, ["GPU-a"], "exit", 80_000, id="long ago"),
        pytest.param("exit code 1: x", OOM, [], "exit", 0, id="no GPU was given"),
    ],
)
async def test_end_for_want_of_gpu_memory_is_recognised(
    tmp_path: Path, error: str, stderr: str, gpus: list[str], cause: str, memory: int
) -> None:
    place = Workplace("n1", Offer(node="n1", gpus=GPUS), tmp_path, "http://127.0.0.1:1", 64)
    job = place.add({"id": "j", "attempt": 1, "gpus": gpus})
    job.folder.mkdir()
    (job.folder / "stderr").write_text(stderr)
    report = AttemptReport(job="j", attempt=1, state="exited", started_ms=5, exit_code=1, reason="exit", error=error)
    item = job_loops._end_of(place, report, job)
    assert (item.cause, item.gpu_memory_mb, item.ok) == (cause, memory, False)


def test_attempt_that_was_ended_for_another_reason_did_not_run_out_of_memory(tmp_path: Path) -> None:
    place = Workplace("n1", Offer(node="n1", gpus=GPUS), tmp_path, "http://127.0.0.1:1", 64)
    job = place.add({"id": "j", "attempt": 1, "gpus": ["GPU-b"]})
    report = AttemptReport(job="j", attempt=1, state="exited", started_ms=5, signal=15, reason="preempted", error=OOM)
    assert job_loops._end_of(place, report, job).cause == "preempted"


def test_progress_that_stays_unreadable_is_told_of(tmp_path: Path) -> None:
    """Half-written at the first look, perhaps; not when it has not changed since."""
    place = Workplace("n1", Offer(node="n1"), tmp_path, "http://127.0.0.1:1", 64)
    job = place.add({"id": "j", "attempt": 1})
    job.folder.mkdir()
    path = job.folder / "progress.json"

    def look(mtime_ms: int) -> bytes | None:
        sample = ActivitySample(
            job="j", attempt=1, cpu_seconds=0, rss_mb=0, stdout_bytes=0, stderr_bytes=0, progress_mtime_ms=mtime_ms
        )
        return job_loops._progress_of([job], {job.key: sample}).get(job.key)

    path.write_text('"' + "x" * (64 << 10) + '"')
    assert look(5) is None
    assert look(5) == b'{"error": "progress.json is larger than 65536 bytes"}'
    assert look(5) is None, "it is told once"
    path.write_text("{half")
    assert look(6) is None
    path.write_text('{"step": 1}')
    assert look(7) == b'{"step":1}'


async def test_jobs_are_asked_to_end_in_time_though_nobody_leads(worker: Worker) -> None:
    """The machine goes all the same; a job that has its grace can save what it has done."""
    await worker.holds("a")
    worker.desk.nobody_leads = True
    leaving = asyncio.create_task(worker.loop.leave(10))  # less than the grace of 30 s
    await worker.until(lambda: worker.runner.stopped == [("a", 1)])
    assert not leaving.done()
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)


async def test_a_leader_that_is_found_late_is_told_how_little_time_is_left(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.desk.nobody_leads = True
    leaving = asyncio.create_task(worker.loop.leave(100))
    await worker.until(lambda: worker.desk.leaves)
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 60)
    worker.desk.nobody_leads = False
    await worker.until(leaving.done)
    assert worker.desk.leaves[0] > 90
    assert 30 < worker.desk.leaves[-1] < 40


async def test_a_node_that_leaves_goes_on_leaving_when_its_runner_comes_back(worker: Worker) -> None:
    await worker.holds("a")
    leaving = asyncio.create_task(worker.loop.leave(1_000))
    await worker.until(lambda: len(worker.desk.leaves) == 1)
    worker.runner.lose()
    await worker.until(lambda: len(worker.desk.leaves) == 2)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
