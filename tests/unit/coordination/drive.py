"""Drives a QueueState as the journal does: encoded commands, numbered one after the other."""

from __future__ import annotations

from typing import Any

import apsw

from coordination import commands as c
from coordination.events import Event
from coordination.queue_state import Claimed, QueueState

T0 = 1_700_000_000_000
MINUTE = 60_000
DAY = 86_400_000

TABLES = (
    "meta",
    "shapes",
    "jobs",
    "history",
    "deps",
    "members",
    "nodes",
    "keys",
    "counts",
    "shape_counts",
    "minutes",
    "totals",
    "workers",
    "arrays",
    "schedules",
)


def new_job(id: str, **changes: Any) -> c.NewJob:
    """A job of kind `command` that fits anywhere."""
    job = c.NewJob(
        id=id,
        kind="command",
        group="default",
        priority=50,
        requires='{"cpus":1.0}',
        max_attempts=3,
        backoff_ms=0,
        timeout_ms=0,
        not_before_ms=0,
        unique_key=None,
        depends_on=(),
        spec=b'{"command":["true"]}',
    )
    job = job._replace(**changes)
    if job.depends_on:
        names = ",".join(f'"{dep}"' for dep in job.depends_on)
        job = job._replace(spec=b'{"command":["true"],"depends_on":[' + names.encode() + b"]}")
    return job


def dump(state: QueueState) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table, in the order of its columns."""
    db = connection(state)
    stored = {str(name) for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert stored - {"sqlite_sequence"} == set(TABLES), "a new table: add it to the comparison"
    return {name: sorted(db.execute(f"SELECT * FROM {name}").fetchall(), key=repr) for name in TABLES}


def connection(state: QueueState) -> apsw.Connection:
    return state._db


class Queue:
    """A queue in memory (or in a file), its clock and its journal."""

    def __init__(self, path: str = ":memory:") -> None:
        self.state = QueueState(path)
        self.now = T0
        self.entries: list[tuple[int, int, bytes]] = []
        self.events: list[Event] = []

    def apply(self, command: c.Command) -> Any:
        """The result of one command, applied as a batch of its own."""
        self.entries.append((len(self.entries) + 1, 1, c.encode(command)))
        ((result, events),) = self.state.apply_batch(self.entries[-1:])
        self.events.extend(events)
        return result

    def submit(self, *jobs: c.NewJob, key: str = "", digest: str = "") -> Any:
        return self.apply(c.Submit(self.now, jobs, key, digest))

    def claim(self, *ids: str, worker: str = "w1") -> list[Claimed]:
        claimed: list[Claimed] = self.apply(
            c.Claim(self.now, worker, tuple(c.Pick(self.column(id, "seq"), None) for id in ids))
        )
        return claimed

    def begin(self, id: str, *, attempt: int = 1, worker: str = "w1") -> None:
        self.apply(c.Begin(self.now, worker, (c.Began(id, attempt, self.now),)))

    def finish(self, id: str, *, ok: bool = True, attempt: int = 1, worker: str = "w1", **changes: Any) -> Any:
        item = c.AttemptDone(id, attempt, worker, ok, None, None if ok else "boom", 0 if ok else 1, True, 0, "exit")
        (answer,) = self.apply(c.Finish(self.now, (item._replace(**changes),)))
        return answer

    def cancel(self, *ids: str, key: str = "") -> Any:
        return self.apply(c.Cancel(self.now, ids, "by hand", key))

    def release(self, *ids: str, key: str = "") -> Any:
        return self.apply(c.Release(self.now, ids, "by hand", key))

    def retry(self, id: str, *, key: str = "") -> Any:
        return self.apply(c.Retry(self.now, id, key))

    def wake(self, limit: int = 1_000) -> int:
        n: int = self.apply(c.Wake(self.now, limit))
        return n

    def prune(self, *states: str, before: int | None = None, keep: int = -1, limit: int = 1_000) -> int:
        before_ms = self.now + 1 if before is None else before
        n: int = self.apply(c.Prune(self.now, states or ("completed", "failed", "cancelled"), before_ms, keep, limit))
        return n

    def column(self, id: str, name: str) -> Any:
        row: Any = connection(self.state).execute(f"SELECT {name} FROM jobs WHERE id = ?", (id,)).fetchone()
        assert row is not None, f"there is no job {id}"
        return row[0]

    def has(self, id: str) -> bool:
        return connection(self.state).execute("SELECT 1 FROM jobs WHERE id = ?", (id,)).fetchone() is not None

    def states(self, *ids: str) -> list[str]:
        return [self.column(id, "state") for id in ids]

    def history(self, id: str) -> list[tuple[Any, ...]]:
        """``[(n, state, attempt, reason)]``."""
        return (
            connection(self.state)
            .execute(
                "SELECT n, state, attempt, reason FROM history WHERE seq = ? ORDER BY n", (self.column(id, "seq"),)
            )
            .fetchall()
        )

    def rows(self, table: str) -> list[tuple[Any, ...]]:
        return dump(self.state)[table]
