"""Why a need is not served, in words and numbers, and what comes nearest; never other than placement decides."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from coordination.placement import Need, Node
from coordination.reasons import misses, tally
from tests.unit.coordination.placing import gpu, need, needs, node, nodes


def box(name: str = "n1", **changes: object) -> Node:
    """Two A100s; half of everything else is taken."""
    made = node(name, gpu("G1"), gpu("G2"), cpus=8, memory_mb=16_000, disk_mb=4_000, labels={"zone": "eu"}, **changes)  # type: ignore[arg-type]
    made.take(need(cpus=4, memory_mb=8_000, disk_mb=2_000, anti_affinity="database"), ())
    return made


def words(wanted: Need, *boxes: Node, idle: bool) -> str:
    return tally(wanted, boxes, idle=idle)[0]


@pytest.mark.parametrize(
    ("requires", "told"),
    [
        ({"cpus": 12}, "needs 12 cores; the largest node has 8 on n1"),
        ({"cpus": 8.5}, "needs 8.5 cores; the largest node has 8 on n1"),
        ({"memory_mb": 16_001}, "needs 16001 MB of memory; the largest node has 16000 on n1"),
        ({"disk_mb": 5_000}, "needs 5000 MB of disk; the largest node has 4000 on n1"),
        ({"node": "n9"}, "asks for node n9"),
        ({"labels": {"zone": "us"}}, "needs label zone=us; n1 has zone=eu"),
        ({"labels": {"rack": "7"}}, "needs label rack=7; n1 has rack=(none)"),
        ({"not_labels": {"zone": "eu"}}, "must not have label zone=eu"),
        ({"avoid": ["n1"]}, "keeps away from nodes where it failed"),
        ({"gpus": 3}, "needs 3 GPUs; the most on one node is 2"),
        ({"gpus": 1, "gpu_model": "H100"}, "needs 1 GPU of model H100; the most on one node is 0"),
        (
            {"gpus": 1, "min_compute_capability": "9.0"},
            "needs 1 GPU of compute capability 9.0; the most on one node is 0",
        ),
        (
            {"gpus": 1, "gpu_memory_mb": 50_000},
            "needs 50000 MB on one GPU; the largest GPU has 40000 MB on n1",
        ),
        (
            {"gpus": 1, "gpu_memory_above_mb": 40_000},
            "needs 40001 MB on one GPU; the largest GPU has 40000 MB on n1",
        ),
        (
            {"cpus": 12, "gpus": 3},
            "needs 12 cores; the largest node has 8 on n1; needs 3 GPUs; the most on one node is 2",
        ),
    ],
    ids=str,
)
def test_what_a_node_can_never_serve_is_told_in_words_and_numbers(requires: dict[str, object], told: str) -> None:
    assert words(need(**requires), box(), idle=True) == told


@pytest.mark.parametrize(
    ("requires", "told"),
    [
        ({"cpus": 6}, "needs 6 cores; the most free is 4 on n1"),
        ({"memory_mb": 10_000}, "needs 10000 MB of memory; the most free is 8000 on n1"),
        ({"disk_mb": 2_001}, "needs 2001 MB of disk; the most free is 2000 on n1"),
        ({"anti_affinity": "database"}, "shares no node with another job of anti_affinity database"),
        ({"gpus": 2}, "needs 2 GPUs, whole; the most free on one node is 1"),
        ({"gpus": 1, "gpu_share": 0.5, "node": "n1"}, ""),
        ({"gpus": 1, "gpu_memory_mb": 30_000}, "needs 30000 MB on one GPU; the largest free is 25000 MB on n1"),
    ],
    ids=str,
)
def test_what_a_node_cannot_serve_now_could_be_served_once_it_is_idle(requires: dict[str, object], told: str) -> None:
    one = box()
    one.take(need(gpus=1, gpu_share=0.75, cpus=0), [0])
    one.gpus[1].memory_mb = 25_000  # others hold the rest
    assert words(need(**requires), one, idle=False) == told
    assert words(need(**requires), one, idle=True) == ""


def test_of_one_gpu_the_largest_free_share_is_told() -> None:
    one = node("n1", gpu("G1", share_free=0.25), gpu("G2", share_free=0.3))
    assert words(need(gpus=1), one, idle=False) == "needs 1 GPU, whole; the most free of one is 0.3 on n1"
    half = need(gpus=1, gpu_share=0.5)
    assert words(half, one, idle=False) == "needs 0.5 of a GPU; the most free of one is 0.3 on n1"


def test_of_several_gpus_it_is_told_how_many_are_large_enough() -> None:
    """One has plenty; that the largest has more than is asked for would explain nothing."""
    one = node("n1", "A100-80GB", "T4", "T4")
    wanted = need(gpus=2, gpu_memory_mb=20_000)
    assert words(wanted, one, idle=True) == "needs 20000 MB on each of 2 GPUs; the most on one node is 1"
    full = node("n1", gpu("G1"), gpu("G2", memory_free_mb=5_000))
    assert words(wanted, full, idle=False) == "needs 20000 MB on each of 2 GPUs; the most free on one node is 1"


def test_what_comes_nearest_is_told_of_many_nodes_and_on_how_many_it_fails() -> None:
    boxes = [node("n1", cpus=4), node("n2", cpus=16), node("n3", cpus=8), node("n4", cpus=64)]
    assert tally(need(cpus=32), boxes, idle=True) == (
        "needs 32 cores; the largest node has 16 on n2 (fails on 3 of 4 nodes)",
        3,
        4,
    )


@pytest.mark.parametrize(
    ("requires", "boxes", "near"),
    [
        ({"gpus": 4}, [node("a", "A100"), node("b", *["A100"] * 3), node("c")], "the most on one node is 3"),
        (
            {"gpus": 1, "gpu_memory_mb": 90_000},
            [node("a", "T4"), node("b", "A100-80GB"), node("c", "A100")],
            "the largest GPU has 80000 MB on b",
        ),
        (
            {"gpus": 2, "gpu_memory_mb": 50_000},
            [node("a", "T4", "T4"), node("b", "A100-80GB", "A100"), node("c", "A100", "A100")],
            "the most on one node is 1",
        ),
        (
            {"labels": {"zone": "us"}},
            [node("a"), node("b", labels={"zone": "eu"}), node("c")],
            "b has zone=eu",
        ),
    ],
    ids=["count", "memory", "memory of several", "label"],
)
def test_the_nearest_of_many_is_told(requires: dict[str, object], boxes: list[Node], near: str) -> None:
    told, failed, total = tally(need(**requires), boxes, idle=True)
    assert f"; {near} (fails on 3 of 3 nodes)" in told
    assert (failed, total) == (3, 3)


def test_the_freest_of_many_is_told() -> None:
    boxes = [node(name, gpu("G", share_free=free)) for name, free in (("a", 0.1), ("b", 0.4), ("c", 0.2))]
    assert "the most free of one is 0.4 on b" in words(need(gpus=1), *boxes, idle=False)
    held = [node(name, gpu("G", memory_free_mb=free)) for name, free in (("a", 10), ("b", 24_210), ("c", 300))]
    assert words(need(gpus=1, gpu_memory_mb=40_000), *held, idle=False) == (
        "needs 40000 MB on one GPU; the largest free is 24210 MB on b (fails on 3 of 3 nodes)"
    )
    pairs = [node(name, gpu("1", share_free=a), gpu("2", share_free=b)) for name, a, b in (("a", 1, 0), ("b", 0, 0))]
    assert "the most free on one node is 1" in words(need(gpus=2), *pairs, idle=False)


def test_each_requirement_is_counted_by_itself() -> None:
    boxes = [node("n1", "A100", cpus=2), node("n2", cpus=8), node("n3", "A100", cpus=8), node("n4", cpus=4)]
    told, failed, total = tally(need(cpus=6, gpus=1), boxes, idle=True)
    assert told == (
        "needs 6 cores; the largest node has 4 on n4 (fails on 2 of 4 nodes); "
        "needs 1 GPU; the most on one node is 0 (fails on 2 of 4 nodes)"
    )
    assert (failed, total) == (3, 4), "one of them fails twice"


def test_less_than_nothing_is_free_where_others_hold_more_than_was_given() -> None:
    one = node("n1", gpu("G1", share_free=0), cpus=4)
    one.cpu_milli = -2_000
    assert words(need(cpus=1), one, idle=False) == "needs 1 cores; the most free is 0 on n1"


@given(nodes(), needs())
@settings(max_examples=200, deadline=None)
def test_there_is_a_reason_exactly_where_a_node_does_not_serve(one: Node, wanted: Need) -> None:
    idle, now = misses(wanted, one, idle=True), misses(wanted, one, idle=False)
    assert (not idle) is (one.admits(wanted) is not None), idle
    assert (not now) is (one.fitting(wanted) is not None), now
    for found, is_idle in ((idle, True), (now, False)):
        text, failed, total = tally(wanted, [one], idle=is_idle)
        assert (bool(text), failed, total) == (bool(found), int(bool(found)), 1)
        assert all(miss.wants in text for miss in found.values())
