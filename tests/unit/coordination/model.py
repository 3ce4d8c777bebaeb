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

from coordination.arrays import parse
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


@dataclass
class ModelArray:
    seq: int
    new: NewJob
    indexes: list[int]
    at_once: int
    depends_on: tuple[str, ...]
    state: str = ""
    closed: int = 0
    made: int = 0
    parked: set[str] = field(default_factory=set)
    pruned: int = 0
    gone: Counter[str] = field(default_factory=Counter)  # how those ended
    finished_ms: int = 0

    @property
    def id(self) -> str:
        return self.new.id

    @property
    def to_come(self) -> int:
        return 0 if self.closed or self.state else len(self.indexes) - self.made


class QueueModel:
    """Every command of the queue as a method that answers what the queue should answer. After each comes `tend`."""

    def __init__(self, backoff: Callable[[int, int, str], int], *, ahead: int, at_once: int) -> None:
        self.arrays: dict[str, ModelArray] = {}
        self._ahead, self._at_once = ahead, at_once
        self.now = 0
        self.seq = 0
        self.jobs: dict[str, ModelJob] = {}
        self.keys: dict[str, tuple[int, str, Any]] = {}
        self.totals: Counter[tuple[str, str]] = Counter()
        self.books: dict[str, Counter[str]] = {}
        self._backoff = backoff

    # -- what follows from the jobs ----------------------------------------------------------------------------------

    def known(self, id: str) -> ModelJob | ModelArray | None:
        return self.jobs.get(id) or self.arrays.get(id)

    def unfinished_dependencies(self, job: ModelJob | ModelArray) -> set[str]:
        """Those it waits for; for the members of a throttled array that is their turn besides."""
        deps = {dep for dep in job.depends_on if (found := self.known(dep)) and found.state in ("", *UNFINISHED)}
        array = self.array_of(job) if isinstance(job, ModelJob) else None
        return deps | ({f"turn of {array.id}"} if array is not None and job.id in array.parked else set())

    def broken_dependencies(self, job: ModelJob | ModelArray) -> set[str]:
        return {dep for dep in job.depends_on if (k := self.known(dep)) and k.state in ("failed", "cancelled")}

    def holder(self, unique_key: str | None) -> ModelJob | ModelArray | None:
        if unique_key is None:
            return None
        everything = [*self.jobs.values(), *self.arrays.values()]
        return next((j for j in everything if j.new.unique_key == unique_key and j.state in ("", *UNFINISHED)), None)

    def array_of(self, job: ModelJob) -> ModelArray | None:
        return self.arrays.get(job.id.partition(".")[0]) if "." in job.id else None

    def members(self, array: ModelArray, *states: str) -> list[ModelJob]:
        return [job for job in self.in_state(*states) if self.array_of(job) is array]

    @property
    def to_come(self) -> int:
        return sum(array.to_come for array in self.arrays.values())

    def room(self, array: ModelArray) -> int:
        ready = len(self.members(array, "waiting", "pending")) - len(array.parked)
        room = self._ahead - ready
        if array.at_once:
            room = min(room, array.at_once - ready - len(self.members(array, *HELD)))
        return max(room, 0)

    def wants(self, array: ModelArray) -> bool:
        if array.closed == 2 and self.members(array, *UNFINISHED):
            return True
        idle = array.state or self.unfinished_dependencies(array)
        return bool(not idle and self.room(array) and (array.parked or array.to_come))

    # -- arrays ------------------------------------------------------------------------------------------------------

    def tend(self) -> None:
        """What follows every command: arrays that are over end, and a slice of members is made or cancelled."""
        left = self._at_once
        while True:
            over = [a for a in self.arrays.values() if not (a.state or a.to_come or self.members(a, *UNFINISHED))]
            if over:
                self._end_array(over[0])
                continue
            wanting = sorted((a for a in self.arrays.values() if self.wants(a)), key=lambda a: a.seq)
            if not wanting or not left:
                return
            left -= self._serve(wanting[0], left)

    def _end_array(self, array: ModelArray) -> None:
        ends = Counter(job.state for job in self.members(array, *FINISHED))
        failed, cancelled = (ends[state] + array.gone[state] for state in ("failed", "cancelled"))
        array.state = "completed"
        if cancelled or array.made < len(array.indexes):
            array.state = "cancelled"
        if failed:
            array.state = "failed"
        array.finished_ms = self.now
        self._settle(array)

    def _serve(self, array: ModelArray, limit: int) -> int:
        if array.closed == 2:
            doomed = [job for state in UNFINISHED for job in self.members(array, state)][:limit]
            for job in doomed:
                self._move(job, "cancelled")
            return len(doomed)
        n = 0
        for job in sorted((self.jobs[id] for id in array.parked), key=lambda j: j.seq)[: min(limit, self.room(array))]:
            array.parked.discard(job.id)
            if not self.unfinished_dependencies(job) and job.ready_ms <= self.now:
                self._move(job, "pending")
            n += 1
        for _ in range(min(limit - n, self.room(array), array.to_come)):
            index = array.indexes[array.made]
            array.made += 1
            new = array.new._replace(id=f"{array.id}.{index}", unique_key=None, array="")
            job = self.jobs[new.id] = ModelJob(
                array.seq + array.made, new, array.depends_on, ready_ms=new.not_before_ms
            )
            self.totals[(new.kind, "submitted")] += 1
            self._move(job, "waiting" if new.not_before_ms > self.now else "pending")
            n += 1
        return n

    def heads(self, requires: str) -> list[int]:
        pending = [j for j in self.jobs.values() if j.state == "pending" and j.requires == requires]
        return [j.seq for j in sorted(pending, key=lambda j: (-j.new.priority, j.seq))]

    def in_state(self, *states: str) -> list[ModelJob]:
        return sorted((j for j in self.jobs.values() if j.state in states), key=lambda j: j.seq)

    # -- steps -------------------------------------------------------------------------------------------------------

    def _move(self, job: ModelJob, state: str) -> None:
        job.state = state
        job.story.append((state, job.attempt))
        array = self.array_of(job)
        if array is not None and state != "waiting":
            array.parked.discard(job.id)
        if state in FINISHED:
            job.finished_ms = self.now
            self.totals[(job.new.kind, state)] += 1
            self._settle(job)

    def _settle(self, job: ModelJob | ModelArray) -> None:
        for array in self.arrays.values():
            if job.id in array.depends_on and job.state != "completed" and not array.state and not array.closed:
                array.closed = 2
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
        known = {*self.jobs, *self.arrays}
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
            if new.array:
                indexes = parse(new.array)
                every = [index for span in indexes.spans for index in span]
                array = self.arrays[new.id] = ModelArray(self.seq, new, every, indexes.at_once, deps)
                self.seq += len(every)
                if self.broken_dependencies(array):
                    array.closed = 2
                continue
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

    def _close(self, id: str) -> bool:
        array = self.arrays.get(id)
        if array is None or array.state:
            return False
        array.closed = 2
        return True

    def _each(self, ids: tuple[str, ...], states: tuple[str, ...], act: Callable[[ModelJob], None]) -> Any:
        """One job that cannot be acted on is refused; among several it is passed over."""
        done = []
        for id in ids:
            job = self.jobs.get(id)
            if job is not None and job.state in states:
                act(job)
                done.append(id)
            elif states == UNFINISHED and self._close(id):
                done.append(id)
            elif len(ids) == 1:
                return Refusal(404 if self.known(id) is None else 409)
        return done

    def retry(self, id: str, key: str) -> Any:
        return self._once(key, f"retry {id}", lambda: self._retry(id))

    def _retry(self, id: str) -> Any:
        job = self.jobs.get(id)
        if job is None:
            return Refusal(409 if id in self.arrays else 404)
        if job.state not in ("failed", "cancelled"):
            return Refusal(409)
        if self.holder(job.new.unique_key) is not None or self.broken_dependencies(job):
            return Refusal(409)
        array = self.array_of(job)
        if array is not None:
            if array.state and self.holder(array.new.unique_key) is not None:
                return Refusal(409)
            if array.closed == 2 and self.members(array, *UNFINISHED):
                return Refusal(409)
            if not self.room(array):
                array.parked.add(job.id)
            array.state, array.closed = "", min(array.closed, 1)
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
        before, own = len(self.in_state(*UNFINISHED)) + self.to_come, 0
        for array in self.arrays.values():
            if not array.state and array.seq <= upto:
                array.closed = array.closed or 1
        for state in UNFINISHED if include_running else ("waiting", "pending"):
            for job in [j for j in self.in_state(state) if j.seq <= upto][: limit - own]:
                if job.state == state:
                    self._move(job, "cancelled")
                    own += 1
            if own >= limit:
                break
        return before - len(self.in_state(*UNFINISHED)) - self.to_come

    def prune(self, states: tuple[str, ...], before_ms: int, keep: int, limit: int) -> int:
        done = sorted(self.in_state(*states), key=lambda job: (job.finished_ms, job.seq))
        old = sum(job.finished_ms < before_ms for job in done)
        excess = max(len(done) - keep, 0) if keep >= 0 else 0
        doomed = done[: min(max(old, excess), limit)]
        for job in doomed:
            array = self.array_of(job)
            del self.jobs[job.id]
            if array is not None:
                array.pruned += 1
                array.gone[job.state] += 1
                if array.state and array.pruned == array.made:
                    del self.arrays[array.id]
        empty = [a for a in self.arrays.values() if a.state and a.made == a.pruned and a.finished_ms < before_ms]
        for array in sorted(empty, key=lambda a: (a.finished_ms, a.seq))[:limit]:
            del self.arrays[array.id]
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
