"""Seeded random commands for a real queue, and looks into it that the checks need. Knows nothing of the journal."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import apsw

from coordination import commands as c
from coordination.queue_state import QueueState

WORKERS = ("w1", "w2")


def new_job(job_id: str, group: str = "g", *, max_attempts: int = 2, depends_on: tuple[str, ...] = ()) -> c.NewJob:
    return c.NewJob(
        id=job_id,
        kind="custom",
        group=group,
        priority=0,
        requires="{}",
        max_attempts=max_attempts,
        backoff_ms=0,
        timeout_ms=0,
        not_before_ms=0,
        unique_key=None,
        depends_on=depends_on,
        spec=b'{"command":["true"]}',
    )


class Workload:
    """Chooses the next command by what the queue looked like when it was last seen, as clients and workers do: much of
    it is late, repeated or refused. Ids come from a counter, so a seed is a whole story."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._now_ms = 1_700_000_000_000
        self._jobs = 0
        self._requests = 0
        self._repeatable: list[c.Command] = []

    def next(self, state: QueueState) -> c.Command:
        self._now_ms += self._rng.randint(0, 2_000)
        if self._repeatable and self._rng.random() < 0.15:
            return self._rng.choice(self._repeatable)  # a client that never heard the answer asks again
        rows = list(state._run("SELECT id, seq, state, attempt, worker FROM jobs ORDER BY seq"))
        held = [row for row in rows if row[2] in ("claimed", "running")]
        makers: list[Any] = [self._submit, self._submit]
        if any(row[2] == "pending" for row in rows):
            makers += [self._claim] * 3
        if held:
            makers += [self._begin, self._finish, self._finish, self._finish, self._release, self._expire]
        if rows:
            makers += [self._cancel, self._wake]
        return self._rng.choice(makers)(rows, held)

    def _key(self) -> str:
        self._requests += 1
        return f"key{self._requests}"

    def _submit(self, rows: list[Any], held: list[Any]) -> c.Command:
        jobs: list[c.NewJob] = []
        key = self._key()
        for _ in range(self._rng.randint(1, 3)):
            self._jobs += 1
            deps = (self._rng.choice(rows)[0],) if rows and self._rng.random() < 0.2 else ()
            jobs.append(new_job(f"job{self._jobs}", key, depends_on=deps))
        command = c.Submit(self._now_ms, tuple(jobs), key, "digest")
        self._repeatable.append(command)
        return command

    def _claim(self, rows: list[Any], held: list[Any]) -> c.Command:
        pending = [row[1] for row in rows if row[2] == "pending"]
        picks = self._rng.sample(pending, self._rng.randint(1, min(3, len(pending))))
        return c.Claim(self._now_ms, self._rng.choice(WORKERS), tuple(c.Pick(seq, None) for seq in picks))

    def _begin(self, rows: list[Any], held: list[Any]) -> c.Command:
        job, _, _, attempt, worker = self._rng.choice(held)
        return c.Begin(self._now_ms, worker, (c.Began(job, attempt, self._now_ms),))

    def _finish(self, rows: list[Any], held: list[Any]) -> c.Command:
        job, _, _, attempt, worker = self._rng.choice(held)
        ok = self._rng.random() < 0.7
        done = c.AttemptDone(
            id=job,
            attempt=attempt - (self._rng.random() < 0.1),
            worker=worker,
            ok=ok,
            result=b'{"n":1}' if ok else None,
            error=None if ok else "broke",
            exit_code=0 if ok else 1,
            retryable=True,
            started_ms=self._now_ms,
            cause="exit",
        )
        command = c.Finish(self._now_ms, (done,))
        self._repeatable.append(command)  # a worker reports an end until it is taken
        return command

    def _release(self, rows: list[Any], held: list[Any]) -> c.Command:
        command = c.Release(self._now_ms, (self._rng.choice(held)[0],), "operator", self._key())
        self._repeatable.append(command)
        return command

    def _expire(self, rows: list[Any], held: list[Any]) -> c.Command:
        job, _, _, attempt, _ = self._rng.choice(held)
        return c.Expire(self._now_ms, (c.Lapse(job, attempt, "lease_lapsed"),))

    def _cancel(self, rows: list[Any], held: list[Any]) -> c.Command:
        command = c.Cancel(self._now_ms, (self._rng.choice(rows)[0],), "operator", self._key())
        self._repeatable.append(command)
        return command

    def _wake(self, rows: list[Any], held: list[Any]) -> c.Command:
        return c.Wake(self._now_ms, 10)


def dump(connection: apsw.Connection) -> dict[str, list[Any]]:
    """Every row of every table: two equal dumps are the same queue."""
    tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    return {str(table): sorted(connection.execute(f"SELECT * FROM {table}"), key=repr) for table in tables}


def dump_file(path: Path) -> dict[str, list[Any]]:
    connection = apsw.Connection(str(path))
    try:
        return dump(connection)
    finally:
        connection.close()


def replayed(entries: list[tuple[int, int, bytes]]) -> dict[str, list[Any]]:
    """What the queue must be after these entries, from nothing, one by one."""
    state = QueueState(":memory:")
    for entry in entries:
        state.apply_batch([entry])
    return dump(state._db)
