"""The parked claims, and the rounds that give them work. One event loop owns it.

A worker's claim is only how an assignment travels: it parks, and whatever changes (a job comes in, a claim parks, room
falls free, an attempt ends) asks for a round. A round takes up what has changed, has the planner decide for all parked
claims together, and journals the decisions; the claims that got something are answered once that is committed. Rounds
go on while earlier decisions are being committed: their jobs are spoken for, and their workers are closed until they
claim again. Everything here is soft: a new leader begins with what the queue says is in progress.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from coordination import commands as c
from coordination.lane import lane_key
from coordination.leases import Held, LeaseTable
from coordination.occupancy import NEVER, Began, Running
from coordination.placement import Need, Offer, need_of
from coordination.planner import Assignment, Lane, Plan, Planner
from coordination.queue_reads import HeldRow
from coordination.queue_state import ChangedLanes, Claimed, ReadyLane

LEAST_HEADS, MOST_HEADS = 16, 1_000  # of a lane, read at a time: no fewer than one worker could take
ENDS_SLACK_MS = 5_000  # what ending takes beyond the time limit and the grace


class Room(NamedTuple):
    """A worker's newest word on what it can take. `total` is what it would have with nothing running, if it says."""

    free: Offer
    total: Offer | None
    max_jobs: int


class Parked:
    """One claim that waits. Its future gets the jobs; `until` is monotonic ms."""

    __slots__ = ("future", "gone", "until", "worker")

    def __init__(
        self, worker: str, until: int, gone: Callable[[], bool], future: asyncio.Future[list[dict[str, Any]]]
    ) -> None:
        self.worker, self.until, self.gone, self.future = worker, until, gone, future


