"""The leader's desk: takes submissions, places claims, keeps leases, takes results. One event loop owns it.

Decides who waits and what is proposed; the queue's rules are `queue_state`, the choice of jobs is `placement`, the
bookkeeping of silence is `leases`. Everything it knows that is not in the queue is soft: a new leader's dispatcher
starts from `begin_term` with a full lease of grace for every attempt, and knows nothing more after `end_term`. Between
the two it is closed: whatever would propose or place is refused with 503, definitely not done.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar

from coordination import commands as c
from coordination.arrays import parse
from coordination.clock import Clock
from coordination.commands import Command
from coordination.errors import OutcomeUnknown, Refused
from coordination.events import Event, EventBus
from coordination.events import EventType as E
from coordination.kinds import Kinds
from coordination.leases import Claimant, Held, LeaseTable, Signs, Verdict
from coordination.placement import Offer, Placed, Shape, choose, misfits, read_shape, with_defaults
from coordination.queue_reads import QueueReader
from coordination.queue_state import Claimed, QueueState
from coordination.submission import Submission

T = TypeVar("T")

PROPOSE_SECONDS = 10.0
CLEAR_SLICE = 2_000
RETRY_SLICE = 500
VALIDATE_SLICE = 100  # jobs validated between two turns of the event loop
MAX_WORKERS = 10_000
ARRIVAL_SHARE = 1 / 6  # of a lease: how long a claimed job may be on its way before a worker without it has lost it
LAPSES = frozenset({"lease_lapsed", "timeout", "never_started", "no_sign_of_life"})


class Journal(Protocol):
    """What the dispatcher needs of `p2p.driver`: both answer on another thread, through a future."""

    def propose(self, body: bytes) -> Future[Any]: ...
    def query(self, question: Callable[[], T]) -> Future[T]: ...


class Reading(Protocol):
    """Runs a question on the read-only connection."""

    def __call__(self, question: Callable[[QueueReader], T]) -> Future[T]: ...


class Room(NamedTuple):
    """A worker's newest word on what it can take. `total` is what it would have with nothing running."""

    free: Offer
    total: Offer
    max_jobs: int


class Beat(NamedTuple):
    """One line of a heartbeat: the attempt is alive; `started_ms` once its process runs."""

    signs: Signs
    started_ms: int | None


@lru_cache(maxsize=32_768)
def _shape(requires: str) -> Shape:
    return read_shape(requires)


