"""Whose turn it is, and where: lanes of pending jobs x nodes -> assignments, reservations, preemptions. Pure.

Jobs that are equal to placement (requirements, group, kind, time limit) share a *lane*; a decision costs lanes and
nodes, never jobs. A round takes the lanes' heads in order:

    the group that has had least for its weight      (`coordination.shares`)
    in it, kinds below their floor before the others
    then the higher priority, then first come first served

and gives each the best node that is open to it (`coordination.fleet`). When a head is about to be overtaken, on a node
that could serve it, by what comes after it, room is kept for it where it will fit soonest, and others use that room
only if that cannot make it later (`coordination.reservations`). So the least served group, and in it the kind below its
floor, waits for what runs to end and not for what comes after it. Only who is more important and comes first in the
order too may pass, and never a kind below its floor. Jobs of one size never need it: whose turn it is is decided when
the room is there, not before.

A head of much higher priority than what runs may have it stopped (`Preemption`): fewest and least important first, on
one node (of each rank), and the room is kept for it. Nobody is stopped for a group that has had more than his, nor who
was started before more urgent work because his kind was below its floor: else those rules would start work and this one
end it, for ever. The victims are asked by SIGTERM, have their grace, keep their checkpoints and lose no attempt; that
is the dispatcher's and the worker's business.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

from coordination.fleet import Candidate, Fleet
from coordination.lane import Head
from coordination.occupancy import NEVER, Began, Occupancy, Running
from coordination.placement import WHOLE, Need, Node, Offer
from coordination.reservations import Reservation, Reservations
from coordination.shares import Shares

MAX_RESERVATIONS = 8
LOOK_AGAIN_MS = 1_000  # between two looks at all nodes for the same lane
SETTLE_MS = 5_000  # from an end to the node's word that it is free; then room is looked for elsewhere
MAX_LOOKED = 500  # nodes looked at for room in one round: what is beyond that waits for the next
MAX_SCORED = 4_000  # nodes scored in one round, and jobs placed: a round must not keep the event loop from others
MAX_PLACED = 512


@dataclass(slots=True, kw_only=True)
class Lane:
    """Pending jobs that are equal to placement. `heads` are the first of them in order; `count` is how many there are.

    `bound_ms` is the longest that one of them may run once it is placed, 0 if nothing bounds it.
    """

    number: int
    need: Need
    group: str = "default"
    kind: str = "command"
    bound_ms: int = 0
    preemptible: bool = True
    heads: Sequence[Head] = ()
    count: int = 0
    at: int = 0  # heads before this one have been decided; they do not come back but by another `set_lane`


class Assignment(NamedTuple):
    """A decision: this job goes to these nodes, to these GPUs (uuids) of each. More than one node: a gang, by rank.

    `owed`: it came before more urgent work because its kind was below its floor, and is not to be stopped for that.
    """

    seq: int
    lane: int
    members: tuple[tuple[str, tuple[str, ...]], ...]
    owed: bool = False


class Preemption(NamedTuple):
    """These attempts must make way for job `seq` of this lane."""

    seq: int
    lane: int
    victims: tuple[Running, ...]


class Plan(NamedTuple):
    """`unfinished`: there is more to decide, and another round must follow at once."""

    assignments: list[Assignment]
    preemptions: list[Preemption]
    unfinished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPolicy:
    """`preempt_gap`: how much higher a priority must be to have running work stopped; above 100: never."""

    preempt_gap: int = 20
    preempt_after_ms: int = 5_000
    reservations: int = MAX_RESERVATIONS


Key = tuple[float, bool, int, int]


@dataclass(slots=True)
class _Round:
    """`waiting` is complete once every lane before the one in hand has been looked at; see `_keep_room`."""

    now: int
    below: set[str]  # kinds below their floor
    plan: Plan
    thorough: bool
    nodes_to_look_at: int = MAX_LOOKED
    passed_over: bool = False  # a head found no node that is not kept for another
    waiting: list[tuple[Key, int]] | None = None  # blocked lanes for which no room is kept, in order
    shares: dict[str, float] = field(default_factory=dict)  # of groups, as far as they have not changed in this round


@dataclass(slots=True)
class _Blocked:
    """A lane whose head fits nowhere now."""

    seq: int
    since_ms: int
    again_ms: int = 0  # when room for it is looked for again
    stop_again_ms: int = 0  # when it is looked again whether others could make way


class _Victims(NamedTuple):
    """Whom to stop on one node. The least is the best."""

    worst: int  # the highest priority among them
    many: int
    lost_ms: int  # their running time
    node: str
    stopped: list[Running]
    awaited: list[Running]  # and those that have been asked to stop before
    later: Node  # as it will be then


class Planner:
    """See the module's docstring. Knows nodes (`fleet`), what runs on them, and the lanes' heads."""

    def __init__(self, fleet: Fleet, shares: Shares, policy: PlanPolicy | None = None) -> None:
        self.fleet, self.shares, self.policy = fleet, shares, policy or PlanPolicy()
        self.lanes: dict[int, Lane] = {}
        self.places: dict[str, int] = {}  # how many more jobs a node takes, whatever they need
        self.spoken_for: set[int] = set()  # jobs of a decision under way
        self.occupancy = Occupancy()
        self.kept = Reservations(fleet, self.occupancy, self.places)
        self._blocked: dict[int, _Blocked] = {}
        self._totals: tuple[int, int, int] = (0, 0, 0)
        self._part: dict[Need, float] = {}

    @property
    def running(self) -> dict[str, dict[str, Running]]:
        """Node -> job -> attempt."""
        return self.occupancy.running

    @property
    def reservations(self) -> dict[int, Reservation]:
        """By lane."""
        return self.kept.by_lane

    # -- nodes ----------------------------------------------------------------------------------------------------

    def set_node(self, free: Offer, total: Offer | None, places: int, *, waits: bool = True) -> None:
        """The node says that it has so much free, and takes up to so many jobs more; `waits` if it may be given them
        now. No more is believed to be free than what is known to run leaves of `total` (`coordination.occupancy`)."""
        node = Node.of(free, total)
        self.occupancy.limit(node, total)
        known = self.fleet.nodes.get(node.name)
        if self.fleet.put(node) is not known:
            self._drop_kept_on(node.name)
            self._count_totals()
        told = sum(1 for attempt in self.occupancy.on(node.name) if not attempt.attempt)  # it has not heard of these
        self.places[node.name] = places - told
        self.fleet.set_open(node.name, waits and places > told)

    def close(self, name: str) -> None:
        """Gives it nothing until it is set again."""
        self.fleet.set_open(name, False)

    def remove_node(self, name: str) -> None:
        """It is gone, or must get no work: room that was kept on it is looked for elsewhere."""
        if name in self.fleet.nodes:
            self._drop_kept_on(name)
            self.fleet.remove(name)
            self.places.pop(name, None)
            self.occupancy.forget(name)
            self._count_totals()

    def _drop_kept_on(self, name: str) -> None:
        for kept in list(self.kept.on.get(name, ())):
            self.kept.drop(kept.lane)

    def _count_totals(self) -> None:
        nodes = self.fleet.nodes.values()
        self._totals = (
            sum(node.total_cpu_milli for node in nodes),
            sum(node.total_memory_mb for node in nodes),
            sum(len(node.gpus) for node in nodes) * WHOLE,
        )
        self._part.clear()

    def part_of_all(self, need: Need) -> float:
        """How much of the cluster one node's worth of this need is: of the resource it takes most of."""
        part = self._part.get(need)
        if part is None:
            asked = (need.cpu_milli, need.memory_mb, need.gpu_milli)
            parts = [mine / total for mine, total in zip(asked, self._totals, strict=True) if total > 0]
            part = self._part[need] = max(parts, default=0.0)
        return part

    # -- what runs ------------------------------------------------------------------------------------------------

    def began(self, attempt: Running, now: int) -> None:
        """An attempt was given to a node."""
        self.ended(attempt.job, attempt.node, now)
        self._add(attempt, now)

    def _add(self, attempt: Running, now: int) -> None:
        self.occupancy.add(attempt)
        attempt.part = self.part_of_all(attempt.need)
        self.shares.add(attempt.group, attempt.kind, attempt.part, now)

    def ended(self, job: str, node: str, now: int) -> None:
        """It is over there. What it held is free once its node says so (`set_node`)."""
        attempt = self.occupancy.remove(job, node)
        if attempt is not None:
            self.shares.add(attempt.group, attempt.kind, -attempt.part, now)
            self.kept.ended(attempt)

    def settled(self, decision: Assignment, began: Collection[Began], now: int) -> None:
        """The decision is not under way any more; this came of it. If nothing did, its job is decided again once its
        lane has been set."""
        self.spoken_for.discard(decision.seq)
        standing = _under_way(decision.seq)
        for attempt in began:
            self.occupancy.rename(standing, attempt, now)
        if len(began) < len(decision.members):
            for node, _ in decision.members:
                self.ended(standing, node, now)

    # -- lanes ----------------------------------------------------------------------------------------------------

    def set_lane(self, lane: Lane) -> None:
        """These are the lane's first jobs now; without any it is gone."""
        known = self.lanes.get(lane.number)
        if not lane.heads or (known is not None and known.need is not lane.need):  # its number may be another's now
            self.lanes.pop(lane.number, None)
            self._blocked.pop(lane.number, None)
            self.kept.drop(lane.number)
        if lane.heads:
            self.lanes[lane.number] = lane

    def _head(self, lane: Lane) -> Head | None:
        heads, at = lane.heads, lane.at
        while at < len(heads) and heads[at].seq in self.spoken_for:
            at += 1
        lane.at = at
        return heads[at] if at < len(heads) else None

    def _key(self, lane: Lane, head: Head, this: _Round) -> Key:
        share = this.shares.get(lane.group)
        if share is None:
            share = this.shares[lane.group] = self.shares.of_group(lane.group, this.now)
        return (share, lane.kind not in this.below, -head.priority, head.seq)

    def _below(self, now: int) -> set[str]:
        return self.shares.kinds_below_floor({lane.kind for lane in self.lanes.values()}, now)

    # -- a round --------------------------------------------------------------------------------------------------

    def plan(self, now: int, lanes: Iterable[int] | None = None, *, thorough: bool = True) -> Plan:
        """Decides for these lanes (all, if none are named) what can be decided now. What is assigned is spoken for, and
        taken from its nodes, until it is `settled`. `thorough`: lanes are looked at even if nobody waits for
        work, and work is stopped for those that have waited: once a second is enough for that."""
        this = _Round(now, self._below(now), Plan([], []), thorough, waiting=[] if lanes is None else None)
        queue = []
        for lane in self.lanes.values() if lanes is None else [self.lanes[n] for n in lanes if n in self.lanes]:
            head = self._head(lane)
            if head is not None:
                queue.append((self._key(lane, head, this), lane.number))
        heapq.heapify(queue)
        most = self.fleet.scored + MAX_SCORED
        while queue and (thorough or self.fleet.open):
            if self.fleet.scored > most or len(this.plan.assignments) >= MAX_PLACED:
                return this.plan._replace(unfinished=True)
            key, number = heapq.heappop(queue)
            lane = self.lanes[number]
            head = self._head(lane)
            if head is None:
                continue
            fresh = self._key(lane, head, this)
            if fresh > key:  # its group has been served since
                heapq.heappush(queue, (fresh, number))
                continue
            members = self._find(lane, head, fresh, this)
            if members is not None and self._keep_room(lane, fresh, members, this):
                members = self._find(lane, head, fresh, this)
            if members is None:
                self._is_blocked(lane, head, fresh, this)
                continue
            this.plan.assignments.append(self._assign(lane, head, members, this))
            following = self._head(lane)
            if following is not None:
                heapq.heappush(queue, (self._key(lane, following, this), number))
        return this.plan

    def _find(self, lane: Lane, head: Head, key: Key, this: _Round) -> list[Candidate] | None:
        """The best open node, or as many as a gang needs, that this lane may use now."""
        need = lane.need
        best = self.fleet.best(need)
        if best is None:
            return None
        if need.nodes == 1 and best.name not in self.kept.on:
            return [best]
        wanted = self.fleet.could(need) or need

        def passes(kept: Reservation) -> bool:
            return self._passes(head, key, kept, this)

        found: list[Candidate] = []
        with closing(self.fleet.candidates(need)) as candidates:
            for candidate in candidates:
                usable = self.kept.usable(candidate, wanted, lane.number, this.now, lane.bound_ms, passes)
                if usable is not None:
                    found.append(usable)
                    if len(found) == need.nodes:
                        return found
        return None

    def _passes(self, head: Head, key: Key, kept: Reservation, this: _Round) -> bool:
        """Whether a job need not care about the room that is kept for another."""
        other = self.lanes.get(kept.lane)
        theirs = self._head(other) if other is not None else None
        if other is None or theirs is None:
            return True
        if kept.preempts or other.kind in this.below or head.priority <= theirs.priority:
            return False
        return key < self._key(other, theirs, this)

    def _assign(self, lane: Lane, head: Head, members: list[Candidate], this: _Round) -> Assignment:
        told, attempts = [], []
        for member in members:
            gpus = self.fleet.nodes[member.name].uuids(member.gpus)
            told.append((member.name, gpus))
            self.fleet.take(lane.need, member.name, member.gpus)
            self.places[member.name] -= 1
            if self.places[member.name] <= 0:
                self.fleet.set_open(member.name, False)
            attempts.append(
                Running(
                    job=_under_way(head.seq),
                    attempt=0,
                    node=member.name,
                    need=lane.need,
                    gpus=gpus,
                    group=lane.group,
                    kind=lane.kind,
                    priority=head.priority,
                    preemptible=False,
                    started_ms=this.now,
                    ends_ms=this.now + lane.bound_ms if lane.bound_ms else NEVER,
                )
            )
        owed = lane.kind in this.below and self._anything_as_urgent_as(head.priority + self.policy.preempt_gap)
        for attempt in attempts:
            self._add(attempt, this.now)
        this.shares.pop(lane.group, None)
        if lane.kind in this.below:
            this.below = self._below(this.now)
        self.spoken_for.add(head.seq)
        self.kept.started(lane.number, attempts)
        self._blocked.pop(lane.number, None)
        return Assignment(head.seq, lane.number, tuple(told), owed)

    def _anything_as_urgent_as(self, priority: int) -> bool:
        heads = (self._head(lane) for lane in self.lanes.values())
        return any(head is not None and head.priority >= priority for head in heads)

    # -- room and preemption ----------------------------------------------------------------------------------------

    def _is_blocked(self, lane: Lane, head: Head, key: Key, this: _Round) -> None:
        """The head fits nowhere now: have others make way if it is that important; see to the room kept for it."""
        blocked = self._blocked.get(lane.number)
        if blocked is None:
            blocked = self._blocked[lane.number] = _Blocked(head.seq, this.now)
        elif blocked.seq != head.seq:
            blocked.seq, blocked.since_ms = head.seq, this.now
        kept = self.reservations.get(lane.number)
        if kept is not None:
            kept.seq = head.seq  # its jobs are equal; another may have come before
            if kept.preempts and kept.awaited:
                return
        waited = this.now - blocked.since_ms >= self.policy.preempt_after_ms and this.now >= blocked.stop_again_ms
        if this.thorough and waited and (kept is None or not kept.preempts) and self._preempt(lane, head, this):
            return
        if kept is None:
            if this.waiting is not None:
                this.waiting.append((key, lane.number))
            return
        if kept.until_ms == NEVER and not kept.awaited:
            kept.until_ms = this.now  # nobody knew when, and now it is
        if this.now >= kept.until_ms + SETTLE_MS:
            self._look(lane, head, this)

    def _keep_room(self, lane: Lane, key: Key, members: list[Candidate], this: _Round) -> bool:
        """A lane is about to use these nodes: room is kept for those before it that one of them could serve. Whether
        any was."""
        most = self.policy.reservations
        if not self._blocked or len(self.reservations) >= most:
            return False
        if this.waiting is None:
            this.waiting = self._all_waiting(this)
        nodes = [self.fleet.nodes[member.name] for member in members]
        had, left = len(self.reservations), []
        for item in this.waiting:
            blocked, other = self._blocked.get(item[1]), self.lanes[item[1]]
            head, need = self._head(other), self.fleet.could(other.need)
            if blocked is None or head is None or need is None or other is lane or this.now < blocked.again_ms:
                continue  # it has got something meanwhile, or nothing can be done for it now
            if item[0] >= key or this.nodes_to_look_at <= 0 or len(self.reservations) >= most:
                left.append(item)
            elif any(node.admits(need) is not None for node in nodes):
                self._look(other, head, this)
            else:
                left.append(item)
        this.waiting = left
        return len(self.reservations) > had

    def _all_waiting(self, this: _Round) -> list[tuple[Key, int]]:
        found = []
        for number in self._blocked:
            if number not in self.reservations:
                lane = self.lanes[number]
                head = self._head(lane)
                if head is not None:
                    found.append((self._key(lane, head, this), number))
        return sorted(found)

    def _look(self, lane: Lane, head: Head, this: _Round) -> None:
        """Keeps room where the head will fit soonest; nowhere, if it never will."""
        this.nodes_to_look_at -= len(self.fleet.nodes)
        kept, need = self.reservations.get(lane.number), self.fleet.could(lane.need)
        if need is None:
            self.kept.drop(lane.number)
            return
        about = (lane.number, head.seq, need, lane.bound_ms, this.now)
        found = self.kept.look(*about)
        if found is None and need.nodes > 1 and not this.passed_over and not self._one_is_behind(lane):
            # The nodes of a gang are never all without a reservation at one moment: it lines up behind those there are.
            found = self.kept.look(*about, behind=True)
        if found is None:
            this.passed_over = True
            self.kept.drop(lane.number)
            if not self.kept.on:  # nothing is promised to others: what is in its way is not ours to wait for
                self._blocked[lane.number].again_ms = this.now + LOOK_AGAIN_MS
            return
        found.preempts = kept is not None and kept.preempts and kept.members.keys() == found.members.keys()
        self.kept.keep(found)

    def _one_is_behind(self, lane: Lane) -> bool:
        return any(on[-1].lane != lane.number for on in self.kept.on.values() if len(on) > 1)

    def _preempt(self, lane: Lane, head: Head, this: _Round) -> bool:
        """Has the least important work that is in the way stopped. False if that would not help."""
        if head.priority < self.policy.preempt_gap or any(kept.preempts for kept in self.reservations.values()):
            return False  # one at a time: each changes what the next one would have to stop
        least = head.priority - self.policy.preempt_gap
        need = self.fleet.could(lane.need)
        if need is None or least < self.occupancy.least_priority() or this.nodes_to_look_at <= 0:
            return False
        this.nodes_to_look_at -= len(self.fleet.nodes)
        self._blocked[lane.number].stop_again_ms = this.now + self.policy.preempt_after_ms
        share = self.shares.of_group(lane.group, this.now)

        def yields(attempt: Running) -> bool:
            return (
                attempt.preemptible
                and attempt.priority <= least
                and attempt.need.nodes == 1
                and (attempt.kind not in this.below or lane.kind in this.below)
                and (attempt.group == lane.group or self.shares.of_group(attempt.group, this.now, attempt.part) > share)
            )

        options: list[_Victims] = []
        for node in self.fleet.nodes.values():
            if node.admits(need) is not None:
                weak = [attempt for attempt in self.occupancy.on(node.name) if attempt.stopping or yields(attempt)]
                option = self._victims(node, need, weak, this.now) if weak or need.nodes > 1 else None
                if option is not None:
                    options.append(option)
        best = heapq.nsmallest(need.nodes, options, key=lambda option: option[:4])
        victims = tuple(victim for option in best for victim in option.stopped)
        if len(best) < need.nodes or not victims:
            return False
        kept = Reservation(
            lane=lane.number,
            seq=head.seq,
            need=need,
            members={option.node: tuple((option.later.fitting(need) or [])[: need.gpus]) for option in best},
            until_ms=NEVER,
            awaited={attempt for option in best for attempt in option.awaited},
            preempts=True,
            looked_ms=this.now,
        )
        self.kept.keep(kept, first=True)
        for victim in victims:
            victim.stopping = True
        # Not again before these have ended and their nodes have said so, or more than is needed would be stopped.
        self._blocked[lane.number].since_ms = this.now + max(victim.grace_ms for victim in victims)
        this.plan.preemptions.append(Preemption(head.seq, lane.number, victims))
        return True

    def _victims(self, node: Node, need: Need, weak: list[Running], now: int) -> _Victims | None:
        """Whom of these to stop on a node; None if stopping all of them is not enough."""
        later, places = node.copy(), self.places.get(node.name, 0)

        def fits() -> bool:
            return places > 0 and later.fitting(need) is not None

        awaited = [attempt for attempt in weak if attempt.stopping]
        for attempt in awaited:
            later.give(attempt.need, later.numbers(attempt.gpus))
            places += 1
        stopped: list[Running] = []
        for attempt in sorted(weak, key=lambda attempt: (attempt.priority, -attempt.started_ms, attempt.job)):
            if attempt.stopping:
                continue
            if fits():
                break
            later.give(attempt.need, later.numbers(attempt.gpus))
            stopped.append(attempt)
            places += 1
        if not fits():
            return None
        for attempt in reversed(stopped.copy()):  # the most important first: it may turn out not to be in the way
            gpus = later.numbers(attempt.gpus)
            later.take(attempt.need, gpus)
            places -= 1
            if fits():
                stopped.remove(attempt)
            else:
                later.give(attempt.need, gpus)
                places += 1
        worst = max((attempt.priority for attempt in stopped), default=-1)
        lost = sum(max(now - attempt.started_ms, 0) for attempt in stopped)
        return _Victims(worst, len(stopped), lost, node.name, stopped, awaited + stopped, later)


def _under_way(seq: int) -> str:
    """The name by which a decision stands in the books until its job is told."""
    return f"#{seq}"


__all__ = [
    "LOOK_AGAIN_MS",
    "MAX_RESERVATIONS",
    "NEVER",
    "Assignment",
    "Began",
    "Lane",
    "Plan",
    "PlanPolicy",
    "Planner",
    "Preemption",
    "Reservation",
    "Running",
]
