"""A cluster in virtual time: jobs arrive, run as long as they run, end; the planner decides. Discrete events.

Pure: no asyncio, no queue, no wire; the only randomness is a seed. What really holds which GPU is kept here in a simple
way of its own (`Truth`), so that a mistake in the planner's books cannot hide in them. All times are milliseconds.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from coordination.fleet import Fleet
from coordination.lane import Head
from coordination.placement import GpuOffer, Need, Node, Offer, compile_need, with_defaults
from coordination.planner import NEVER, Assignment, Began, Lane, Planner, PlanPolicy, Preemption, Running
from coordination.shares import Shares

SECOND = 1_000
PLACES = 64


class FirstGpus:
    """A scoring that only packs: the node with the least left, the GPUs with the lowest numbers."""

    epoch = 0

    def cost(self, need: Need, node: Node, free: Sequence[int]) -> tuple[float, tuple[int, ...]]:
        return float(sum(gpu.share for gpu in node.gpus) + node.cpu_milli), tuple(free[: need.gpus])


class Packed(FirstGpus):
    """And a part of a GPU goes to the one that has least left, as a real scoring does."""

    epoch = 0

    def cost(self, need: Need, node: Node, free: Sequence[int]) -> tuple[float, tuple[int, ...]]:
        fullest = sorted(free, key=lambda n: (node.gpus[n].share, node.gpus[n].memory_mb, n))
        return super().cost(need, node, sorted(fullest[: need.gpus]))


def need(**requires: Any) -> Need:
    return compile_need(with_defaults(requires))


def box(
    name: str, *, cpus: float = 8, gpus: int = 0, memory_mb: int = 64_000, model: str = "A100", **labels: str
) -> Offer:
    cards = tuple(
        GpuOffer(uuid=f"{name}-{n}", model=model, memory_mb=40_000, memory_free_mb=40_000, compute_capability="8.0")
        for n in range(gpus)
    )
    return Offer(node=name, cpus=cpus, memory_mb=memory_mb, disk_mb=1_000, gpus=cards, labels=labels)


@dataclass(slots=True, kw_only=True)
class Job:
    """One job. It ends after `lasts` of running; `bound` is its limit (0: none)."""

    lane: int
    need: Need
    lasts: int
    bound: int = 0
    group: str = "default"
    kind: str = "command"
    priority: int = 50
    preemptible: bool = True
    grace: int = SECOND
    seq: int = -1
    arrived: int = 0
    starts: list[int] = field(default_factory=list)
    ended: int | None = None

    @property
    def started(self) -> int | None:
        return self.starts[-1] if self.starts else None


class Truth:
    """What runs where. Speaks up when a node is given more than it has, or what it may not serve."""

    def __init__(self, offers: Iterable[Offer]) -> None:
        self.total = {offer.node: offer for offer in offers}
        self.held: dict[str, dict[int, tuple[Need, tuple[str, ...]]]] = {name: {} for name in self.total}

    def begin(self, node: str, seq: int, wanted: Need, gpus: tuple[str, ...]) -> None:
        assert node in self.total, f"job {seq} was given to {node}, which is gone"
        assert seq not in self.held[node], f"job {seq} is on {node} twice"
        assert len(gpus) == wanted.gpus == len(set(gpus))
        self.held[node][seq] = (wanted, gpus)
        self.check(node, wanted, gpus)

    def check(self, node: str, wanted: Need, gpus: tuple[str, ...]) -> None:
        offer, held = self.total[node], self.held[node].values()
        assert all(offer.labels.get(name) == value for name, value in wanted.labels)
        assert not any(offer.labels.get(name) == value for name, value in wanted.not_labels)
        assert wanted.node in (None, node)
        assert sum(mine.cpu_milli for mine, _ in held) <= offer.cpus * 1000
        assert sum(mine.memory_mb for mine, _ in held) <= offer.memory_mb
        assert sum(mine.disk_mb for mine, _ in held) <= offer.disk_mb
        words = Counter(mine.anti_affinity for mine, _ in held if mine.anti_affinity)
        assert not words or max(words.values()) == 1
        share: Counter[str] = Counter()
        memory: Counter[str] = Counter()
        for mine, uuids in held:
            for uuid in uuids:
                share[uuid] += mine.share
                memory[uuid] += mine.gpu_memory_mb
        cards = {gpu.uuid: gpu for gpu in offer.gpus}
        for uuid in share:
            assert share[uuid] <= 1000, f"{uuid} is shared out more than once"
            assert memory[uuid] <= cards[uuid].memory_mb
        for uuid in gpus:
            assert cards[uuid].healthy
            assert wanted.model is None or wanted.model.search(cards[uuid].model)
            assert tuple(int(part) for part in cards[uuid].compute_capability.split(".")) >= wanted.capability

    def end(self, node: str, seq: int) -> None:
        del self.held[node][seq]

    def free(self, node: str) -> Offer:
        """What the node itself would say is free."""
        offer, held = self.total[node], list(self.held[node].values())
        cards = []
        for gpu in offer.gpus:
            mine = [wanted for wanted, uuids in held if gpu.uuid in uuids]
            cards.append(
                GpuOffer(
                    uuid=gpu.uuid,
                    model=gpu.model,
                    memory_mb=gpu.memory_mb,
                    memory_free_mb=gpu.memory_mb - sum(wanted.gpu_memory_mb for wanted in mine),
                    share_free=1 - sum(wanted.share for wanted in mine) / 1000,
                    compute_capability=gpu.compute_capability,
                    healthy=gpu.healthy,
                )
            )
        return Offer(
            node=node,
            cpus=offer.cpus - sum(wanted.cpu_milli for wanted, _ in held) / 1000,
            memory_mb=offer.memory_mb - sum(wanted.memory_mb for wanted, _ in held),
            disk_mb=offer.disk_mb - sum(wanted.disk_mb for wanted, _ in held),
            gpus=tuple(cards),
            labels=offer.labels,
        )

    def places(self, node: str) -> int:
        return PLACES - len(self.held[node])


class Simulation:
    """`run` plays until nothing is left to happen, or until a moment. `backfill=False`: nobody may overtake, which is
    what backfilling is measured against."""

    def __init__(
        self,
        offers: Sequence[Offer],
        *,
        policy: PlanPolicy | None = None,
        weights: dict[str, float] | None = None,
        floors: dict[str, float] | None = None,
        half_life_ms: int = 600 * SECOND,
        backfill: bool = True,
        tick_ms: int = SECOND,
    ) -> None:
        self.truth, self.now, self._backfill, self._tick_ms = Truth(offers), 0, backfill, tick_ms
        policy = policy or PlanPolicy(reservations=8 if backfill else 0)
        self.planner = Planner(Fleet(Packed()), Shares(weights, floors, half_life_ms), policy)
        self.jobs: dict[int, Job] = {}
        self.pending: defaultdict[int, list[int]] = defaultdict(list)  # by lane
        self.promised: dict[int, int] = {}  # job -> the first moment it was promised
        self.decisions: list[Assignment] = []
        self.preemptions: list[Preemption] = []
        self.on_end: Callable[[Job], None] = lambda job: None
        self._where: dict[int, tuple[str, ...]] = {}
        self._numbers, self._order = count(), count()
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._ticking = False
        for name in self.truth.total:
            self._tell(name)

    # -- what happens -------------------------------------------------------------------------------------------------

    def at(self, moment: int, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._order), happens))

    def submit(self, job: Job, at: int | None = None) -> Job:
        def arrives() -> None:
            job.seq, job.arrived = next(self._numbers), self.now
            self.jobs[job.seq] = job
            self.pending[job.lane].append(job.seq)
            self._lane(job)

        self.at(self.now if at is None else at, arrives)
        return job

    def run(self, until: int = NEVER) -> None:
        while self._events and self._events[0][0] <= until:
            self.now = self._events[0][0]
            while self._events and self._events[0][0] == self.now:
                heapq.heappop(self._events)[2]()
            self._decide()
            if not self._ticking and any(self.pending.values()) and any(self.truth.held.values()):
                self._ticking = True
                self.at(self.now + self._tick_ms, self._tick)

    def _tick(self) -> None:
        self._ticking = False

    def _lane(self, job: Job) -> None:
        waiting = sorted((-self.jobs[seq].priority, seq) for seq in self.pending[job.lane])[:16]
        self.planner.set_lane(
            Lane(
                number=job.lane,
                need=job.need,
                group=job.group,
                kind=job.kind,
                bound_ms=job.bound,
                preemptible=job.preemptible,
                heads=[Head(seq, -priority, job.lane) for priority, seq in waiting],
                count=len(self.pending[job.lane]),
            )
        )

    def _tell(self, node: str) -> None:
        self.planner.set_node(self.truth.free(node), self.truth.total[node], self.truth.places(node))

    # -- decisions ----------------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        while True:
            lanes = None if self._backfill else self._first_lane()
            plan = self.planner.plan(self.now, lanes)
            for kept in self.planner.reservations.values():
                if kept.until_ms < NEVER:
                    self.promised.setdefault(kept.seq, kept.until_ms)
            for decision in plan.assignments:
                self._begin(decision)
            for preemption in plan.preemptions:
                self.preemptions.append(preemption)
                for victim in preemption.victims:
                    self.at(self.now + victim.grace_ms, lambda victim=victim: self._stop(victim))  # type: ignore[misc]
            if not plan.assignments:
                return

    def _first_lane(self) -> list[int]:
        waiting = [(min(seqs), lane) for lane, seqs in self.pending.items() if seqs]
        return [min(waiting)[1]] if waiting else []

    def _begin(self, decision: Assignment) -> None:
        job = self.jobs[decision.seq]
        assert decision.seq in self.pending[job.lane], f"job {decision.seq} was placed twice"
        assert len({node for node, _ in decision.members}) == job.need.nodes
        self.decisions.append(decision)
        self.pending[job.lane].remove(decision.seq)
        self._lane(job)
        job.starts.append(self.now)
        attempt = len(job.starts)
        began = []
        for node, gpus in decision.members:
            self.truth.begin(node, job.seq, job.need, gpus)
            ends = self.now + job.bound if job.bound else NEVER
            preemptible = job.preemptible and not decision.owed
            began.append(Began(node, str(job.seq), attempt, ends, job.grace, preemptible))
        self._where[job.seq] = tuple(node for node, _ in decision.members)
        self.planner.settled(decision, began, self.now)
        for node in self._where[job.seq]:
            self._tell(node)
        assert not job.bound or job.lasts <= job.bound
        self.at(self.now + job.lasts, lambda: self._end(job, attempt))

    def _leave(self, job: Job) -> None:
        for node in self._where.pop(job.seq):
            self.truth.end(node, job.seq)
            self.planner.ended(str(job.seq), node, self.now)
            self._tell(node)

    def _end(self, job: Job, attempt: int) -> None:
        if attempt == len(job.starts) and job.seq in self._where:
            self._leave(job)
            job.ended = self.now
            self.on_end(job)

    def _stop(self, victim: Running) -> None:
        job = self.jobs[int(victim.job)]
        if victim.attempt == len(job.starts) and job.seq in self._where:
            self._leave(job)
            self.pending[job.lane].append(job.seq)
            self._lane(job)


def utilisation(simulation: Simulation) -> float:
    """Part of all GPU time until the last end that jobs used."""
    ended = [job for job in simulation.jobs.values() if job.ended is not None]
    used = sum(job.need.gpu_milli * job.need.nodes * job.lasts for job in ended)
    gpus = sum(len(offer.gpus) for offer in simulation.truth.total.values())
    return used / (1000 * gpus * max(job.ended or 0 for job in ended))


def mixed(seed: int, n: int, *, groups: str = "ab", gangs: bool = True, longest_s: int = 100) -> list[Job]:
    """Jobs of mixed sizes and durations; one in ten wants whole nodes or several."""
    dice = random.Random(seed)
    shapes: list[dict[str, Any]] = [
        {"gpus": 1, "gpu_share": 0.25, "gpu_memory_mb": 8_000},
        {"gpus": 1},
        {"gpus": 1, "cpus": 4, "memory_mb": 20_000},
        {"gpus": 2},
        {"cpus": 3},
        {"gpus": 4, "cpus": 8},
    ]
    if gangs:
        shapes.append({"gpus": 2, "nodes": 2})
    needs = [need(**shape) for shape in shapes]
    made = []
    for _ in range(n):
        shape = dice.choices(range(len(shapes)), [6, 6, 3, 3, 3, 2, 1][: len(shapes)])[0]
        bound = dice.choice([20, 50, longest_s]) * SECOND
        group = dice.choice(groups)
        lane = (shape * 8 + [20, 50, longest_s].index(bound // SECOND)) * 8 + groups.index(group)
        made.append(Job(lane=lane, need=needs[shape], bound=bound, lasts=dice.randint(bound // 4, bound), group=group))
    return made
