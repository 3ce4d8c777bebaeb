"""What a placement costs: room that nobody asks for, stranded GPUs, room that somebody cannot do without."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordination.placement import WHOLE, Need, Node
from coordination.scoring import (
    DIETS,
    MEMORY,
    MOST_WAITING,
    SURVEY_EVERY,
    Demand,
    GpuKind,
    Room,
    RoomScoring,
    Tables,
    inventory_of,
    least_cost,
    room_for,
    serves,
    survey,
)
from tests.unit.coordination.placing import gpu, need, needs, node, nodes

SHARES = [need(gpus=1, gpu_share=n / 100) for n in range(1, 101)]


def share(milli: int) -> Need:
    return SHARES[milli // 10 - 1]


def tables(counts: dict[Need, int], *cluster: Node) -> Tables:
    demand = Demand()
    for wanted, count in counts.items():
        demand.record(wanted, count)
    return survey(demand, cluster)


# -- waste -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "left", "wasted"),
    [
        ({810: 1}, 0, 0.0),
        ({810: 1}, 190, 0.19),
        ({810: 1}, 809, 0.809),
        ({810: 1}, 810, 0.0),
        ({810: 1}, 1000, 0.19),
        ({500: 1}, 500, 0.0),
        ({500: 1}, 1000, 0.0),
        ({500: 1}, 990, 0.49),
        ({300: 1, 400: 1}, 600, 0.1),  # 300 + 300 as often as 400 + 200 of nothing
        ({190: 1, 810: 1}, 1000, 0.0125),  # 810 + 190; but once in four five of 190 and a rest of 50
    ],
    ids=str,
)
def test_a_rest_that_no_demand_fills_is_lost(asked: dict[int, int], left: int, wasted: float) -> None:
    found = tables({share(milli): count for milli, count in asked.items()}).waste[left]
    assert found == pytest.approx(wasted, abs=1e-6)


def test_the_fewer_ask_for_a_rest_the_surer_it_is_lost() -> None:
    def lost(others: int) -> float:
        return tables({share(300): 1, share(810): others}).waste[300] / 0.3

    assert lost(10_000) > 0.99, "hardly anybody"
    assert 0.3 < lost(50) < 0.5
    assert lost(1) < 1e-9
    assert [lost(n) for n in (1, 10, 100)] == sorted(lost(n) for n in (1, 10, 100))


@given(st.dictionaries(st.sampled_from(SHARES), st.integers(1, 1_000), min_size=1))
def test_no_more_is_lost_than_there_is(counts: dict[Need, int]) -> None:
    waste = tables(counts).waste
    assert len(waste) == WHOLE + 1
    assert all(0 <= lost <= free / WHOLE + 1e-12 for free, lost in enumerate(waste))


def test_work_without_gpus_says_nothing_about_gpus() -> None:
    assert tables({need(cpus=4): 100}, node("n1", "A100")) == Tables()


# -- diets -----------------------------------------------------------------------------------------------------------


def test_demand_is_cut_into_eight_diets_of_equal_weight_from_frugal_to_hungry() -> None:
    diets = tables({need(gpus=1, cpus=cpus, memory_mb=100 * cpus): 5 for cpus in range(1, 65)}).diets
    assert [diet.weight for diet in diets] == pytest.approx([1 / DIETS] * DIETS)
    assert [diet.cpu_milli for diet in diets] == pytest.approx([1000 * (8 * n + 4.5) for n in range(DIETS)])
    assert [diet.memory_mb for diet in diets] == pytest.approx([100 * (8 * n + 4.5) for n in range(DIETS)])


def test_what_a_share_takes_beside_it_is_counted_for_a_whole_gpu() -> None:
    (diet,) = tables({need(gpus=1, gpu_share=0.25, cpus=2, memory_mb=1_000): 3}).diets
    assert diet == pytest.approx((1.0, 8_000, 4_000))


@given(st.dictionaries(needs().filter(lambda wanted: wanted.gpus > 0), st.integers(1, 1_000), min_size=1))
def test_diets_are_a_partition_of_the_demand(counts: dict[Need, int]) -> None:
    diets = tables(counts).diets
    weights = {wanted: count * wanted.gpu_milli for wanted, count in counts.items()}
    total = sum(weights.values())
    assert sum(diet.weight for diet in diets) == pytest.approx(1)
    assert len(diets) <= DIETS
    assert max(diet.weight for diet in diets) <= 1 / DIETS + max(weights.values()) / total + 1e-9
    assert [diet.cpu_milli for diet in diets] == sorted(diet.cpu_milli for diet in diets)
    mean = sum(weight * WHOLE * wanted.cpu_milli / wanted.gpu_milli for wanted, weight in weights.items()) / total
    assert sum(diet.weight * diet.cpu_milli for diet in diets) == pytest.approx(mean)


# -- rooms and prices ------------------------------------------------------------------------------------------------

ANY, H100 = need(gpus=1), need(gpus=1, gpu_model="H100")


def prices(found: Tables) -> dict[frozenset[str], float]:
    """By the models of the GPUs that will do."""
    return {frozenset(kind.model for kind in room.kinds): room.price for room in found.rooms}


def test_a_class_with_plenty_of_room_is_nearly_free_and_one_that_runs_out_grows_dear() -> None:
    cluster = [node(f"a{n}", *["A100"] * 8) for n in range(10)]
    rare = node("h", *["H100"] * 8)
    every, few = frozenset({"A100", "H100"}), frozenset({"H100"})
    ratios = []
    for _ in range(4):
        found = prices(tables({ANY: 100, H100: 10}, *cluster, rare))
        assert set(found) == {every, few}
        ratios.append(found[few] / found[every])
        rare.take(need(gpus=2), [n for n, each in enumerate(rare.gpus) if each.share][:2])
    assert ratios[0] == pytest.approx((10 / 8**2) / (100 / 88**2))
    assert ratios == sorted(ratios)
    assert ratios[-1] > 10 * ratios[0]


def test_a_class_without_any_room_has_nothing_more_to_lose() -> None:
    found = tables({ANY: 100, H100: 10}, node("a", "A100"))
    assert set(prices(found)) == {frozenset({"A100"})}


def room(wanted: Need, *models: str) -> Room:
    kinds = frozenset(kind for model in models for kind, _, _ in inventory_of(node("x", model)))
    return Room(kinds, wanted.gpus, wanted.cpu_milli, wanted.memory_mb, wanted.share, 1)


@pytest.mark.parametrize(
    ("wanted", "box", "gpus"),
    [
        (need(gpus=1), node("n", *["A100"] * 4), 4),
        (need(gpus=1), node("n", "A100", "A100", "T4", "H100"), 2),  # the others are of other kinds
        (need(gpus=1), node("n", "T4"), 0),
        (need(gpus=1, gpu_share=0.5), node("n", "A100", gpu("g", share_free=0.25)), 1.25),
        (need(gpus=2), node("n", *["A100"] * 5), 4),  # two at a time
        (need(gpus=2), node("n", "A100", gpu("g", share_free=0.5)), 0),  # and whole ones
        (need(gpus=1, cpus=8), node("n", *["A100"] * 4, cpus=20), 2.5),
        (need(gpus=1, cpus=8), node("n", *["A100"] * 4, cpus=7), 0),
        (need(gpus=1, memory_mb=1_000), node("n", *["A100"] * 4, memory_mb=3_000), 3),
        (need(gpus=1, memory_mb=1_000), node("n", *["A100"] * 4, memory_mb=999), 0),
    ],
)  # fmt: skip
def test_room_is_what_the_class_could_still_get_there(wanted: Need, box: Node, gpus: float) -> None:
    found = room_for(room(wanted, "A100"), box.cpu_milli, box.memory_mb, inventory_of(box))
    assert found == pytest.approx(gpus)


@pytest.mark.parametrize(
    ("wanted", "models"),
    [
        (need(gpus=1), {"T4", "A100", "A100-80GB", "H100"}),
        (need(gpus=1, gpu_memory_mb=16_001), {"A100", "A100-80GB", "H100"}),
        (need(gpus=1, gpu_memory_mb=80_000), {"A100-80GB", "H100"}),
        (need(gpus=1, min_compute_capability="8.0"), {"A100", "A100-80GB", "H100"}),
        (need(gpus=1, min_compute_capability="8.6"), {"H100"}),
        (need(gpus=1, gpu_model="^A100"), {"A100", "A100-80GB"}),
        (need(gpus=1, gpu_model="^A100", gpu_memory_mb=50_000), {"A100-80GB"}),
        (need(gpus=1, gpu_model="V100"), set()),
    ],
    ids=lambda value: "|".join(sorted(value)) if isinstance(value, set) else "",
)
def test_memory_capability_and_model_decide_which_gpus_will_do(wanted: Need, models: set[str]) -> None:
    box = node("n", "T4", "A100", "A100-80GB", "H100")
    assert {kind.model for kind, _, _ in inventory_of(box) if serves(kind, wanted)} == models
    found = tables({wanted: 1}, box).rooms
    assert {kind.model for each in found for kind in each.kinds} == models


def test_needs_that_the_same_gpus_serve_are_one_class() -> None:
    box = node("n", *["A100"] * 4)
    (found,) = tables({need(gpus=1, cpus=2): 3, need(gpus=1, cpus=6, gpu_model="A100"): 1}, box).rooms
    assert (found.arrivals, found.cpu_milli) == (4, 3_000)


def test_gpus_of_a_node_are_counted_by_kind() -> None:
    box = node("n", "A100", gpu("g", share_free=0.3), "T4")
    a100, t4 = GpuKind("A100", (8, 0), 40_000), GpuKind("T4", (7, 5), 16_000)
    assert inventory_of(box) == ((a100, 1_300, 1), (t4, 1_000, 1))


# -- cost ------------------------------------------------------------------------------------------------------------


def cost(wanted: Need, box: Node, found: Tables) -> float:
    free = box.fitting(wanted)
    assert free is not None
    return least_cost(wanted, box, free, found)[0]


def chosen(wanted: Need, box: Node, found: Tables) -> tuple[int, ...]:
    free = box.fitting(wanted)
    assert free is not None
    return least_cost(wanted, box, free, found)[1]


def test_a_share_goes_to_a_gpu_that_is_already_shared() -> None:
    box = node("n", "A100", gpu("n-1", share_free=0.5), "A100")
    assert chosen(share(250), box, Tables()) == (1,)
    assert chosen(share(250), box, tables({share(250): 5, need(gpus=1): 5}, box)) == (1,)


def test_a_share_goes_where_the_rest_will_be_of_use() -> None:
    """Not to the fullest: 0.3 of 0.4 leaves a tenth for nobody, 0.3 of 0.6 another 0.3 for the next."""
    box = node("n", gpu("g1", share_free=0.4), gpu("g2", share_free=0.6))
    assert chosen(share(300), box, Tables()) == (0,)
    assert chosen(share(300), box, tables({share(300): 1, share(400): 1}, box)) == (1,)


def test_a_share_goes_to_the_node_where_it_wastes_least() -> None:
    exact, loose = node("n1", gpu("g", share_free=0.5)), node("n2", gpu("g", share_free=0.6))
    found = tables({share(500): 1, share(600): 1}, exact, loose)
    assert cost(share(500), exact, found) < cost(share(500), loose, found)


def test_work_without_gpus_goes_where_cpu_is_in_surplus() -> None:
    lean, rich = node("n1", *["A100"] * 8, cpus=32), node("n2", *["A100"] * 8, cpus=128)
    found = tables({need(gpus=1, cpus=4): 10}, lean, rich)
    assert cost(need(cpus=8), rich, found) == pytest.approx(0, abs=0.02)
    assert cost(need(cpus=8), lean, found) > 1.9, "two GPUs without anybody to feed them"


def test_work_without_gpus_goes_where_memory_is_in_surplus() -> None:
    lean, rich = node("n1", *["A100"] * 8, memory_mb=32_000), node("n2", *["A100"] * 8, memory_mb=128_000)
    found = tables({need(gpus=1, cpus=1, memory_mb=4_000): 10}, lean, rich)
    hungry = need(cpus=1, memory_mb=8_000)
    assert cost(hungry, rich, found) < 0.02 < 1.9 < cost(hungry, lean, found)


def test_a_job_hungry_for_cpu_keeps_off_lean_nodes() -> None:
    lean, rich = node("n1", *["A100"] * 8, cpus=32), node("n2", *["A100"] * 8, cpus=128)
    frugal, hungry = need(gpus=1, cpus=2), need(gpus=1, cpus=16)
    found = tables({frugal: 10, hungry: 2}, lean, rich)
    assert cost(hungry, rich, found) < cost(hungry, lean, found)


def test_a_model_that_some_cannot_do_without_is_left_to_them() -> None:
    common, rare = node("n1", "A100", "A100"), node("n2", "H100", "H100")
    found = tables({ANY: 100, H100: 10}, common, rare)
    assert cost(ANY, common, found) < cost(ANY, rare, found)


def test_whole_nodes_are_left_to_who_needs_several_gpus_at_once() -> None:
    broken, whole = node("n1", *["A100"] * 4), node("n2", *["A100"] * 4)
    broken.take(need(gpus=1), [0])
    found = tables({ANY: 100, need(gpus=4): 10}, broken, whole)
    assert cost(ANY, broken, found) < cost(ANY, whole, found)


def test_gpus_of_a_job_that_takes_several_are_near_each_other() -> None:
    far = [gpu(f"g{n}", numa_node=n % 2) for n in range(4)]
    assert chosen(need(gpus=2), node("n", *far), Tables()) == (0, 2)


@st.composite
def clusters(draw: st.DrawFn) -> list[Node]:
    return [draw(nodes(f"n{n}")) for n in range(1, 1 + draw(st.integers(1, 4)))]


DEMANDS = st.dictionaries(needs(), st.integers(1, 1_000), max_size=8)


@given(clusters(), DEMANDS, st.lists(needs(), min_size=1, max_size=8))
def test_every_cost_is_a_number_of_gpus_that_are_free_and_the_same_each_time(
    cluster: list[Node], counts: dict[Need, int], asked: Sequence[Need]
) -> None:
    found, again = tables(counts, *cluster), tables(counts, *(box.copy() for box in cluster))
    for wanted in [*asked, *counts]:
        for box in cluster:
            free = box.fitting(wanted)
            if free is None:
                continue
            before = box.copy()
            cost, taken = least_cost(wanted, box, free, found)
            assert math.isfinite(cost)
            assert len(set(taken)) == len(taken) == wanted.gpus
            assert set(taken) <= set(free)
            assert least_cost(wanted, before, free, again) == (cost, taken), "remembered burdens change nothing"
            box.take(wanted, taken)
            assert min([box.cpu_milli, box.memory_mb, *(each.share for each in box.gpus)]) >= 0


@given(clusters(), DEMANDS)
def test_every_price_is_finite_and_none_is_below_nothing(cluster: list[Node], counts: dict[Need, int]) -> None:
    found = tables(counts, *cluster)
    assert all(math.isfinite(each.price) and each.price > 0 for each in found.rooms)
    assert all(diet.cpu_milli >= 1 and diet.memory_mb >= 0 for diet in found.diets)


# -- demand ----------------------------------------------------------------------------------------------------------


def test_demand_follows_the_times() -> None:
    demand, old, new = Demand(), need(gpus=1), need(gpus=2)
    demand.record(old, MEMORY - 1)
    assert (demand.total, demand.counts) == (MEMORY - 1, {old: MEMORY - 1})
    for _ in range(MEMORY):
        demand.record(new)
    assert demand.counts[new] > demand.counts[old], "old ones count half"
    for _ in range(20 * MEMORY):
        demand.record(new)
    assert old not in demand.counts
    assert demand.total == sum(demand.counts.values()) < MEMORY


def test_a_flood_of_arrivals_is_forgotten_like_any_others() -> None:
    demand = Demand()
    demand.record(need(gpus=1), 100 * MEMORY)
    assert demand.total == sum(demand.counts.values()) < MEMORY


# -- the policy ------------------------------------------------------------------------------------------------------


def test_tables_are_due_after_the_first_arrival_and_later_after_a_hundred() -> None:
    scoring, box = RoomScoring(), node("n", "A100")
    assert not scoring.due()
    scoring.arrived(ANY)
    assert scoring.due()
    scoring.renew([box])
    assert not scoring.due()
    scoring.arrived(ANY, 10_000)
    scoring.renew([box])
    for _ in range(SURVEY_EVERY):
        assert not scoring.due()
        scoring.arrived(ANY)
    assert scoring.due()


def test_the_first_tables_follow_each_other_fast() -> None:
    scoring, box, renewed = RoomScoring(), node("n", "A100"), []
    for n in range(1, 101):
        scoring.arrived(ANY)
        if scoring.due():
            scoring.renew([box])
            renewed.append(n)
    assert renewed[:6] == [1, 2, 3, 5, 7, 10]
    assert 10 < len(renewed) < 25


def test_renewing_makes_the_costs_of_before_out_of_date() -> None:
    scoring, box = RoomScoring(), node("n", gpu("g", share_free=0.4))
    free = [0]
    before = scoring.cost(share(300), box, free)[0]
    scoring.arrived(share(300), 10)
    scoring.arrived(share(400), 10)
    assert (scoring.epoch, scoring.cost(share(300), box, free)[0]) == (0, before)
    scoring.renew([box])
    assert scoring.epoch == 1
    assert scoring.cost(share(300), box, free)[0] > before + 0.04


def test_what_waits_counts_but_a_flood_of_one_kind_is_capped() -> None:
    box = node("n", "A100")
    flood, few = share(500), share(600)

    def waste(*waiting: tuple[Need, int]) -> list[float]:
        scoring = RoomScoring()
        scoring.renew([box], waiting)
        assert scoring.demand.counts == {}, "it has not arrived twice once it is placed"
        return scoring.tables.waste

    assert waste((few, 1))[500] == pytest.approx(0.5)
    assert waste((flood, 1))[500] == 0
    assert waste((flood, 1_000_000), (few, 10)) == waste((flood, MOST_WAITING), (few, 10))
    assert waste((flood, 100), (few, 10)) != waste((flood, MOST_WAITING), (few, 10))


def test_what_waits_is_added_to_what_has_arrived() -> None:
    both, arrived = RoomScoring(), RoomScoring()
    both.arrived(share(500), 5)
    both.renew([], [(share(500), 5), (share(300), 20)])
    arrived.arrived(share(500), 10)
    arrived.arrived(share(300), 20)
    arrived.renew([])
    assert both.tables.waste == arrived.tables.waste


def test_between_equals_the_node_with_less_cpu_left_is_taken() -> None:
    scoring = RoomScoring()
    small, large = node("b", cpus=4), node("a", cpus=64)
    assert scoring.cost(need(), small, []) < scoring.cost(need(), large, [])