class Matching:
    """See the module's docstring."""

    def __init__(
        self,
        planner: Planner,
        leases: LeaseTable,
        *,
        lanes: Callable[[int, int], Awaitable[ChangedLanes]],
        propose: Callable[[c.Command], Awaitable[Any]],
        give_back: Callable[[list[str]], Awaitable[Any]],
        mono_ms: Callable[[], int],
        now_ms: Callable[[], int],
        arrived: Callable[[Need, int], None] = lambda need, nodes: None,
    ) -> None:
        """`lanes(limit, since)` asks the queue what is pending; `give_back` releases jobs nobody was told of; `arrived`
        hears of every job that is placed."""
        self.planner, self._leases = planner, leases
        self._lanes, self._propose, self._give_back = lanes, propose, give_back
        self._mono_ms, self._now_ms, self._arrived = mono_ms, now_ms, arrived
        self.rooms: dict[str, Room] = {}
        self.barred: dict[str, str] = {}  # nodes that get nothing new, and why
        self._parked: dict[str, list[Parked]] = {}
        self._impatient: list[Parked] = []  # are answered by the next round, whatever it finds
        self._heads = LEAST_HEADS
        self._stale: set[str] = set()  # workers whose node is to be set anew
        self._wanted = self._all = True  # a round; one that looks at every lane
        self._lanes_upto = 0  # what is known of the queue; 0: nothing
        self._tasks: set[asyncio.Task[None]] = set()
        self._rounds_task: asyncio.Task[None] | None = None
        self._closed = False
        leases.on_drop = self._dropped

    # -- rooms and claims -------------------------------------------------------------------------------------------

    def make_room(self, room: Room) -> None:
        """A worker's room has changed."""
        worker = room.free.node
        self.rooms[worker] = room
        self._heads = min(max(self._heads, room.max_jobs), MOST_HEADS)
        self._stale.add(worker)
        if worker in self._parked:
            self.wake()

    def parked(self, worker: str) -> bool:
        return worker in self._parked

    async def wait(self, worker: str, until: int, gone: Callable[[], bool]) -> list[dict[str, Any]]:
        """Jobs for a worker that has stated its room; nothing after `until` (monotonic ms), once it is `gone`, or when
        it is to look for notices. However short the time, it is looked once."""
        entry = Parked(worker, until, gone, asyncio.get_running_loop().create_future())
        self._parked.setdefault(worker, []).append(entry)
        self._stale.add(worker)
        left = until - self._mono_ms()
        if left <= 0:
            self._impatient.append(entry)
        self.wake()
        try:
            if left > 0:
                await asyncio.wait({entry.future}, timeout=left / 1000)
                if not entry.future.done() and self._is_parked(entry):
                    return []
            # A decision for it is being committed, or it came too late to wait and is answered by the next round.
            await asyncio.wait({entry.future})
            return entry.future.result()
        except asyncio.CancelledError:
            if entry.future.done() and not entry.future.cancelled() and entry.future.exception() is None:
                self._own(self._take_back(entry.future.result()))
            raise
        finally:
            self._unpark(entry)
            entry.future.cancel()  # nobody would hear of what it is given from now on; see `_answer`

    def _is_parked(self, entry: Parked) -> bool:
        return entry in self._parked.get(entry.worker, ())

    def _unpark(self, entry: Parked) -> None:
        mine = self._parked.get(entry.worker, [])
        if entry in mine:
            mine.remove(entry)
            if not mine:
                del self._parked[entry.worker]
                self.planner.close(entry.worker)

    def nudge(self, worker: str) -> None:
        """It must be told something: its parked claims are answered, and made again."""
        for entry in list(self._parked.get(worker, ())):
            self._dismiss_one(entry)

    def nudge_all(self) -> None:
        for worker in list(self._parked):
            self.nudge(worker)

    def close(self) -> None:
        """This node leads no more. What is being committed is answered as it comes out."""
        self._closed = True
        self._leases.on_drop = lambda held: None
        self.nudge_all()

    # -- what runs --------------------------------------------------------------------------------------------------

    def take_up(self, row: HeldRow, steady_ms: int, grace_ms: int) -> None:
        """An attempt that was in progress when the term began."""
        key = lane_key(row.requires)
        limit = row.timeout_ms + grace_ms + ENDS_SLACK_MS
        ends = self._mono_ms() + max((row.started_ms or steady_ms) - steady_ms + limit, 0) if row.timeout_ms else NEVER
        attempt = Running(
            job=row.job,
            attempt=row.attempt,
            node=row.worker,
            need=need_of(row.requires),
            gpus=tuple(json.loads(row.gpus)) if row.gpus else (),
            group=key.group,
            kind=key.kind,
            priority=row.priority,
            preemptible=key.preemptible,
            started_ms=self._mono_ms() - max(steady_ms - (row.started_ms or row.claimed_ms), 0),
            ends_ms=ends,
            grace_ms=grace_ms,
        )
        self.planner.began(attempt, self._mono_ms())

    def _dropped(self, held: Held) -> None:
        self.planner.ended(held.job, held.worker, self._mono_ms())
        self._stale.add(held.worker)
        if self._parked:
            self.wake()

    # -- rounds -----------------------------------------------------------------------------------------------------

    def wake(self, *, everything: bool = False) -> None:
        """Asks for a round. `everything`: every lane is looked at, as time alone may have changed what is allowed."""
        self._wanted = True
        self._all = self._all or everything
        if self._rounds_task is None and not self._closed and (self._parked or self._all):
            self._rounds_task = asyncio.ensure_future(self._rounds())

    async def _rounds(self) -> None:
        try:
            while self._wanted and not self._closed:
                self._wanted = False
                impatient, self._impatient = self._impatient, []
                try:
                    finished = await self._round()
                except Exception as error:
                    for entry in [entry for entries in self._parked.values() for entry in entries]:
                        self._unpark(entry)
                        if not entry.future.done():
                            entry.future.set_exception(error)
                    self._lanes_upto = 0  # what was read may be lost
                    return
                if not finished:
                    self._impatient[:0] = impatient
                    self.wake(everything=True)
                    await asyncio.sleep(0)
                    continue
                for entry in impatient:
                    if self._is_parked(entry):
                        self._dismiss_one(entry)
        finally:
            self._rounds_task = None
            if self._wanted and self._parked and not self._closed:
                self.wake()

    async def _round(self) -> bool:
        """Whether all has been decided that can be decided now."""
        told = await self._lanes(self._heads, self._lanes_upto)
        if self._closed:
            return True
        changed, self._lanes_upto = told.lanes, told.upto
        if told.whole:
            for gone in sorted(set(self.planner.lanes) - {lane.shape for lane in changed}):
                self.planner.set_lane(Lane(number=gone, need=need_of("{}")))
        for lane in changed:
            self._set_lane(lane)
        thorough, self._all = self._all, False
        everything = thorough or bool(self._stale)
        self._set_nodes()
        lanes = None if everything else [lane.shape for lane in changed]
        plan = self.planner.plan(self._mono_ms(), lanes, thorough=thorough)
        self._carry_out(plan)
        return not plan.unfinished

    def _dismiss_one(self, entry: Parked) -> None:
        self._unpark(entry)
        if not entry.future.done():
            entry.future.set_result([])

    def _set_lane(self, lane: ReadyLane) -> None:
        key = lane_key(lane.requires)
        self.planner.set_lane(
            Lane(
                number=lane.shape,
                need=need_of(lane.requires),
                group=key.group,
                kind=key.kind,
                bound_ms=key.bound_ms + ENDS_SLACK_MS if key.bound_ms else 0,
                preemptible=key.preemptible,
                heads=lane.heads,
                count=lane.jobs,
            )
        )

    def _set_nodes(self) -> None:
        for worker in self._stale:
            room = self.rooms.get(worker)
            if room is None:
                continue
            if worker in self.barred:
                self.planner.remove_node(worker)
            else:
                self.planner.set_node(room.free, room.total, room.max_jobs, waits=worker in self._parked)
        self._stale.clear()

    def forget(self, worker: str) -> None:
        """It has long been silent."""
        self.rooms.pop(worker, None)
        self.planner.remove_node(worker)

    def bar(self, marks: dict[str, str]) -> None:
        """These nodes, and no others, get nothing new."""
        self._stale.update(set(marks) ^ set(self.barred))
        self.barred = dict(marks)
        self.wake(everything=True)

    # -- decisions become entries -----------------------------------------------------------------------------------

    def _carry_out(self, plan: Plan) -> None:
        now = self._mono_ms()
        workers = {worker for assignment in plan.assignments for worker, _ in assignment.members}
        entries = {worker: self._parked[worker][0] for worker in sorted(workers)}
        left = self._without_gone(plan.assignments, entries, now)
        if left:
            for assignment in left:
                self._arrived(self.planner.lanes[assignment.lane].need, len(assignment.members))
            for worker in {worker: None for assignment in left for worker, _ in assignment.members}:
                self._unpark(entries[worker])
                self.planner.close(worker)
            self._own(self._commit(left, entries))
        for preemption in plan.preemptions:
            for victim in preemption.victims:
                held = self._leases.of(victim.node, victim.job)
                if held is not None and held.attempt == victim.attempt:
                    self._leases.make_way(held, "preempted", now)
                    self.nudge(victim.node)

    def _without_gone(self, plan: list[Assignment], entries: dict[str, Parked], now: int) -> list[Assignment]:
        """Those decisions whose askers are all still there; another round decides anew for the others."""
        gone = {worker for worker, entry in entries.items() if entry.gone()}
        if not gone:
            return plan
        left = []
        for assignment in plan:
            workers = {worker for worker, _ in assignment.members}
            if workers & gone:
                self.planner.settled(assignment, (), now)
                self._stale |= workers
                self._lanes_upto = 0
            else:
                left.append(assignment)
        for worker in sorted(gone):
            self._dismiss_one(entries.pop(worker))
        self.wake(everything=True)
        return left

    async def _commit(self, assignments: list[Assignment], entries: dict[str, Parked]) -> None:
        """Journals decisions and answers the claims they are for."""
        planner, at = self.planner, self._now_ms()
        single: defaultdict[str, list[Assignment]] = defaultdict(list)
        for assignment in assignments:
            if len(assignment.members) == 1:
                single[assignment.members[0][0]].append(assignment)
        gangs = [assignment for assignment in assignments if len(assignment.members) > 1]
        commands: list[c.Command] = [
            c.Claim(at, worker, tuple(c.Pick(pick.seq, _json(pick.members[0][1])) for pick in picks))
            for worker, picks in single.items()
        ]
        commands += [
            c.ClaimGang(at, gang.seq, tuple(c.Place(worker, _json(gpus)) for worker, gpus in gang.members))
            for gang in gangs
        ]
        told: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        failed: dict[str, BaseException] = {}
        answers: list[Any] = []
        try:
            answers = await asyncio.gather(*map(self._propose, commands), return_exceptions=True)
        finally:
            claimed: dict[int, Claimed] = {}
            for (worker, _), answer in zip(single.items(), answers, strict=False):
                if isinstance(answer, BaseException):
                    failed[worker] = answer
                else:
                    claimed.update((job.seq, job) for job in answer)
            for gang, answer in zip(gangs, answers[len(single) :], strict=False):
                if isinstance(answer, BaseException):
                    failed.update((worker, answer) for worker, _ in gang.members)
                elif answer is not None:
                    claimed[gang.seq] = answer
            now = self._mono_ms()
            for assignment in assignments:
                began: list[Began] = []
                for rank, (worker, _) in enumerate(assignment.members):
                    if assignment.seq in claimed:
                        told[worker].append(self._told(claimed[assignment.seq], assignment, rank, began, now))
                planner.settled(assignment, began, now)
                if not began:
                    self._lanes_upto = 0  # it may be pending all the same
        for worker in {worker: None for assignment in assignments for worker, _ in assignment.members}:
            self._answer(entries[worker], told[worker], failed.get(worker))
        self.wake()

    def _told(self, claimed: Claimed, decision: Assignment, rank: int, began: list[Began], now: int) -> dict[str, Any]:
        """A claimed job as it travels to its worker, and, if it is still the job's newest attempt, among what `began`
        there."""
        worker, gpus = decision.members[rank]
        job = for_worker(claimed, gpus)
        if len(decision.members) > 1:
            names = [name for name, _ in decision.members]
            job["gang"] = {"rank": rank, "members": names, "master_port": master_port(claimed.token)}
        held = self._leases.of(worker, claimed.id)
        if held is not None and held.attempt == claimed.attempt:
            held.grace_ms = round(float(job["grace_seconds"]) * 1000)
            limit = claimed.timeout_ms + held.grace_ms + ENDS_SLACK_MS
            ends = now + limit if claimed.timeout_ms else NEVER
            preemptible = lane_key(claimed.requires).preemptible and not decision.owed
            began.append(Began(worker, claimed.id, claimed.attempt, ends, held.grace_ms, preemptible))
        return job

    def _answer(self, entry: Parked, jobs: list[dict[str, Any]], error: BaseException | None) -> None:
        if entry.future.done():  # its asker is gone
            if jobs:
                self._own(self._take_back(jobs))
        elif jobs or error is None:
            entry.future.set_result(jobs)
        else:
            entry.future.set_exception(error)

    async def _take_back(self, jobs: list[dict[str, Any]]) -> None:
        try:
            await self._give_back([job["id"] for job in jobs])
        except Exception:  # noqa: S110 - its worker does not list them, so its next heartbeat gives them back
            pass

    def _own(self, work: Any) -> None:
        """Keeps a task until it has ended."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _json(gpus: Iterable[str]) -> str | None:
    listed = list(gpus)
    return json.dumps(listed) if listed else None


def master_port(token: int) -> int:
    """Where rank 0 of a gang listens: below the ports that kernels hand out, and another one for each attempt."""
    return 20_000 + token % 12_000


@lru_cache(maxsize=4_096)
def _told_requires(text: str) -> dict[str, Any]:
    """What of a lane a worker is told: how much its process may have."""
    return {name: value for name, value in json.loads(text).items() if name != "lane"}


def for_worker(job: Claimed, gpus: Iterable[str]) -> dict[str, Any]:
    """A claimed job as its worker is told of it."""
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
        "requires": _told_requires(job.requires),
        "gpus": list(gpus),
        "timeout_seconds": job.timeout_ms / 1000 if job.timeout_ms else None,
        "grace_seconds": carried.get("grace_seconds", 30.0),
        "fence": carried.get("fence", "attempt"),
        "checkpoint": json.loads(job.checkpoint) if job.checkpoint is not None else None,
        "array": carried.get("array"),
    }


__all__ = ["Matching", "Parked", "Room", "for_worker", "master_port"]
