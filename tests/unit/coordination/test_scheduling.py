"""Over time: who waits how long, what is promised is kept, and the nodes are not idle for it (see `scheduling`)."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from coordination.planner import PlanPolicy
from tests.unit.coordination.scheduling import SECOND, Job, Simulation, box, mixed, need, utilisation

SEEDS = st.integers(0, 1 << 32)
GENERATE = (Phase.explicit, Phase.reuse, Phase.generate)  # a smaller seed is not a simpler case
few = settings(max_examples=12, deadline=None, phases=GENERATE, suppress_health_check=list(HealthCheck))


# -- what is promised is kept ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gangs", [False, True], ids=["single nodes", "gangs too"])
@given(seed=SEEDS)
@few
def test_backfill_never_delays_a_reserved_job(seed: int, gangs: bool) -> None:
    """Jobs of equal priority, of groups whose shares change all the time: whoever has been promised a moment starts at
    that moment or before, whatever has come and started since."""
    dice = random.Random(seed)
    simulation = Simulation([box(f"n{n}", gpus=4) for n in range(dice.choice([1, 2, 4]) if not gangs else 4)])
    at = 0
    for job in mixed(seed, 150, gangs=gangs, groups="abc"):
        simulation.submit(job, at)
        at += dice.randint(0, 12 * SECOND // len(simulation.truth.total))
    simulation.run()
    note(f"seed {seed}")
    assert all(job.ended is not None for job in simulation.jobs.values())
    late = {
        seq: (promised, simulation.jobs[seq].starts)
        for seq, promised in simulation.promised.items()
        if simulation.jobs[seq].starts[0] > promised
    }
    assert not late, f"seed {seed}: (promised, started)"
    assert simulation.promised, "some had to wait for a promised moment"


@given(seed=SEEDS)
@few
def test_gang_of_eight_starts_within_its_reservation(seed: int) -> None:
    """Eight nodes, always busy with small jobs of others that never end coming: the gang needs all of them at once. It
    starts when it was promised to: after what runs when it comes, and after what was promised room before it."""
    dice = random.Random(seed)
    simulation = Simulation([box(f"n{n}", gpus=2) for n in range(8)])
    small, longest = need(gpus=1), 60 * SECOND

    def flood(at: int) -> None:
        bound = dice.choice([15, 30, 60]) * SECOND
        lane = 1 + bound // (15 * SECOND)
        lasts = dice.randint(1, bound)
        simulation.submit(Job(lane=lane, need=small, lasts=lasts, bound=bound, group=f"g{lane}"), at)

    for n in range(40):
        flood(n)
    simulation.on_end = lambda job: flood(simulation.now)
    came = 200 * SECOND
    gang = simulation.submit(Job(lane=99, need=need(gpus=2, nodes=8), lasts=SECOND, bound=SECOND, group="late"), came)
    simulation.run(until=came + 4 * longest)
    assert gang.started is not None, f"seed {seed}"
    assert gang.started <= simulation.promised.get(gang.seq, came) <= came + 2 * longest, f"seed {seed}"


def test_backfilling_keeps_the_gpus_busier() -> None:
    gains = []
    for seed in range(8):
        used = []
        for backfill in (True, False):
            simulation = Simulation([box(f"n{n}", gpus=4) for n in range(4)], backfill=backfill)
            for job in mixed(seed, 200, groups="a"):
                simulation.submit(job, 0)
            simulation.run()
            assert all(job.ended is not None for job in simulation.jobs.values()), f"seed {seed}"
            used.append(utilisation(simulation))
        gains.append(used[0] / used[1])
    assert min(gains) > 1.0, gains
    assert sum(gains) / len(gains) > 1.15, gains


def test_unknown_times_are_waited_out_without_being_overtaken() -> None:
    """Nothing here has a limit, so nobody knows when; but the room is kept, and it comes."""
    simulation = Simulation([box("n1", gpus=4), box("n2", gpus=4)])
    small = need(gpus=1)

    def again(job: Job) -> None:
        if job.lane == 1:
            simulation.submit(Job(lane=1, need=small, lasts=job.lasts, group="b"))

    simulation.on_end = again
    for n in range(12):
        simulation.submit(Job(lane=1, need=small, lasts=(20 + n) * SECOND, group="b"))
    whole = simulation.submit(Job(lane=2, need=need(gpus=4), lasts=SECOND, group="a"), 5 * SECOND)
    simulation.run(until=120 * SECOND)
    assert whole.started is not None
    assert whole.started <= (5 + 2 * 31) * SECOND
    assert whole.seq not in simulation.promised


# -- nobody starves --------------------------------------------------------------------------------------------------


class Flood:
    """Every kind of every group always has work pending, for as long as the simulation lasts."""

    HALF_LIFE = 20 * SECOND
    RESERVATIONS = 2
    LONGEST, SHORTEST = 20 * SECOND, 4 * SECOND

    def __init__(self, seed: int) -> None:
        self.dice = dice = random.Random(seed)
        self.groups = [f"g{n}" for n in range(dice.randint(1, 3))]
        self.kinds = [f"k{n}" for n in range(dice.randint(1, 3))]
        self.weights = {group: dice.choice([1.0, 1.0, 3.0]) for group in self.groups}
        nodes = [box(f"n{n}", cpus=8, gpus=dice.choice([0, 2, 2])) for n in range(dice.randint(2, 4))]
        nodes.append(box("big", cpus=8, gpus=2))
        self.simulation = Simulation(
            nodes,
            weights=self.weights,
            half_life_ms=self.HALF_LIFE,
            tick_ms=5 * SECOND,
            policy=PlanPolicy(reservations=self.RESERVATIONS, preempt_after_ms=2 * SECOND),
        )
        shapes = [need(gpus=1), need(gpus=2, cpus=8), need(cpus=2), need(gpus=1, gpu_share=0.5), need(gpus=1, nodes=2)]
        shapes = [shape for shape in shapes if sum(len(node.gpus) >= shape.gpus for node in nodes) >= shape.nodes]
        self.templates = []
        urgency = dict(zip(self.groups, dice.sample([10, 50, 90], len(self.groups)), strict=True))
        for group in self.groups:
            for kind in self.kinds:
                for shape in dice.sample(shapes, dice.randint(1, 2)):
                    self.templates.append(
                        (group, kind, shape, urgency[group] + dice.choice([-10, 0, 10]), dice.random() < 0.8)
                    )
        self.served: dict[str, list[int]] = {name: [0] for name in (*self.groups, *self.kinds)}
        self.simulation.on_end = self.ended
        for lane in range(len(self.templates)):
            self.submit(lane)
            self.submit(lane)

    def submit(self, lane: int) -> None:
        group, kind, shape, priority, preemptible = self.templates[lane]
        bound = self.dice.choice([5, 10, 20]) * SECOND if not lane % 2 else self.LONGEST
        self.simulation.submit(
            Job(
                lane=lane, need=shape, lasts=self.dice.randint(self.SHORTEST, min(bound, self.LONGEST)),
                bound=self.LONGEST, group=group, kind=kind, priority=priority, preemptible=preemptible,
            )
        )  # fmt: skip

    def ended(self, job: Job) -> None:
        for name in (job.group, job.kind):
            self.served[name].append(self.simulation.now)
        self.submit(job.lane)

    def bound_of_a_group(self) -> float:
        """How long a group can be without an end of one of its jobs.

        Whoever comes first in the order has room kept for it behind at most `RESERVATIONS` others, each of which takes
        at most `LONGEST` to start and as long to end: a turn is over after `turn`. A group that has nothing for a time
        t has at most 2^(-t/half-life) x 2 left in its account. One that is served gains at least q (the least job, for
        the shortest time). In as many turns as there are groups some other one comes first twice; the second time it
        has q, halved for that while, in its account. So once 2^(-t/half-life) x 2 x weights < q that cannot be.
        """
        simulation = self.simulation
        least = min(simulation.planner.part_of_all(shape) for _, _, shape, _, _ in self.templates)
        q = least * (1 - 0.5 ** (self.SHORTEST / self.HALF_LIFE))
        turn = (self.RESERVATIONS + 2) * self.LONGEST
        weights = max(self.weights.values()) / min(self.weights.values())
        return self.HALF_LIFE * math.log2(2 * weights / q) + 2 * len(self.groups) * turn + self.LONGEST

    def bound_of_a_kind(self) -> float:
        """Below its floor it is first when its group is, but for other kinds below theirs that are more important; each
        of those is above its floor again after a half-life in which it is served."""
        return len(self.kinds) * (self.bound_of_a_group() + self.HALF_LIFE)


@given(seed=SEEDS)
@settings(max_examples=10, deadline=None, phases=GENERATE, suppress_health_check=list(HealthCheck))
def test_no_group_and_no_kind_starves(seed: int) -> None:
    """Endless work of all priorities, preemption allowed: each group and kind ends a job at least every so often."""
    flood = Flood(seed)
    horizon = int(1.2 * flood.bound_of_a_kind())
    flood.simulation.run(until=horizon)
    note(f"seed {seed}")
    for names, bound in ((flood.groups, flood.bound_of_a_group()), (flood.kinds, flood.bound_of_a_kind())):
        for name in names:
            times = [*flood.served[name], horizon]
            longest = max(after - before for before, after in pairwise(times))
            assert longest <= bound, f"seed {seed}: {name} had nothing for {longest / SECOND:.0f} s"


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0)])
def test_groups_get_what_their_weights_say(weights: tuple[float, float]) -> None:
    """Jobs of one size, more than fit: the time each group holds GPUs is as its weight. One job at a time too."""
    for gpus in (1, 4):
        simulation = Simulation([box("n", gpus=gpus)], weights=dict(zip("ab", weights, strict=True)))
        held = {"a": 0, "b": 0}

        def again(job: Job, simulation: Simulation = simulation, held: dict[str, int] = held) -> None:
            held[job.group] += job.lasts
            simulation.submit(Job(lane=job.lane, need=job.need, lasts=10 * SECOND, group=job.group))

        simulation.on_end = again
        for lane, group in enumerate("ab"):
            for _ in range(6):
                simulation.submit(Job(lane=lane, need=need(gpus=1), lasts=10 * SECOND, group=group))
        simulation.run(until=4_000 * SECOND)
        assert held["b"] / held["a"] == pytest.approx(weights[1] / weights[0], rel=0.15)


def test_urgent_work_that_never_ends_leaves_every_kind_its_floor() -> None:
    simulation = Simulation([box("n", gpus=2)], floors={"selfplay": 0.2}, half_life_ms=60 * SECOND)
    held = {"training": 0, "selfplay": 0}

    def again(job: Job) -> None:
        held[job.kind] += job.lasts
        simulation.submit(
            Job(
                lane=job.lane, need=job.need, lasts=10 * SECOND, bound=10 * SECOND, kind=job.kind, priority=job.priority
            )
        )

    simulation.on_end = again
    for lane, (kind, priority) in enumerate([("training", 100), ("selfplay", 10)]):
        for _ in range(4):
            simulation.submit(
                Job(lane=lane, need=need(gpus=1), lasts=10 * SECOND, bound=10 * SECOND, kind=kind, priority=priority)
            )
    simulation.run(until=2_000 * SECOND)
    assert held["selfplay"] / sum(held.values()) == pytest.approx(0.2, abs=0.05)
    assert not simulation.preemptions, "what a floor has started no priority stops"


# -- books -----------------------------------------------------------------------------------------------------------


@given(seed=SEEDS)
@few
def test_everything_taken_is_given_back(seed: int) -> None:
    simulation = Simulation([box(f"n{n}", gpus=4) for n in range(3)])
    for job in mixed(seed, 60):
        simulation.submit(job, random.Random(seed).randint(0, 300) * SECOND)
    simulation.run()
    planner = simulation.planner
    assert not (planner.running or planner.reservations or planner.spoken_for or planner.kept.on), f"seed {seed}"
    for node in planner.fleet.nodes.values():
        assert (node.cpu_milli, node.memory_mb, node.disk_mb) == (
            node.total_cpu_milli, node.total_memory_mb, node.total_disk_mb,
        )  # fmt: skip
        assert all((gpu.share, gpu.memory_mb) == (1000, gpu.total_mb) for gpu in node.gpus)
    assert all(use.now == pytest.approx(0, abs=1e-9) for use in planner.shares._groups.values())


@given(seed=SEEDS)
@few
def test_same_history_same_decisions(seed: int) -> None:
    def told() -> list[object]:
        simulation = Simulation([box(f"n{n}", gpus=4) for n in range(3)])
        for job in mixed(seed, 80):
            simulation.submit(job, 0)
        simulation.run()
        return [*simulation.decisions, simulation.promised]

    assert told() == told()
