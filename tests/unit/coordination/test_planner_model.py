"""Any history of nodes, jobs, ends, deaths, cordons and late words: the planner never gives what is not there.

The truth is kept apart (`scheduling.Truth`): what was given to a node runs there until it ends, whatever the planner
thinks. A node's word on what is free may come at any moment, also between a decision and its commit, and may be older
than what has been given to it since.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordination.fleet import Fleet
from coordination.lane import Head
from coordination.placement import Offer
from coordination.planner import NEVER, Assignment, Began, Lane, Planner, PlanPolicy
from coordination.shares import Shares
from tests.unit.coordination.scheduling import SECOND, Packed, Truth, box, need

NEEDS = [
    need(),
    need(cpus=4, memory_mb=30_000),
    need(gpus=1),
    need(gpus=1, gpu_share=0.3, gpu_memory_mb=9_000),
    need(gpus=1, gpu_memory_mb=30_000, gpu_share=0.1),
    need(gpus=2),
    need(gpus=4, cpus=0),
    need(gpus=1, gpu_model="H100"),
    need(labels={"zone": "eu"}),
    need(not_labels={"zone": "eu"}),
    need(anti_affinity="db", cpus=0.5),
    need(nodes=2),
    need(gpus=2, nodes=3),
    need(node="n1"),
    need(prefer="gpus"),
    need(gpus=1, avoid=["n0"]),
    need(disk_mb=600),
]
OFFERS = [
    box("n0", cpus=4, gpus=4), box("n1", cpus=2, zone="eu"), box("n2", cpus=8, gpus=2, model="H100"),
    box("n3", cpus=3, gpus=2, zone="eu"),
]  # fmt: skip
NUMBERS = st.integers(0, 1 << 16)
PLACES = 6


class Machine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.planner = Planner(Fleet(Packed()), Shares({"b": 2.0}), PlanPolicy(preempt_after_ms=2 * SECOND))
        self.truth = Truth(OFFERS)
        self.now = 0
        self.jobs: dict[int, tuple[int, int]] = {}  # seq -> lane, priority
        self.pending: dict[int, list[int]] = {}
        self.committing: list[tuple[Assignment, dict[str, Offer]]] = []
        self.where: dict[int, list[str]] = {}
        self.down: set[str] = set()
        self.words: dict[str, Offer] = {}  # the newest that a node has said of what is free
        self.waits: set[str] = set()

    # -- nodes --------------------------------------------------------------------------------------------------------

    def here(self, number: int) -> str:
        return OFFERS[number % len(OFFERS)].node

    def places(self, name: str) -> int:
        return PLACES - len(self.truth.held[name])

    @rule(number=NUMBERS)
    def claims(self, number: int) -> None:
        """Its room as it is, and it waits for work; perhaps while something is being committed for it."""
        name = self.here(number)
        if name not in self.down:
            self.words[name] = self.truth.free(name)
            self.waits.add(name)
            self.planner.set_node(self.words[name], self.truth.total[name], self.places(name))

    @rule(number=NUMBERS)
    def repeats_itself(self, number: int) -> None:
        """An older word is taken up again, since something about the node has changed."""
        name = self.here(number)
        if name in self.words and name not in self.down:
            self.planner.set_node(self.words[name], self.truth.total[name], self.places(name), waits=name in self.waits)

    @rule(number=NUMBERS)
    def hangs_up(self, number: int) -> None:
        self.waits.discard(self.here(number))
        self.planner.close(self.here(number))

    @rule(number=NUMBERS)
    def is_cordoned(self, number: int) -> None:
        self.waits.discard(self.here(number))
        self.planner.remove_node(self.here(number))

    @rule(number=NUMBERS)
    def dies(self, number: int) -> None:
        name = self.here(number)
        self.down.add(name)
        self.waits.discard(name)
        self.planner.remove_node(name)
        for seq in [seq for seq, nodes in self.where.items() if name in nodes]:
            self.is_over(seq)
            self.put_back(seq)

    @precondition(lambda self: self.down)
    @rule(number=NUMBERS)
    def comes_back(self, number: int) -> None:
        self.down.discard(sorted(self.down)[number % len(self.down)])

    # -- jobs ---------------------------------------------------------------------------------------------------------

    @rule(
        shape=st.integers(0, len(NEEDS) - 1),
        bounded=st.booleans(),
        priority=st.sampled_from([10, 50, 90]),
        n=st.integers(1, 4),
    )
    def arrive(self, shape: int, bounded: bool, priority: int, n: int) -> None:
        lane = shape * 2 + bounded
        for _ in range(n):
            seq = len(self.jobs)
            self.jobs[seq] = (lane, priority)
            self.pending.setdefault(lane, []).append(seq)
        self.tell(lane)

    def put_back(self, seq: int) -> None:
        lane = self.jobs[seq][0]
        self.pending.setdefault(lane, []).append(seq)
        self.tell(lane)

    def tell(self, lane: int) -> None:
        waiting = sorted((-self.jobs[seq][1], seq) for seq in self.pending.get(lane, []))
        self.planner.set_lane(
            Lane(
                number=lane,
                need=NEEDS[lane // 2],
                group="ab"[lane % 2],
                kind=f"k{lane % 3}",
                bound_ms=10 * SECOND if lane % 2 else 0,
                heads=[Head(seq, -priority, lane) for priority, seq in waiting[:4]],
                count=len(waiting),
            )
        )

    @rule(seconds=st.sampled_from([0, 1, 5, 60]), partly=st.booleans(), thorough=st.booleans())
    def plan(self, seconds: int, partly: bool, thorough: bool) -> None:
        self.now += seconds * SECOND
        lanes = sorted(self.planner.lanes)[::2] if partly else None
        plan = self.planner.plan(self.now, lanes, thorough=thorough)
        assert not plan.unfinished
        for decision in plan.assignments:
            lane, _ = self.jobs[decision.seq]
            assert decision.seq in self.pending[lane], "placed twice"
            assert decision.seq not in [other.seq for other, _ in self.committing]
            assert len({name for name, _ in decision.members}) == len(decision.members) == NEEDS[lane // 2].nodes
            assert {name for name, _ in decision.members} <= self.waits, "it did not ask for work"
            self.committing.append((decision, {}))
        for preemption in plan.preemptions:
            for victim in preemption.victims:
                assert victim.priority <= self.jobs[preemption.seq][1] - 20
                assert victim.attempt, "it has not begun"
        for decision in plan.assignments:
            for name, _ in decision.members:
                self.waits.discard(name)
                self.planner.close(name)

    @precondition(lambda self: self.committing)
    @rule(number=NUMBERS, refused=st.sampled_from([False, False, False, True]))
    def is_committed(self, number: int, refused: bool) -> None:
        decision, _ = self.committing.pop(number % len(self.committing))
        lane, _ = self.jobs[decision.seq]
        nodes = [name for name, _ in decision.members]
        if refused or any(name in self.down for name in nodes):
            self.planner.settled(decision, [], self.now)
            self.tell(lane)
            return
        self.pending[lane].remove(decision.seq)
        ends = self.now + 10 * SECOND if lane % 2 else NEVER
        began = []
        for name, gpus in decision.members:
            self.truth.begin(name, decision.seq, NEEDS[lane // 2], gpus)
            began.append(Began(name, str(decision.seq), 1, ends, SECOND, True))
        self.where[decision.seq] = nodes
        self.planner.settled(decision, began, self.now)
        self.tell(lane)
        assert all(self.places(name) >= 0 for name in nodes), "more jobs than places"

    @rule(seconds=st.sampled_from([1, 5, 20]), ends=st.integers(0, 6), commits=st.integers(0, 9))
    def everybody_claims_and_much_happens(self, seconds: int, ends: int, commits: int) -> None:
        """As it goes most of the time."""
        for number in range(len(OFFERS)):
            self.claims(number)
        self.plan(seconds, False, True)
        for number in range(min(commits, len(self.committing))):
            self.is_committed(number, False)
        for number in range(min(ends, len(self.where))):
            self.ends_or_is_released(number * 7, True)

    def is_over(self, seq: int) -> None:
        for name in self.where.pop(seq):
            self.truth.end(name, seq)
            self.planner.ended(str(seq), name, self.now)

    @precondition(lambda self: self.where)
    @rule(number=NUMBERS, ended=st.booleans())
    def ends_or_is_released(self, number: int, ended: bool) -> None:
        seq = sorted(self.where)[number % len(self.where)]
        self.is_over(seq)
        if not ended:
            self.put_back(seq)

    # -- what holds always --------------------------------------------------------------------------------------------

    @invariant()
    def books_are_in_order(self) -> None:
        planner = self.planner
        assert planner.spoken_for == {decision.seq for decision, _ in self.committing}
        running = {(name, job) for name, mine in planner.running.items() for job in mine}
        begun = {(name, str(seq)) for seq, nodes in self.where.items() for name in nodes}
        under_way = {(name, f"#{d.seq}") for d, _ in self.committing for name, _ in d.members}
        assert running == begun | under_way
        for name, on in planner.kept.on.items():
            assert on
            assert all(name in kept.members and planner.reservations[kept.lane] is kept for kept in on)
        for lane, kept in planner.reservations.items():
            assert lane in planner.lanes
            assert all(kept in planner.kept.on[name] for name in kept.members)
            awaited = {(attempt.node, attempt.job) for attempt in kept.awaited}
            assert awaited <= running
            assert all(other in planner.reservations.values() for other in kept.after)

    @invariant()
    def no_open_node_is_believed_to_have_more_than_it_has(self) -> None:
        for name in self.planner.fleet.open:
            believed, true = self.planner.fleet.nodes[name], self.truth.free(name)
            assert 0 <= believed.cpu_milli <= true.cpus * 1000
            assert 0 <= believed.memory_mb <= true.memory_mb
            for card, real in zip(believed.gpus, true.gpus, strict=True):
                assert 0 <= card.share <= round(real.share_free * 1000)
                assert 0 <= card.memory_mb <= real.memory_free_mb

    def teardown(self) -> None:
        """When all has ended, all is free again."""
        if not hasattr(self, "planner"):
            return
        for decision, _ in self.committing:
            self.planner.settled(decision, [], self.now)
        for seq in list(self.where):
            self.is_over(seq)
        for lane in list(self.planner.lanes):
            self.planner.set_lane(Lane(number=lane, need=NEEDS[lane // 2]))
        assert not (self.planner.running or self.planner.reservations or self.planner.spoken_for)
        for offer in OFFERS:
            self.planner.set_node(offer, offer, PLACES)
            node = self.planner.fleet.nodes[offer.node]
            whole: Any = (node.total_cpu_milli, node.total_memory_mb, node.total_disk_mb)
            assert (node.cpu_milli, node.memory_mb, node.disk_mb) == whole
            assert all((gpu.share, gpu.memory_mb) == (1000, gpu.total_mb) for gpu in node.gpus)
            assert not any(node.tags.values())


TestPlannerAgreesWithTheTruth = Machine.TestCase
TestPlannerAgreesWithTheTruth.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
