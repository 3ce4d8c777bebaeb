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
from typing import Any, NamedTuple, Protocol, TypeVar

from coordination import commands as c
from coordination.arrays import parse
from coordination.clock import Clock
from coordination.commands import Command
from coordination.errors import OutcomeUnknown, Refused
from coordination.events import Event, EventBus
from coordination.events import EventType as E
from coordination.fleet import Fleet
from coordination.kinds import Kinds
from coordination.leases import Claimant, Held, LeaseTable, Notice, Signs, Verdict
from coordination.matching import Matching, Room
from coordination.placement import need_of, without_hints
from coordination.planner import NEVER, Planner, PlanPolicy
from coordination.queue_reads import NodeMark, QueueReader
from coordination.queue_state import ChangedLanes, QueueState
from coordination.reasons import tally
from coordination.scoring import RoomScoring
from coordination.shares import Shares
from coordination.submission import Submission
from coordination.trouble import JOBS, Trouble

T = TypeVar("T")

PROPOSE_SECONDS = 10.0
CLEAR_SLICE = 2_000
RETRY_SLICE = 500
VALIDATE_SLICE = 100  # jobs validated between two turns of the event loop
MAX_WORKERS = 10_000
ARRIVAL_SHARE = 1 / 6  # of a lease: how long a claimed job may be on its way before a worker without it has lost it
LEAVING = "its machine is being taken away"  # a drain that ends when the node comes back
CORDONED_BEFORE = f"{LEAVING}; cordoned before that: "
BY_ITSELF = "by itself: "  # what the reason of a cordon begins with that nobody has ordered
UNMOVED_SLACK_MS = 60_000  # beyond its grace, for who was asked to make way
NODES_FAULT = frozenset({"exit", "spawn_failed"})  # ends that may be the node's fault
LAPSES = frozenset({"lease_lapsed", "timeout", "never_started", "no_sign_of_life"})


class Journal(Protocol):
    """What the dispatcher needs of `p2p.driver`: both answer on another thread, through a future."""

    def propose(self, body: bytes) -> Future[Any]: ...
    def query(self, question: Callable[[], T]) -> Future[T]: ...


class Reading(Protocol):
    """Runs a question on the read-only connection."""

    def __call__(self, question: Callable[[QueueReader], T]) -> Future[T]: ...