class Dispatcher:
    """See the module's docstring. All methods belong to the event loop's thread, but for `on_events`."""

    def __init__(
        self,
        *,
        journal: Journal,
        state: QueueState,
        read: Reading,
        kinds: Kinds,
        clock: Clock,
        bus: EventBus,
        lease_ms: int = 30_000,
        max_unfinished: int = 2_000_000,
        translate: Callable[[Exception], Exception] = lambda error: error,
    ) -> None:
        self._journal, self._state, self._read = journal, state, read
        self.kinds, self._clock, self._bus = kinds, clock, bus
        self.leases = LeaseTable(lease_ms=lease_ms)
        self.rooms: dict[str, Room] = {}
        self.disk_low = False  # kept by the health loop; submits get 507 while it is set
        self._max_unfinished = max_unfinished
        self._translate = translate  # the journal's errors in the words of `coordination.errors`
        self.leads = False
        self._unsubscribe: Callable[[], None] = lambda: None
        self._reserved: set[int] = set()
        self._deciding = asyncio.Lock()
        self._parked: dict[asyncio.Future[None], str] = {}  # -> the worker whose claim it is
        self._wakes = 0  # how often all were woken: a claim that was looking meanwhile looks again before it parks
        self._loop: asyncio.AbstractEventLoop | None = None
        self.on_waiting: Callable[[], None] = lambda: None  # a job waits for its time from now on: see `wake_due`
        self._steady_offset = clock.now_ms() - clock.mono_ms()
        self._began_at = clock.mono_ms()

    async def begin_term(self) -> None:
        """Opens: takes up the attempts in progress, each with a full lease from now, and listens to the queue."""
        self.end_term()
        self._loop = asyncio.get_running_loop()
        self._steady_offset = self._clock.now_ms() - self._clock.mono_ms()
        self._unsubscribe = self._bus.subscribe(self.on_events)
        rows = await self.ask(lambda reader: reader.held())
        now = self._began_at = self._clock.mono_ms()
        grace_until_ms = self._clock.now_ms() + self.leases.lease_ms
        for row in rows:
            if row.job in self.leases.by_job:
                continue  # an event of this moment has told more
            held = Held(
                job=row.job,
                attempt=row.attempt,
                worker=row.worker,
                kind=row.kind,
                timeout_ms=row.timeout_ms,
                claimed_ms=row.claimed_ms,
                started_ms=row.started_ms,
                renewed_at=now,
                alive_at=now,
                grace_ms=_grace_ms(json.loads(row.spec)),
                grace_until_ms=grace_until_ms,
            )
            self.leases.grant(held)
        self.leads = True
        self.on_waiting()

    def end_term(self) -> None:
        """Closes: this node does not lead (any more). What it knew beside the queue is another's business now."""
        self.leads = False
        self._unsubscribe()
        self._unsubscribe = lambda: None
        self.leases = LeaseTable(lease_ms=self.leases.lease_ms)
        self.rooms.clear()
        self._reserved.clear()
        self.wake_parked()

    def check_leads(self) -> None:
        """Raises Refused (503) unless this node leads and has taken up its term."""
        if not self.leads:
            raise Refused(503, "this node does not lead; nothing was done")

    # -- the journal -------------------------------------------------------------------------------------------

    async def propose(self, command: Command) -> Any:
        """The state machine's answer; a Refused answer is raised. Raises OutcomeUnknown if none came in time."""
        self.check_leads()
        future = self._journal.propose(c.encode(command))
        try:
            # Not wait_for: in Python 3.11 it loses a cancellation that comes together with the answer.
            async with asyncio.timeout(PROPOSE_SECONDS):
                result = await asyncio.wrap_future(future)
        except TimeoutError:
            if future.cancelled():
                raise Refused(503, "the journal is too slow; nothing was done") from None
            raise OutcomeUnknown("no answer from the journal in time; ask again by the idempotency key") from None
        except Exception as error:
            raise self._translate(error) from error
        if isinstance(result, Refused):
            raise result
        return result

    async def ask(self, question: Callable[[QueueReader], T]) -> T:
        """Reads the queue off the event loop."""
        return await asyncio.wrap_future(self._read(question))

    def now_ms(self) -> int:
        return self._clock.now_ms()

    def mono_ms(self) -> int:
        return self._clock.mono_ms()

    def steady_ms(self) -> int:
        """Unix milliseconds as they were when the term began, carried on by the monotonic clock. How long an attempt
        has run is told by this: a machine that boots three hours slow and is then corrected must not end every job
        that has a timeout."""
        return self._clock.mono_ms() + self._steady_offset

    # -- submissions -------------------------------------------------------------------------------------------

    async def submit(self, bodies: AsyncIterable[Any] | Iterable[Any], *, batch: bool, key: str, digest: str) -> Any:
        """Validates and queues jobs, all or none: ``{"ids", "created"}``. Raises InvalidInput or Refused."""
        self.check_leads()
        if self.disk_low:
            raise Refused(507, "the disk is nearly full; submits wait, running work goes on")
        submission = Submission(self.kinds, self._clock.now_ms(), batch=batch)
        n = 0
        if isinstance(bodies, AsyncIterable):
            async for body in bodies:
                submission.add(body)
                n += 1
        else:
            for body in bodies:
                submission.add(body)
                n += 1
                if n % VALIDATE_SLICE == 0:
                    await asyncio.sleep(0)
        jobs = submission.finish()
        held = self._state.unfinished_total + self._state.array_backlog
        if held + sum(parse(job.array).size if job.array else 1 for job in jobs) > self._max_unfinished:
            raise Refused(429, f"the queue holds {held} unfinished jobs; try again later")
        if not jobs:
            return {"ids": [], "created": []}
        return await self.propose(c.Submit(self._clock.now_ms(), jobs, key, digest))

    # -- claims ------------------------------------------------------------------------------------------------

    def make_room(self, room: Room) -> None:
        """A worker's room has changed; its parked claim looks again. Raises Refused (429) for one worker too many."""
        self.check_leads()
        worker = room.free.node
        if worker not in self.rooms and len(self.rooms) >= MAX_WORKERS:
            raise Refused(429, f"{MAX_WORKERS} workers are known already; clear the inactive ones")
        self.rooms[worker] = room
        self.wake_parked(worker)

    async def claim(
        self, worker: str, *, wait_seconds: float, gone: Callable[[], bool] = lambda: False
    ) -> tuple[list[dict[str, Any]], list[Claimant]]:
        """Jobs for the room a worker has made known, and the attempts it must kill; waits up to `wait_seconds` until
        there is either. One claim a worker at a time: the next one states its room with these jobs in it.

        `gone` tells whether the asker has hung up: what was claimed for it meanwhile goes back at once.
        """
        deadline = self._clock.mono_ms() + int(wait_seconds * 1000)
        while True:
            self.check_leads()
            if gone():
                return [], []  # before anything is placed: an attempt that nobody was told of is a line in its history
            self._heard(worker)
            notices = self.leases.take_notices(worker)
            room, wakes = self.rooms.get(worker), self._wakes
            jobs: list[dict[str, Any]] = []
            if room is not None and room.max_jobs > 0 and self._state.pending_total > 0:
                jobs = await self._place(room.free, room.max_jobs)
            if jobs and gone():
                await self.release_those_held([job["id"] for job in jobs], "its worker hung up before it was told")
                return [], notices
            left = deadline - self._clock.mono_ms()
            if jobs or notices or left <= 0 or gone():
                return jobs, notices
            if self._wakes == wakes and self.rooms.get(worker) is room:
                await self._park(worker, left / 1000)

    async def _place(self, offer: Offer, max_jobs: int) -> list[dict[str, Any]]:
        """Chooses, reserves, and journals the choice; the reservation keeps a second claim off the same jobs."""
        async with self._deciding:
            reserved = frozenset(self._reserved)
            picks = await asyncio.wrap_future(self._journal.query(lambda: self._choose(offer, max_jobs, reserved)))
            self._reserved.update(pick.seq for pick in picks)
        if not picks:
            return []
        try:
            commanded = tuple(c.Pick(pick.seq, json.dumps(pick.gpus) if pick.gpus else None) for pick in picks)
            claimed: list[Claimed] = await self.propose(c.Claim(self._clock.now_ms(), offer.node, commanded))
        except Exception:
            self.wake_parked()  # what was reserved is anybody's again
            raise
        finally:
            self._reserved.difference_update(pick.seq for pick in picks)
        told = [_for_worker(job) for job in claimed]
        for job in told:
            held = self.leases.by_job.get(job["id"])
            if held is not None and held.attempt == job["attempt"]:
                held.grace_ms = _grace_ms(job)
        return told

    def _choose(self, offer: Offer, max_jobs: int, reserved: frozenset[int]) -> list[Placed]:
        """Runs on the apply thread, between batches."""
        state = self._state
        shapes = [(number, _shape(requires)) for number, _, requires in state.ready_shapes()]

        def heads(shape: int) -> Any:
            found = state.heads(shape, max_jobs + len(reserved))
            return iter([head for head in found if head.seq not in reserved])

        return choose(shapes, heads, offer, max_jobs)

    async def _park(self, worker: str, seconds: float) -> None:
        assert self._loop is not None
        parked: asyncio.Future[None] = self._loop.create_future()
        self._parked[parked] = worker
        try:
            async with asyncio.timeout(seconds):
                await parked
        except TimeoutError:
            pass  # the claim answers empty and is made again
        finally:
            del self._parked[parked]

    def wake_parked(self, worker: str | None = None) -> None:
        """Something is pending, or someone must be told something: every parked claim looks again, or one worker's."""
        self._wakes += worker is None
        for parked, whose in self._parked.items():
            if (worker is None or whose == worker) and not parked.done():
                parked.set_result(None)

    def _heard(self, worker: str) -> None:
        """Any word from a worker. Raises Refused (429) for one worker too many: names are the caller's to make up."""
        if worker not in self.leases.seen_at and len(self.leases.seen_at) >= MAX_WORKERS:
            raise Refused(429, f"{MAX_WORKERS} workers are known already; clear the inactive ones", field="worker")
        self.leases.heard(worker, self._clock.mono_ms(), self._clock.now_ms())

    # -- heartbeats and results --------------------------------------------------------------------------------

    async def heartbeat(
        self, worker: str, beats: list[Beat], *, first: bool, whole: bool = False
    ) -> tuple[list[str], list[str]]:
        """Renews leases and records starts; answers (stale ids, cancelled ids), which the worker kills.

        `first` marks a worker's first word after a start: the list is then all it has, and what the books say it
        holds beyond that was claimed by its former self and never reached a process: it goes back, unspent.

        `whole` says that the list is all that the worker has, whenever it is: what it was given a while ago, never
        started and does not list is a claim whose answer was lost, say because the leader changed. It goes back unspent
        too, rather than wait for its lease to run out. Should the answer arrive after all, its attempt is stale.
        """
        self.check_leads()
        now = self._clock.mono_ms()
        self._heard(worker)
        stale, cancel = self.leases.renew(worker, [beat.signs for beat in beats], now)
        began = tuple(
            c.Began(beat.signs.job, beat.signs.attempt, beat.started_ms)
            for beat in beats
            if beat.started_ms is not None and self._is_new_start(worker, beat)
        )
        if began:
            await self.propose(c.Begin(self._clock.now_ms(), worker, began))
        if first:
            # Whatever its former self had asked for is in the books once this, behind it in the journal, is answered.
            await self.propose(c.Begin(self._clock.now_ms(), worker, ()))
            listed = {Claimant(beat.signs.job, beat.signs.attempt) for beat in beats}
            held = self.leases.by_worker.get(worker, {})
            lost = [job for job, mine in held.items() if Claimant(job, mine.attempt) not in listed]
            if lost:
                await self.release_those_held(lost, "its worker restarted without it")
        elif whole:
            lost = self.leases.never_arrived(
                worker, [beat.signs.job for beat in beats], now, round(self.leases.lease_ms * ARRIVAL_SHARE)
            )
            if lost:
                await self.release_those_held(lost, "its worker was never told of it")
        return stale, cancel

    def _is_new_start(self, worker: str, beat: Beat) -> bool:
        held = self.leases.by_job.get(beat.signs.job)
        return (
            held is not None
            and held.worker == worker
            and held.attempt == beat.signs.attempt
            and held.started_ms is None
        )

    async def describe(self, keys: list[tuple[str, int]]) -> dict[tuple[str, int], dict[str, Any]]:
        """For a worker that has restarted: its attempts as it was told of them when it claimed them. Those that are
        no longer the newest of their job are left out."""
        self.check_leads()

        def read(reader: QueueReader) -> list[dict[str, Any] | None]:
            return [reader.job(job, history=False) for job, _ in keys]

        found = {}
        for key, record in zip(keys, await self.ask(read), strict=True):
            if record is not None and record["attempt"] == key[1]:
                found[key] = {name: record[name] for name in _TOLD} | {"id": key[0], "attempt": key[1]}
        return found

    async def finish(self, items: tuple[c.AttemptDone, ...]) -> list[Refused | None]:
        """Records the ends of attempts; for each, None or why it was refused (a stale attempt: 409)."""
        answers: list[Refused | None] = await self.propose(c.Finish(self._clock.now_ms(), items))
        return answers

    # -- operators ---------------------------------------------------------------------------------------------

    async def release(self, ids: list[str], reason: str, *, key: str) -> list[str]:
        released: list[str] = await self.propose(c.Release(self._clock.now_ms(), tuple(ids), reason, key))
        return released

    async def release_those_held(self, ids: list[str], reason: str) -> list[str]:
        """Releases those of the jobs that are in progress; the others have moved on and are passed over."""
        # A single id is an order, and refused if it cannot be carried out; two are a list, and looked through.
        return await self.release([*ids, ids[0]], reason, key="")

    async def cancel(self, ids: list[str], reason: str, *, key: str) -> list[str]:
        cancelled: list[str] = await self.propose(c.Cancel(self._clock.now_ms(), tuple(ids), reason, key))
        if self._state.arrays_want:
            await self.wake_due()  # an array's members go in slices; its maintenance would come to them a little later
        return cancelled

    async def retry(self, job_id: str, *, key: str) -> None:
        await self.propose(c.Retry(self._clock.now_ms(), job_id, key))

    async def retry_failed(
        self, *, kind: str | None, group: str | None, array: str | None, max_age_ms: int, limit: int
    ) -> int:
        """Retries failed jobs by the thousand, the newest first: those that failed before now and within `max_age_ms`.
        Answers how many; what cannot be retried (a broken dependency, a unique key that is held) is passed over."""
        now = self._clock.now_ms()
        since, total = max(now - max_age_ms, 0), 0
        until: tuple[int, int] | None = (now, 1 << 62)
        while until is not None and total < limit:
            here = until

            def read(reader: QueueReader, here: tuple[int, int] = here) -> Any:
                return reader.failed(kind=kind, group=group, array=array, since_ms=since, until=here, limit=RETRY_SLICE)

            ids, until = await self.ask(read)
            if ids:
                command = c.RetryMany(self._clock.now_ms(), tuple(ids[: limit - total]))
                total += len(await self.propose(command))
        return total

    async def clear(self, *, include_running: bool) -> int:
        """Cancels what has not started (and, if asked, what has); jobs submitted meanwhile are spared."""
        upto = await self.ask(lambda reader: reader.last_seq())
        total = 0
        while True:
            n: int = await self.propose(c.Clear(self._clock.now_ms(), upto, include_running, CLEAR_SLICE))
            total += n
            if n == 0:
                return total

    async def purge(self, states: tuple[str, ...], *, older_than_ms: int, keep: int = -1) -> int:
        """Forgets finished jobs of these states that ended longer ago, and the oldest beyond `keep` (-1: no limit)."""
        before = self._clock.now_ms() - older_than_ms
        total = 0
        while True:
            n: int = await self.propose(c.Prune(self._clock.now_ms(), states, before, keep, CLEAR_SLICE))
            total += n
            if n < CLEAR_SLICE:
                return total

    async def clear_inactive_workers(self, threshold_ms: int) -> int:
        """Drops workers not heard of for `threshold_ms`; what they hold goes back to pending, unspent."""
        now, now_ms = self._clock.mono_ms(), self._clock.now_ms()
        books = await self.ask(lambda reader: reader.workers())
        known = {book.worker for book in books} | set(self.leases.seen_at)
        # A worker that this term has not heard of yet gets the benefit of the doubt from the term's beginning: just
        # after a restart everybody is unheard of, and taking their jobs away would run each of them twice.
        inactive = sorted(w for w in known if now - self.leases.seen_at.get(w, self._began_at) >= threshold_ms)
        if not inactive:
            return 0
        await self.propose(c.ForgetWorkers(now_ms, tuple(inactive), f"worker silent for {threshold_ms // 1000} s"))
        for worker in inactive:
            self.leases.forget(worker)
            self.rooms.pop(worker, None)
        return len(inactive)

    async def expire(self, verdicts: list[Verdict]) -> int:
        """Gives attempts up: each is spent, and its job goes back or fails."""
        if not verdicts:
            return 0
        items = tuple(c.Lapse(v.held.job, v.held.attempt, v.cause) for v in verdicts)
        n: int = await self.propose(c.Expire(self._clock.now_ms(), items))
        for verdict in verdicts:
            # Whatever the queue answered, this attempt is over. One that had ended before makes no event, and would
            # otherwise be given up again and again.
            if self.leases.by_job.get(verdict.held.job) is verdict.held:
                self.leases.drop(verdict.held.job, tell=True)
        return n

    @property
    def array_backlog(self) -> int:
        """Members of arrays that are still to be made, by this node's copy."""
        return self._state.array_backlog

    @property
    def anything_waits(self) -> bool:
        """Whether `wake_due` may find something, now or later."""
        return self.leads and (self._state.waiting_total > 0 or self._state.arrays_want)

    async def wake_due(self, limit: int = 1_000) -> int:
        """waiting -> pending for what is due; members of arrays, where entries have left some to be made."""
        while self._state.arrays_want:
            await self.propose(c.Wake(self._clock.now_ms(), limit))
        if not self._state.waiting_total:
            return 0
        due = await self.ask(lambda reader: reader.next_due_ms())
        if due is None or due > self._clock.now_ms():
            return 0
        n: int = await self.propose(c.Wake(self._clock.now_ms(), limit))
        return n

    def stuck(self, threshold_ms: int) -> list[Verdict]:
        """See `LeaseTable.stuck`."""
        return self.leases.stuck(self._clock.mono_ms(), self.steady_ms(), threshold_ms)

    def why_pending(self, requires: Mapping[str, Any]) -> str:
        """In words, why a pending job of these requirements has not been placed."""
        shape = with_defaults(requires)
        offers = [room for worker, room in self.rooms.items() if self._is_there(worker)]
        if not offers and self.rooms:
            return f"all {len(self.rooms)} known workers have been silent for longer than a lease: restart them"
        if not offers:
            return "no worker has asked for work yet"
        never = [misfits(shape, seen.total) for seen in offers]
        if all(never):
            nodes = "1 node" if len(offers) == 1 else f"{len(offers)} nodes"
            return f"fits on none of {nodes}, even when idle: {_tally(never)}"
        now = [misfits(shape, seen.free) for seen in offers]
        if all(now):
            busy = "the only node is" if len(offers) == 1 else f"all {len(offers)} nodes are"
            return f"waits for room; {busy} busy: {_tally(now)}"
        return "fits now; jobs of higher priority or older ones go first"

    def _is_there(self, worker: str) -> bool:
        """Whether it waits for work now, or was heard of within a lease."""
        last = self.leases.seen_at.get(worker)
        silent = last is None or self._clock.mono_ms() - last > self.leases.lease_ms
        return not silent or worker in self._parked.values()

    # -- what the queue says -----------------------------------------------------------------------------------

    def on_events(self, batch: list[tuple[int, Event]]) -> None:
        """Called on the apply thread, before the commands that caused the events are answered."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._note, batch)

    def _note(self, batch: list[tuple[int, Event]]) -> None:
        wake = False
        for _, event in batch:
            fields = event.fields
            match event.type:
                case E.WORK_CLAIMED:
                    self._grant(event)
                case E.WORK_STARTED:
                    self.leases.started(fields["job"], fields["attempt"], self.steady_ms(), self._clock.mono_ms())
                case E.WORK_COMPLETED:
                    self.leases.drop(fields["job"])
                case E.WORK_FAILED | E.WORK_RETRIED:
                    told = fields["cause"] in LAPSES
                    self.leases.drop(fields["job"], tell=told)
                    if fields.get("backoff_seconds"):
                        self.on_waiting()
                        wake = wake or told
                    else:
                        wake = True
                case E.WORK_CANCELLED | E.WORK_RELEASED:
                    self.leases.drop(fields["job"], tell=True)
                    wake = True
                case E.WORK_QUEUED:
                    wake = True
                    if fields["state"] == "waiting":
                        self.on_waiting()
        if wake:
            self.wake_parked()

    def _grant(self, event: Event) -> None:
        now, fields = self._clock.mono_ms(), event.fields
        self.leases.grant(
            Held(
                job=fields["job"],
                attempt=fields["attempt"],
                worker=fields["worker"],
                kind=fields["kind"],
                timeout_ms=fields["timeout_ms"],
                claimed_ms=self.steady_ms(),
                started_ms=None,
                renewed_at=now,
                alive_at=now,
            )
        )


def _grace_ms(job: Mapping[str, Any]) -> int:
    """How long a job may take to end once it is asked to."""
    return round(float(job.get("grace_seconds", 30.0)) * 1000)


_TOLD = (
    "token", "kind", "command", "params", "env", "cwd", "requires", "gpus", "timeout_seconds", "grace_seconds", "fence",
    "checkpoint", "array",
)  # fmt: skip


def _for_worker(job: Claimed) -> dict[str, Any]:
    """A claimed job as it travels to its worker."""
    carried = json.loads(job.spec)
    return {
        "id": job.id,
        "attempt": job.attempt,
        "token": job.token,
        "kind": job.kind,
        "command": carried["command"],
        "params": carried.get("params", {}),
        "env": carried.get("env", {}),
        "cwd": carried.get("cwd"),
        "requires": json.loads(job.requires),
        "gpus": json.loads(job.gpus) if job.gpus else [],
        "timeout_seconds": job.timeout_ms / 1000 if job.timeout_ms else None,
        "grace_seconds": carried.get("grace_seconds", 30.0),
        "fence": carried.get("fence", "attempt"),
        "checkpoint": json.loads(job.checkpoint) if job.checkpoint is not None else None,
        "array": carried.get("array"),
    }


def _tally(reasons: list[list[str]]) -> str:
    """The reasons of all nodes in one sentence: for one node as they are, for many how often each begins so."""
    if len(reasons) == 1:
        return "; ".join(reasons[0])
    heads: dict[str, int] = {}
    for why in reasons:
        for sentence in why:
            head = sentence.partition(";")[0]
            heads[head] = heads.get(head, 0) + 1
    return "; ".join(f"{head} (fails on {n} of {len(reasons)} nodes)" for head, n in heads.items())


__all__ = ["Beat", "Dispatcher", "Journal", "Reading", "Room"]
