"""The two loops around running jobs: `JobReaperLoop` on the leader gives up attempts nobody answers for, and
`WorkerPullLoop` on every node pulls jobs that fit, has them run, and reports how they end.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from config.settings import WorkerSettings
from coordination.commands import AttemptDone
from coordination.cuda_oom import TAIL_BYTES, is_cuda_oom
from coordination.dispatcher import Beat, Dispatcher, Room
from coordination.errors import OutcomeUnknown, Refused
from coordination.leases import Notice, Signs, Verdict
from coordination.placement import GpuOffer
from p2p.driver import Overloaded
from p2p.gpu_jobs import CpuWork, ownership, utilization
from p2p.gpus import IDLE_BELOW
from p2p.loops.base import Loop
from p2p.runner.client import ActivitySample, AttemptReport, RunnerBusy, RunnerClient, RunnerUnavailable
from p2p.runner.protocol import VERSION as RUNNER_VERSION
from p2p.runner.protocol import RunnerError
from p2p.workplace import (
    CHECKPOINT_FILE,
    MAX_CHECKPOINT_BYTES,
    MAX_PROGRESS_BYTES,
    MAX_RESULT_BYTES,
    Key,
    LocalJob,
    Workplace,
    leave_checkpoints,
    read_end,
    read_json,
)

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
LEAVE_SPARE_SECONDS = 3.0  # of a notice, for reports and the stop itself
LITTLE_GPU_MEMORY_MB = 256  # of change: not worth waking the leader for
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
    def claim(self, worker: str, *, wait_seconds: float) -> Awaitable[tuple[list[dict[str, Any]], list[Notice]]]: ...
    def heartbeat(
        self, worker: str, beats: list[Beat], *, first: bool, whole: bool = False
    ) -> Awaitable[tuple[list[str], list[str]]]: ...
    def describe(self, keys: list[Key]) -> Awaitable[dict[Key, dict[str, Any]]]: ...
    def finish(self, items: tuple[AttemptDone, ...]) -> Awaitable[list[Refused | None]]: ...
    def mono_ms(self) -> int: ...
    def leave(self, worker: str, seconds: float) -> Awaitable[None]: ...

    @property
    def mark(self) -> str: ...


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
        self._delivered = asyncio.Event()
        self._stopping: set[Key] = set()
        self._why: dict[Key, str] = {}  # in a sentence, of attempts that this node ends by itself
        self._in_touch = (
            False  # with a runner, and the leader knows what it runs: nothing else of this node's is running
        )
        self._told_gpus: tuple[GpuOffer, ...] = ()
        self.on_gpus_freed: Callable[[], None] = lambda: None  # a job with GPUs has ended
        self._early: dict[Key, AttemptReport] | None = None  # reports that came while attempts were being taken up
        self._renewed_at = 0
        self._leaves_at: float | None = None  # monotonic: when what runs here is asked to go; the machine goes too
        self.taken_up = False  # whether it is known what has run here since before this start
        self.stats.update(jobs_pulled=0, pull_failures=0, jobs_reported=0, reports_refused=0)

    @property
    def mark(self) -> str:
        """What the leader says of this node: "cordoned", "draining", or nothing."""
        return self._desk.mark

    async def leave(self, seconds: float) -> None:
        """Has the jobs here end, or move on before `seconds` are over; returns once nothing is left to report."""
        graces = [job.description.get("grace_seconds", 30.0) for job in self.workplace.jobs.values() if not job.ended]
        until = time.monotonic() + seconds - max(graces, default=0.0) - LEAVE_SPARE_SECONDS
        self._leaves_at = until
        ending = asyncio.create_task(self._end_all(until), name="worker-leave")
        try:
            # However late a leader is found: the machine goes when it was said to go.
            await self._tell_leaving(until)
            while self.workplace.jobs:
                self._delivered.clear()
                await self._delivered.wait()
        finally:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)

    async def _tell_leaving(self, until: float) -> None:
        node = self.workplace.node
        await self._until_answered(lambda: self._desk.leave(node, max(until - time.monotonic(), 0.0)))

    async def _end_all(self, until: float) -> None:
        """Asks what runs here to end, at `until` (monotonic) and from then on: if no leader says so, this node does. A
        job that has its grace can save what it has done, whoever leads afterwards."""
        await asyncio.sleep(max(until - time.monotonic(), 0.0))
        while True:
            for job in list(self.workplace.jobs.values()):
                if not job.ended:
                    await self.end_attempt(job.key, "drained", "its machine is being taken away")
            await asyncio.sleep(RETRY_SECONDS)

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
            self._in_touch = False
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
        if self._leaves_at is not None:
            await self._tell_leaving(self._leaves_at)  # a first word reads as if its machine was there to stay
        self._in_touch = True

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
            job.pid = report.pid or job.pid
            if report.started_ms is not None and job.started_ms is None:
                job.started_ms = report.started_ms
                self._beat_soon.set()
            if report.state in ("exited", "forgotten"):
                job.ended = True
                self._ends[report.key] = report
                self._end_ready.set()
                if job.gpus:
                    self.on_gpus_freed()
        if self._ends:
            self._tell_room()

    def _on_lost(self) -> None:
        self._lost.set()

    def _tell_room(self) -> None:
        place = self.workplace
        places = min(place.places(), CLAIM_BATCH)
        free = place.free()
        self._told_gpus = free.gpus
        self._desk.make_room(Room(free, place.total, places))

    def gpus_sampled(self) -> None:
        """The GPUs have been looked at: tells the leader if what is free of them is something else than was told."""
        if self._in_touch and _differ(self.workplace.free().gpus, self._told_gpus):
            try:
                self._tell_room()
            except Refused as error:
                self._failed(error)  # nobody leads; the next claim tells it

    def known_attempts(self) -> frozenset[Key] | None:
        """All attempts of this node that have not ended; None while that is not known."""
        if not self._in_touch:
            return None
        return frozenset(key for key, job in self.workplace.jobs.items() if not job.ended)

    async def end_attempt(self, key: Key, reason: str, why: str) -> None:
        """Ends an attempt that breaks a rule; `why` is in its error. Does nothing where the runner is out of reach."""
        if key not in self._stopping and self.runner.connected:
            self._why[key] = why
            try:
                await self._kill([Notice(*key, reason)])
            except RunnerError as error:
                self._failed(error)  # the connection is being made anew, and the rule is looked at again

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
            await self._kill(notices)
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
        resumed = [job for job in jobs if job.description.get("checkpoint") is not None]
        if resumed:
            await asyncio.to_thread(leave_checkpoints, resumed)
        await self.runner.start([self.workplace.start_spec(job, self._settings) for job in jobs])

    async def _kill(self, doomed: list[Notice]) -> None:
        """Has them end: SIGTERM, their grace, SIGKILL. The reason becomes the cause of their end."""
        for item in doomed:
            job = self.workplace.jobs.get((item.job, item.attempt))
            if job is not None and not job.ended and job.key not in self._stopping:
                self._stopping.add(job.key)
                grace = job.description.get("grace_seconds", 30.0)
                await self.runner.stop(job.id, job.attempt, reason=item.reason, grace_seconds=grace)

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
        use = self._gpu_use()
        signs = (_signs(job, samples.get(job.key), progress.get(job.key), use.get(job.key)) for job in jobs)
        beats = [Beat(sign, job.started_ms) for sign, job in zip(signs, jobs, strict=True)]
        stale, cancelled = await self._desk.heartbeat(self.workplace.node, beats, first=first, whole=whole)
        self._renewed_at = self._desk.mono_ms()
        for job in jobs:
            job.told_start = job.told_start or job.started_ms is not None
        for reason, ids in (("stale", stale), ("cancelled", cancelled)):
            await self._kill(_oldest(jobs, ids, reason))

    def _gpu_use(self) -> dict[Key, float]:
        """Per cent that each attempt uses of its GPUs, of those of which it can be told."""
        reading = self.workplace.look_at_gpus()
        if reading is None:
            return {}
        claims = self.workplace.gpu_claims()
        owner = ownership(claims)
        told = {claim.key: utilization(claim, reading, owner) for claim in claims}
        return {key: use for key, use in told.items() if use is not None}

    async def _stop_strict(self) -> None:
        """``fence: strict``: stopped before the lease could have passed to another worker."""
        if self._desk.mono_ms() - self._renewed_at >= self._lease_seconds * 1000 * STRICT_SHARE:
            strict = [job for job in self.workplace.jobs.values() if job.description.get("fence") == "strict"]
            await self._kill([Notice(job.id, job.attempt, "lease_lost") for job in strict])

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
        jobs = [self.workplace.jobs[report.key] for report in batch]
        items = await asyncio.to_thread(_ends_of, self.workplace, batch, jobs, dict(self._why))
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
            self._why.pop(report.key, None)
        self._delivered.set()

    async def _tidy(self) -> None:
        """Deletes the folders of long ended attempts."""
        while True:
            keep, hours = self._settings.keep_folders, self._settings.keep_folders_hours
            self.stats["folders_deleted"] += await asyncio.to_thread(self.workplace.prune, keep, hours)
            await asyncio.sleep(FOLDER_PRUNE_SECONDS)


def _oldest(jobs: list[LocalJob], ids: list[str], reason: str) -> list[Notice]:
    """The attempts that a leader's list of job ids means. This node may hold two attempts of one job, the older of them
    fenced off and still being ended; an id named once means the oldest, named twice the two oldest."""
    left = sorted((job for job in jobs if job.id in set(ids)), key=lambda job: job.attempt)
    found = []
    for job_id in ids:
        job = next((job for job in left if job.id == job_id), None)
        if job is not None:
            left.remove(job)
            found.append(Notice(job.id, job.attempt, reason))
    return found


def _signs(job: LocalJob, sample: ActivitySample | None, progress: bytes | None, gpu_use: float | None) -> Signs:
    """`gpu_use` is per cent, None where it cannot be told: then it is not held against the job."""
    busy = bool(job.gpus) and (gpu_use is None or gpu_use >= IDLE_BELOW)
    if sample is None:
        return Signs(job.id, job.attempt, busy=busy)
    cpu_seconds = sample.cpu_seconds
    if job.gpus:
        if job.cpu_work is None:
            job.cpu_work = CpuWork(len(job.gpus))
        cpu_seconds = round(job.cpu_work.add(cpu_seconds, time.monotonic()), 2)
    return Signs(
        job.id,
        job.attempt,
        busy=busy,
        cpu_seconds=cpu_seconds,
        output_bytes=sample.stdout_bytes + sample.stderr_bytes,
        progress_mtime_ms=sample.progress_mtime_ms,
        progress=progress,
    )


def _differ(now: tuple[GpuOffer, ...], told: tuple[GpuOffer, ...]) -> bool:
    """Whether it matters: which GPUs there are, which are healthy, and more than a little of their free memory."""
    return len(now) != len(told) or any(
        (a.uuid, a.healthy, a.share_free) != (b.uuid, b.healthy, b.share_free)
        or abs(a.memory_free_mb - b.memory_free_mb) >= LITTLE_GPU_MEMORY_MB
        for a, b in zip(now, told, strict=True)
    )


def _progress_of(jobs: list[LocalJob], samples: dict[Key, ActivitySample]) -> dict[Key, bytes]:
    """The progress files that changed since they were last read. A half-written one is read again next time; one that
    is still no good then, and has not changed since, is told of in place of the progress: its author waits for it."""
    changed: dict[Key, bytes] = {}
    for job in jobs:
        sample = samples.get(job.key)
        if sample is None or sample.progress_mtime_ms <= job.progress_mtime_ms:
            continue
        try:
            body = read_json(job.folder / "progress.json", MAX_PROGRESS_BYTES)
        except ValueError as problem:
            if job.progress_bad_mtime_ms != sample.progress_mtime_ms:
                job.progress_bad_mtime_ms = sample.progress_mtime_ms
                continue
            body = json.dumps({"error": str(problem)}).encode()
        if body is not None:
            job.progress_mtime_ms = sample.progress_mtime_ms
            changed[job.key] = body
    return changed


def _ends_of(
    place: Workplace, batch: list[AttemptReport], jobs: list[LocalJob], why: dict[Key, str]
) -> tuple[AttemptDone, ...]:
    """As many of them as one entry of the journal should carry; at least one."""
    items: list[AttemptDone] = []
    size = 0
    for report, job in zip(batch, jobs, strict=True):
        items.append(_end_of(place, report, job, why.get(report.key)))
        size += len(items[-1].result or b"") + len(items[-1].checkpoint or b"")
        if size >= REPORT_BYTES:
            break
    return tuple(items)


def _end_of(place: Workplace, report: AttemptReport, job: LocalJob, why: str | None = None) -> AttemptDone:
    """What the leader is told of an ended attempt; reads ``result.json``, and ``checkpoint.json`` of one that did not
    complete. `why` this node ended it, if it did."""
    ok = report.reason == "exit" and report.exit_code == 0
    error = report.error
    result: bytes | None = None
    checkpoint: bytes | None = None
    if report.started_ms is not None:
        try:
            result = read_json(job.folder / "result.json", MAX_RESULT_BYTES)
        except ValueError as problem:
            # Exit 0 completes, whatever it left: a day's training is not run again for a file that cannot be read.
            error = f"{error}; {problem}" if error else f"its result was not taken: {problem}"
        try:
            checkpoint = None if ok else read_json(job.folder / CHECKPOINT_FILE, MAX_CHECKPOINT_BYTES)
        except ValueError as problem:
            error = f"{error}; {problem}" if error else f"its checkpoint was not taken: {problem}"
    if not ok and error is None:
        error = f"it ended with {report.reason}"
    if why is not None and report.reason != "exit":
        error = f"{error}: {why}"
    over_mb = report.usage.get("over_memory_mb", 0)
    if over_mb and report.reason != "memory_limit":
        told = f"it used {over_mb:.0f} MB of memory, more than its limit"
        error = f"{error}; {told}" if error else told
    cause = report.reason or "exit"
    if cause == "exit" and not ok and _ran_out_of_gpu_memory(job, error or ""):
        cause = "cuda_oom"
    code = report.exit_code if report.exit_code is not None else (-report.signal if report.signal else None)
    return AttemptDone(
        id=report.job,
        attempt=report.attempt,
        worker=place.node,
        ok=ok,
        result=result,
        error=error,
        exit_code=code,
        retryable=True,
        started_ms=report.started_ms or 0,
        cause=cause,
        gpu_memory_mb=place.smallest_gpu_mb(job),
        checkpoint=checkpoint,
    )


def _ran_out_of_gpu_memory(job: LocalJob, error: str) -> bool:
    """By the last lines that the runner kept, or, of a job that had a GPU, by what lies further back in its stderr."""
    if is_cuda_oom(error):
        return True
    return bool(job.description.get("gpus")) and is_cuda_oom(read_end(job.folder / "stderr", TAIL_BYTES))


__all__ = ["JobReaperConfig", "JobReaperLoop", "WorkerPullLoop"]
