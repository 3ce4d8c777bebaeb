"""The work queue as a deterministic state machine: ``apply(index, command) -> outcome`` on SQLite.

Decides every rule of DESIGN §5: which transition is legal, what a finish unblocks, what a failure costs. Decides
nothing about time, ids or placement: those come inside the command (`coordination.commands`). It reads no clock and no
random source, and every SELECT that feeds a decision has a total order, so that each voter that applies the same
entries holds the same rows (PROTOCOL §2.23). One thread owns the connection. Reading for people is
`coordination.queue_reads`; how entries get here is `p2p.driver`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from typing import Any, NamedTuple, cast
from zlib import crc32

import apsw
import msgpack

from coordination import commands as c
from coordination.arrays import MOST_AT_ONCE, UNFINISHED, Array, ArrayBook
from coordination.errors import Refused
from coordination.events import Event
from coordination.events import EventType as E
from coordination.job import FINISHED, IN_PROGRESS, NOT_STARTED, JobState, is_exit_code_of
from coordination.lane import Head
from coordination.retry import MAX_BACKOFF_MS, backoff_ms
from coordination.sql import migrations, schema, statements

S = JobState
SCHEMA_VERSION = 2
MARK_EVERY = 1024  # entries between two marks by which voters compare their states
DIGEST_RULES = 2  # one more whenever `_tell` or `_apply` sums up something else: then builds are not comparable
MAX_HISTORY = 100  # transitions kept of one job; its first ten stay for ever
MAX_ERROR_CHARS = 8_000
MAX_AVOIDED = 3  # workers that a failed job keeps away from
MAX_HINTED_SHAPES = 1_000  # beyond so many shapes a failed job gets no hints: what placement costs depends on shapes
CLOCK_STEP_MS = 60_000  # nodes whose clocks differ by 30 s are refused (DESIGN §3), so this is no disagreement
MAX_KEYS = 500_000
KEY_AGE_MS = 86_400_000
REMEMBERED_LANES = 1_024  # that have nothing pending; beyond twice as many those longest unchanged are forgotten

# The legal transitions and what each one means. tests/unit/coordination draw this table into docs/architecture.md.
EDGES: dict[tuple[JobState | None, JobState], str] = {
    (None, S.PENDING): "submitted",
    (None, S.WAITING): "submitted with dependencies or not_before",
    (None, S.CANCELLED): "submitted after a dependency had failed",
    (S.WAITING, S.PENDING): "its time came, or its last dependency completed",
    (S.WAITING, S.CANCELLED): "cancelled, or a dependency failed",
    (S.PENDING, S.CLAIMED): "placed on a worker: a new attempt",
    (S.PENDING, S.CANCELLED): "cancelled",
    (S.CLAIMED, S.RUNNING): "its process started",
    (S.CLAIMED, S.PENDING): "released, or the attempt failed without backoff",
    (S.CLAIMED, S.WAITING): "the attempt failed; backoff",
    (S.CLAIMED, S.FAILED): "the last attempt failed",
    (S.CLAIMED, S.CANCELLED): "cancelled",
    (S.RUNNING, S.PENDING): "released, or the attempt failed without backoff",
    (S.RUNNING, S.WAITING): "the attempt failed; backoff",
    (S.RUNNING, S.COMPLETED): "exit 0",
    (S.RUNNING, S.FAILED): "the last attempt failed",
    (S.RUNNING, S.CANCELLED): "cancelled",
    (S.FAILED, S.PENDING): "retried by hand",
    (S.FAILED, S.WAITING): "retried by hand while its array has no turn for it",
    (S.CANCELLED, S.PENDING): "retried by hand",
    (S.CANCELLED, S.WAITING): "retried by hand while a dependency is unfinished, or its array has no turn for it",
}  # An attempt that ended before its start was reported passes through running.


class Claimed(NamedTuple):
    """What a claim gives a worker of one job. `spec` is JSON."""

    id: str
    kind: str
    attempt: int
    token: int
    timeout_ms: int
    gpus: str | None
    spec: bytes
    requires: str  # its lane's text
    checkpoint: bytes | None  # JSON
    seq: int
    priority: int


class ReadyLane(NamedTuple):
    """The pending jobs of one shape: how many, its text, and the first of them."""

    shape: int
    jobs: int
    requires: str
    heads: tuple[Head, ...]


class ChangedLanes(NamedTuple):
    """Lanes whose pending jobs have changed, among them those that have none any more. `whole`: these are all there
    are. `upto` is what to ask with the next time."""

    upto: int
    whole: bool
    lanes: list[ReadyLane]


class _Row(NamedTuple):
    seq: int
    id: str
    kind: str
    group: str
    state: str
    shape: int
    attempt: int
    failures: int
    max_attempts: int
    backoff_ms: int
    moves: int
    worker: str | None
    ready_ms: int
    blockers: int


class _Dependency(NamedTuple):
    """A job or an array that others wait for; an array that is not over has the state ""."""

    seq: int
    id: str
    state: str


class _Hints(NamedTuple):
    no_retry: str
    asked: str | None
    failed_on: str | None


class QueueState:
    """Owns the tables of ``schema.sql`` on one writing connection. Not thread-safe: one thread applies."""

    def __init__(self, path: str) -> None:
        """Opens or creates the database file at `path`."""
        self._path = path
        self._db = apsw.Connection(path)
        self._db.set_busy_timeout(100)  # for a checkpoint beside a reader; nobody else writes
        self._run = self._db.execute
        for pragma in (
            "journal_mode=WAL",
            "synchronous=NORMAL",
            "wal_autocheckpoint=0",
            "mmap_size=0",
            "cache_size=-16000",
            "temp_store=MEMORY",
        ):
            self._run(f"PRAGMA {pragma}").fetchall()
        if not self._run("SELECT 1 FROM sqlite_master WHERE name='meta'").fetchone():
            with self._db:
                self._run(schema())
                self._run(
                    "INSERT INTO meta VALUES ('schema', ?), ('applied', 0), ('term', 0), ('now', 0), ('seq', 0)",
                    (SCHEMA_VERSION,),
                )
        self._migrate()
        meta = {str(key): int(cast(int, value)) for key, value in self._run("SELECT key, value FROM meta")}
        self._q = statements()
        self._arrays = ArrayBook(self._run, self._q)
        self.applied_index = self._index = meta["applied"]  # committed to the file; and of the entry in hand
        self.applied_term = self._term = meta["term"]
        self._durable_index = 0  # what a checkpoint of ours has covered
        self.now_ms = meta["now"]
        self._seq = meta["seq"]
        self.mark = self._mark = (0, 0)  # the newest index at a multiple of MARK_EVERY, and a digest
        self._digest = self._digested = 0  # of what the entries since the last such index did, and the sums; how many
        self._shapes: dict[str, int] = {
            str(r): int(cast(int, s)) for s, r in self._run("SELECT shape, requires FROM shapes")
        }
        self._requires: dict[int, str] = {shape: requires for requires, shape in self._shapes.items()}
        self._of_shape: dict[int, int] = {
            int(cast(int, s)): int(cast(int, n)) for s, n in self._run("SELECT shape, jobs FROM shapes")
        }
        self._ready: dict[int, int] = {
            int(cast(int, s)): int(cast(int, n)) for s, n in self._run("SELECT shape, n FROM shape_counts")
        }
        # Sums that other threads may glance at as hints; single integers, so a read is never torn.
        self.pending_total = sum(self._ready.values())
        self.waiting_total = self._count("waiting")
        self.unfinished_total = sum(self._count(state) for state in (*NOT_STARTED, *IN_PROGRESS))
        self._changes, self._forgotten = 1, 0
        self._changed: dict[int, int] = {}  # shape -> number of the last change of its pending jobs, in that order
        self._events: list[Event] = []
        self._clear_deltas()
        self._handlers: dict[type[Any], Callable[[int, Any], Any]] = {
            c.Submit: self._on_submit,
            c.Claim: self._on_claim,
            c.Begin: self._on_begin,
            c.Finish: self._on_finish,
            c.Expire: self._on_expire,
            c.Release: self._on_release,
            c.Cancel: self._on_cancel,
            c.Retry: self._on_retry,
            c.Wake: self._on_wake,
            c.Clear: self._on_clear,
            c.Prune: self._on_prune,
            c.ForgetWorkers: self._on_forget_workers,
            c.ClaimGang: self._on_claim_gang,
            c.MarkNode: self._on_mark_node,
            c.RetryMany: self._on_retry_many,
            c.PutSchedule: self._on_put_schedule,
            c.DropSchedule: self._on_drop_schedule,
            c.RunSchedule: self._on_run_schedule,
        }

    def _migrate(self) -> None:
        """Takes a file of an earlier build over, step by step. Raises Refused for one of a later build."""
        version = int(_single(self._run("SELECT value FROM meta WHERE key = 'schema'")))
        steps = migrations()
        if version > SCHEMA_VERSION or any(step not in steps for step in range(version + 1, SCHEMA_VERSION + 1)):
            raise Refused(409, f"{self._path} has queue schema {version}; this build reads {SCHEMA_VERSION}")
        if version < SCHEMA_VERSION:
            with self._db:
                for step in range(version + 1, SCHEMA_VERSION + 1):
                    self._run(steps[step])
                self._run("UPDATE meta SET value = ? WHERE key = 'schema'", (SCHEMA_VERSION,))

    def _count(self, state: str) -> int:
        row = self._run("SELECT coalesce(sum(n), 0) FROM counts WHERE state = ?", (state,)).fetchone()
        return cast(int, cast(Any, row)[0])

    def _clear_deltas(self) -> None:
        self._counts: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self._ready_delta: defaultdict[int, int] = defaultdict(int)
        self._minutes: defaultdict[tuple[int, str, str], int] = defaultdict(int)
        self._workers: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        self._shape_jobs: defaultdict[int, int] = defaultdict(int)

    # -- applying ------------------------------------------------------------------------------------------------

    def apply_batch(self, entries: Iterable[tuple[int, int, bytes]]) -> list[tuple[Any, list[Event]]]:
        """Applies committed entries ``(index, term, body)`` in one transaction; answers (result, events) for each.

        An empty body is a leader's no-op. A `Refused` result means the command broke a rule and changed nothing.
        Entries at or below `applied_index` are a replay after a crash and are skipped (their answer is None).
        Other threads look at `applied_index` and then read the file: it moves when the file has.
        """
        answers: list[tuple[Any, list[Event]]] = []
        self._run("BEGIN IMMEDIATE")
        try:
            for index, term, body in entries:
                answers.append(self._apply(index, term, body))
            self._flush()
            for key, value in (
                ("applied", self._index),
                ("term", self._term),
                ("now", self.now_ms),
                ("seq", self._seq),
            ):
                self._run("UPDATE meta SET value = ? WHERE key = ?", (value, key))
        except BaseException:
            self._run("ROLLBACK")
            raise
        self._run("COMMIT")
        self.applied_index, self.applied_term, self.mark = self._index, self._term, self._mark
        return answers

    def _apply(self, index: int, term: int, body: bytes) -> tuple[Any, list[Event]]:
        if index <= self._index:
            return None, []
        assert index == self._index + 1, f"entry {index} applied after {self._index}"
        self._events = []
        result: Any = None
        if body:
            command = c.decode(body)
            self._keep_time(command.at_ms)
            result = self._handlers[type(command)](index, command)
            self._tend_arrays()
        self._index, self._term = index, term
        sums = f"{index} {self.now_ms} {self._seq} {self.unfinished_total} {self.pending_total} {self.waiting_total}"
        sums += f" {self._arrays.to_come}"
        self._digest = crc32(sums.encode(), self._digest)
        self._digested += 1
        if index % MARK_EVERY == 0:
            if self._digested == MARK_EVERY:  # else this process has not seen all of them
                self._mark = (index, DIGEST_RULES << 32 | self._digest)
            self._digest = self._digested = 0
        return result, self._events

    def _keep_time(self, at_ms: int) -> None:
        """State time does not go back by the little that clocks of two leaders differ (PROTOCOL §2.23). A large step
        back is a clock that was wrong and has been put right: keeping the wrong time would stop every backoff, every
        clean-up and every sum of the last hour until it came true."""
        if at_ms >= self.now_ms - CLOCK_STEP_MS:
            self.now_ms = max(self.now_ms, at_ms)
            return
        self.now_ms = at_ms
        self._run(self._q["shorten_backoffs"], (at_ms + MAX_BACKOFF_MS, at_ms + MAX_BACKOFF_MS))

    def _flush(self) -> None:
        """Writes the sums gathered since the last time: at the end of a batch, and before a command that reads them.

        How entries are cut into batches differs from voter to voter and must not show in the tables, hence no row of
        a sum that is 0: whether it was ever written would depend on the cut.
        """
        run = self._run
        for count, n in self._counts.items():
            if n and _single(run(self._q["add_count"], (*count, n))) == 0:
                run("DELETE FROM counts WHERE state = ? AND kind = ? AND grp = ?", count)
        for shape, n in self._ready_delta.items():
            if n and _single(run(self._q["add_shape_count"], (shape, n))) == 0:
                run("DELETE FROM shape_counts WHERE shape = ?", (shape,))
        for shape, n in self._shape_jobs.items():
            run("UPDATE shapes SET jobs = jobs + ? WHERE shape = ?", (n, shape))
        for (minute, kind, what), n in self._minutes.items():
            run(
                "INSERT INTO minutes VALUES (?1,?2,?3,?4) ON CONFLICT DO UPDATE SET n = n + ?4", (minute, kind, what, n)
            )
            run("INSERT INTO totals VALUES (?1,?2,?3) ON CONFLICT DO UPDATE SET n = n + ?3", (kind, what, n))
        for worker, (completed, failed, claimed, seen) in self._workers.items():
            run(
                "INSERT INTO workers VALUES (?1,?2,?3,?4,?5) ON CONFLICT DO UPDATE SET completed = completed + ?2,"
                " failed = failed + ?3, claimed = claimed + ?4, seen_ms = ?5",
                (worker, completed, failed, claimed, seen),
            )
        self._arrays.flush()
        self._clear_deltas()

    def checkpoint(self) -> int:
        """Makes everything applied durable in the main file (fsync); answers the index that now is. While a reader
        (a snapshot, a person's tool) holds on to an older view that is the index of an earlier checkpoint."""
        try:
            self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except apsw.BusyError:
            return self._durable_index
        self._durable_index = self.applied_index
        return self._durable_index

    def replace(self, install: Callable[[], None]) -> None:
        """Closes the file, has `install` put a leader's snapshot in its place, and opens that."""
        self._db.close()
        install()
        self.__init__(self._path)  # type: ignore[misc]  # whoever holds this object goes on holding the queue

    def close(self) -> None:
        """Checkpoints and closes."""
        self.checkpoint()
        self._db.close()

    # -- bookkeeping shared by every transition ---------------------------------------------------------------------

    def _moved(
        self,
        *,
        seq: int,
        n: int,
        old: str | None,
        new: JobState,
        kind: str,
        group: str,
        shape: int,
        attempt: int,
        worker: str | None,
        reason: str | None,
    ) -> None:
        """Writes the history and the sums of one transition; an edge that is not in the table is our own bug."""
        assert (old, new) in EDGES, f"job {seq}: {old} -> {new} is not a transition"
        self._run(self._q["insert_history"], (seq, n, self.now_ms, new.value, attempt, worker, reason))
        if n > MAX_HISTORY:
            self._run(self._q["trim_history"], (seq, n - MAX_HISTORY + 10))
        counts = self._counts
        counts[(new.value, kind, group)] += 1
        if old is not None:
            counts[(old, kind, group)] -= 1
            if old == "pending":
                self._ready_add(shape, -1)
        if new is S.PENDING:
            self._ready_add(shape, 1)
        self.waiting_total += (new is S.WAITING) - (old == "waiting")
        self.unfinished_total += (new not in FINISHED) - (old is not None and old not in FINISHED)
        self._arrays.moved(seq, old, new.value)

    def _ready_add(self, shape: int, n: int) -> None:
        self._ready[shape] = self._ready.get(shape, 0) + n
        if not self._ready[shape]:
            del self._ready[shape]  # what a claim looks at is the shapes that wait now, not all there ever were
        self._ready_delta[shape] += n
        self._changes += 1
        self._changed.pop(shape, None)
        self._changed[shape] = self._changes
        self.pending_total += n

    def _take_shape(self, requires: str) -> int:
        """The shape of these requirements, which has one job more from now on."""
        shape = self._shapes.get(requires)
        if shape is None:
            shape = max(self._requires, default=0) + 1
            self._run("INSERT INTO shapes VALUES (?, ?, 0)", (shape, requires))
            self._shapes[requires] = shape
            self._requires[shape] = requires
            self._of_shape[shape] = 0
        self._shape_jobs[shape] += 1
        self._of_shape[shape] += 1
        return shape

    def _leave_shape(self, shape: int) -> None:
        """One job less has this shape; it goes with the last of them."""
        self._shape_jobs[shape] -= 1
        self._of_shape[shape] -= 1
        if not self._of_shape[shape]:
            del self._shape_jobs[shape], self._of_shape[shape], self._shapes[self._requires.pop(shape)]
            self._run("DELETE FROM shapes WHERE shape = ?", (shape,))

    def _reshape(self, row: _Row, requires: str, *, asked: str | None, failed_on: str | None) -> _Row:
        """The job with other requirements; `asked` is what its author required, None when that is what it has again.
        Only for a job that is not pending: those are counted by shape."""
        assert row.state != S.PENDING, f"job {row.id} is pending"
        shape = self._take_shape(requires)
        self._leave_shape(row.shape)
        self._run(self._q["reshape_job"], (shape, asked, failed_on, row.seq))
        return row._replace(shape=shape)

    def _book(self, worker: str, column: int) -> None:
        """One more completed (0), failed (1) or claimed (2) in a worker's books."""
        book = self._workers[worker]
        book[column] += 1
        book[3] = self.now_ms

    def _tell(self, type: E, row_id: str, kind: str, **fields: Any) -> None:
        self._events.append(Event(type, self.now_ms, {"job": row_id, "kind": kind, **fields}))
        told = msgpack.packb((type, row_id, kind, fields), unicode_errors="surrogatepass")
        self._digest = crc32(told, self._digest)

    def _row(self, job_id: str) -> _Row | None:
        row = self._run(self._q["job_row"], (job_id,)).fetchone()
        return _Row(*cast(Any, row)) if row else None

    def _row_by_seq(self, seq: int) -> _Row:
        row = self._run(self._q["job_row_by_seq"], (seq,)).fetchone()
        assert row is not None, f"job number {seq} is gone"
        return _Row(*cast(Any, row))

    def _remember(self, key: str, digest: str, answer: Any) -> None:
        if key:
            self._run("INSERT OR REPLACE INTO keys VALUES (?,?,?,?)", (key, self.now_ms, digest, json.dumps(answer)))

    def _remembered(self, key: str, digest: str) -> Any:
        """The first answer to this key, None if it is new, Refused if it came with another request."""
        if not key:
            return None
        row = self._run("SELECT digest, answer FROM keys WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        if row[0] != digest:
            return Refused(422, "this idempotency key was used for a different request", field="Idempotency-Key")
        return json.loads(cast(str, row[1]))

    # -- submit ----------------------------------------------------------------------------------------------------

    def _on_submit(self, index: int, command: c.Submit) -> Any:
        first = self._remembered(command.key, command.digest)
        if isinstance(first, Refused):
            return first
        if first is not None:
            return {**first, "created": [False] * len(first["ids"])}
        refused = self._check_dependencies(command.jobs)
        if refused is not None:
            return refused
        ids: list[str] = []
        created: list[bool] = []
        counts: dict[int, int] = {}  # members of the arrays among them
        instead: dict[str, str] = {}  # a job of this batch that was not made -> the one that holds its unique_key
        for job in command.jobs:
            taken = None
            if job.unique_key is not None:
                taken = self._run(self._q["unfinished_by_key"], (job.unique_key,)).fetchone()
            ids.append(str(taken[0]) if taken else job.id)
            created.append(taken is None)
            if taken is not None:
                instead[job.id] = str(taken[0])
            elif job.array:
                counts[len(ids) - 1] = self._insert_array(_renamed(job, instead))
            else:
                self._insert(_renamed(job, instead))
        answer: dict[str, Any] = {"ids": ids}
        if counts:
            answer["counts"] = [counts.get(n) for n in range(len(ids))]
        self._remember(command.key, command.digest, answer)
        return {**answer, "created": created}

    def _check_dependencies(self, jobs: tuple[c.NewJob, ...]) -> Refused | None:
        """Every dependency must be a known job, or one of this batch that comes before it."""
        here: set[str] = set()
        for at, job in enumerate(jobs):
            for n, dep in enumerate(job.depends_on):
                if dep not in here and self._dependency(dep) is None:
                    prefix = f"jobs[{at}]." if len(jobs) > 1 else ""
                    return Refused(422, self._no_job(dep), field=f"{prefix}depends_on[{n}]")
            here.add(job.id)
        return None

    def _insert(self, job: c.NewJob, seq: int = 0) -> None:
        """A new job; `seq` is its number if that was set aside."""
        if not seq:
            self._seq += 1
            seq = self._seq
        shape = self._take_shape(job.requires)
        broken, waits = self._dependencies(job.depends_on)
        blockers = 0
        state, reason = S.PENDING, None
        if broken is not None:
            state, reason = S.CANCELLED, f"dependency {broken.id} {broken.state}"
        elif waits:
            state, reason = S.WAITING, "waits for dependencies"
            blockers = self._wait_for(seq, waits)
        elif job.not_before_ms > self.now_ms:
            state, reason = S.WAITING, "not before its time"
        self._run(
            self._q["insert_job"],
            (
                seq,
                job.id,
                job.kind,
                job.group,
                state.value,
                job.priority,
                shape,
                job.max_attempts,
                job.backoff_ms,
                job.timeout_ms,
                blockers,
                job.not_before_ms,
                self.now_ms,
                job.unique_key,
                reason,
                job.spec,
                job.no_retry,
            ),
        )
        self._moved(
            seq=seq,
            n=1,
            old=None,
            new=state,
            kind=job.kind,
            group=job.group,
            shape=shape,
            attempt=0,
            worker=None,
            reason=reason,
        )
        self._minutes[(self.now_ms // 60_000, job.kind, "submitted")] += 1
        self._tell(E.WORK_QUEUED, job.id, job.kind, priority=job.priority, state=state.value)
        if broken is not None:
            self._run("UPDATE jobs SET finished_ms = ? WHERE seq = ?", (self.now_ms, seq))
            self._minutes[(self.now_ms // 60_000, job.kind, "cancelled")] += 1
            self._tell(E.WORK_CANCELLED, job.id, job.kind, reason=reason)

    def _dependencies(self, ids: Iterable[str]) -> tuple[_Dependency | None, list[int]]:
        """The first of these that failed or was cancelled, and the numbers of those that are unfinished."""
        broken: _Dependency | None = None
        waits: dict[int, None] = {}
        for job_id in ids:
            found = self._dependency(job_id)
            if found is None:  # completed and since pruned: a job that is retried long after
                continue
            if found.state in (S.FAILED, S.CANCELLED):
                broken = broken or found
            elif found.state != S.COMPLETED:
                waits[found.seq] = None
        return broken, list(waits)

    def _dependency(self, id: str) -> _Dependency | None:
        """The job or the array of this id."""
        row = self._row(id)
        if row is not None:
            return _Dependency(row.seq, id, row.state)
        array = self._arrays.by_id(id)
        return _Dependency(array.seq, id, array.state) if array is not None else None

    def _wait_for(self, seq: int, dependencies: list[int]) -> int:
        for dep in dependencies:
            self._run("INSERT INTO deps VALUES (?, ?)", (dep, seq))
        return len(dependencies)

    # -- arrays ------------------------------------------------------------------------------------------------------

    @property
    def array_backlog(self) -> int:
        """Members of arrays that are still to be made. A single number, so another thread may glance at it."""
        return self._arrays.to_come

    @property
    def arrays_want(self) -> bool:
        """Whether the next entry, whatever it is, makes or cancels members of arrays."""
        return bool(self._arrays.wanting)

    def _insert_array(self, job: c.NewJob) -> int:
        """A new array; answers how many members it has, whose numbers follow its own."""
        self._seq += 1
        array = self._arrays.add(self._seq, job, self.now_ms)
        self._seq += array.size
        broken, waits = self._dependencies(job.depends_on)
        if broken is not None:
            self._arrays.close(array, cancel=True, reason=f"dependency {broken.id} {broken.state}")
        array.blockers = self._wait_for(array.seq, waits) if broken is None else 0
        return array.size

    def _tend_arrays(self) -> None:
        """After each entry: what it did to arrays, and one slice of what there is to make and to cancel. The oldest
        array first, as the oldest job goes first."""
        book = self._arrays
        left = MOST_AT_ONCE
        while book.touched or (book.wanting and left):
            for seq in list(book.touched):
                self._note_array(book.touched.pop(seq))
            if book.wanting and left:
                array = book.at(book.wanting[0])
                done = self._serve(array, left)
                assert done, f"array {array.id} wants something that there is not: {array}"
                left -= done

    def _note_array(self, array: Array) -> None:
        if array.is_over:
            array.state, array.finished_ms, array.blockers = array.outcome(), self.now_ms, 0
            self._run("DELETE FROM deps WHERE seq = ?", (array.seq,))
            self._arrays.save(array)
            self._settle_dependents(array.seq, array.id, S(array.state))
        self._arrays.note_wants(array)

    def _serve(self, array: Array, limit: int) -> int:
        """Makes or cancels members of an array that wants it; how many."""
        if array.closed == 2:
            return self._cancel_members(array, limit)
        n = 0
        for seq in self._arrays.waiting_for_their_turn(array, min(limit, array.room)) if array.parked else ():
            self._run("DELETE FROM deps WHERE dep = ? AND seq = ?", (-array.seq, seq))
            array.parked -= 1
            self._unblock(self._row_by_seq(seq))
            n += 1
        for _ in range(min(limit - n, array.room, array.to_come)):
            seq, job = self._arrays.next_member(array)
            self._insert(job, seq)
            n += 1
        self._arrays.touch(array)
        return n

    def _cancel_members(self, array: Array, limit: int) -> int:
        n = 0
        for state in UNFINISHED:
            span = (state, array.seq, array.seq + array.size, limit - n)
            for (seq,) in self._run(self._q["members_in"], span).fetchall():
                row = self._row_by_seq(cast(int, seq))
                if row.state == state:
                    self._cancel(row, array.reason or "its array was cancelled")
                    n += 1
        return n

    def _no_job(self, job_id: str) -> str:
        array = self._arrays.unmade(job_id)
        if array is not None:
            return f"job {job_id} is not made yet: it is a member of array {array.id}, whose turn has not come"
        return f"there is no job {job_id!r}"

    # -- claim, begin, finish ----------------------------------------------------------------------------------------

    def changed_lanes(self, limit: int, since: int = 0) -> ChangedLanes:
        """The shapes whose pending jobs have changed since an earlier answer's `upto`, with the first `limit` of each;
        all that have some, if that was too long ago. Whoever asks keeps the place: this forgets nothing that another,
        say the leader of the term before or after, has not asked for yet."""
        whole = not self._forgotten < since <= self._changes
        shapes = list(self._ready) if whole else self._changed_since(since)
        lanes = [
            ReadyLane(shape, self._ready[shape], self._requires[shape], tuple(self.heads(shape, limit)))
            if shape in self._ready
            else ReadyLane(shape, 0, "{}", ())
            for shape in sorted(shapes)
        ]
        return ChangedLanes(self._changes, whole, lanes)

    def _changed_since(self, since: int) -> list[int]:
        if len(self._changed) > len(self._ready) + 2 * REMEMBERED_LANES:
            idle = [shape for shape in self._changed if shape not in self._ready][:-REMEMBERED_LANES]
            for shape in idle:
                self._forgotten = self._changed.pop(shape)
        return list(takewhile(lambda shape: self._changed[shape] > since, reversed(self._changed)))

    def heads(self, shape: int, limit: int) -> Iterator[Head]:
        """The best `limit` pending jobs of a shape: priority, then first come first served."""
        for seq, priority in self._run(self._q["ready_heads"], (shape, limit)):
            yield Head(cast(int, seq), cast(int, priority), shape)

    def _on_claim(self, index: int, command: c.Claim, workers: list[str] | None = None) -> list[Claimed]:
        claimed: list[Claimed] = []
        worker = command.worker
        for pick in command.picks:
            row = cast(
                Any, self._run(self._q["claim_job"], (index, worker, pick.gpus, self.now_ms, pick.seq)).fetchone()
            )
            if row is None:
                continue
            job_id, kind, group, shape, attempt, timeout_ms, moves, spec, priority, checkpoint = row
            self._moved(
                seq=pick.seq,
                n=moves,
                old="pending",
                new=S.CLAIMED,
                kind=kind,
                group=group,
                shape=shape,
                attempt=attempt,
                worker=worker,
                reason=None,
            )
            self._book(worker, 2)
            gang = {"workers": workers} if workers else {}
            self._tell(E.WORK_CLAIMED, job_id, kind, attempt=attempt, worker=worker, timeout_ms=timeout_ms, **gang)
            told = (job_id, kind, attempt, index, timeout_ms, pick.gpus, spec, self._requires[shape], checkpoint)
            claimed.append(Claimed(*told, pick.seq, priority))
        return claimed

    def _on_claim_gang(self, index: int, command: c.ClaimGang) -> Claimed | None:
        first = command.members[0]
        pick = c.Pick(command.seq, first.gpus)
        workers = [member.worker for member in command.members]
        claimed = self._on_claim(index, c.Claim(command.at_ms, first.worker, (pick,)), workers)
        if not claimed:
            return None
        self._run("DELETE FROM members WHERE seq = ?", (command.seq,))
        for rank, member in enumerate(command.members):
            self._run(self._q["insert_member"], (command.seq, rank, claimed[0].attempt, member.worker, member.gpus))
            if rank:
                self._book(member.worker, 2)
        return claimed[0]

    def _member(self, row: _Row, worker: str) -> tuple[int, str] | None:
        """(rank, state) of a worker in the job's newest attempt; None if it takes no part in it. The only worker of a
        job that is no gang has rank -1."""
        # A text without the word is of no gang; asking for members of every job that ends would cost each a statement.
        if row.worker is not None and '"nodes":' in self._requires[row.shape]:
            found = self._run(self._q["member_of"], (row.seq, row.attempt, worker)).fetchone()
            if found is not None:
                return cast(tuple[int, str], found)
        return (-1, row.state) if row.worker == worker else None

    def _on_begin(self, index: int, command: c.Begin) -> None:
        for item in command.items:
            row = self._row(item.id)
            if row is None or row.attempt != item.attempt or row.state not in IN_PROGRESS:
                continue
            member = self._member(row, command.worker)
            if member is None:
                continue
            if member[0] >= 0:
                self._run(self._q["begin_member"], (item.started_ms, row.seq, member[0]))
            if row.state == S.CLAIMED:
                self._begin(row, item.started_ms)

    def _begin(self, row: _Row, started_ms: int) -> _Row:
        self._run(self._q["begin_job"], (started_ms, row.seq))
        self._moved(
            seq=row.seq,
            n=row.moves + 1,
            old=row.state,
            new=S.RUNNING,
            kind=row.kind,
            group=row.group,
            shape=row.shape,
            attempt=row.attempt,
            worker=row.worker,
            reason=None,
        )
        self._tell(E.WORK_STARTED, row.id, row.kind, attempt=row.attempt, worker=row.worker, started_ms=started_ms)
        return row._replace(state=S.RUNNING.value, moves=row.moves + 1)

    def _on_finish(self, index: int, command: c.Finish) -> list[Refused | None]:
        return [self._finish_attempt(item) for item in command.items]

    def _finish_attempt(self, item: c.AttemptDone) -> Refused | None:
        row = self._row(item.id)
        if row is None:
            return Refused(404, f"there is no job {item.id!r}", field="id")
        member = self._member(row, item.worker) if row.attempt == item.attempt else None
        if member is None or row.state not in IN_PROGRESS:
            if row.state == S.COMPLETED and item.ok and member is not None:
                return None  # the answer to the first report was lost; this is the same one again
            return Refused(
                409,
                f"attempt {item.attempt} of job {item.id} by {item.worker} is not the one in progress: the job is "
                f"{row.state}, its newest attempt is {row.attempt}",
                field="attempt",
            )
        if row.state == S.CLAIMED and item.started_ms:
            row = self._begin(row, item.started_ms)
        rank, state = member
        if state == "ended":
            return None  # its report comes again
        if not item.ok and item.checkpoint is not None:
            self._run(self._q["leave_checkpoint"], (item.checkpoint, row.seq))
        if not item.ok and item.cause in c.UNSPENT:
            self._release(row, item.cause)
            return None
        self._book(item.worker, 0 if item.ok else 1)
        result = item.result
        if item.ok and rank >= 0:
            # Only rank 0's result is the job's; a thousand members with a megabyte each would be a gigabyte of rows.
            self._run(self._q["end_member"], (result if rank == 0 else None, row.seq, rank))
            if _single(self._run(self._q["members_left"], (row.seq, row.attempt))):
                return None  # the others go on; the job is complete with the last of them
            result = _single(self._run(self._q["first_result"], (row.seq,)))
        if item.ok:
            if row.state == S.CLAIMED:
                row = self._begin(row, self.now_ms)
            # A completed job may carry a word of warning: its result could not be read.
            self._end(
                row,
                S.COMPLETED,
                result=result,
                error=item.error,
                exit_code=item.exit_code,
                failures=row.failures,
            )
            self._tell(E.WORK_COMPLETED, row.id, row.kind, attempt=row.attempt, worker=row.worker)
        else:
            error = item.error or "failed"
            self._attempt_failed(
                row._replace(worker=item.worker),  # of a gang the one that failed, not its first
                f"rank {rank} on {item.worker}: {error}" if rank >= 0 else error,
                item.exit_code,
                item.retryable,
                item.cause,
                item.result,
                worker=item.worker,
                gpu_memory_mb=item.gpu_memory_mb,
            )
        return None

    def _attempt_failed(
        self,
        row: _Row,
        error: str,
        exit_code: int | None,
        retryable: bool,
        cause: str,
        result: bytes | None,
        *,
        worker: str,
        gpu_memory_mb: int = 0,
    ) -> None:
        """Spends one attempt: back with backoff while any is left, else failed for good. `worker`: where it failed; of
        a gang that may be any of its members'."""
        hints = _Hints(*cast(Any, self._run(self._q["job_hints"], (row.seq,)).fetchone()))
        if cause == "exit" and is_exit_code_of(hints.no_retry, exit_code):
            retryable, cause = False, f"exit: code {exit_code} is not retried"
            error = f"{error[: MAX_ERROR_CHARS - 200]} (exit code {exit_code} is one of no_retry_exit_codes)"
        error = error[:MAX_ERROR_CHARS]
        failures = row.failures + 1
        told = {"attempt": row.attempt, "worker": worker, "error": error, "exit_code": exit_code, "cause": cause}
        if cause == "timeout":
            self._tell(E.WORK_TIMEOUT, row.id, row.kind, **told)
        if retryable and failures < row.max_attempts:
            wait = backoff_ms(row.backoff_ms, failures, row.id)
            row = self._hint(row, hints, worker, gpu_memory_mb if cause == "cuda_oom" else 0)
            self._requeue(row, wait=wait, failures=failures, error=error, exit_code=exit_code, reason=f"retry: {cause}")
            self._tell(E.WORK_RETRIED, row.id, row.kind, **told, backoff_seconds=wait / 1000)
            self._minutes[(self.now_ms // 60_000, row.kind, "retried")] += 1
        else:
            self._end(row, S.FAILED, error=error, exit_code=exit_code, failures=failures, reason=cause, result=result)
            self._tell(E.WORK_FAILED, row.id, row.kind, **told)

    def _hint(self, row: _Row, hints: _Hints, worker: str, above_mb: int) -> _Row:
        """The job with requirements that lead its next attempt elsewhere: away from the workers where it failed, and,
        with `above_mb`, to GPUs of more memory than that. Where nothing satisfies them, placement passes over them."""
        if not worker or len(self._requires) >= MAX_HINTED_SHAPES:
            return row
        before = json.loads(hints.failed_on) if hints.failed_on else []
        failed_on = [*(name for name in before if name != worker), worker][-MAX_AVOIDED:]
        shape = json.loads(self._requires[row.shape])
        asked = hints.asked or self._requires[row.shape]
        shape["avoid"] = sorted(failed_on)
        if above_mb > shape.get("gpu_memory_above_mb", 0):
            shape["gpu_memory_above_mb"] = above_mb
        return self._reshape(row, _canonical(shape), asked=asked, failed_on=json.dumps(failed_on))

    def _requeue(
        self, row: _Row, *, wait: int, failures: int, error: str | None, exit_code: int | None, reason: str
    ) -> None:
        state = S.WAITING if wait else S.PENDING
        ready = self.now_ms + wait if wait else 0
        self._run(
            self._q["requeue_job"], (state.value, ready, failures, error, exit_code, reason, row.moves + 1, row.seq)
        )
        self._moved(
            seq=row.seq,
            n=row.moves + 1,
            old=row.state,
            new=state,
            kind=row.kind,
            group=row.group,
            shape=row.shape,
            attempt=row.attempt,
            worker=row.worker,
            reason=reason,
        )

    def _end(
        self,
        row: _Row,
        state: JobState,
        *,
        result: bytes | None = None,
        error: str | None = None,
        exit_code: int | None = None,
        failures: int,
        reason: str | None = None,
    ) -> None:
        """Finishes a job and settles those that depend on it, however long the chain."""
        self._run(
            self._q["end_job"],
            (state.value, self.now_ms, None, result, error, exit_code, failures, reason, row.moves + 1, row.seq),
        )
        self._moved(
            seq=row.seq,
            n=row.moves + 1,
            old=row.state,
            new=state,
            kind=row.kind,
            group=row.group,
            shape=row.shape,
            attempt=row.attempt,
            worker=row.worker,
            reason=reason,
        )
        self._minutes[(self.now_ms // 60_000, row.kind, state.value)] += 1
        self._settle_dependents(row.seq, row.id, state)

    def _settle_dependents(self, seq: int, id: str, state: JobState) -> None:
        todo = [(seq, id, state)]
        while todo:
            dep_seq, dep_id, dep_state = todo.pop()
            waiting = [cast(int, seq) for (seq,) in self._run(self._q["dependents"], (dep_seq,)).fetchall()]
            if not waiting:
                continue
            self._run("DELETE FROM deps WHERE dep = ?", (dep_seq,))
            for seq in waiting:
                if seq in self._arrays:
                    self._settle_array(self._arrays.at(seq), dep_id, dep_state)
                    continue
                dependent = self._row_by_seq(seq)
                if dependent.state != S.WAITING:
                    continue
                if dep_state is S.COMPLETED:
                    self._unblock(dependent)
                else:
                    reason = f"dependency {dep_id} {dep_state.value}"
                    self._cancel_unstarted(dependent, reason)
                    todo.append((seq, dependent.id, S.CANCELLED))

    def _settle_array(self, array: Array, dep_id: str, dep_state: JobState) -> None:
        """A dependency of an array has ended; what follows for those that depend on it comes after the entry."""
        if array.state or array.closed:
            return
        if dep_state is S.COMPLETED:
            array.blockers -= 1
            self._arrays.touch(array)
        else:
            self._arrays.close(array, cancel=True, reason=f"dependency {dep_id} {dep_state.value}")

    def _unblock(self, row: _Row) -> None:
        blockers = row.blockers - 1
        assert blockers >= 0, f"job {row.id} is blocked by {blockers}"
        self._run(self._q["set_blockers"], (blockers, row.seq))
        if blockers == 0 and row.ready_ms <= self.now_ms:
            self._wake(row.seq)

    def _cancel_unstarted(self, row: _Row, reason: str) -> None:
        """Cancels a job that has no attempt in progress, without looking at its dependents."""
        self._run(
            self._q["end_job"],
            ("cancelled", self.now_ms, None, None, None, None, row.failures, reason, row.moves + 1, row.seq),
        )
        self._moved(
            seq=row.seq,
            n=row.moves + 1,
            old=row.state,
            new=S.CANCELLED,
            kind=row.kind,
            group=row.group,
            shape=row.shape,
            attempt=row.attempt,
            worker=row.worker,
            reason=reason,
        )
        array = self._arrays.of(row.seq)
        if array is not None and array.parked:
            self._run("DELETE FROM deps WHERE dep = ? AND seq = ?", (-array.seq, row.seq))
            array.parked -= self._db.changes()
        self._run("DELETE FROM deps WHERE seq = ?", (row.seq,))
        self._minutes[(self.now_ms // 60_000, row.kind, "cancelled")] += 1
        self._tell(E.WORK_CANCELLED, row.id, row.kind, reason=reason)

    # -- the leader's and the operator's verdicts ----------------------------------------------------------------------

    def _on_expire(self, index: int, command: c.Expire) -> int:
        n = 0
        for item in command.items:
            row = self._row(item.id)
            if row is None or row.attempt != item.attempt or row.state not in IN_PROGRESS:
                continue
            n += 1
            if row.state == S.CLAIMED:
                # It never ran, so there is nothing to hold against it.
                self._release(row, _verdict(item.cause, item.worker or row.worker))
            else:
                worker = item.worker or row.worker or ""
                self._book(worker, 1)
                self._attempt_failed(row, _verdict(item.cause, worker), None, True, item.cause, None, worker=worker)
        return n

    def _on_release(self, index: int, command: c.Release) -> Any:
        first = self._remembered(command.key, digest := f"release {' '.join(command.ids)}")
        if first is not None:
            return first
        released = []
        for job_id in command.ids:
            row = self._row(job_id)
            if row is None or row.state not in IN_PROGRESS:
                if len(command.ids) == 1:
                    return self._not_now(row, job_id, "released", "claimed or running")
                continue
            self._release(row, command.reason)
            released.append(job_id)
        self._remember(command.key, digest, released)
        return released

    def _release(self, row: _Row, reason: str) -> None:
        self._requeue(row, wait=0, failures=row.failures, error=None, exit_code=None, reason=f"released: {reason}")
        self._tell(E.WORK_RELEASED, row.id, row.kind, attempt=row.attempt, worker=row.worker, reason=reason)

    def _on_cancel(self, index: int, command: c.Cancel) -> Any:
        first = self._remembered(command.key, digest := f"cancel {' '.join(command.ids)}")
        if first is not None:
            return first
        cancelled = []
        for job_id in command.ids:
            row = self._row(job_id)
            array = self._arrays.by_id(job_id) if row is None else None
            if array is not None and not array.state:
                self._arrays.close(array, cancel=True, reason=command.reason)
                cancelled.append(job_id)
                continue
            if row is None or row.state in FINISHED:
                if len(command.ids) == 1:
                    return self._not_now(row, job_id, "cancelled", "unfinished")
                continue
            self._cancel(row, command.reason)
            cancelled.append(job_id)
        self._remember(command.key, digest, cancelled)
        return cancelled

    def _not_now(self, row: _Row | None, job_id: str, what: str, when: str) -> Refused:
        if row is not None:
            return Refused(409, f"job {job_id} is {row.state}; only {when} jobs can be {what}", field="state")
        array = self._arrays.by_id(job_id)
        if array is not None and what == "cancelled":
            return Refused(
                409, f"array {job_id} is {array.state}; only unfinished ones can be cancelled", field="state"
            )
        if array is not None:
            return Refused(409, f"{job_id} is an array; it is its members that are {what}", field="id")
        return Refused(404, self._no_job(job_id), field="id")

    def _cancel(self, row: _Row, reason: str) -> None:
        if row.state in NOT_STARTED:
            self._cancel_unstarted(row, reason)
            self._settle_dependents(row.seq, row.id, S.CANCELLED)
        else:
            self._end(row, S.CANCELLED, failures=row.failures, reason=reason)
            self._tell(E.WORK_CANCELLED, row.id, row.kind, attempt=row.attempt, worker=row.worker, reason=reason)

    def _on_retry(self, index: int, command: c.Retry) -> Any:
        first = self._remembered(command.key, digest := f"retry {command.id}")
        if first is not None:
            return first
        row = self._row(command.id)
        if row is None or row.state not in (S.FAILED, S.CANCELLED):
            return self._not_now(row, command.id, "retried", "failed or cancelled")
        key, spec, asked = cast(
            Any, self._run("SELECT unique_key, spec, asked FROM jobs WHERE seq = ?", (row.seq,)).fetchone()
        )
        holder = self._run(self._q["unfinished_by_key"], (key,)).fetchone() if key else None
        if holder is not None:
            return Refused(409, f"its unique_key {key!r} is held by the unfinished job {holder[0]}", field="unique_key")
        broken, waits = self._dependencies(json.loads(spec).get("depends_on", ()))
        if broken is not None:
            return Refused(409, f"its dependency {broken.id} is {broken.state}; retry that first", field="depends_on")
        array = self._arrays.of(row.seq)
        if array is not None:
            if array.state and array.unique_key is not None:
                holder = self._run(self._q["unfinished_by_key"], (array.unique_key,)).fetchone()
                if holder is not None:
                    held = f"its array's unique_key {array.unique_key!r} is held by the unfinished {holder[0]}"
                    return Refused(409, held, field="unique_key")
            if array.closed == 2 and array.unfinished:
                return Refused(
                    409, f"its array {array.id} is being cancelled; retry it once that is over", field="state"
                )
            if not array.room:
                waits.append(-array.seq)
                array.parked += 1
            self._arrays.reopen(array)
        state = S.WAITING if waits else S.PENDING
        blockers = self._wait_for(row.seq, waits)
        if asked is not None:
            row = self._reshape(row, asked, asked=None, failed_on=None)
        self._run(self._q["restart_job"], (state.value, blockers, "retried by hand", row.moves + 1, row.seq))
        self._moved(
            seq=row.seq,
            n=row.moves + 1,
            old=row.state,
            new=state,
            kind=row.kind,
            group=row.group,
            shape=row.shape,
            attempt=row.attempt,
            worker=None,
            reason="retried by hand",
        )
        self._tell(E.WORK_QUEUED, row.id, row.kind, state=state.value, reason="retried by hand")
        self._remember(command.key, digest, [row.id])
        return [row.id]

    def _on_retry_many(self, index: int, command: c.RetryMany) -> list[str]:
        """Those that were retried; what one order would refuse (a broken dependency, a key that is held) stays."""
        retried = []
        for id in command.ids:
            row = self._row(id)
            if row is not None and row.state == S.FAILED:
                answer = self._on_retry(index, c.Retry(command.at_ms, id))
                if not isinstance(answer, Refused):
                    retried.append(id)
        return retried

    # -- schedules ---------------------------------------------------------------------------------------------------

    def _on_put_schedule(self, index: int, command: c.PutSchedule) -> Any:
        there = self._run("SELECT body, origin, due_ms FROM schedules WHERE name = ?", (command.name,)).fetchone()
        due_ms = command.due_ms
        if there is not None:
            body, origin, due = cast(Any, there)
            if origin == "file" and command.origin != "file":
                return Refused(409, f"schedule {command.name} is one of jobs.yaml; change it there", field="name")
            if due and due_ms and _times(body) == _times(command.body):
                due_ms = due
        elif _single(self._run("SELECT count(*) FROM schedules")) >= c.MAX_SCHEDULES:
            return Refused(409, f"there are {c.MAX_SCHEDULES} schedules already; drop one first", field="name")
        self._run(self._q["put_schedule"], (command.name, command.body, command.origin, due_ms, self.now_ms))
        return None

    def _on_drop_schedule(self, index: int, command: c.DropSchedule) -> Any:
        there = self._run("SELECT origin FROM schedules WHERE name = ?", (command.name,)).fetchone()
        if there is None:
            return Refused(404, f"there is no schedule {command.name!r}", field="name")
        if there[0] == "file" and command.origin != "file":
            return Refused(409, f"schedule {command.name} is one of jobs.yaml; take it out there", field="name")
        self._run("DELETE FROM schedules WHERE name = ?", (command.name,))
        return None

    def _on_run_schedule(self, index: int, command: c.RunSchedule) -> int:
        there = self._run("SELECT due_ms FROM schedules WHERE name = ?", (command.name,)).fetchone()
        if there is None or there[0] != command.due_ms:
            return 0  # dropped, changed, or run by the leader before
        made: list[str] = []
        note = command.note
        for job in command.jobs:
            taken = None
            if job.unique_key is not None:
                taken = self._run(self._q["unfinished_by_key"], (job.unique_key,)).fetchone()
            if taken is not None:
                note = f"{taken[0]} is unfinished, and runs may not overlap"
            elif job.array:
                self._insert_array(job)
                made.append(job.id)
            else:
                self._insert(job)
                made.append(job.id)
        self._run(
            self._q["ran_schedule"],
            (
                command.next_ms,
                len(made),
                0 if made else 1,
                command.due_ms,
                made[-1] if made else None,
                note,
                command.name,
            ),
        )
        return len(made)

    def _on_wake(self, index: int, command: c.Wake) -> int:
        due = [cast(int, s) for (s,) in self._run(self._q["due_jobs"], (self.now_ms, command.limit)).fetchall()]
        for seq in due:
            self._wake(seq)
        return len(due)

    def _wake(self, seq: int) -> None:
        job_id, kind, group, shape, attempt, moves = cast(Any, self._run(self._q["wake_job"], (seq,)).fetchone())
        self._moved(
            seq=seq,
            n=moves,
            old="waiting",
            new=S.PENDING,
            kind=kind,
            group=group,
            shape=shape,
            attempt=attempt,
            worker=None,
            reason=None,
        )
        self._tell(E.WORK_QUEUED, job_id, kind, state="pending")

    def _on_clear(self, index: int, command: c.Clear) -> int:
        n, unfinished = 0, self.unfinished_total + self._arrays.to_come
        for (array_seq,) in self._run(self._q["open_arrays"], (command.upto_seq,)).fetchall():
            array = self._arrays.at(cast(int, array_seq))
            if not array.closed:
                self._arrays.close(array, cancel=False, reason="cleared by an operator")
        states = [*NOT_STARTED, *(IN_PROGRESS if command.include_running else ())]
        for state in states:
            found = self._run(self._q["unstarted_slice"], (state.value, command.upto_seq, command.limit - n)).fetchall()
            for (seq,) in found:
                row = self._row_by_seq(cast(int, seq))
                if row.state == state:  # a dependency cancelled a moment ago may have taken it along
                    self._cancel(row, "cleared by an operator")
                    n += 1
            if n >= command.limit:
                break
        return unfinished - self.unfinished_total - self._arrays.to_come  # dependents that went along count too

    def _on_prune(self, index: int, command: c.Prune) -> int:
        for state in command.states:
            assert JobState(state) in FINISHED, f"a clean-up never deletes a {state} job"
        self._flush()
        old: list[tuple[int, int]] = []
        for state in command.states:
            found = self._run(self._q["done_before"], (state, command.before_ms, command.limit)).fetchall()
            old.extend(cast(list[tuple[int, int]], found))
        if command.keep >= 0 and len(old) < command.limit:
            old.extend(self._beyond(command, {seq for seq, _ in old}))
        for seq, _ in sorted(old, key=lambda item: (item[1], item[0]))[: command.limit]:
            row = self._row_by_seq(seq)
            self._counts[(row.state, row.kind, row.group)] -= 1
            self._leave_shape(row.shape)
            for statement in ("jobs", "history", "deps", "members"):
                self._run(f"DELETE FROM {statement} WHERE seq = ?", (seq,))  # noqa: S608 - four literals
            array = self._arrays.of(seq)
            if array is not None:
                array.pruned += 1
                self._arrays.touch(array)
                if array.state and array.pruned == array.made:
                    self._arrays.forget(array)
        for (empty,) in self._run(self._q["empty_arrays"], (command.before_ms, command.limit)).fetchall():
            self._arrays.forget(self._arrays.at(cast(int, empty)))
        self._run("DELETE FROM keys WHERE at_ms < ?", (self.now_ms - KEY_AGE_MS,))
        self._run(self._q["keys_beyond"], (MAX_KEYS,))
        self._run("DELETE FROM minutes WHERE minute < ?", (self.now_ms // 60_000 - 1_500,))
        return min(len(old), command.limit)

    def _beyond(self, command: c.Prune, taken: set[int]) -> list[tuple[int, int]]:
        """The oldest jobs of `states` beyond the number to keep."""
        total = sum(self._count(state) for state in command.states)
        excess = min(total - len(taken) - command.keep, command.limit)
        if excess <= 0:
            return []
        oldest: list[tuple[int, int]] = []
        for state in command.states:
            found = self._run(self._q["done_before"], (state, 1 << 62, excess + len(taken))).fetchall()
            oldest.extend(item for item in cast(list[tuple[int, int]], found) if item[0] not in taken)
        return sorted(oldest, key=lambda item: (item[1], item[0]))[:excess]

    def _on_forget_workers(self, index: int, command: c.ForgetWorkers) -> int:
        self._flush()
        n = 0
        for worker in command.workers:
            held = [*self._run(self._q["held_by"], (worker,)), *self._run(self._q["gangs_of"], (worker,))]
            for (job_id,) in held:
                row = self._row(cast(str, job_id))
                assert row is not None
                if row.state in IN_PROGRESS:
                    self._release(row, command.reason)
            self._run("DELETE FROM workers WHERE worker = ?", (worker,))
            n += self._db.changes()
        return n

    def _on_mark_node(self, index: int, command: c.MarkNode) -> None:
        if command.cordoned or command.draining:
            marks = (int(command.cordoned), int(command.draining), command.deadline_ms)
            self._run(self._q["mark_node"], (command.node, *marks, self.now_ms, command.reason))
        else:
            self._run("DELETE FROM nodes WHERE node = ?", (command.node,))


def _single(cursor: apsw.Cursor) -> Any:
    return cast(Any, cursor.fetchone())[0]


def _canonical(requires: dict[str, Any]) -> str:
    """The identity of a shape, as `Requires.shape` writes it."""
    return json.dumps(requires, sort_keys=True, separators=(",", ":"))


def _times(body: str) -> tuple[Any, Any]:
    """What decides when a schedule is due."""
    schedule = json.loads(body)
    return schedule["cron"], schedule.get("timezone")


def _renamed(job: c.NewJob, instead: dict[str, str]) -> c.NewJob:
    """The job with its dependencies on jobs that were not made turned into those on the jobs that stand for them."""
    if instead.keys().isdisjoint(job.depends_on):
        return job
    deps = tuple(instead.get(dep, dep) for dep in job.depends_on)
    carried = {**json.loads(job.spec), "depends_on": deps}
    return job._replace(depends_on=deps, spec=json.dumps(carried, separators=(",", ":")).encode())


def _verdict(cause: str, worker: str | None) -> str:
    sentences = {
        "lease_lapsed": f"worker {worker} stopped renewing its lease",
        "timeout": f"worker {worker} did not end it after its timeout",
        "never_started": f"worker {worker} claimed it and never started it",
        "no_sign_of_life": "no output, progress, CPU or GPU use",
    }
    return sentences.get(cause, cause)
