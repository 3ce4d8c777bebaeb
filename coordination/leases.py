"""Who holds which attempt, since when it was heard of, and what gives an attempt up. Sans-IO: time is an argument.

Soft state of the leader, never journaled (DESIGN §1): a new leader fills it from the queue and gives every attempt one
full lease of grace. Monotonic times here are milliseconds of a clock that runs through suspend (CLOCK_BOOTTIME,
PROTOCOL §2.14); they are compared only with each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
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
    gang: bool = False  # one of several members of the attempt, each on a worker of its own
    order: str | None = None  # why it has been asked to make way: "preempted" or "drained"
    ordered_at: int = 0
    told_at: int | None = None
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


class Notice(NamedTuple):
    """An attempt that its worker must end, and why: cancelled, preempted, drained."""

    job: str
    attempt: int
    reason: str = "cancelled"


class Verdict(NamedTuple):
    """An attempt with a reason to give it up. `seconds` says for how long the reason has held."""

    held: Held
    cause: str  # lease_lapsed | timeout | never_started | no_sign_of_life
    reason: str


TELL_AGAIN_MS = 5_000
# A process that only polls burns a few milliseconds a second; one per cent of a core is the least we call work.
LEAST_CPU_SHARE = 0.01


@dataclass(slots=True)
class LeaseTable:
    """All attempts in progress. `lease_ms` is how long silence is forgiven."""

    lease_ms: int = 30_000
    by_job: dict[str, Held] = field(default_factory=dict)
    by_worker: defaultdict[str, dict[str, Held]] = field(default_factory=lambda: defaultdict(dict))
    gangs: defaultdict[str, list[Held]] = field(default_factory=lambda: defaultdict(list))  # the members, by job
    seen_at: dict[str, int] = field(default_factory=dict)  # worker -> monotonic ms of its last heartbeat
    seen_ms: dict[str, int] = field(default_factory=dict)  # worker -> unix ms of the same
    notices: defaultdict[str, set[Claimant]] = field(default_factory=lambda: defaultdict(set))  # worker -> to kill
    on_drop: Callable[[Held], None] = lambda held: None  # an attempt in progress is over on its worker

    # -- what the queue did ---------------------------------------------------------------------------------------

    def grant(self, held: Held) -> None:
        """An attempt began; of a gang, each member by itself."""
        known = self.by_job.get(held.job)
        if known is not None and (known.attempt != held.attempt or not held.gang):
            self.drop(held.job)
        mine = self.of(held.worker, held.job)
        if mine is not None and mine.attempt == held.attempt and held.gang:
            return  # told twice: by the queue's rows and by its events
        self.by_job.setdefault(held.job, held)
        self.by_worker[held.worker][held.job] = held
        if held.gang:
            self.gangs[held.job].append(held)

    def started(self, job: str, attempt: int, started_ms: int, now: int) -> None:
        """Its process runs. Of a gang this says only that one of them does: see `Dispatcher.heartbeat`."""
        held = self.by_job.get(job)
        if held is not None and held.attempt == attempt and not held.gang:
            held.started_ms = started_ms
            held.alive_at = max(held.alive_at, now)

    def drop(self, job: str, *, tell: bool = False) -> Held | None:
        """The attempt in progress of this job is over. `tell`: its worker does not know yet and must kill it. Answers
        one of its members."""
        held = self.by_job.pop(job, None)
        if held is not None:
            for member in self.gangs.pop(job, None) or [held]:
                self._drop(member)
                if tell:
                    self.notices[member.worker].add(Claimant(job, member.attempt))
        return held

    def _drop(self, held: Held) -> None:
        mine = self.by_worker[held.worker]
        mine.pop(held.job, None)
        if not mine:
            del self.by_worker[held.worker]
        self.on_drop(held)

    def drop_member(self, job: str, attempt: int, worker: str) -> None:
        """One member of a gang has ended well; the others go on."""
        members = self.gangs.get(job, [])
        for held in members:
            if held.worker == worker and held.attempt == attempt and len(members) > 1:
                members.remove(held)
                self._drop(held)
                if self.by_job.get(job) is held:
                    self.by_job[job] = members[0]
                return

    def of(self, worker: str, job: str) -> Held | None:
        """What this worker holds of a job."""
        return self.by_worker.get(worker, {}).get(job)

    def make_way(self, held: Held, reason: str, now: int) -> None:
        """Asks an attempt to end: its worker is told, until it has."""
        if held.order is None:
            held.order, held.ordered_at, held.told_at = reason, now, None

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
            held = self.of(worker, sign.job)
            if held is None or held.attempt != sign.attempt:
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

    def take_notices(self, worker: str, now: int) -> list[Notice]:
        """The attempts this worker must end and has not been told of. Should the telling be lost, `renew` repeats it
        for as long as the worker lists them; who must make way is told again after a while."""
        doomed = [Notice(*claimant) for claimant in sorted(self.notices.pop(worker, set()))]
        for held in self.by_worker.get(worker, {}).values():
            if held.order is not None and (held.told_at is None or now - held.told_at >= TELL_AGAIN_MS):
                held.told_at = now
                doomed.append(Notice(held.job, held.attempt, held.order))
        return doomed

    def orders(self, worker: str) -> list[Notice]:
        """The attempts that this worker has been asked to end for the sake of others, and has not ended yet."""
        mine = self.by_worker.get(worker, {}).values()
        return [Notice(held.job, held.attempt, held.order) for held in mine if held.order is not None]

    def was_deaf(self, now: int) -> None:
        """The leader itself did not listen for a while (a frozen process, a suspended machine): whoever was silent
        meanwhile may have spoken, so every attempt gets a full lease and a fresh sign of life."""
        for held in self._all():
            held.renewed_at = held.alive_at = now

    # -- verdicts ---------------------------------------------------------------------------------------------------

    def _all(self) -> list[Held]:
        """A copy, made in one step: the operators' API asks from threads of its own."""
        return [held for mine in list(self.by_worker.values()) for held in list(mine.values())]

    def unmoved(self, now: int, slack_ms: int) -> list[Held]:
        """Attempts that were asked to make way, and have not ended well after their grace."""
        return [
            held for held in self._all() if held.order is not None and now - held.ordered_at >= held.grace_ms + slack_ms
        ]

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
