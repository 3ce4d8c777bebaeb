"""The two loops around running jobs: `JobReaperLoop` on the leader gives up attempts nobody answers for, and
`WorkerPullLoop` on every node pulls jobs that fit, has them run, and reports how they end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from config.settings import WorkerSettings
from coordination.commands import AttemptDone
from coordination.dispatcher import Beat, Dispatcher, Room
from coordination.errors import OutcomeUnknown, Refused
from coordination.leases import Claimant, Signs, Verdict
from p2p.driver import Overloaded
from p2p.loops.base import Loop
from p2p.runner.client import ActivitySample, AttemptReport, RunnerBusy, RunnerClient, RunnerUnavailable
from p2p.runner.protocol import VERSION as RUNNER_VERSION
from p2p.runner.protocol import RunnerError
from p2p.workplace import MAX_PROGRESS_BYTES, MAX_RESULT_BYTES, Key, LocalJob, Workplace, read_json

log = logging.getLogger(__name__)
T = TypeVar("T")

OVERDUE_SLACK_MS = 60_000  # beyond its timeout and grace an attempt is its worker's to end; then the leader gives it up
REPORT_BATCH = 500
REPORT_BYTES = 4 << 20  # of results in one report
SAMPLE_SECONDS = 2.0
LONGEST_RETRY_SECONDS = 5.0
CLAIM_BATCH = 128
BEAT_GAP_SECONDS = 0.05  # starts are told at once, but not one by one
RETRY_SECONDS = 0.5
RUNNER_SHUTDOWN_SECONDS = 3.0
FOLDER_PRUNE_SECONDS = 300.0
STRICT_SHARE = 0.8  # of a lease: a strict job is stopped this long after the last renewal (PROTOCOL §1)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReaperConfig:
    """When the reaper acts; seconds. A lapsed lease is always acted on at once."""

    stale_job_threshold_seconds: float = 1800  # claimed for this long and never started
    stuck_job_threshold_seconds: float = 3600  # in progress this long without any sign of life
    max_jobs_to_reap_per_cycle: int = 10
    interval_seconds: float = 5


class JobReaperLoop(Loop):
    """Gives up attempts with a reason: lease lapsed, own timeout passed, never started, or no sign of life. Never one
    that is merely old."""

    name = "JobReaperLoop"

    def __init__(self, dispatcher: Dispatcher, config: JobReaperConfig | None = None) -> None:
        self.config = config or JobReaperConfig()
        super().__init__(self.config.interval_seconds)
        self._desk = dispatcher
        self._listened_at: int | None = None  # monotonic ms of the newest turn
        self._deaf_ms = int(self.config.interval_seconds * 1000) + dispatcher.leases.lease_ms // 3
        self.stats.update(jobs_reaped=0)

    async def run(self) -> None:
        """See `Loop.run`. A reaper that was stopped by hand has not been deaf: the leader listened all the while."""
        self._listened_at = None
        await super().run()

    async def turn(self) -> None:
        if not self._desk.leads:
            self._listened_at = None
            return
        listened = self._desk.mono_ms()
        if self._listened_at is not None and listened - self._listened_at >= self._deaf_ms:
            self._desk.leases.was_deaf(listened)
        self._listened_at = listened
        verdicts = self.verdicts()
        now = verdicts[: self.config.max_jobs_to_reap_per_cycle]
        reaped = await self._desk.expire(now)
        self.stats["jobs_reaped"] += reaped
        for verdict in now:
            self.stats[verdict.cause] += 1
        if len(verdicts) > len(now):
            self.poke()  # the rest need not wait a whole interval

    def verdicts(self) -> list[Verdict]:
        """The attempts to give up now, each once, longest in progress first."""
        desk, config = self._desk, self.config
        now, now_ms = desk.mono_ms(), desk.steady_ms()
        found: dict[str, Verdict] = {}
        for verdict in (
            *desk.leases.lapsed(now),
            *desk.leases.overdue(now_ms, OVERDUE_SLACK_MS),
            *desk.leases.never_started(now_ms, int(config.stale_job_threshold_seconds * 1000)),
            *desk.leases.stuck(now, now_ms, int(config.stuck_job_threshold_seconds * 1000), OVERDUE_SLACK_MS),
        ):
            found.setdefault(verdict.held.job, verdict)
        return sorted(found.values(), key=lambda verdict: (verdict.held.claimed_ms, verdict.held.job))


class Desk(Protocol):
    """What a worker needs of whoever leads: `Dispatcher` itself on the leader's node."""

    def make_room(self, room: Room) -> None: ...
    def claim(self, worker: str, *, wait_seconds: float) -> Awaitable[tuple[list[dict[str, Any]], list[Claimant]]]: ...
    def heartbeat(
        self, worker: str, beats: list[Beat], *, first: bool, whole: bool = False
    ) -> Awaitable[tuple[list[str], list[str]]]: ...
    def describe(self, keys: list[Key]) -> Awaitable[dict[Key, dict[str, Any]]]: ...
    def finish(self, items: tuple[AttemptDone, ...]) -> Awaitable[list[Refused | None]]: ...
    def mono_ms(self) -> int: ...


