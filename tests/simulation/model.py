"""A job queue as small as can be that keeps the rules which consensus must not break: submit once a key, claim, finish
fenced by attempt, expire. In the spirit of `coordination.queue_state`, a hundred times as fast. Everything is an int,
so that the running hash does not depend on PYTHONHASHSEED.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from p2p.effects import COMMAND, Entry

PENDING, CLAIMED, DONE = 0, 1, 2
NO_WORKER = -1


class Submit(NamedTuple):
    """`job` is the id that the proposing leader gave; `key` makes a repetition answer with the first one's job."""

    at_ms: int
    key: int
    job: int


class Claim(NamedTuple):
    at_ms: int
    job: int
    worker: int


class Finish(NamedTuple):
    at_ms: int
    job: int
    attempt: int
    worker: int


class Expire(NamedTuple):
    at_ms: int
    job: int
    attempt: int


class Release(NamedTuple):
    """An operator gives a job back."""

    at_ms: int
    job: int
    key: int


Command = Submit | Claim | Finish | Expire | Release
REFUSED = (0,)
LEASE_SECONDS = 2.0


class Job(NamedTuple):
    """`token` is the index of the entry that began the attempt."""

    state: int
    attempt: int
    token: int
    worker: int
    key: int


class Leases:
    """Who holds which attempt and when it was last heard of, by the leader's clock: `coordination.leases` in small."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[int, float]] = {}

    def grant(self, job: int, attempt: int, worker: int, now: float) -> None:
        self._held[job] = (attempt, now)

    def drop(self, job: int) -> None:
        self._held.pop(job, None)

    def renew(self, worker: int, held: list[tuple[int, int]], now: float) -> list[int]:
        """Answers the jobs of which the worker holds no current attempt."""
        stale = []
        for job, attempt in held:
            known = self._held.get(job)
            if known is None or known[0] != attempt:
                stale.append(job)
            else:
                self._held[job] = (attempt, now)
        return stale

    def lapsed(self, now: float) -> list[tuple[int, int]]:
        return [(job, attempt) for job, (attempt, at) in self._held.items() if now - at >= LEASE_SECONDS]


class Model:
    """`apply(entry)` answers a tuple of ints; (0,) means that a rule was broken and nothing changed."""

    def __init__(self) -> None:
        self.applied_index = 0
        self.now_ms = 0
        self.digest = 0
        self.jobs: dict[int, Job] = {}
        self.keys: dict[int, tuple[int, ...]] = {}

    def copy(self) -> Model:
        twin = Model.__new__(Model)
        twin.applied_index, twin.now_ms, twin.digest = self.applied_index, self.now_ms, self.digest
        twin.jobs, twin.keys = self.jobs.copy(), self.keys.copy()
        return twin

    def apply(self, entry: Entry) -> tuple[int, ...]:
        index = entry.index
        assert index == self.applied_index + 1, f"entry {index} applied after {self.applied_index}"
        self.applied_index = index
        result: tuple[int, ...] = ()
        touched: tuple[int, ...] = ()
        if entry.body and entry.kind == COMMAND:  # the rest is the journal's own business
            command = decode(entry.body)
            self.now_ms = max(self.now_ms, command.at_ms)
            result = self._handle(index, command)
            touched = self.jobs.get(command[1], ()) if not isinstance(command, Submit) else ()
        self.digest = hash((self.digest, index, self.now_ms, result, touched, len(self.jobs), len(self.keys)))
        return result

    def _handle(self, index: int, command: Command) -> tuple[int, ...]:
        if isinstance(command, Submit):
            return self._submit(command)
        job = self.jobs.get(command.job)
        if job is None:
            return REFUSED
        if isinstance(command, Claim):
            return self._claim(index, job, command)
        if isinstance(command, Finish):
            return self._finish(job, command)
        if isinstance(command, Expire):
            return self._expire(job, command)
        return self._release(job, command)

    def _submit(self, command: Submit) -> tuple[int, ...]:
        known = self.keys.get(command.key)
        if known is None:
            self.jobs[command.job] = Job(PENDING, 0, 0, NO_WORKER, command.key)
            known = self.keys[command.key] = (command.job,)
        return known

    def _claim(self, index: int, job: Job, command: Claim) -> tuple[int, ...]:
        if job.state != PENDING:
            return REFUSED
        self.jobs[command.job] = Job(CLAIMED, job.attempt + 1, index, command.worker, job.key)
        return (command.job, job.attempt + 1, index)

    def _finish(self, job: Job, command: Finish) -> tuple[int, ...]:
        if job.attempt != command.attempt or job.worker != command.worker or job.state == PENDING:
            return REFUSED
        if job.state == CLAIMED:
            self.jobs[command.job] = job._replace(state=DONE)
        return (1,)  # the answer to the first report may have been lost; this is the same one again

    def _expire(self, job: Job, command: Expire) -> tuple[int, ...]:
        if job.state != CLAIMED or job.attempt != command.attempt:
            return REFUSED
        self.jobs[command.job] = job._replace(state=PENDING, worker=NO_WORKER)
        return (1,)

    def _release(self, job: Job, command: Release) -> tuple[int, ...]:
        known = self.keys.get(command.key)
        if known is None:
            known = REFUSED
            if job.state == CLAIMED:
                self.jobs[command.job] = job._replace(state=PENDING, worker=NO_WORKER)
                known = (1,)
            self.keys[command.key] = known
        return known

    @staticmethod
    def decode(body: bytes) -> Command:
        return decode(body)

    @staticmethod
    def body(command: Command) -> bytes:
        """What the journal is to carry."""
        return encode(command)

    # -- what a leader's desk looks up ---------------------------------------------------------------------------

    def pending(self) -> list[int]:
        return [job for job, row in self.jobs.items() if row.state == PENDING]

    def claimed(self) -> list[tuple[int, int, int]]:
        """(job, attempt, worker) of every attempt in progress."""
        return [(job, row.attempt, row.worker) for job, row in self.jobs.items() if row.state == CLAIMED]

    @staticmethod
    def leases() -> Leases:
        return Leases()

    def content(self) -> int:
        """A hash of everything held."""
        return hash((self.now_ms, tuple(self.jobs.items()), tuple(self.keys.items())))

    def jobs_by_key(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for job, row in self.jobs.items():
            found.setdefault(row.key, []).append(job)
        return found


def encode(command: Command) -> bytes:
    """`Submit(1, 2, 3)` is ``0 1 2 3``."""
    return b" ".join((b"%d" % _NUMBER[type(command)], *(b"%d" % value for value in command)))


@lru_cache(maxsize=4_096)
def decode(body: bytes) -> Command:
    number, *values = map(int, body.split())
    return _KINDS[number](*values)


_KINDS: tuple[type[Any], ...] = (Submit, Claim, Finish, Expire, Release)
_NUMBER = {kind: number for number, kind in enumerate(_KINDS)}
