"""Reading the queue for people and loops. Decides nothing; every answer is one consistent snapshot.

Works on a read-only connection of its own, so a slow listing never delays the state machine. One thread owns it.
Times leave here as unix seconds (floats), as people and the operators' API use them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import apsw
import msgpack

from coordination.arrays import STATES, parse
from coordination.commands import NewJob
from coordination.lane import shown_hints, shown_requires
from coordination.sql import statements

MAX_PAGE = 1_000
PAGE_BYTES = 2 << 20  # of what the jobs of one page carry: turning a page into text holds up every other answer
REOPEN_SECONDS = 5.0
SCAN_LIMIT = 20_000  # rows one page of a filtered listing may look at


class HeldRow(NamedTuple):
    """An attempt in progress, for the lease table of a new leader."""

    job: str
    attempt: int
    worker: str
    kind: str
    state: str
    claimed_ms: int
    started_ms: int | None
    timeout_ms: int
    spec: bytes
    priority: int
    requires: str  # JSON
    gpus: str | None  # JSON list of uuids
    rank: int
    gang: int  # 1: this is one of its members


class NodeMark(NamedTuple):
    """What has been said of a node; times are unix milliseconds."""

    node: str
    cordoned: int
    draining: int
    deadline_ms: int
    since_ms: int
    reason: str


class WorkerBook(NamedTuple):
    worker: str
    completed: int
    failed: int
    assigned: int


def _seconds(ms: Any) -> float | None:
    return None if ms is None else ms / 1000


def _json(blob: Any) -> Any:
    return None if blob is None else json.loads(blob)


class QueueReader:
    """Answers questions about the queue at its newest applied entry."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._q = statements()
        self._open()

    def _open(self) -> None:
        self._file = Path(self._path).stat().st_ino
        self._db = apsw.Connection(self._path, flags=apsw.SQLITE_OPEN_READONLY)
        self._db.set_busy_timeout(5_000)
        for pragma in ("query_only=ON", "mmap_size=0", "cache_size=-4000"):
            self._db.execute(f"PRAGMA {pragma}").fetchall()

    def _follow_the_file(self) -> None:
        """A leader's snapshot is put in place of the file (`QueueState.replace`); this connection would go on reading
        the old one for ever. Until the state machine has opened the new one it cannot be read."""
        deadline = time.monotonic() + REOPEN_SECONDS
        while Path(self._path).stat().st_ino != self._file:
            self._db.close()
            try:
                self._open()
            except apsw.CantOpenError:
                self._file = 0
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def close(self) -> None:
        self._db.close()

    def _all(self, name: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        return cast(list[tuple[Any, ...]], self._db.execute(self._q[name], values).fetchall())

    def _one(self, name: str, values: tuple[Any, ...] = ()) -> tuple[Any, ...] | None:
        return cast("tuple[Any, ...] | None", self._db.execute(self._q[name], values).fetchone())

    def applied(self) -> tuple[int, int]:
        """(term, index) of the newest applied entry this connection sees."""
        found = self._db.execute("SELECT key, value FROM meta WHERE key IN ('term', 'applied')").fetchall()
        meta = {str(key): int(cast(int, value)) for key, value in found}
        return meta["term"], meta["applied"]

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Within it every answer is of the same moment."""
        self._follow_the_file()
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")

    # -- one job ---------------------------------------------------------------------------------------------------

    def job(self, job_id: str, *, history: bool = True) -> dict[str, Any] | None:
        """The whole record of a job, or None."""
        row = self._one("job_record", (job_id,))
        if row is None:
            return None
        record = _record(row)
        if record["nodes"] > 1:
            record["members"] = [
                {
                    "rank": rank,
                    "worker": worker,
                    "gpus": json.loads(gpus) if gpus else [],
                    "state": state,
                    "started_at": _seconds(started),
                }
                for rank, attempt, worker, gpus, state, started in self._all("members", (row[0],))
                if attempt == record["attempt"]
            ]
        if history:
            record["history"] = [
                {"at": at / 1000, "state": state, "attempt": attempt, "worker": worker, "reason": reason}
                for _, at, state, attempt, worker, reason in self._all("job_history", (row[0],))
            ]
        return record

    def array(self, id: str) -> dict[str, Any] | None:
        """The summary of an array, or None."""
        row = self._one("array_record", (id,))
        return None if row is None else _array_record(row)

    def member_to_come(self, job_id: str) -> dict[str, Any] | None:
        """What there is to say of an array's member that is not made yet, or None if this is none."""
        id, _, index = job_id.rpartition(".")
        row = self._one("array_record", (id,)) if index.isascii() and index.isdigit() and len(index) <= 8 else None
        array = _array_record(row) if row is not None else None
        if array is None or str(int(index)) != index:
            return None
        position = parse(array["array"]).position(int(index))
        if position is None or position < array["made"]:
            return None
        over = array["to_come"] == 0
        return {
            "id": job_id,
            "kind": array["kind"],
            "group": array["group"],
            "state": "cancelled" if over else "waiting",
            "array": {"id": id, "index": int(index), "size": array["count"]},
            "reason": array["reason"] if over else "its array makes it when its turn comes",
            "attempt": 0,
            "worker": None,
            "finished_at": array["finished_at"] if over else None,
        }

    def jobs(
        self, *, filters: dict[str, str], limit: int, before: int | None, array: str | None = None
    ) -> tuple[list[dict[str, Any]], int | None]:
        """A page of jobs, newest first, and the cursor of the next page (None at the end).

        `filters` maps state, kind, grp or worker to the wanted value; `array` wants the members of one. A page looks at
        no more than SCAN_LIMIT rows, and no more than PAGE_BYTES of them, so a page may be short, or empty, and have a
        cursor: more may follow.
        """
        columns = ("state", "kind", "grp", "worker")
        assert all(name in columns for name in filters)
        indexed = "state = :state AND " if "state" in filters else ""
        rest = " AND ".join(f"{name} = :{name}" for name in filters if name != "state") or "1"
        # The column names come from the tuple above, never from the caller.
        scan = (
            f"SELECT seq, id, ({rest}) AS hit, length(spec) + coalesce(length(result), 0) FROM jobs "  # noqa: S608
            f"WHERE {indexed} seq < :before AND seq > :after "
            f"ORDER BY seq DESC LIMIT {SCAN_LIMIT}"
        )
        first, last_of = self._members(array) if array is not None else (0, 1 << 62)
        values = {**filters, "before": min(before if before is not None else 1 << 62, last_of), "after": first}
        found: list[dict[str, Any]] = []
        seen, size, last = 0, 0, None
        with self._db:
            for seq, job_id, hit, weight in self._db.execute(scan, values):
                seen, last = seen + 1, cast(int, seq)
                if hit:
                    record = self.job(cast(str, job_id), history=False)
                    assert record is not None
                    found.append(record)
                    size += cast(int, weight)
                    if len(found) == limit or size >= PAGE_BYTES:
                        return found, last
        return found, last if seen == SCAN_LIMIT else None

    def schedules(self) -> list[dict[str, Any]]:
        """Every schedule by name; times are unix seconds."""
        found = []
        for name, body, origin, due, changed, runs, skipped, last_due, last_job, note in self._all("schedules"):
            found.append(
                {
                    "name": name,
                    "origin": origin,
                    "schedule": json.loads(body),
                    "next_due_at": _seconds(due) if due else None,
                    "changed_at": _seconds(changed),
                    "runs": runs,
                    "skipped": skipped,
                    "last_due_at": _seconds(last_due),
                    "last_job": last_job,
                    "note": note or None,
                }
            )
        return found

    def due_schedules(self, now_ms: int) -> list[tuple[str, int, str]]:
        """(name, due time, body) of what is due."""
        return cast(list[tuple[str, int, str]], self._all("due_schedules", (now_ms,)))

    def failed(
        self,
        *,
        kind: str | None,
        group: str | None,
        array: str | None,
        since_ms: int,
        until: tuple[int, int],
        limit: int,
    ) -> tuple[list[str], tuple[int, int] | None]:
        """Ids of failed jobs, the newest first, and where the next slice goes on (None at the end). `until` is the
        (time of the end, number) that this slice comes before. A slice looks at `limit` rows, fitting or not."""
        first, last_of = self._members(array) if array is not None else (0, 1 << 62)
        rows = self._all("failed_before", (until[0], until[0], until[1], since_ms, limit))
        ids = [
            job_id
            for job_id, job_kind, grp, _, seq in rows
            if kind in (None, job_kind) and group in (None, grp) and first < seq < last_of
        ]
        return ids, (rows[-1][3], rows[-1][4]) if len(rows) == limit else None

    def _members(self, array: str) -> tuple[int, int]:
        """Between which numbers the members of an array lie; of one that is not known, none do."""
        row = self._one("array_record", (array,))
        return (row[0], row[0] + row[2] + 1) if row is not None else (0, 0)

    def recent_failures(self, limit: int) -> list[dict[str, Any]]:
        """Newest first: ``{id, kind, worker, attempt, error, exit_code, failed_at}``."""
        return [
            {
                "id": job_id,
                "kind": kind,
                "worker": worker,
                "attempt": attempt,
                "error": error,
                "exit_code": exit_code,
                "failed_at": _seconds(finished),
            }
            for job_id, kind, worker, attempt, error, exit_code, finished in self._all("recent_failures", (limit,))
        ]

    def ahead(self, priority: int, seq: int) -> int:
        """How many pending jobs came before one, of its priority or higher."""
        row = self._one("ahead", (priority, seq))
        assert row is not None
        return int(row[0])

    # -- sums --------------------------------------------------------------------------------------------------------

    def counts(self) -> list[tuple[str, str, str, int]]:
        """(state, kind, group, jobs)."""
        return cast(list[tuple[str, str, str, int]], self._all("counts"))

    def shapes(self) -> list[tuple[int, int, str]]:
        """(shape, pending jobs, requirements as JSON)."""
        return cast(list[tuple[int, int, str]], self._all("shape_counts"))

    def ends_since(self, minute: int) -> list[tuple[int, str, str, int]]:
        """(minute, kind, what, jobs) for what in submitted, completed, failed, cancelled, retried."""
        return cast(list[tuple[int, str, str, int]], self._all("minutes_since", (minute,)))

    def totals(self) -> dict[tuple[str, str], int]:
        """(kind, what) -> jobs since the queue was made; what as in `ends_since`."""
        return {(kind, what): n for kind, what, n in self._all("totals")}

    def oldest_pending_ms(self) -> int | None:
        row = self._one("oldest_pending")
        return None if row is None else int(row[0])

    def last_completion_ms(self) -> int | None:
        row = self._one("last_done", ("completed",))
        return None if row is None or row[0] is None else int(row[0])

    def next_due_ms(self) -> int | None:
        """When the next waiting job is due."""
        row = self._one("next_due")
        return None if row is None or row[0] is None else int(row[0])

    def last_seq(self) -> int:
        row = self._db.execute("SELECT value FROM meta WHERE key = 'seq'").fetchone()
        return int(cast(int, cast(Any, row)[0]))

    def workers(self) -> list[WorkerBook]:
        return [WorkerBook(*row) for row in self._all("workers")]

    def held(self) -> list[HeldRow]:
        """Attempts in progress; of a gang, each member that has not ended."""
        return [HeldRow(*row) for state in ("claimed", "running") for row in self._all("all_held", (state,))]

    def nodes(self) -> list[NodeMark]:
        return [NodeMark(*row) for row in self._all("nodes")]


def _record(row: tuple[Any, ...]) -> dict[str, Any]:
    (seq, job_id, kind, group, state, priority, requires, attempt, failures, max_attempts, *rest) = row
    (backoff, timeout, blockers, ready, created, claimed, started, finished, worker, gpus, *rest) = rest
    (unique_key, reason, error, exit_code, token, spec, result, no_retry, asked, checkpoint) = rest
    carried = json.loads(spec)
    required = shown_requires(asked or requires)
    hints = shown_hints(requires)
    return {
        "id": job_id,
        "number": seq,
        "kind": kind,
        "state": state,
        "priority": priority,
        "group": group,
        "command": carried["command"],
        "params": carried.get("params", {}),
        "requires": required,
        "placement_hints": hints,
        "nodes": carried.get("nodes", 1),
        "worker": worker,
        "attempt": attempt,
        "failed_attempts": failures,
        "max_attempts": max_attempts,
        "retry_backoff_seconds": backoff / 1000,
        "timeout_seconds": timeout / 1000 if timeout else None,
        "grace_seconds": carried.get("grace_seconds"),
        "fence": carried.get("fence", "attempt"),
        "preemptible": carried.get("preemptible", True),
        "array": carried.get("array"),
        "no_retry_exit_codes": no_retry.split(",") if no_retry else [],
        "token": token,
        "gpus": json.loads(gpus) if gpus else [],
        "env": carried.get("env", {}),
        "cwd": carried.get("cwd"),
        "depends_on": carried.get("depends_on", []),
        "unfinished_dependencies": blockers,
        "unique_key": unique_key,
        "not_before": _seconds(ready) if ready else None,
        "created_at": _seconds(created),
        "claimed_at": _seconds(claimed),
        "started_at": _seconds(started),
        "finished_at": _seconds(finished),
        "reason": reason,
        "error": error,
        "exit_code": exit_code,
        "result": _json(result),
        "checkpoint": _json(checkpoint),
    }


def _array_record(row: tuple[Any, ...]) -> dict[str, Any]:
    (_, id, size, indexes, kind, group, unique_key, state, reason, finished, blockers, closed, made, *rest) = row
    (_parked, _pruned, *counted, created, template) = rest
    counts = dict(zip(STATES, counted, strict=True))
    to_come = 0 if closed or state else size - made
    job = NewJob(*msgpack.unpackb(template, use_list=False))
    carried = json.loads(job.spec)
    if not state:
        started = counts["claimed"] + counts["running"] + counts["completed"] + counts["failed"]
        state = "waiting" if blockers else "running" if started else "pending"
    return {
        "id": id,
        "kind": kind,
        "group": group,
        "state": state,
        "array": indexes,
        "count": size,
        "counts": {**counts, "cancelled": counts["cancelled"] + (size - made - to_come)},
        "made": made,
        "to_come": to_come,
        "at_once": parse(indexes).at_once or None,
        "priority": job.priority,
        "command": carried["command"],
        "params": carried.get("params", {}),
        "requires": json.loads(job.requires),
        "env": carried.get("env", {}),
        "depends_on": carried.get("depends_on", []),
        "unfinished_dependencies": blockers,
        "unique_key": unique_key,
        "max_attempts": job.max_attempts,
        "timeout_seconds": job.timeout_ms / 1000 if job.timeout_ms else None,
        "created_at": _seconds(created),
        "finished_at": _seconds(finished),
        "reason": reason,
    }
