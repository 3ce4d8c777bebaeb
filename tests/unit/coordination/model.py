"""The rules of the queue (DESIGN §5) once more, as plainly as they can be said: dictionaries, no database, no sums.

What the state machine keeps by bookkeeping (who is blocked, how many are pending) is computed here from scratch each
time, so that the two can only agree if the bookkeeping is right.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from coordination.commands import AttemptDone, NewJob

UNFINISHED = ("waiting", "pending", "claimed", "running")
HELD = ("claimed", "running")
FINISHED = ("completed", "failed", "cancelled")
DAY = 86_400_000


class Refusal(NamedTuple):
    """The command broke a rule and changed nothing."""

    status: int


@dataclass
class ModelJob:
    seq: int
    new: NewJob
    depends_on: tuple[str, ...]
    state: str = ""
    attempt: int = 0
    failures: int = 0
    worker: str | None = None
    ready_ms: int = 0
    finished_ms: int = 0
    failed_on: tuple[str, ...] = ()
    above_mb: int = 0
    checkpoint: bytes | None = None
    story: list[tuple[str, int]] = field(default_factory=list)  # (state, attempt) of each transition

    @property
    def id(self) -> str:
        return self.new.id

    @property
    def requires(self) -> str:
        """What its author asked for, and what placement is told besides."""
        hints: dict[str, Any] = {"avoid": sorted(self.failed_on)} if self.failed_on else {}
        if self.above_mb:
            hints["gpu_memory_above_mb"] = self.above_mb
        asked = json.loads(self.new.requires)
        return json.dumps({**asked, **hints}, sort_keys=True, separators=(",", ":"))


class QueueModel:
    """Every command of the queue as a method that answers what the queue should answer."""

    def __init__(self, backoff: Callable[[int, int, str], int]) -> None:
        self.now = 0
        self.seq = 0
        self.jobs: dict[str, ModelJob] = {}
        self.keys: dict[str, tuple[int, str, Any]] = {}
        self.totals: Counter[tuple[str, str]] = Counter()
        self.books: dict[str, Counter[str]] = {}
        self._backoff = backoff

    # -- what follows from the jobs ----------------------------------------------------------------------------------

    def unfinished_dependencies(self, job: ModelJob) -> set[str]:
        return {dep for dep in job.depends_on if dep in self.jobs and self.jobs[dep].state in UNFINISHED}

    def broken_dependencies(self, job: ModelJob) -> set[str]:
        return {dep for dep in job.depends_on if dep in self.jobs and self.jobs[dep].state in ("failed", "cancelled")}

    def holder(self, unique_key: str | None) -> ModelJob | None:
        if unique_key is None:
            return None
        return next((j for j in self.jobs.values() if j.new.unique_key == unique_key and j.state in UNFINISHED), None)

    def heads(self, requires: str) -> list[int]:
        pending = [j for j in self.jobs.values() if j.state == "pending" and j.requires == requires]
        return [j.seq for j in sorted(pending, key=lambda j: (-j.new.priority, j.seq))]

    def in_state(self, *states: str) -> list[ModelJob]:
        return sorted((j for j in self.jobs.values() if j.state in states), key=lambda j: j.seq)

    # -- steps -------------------------------------------------------------------------------------------------------

    def _move(self, job: ModelJob, state: str) -> None:
        job.state = state
        job.story.append((state, job.attempt))
        if state in FINISHED:
            job.finished_ms = self.now
            self.totals[(job.new.kind, state)] += 1
            self._settle(job)

    def _settle(self, job: ModelJob) -> None:
        for other in self.in_state("waiting"):
            if other.state != "waiting" or job.id not in other.depends_on:
                continue
            if job.state != "completed":
                self._move(other, "cancelled")
            elif not self.unfinished_dependencies(other) and other.ready_ms <= self.now:
                self._move(other, "pending")

    def _spend(self, job: ModelJob, *, retryable: bool, above_mb: int = 0) -> None:
        job.failures += 1
        if not retryable or job.failures >= job.new.max_attempts:
            self._move(job, "failed")
            return
        assert job.worker is not None
        job.failed_on = (*(w for w in job.failed_on if w != job.worker), job.worker)[-3:]
        job.above_mb = max(job.above_mb, above_mb)
        self.totals[(job.new.kind, "retried")] += 1
        self._give_back(job, self._backoff(job.new.backoff_ms, job.failures, job.id))

    def _give_back(self, job: ModelJob, wait: int) -> None:
        job.worker = None
        job.ready_ms = self.now + wait if wait else 0
        self._move(job, "waiting" if wait else "pending")

    def _once(self, key: str, digest: str, work: Callable[[], Any]) -> Any:
        if key in self.keys:
            _, first_digest, answer = self.keys[key]
            return answer if first_digest == digest else Refusal(422)
        answer = work()
        if key and not isinstance(answer, Refusal):
            self.keys[key] = (self.now, digest, answer)
        return answer

    # -- commands ----------------------------------------------------------------------------------------------------

    def submit(self, jobs: Iterable[NewJob], key: str, digest: str) -> Any:
        """The ids, or a Refusal."""
        return self._once(key, digest, lambda: self._submit(tuple(jobs)))

    def _submit(self, jobs: tuple[NewJob, ...]) -> Any:
        known = set(self.jobs)
        for new in jobs:
            if not known.issuperset(new.depends_on):
                return Refusal(422)
            known.add(new.id)
        stands_for: dict[str, str] = {}
        for new in jobs:
            holder = self.holder(new.unique_key)
            if holder is not None:
                stands_for[new.id] = holder.id
                continue
            stands_for[new.id] = new.id
            self.seq += 1
            deps = tuple(stands_for.get(dep, dep) for dep in new.depends_on)
            job = self.jobs[new.id] = ModelJob(self.seq, new, deps, ready_ms=new.not_before_ms)
            self.totals[(new.kind, "submitted")] += 1
            if self.broken_dependencies(job):
                self._move(job, "cancelled")
            elif self.unfinished_dependencies(job) or new.not_before_ms > self.now:
                self._move(job, "waiting")
            else:
                self._move(job, "pending")
        return [stands_for[new.id] for new in jobs]

    def claim(self, worker: str, seqs: Iterable[int]) -> list[tuple[str, int]]:
        """(id, attempt) of each pick that was still pending."""
        claimed = []
        for seq in seqs:
            job = next((j for j in self.jobs.values() if j.seq == seq and j.state == "pending"), None)
            if job is not None:
                job.attempt += 1
                job.worker = worker
                self._move(job, "claimed")
                self.books.setdefault(worker, Counter())["claimed"] += 1
                claimed.append((job.id, job.attempt))
        return claimed

    def begin(self, worker: str, id: str, attempt: int) -> None:
        job = self.jobs.get(id)
        if job is not None and (job.state, job.attempt, job.worker) == ("claimed", attempt, worker):
            self._move(job, "running")

    def finish(self, item: AttemptDone) -> Any:
        job = self.jobs.get(item.id)
        if job is None:
            return Refusal(404)
        if (job.attempt, job.worker) != (item.attempt, item.worker) or job.state not in HELD:
            again = item.ok and job.state == "completed" and (job.attempt, job.worker) == (item.attempt, item.worker)
            return None if again else Refusal(409)
        if job.state == "claimed" and (item.ok or item.started_ms):
            self._move(job, "running")
        if not item.ok and item.checkpoint is not None:
            job.checkpoint = item.checkpoint
        if not item.ok and item.cause in ("preempted", "drained"):
            self._give_back(job, 0)
            return None
        self.books.setdefault(item.worker, Counter())["completed" if item.ok else "failed"] += 1
        if item.ok:
            job.checkpoint = None
            self._move(job, "completed")
        else:
            final = item.cause == "exit" and job.new.no_retry == str(item.exit_code)
            above = item.gpu_memory_mb if item.cause == "cuda_oom" else 0
            self._spend(job, retryable=item.retryable and not final, above_mb=above)
        return None

    def expire(self, items: Iterable[tuple[str, int]]) -> int:
        n = 0
        for id, attempt in items:
            job = self.jobs.get(id)
            if job is not None and job.attempt == attempt and job.state in HELD:
                n += 1
                if job.state == "claimed":
                    self._give_back(job, 0)
                    continue
                assert job.worker is not None
                self.books.setdefault(job.worker, Counter())["failed"] += 1
                self._spend(job, retryable=True)
        return n

    def release(self, ids: tuple[str, ...], key: str) -> Any:
        return self._once(key, f"release {ids}", lambda: self._each(ids, HELD, lambda job: self._give_back(job, 0)))

    def cancel(self, ids: tuple[str, ...], key: str) -> Any:
        work = lambda: self._each(ids, UNFINISHED, lambda job: self._move(job, "cancelled"))  # noqa: E731
        return self._once(key, f"cancel {ids}", work)

    def _each(self, ids: tuple[str, ...], states: tuple[str, ...], act: Callable[[ModelJob], None]) -> Any:
        """One job that cannot be acted on is refused; among several it is passed over."""
        done = []
        for id in ids:
            job = self.jobs.get(id)
            if job is not None and job.state in states:
                act(job)
                done.append(id)
            elif len(ids) == 1:
                return Refusal(404 if job is None else 409)
        return done

    def retry(self, id: str, key: str) -> Any:
        return self._once(key, f"retry {id}", lambda: self._retry(id))

    def _retry(self, id: str) -> Any:
        job = self.jobs.get(id)
        if job is None:
            return Refusal(404)
        if job.state not in ("failed", "cancelled"):
            return Refusal(409)
        if self.holder(job.new.unique_key) is not None or self.broken_dependencies(job):
            return Refusal(409)
        job.failures, job.worker, job.ready_ms, job.failed_on, job.above_mb = 0, None, 0, (), 0
        self._move(job, "waiting" if self.unfinished_dependencies(job) else "pending")
        return [id]

    def wake(self, limit: int) -> int:
        due = [
            job
            for job in self.in_state("waiting")
            if job.ready_ms <= self.now and not self.unfinished_dependencies(job)
        ]
        due.sort(key=lambda job: (job.ready_ms, job.seq))
        for job in due[:limit]:
            self._move(job, "pending")
        return len(due[:limit])

    def clear(self, upto: int, include_running: bool, limit: int) -> int:
        """Answers how many jobs it took out; at most `limit` by itself, their dependents besides."""
        before, own = len(self.in_state(*UNFINISHED)), 0
        for state in UNFINISHED if include_running else ("waiting", "pending"):
            for job in [j for j in self.in_state(state) if j.seq <= upto][: limit - own]:
                if job.state == state:
                    self._move(job, "cancelled")
                    own += 1
            if own >= limit:
                break
        return before - len(self.in_state(*UNFINISHED))

    def prune(self, states: tuple[str, ...], before_ms: int, keep: int, limit: int) -> int:
        done = sorted(self.in_state(*states), key=lambda job: (job.finished_ms, job.seq))
        old = sum(job.finished_ms < before_ms for job in done)
        excess = max(len(done) - keep, 0) if keep >= 0 else 0
        doomed = done[: min(max(old, excess), limit)]
        for job in doomed:
            del self.jobs[job.id]
        self.keys = {key: first for key, first in self.keys.items() if first[0] >= self.now - DAY}
        return len(doomed)

    def forget(self, workers: Iterable[str]) -> int:
        n = 0
        for worker in workers:
            for job in self.in_state(*HELD):
                if job.worker == worker:
                    self._give_back(job, 0)
            n += self.books.pop(worker, None) is not None
        return n