class Beat(NamedTuple):
    """One line of a heartbeat: the attempt is alive; `started_ms` once its process runs."""

    signs: Signs
    started_ms: int | None


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
        policy: PlanPolicy | None = None,
        group_weights: Mapping[str, float] | None = None,
    ) -> None:
        self._journal, self._state, self._read = journal, state, read
        self.kinds, self._clock, self._bus = kinds, clock, bus
        self.leases = LeaseTable(lease_ms=lease_ms)
        self.disk_low = False  # kept by the health loop; submits get 507 while it is set
        self._max_unfinished = max_unfinished
        self._translate = translate  # the journal's errors in the words of `coordination.errors`
        self.leads = False
        self._unsubscribe: Callable[[], None] = lambda: None
        self.address_of: Callable[[str], str] = lambda node: node  # where a node's processes can be reached
        self.on_waiting: Callable[[], None] = lambda: None  # a job waits for its time from now on: see `wake_due`
        self._steady_offset = clock.now_ms() - clock.mono_ms()
        self._began_at = clock.mono_ms()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._policy, self._group_weights = policy, dict(group_weights or {})
        self.marks: dict[str, NodeMark] = {}  # what is said of nodes
        self._marking = asyncio.Lock()  # each word on a node is made of the one before it
        self.matching = self._new_matching()
        self._trouble, self._black_holes = Trouble(), set[str]()
        self._cordoned: dict[str, str] = {}  # nodes that were cordoned by themselves, as far as it has been told
        # A node was cordoned by itself, or a new leader finds one that is; "": that is over, or not this node's to say.
        self.on_trouble: Callable[[str, str], None] = lambda node, why: None

    def _new_matching(self) -> Matching:
        """Nothing known yet: of nodes, of what runs, of who has had how much."""
        self._scoring = RoomScoring()
        floors = {name: kind.floor for name, kind in self.kinds.by_name.items() if kind.floor is not None}
        return Matching(
            Planner(Fleet(self._scoring), Shares(self._group_weights, floors), self._policy),
            self.leases,
            lanes=self._changed_lanes,
            propose=self.propose,
            give_back=lambda jobs: self.release_those_held(jobs, "its worker hung up before it was told"),
            mono_ms=self._clock.mono_ms,
            now_ms=self._clock.now_ms,
            arrived=self._scoring.arrived,
        )

    async def _changed_lanes(self, limit: int, since: int) -> ChangedLanes:
        """Runs on the apply thread, between batches."""
        return await asyncio.wrap_future(self._journal.query(lambda: self._state.changed_lanes(limit, since)))

    @property
    def rooms(self) -> dict[str, Room]:
        return self.matching.rooms

    async def begin_term(self) -> None:
        """Opens: takes up the attempts in progress, each with a full lease from now, and listens to the queue."""
        self.end_term()
        self._loop = asyncio.get_running_loop()
        self._steady_offset = self._clock.now_ms() - self._clock.mono_ms()
        self._unsubscribe = self._bus.subscribe(self.on_events)
        rows, marks = await self.ask(lambda reader: (reader.held(), reader.nodes()))
        now = self._began_at = self._clock.mono_ms()
        grace_until_ms = self._clock.now_ms() + self.leases.lease_ms
        for row in rows:
            known = self.leases.by_job.get(row.job)
            if known is not None and not (row.gang and known.gang and known.attempt == row.attempt):
                continue  # an event of this moment has told more
            grace_ms = _grace_ms(json.loads(row.spec))
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
                gang=bool(row.gang),
                grace_ms=grace_ms,
                grace_until_ms=grace_until_ms,
            )
            self.leases.grant(held)
            self.matching.take_up(row, self.steady_ms(), grace_ms)
        self._take_marks(marks)
        self.leads = True
        self.on_waiting()

    def end_term(self) -> None:
        """Closes: this node does not lead (any more). What it knew beside the queue is another's business now."""
        self.leads = False
        self._unsubscribe()
        self._unsubscribe = lambda: None
        self.matching.close()
        self.leases = LeaseTable(lease_ms=self.leases.lease_ms)
        self.matching = self._new_matching()
        self._trouble, self._black_holes = Trouble(), set()  # what went well meanwhile, another has seen
        self._tell_trouble({})

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
        self._heard(worker)
        self.matching.make_room(room)

    async def claim(
        self, worker: str, *, wait_seconds: float, gone: Callable[[], bool] = lambda: False
    ) -> tuple[list[dict[str, Any]], list[Notice]]:
        """Jobs for the room a worker has made known, and the attempts it must end; waits up to `wait_seconds` until
        there is either. One claim a worker at a time: the next one states its room with these jobs in it.

        `gone` tells whether the asker has hung up: what was claimed for it meanwhile goes back at once.
        """
        until = self._clock.mono_ms() + int(wait_seconds * 1000)
        mark = self.matching.barred.get(worker)
        while True:
            self.check_leads()
            if gone():
                return [], []  # before anything is placed: an attempt that nobody was told of is a line in its history
            self._heard(worker)
            notices = self.leases.take_notices(worker, now := self._clock.mono_ms())
            # What must be told cannot wait for work; what work there is goes along.
            jobs = await self.matching.wait(worker, now if notices else until, gone)
            if jobs and gone():
                await self.release_those_held([job["id"] for job in jobs], "its worker hung up before it was told")
                return [], notices
            if not jobs:
                self.check_leads()  # what is said of its node, and what it must end, is the next leader's to tell
            for job in jobs:
                self._complete_gang(job)
            now = self._clock.mono_ms()
            notices += self.leases.take_notices(worker, now)
            marked = self.matching.barred.get(worker) != mark  # it is told so with the answer
            if jobs or notices or marked or now >= until or gone():
                return jobs, notices

    def _complete_gang(self, job: dict[str, Any]) -> None:
        """Where the members of a gang meet: at the address of rank 0, as far as anybody knows it."""
        gang = job.get("gang")
        if gang is not None:
            gang["master_addr"] = self.address_of(gang["members"][0])

    def wake_parked(self) -> None:
        """Every parked claim is answered, so that its asker comes again."""
        self.matching.nudge_all()

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
            for item in began:  # of a gang only the first start is an event
                member = self.leases.of(worker, item.id)
                if member is not None and member.gang and member.attempt == item.attempt:
                    member.started_ms = self.steady_ms()
        if first:
            await self._is_back(worker)
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
        held = self.leases.of(worker, beat.signs.job)
        return held is not None and held.attempt == beat.signs.attempt and held.started_ms is None

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
                found[key]["members"] = record.get("members", [])
        return found

    async def finish(self, items: tuple[c.AttemptDone, ...]) -> list[Refused | None]:
        """Records the ends of attempts; for each, None or why it was refused (a stale attempt: 409)."""
        answers: list[Refused | None] = await self.propose(c.Finish(self._clock.now_ms(), items))
        for item, answer in zip(items, answers, strict=True):
            if item.ok and answer is None:
                self.leases.drop_member(item.id, item.attempt, item.worker)  # of a gang: the others go on
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
        known = {book.worker for book in books} | set(self.leases.seen_at) | set(self.rooms)
        # A worker that this term has not heard of yet gets the benefit of the doubt from the term's beginning: just
        # after a restart everybody is unheard of, and taking their jobs away would run each of them twice.
        inactive = sorted(w for w in known if now - self.leases.seen_at.get(w, self._began_at) >= threshold_ms)
        if not inactive:
            return 0
        await self.propose(c.ForgetWorkers(now_ms, tuple(inactive), f"worker silent for {threshold_ms // 1000} s"))
        for worker in inactive:
            self.leases.forget(worker)
            self.matching.forget(worker)
        return len(inactive)

    async def forget_machines(self, threshold_ms: int) -> None:
        """Drops the notices of machines that have not come back for `threshold_ms`: spot instances come with a new name
        each time."""
        now, now_ms = self._clock.mono_ms(), self._clock.now_ms()
        for mark in [mark for mark in self.marks.values() if _is_leaving(mark)]:
            silent = now - self.leases.seen_at.get(mark.node, self._began_at)
            if min(silent, now_ms - mark.since_ms) >= threshold_ms:
                await self._is_back(mark.node)

    async def expire(self, verdicts: list[Verdict]) -> int:
        """Gives attempts up: each is spent, and its job goes back or fails."""
        if not verdicts:
            return 0
        items = tuple(c.Lapse(v.held.job, v.held.attempt, v.cause, v.held.worker) for v in verdicts)
        n: int = await self.propose(c.Expire(self._clock.now_ms(), items))
        for verdict in verdicts:
            # Whatever the queue answered, this attempt is over. One that had ended before makes no event, and would
            # otherwise be given up again and again.
            known = self.leases.by_job.get(verdict.held.job)
            if known is not None and known.attempt == verdict.held.attempt:
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

    def why_pending(
        self, record: Mapping[str, Any], ahead: int | None = None, looked: dict[str, list[Any]] | None = None
    ) -> str:
        """In words and numbers, why a pending job has not been placed. `ahead`: pending jobs that came before it.
        `looked` remembers, from one job of a page to the next, what a look at all nodes has told."""
        if not self.leads:
            return "placement is the leader's business; nobody is known to lead now"
        there = [node for name, node in self.matching.planner.fleet.nodes.items() if self._is_there(name)]
        barred = [mark for name, mark in self.marks.items() if name in self.rooms]
        aside = (
            f"; {_some('node', len(barred))} {'is' if len(barred) == 1 else 'are'} cordoned or draining"
            if barred
            else ""
        )
        if not there:
            if aside:
                return f"every node that asks for work is cordoned or draining: {', '.join(m.node for m in barred[:5])}"
            if self.rooms and not any(map(self._is_there, self.rooms)):
                return f"all {len(self.rooms)} known workers have been silent for longer than a lease: restart them"
            return "no worker has asked for work yet"
        hints = record.get("placement_hints", {})
        text = json.dumps({**record["requires"], **hints, "nodes": record.get("nodes", 1)}, sort_keys=True)
        need = need_of(text)  # not a new one each time: nodes remember of each need whether they could serve it
        need = self.matching.planner.fleet.could(need) or without_hints(need)[-1]
        looked = {} if looked is None else looked
        if text not in looked:
            looked[text] = [tally(need, there, idle=idle) for idle in (True, False)]
        words, failed, total = looked[text][0]
        if total - failed < need.nodes:
            many = f"needs {need.nodes} nodes at once; " if need.nodes > 1 else ""
            fits = "none" if failed == total else f"{total - failed}"
            return f"{many}fits on {fits} of {_some('node', total)}, even when idle: {words}{aside}"
        words, failed, total = looked[text][1]
        told = [self._whose_turn(record, ahead)]
        if total - failed < need.nodes:
            many = f"needs {need.nodes} nodes at once, {total - failed} fit now; " if need.nodes > 1 else ""
            told.insert(0, f"waits for room: {many}{words}{aside}")
        else:
            told.insert(0, "fits now; what goes first is placed first")
        told.append(self._what_is_kept(record))
        return "; ".join(filter(None, told))

    def _whose_turn(self, record: Mapping[str, Any], ahead: int | None) -> str:
        """Its place in line, and what its group has had."""
        line = ""
        if ahead is not None:
            line = (
                f"{_some('pending job', ahead)} of its priority or higher came before it" if ahead else "first in line"
            )
        groups = self.matching.planner.shares.groups(self._clock.mono_ms())
        if len(groups) < 2 and record["group"] in groups:
            return line
        share = f"group {record['group']} has {groups.get(record['group'], 0.0):.0%} of what is used"
        return "; ".join(filter(None, [line, share])) if groups else line

    def _what_is_kept(self, record: Mapping[str, Any]) -> str:
        """The room that is kept for it."""
        planner = self.matching.planner
        kept = next((r for r in planner.reservations.values() if r.seq == record.get("number")), None)
        if kept is None:
            return ""
        names = ", ".join(kept.nodes[:8])
        left = sum(attempt.node in kept.nodes for attempt in kept.awaited)
        if not left:
            return f"room is kept for it on {names} until work is asked for there"
        when = ""
        if kept.preempts:
            when = "; it has been asked to make way"
        elif kept.until_ms < NEVER:
            when = f", in {max(kept.until_ms - self._clock.mono_ms(), 0) / 1000:.0f} s at the latest"
        return f"room is kept for it on {names}: {_some('job', left)} must end there first{when}"

    def _is_there(self, worker: str) -> bool:
        """Whether it waits for work now, or was heard of within a lease."""
        last = self.leases.seen_at.get(worker)
        silent = last is None or self._clock.mono_ms() - last > self.leases.lease_ms
        return not silent or self.matching.parked(worker)

    # -- nodes -------------------------------------------------------------------------------------------------

    def _take_marks(self, marks: Iterable[NodeMark]) -> None:
        self.marks = {mark.node: mark for mark in marks}
        self.matching.bar(_words(self.marks.values()))
        self._tell_trouble(
            {m.node: m.reason.removeprefix(BY_ITSELF) for m in self.marks.values() if m.reason.startswith(BY_ITSELF)}
        )

    def _tell_trouble(self, cordoned: dict[str, str]) -> None:
        """Which nodes are cordoned by themselves now."""
        before, self._cordoned = self._cordoned, cordoned
        for node in sorted(before.keys() - cordoned.keys()):
            self.on_trouble(node, "")
        for node in sorted(cordoned.keys() - before.keys()):
            self.on_trouble(node, cordoned[node])

    async def _look_at_marks(self) -> None:
        """A word whose entry gave no answer in time may have been taken all the same."""
        if self._marking.locked():
            return
        async with self._marking:
            marks = await self.ask(lambda reader: reader.nodes())
            known = {mark.node: mark for mark in marks}
            if self.leads and (known != self.marks or _words(marks) != self.matching.barred):
                self._take_marks(marks)

    async def mark_node(
        self,
        node: str,
        *,
        cordoned: bool | None = None,
        draining: bool | None = None,
        deadline_ms: int = 0,
        reason: str,
    ) -> NodeMark | None:
        """Says what may be placed on a node; None leaves that as it is, and what remains keeps its reason. Answers what
        is said of it now."""
        async with self._marking:
            known = self.marks.get(node)
            cordon = bool(known and known.cordoned) if cordoned is None else cordoned
            drains = bool(known and known.draining) if draining is None else draining
            if draining is None and known is not None:
                deadline_ms = known.deadline_ms
            if known is not None and not cordoned and not draining:
                reason = known.reason
            await self._mark(c.MarkNode(self._clock.now_ms(), node, cordon, drains, deadline_ms, reason))
        if cordoned is False:
            self._trouble.forget(node)
        return self.marks.get(node)

    async def _mark(self, word: c.MarkNode) -> None:
        """Nothing new is placed on a node from the moment that a word against it is on its way: what was decided before
        stands before it in the journal, and is counted once it is answered."""
        self.check_leads()
        if word.cordoned or word.draining:
            mark = NodeMark(word.node, word.cordoned, word.draining, word.deadline_ms, word.at_ms, word.reason)
            self.matching.bar({**self.matching.barred, **_words([mark])})
        try:
            await self.propose(word)
        except Refused:
            self.matching.bar(_words(self.marks.values()))
            raise
        self._take_marks(await self.ask(lambda reader: reader.nodes()))
        self.matching.nudge(word.node)  # it hears of it with the answer to its claim

    async def leave(self, worker: str, seconds: float) -> None:
        """A worker's machine will be taken away: what still runs there in `seconds` is asked to go elsewhere. The drain
        ends when the worker comes back; what operators have said of it stays."""
        now = self._clock.now_ms()
        deadline_ms, reason = now + max(round(seconds * 1000), 0), LEAVING
        async with self._marking:
            known = self.marks.get(worker)
            if known is not None and known.draining and not _is_leaving(known):
                deadline_ms, reason = min(deadline_ms, known.deadline_ms or deadline_ms), known.reason
            elif known is not None and known.cordoned:
                reason = known.reason if _is_leaving(known) else f"{CORDONED_BEFORE}{known.reason}"
            cordoned = known is not None and bool(known.cordoned)
            await self._mark(c.MarkNode(now, worker, cordoned, True, deadline_ms, reason))
        await self.tick()

    async def _is_back(self, worker: str) -> None:
        """Ends the drain of a machine that was to be taken away."""
        async with self._marking:
            known = self.marks.get(worker)
            if known is not None and _is_leaving(known):
                reason = known.reason.removeprefix(CORDONED_BEFORE)
                await self._mark(c.MarkNode(self._clock.now_ms(), worker, bool(known.cordoned), False, 0, reason))

    async def tick(self) -> None:
        """What time alone brings: silent nodes are no longer counted on, who must make way is told, and every lane is
        looked at again. About once a second."""
        if not self.leads:
            return
        now = self._clock.mono_ms()
        fleet = self.matching.planner.fleet
        for worker in [name for name in fleet.nodes if not self._is_there(name)]:
            self.matching.planner.remove_node(worker)
        self.matching.planner.shares.forget_idle(now)
        waiting = [(lane.need, lane.count) for lane in self.matching.planner.lanes.values()]
        if self._scoring.due() or (waiting and self._scoring.epoch == 0):
            self._scoring.renew(list(fleet.nodes.values()), waiting)
        for mark in self.marks.values():
            if mark.draining and mark.deadline_ms and self._clock.now_ms() >= mark.deadline_ms:
                self._ask_to_go(mark.node, "drained")
        self._trouble.forget_old(now)
        await self._cordon_black_holes()
        stubborn = [held.job for held in self.leases.unmoved(now, UNMOVED_SLACK_MS)]
        if stubborn:
            await self.release_those_held(stubborn, "it did not make way when it was asked to")
        if self.matching.planner.lanes:
            self.matching.wake(everything=True)
        await self._look_at_marks()

    def _ask_to_go(self, node: str, reason: str) -> None:
        now = self._clock.mono_ms()
        fresh = [held for held in self.leases.by_worker.get(node, {}).values() if held.order is None]
        for held in fresh:
            self.leases.make_way(held, reason, now)
        if fresh:
            self.matching.nudge(node)

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
                    self._trouble.note(fields["worker"], fields["job"], True, self._clock.mono_ms())
                    self.leases.drop(fields["job"])
                case E.WORK_FAILED | E.WORK_RETRIED:
                    told = fields["cause"] in LAPSES or fields["job"] in self.leases.gangs
                    if fields["cause"] in NODES_FAULT:
                        self._suspect(fields["worker"], fields["job"])
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
            self.matching.wake()
        for worker in list(self.leases.notices):
            self.matching.nudge(worker)

    def _suspect(self, node: str, job: str) -> None:
        """A job failed on a node; see `coordination.trouble`."""
        if self._trouble.note(node, job, False, self._clock.mono_ms()) and node not in self.marks:
            self._black_holes.add(node)

    async def _cordon_black_holes(self) -> None:
        """Never more than a third of the nodes: if so many fail, it is not the nodes."""
        found = self._trouble.black_holes(self._clock.mono_ms())
        holes, self._black_holes = self._black_holes.union(found) - set(self.marks), set()
        for node in sorted(holes):
            aside = sum(name in self.rooms for name in self.marks)
            if 3 * (aside + 1) > len(self.rooms):
                return
            why = f"{JOBS} different jobs in a row failed on it, and not on others"
            await self.mark_node(node, cordoned=True, reason=BY_ITSELF + why)

    def _grant(self, event: Event) -> None:
        now, fields = self._clock.mono_ms(), event.fields
        workers = fields.get("workers") or [fields["worker"]]
        for worker in workers:
            self.leases.grant(
                Held(
                    job=fields["job"],
                    attempt=fields["attempt"],
                    worker=worker,
                    kind=fields["kind"],
                    timeout_ms=fields["timeout_ms"],
                    claimed_ms=self.steady_ms(),
                    started_ms=None,
                    renewed_at=now,
                    alive_at=now,
                    gang=len(workers) > 1,
                )
            )


def _is_leaving(mark: NodeMark) -> bool:
    return mark.reason == LEAVING or mark.reason.startswith(CORDONED_BEFORE)


def _words(marks: Iterable[NodeMark]) -> dict[str, str]:
    return {mark.node: "draining" if mark.draining else "cordoned" for mark in marks}


def _some(what: str, n: int | None) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _grace_ms(job: Mapping[str, Any]) -> int:
    """How long a job may take to end once it is asked to."""
    return round(float(job.get("grace_seconds", 30.0)) * 1000)


_TOLD = (
    "token", "kind", "command", "params", "env", "cwd", "requires", "gpus", "timeout_seconds", "grace_seconds", "fence",
    "checkpoint", "array",
)  # fmt: skip


__all__ = ["Beat", "Dispatcher", "Journal", "Reading", "Room"]
