"""Whose turn it is and where, rule by rule. Which of equal nodes a scoring prefers is no part of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from coordination.fleet import Fleet
from coordination.lane import Head
from coordination.placement import Need, Offer
from coordination.planner import NEVER, Assignment, Began, Lane, Plan, Planner, PlanPolicy
from coordination.reservations import Reservation
from coordination.shares import Shares
from tests.unit.coordination.scheduling import SECOND, Packed, box, need

ONE, GPU, WHOLE = need(), need(gpus=1), need(gpus=4)


class Desk:
    """A planner, and what a test says of its cluster. Seconds instead of milliseconds."""

    def __init__(self, *offers: Offer, **changes: Any) -> None:
        self.weights: dict[str, float] = changes.pop("weights", {})
        floors: dict[str, float] = changes.pop("floors", {})
        self.planner = Planner(Fleet(Packed()), Shares(self.weights, floors), PlanPolicy(**changes))
        self.now = 0.0
        self.seq = 0
        self.offers = {offer.node: offer for offer in offers}
        for offer in offers:
            self.free(offer.node)

    def free(self, node: str, places: int = 64, *, waits: bool = True, **changes: Any) -> None:
        """The node says that all it has is free (or less, if given): the planner knows what it gave to it."""
        offer = self.offers[node]
        self.planner.set_node(replace(offer, **changes), offer, places, waits=waits)

    def jobs(self, wanted: Need, n: int = 1, *, lane: int | None = None, priority: int = 50, **told: Any) -> list[int]:
        """Numbers of new jobs; `lane` adds them to that lane, else they make a new one."""
        heads = [self.seq + k for k in range(n)]
        self.seq += n
        number = 100 + heads[0] if lane is None else lane
        known = self.planner.lanes.get(number)
        before = [head for head in known.heads if head.seq not in self.planner.spoken_for] if known is not None else []
        made = [*before, *(Head(seq, priority, number) for seq in heads)]
        made.sort(key=lambda head: (-head.priority, head.seq))
        self.planner.set_lane(Lane(number=number, need=wanted, heads=made, count=len(made), **told))
        return heads

    def plan(self, **how: Any) -> Plan:
        return self.planner.plan(round(self.now * SECOND), **how)

    def places(self, **how: Any) -> dict[int, str]:
        """Job -> its nodes, of what is decided now; decided jobs run from now on."""
        told = {}
        for decision in self.plan(**how).assignments:
            self.begin(decision)
            told[decision.seq] = " ".join(node for node, _ in decision.members)
        return told

    def begin(self, decision: Assignment) -> None:
        lane = self.planner.lanes[decision.lane]
        now = round(self.now * SECOND)
        ends = now + lane.bound_ms if lane.bound_ms else NEVER
        free = lane.preemptible and not decision.owed
        began = [Began(node, str(decision.seq), 1, ends, 10 * SECOND, free) for node, _ in decision.members]
        left = [head for head in lane.heads if head.seq != decision.seq]
        self.planner.settled(decision, began, now)
        self.planner.set_lane(replace(lane, heads=left, count=len(left), at=0))

    def runs(self, node: str, wanted: Need, n: int = 1, **told: Any) -> list[str]:
        """So many jobs run on the node."""
        names = []
        for _ in range(n):
            (seq,) = self.jobs(replace(wanted, node=node), **told)
            assert self.places(lanes=[100 + seq]) == {seq: node}
            names.append(str(seq))
        return names

    def ends(self, job: str | int) -> None:
        for node in [node for node, mine in self.planner.running.items() if str(job) in mine]:
            self.planner.ended(str(job), node, round(self.now * SECOND))
            self.free(node)

    @property
    def reserved(self) -> dict[int, Reservation]:
        """By job."""
        return {kept.seq: kept for kept in self.planner.reservations.values()}


def gpus_of(decisions: Sequence[Assignment]) -> list[tuple[str, ...]]:
    return [gpus for decision in decisions for _, gpus in decision.members]


# -- both directions ---------------------------------------------------------------------------------------------------


def test_freed_worker_gets_the_best_job_for_it() -> None:
    desk = Desk(box("n", cpus=1))
    desk.free("n", places=1, waits=False)
    desk.jobs(ONE, priority=40)
    (best,) = desk.jobs(ONE, priority=60)
    desk.jobs(need(cpus=2), priority=90)
    assert desk.places() == {}
    desk.free("n", places=1)
    assert desk.places() == {best: "n"}


def test_new_job_gets_the_best_of_the_waiting_workers() -> None:
    desk = Desk(box("roomy"), box("tight", cpus=2), box("closed", cpus=2))
    desk.planner.close("closed")
    (job,) = desk.jobs(ONE)
    assert desk.places() == {job: "tight"}, "the scoring packs"


def test_many_jobs_and_many_workers_are_matched_in_one_round() -> None:
    desk = Desk(*(box(f"n{n}", cpus=2) for n in range(5)))
    jobs = desk.jobs(ONE, 20)
    placed = desk.places()
    assert list(placed) == jobs[:10]
    assert sorted(placed.values()) == sorted([f"n{n}" for n in range(5)] * 2)


def test_only_the_lanes_that_are_named_are_looked_at() -> None:
    desk = Desk(box("n"))
    (one,), (other,) = desk.jobs(ONE), desk.jobs(need(cpus=2))
    assert desk.places(lanes=[100 + other, 999]) == {other: "n"}
    assert desk.places() == {one: "n"}


# -- order -------------------------------------------------------------------------------------------------------------


def order(desk: Desk) -> list[int]:
    """The order in which one slot goes round."""
    told = []
    while placed := desk.places():
        (job,) = placed
        told.append(job)
        desk.ends(job)
    return told


def test_higher_priority_then_first_come() -> None:
    desk = Desk(box("n", cpus=1))
    low, high, late = desk.jobs(ONE, 2, priority=10), desk.jobs(ONE, 2, priority=90), desk.jobs(ONE, priority=90)
    assert order(desk) == [*high, *late, *low]


def test_group_that_has_had_least_goes_first_whatever_the_priorities() -> None:
    desk = Desk(box("n", cpus=2))
    desk.runs("n", ONE, group="rich")
    desk.jobs(ONE, group="rich", priority=100)
    (poor,) = desk.jobs(ONE, group="poor", priority=0)
    assert desk.places() == {poor: "n"}


def test_group_takes_turns_with_itself_while_it_is_given() -> None:
    """What was decided a moment ago counts at once, not when it runs."""
    desk = Desk(box("n", cpus=4))
    a, b = desk.jobs(ONE, 4, group="a"), desk.jobs(ONE, 4, group="b")
    assert list(desk.places()) == [a[0], b[0], a[1], b[1]]


def test_weights_count() -> None:
    desk = Desk(box("n", cpus=4), weights={"b": 3.0})
    a, b = desk.jobs(ONE, 4, group="a"), desk.jobs(ONE, 4, group="b")
    assert sorted(desk.places()) == [a[0], *b[:3]]


def test_what_a_group_has_had_is_remembered_for_a_while() -> None:
    desk = Desk(box("n", cpus=1))
    desk.jobs(ONE, 5, group="a")
    desk.now = 0
    (first,) = desk.places()
    desk.now = 600
    desk.ends(first)
    b = desk.jobs(ONE, 1, group="b")
    assert list(desk.places()) == b


def test_kind_below_its_floor_goes_before_the_others_of_its_group() -> None:
    desk = Desk(box("n", cpus=11), floors={"selfplay": 0.1})
    desk.runs("n", need(cpus=10), kind="training", priority=100)
    desk.jobs(ONE, 2, kind="training", priority=100)
    (fair,) = desk.jobs(ONE, kind="selfplay", priority=1)
    assert desk.places() == {fair: "n"}


def test_kind_above_its_floor_waits_for_its_priority() -> None:
    desk = Desk(box("n", cpus=11), floors={"selfplay": 0.1})
    desk.runs("n", need(cpus=8), kind="training", priority=100)
    desk.runs("n", need(cpus=2), kind="selfplay", priority=1)
    (urgent,) = desk.jobs(ONE, kind="training", priority=100)
    desk.jobs(ONE, kind="selfplay", priority=1)
    assert desk.places() == {urgent: "n"}


# -- where -------------------------------------------------------------------------------------------------------------


def test_cpu_work_stays_off_gpu_nodes_while_others_can_take_it() -> None:
    desk = Desk(box("gpu", cpus=1, gpus=4), box("cpu", cpus=2))
    jobs = desk.jobs(ONE, 3)
    assert desk.places() == dict(zip(jobs, ["cpu", "cpu", "gpu"], strict=True))


def test_kind_that_prefers_gpus_goes_there_first_and_elsewhere_rather_than_wait() -> None:
    desk = Desk(box("gpu", cpus=2, gpus=4), box("cpu", cpus=1))
    jobs = desk.jobs(need(prefer="gpus"), 3)
    assert desk.places() == dict(zip(jobs, ["gpu", "gpu", "cpu"], strict=True))


def test_kind_that_prefers_memory_goes_where_most_of_it_is() -> None:
    desk = Desk(box("small", memory_mb=1_000), box("large", memory_mb=9_000), box("middle", memory_mb=5_000))
    (job,) = desk.jobs(need(prefer="memory"))
    assert desk.places() == {job: "large"}


def test_parts_of_gpus_are_packed_so_that_whole_ones_stay_whole() -> None:
    desk = Desk(box("n", cpus=64, gpus=4))
    desk.jobs(need(gpus=1, gpu_share=0.25, cpus=0.1), 8)
    (whole,) = desk.jobs(need(gpus=2), priority=1)
    decisions = desk.plan().assignments
    assert gpus_of(decisions[:8]) == [("n-0",)] * 4 + [("n-1",)] * 4
    assert (decisions[8].seq, decisions[8].members) == (whole, (("n", ("n-2", "n-3")),))


def test_model_capability_and_labels_are_kept_to() -> None:
    desk = Desk(
        box("t4", gpus=1, model="Tesla T4"), box("a100", gpus=1, model="NVIDIA A100", zone="eu"),
        box("h100", gpus=1, model="NVIDIA H100", zone="us"),
    )  # fmt: skip
    told = {
        "h100": need(gpus=1, gpu_model="H100|H200"),
        "a100": need(gpus=1, gpu_model="A100", not_labels={"zone": "us"}),
        "t4": need(gpus=1, not_labels={"zone": "us"}),
    }
    expected = {desk.jobs(wanted)[0]: node for node, wanted in told.items()}
    never = [
        desk.jobs(need(**asked)) for asked in ({"gpus": 1, "min_compute_capability": "9.0"}, {"labels": {"zone": "xx"}})
    ]
    assert desk.places() == expected
    assert all(desk.planner.fleet.could(desk.planner.lanes[100 + seq].need) is None for (seq,) in never)


def test_one_job_with_a_word_on_each_node() -> None:
    desk = Desk(box("n1"), box("n2"))
    jobs = desk.jobs(need(anti_affinity="database"), 3)
    assert sorted(desk.places().values()) == ["n1", "n2"]
    desk.ends(jobs[0])
    assert len(desk.places()) == 1


def test_word_of_a_running_job_is_not_forgotten_when_its_node_speaks() -> None:
    desk = Desk(box("n"))
    desk.jobs(need(anti_affinity="x"), 2)
    desk.places()
    desk.free("n")
    assert desk.places() == {}


@pytest.mark.parametrize(
    ("hints", "node"),
    [
        pytest.param({"avoid": ["n1"]}, "n2", id="where it failed"),
        pytest.param({"avoid": ["n1", "n2", "big"]}, "n1", id="failed everywhere: anywhere"),
        pytest.param({"gpu_memory_above_mb": 40_000}, "big", id="ran out of memory"),
        pytest.param({"gpu_memory_above_mb": 99_000}, "n1", id="nothing is larger: anywhere"),
        pytest.param({"avoid": ["big"], "gpu_memory_above_mb": 40_000}, "big", id="larger counts for more"),
        pytest.param({"avoid": ["n1"], "gpu_memory_above_mb": 99_000}, "n2", id="as far as can be"),
    ],
)
def test_hints_of_failed_attempts_hold_while_any_node_could_satisfy_them(hints: dict[str, Any], node: str) -> None:
    big = box("big", gpus=1, cpus=99)
    big = replace(big, gpus=tuple(replace(gpu, memory_mb=80_000, memory_free_mb=80_000) for gpu in big.gpus))
    desk = Desk(box("n1", gpus=1, cpus=9), box("n2", gpus=1, cpus=10), big)
    (job,) = desk.jobs(need(gpus=1, **hints))
    assert desk.places() == {job: node}


def test_hint_holds_even_if_the_node_that_satisfies_it_is_busy() -> None:
    desk = Desk(box("n1"), box("n2", cpus=1))
    desk.runs("n2", ONE)
    desk.jobs(need(avoid=["n1"]))
    assert desk.places() == {}
    desk.planner.remove_node("n2")
    assert list(desk.places().values()) == ["n1"], "nobody else could: it is given up"


# -- what a node says and what it was given ----------------------------------------------------------------------------


def test_no_more_is_free_than_both_sides_say() -> None:
    desk = Desk(box("n", cpus=4))
    desk.runs("n", ONE)
    desk.free("n")  # it has not heard of the job yet
    assert len(desk.jobs(ONE, 4)) == 4
    assert len(desk.places()) == 3
    desk.free("n", cpus=1.0)
    assert desk.planner.fleet.nodes["n"].cpu_milli == 0
    for job in [*desk.planner.running["n"]]:
        desk.planner.ended(job, "n", 0)
    desk.free("n", cpus=1.0)  # somebody else uses the rest, or it has not ended there yet
    assert desk.planner.fleet.nodes["n"].cpu_milli == 1_000


def test_decision_under_way_is_in_the_books() -> None:
    desk = Desk(box("n", cpus=2))
    (job,) = desk.jobs(ONE)
    (decision,) = desk.plan().assignments
    desk.free("n", places=1)  # it claims again, and knows of nothing
    desk.jobs(ONE, 5)
    assert desk.places() == {}, "its one place is taken"
    desk.free("n", places=3)
    assert len(desk.places()) == 1
    desk.planner.settled(decision, [], 0)  # somebody cancelled it meanwhile
    assert job not in desk.planner.spoken_for
    desk.free("n")
    assert len(desk.places()) == 1


def test_node_takes_no_more_jobs_than_it_has_places() -> None:
    desk = Desk(box("n", cpus=99))
    desk.free("n", places=2)
    desk.jobs(ONE, 5)
    assert len(desk.places()) == 2
    desk.free("n", places=0)
    assert desk.places() == {}


def test_closed_node_gets_nothing_until_it_speaks_again() -> None:
    desk = Desk(box("n"))
    desk.planner.close("n")
    desk.jobs(ONE)
    assert desk.places() == {}
    desk.free("n", waits=False)
    assert desk.places() == {}
    desk.free("n")
    assert len(desk.places()) == 1


def test_node_whose_cards_change_is_another() -> None:
    desk = Desk(box("n", gpus=1))
    desk.runs("n", GPU)
    desk.offers["n"] = box("n", gpus=2)
    desk.free("n")
    desk.jobs(GPU, 2)
    assert len(desk.places()) == 1


def test_node_that_says_no_total_is_believed() -> None:
    desk = Desk()
    desk.planner.set_node(box("n", cpus=2), None, 9)
    desk.jobs(ONE, 5)
    assert len(desk.places()) == 2
    desk.planner.set_node(box("n", cpus=1), None, 9)
    assert len(desk.places()) == 1


# -- room that is kept -------------------------------------------------------------------------------------------------


def crowded(**changes: Any) -> tuple[Desk, int]:
    """Four GPUs, of which two are free and two free in 100 s. A job that wants all four comes, then small ones of one
    GPU: two for 100 s, and one for an hour."""
    desk = Desk(box("n", cpus=99, gpus=4), preempt_gap=101, **changes)
    desk.runs("n", need(gpus=2), bound_ms=100 * SECOND)
    (large,) = desk.jobs(WHOLE, bound_ms=50 * SECOND)
    return desk, large


def test_large_job_is_not_overtaken_by_what_would_make_it_late() -> None:
    desk, large = crowded()
    short = desk.jobs(GPU, bound_ms=100 * SECOND)
    desk.jobs(GPU, bound_ms=3_600 * SECOND)
    desk.jobs(GPU)
    assert desk.places() == {short[0]: "n"}, "it ends in time"
    assert desk.reserved[large].until_ms == 100 * SECOND
    assert desk.reserved[large].nodes == ("n",)
    desk.now = 1
    desk.jobs(GPU, bound_ms=100 * SECOND)
    assert desk.places() == {}, "that would be a second late"
    desk.now = 100
    desk.ends(0)
    desk.ends(short[0])
    assert desk.places() == {large: "n"}
    assert not desk.reserved


def test_what_fits_beside_the_large_job_does_not_wait() -> None:
    desk, large = crowded()
    (beside,) = desk.jobs(ONE)
    assert desk.places() == {beside: "n"}
    assert large in desk.reserved


def test_room_is_kept_only_from_those_it_could_be_used_by() -> None:
    desk, _ = crowded()
    desk.offers["cpu"] = box("cpu")
    desk.free("cpu")
    (elsewhere,) = desk.jobs(ONE)
    assert desk.places() == {elsewhere: "cpu"}
    assert not desk.reserved


def test_jobs_of_one_size_keep_nothing_from_each_other() -> None:
    desk = Desk(box("n", cpus=1))
    desk.runs("n", ONE, bound_ms=100 * SECOND)
    for group in "abc":
        desk.jobs(ONE, 3, group=group)
    assert desk.places() == {}
    assert not desk.reserved


def test_room_with_an_unknown_time_is_kept_by_size_alone() -> None:
    desk = Desk(box("n", cpus=99, gpus=4))
    desk.runs("n", need(gpus=2))
    (large,) = desk.jobs(WHOLE)
    desk.jobs(GPU, bound_ms=SECOND)
    assert desk.places() == {}, "however short: nobody knows when it must have ended"
    assert desk.reserved[large].until_ms == NEVER
    (beside,) = desk.jobs(ONE)
    assert desk.places() == {beside: "n"}


def test_room_is_kept_where_it_comes_free_first() -> None:
    desk = Desk(box("late", gpus=4), box("soon", gpus=4), box("unknown", gpus=4))
    desk.runs("late", need(gpus=2), bound_ms=90 * SECOND)
    desk.runs("soon", need(gpus=2), bound_ms=60 * SECOND)
    desk.runs("unknown", need(gpus=2))
    (large,) = desk.jobs(WHOLE)
    desk.jobs(GPU, 6, bound_ms=3_600 * SECOND)
    assert sorted(desk.places().values()) == ["late"] * 2 + ["unknown"] * 2
    assert (desk.reserved[large].nodes, desk.reserved[large].until_ms) == (("soon",), 60 * SECOND)


def test_node_is_kept_for_one_job_at_a_time() -> None:
    desk = Desk(box("n1", gpus=4), box("n2", gpus=4))
    for node in ("n1", "n2"):
        desk.runs(node, need(gpus=2), bound_ms=60 * SECOND)
    large = [desk.jobs(WHOLE, group=group)[0] for group in "abc"]
    desk.jobs(GPU, 2, group="d")
    assert desk.places() == {}
    assert sorted(desk.reserved) == large[:2]
    assert {desk.reserved[job].nodes for job in large[:2]} == {("n1",), ("n2",)}


def test_node_that_is_gone_keeps_no_room() -> None:
    desk, large = crowded()
    desk.jobs(GPU)
    desk.places()
    assert large in desk.reserved
    desk.planner.remove_node("n")
    assert not desk.reserved
    assert not desk.planner.kept.on


def test_room_is_looked_for_elsewhere_when_the_promise_is_not_kept() -> None:
    desk, large = crowded()
    desk.jobs(GPU)
    desk.places()
    desk.offers["other"] = box("other", gpus=4)
    desk.planner.set_node(replace(desk.offers["other"], gpus=()), desk.offers["other"], 9)
    desk.now = 103  # what should have ended has not; a moment's grace for its node to say so
    desk.places()
    assert desk.reserved[large].nodes == ("n",)
    desk.free("other", waits=False)
    desk.now = 106
    desk.places()
    assert desk.reserved[large].nodes == ("other",)


def test_more_important_work_that_comes_first_may_pass() -> None:
    desk, _ = crowded()
    desk.jobs(GPU)
    assert desk.places() == {}
    (urgent,) = desk.jobs(GPU, priority=60)
    assert desk.places() == {urgent: "n"}


def test_promise_binds_who_comes_first_by_its_share_alone() -> None:
    desk, large = crowded()
    desk.jobs(GPU)
    desk.places()
    desk.jobs(GPU, group="poor")
    assert desk.places() == {}
    assert large in desk.reserved


def test_job_of_the_same_lane_takes_over_the_room() -> None:
    desk, large = crowded()
    desk.jobs(GPU)
    desk.places()
    (other,) = desk.jobs(WHOLE, lane=100 + large, priority=90, bound_ms=50 * SECOND)
    desk.places()
    assert list(desk.reserved) == [other]


def test_lane_that_is_empty_keeps_no_room() -> None:
    desk, large = crowded()
    desk.jobs(GPU)
    desk.places()
    desk.planner.set_lane(Lane(number=100 + large, need=WHOLE))
    assert not desk.reserved


def test_places_are_room_too() -> None:
    """A node that is full by the number of its jobs has no room, whatever is free of its GPUs."""
    desk = Desk(box("n", cpus=99, gpus=4))
    desk.free("n", places=2)
    desk.runs("n", GPU, bound_ms=30 * SECOND)
    desk.runs("n", GPU, bound_ms=60 * SECOND)
    desk.free("n", places=0)
    (two,) = desk.jobs(need(gpus=3), bound_ms=SECOND)
    desk.places()
    desk.free("n", places=1)
    desk.jobs(GPU, bound_ms=3_600 * SECOND)
    assert desk.places() == {}
    assert desk.reserved[two].until_ms == 30 * SECOND


# -- gangs -------------------------------------------------------------------------------------------------------------


def test_gang_starts_on_as_many_nodes_or_not_at_all() -> None:
    desk = Desk(box("n1", gpus=2), box("n2", gpus=2), box("n3", gpus=1))
    (gang,) = desk.jobs(need(gpus=2, nodes=3))
    assert desk.places() == {}
    (pair,) = desk.jobs(need(gpus=2, nodes=2), priority=10)
    (decision,) = desk.plan().assignments
    assert decision.seq == pair
    assert sorted(decision.members) == [("n1", ("n1-0", "n1-1")), ("n2", ("n2-0", "n2-1"))]
    assert desk.planner.fleet.could(desk.planner.lanes[100 + gang].need) is None


def test_gang_takes_from_each_of_its_nodes_and_gives_back_to_each() -> None:
    desk = Desk(*(box(f"n{n}", gpus=2) for n in range(3)))
    (gang,) = desk.jobs(need(gpus=2, nodes=3))
    desk.places()
    desk.jobs(GPU, 6)
    assert desk.places() == {}
    desk.ends(gang)
    assert len(desk.places()) == 6


def test_room_for_a_gang_is_kept_on_all_its_nodes_until_the_last_comes_free() -> None:
    desk = Desk(box("n1", cpus=99, gpus=2), box("n2", cpus=99, gpus=2))
    desk.runs("n1", GPU, bound_ms=30 * SECOND)
    desk.runs("n2", GPU, bound_ms=90 * SECOND)
    (gang,) = desk.jobs(need(gpus=2, nodes=2))
    short, long = desk.jobs(GPU, bound_ms=90 * SECOND), desk.jobs(GPU, 2, bound_ms=91 * SECOND)
    assert list(desk.places()) == short
    assert desk.reserved[gang].until_ms == 90 * SECOND
    assert sorted(desk.reserved[gang].nodes) == ["n1", "n2"]
    desk.now = 90
    for job in (0, 1, *short):
        desk.ends(job)
    assert desk.places().keys() == {gang}
    assert long


def test_gang_lines_up_behind_room_that_is_kept_for_others() -> None:
    """Its nodes are never all without a reservation at one moment; and it is overtaken by nobody who comes later."""
    desk = Desk(box("n1", gpus=2), box("n2", gpus=2))
    for node in ("n1", "n2"):
        desk.runs(node, GPU, bound_ms=60 * SECOND)
    (whole,) = desk.jobs(need(gpus=2), bound_ms=10 * SECOND)
    (gang,) = desk.jobs(need(gpus=2, nodes=2), bound_ms=10 * SECOND)
    desk.jobs(GPU)
    assert desk.places() == {}
    assert desk.reserved[whole].until_ms == 60 * SECOND
    assert desk.reserved[gang].until_ms == 70 * SECOND
    desk.jobs(need(gpus=2), bound_ms=60 * SECOND, group="new")
    assert desk.places() == {}
    desk.now = 60
    desk.ends(0)
    desk.ends(1)
    assert list(desk.places()) == [whole]
    desk.now = 70
    desk.ends(whole)
    assert list(desk.places()) == [gang]


# -- preemption --------------------------------------------------------------------------------------------------------


def after(desk: Desk, seconds: float) -> Plan:
    """The plan after the head has been blocked so long."""
    assert desk.places() == {}
    desk.now += seconds
    return desk.plan()


def stopped(plan: Plan) -> list[int]:
    return [int(victim.job) for preemption in plan.preemptions for victim in preemption.victims]


def test_fewest_and_least_important_make_way() -> None:
    desk = Desk(box("n", cpus=99, gpus=4))
    middle = [int(job) for job in desk.runs("n", GPU, priority=30)]
    low = [int(job) for job in desk.runs("n", GPU, 2, priority=10)]
    desk.runs("n", GPU, priority=40)
    (urgent,) = desk.jobs(need(gpus=3), priority=90)
    assert sorted(stopped(after(desk, 5))) == sorted(middle + low)
    assert desk.reserved[urgent].preempts


def test_who_is_not_in_the_way_is_left_alone() -> None:
    desk = Desk(box("n", cpus=4, gpus=2))
    desk.runs("n", ONE, 2, priority=1)
    (holder,) = desk.runs("n", need(gpus=2), priority=20)
    desk.jobs(GPU, priority=90)
    assert stopped(after(desk, 5)) == [int(holder)]


def test_node_where_least_is_lost_is_chosen() -> None:
    desk = Desk(box("n1", gpus=2), box("n2", gpus=2), box("n3", gpus=2))
    desk.runs("n1", GPU, 2, priority=10)
    desk.now = 60
    (younger,) = desk.runs("n2", need(gpus=2), priority=10)
    desk.runs("n3", need(gpus=2), priority=30)
    desk.jobs(need(gpus=2), priority=90)
    assert stopped(after(desk, 5)) == [int(younger)]


@pytest.mark.parametrize(
    ("running", "waiting", "stops"),
    [
        pytest.param({"priority": 70}, {"priority": 90}, True, id="the gap"),
        pytest.param({"priority": 71}, {"priority": 90}, False, id="less than the gap"),
        pytest.param({"priority": 10, "preemptible": False}, {"priority": 90}, False, id="not to be stopped"),
        pytest.param(
            {"priority": 10, "group": "b"}, {"priority": 90, "group": "a"}, True, id="of a group that has more"
        ),
    ],
)
def test_who_may_be_stopped(running: dict[str, Any], waiting: dict[str, Any], stops: bool) -> None:
    desk = Desk(box("n", cpus=1))
    desk.runs("n", ONE, **running)
    desk.now = 5
    desk.jobs(ONE, **waiting)
    assert bool(after(desk, 5).preemptions) is stops


def test_group_that_has_had_more_stops_nobody() -> None:
    desk = Desk(box("n", cpus=2))
    desk.runs("n", ONE, group="a", priority=90)
    desk.runs("n", ONE, group="b", priority=10)
    desk.now = 60
    desk.jobs(ONE, group="a", priority=90)
    assert not after(desk, 5).preemptions


def test_nothing_is_stopped_before_the_head_has_waited() -> None:
    desk = Desk(box("n", cpus=1))
    desk.runs("n", ONE, priority=10)
    desk.jobs(ONE, priority=90)
    assert not after(desk, 4.9).preemptions


def test_gap_above_a_hundred_means_never() -> None:
    desk = Desk(box("n", cpus=1), preempt_gap=101)
    desk.runs("n", ONE, priority=0)
    desk.jobs(ONE, priority=100)
    assert not after(desk, 60).preemptions


def test_if_stopping_all_does_not_help_nobody_is_stopped() -> None:
    desk = Desk(box("n", cpus=2))
    desk.runs("n", ONE, priority=10)
    desk.runs("n", ONE, priority=80)
    desk.jobs(need(cpus=2), priority=90)
    assert not after(desk, 60).preemptions


def test_gang_is_not_stopped_for_one_of_its_nodes() -> None:
    desk = Desk(box("n1", cpus=1), box("n2", cpus=1))
    desk.jobs(need(nodes=2), priority=1)
    assert len(desk.places()) == 1
    desk.jobs(ONE, priority=99)
    assert not after(desk, 60).preemptions


def test_gang_has_all_its_nodes_cleared_at_once() -> None:
    desk = Desk(box("n1", cpus=1), box("n2", cpus=1), box("n3", cpus=1))
    jobs = [int(desk.runs(f"n{n}", ONE, priority=n)[0]) for n in (1, 2, 3)]
    (gang,) = desk.jobs(need(nodes=2), priority=90)
    assert sorted(stopped(after(desk, 5))) == jobs[:2]
    assert sorted(desk.reserved[gang].nodes) == ["n1", "n2"]


def test_victims_are_stopped_once_and_their_room_is_kept() -> None:
    desk = Desk(box("n", cpus=2))
    low = [int(job) for job in desk.runs("n", ONE, 2, priority=10)]
    (urgent,) = desk.jobs(need(cpus=2), priority=90)
    assert stopped(after(desk, 5)) == low
    for _ in range(30):
        desk.now += 1
        assert not desk.plan().preemptions
    desk.ends(low[0])
    desk.jobs(ONE, priority=99, bound_ms=SECOND)
    assert desk.places() == {}, "even what is more important leaves what others were stopped for"
    desk.ends(low[1])
    assert next(iter(desk.places())) == urgent


def test_who_has_been_asked_already_counts_as_room() -> None:
    desk = Desk(box("n1", cpus=2), box("n2", cpus=2))
    (going,) = desk.runs("n1", need(cpus=2), priority=30)
    desk.planner.running["n1"][going].stopping = True
    desk.runs("n2", need(cpus=2), priority=10)
    desk.jobs(need(cpus=2), priority=90)
    assert stopped(after(desk, 5)) == []


def test_kind_that_was_owed_its_floor_is_not_stopped_for_who_had_to_wait_for_it() -> None:
    desk = Desk(box("n", cpus=10), floors={"selfplay": 0.5})
    desk.runs("n", need(cpus=8), kind="training", priority=90, preemptible=False)
    desk.now = 60
    (owed,) = desk.jobs(need(cpus=2), kind="selfplay", priority=10)
    desk.jobs(need(cpus=2), kind="training", priority=90)
    (decision,) = desk.plan().assignments
    assert (decision.seq, decision.owed) == (owed, True)
    desk.begin(decision)
    desk.now += 60
    assert not after(desk, 60).preemptions


# -- the same everywhere -----------------------------------------------------------------------------------------------


TRACE = """
from tests.unit.coordination.scheduling import Simulation, box, mixed
simulation = Simulation([box(f"n{n}", gpus=4) for n in range(3)])
for at, job in enumerate(mixed(7, 60, groups="abc")):
    simulation.submit(job, at * 900)
simulation.run()
print(simulation.decisions)
print(simulation.promised)
"""


def test_decisions_do_not_depend_on_the_order_of_sets() -> None:
    told = [
        subprocess.run(
            [sys.executable, "-c", TRACE], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1", "2")
    ]
    assert len(told[0]) > 1_000
    assert told[0] == told[1] == told[2]
