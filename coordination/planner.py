"""Whose turn it is, and where: lanes of pending jobs x nodes -> assignments, reservations, preemptions. Pure.

Jobs that are equal to placement (requirements, group, kind, time limit) share a *lane*; a decision costs lanes and
nodes, never jobs. A round takes the lanes' heads in order:

    the group that has had least for its weight      (`coordination.shares`)
    in it, kinds below their floor before the others
    then the higher priority, then first come first served

and gives each the best node that is open to it (`coordination.fleet`). A head that fits nowhere now gets a reservation:
the node (for a gang: nodes) where it will fit soonest, told by the time limits of what runs there. What comes later in
the order may use a reserved node only if that cannot make the reserved job later: it ends in time, or what is reserved
fits beside it. This is EASY backfilling (Lifka, JSSPP 1995) with several reservations, and with time limits that are
enforced instead of guessed. Where limits are missing the time is unknown, and only the second way is left.

A head of much higher priority than what runs may have it stopped (`Preemption`): fewest and least important first, on
one node (of each rank), and its reservation keeps the room for it. The victims are asked by SIGTERM, have their grace,
keep their checkpoints and lose no attempt; that is the dispatcher's and the worker's business.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from coordination.fleet import Candidate, Fleet
from coordination.lane import Head
from coordination.placement import Need, Node, Offer
from coordination.shares import Shares

MAX_RESERVATIONS = 8
NEVER = 1 << 62
LOOK_AGAIN_MS = 1_000


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


@dataclass(slots=True, kw_only=True, eq=False)
class Running:
    """An attempt on one node. `ends_ms` is when its limits will have ended it (NEVER: nothing will)."""

    job: str
    attempt: int
    node: str
    need: Need
    gpus: tuple[str, ...] = ()
    group: str = "default"
    kind: str = "command"
    priority: int = 0
    preemptible: bool = True
    started_ms: int = 0
    ends_ms: int = NEVER
    grace_ms: int = 0  # between SIGTERM and SIGKILL
    stopping: bool = False  # it has been asked to make way


class Assignment(NamedTuple):
    """A decision: this job goes to these nodes, to these GPUs (uuids) of each. More than one node: a gang, by rank."""

    seq: int
    lane: int
    members: tuple[tuple[str, tuple[str, ...]], ...]


class Preemption(NamedTuple):
    """These attempts must make way for job `seq` of this lane."""

    seq: int
    lane: int
    victims: tuple[Running, ...]


@dataclass(slots=True)
class Reservation:
    """Room kept for the head of a lane. `awaited`: what still runs on the nodes and must end first."""

    lane: int
    seq: int
    need: Need
    nodes: tuple[str, ...]
    until_ms: int  # when it will fit at the latest; NEVER: nobody knows
    awaited: set[Running]
    preempts: bool = False


class Plan(NamedTuple):
    assignments: list[Assignment]
    preemptions: list[Preemption]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPolicy:
    """`preempt_gap`: how much higher a priority must be to have running work stopped; above 100: never."""

    preempt_gap: int = 20
    preempt_after_ms: int = 5_000
    reservations: int = MAX_RESERVATIONS


Key = tuple[float, int, int, int]


@dataclass(slots=True)
class _Round:
    """What one round has given away so far, which the shares do not show yet."""

    now: int
    groups: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    kinds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    below: set[str] = field(default_factory=set)


class Planner:
    """See the module's docstring. Knows nodes (`fleet`), what runs on them, and the lanes' heads."""

    def __init__(self, fleet: Fleet, shares: Shares, policy: PlanPolicy | None = None) -> None:
        self.fleet, self.shares, self.policy = fleet, shares, policy or PlanPolicy()
        self.lanes: dict[int, Lane] = {}
        self.places: dict[str, int] = {}  # how many more jobs an open node takes, whatever they need
        self.running: dict[str, dict[str, Running]] = {}  # node -> job -> attempt
        self.reservations: dict[int, Reservation] = {}  # by lane
        self.spoken_for: set[int] = set()  # jobs of a decision under way
        self._reserved_on: defaultdict[str, list[Reservation]] = defaultdict(list)
        self._blocked_since: dict[int, tuple[int, int]] = {}  # lane -> (its head, since when)
        self._totals: tuple[int, int, int] = (0, 0, 0)
        self._part: dict[Need, float] = {}
        self._ledgers: dict[str, tuple[Offer, Node]] = {}  # what a node has in all, and what `running` leaves of it
        self._try_again: dict[int, int] = {}  # lane -> when a reservation for it is looked for again

    # -- nodes ----------------------------------------------------------------------------------------------------

    def set_node(self, free: Offer, total: Offer | None, places: int) -> None:
        """The node says that it has so much free, and takes up to so many jobs more.

        If it has also said what it has in `total`, no more is believed to be free than what `running` leaves of that:
        what was given to it a moment ago may not be in its own sums yet, what it has not ended yet is not in ours.
        """
        node = Node.of(free, total)
        if total is not None:
            self._less_what_runs(node, total)
        for attempt in self.running.get(node.name, {}).values():
            if attempt.need.anti_affinity is not None:
                node.tags[attempt.need.anti_affinity] = node.tags.get(attempt.need.anti_affinity, 0) + 1
        known = self.fleet.nodes.get(node.name)
        if self.fleet.put(node) is not known:
            self._count_totals()
        self.places[node.name] = places
        self.fleet.set_open(node.name, places > 0)

    def _less_what_runs(self, node: Node, total: Offer) -> None:
        left = self._ledgers.get(node.name)
        if left is None or left[0] != total:
            whole = Node.of(total)
            for attempt in self.running.get(node.name, {}).values():
                whole.take(attempt.need, whole.numbers(attempt.gpus))
            left = self._ledgers[node.name] = (total, whole)
        ledger = left[1]
        node.cpu_milli = min(node.cpu_milli, ledger.cpu_milli)
        node.memory_mb = min(node.memory_mb, ledger.memory_mb)
        node.disk_mb = min(node.disk_mb, ledger.disk_mb)
        for mine, its in zip(node.gpus, ledger.gpus, strict=True):
            mine.share, mine.memory_mb = min(mine.share, its.share), min(mine.memory_mb, its.memory_mb)

    def close(self, name: str) -> None:
        """Gives it nothing until it is set again."""
        self.places[name] = 0
        self.fleet.set_open(name, False)

    def remove_node(self, name: str) -> None:
        """It is gone, or must get no work: its reservations are made elsewhere."""
        if name in self.fleet.nodes:
            self.fleet.remove(name)
            self.places.pop(name, None)
            self._ledgers.pop(name, None)
            self._count_totals()
        for kept in list(self._reserved_on.get(name, ())):
            self._unreserve(kept.lane)

    def _count_totals(self) -> None:
        nodes = self.fleet.nodes.values()
        self._totals = (
            sum(node.total_cpu_milli for node in nodes),
            sum(node.total_memory_mb for node in nodes),
            sum(len(node.gpus) for node in nodes) * 1000,
        )
        self._part.clear()

    def part_of_all(self, need: Need) -> float:
        """How much of the cluster one node's worth of this need is: of the resource it takes most of."""
        part = self._part.get(need)
        if part is None:
            asked = (need.cpu_milli, need.memory_mb, need.gpu_milli)
            parts = [mine / total for mine, total in zip(asked, self._totals, strict=True) if total > 0]
            part = self._part[need] = max(*parts, 0.0) if parts else 0.0
        return part

    # -- what runs ------------------------------------------------------------------------------------------------

    def began(self, attempt: Running, now: int) -> None:
        """An attempt was given to a node."""
        self.ended(attempt.job, attempt.node, now)
        self.running.setdefault(attempt.node, {})[attempt.job] = attempt
        if attempt.node in self._ledgers:
            ledger = self._ledgers[attempt.node][1]
            ledger.take(attempt.need, ledger.numbers(attempt.gpus))
        self.shares.add(attempt.group, attempt.kind, self.part_of_all(attempt.need), now)

    def ended(self, job: str, node: str, now: int) -> None:
        """It is over there. What it held is free once its node says so (`set_node`)."""
        mine = self.running.get(node, {})
        attempt = mine.pop(job, None)
        if attempt is None:
            return
        if not mine:
            del self.running[node]
        if node in self._ledgers:
            ledger = self._ledgers[node][1]
            ledger.give(attempt.need, ledger.numbers(attempt.gpus))
        self.shares.add(attempt.group, attempt.kind, -self.part_of_all(attempt.need), now)
        for kept in self._reserved_on.get(node, ()):
            kept.awaited.discard(attempt)

    # -- lanes ----------------------------------------------------------------------------------------------------

    def set_lane(self, lane: Lane) -> None:
        """These are the lane's first jobs now; without any it is gone."""
        if lane.heads:
            self.lanes[lane.number] = lane
            return
        self.lanes.pop(lane.number, None)
        self._blocked_since.pop(lane.number, None)
        self._try_again.pop(lane.number, None)
        self._unreserve(lane.number)

    def _head(self, lane: Lane) -> Head | None:
        for head in lane.heads:
            if head.seq not in self.spoken_for:
                return head
        return None

    def _key(self, lane: Lane, head: Head, this: _Round) -> Key:
        share = self.shares.of_group(lane.group, this.now, this.groups[lane.group])
        return (share, lane.kind not in this.below, -head.priority, head.seq)

    # -- a round --------------------------------------------------------------------------------------------------

    def plan(self, now: int, lanes: Iterable[int] | None = None) -> Plan:
        """Decides for these lanes (all, if none are named) what can be decided now. What is assigned is spoken for, and
        taken from its nodes; the caller journals it."""
        this = _Round(now)
        chosen = self.lanes.values() if lanes is None else [self.lanes[n] for n in lanes if n in self.lanes]
        this.below = self.shares.kinds_below_floor({lane.kind for lane in self.lanes.values()}, now, {})
        queue = []
        for lane in chosen:
            head = self._head(lane)
            if head is not None:
                queue.append((self._key(lane, head, this), lane.number))
        heapq.heapify(queue)
        plan = Plan([], [])
        while queue and (self.fleet.open or len(self.reservations) < self.policy.reservations):
            key, number = heapq.heappop(queue)
            lane = self.lanes[number]
            head = self._head(lane)
            if head is None:
                continue
            fresh = self._key(lane, head, this)
            if fresh > key:  # its group has been served since
                heapq.heappush(queue, (fresh, number))
                continue
            members = self._find(lane, fresh, this)
            if members is None:
                self._blocked(lane, head, this, plan)
                continue
            plan.assignments.append(self._assign(lane, head, members, this))
            following = self._head(lane)
            if following is not None:
                heapq.heappush(queue, (self._key(lane, following, this), number))
        return plan

    def _assign(self, lane: Lane, head: Head, members: list[Candidate], this: _Round) -> Assignment:
        told = []
        for member in members:
            node = self.fleet.nodes[member.name]
            told.append((member.name, node.uuids(member.gpus)))
            self.fleet.take(lane.need, member.name, member.gpus)
            self.places[member.name] -= 1
            if self.places[member.name] <= 0:
                self.fleet.set_open(member.name, False)
        part = self.part_of_all(lane.need) * len(members)
        this.groups[lane.group] += part
        this.kinds[lane.kind] += part
        if lane.kind in this.below:
            this.below = self.shares.kinds_below_floor(this.below, this.now, this.kinds)
        self.spoken_for.add(head.seq)
        self._unreserve(lane.number)
        self._blocked_since.pop(lane.number, None)
        return Assignment(head.seq, lane.number, tuple(told))

    def _find(self, lane: Lane, key: Key, this: _Round) -> list[Candidate] | None:
        """The best open node, or as many as a gang needs, that this lane may use now."""
        need = lane.need
        if need.nodes == 1 and not self._reserved_on:
            best = self.fleet.best(need)
            return None if best is None else [best]
        found: list[Candidate] = []
        candidates = self.fleet.candidates(need)
        try:
            for candidate in candidates:
                if self._may_use(lane, key, candidate, this):
                    found.append(candidate)
                    if len(found) == need.nodes:
                        return found
        finally:
            candidates.close()  # type: ignore[attr-defined]  # a generator puts back what it has shown
        return None

    # -- reservations -----------------------------------------------------------------------------------------------

    def _may_use(self, lane: Lane, key: Key, candidate: Candidate, this: _Round) -> bool:
        """Whether taking this node makes no reserved job later that comes earlier in the order."""
        for kept in self._reserved_on.get(candidate.name, ()):
            if kept.lane == lane.number:
                continue
            other = self.lanes.get(kept.lane)
            head = self._head(other) if other is not None else None
            if other is None or head is None or key < self._key(other, head, this):
                continue
            if lane.bound_ms and kept.until_ms < NEVER and this.now + lane.bound_ms <= kept.until_ms:
                continue
            later = self._without(candidate.name, kept.awaited)
            later.take(lane.need, candidate.gpus)
            if later.fitting(kept.need) is None:
                return False
        return True

    def _without(self, name: str, attempts: Iterable[Running]) -> Node:
        """The node as it will be when these have ended."""
        node = self.fleet.nodes[name].copy()
        for attempt in attempts:
            if attempt.node == name:
                node.give(attempt.need, node.numbers(attempt.gpus))
        return node

    def _blocked(self, lane: Lane, head: Head, this: _Round, plan: Plan) -> None:
        """The head fits nowhere now: keep room for it, and have others make way if it is that important."""
        seq, since = self._blocked_since.get(lane.number, (-1, 0))
        if seq != head.seq:
            since = this.now
            self._blocked_since[lane.number] = (head.seq, since)
        kept = self.reservations.get(lane.number)
        if kept is not None and (kept.seq != head.seq or this.now >= kept.until_ms or not kept.awaited):
            self._unreserve(lane.number)
            kept = None
        if kept is None or not kept.preempts:
            waited = this.now - since
            if waited >= self.policy.preempt_after_ms and self._preempt(lane, head, this.now, plan):
                return
        if kept is None and len(self.reservations) < self.policy.reservations:
            if this.now >= self._try_again.get(lane.number, 0):
                self._reserve(lane, head, this.now)
            if lane.number not in self.reservations:
                self._try_again[lane.number] = this.now + LOOK_AGAIN_MS

    def _reserve(self, lane: Lane, head: Head, now: int) -> None:
        """On the nodes where it will fit soonest; nowhere, if it never will."""
        need = self.fleet.could(lane.need)
        if need is None:
            return
        options: list[tuple[int, int, str, list[Running]]] = []
        for name, node in self.fleet.nodes.items():
            if node.admits(need) is not None:
                option = self._soonest(name, node, need, now)
                if option is not None:
                    options.append(option)
        best = heapq.nsmallest(need.nodes, options, key=lambda option: option[:3])
        if len(best) < need.nodes:
            return
        until = max(option[0] for option in best)
        awaited = {attempt for option in best for attempt in option[3]}
        self._keep(Reservation(lane.number, head.seq, need, tuple(o[2] for o in best), until, awaited))

    def _soonest(self, name: str, node: Node, need: Need, now: int) -> tuple[int, int, str, list[Running]] | None:
        """(when it fits, how many must end whose end nobody knows, node, what must end), None if it never fits: what
        is in its way is not ours to wait for."""
        later = node.copy()
        awaited: list[Running] = []
        unknown = 0
        if later.fitting(need) is not None:
            return now, 0, name, awaited  # it fits, but the node is not open at this moment
        ending = sorted(self.running.get(name, {}).values(), key=lambda r: (r.ends_ms, -r.started_ms, r.job))
        for attempt in ending:
            later.give(attempt.need, later.numbers(attempt.gpus))
            awaited.append(attempt)
            unknown += attempt.ends_ms >= NEVER
            if later.fitting(need) is not None:
                return max(attempt.ends_ms, now), unknown, name, awaited
        return None

    def _keep(self, kept: Reservation) -> None:
        self._unreserve(kept.lane)
        self.reservations[kept.lane] = kept
        for name in kept.nodes:
            self._reserved_on[name].append(kept)

    def _unreserve(self, lane: int) -> None:
        kept = self.reservations.pop(lane, None)
        if kept is None:
            return
        for name in kept.nodes:
            left = [other for other in self._reserved_on[name] if other is not kept]
            if left:
                self._reserved_on[name] = left
            else:
                del self._reserved_on[name]

    # -- preemption -------------------------------------------------------------------------------------------------

    def _preempt(self, lane: Lane, head: Head, now: int, plan: Plan) -> bool:
        """Has the least important work that is in the way stopped. False if that would not help."""
        below = head.priority - self.policy.preempt_gap
        need = self.fleet.could(lane.need)
        if below < 0 or need is None or any(kept.preempts for kept in self.reservations.values()):
            return False  # one at a time: each changes what the next one would have to stop
        options: list[tuple[int, int, int, str, list[Running], list[Running]]] = []
        for name, node in self.fleet.nodes.items():
            if node.admits(need) is not None:
                option = self._victims(name, node, need, below, now)
                if option is not None:
                    options.append(option)
        best = heapq.nsmallest(need.nodes, options, key=lambda option: option[:4])
        if len(best) < need.nodes:
            return False
        victims = [victim for option in best for victim in option[4]]
        awaited = {attempt for option in best for attempt in option[5]}
        kept = Reservation(lane.number, head.seq, need, tuple(option[3] for option in best), NEVER, awaited, True)
        self._keep(kept)
        if victims:
            for victim in victims:
                victim.stopping = True
            # Not again before these have ended and their nodes have said so, or more than is needed would be stopped.
            patience = max(victim.grace_ms for victim in victims)
            self._blocked_since[lane.number] = (head.seq, now + patience)
            plan.preemptions.append(Preemption(head.seq, lane.number, tuple(victims)))
        return True

    def _victims(
        self, name: str, node: Node, need: Need, below: int, now: int
    ) -> tuple[int, int, int, str, list[Running], list[Running]] | None:
        """(highest priority stopped, how many, their running time, node, whom to stop, what must end), None if stopping
        all that may be stopped is not enough."""
        here = self.running.get(name, {}).values()
        later = node.copy()
        ending = [attempt for attempt in here if attempt.stopping]
        for attempt in ending:
            later.give(attempt.need, later.numbers(attempt.gpus))
        weak = [a for a in here if not a.stopping and a.preemptible and a.priority <= below and a.need.nodes == 1]
        weak.sort(key=lambda a: (a.priority, -a.started_ms, a.job))
        stopped: list[Running] = []
        for attempt in weak:
            if later.fitting(need) is not None:
                break
            later.give(attempt.need, later.numbers(attempt.gpus))
            stopped.append(attempt)
        if later.fitting(need) is None:
            return None
        for attempt in list(stopped):  # the first ones may turn out not to have been needed
            gpus = later.numbers(attempt.gpus)
            later.take(attempt.need, gpus)
            if later.fitting(need) is not None:
                stopped.remove(attempt)
            else:
                later.give(attempt.need, gpus)
        worst = max((attempt.priority for attempt in stopped), default=-1)
        lost = sum(max(now - attempt.started_ms, 0) for attempt in stopped)
        return worst, len(stopped), lost, name, stopped, ending + stopped
