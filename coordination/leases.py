"""Who holds which attempt, since when it was heard of, and what gives an attempt up. Sans-IO: time is an argument.

Soft state of the leader, never journaled (DESIGN §1): a new leader fills it from the queue and gives every attempt one
full lease of grace. Monotonic times here are milliseconds of a clock that runs through suspend (CLOCK_BOOTTIME,
PROTOCOL §2.14); they are compared only with each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple


class Claimant(NamedTuple):
    """The two names of an attempt."""

    job: str
    attempt: int


@dataclass(slots=True, kw_only=True)
class Held:
    """An attempt in progress, as the leader knows it. Times are milliseconds; `*_at` monotonic, `*_ms` unix
    but steady: they do not follow steps of the clock, of which a job is not to die (see Dispatcher.steady_ms)."""

    job: str
    attempt: int
    worker: str
    kind: str
    timeout_ms: int
    claimed_ms: int
    started_ms: int | None
    renewed_at: int
    alive_at: int  # last sign of life: output, progress, CPU or GPU use
    grace_ms: int = 0  # between SIGTERM and SIGKILL: part of the time an attempt may take to end
    grace_until_ms: int = 0  # a new leader gives up nothing that it has known for less than a lease
    cpu_seconds: float = -1.0
    output_bytes: int = -1
    progress_mtime_ms: int = -1
    progress: bytes | None = None
    stalled: bool = False  # WORK_STALLED was told


class Signs(NamedTuple):
    """What a heartbeat says of one attempt. Output and progress only ever grow; growth is a sign of life."""

    job: str
    attempt: int
    cpu_seconds: float = -1.0
    output_bytes: int = -1
    progress_mtime_ms: int = -1
    busy: bool = False  # the worker vouches for it: its GPU works, or it cannot tell
    progress: bytes | None = None


class Verdict(NamedTuple):
    """An attempt with a reason to give it up. `seconds` says for how long the reason has held."""

    held: Held
    cause: str  # lease_lapsed | timeout | never_started | no_sign_of_life
    reason: str


# A process that only polls burns a few milliseconds a second; one per cent of a core is the least we call work.
LEAST_CPU_SHARE = 0.01


@dataclass(slots=True)
class LeaseTable:
    """All attempts in progress. `lease_ms` is how long silence is forgiven."""

    lease_ms: int = 30_000
    by_job: dict[str, Held] = field(default_factory=dict)
    by_worker: defaultdict[str, dict[str, Held]] = field(default_factory=lambda: defaultdict(dict))
    seen_at: dict[str, int] = field(default_factory=dict)  # worker -> monotonic ms of its last heartbeat
    seen_ms: dict[str, int] = field(default_factory=dict)  # worker -> unix ms of the same
    notices: defaultdict[str, set[Claimant]] = field(default_factory=lambda: defaultdict(set))  # worker -> to kill

    # -- what the queue did ---------------------------------------------------------------------------------------

    def grant(self, held: Held) -> None:
        """An attempt began."""
        self.drop(held.job)
        self.by_job[held.job] = held
        self.by_worker[held.worker][held.job] = held

    def started(self, job: str, attempt: int, started_ms: int, now: int) -> None:
        held = self.by_job.get(job)
        if held is not None and held.attempt == attempt:
            held.started_ms = started_ms
            held.alive_at = max(held.alive_at, now)

    def drop(self, job: str, *, tell: bool = False) -> Held | None:
        """The attempt in progress of this job is over. `tell`: its worker does not know yet and must kill it."""
        held = self.by_job.pop(job, None)
        if held is not None:
            mine = self.by_worker[held.worker]
            mine.pop(job, None)
            if not mine:
                del self.by_worker[held.worker]
            if tell:
                self.notices[held.worker].add(Claimant(job, held.attempt))
        return held

    # -- what workers say -----------------------------------------------------------------------------------------

    def heard(self, worker: str, now: int, now_ms: int) -> None:
        """Any authenticated word from a worker."""
        self.seen_at[worker] = now
        self.seen_ms[worker] = now_ms

    def renew(self, worker: str, signs: list[Signs], now: int) -> tuple[list[str], list[str]]:
        """Renews every listed attempt that is the newest one; answers (stale ids, cancelled ids) to be killed."""
        stale: list[str] = []
        cancel: list[str] = []
        notices = self.notices.get(worker, set())
        for sign in signs:
            held = self.by_job.get(sign.job)
            if held is None or held.attempt != sign.attempt or held.worker != worker:
                (cancel if Claimant(sign.job, sign.attempt) in notices else stale).append(sign.job)
                continue
            self._sign_of_life(held, sign, now)
            held.renewed_at = now
        return stale, cancel

    @staticmethod
    def _sign_of_life(held: Held, sign: Signs, now: int) -> None:
        elapsed = max(now - held.renewed_at, 1) / 1000
        worked = sign.cpu_seconds - max(held.cpu_seconds, 0.0)
        if (
            sign.busy
            or sign.output_bytes > held.output_bytes
            or sign.progress_mtime_ms > held.progress_mtime_ms
            or (sign.progress is not None and sign.progress != held.progress)
            or worked >= LEAST_CPU_SHARE * elapsed
        ):
            held.alive_at = now
            held.stalled = False
        held.output_bytes = max(held.output_bytes, sign.output_bytes)
        held.progress_mtime_ms = max(held.progress_mtime_ms, sign.progress_mtime_ms)
        if sign.cpu_seconds >= 0:
            held.cpu_seconds = sign.cpu_seconds  # may fall, when a process that nobody waited for has gone
        if sign.progress is not None:
            held.progress = sign.progress

    def never_arrived(self, worker: str, listed: Collection[str], now: int, patience_ms: int) -> list[str]:
        """The jobs given to a worker at least `patience_ms` ago that have not started, and that are not among all it
        says it has: it was never told of them. What it has once listed was renewed since, and is none of them."""
        return [
            held.job
            for held in self.by_worker.get(worker, {}).values()
            if held.started_ms is None and held.job not in listed and now - held.renewed_at >= patience_ms
        ]

    def take_notices(self, worker: str) -> list[Claimant]:
        """The attempts this worker must kill and has not been told of. Should the telling be lost, `renew` repeats it
        for as long as the worker lists them."""
        return sorted(self.notices.pop(worker, set()))

    def was_deaf(self, now: int) -> None:
        """The leader itself did not listen for a while (a frozen process, a suspended machine): whoever was silent
        meanwhile may have spoken, so every attempt gets a full lease and a fresh sign of life."""
        for held in self._all():
            held.renewed_at = held.alive_at = now

    # -- verdicts ---------------------------------------------------------------------------------------------------

    def _all(self) -> list[Held]:
        """A copy, made in one step: the operators' API asks from threads of its own."""
        return list(self.by_job.values())

    def lapsed(self, now: int) -> list[Verdict]:
        """Attempts whose lease has run out."""
        return [v for held in self._all() if (v := self._lapse(held, now)) is not None]

    def _lapse(self, held: Held, now: int) -> Verdict | None:
        silent = now - held.renewed_at
        if silent < self.lease_ms:
            return None
        return Verdict(held, "lease_lapsed", f"lease lapsed: worker {held.worker} silent for {silent / 1000:.0f} s")

    def overdue(self, now_ms: int, slack_ms: int) -> list[Verdict]:
        """Attempts past their own timeout, `slack_ms` after their worker should have ended them."""
        return [v for held in self._all() if (v := self._overdue(held, now_ms, slack_ms)) is not None]

    @staticmethod
    def _overdue(held: Held, now_ms: int, slack_ms: int) -> Verdict | None:
        if not held.timeout_ms or held.started_ms is None or now_ms < held.grace_until_ms:
            return None
        over = now_ms - held.started_ms - held.timeout_ms - held.grace_ms - slack_ms
        if over < 0:
            return None
        late = now_ms - held.started_ms - held.timeout_ms
        return Verdict(held, "timeout", f"timeout of {held.timeout_ms / 1000:.0f} s passed {late / 1000:.0f} s ago")

    def never_started(self, now_ms: int, threshold_ms: int) -> list[Verdict]:
        """Attempts claimed at least `threshold_ms` ago whose process has not started."""
        return [
            Verdict(held, "never_started", f"claimed {(now_ms - held.claimed_ms) / 1000:.0f} s ago and never started")
            for held in self._all()
            if held.started_ms is None and now_ms - held.claimed_ms >= threshold_ms and now_ms >= held.grace_until_ms
        ]

    def stuck(self, now: int, now_ms: int, threshold_ms: int, slack_ms: int = 0) -> list[Verdict]:
        """In progress for at least `threshold_ms` *and* with a reason. Never merely old: a healthy 20-hour training
        run that was declared stuck by its age ran twice, which is why this rule exists."""
        found: list[Verdict] = []
        for held in self._all():
            if now_ms - held.claimed_ms < threshold_ms:
                continue
            verdict = self._lapse(held, now) or self._overdue(held, now_ms, slack_ms)
            # Known up to the last heartbeat only: between two of them silence says nothing, whatever the threshold.
            quiet = held.renewed_at - held.alive_at
            if verdict is None and quiet >= max(threshold_ms, 1):
                reason = f"no output, progress, CPU or GPU use for {quiet / 1000:.0f} s"
                verdict = Verdict(held, "no_sign_of_life", reason)
            if verdict is not None:
                found.append(verdict)
        return sorted(found, key=lambda v: (v.held.claimed_ms, v.held.job))

    def forget(self, worker: str) -> None:
        """Drops what is known of a worker that holds nothing."""
        self.seen_at.pop(worker, None)
        self.seen_ms.pop(worker, None)
        self.notices.pop(worker, None)