class WorkerPullLoop(Loop):
    """Pulls, starts, renews, reports. The runner's records are the durable outbox: an end stays there until the leader
    has taken it, so one lost report loses nothing."""

    name = "WorkerPullLoop"

    def __init__(
        self,
        desk: Desk,
        workplace: Workplace,
        runner_folder: Path,
        settings: WorkerSettings,
        *,
        heartbeat_seconds: float,
        lease_seconds: float,
        pause: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        """`pause` waits at most so many seconds; it may end as soon as somebody else leads."""
        super().__init__(RETRY_SECONDS)
        self._pause = pause
        self._desk, self.workplace, self._settings = desk, workplace, settings
        self._heartbeat_seconds, self._lease_seconds = heartbeat_seconds, lease_seconds
        self.runner = RunnerClient(runner_folder, on_report=self._on_report, on_lost=self._on_lost)
        self._ends: dict[Key, AttemptReport] = {}
        self._end_ready, self._beat_soon, self._lost = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._stopping: set[Key] = set()
        self._early: dict[Key, AttemptReport] | None = None  # reports that came while attempts were being taken up
        self._renewed_at = 0
        self.accepting = True
        self.taken_up = False  # whether it is known what has run here since before this start
        self.stats.update(jobs_pulled=0, pull_failures=0, jobs_reported=0, reports_refused=0)

    def accept(self, on: bool) -> None:
        """Whether this node takes more jobs; what runs goes on either way."""
        self.accepting = on
        self._tell_room()

    def running_jobs(self) -> int:
        """Attempts that run here now."""
        return sum(not job.ended for job in self.workplace.jobs.values())

    async def turn(self) -> None:
        """One life of a connection to the runner: take up what it has, then pull until it is lost."""
        self._lost.clear()
        try:
            self._early = {}
            known = await self._connect()
            await self._take_up(known)
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(work, name=f"worker-{name}")
                    for name, work in (
                        ("pull", self._pull()),
                        ("beat", self._beat()),
                        ("report", self._report()),
                        ("tidy", self._tidy()),
                    )
                ]
                await self._lost.wait()
                for task in tasks:
                    task.cancel()
        except* RunnerError as group:
            self._failed(RunnerUnavailable("; ".join(str(error) for error in group.exceptions)))
        finally:
            await self._leave_runner()
        this = asyncio.current_task()
        if this is not None and this.cancelling():
            # In Python 3.11 a group whose task failed in the very turn of its cancellation forgets the latter.
            raise asyncio.CancelledError

    async def _connect(self) -> list[AttemptReport]:
        """A runner of this version: an idle one of another is replaced, one with jobs is used until it is idle."""
        known = await self.runner.connect()
        if self.runner.runner_version != RUNNER_VERSION and not known:
            log.info("replacing the idle runner of version %s", self.runner.runner_version)
            await self.runner.shutdown()
            known = await self.runner.connect()
        return known

    async def _leave_runner(self) -> None:
        """An idle runner ends with its node; one with jobs or undelivered ends stays for the next start."""
        try:
            if self.runner.connected and not self.workplace.jobs:
                async with asyncio.timeout(RUNNER_SHUTDOWN_SECONDS):
                    await self.runner.shutdown()
        except (RunnerBusy, RunnerUnavailable, TimeoutError) as error:
            log.info("the runner stays: %s", error)
        finally:
            await self.runner.close()

    # -- what the runner says ----------------------------------------------------------------------------------

    async def _take_up(self, known: list[AttemptReport]) -> None:
        """After a (re)start: adopt what runs, queue what ended, start again what the runner never got, tell the
        leader what this node really has."""
        self._stopping.clear()  # what was asked of a lost connection may not have arrived
        listed = {report.key for report in known}
        described = await self._described([r.key for r in known if r.key not in self.workplace.jobs])
        for report in known:
            job = self.workplace.adopt(report.job, report.attempt, described.get(report.key))
            job.told_start = False
        self.taken_up = True
        # An attempt may end while it is being taken up, and that is told once: such reports have waited for this.
        early, self._early = self._early or {}, None
        self._on_report(known)
        self._on_report(list(early.values()))
        missing = [job for key, job in self.workplace.jobs.items() if key not in listed and not job.ended]
        await self._begin(missing)
        await self._until_answered(lambda: self._send_beats(list(self.workplace.jobs.values()), {}, first=True))

    async def _described(self, keys: list[Key]) -> dict[Key, dict[str, Any]]:
        """What the queue says of attempts that were claimed before this start."""
        if not keys:
            return {}
        return await self._until_answered(lambda: self._desk.describe(keys))

    async def _until_answered(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Asks the leader until it answers: without it this node can only wait, and its jobs run on."""
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type((Refused, OutcomeUnknown, Overloaded)),
            wait=wait_random_exponential(multiplier=RETRY_SECONDS, max=LONGEST_RETRY_SECONDS),
            sleep=self._pause,
            before_sleep=lambda state: self._failed(state.outcome.exception()),  # type: ignore[union-attr, arg-type]
        ):
            with attempt:
                return await ask()
        raise AssertionError("tenacity gives up only when told to")

    def _on_report(self, reports: list[AttemptReport]) -> None:
        for report in reports:
            job = self.workplace.jobs.get(report.key)
            if job is None:
                if self._early is not None:
                    self._early[report.key] = report
                continue
            if report.started_ms is not None and job.started_ms is None:
                job.started_ms = report.started_ms
                self._beat_soon.set()
            if report.state in ("exited", "forgotten"):
                job.ended = True
                self._ends[report.key] = report
                self._end_ready.set()
        if self._ends:
            self._tell_room()

    def _on_lost(self) -> None:
        self._lost.set()

    def _tell_room(self) -> None:
        place = self.workplace
        places = min(place.places(), CLAIM_BATCH) if self.accepting else 0
        self._desk.make_room(Room(place.free(), place.total, places))

    # -- pulling -----------------------------------------------------------------------------------------------

    async def _pull(self) -> None:
        while True:
            try:
                self.began_turn()
                self._tell_room()
                jobs, notices = await self._desk.claim(
                    self.workplace.node, wait_seconds=self._settings.claim_wait_seconds
                )
            except (Refused, OutcomeUnknown, Overloaded) as error:
                self.stats["pull_failures"] += 1
                self._failed(error)
                await self._pause(RETRY_SECONDS)
                continue
            taken = [self.workplace.add(job) for job in jobs]  # from now on the heartbeats list them
            self.stats["jobs_pulled"] += len(taken)
            await self._kill(notices, "cancelled")
            await self._begin_whatever_happens(taken)

    async def _begin_whatever_happens(self, jobs: list[LocalJob]) -> None:
        """A claimed job that never reached the runner would wait for its lease to lapse, so a stop waits for this."""
        work = asyncio.ensure_future(self._begin(jobs))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            raise

    async def _begin(self, jobs: list[LocalJob]) -> None:
        if not jobs:
            return
        await self.runner.start([self.workplace.start_spec(job, self._settings) for job in jobs])

    async def _kill(self, doomed: list[Claimant], reason: str) -> None:
        for item in doomed:
            job = self.workplace.jobs.get((item.job, item.attempt))
            if job is not None and not job.ended and job.key not in self._stopping:
                self._stopping.add(job.key)
                grace = job.description.get("grace_seconds", 30.0)
                await self.runner.stop(job.id, job.attempt, reason=reason, grace_seconds=grace)

    # -- heartbeats --------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        """Renews every lease each period, and tells starts as they happen."""
        loop = asyncio.get_running_loop()
        next_full = loop.time()
        while True:
            self._beat_soon.clear()
            full = loop.time() >= next_full
            try:
                if full:
                    next_full = loop.time() + self._heartbeat_seconds
                    samples = await self._sample()
                    await self._send_beats(list(self.workplace.jobs.values()), samples, first=False, whole=True)
                else:
                    fresh = [j for j in self.workplace.jobs.values() if j.started_ms is not None and not j.told_start]
                    if fresh := [job for job in fresh if not job.ended]:
                        await self._send_beats(fresh, {}, first=False)
            except (Refused, OutcomeUnknown, Overloaded) as error:
                self._failed(error)
                await self._stop_strict()
            await asyncio.sleep(BEAT_GAP_SECONDS)
            try:
                async with asyncio.timeout_at(next_full):
                    await self._beat_soon.wait()
            except TimeoutError:
                pass  # time for a full beat

    async def _sample(self) -> dict[Key, ActivitySample]:
        """Signs of life; none from a runner that is slow to answer: leases must be renewed on time all the same."""
        self.workplace.disk_free_mb = await asyncio.to_thread(self.workplace.measure_disk)
        try:
            async with asyncio.timeout(SAMPLE_SECONDS):
                samples = {(sample.job, sample.attempt): sample for sample in await self.runner.sample()}
        except TimeoutError:
            self.stats["samples_missed"] += 1
            return {}
        for key, sample in samples.items():
            job = self.workplace.jobs.get(key)
            if sample.over_memory_mb and job is not None and not job.told_memory:
                job.told_memory = True
                used, asked = sample.over_memory_mb, job.shape["memory_mb"]
                log.warning("job %s, attempt %d uses %.0f MB of memory; it asked for %s MB", *key, used, asked)
        return samples

    async def _send_beats(
        self, jobs: list[LocalJob], samples: dict[Key, ActivitySample], *, first: bool, whole: bool = False
    ) -> None:
        progress = await asyncio.to_thread(_progress_of, jobs, samples) if samples else {}
        beats = [Beat(_signs(job, samples.get(job.key), progress.get(job.key)), job.started_ms) for job in jobs]
        stale, cancelled = await self._desk.heartbeat(self.workplace.node, beats, first=first, whole=whole)
        self._renewed_at = self._desk.mono_ms()
        for job in jobs:
            job.told_start = job.told_start or job.started_ms is not None
        for reason, ids in (("stale", stale), ("cancelled", cancelled)):
            await self._kill(_oldest(jobs, ids), reason)

    async def _stop_strict(self) -> None:
        """``fence: strict``: stopped before the lease could have passed to another worker."""
        if self._desk.mono_ms() - self._renewed_at >= self._lease_seconds * 1000 * STRICT_SHARE:
            strict = [job for job in self.workplace.jobs.values() if job.description.get("fence") == "strict"]
            await self._kill([Claimant(job.id, job.attempt) for job in strict], "lease_lost")

    # -- results -----------------------------------------------------------------------------------------------

    async def _report(self) -> None:
        """Delivers ends until the leader has taken each, then lets the runner forget them."""
        while True:
            await self._end_ready.wait()
            self._end_ready.clear()
            while self._ends:
                batch = list(self._ends.values())[:REPORT_BATCH]
                try:
                    await self._deliver(batch)
                except (Refused, OutcomeUnknown, Overloaded) as error:
                    self._failed(error)
                    await self._pause(RETRY_SECONDS)

    async def _deliver(self, batch: list[AttemptReport]) -> None:
        folders = [self.workplace.jobs[report.key].folder for report in batch]
        items = await asyncio.to_thread(_ends_of, self.workplace.node, batch, folders)
        batch = batch[: len(items)]
        answers = await self._desk.finish(items)
        refused = sum(answer is not None for answer in answers)
        self.stats["jobs_reported"] += len(batch) - refused
        self.stats["reports_refused"] += refused  # stale attempts: somebody else has the job, or nobody wants it
        await self.runner.ack([report.key for report in batch])
        for report in batch:
            del self._ends[report.key]
            del self.workplace.jobs[report.key]
            self._stopping.discard(report.key)

    async def _tidy(self) -> None:
        """Deletes the folders of long ended attempts."""
        while True:
            keep, hours = self._settings.keep_folders, self._settings.keep_folders_hours
            self.stats["folders_deleted"] += await asyncio.to_thread(self.workplace.prune, keep, hours)
            await asyncio.sleep(FOLDER_PRUNE_SECONDS)


def _oldest(jobs: list[LocalJob], ids: list[str]) -> list[Claimant]:
    """The attempts that a leader's list of job ids means. This node may hold two attempts of one job, the older of them
    fenced off and still being ended; an id named once means the oldest, named twice the two oldest."""
    left = sorted((job for job in jobs if job.id in set(ids)), key=lambda job: job.attempt)
    found = []
    for job_id in ids:
        job = next((job for job in left if job.id == job_id), None)
        if job is not None:
            left.remove(job)
            found.append(Claimant(job.id, job.attempt))
    return found


def _signs(job: LocalJob, sample: ActivitySample | None, progress: bytes | None) -> Signs:
    if sample is None:
        return Signs(job.id, job.attempt, busy=bool(job.description.get("gpus")))
    return Signs(
        job.id,
        job.attempt,
        busy=bool(job.description.get("gpus")),  # its GPU's use is not measured yet, so it is not held against it
        cpu_seconds=sample.cpu_seconds,
        output_bytes=sample.stdout_bytes + sample.stderr_bytes,
        progress_mtime_ms=sample.progress_mtime_ms,
        progress=progress,
    )


def _progress_of(jobs: list[LocalJob], samples: dict[Key, ActivitySample]) -> dict[Key, bytes]:
    """The progress files that changed since they were last read. A half-written one is read again next time."""
    changed: dict[Key, bytes] = {}
    for job in jobs:
        sample = samples.get(job.key)
        if sample is None or sample.progress_mtime_ms <= job.progress_mtime_ms:
            continue
        try:
            body = read_json(job.folder / "progress.json", MAX_PROGRESS_BYTES)
        except ValueError:
            continue
        if body is not None:
            job.progress_mtime_ms = sample.progress_mtime_ms
            changed[job.key] = body
    return changed


def _ends_of(node: str, batch: list[AttemptReport], folders: list[Path]) -> tuple[AttemptDone, ...]:
    """As many of them as one entry of the journal should carry; at least one."""
    items: list[AttemptDone] = []
    size = 0
    for report, folder in zip(batch, folders, strict=True):
        items.append(_end_of(node, report, folder))
        size += len(items[-1].result or b"")
        if size >= REPORT_BYTES:
            break
    return tuple(items)


def _end_of(node: str, report: AttemptReport, folder: Path) -> AttemptDone:
    """What the leader is told of an ended attempt; reads ``result.json``."""
    ok = report.reason == "exit" and report.exit_code == 0
    error = report.error
    result: bytes | None = None
    if report.started_ms is not None:
        try:
            result = read_json(folder / "result.json", MAX_RESULT_BYTES)
        except ValueError as problem:
            # Exit 0 completes, whatever it left: a day's training is not run again for a file that cannot be read.
            error = f"{error}; {problem}" if error else f"its result was not taken: {problem}"
    if not ok and error is None:
        error = f"it ended with {report.reason}"
    over_mb = report.usage.get("over_memory_mb", 0)
    if over_mb and report.reason != "memory_limit":
        told = f"it used {over_mb:.0f} MB of memory, more than its limit"
        error = f"{error}; {told}" if error else told
    code = report.exit_code if report.exit_code is not None else (-report.signal if report.signal else None)
    return AttemptDone(
        id=report.job,
        attempt=report.attempt,
        worker=node,
        ok=ok,
        result=result,
        error=error,
        exit_code=code,
        retryable=True,
        started_ms=report.started_ms or 0,
        cause=report.reason or "exit",
    )


__all__ = ["JobReaperConfig", "JobReaperLoop", "WorkerPullLoop"]
