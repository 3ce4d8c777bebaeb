"""What a job needs, what a node has, whether the one fits the other, and which of its GPUs are near each other."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordination.job import Requires
from coordination.placement import (
    WHOLE,
    GpuOffer,
    Need,
    Node,
    Offer,
    closest,
    compile_need,
    need_of,
    read_shape,
    take,
    with_defaults,
    without_hints,
)


def gpu(uuid: str, **changes: Any) -> GpuOffer:
    plain: dict[str, Any] = {"model": "NVIDIA A100-SXM4-80GB", "memory_mb": 80_000, "memory_free_mb": 80_000}
    return GpuOffer(**{"uuid": uuid, "compute_capability": "8.0", **plain, **changes})


def need(**requires: Any) -> Need:
    """Compiled from what an author writes; the hints of failed attempts may be among it."""
    return compile_need(with_defaults(requires))


BOX = Offer(
    node="n1", cpus=8, memory_mb=16_000, disk_mb=1_000, gpus=(gpu("G1"), gpu("G2")), labels={"zone": "eu"}
)  # fmt: skip


@pytest.mark.parametrize(
    ("requires", "fits"),
    [
        ({"cpus": 8}, True),
        ({"cpus": 8.5}, False),
        ({"cpus": 8.001}, False),
        ({"memory_mb": 16_000}, True),
        ({"memory_mb": 16_001}, False),
        ({"disk_mb": 1_000}, True),
        ({"disk_mb": 1_001}, False),
        ({"node": "n1"}, True),
        ({"node": "n2"}, False),
        ({"labels": {"zone": "eu"}}, True),
        ({"labels": {"zone": "us"}}, False),
        ({"labels": {"rack": "7"}}, False),
        ({"not_labels": {"zone": "us"}}, True),
        ({"not_labels": {"rack": "7"}}, True),
        ({"not_labels": {"zone": "eu"}}, False),
        ({"gpus": 2}, True),
        ({"gpus": 3}, False),
        ({"gpus": 1, "gpu_memory_mb": 80_000}, True),
        ({"gpus": 1, "gpu_memory_mb": 80_001}, False),
        ({"gpus": 1, "gpu_model": "A100|H100"}, True),
        ({"gpus": 1, "gpu_model": "H100"}, False),
        ({"gpus": 1, "min_compute_capability": "8.0"}, True),
        ({"gpus": 1, "min_compute_capability": "7.10"}, True),
        ({"gpus": 1, "min_compute_capability": "8.6"}, False),
        ({"gpus": 1, "min_compute_capability": "10.0"}, False),
        ({"gpus": 1, "gpu_share": 0.5}, True),
        ({"avoid": ["n2"]}, True),
        ({"avoid": ["n1"]}, False),
        ({"gpus": 1, "gpu_memory_above_mb": 79_999}, True),
        ({"gpus": 1, "gpu_memory_above_mb": 80_000}, False),
    ],
    ids=str,
)
def test_node_fits_what_it_has_enough_of(requires: dict[str, Any], fits: bool) -> None:
    node = Node.of(BOX)
    assert (node.fitting(need(**requires)) is not None) is fits
    assert (node.admits(need(**requires)) is not None) is fits


def test_only_gpus_that_serve_are_counted() -> None:
    gpus = (gpu("a", model="T4"), gpu("b", memory_mb=40_000, memory_free_mb=40_000), gpu("c"), gpu("d", healthy=False))
    node = Node.of(Offer(node="n", cpus=8, gpus=gpus))
    assert node.fitting(need(gpus=1, gpu_model="A100")) == [1, 2]
    assert node.fitting(need(gpus=1, gpu_memory_mb=40_001)) == [0, 2]
    assert node.fitting(need(gpus=3)) == [0, 1, 2]
    assert node.fitting(need(gpus=4)) is None


def test_what_is_taken_now_is_not_what_it_never_has() -> None:
    busy = Offer(node="n", cpus=1, memory_mb=10, gpus=(gpu("G1", share_free=0.5, memory_free_mb=9_000), gpu("G2")))
    node = Node.of(busy, Offer(node="n", cpus=8, memory_mb=16_000, gpus=(gpu("G1"), gpu("G2"))))
    for wanted in (need(cpus=2), need(memory_mb=11), need(gpus=2), need(gpus=2, gpu_memory_mb=10_000)):
        assert node.fitting(wanted) is None
        assert node.admits(wanted) is not None
    assert node.fitting(need(gpus=1)) == [1]
    assert node.fitting(need(gpus=1, gpu_share=0.5)) == [0, 1]
    assert node.fitting(need(gpus=1, gpu_share=0.5, gpu_memory_mb=9_001)) == [1]


def test_gpu_that_is_gone_or_unhealthy_serves_nothing() -> None:
    total = Offer(node="n", cpus=8, gpus=(gpu("G1"), gpu("G2"), gpu("G3")))
    node = Node.of(Offer(node="n", cpus=8, gpus=(gpu("G1"), gpu("G3", healthy=False))), total)
    assert node.fitting(need(gpus=1)) == [0]
    assert node.admits(need(gpus=3)) == (0, 1, 2), "they may come back"


def test_disk_that_was_filled_or_freed_by_others_counts_at_once() -> None:
    """What a node has in all of its disk moves all the time; what was found of it a moment ago must not bind."""
    node = Node.of(Offer(node="n", cpus=8, disk_mb=10))
    wanted = need(disk_mb=100)
    assert node.admits(wanted) is None
    node.become(Node.of(Offer(node="n", cpus=8, disk_mb=100)))
    assert node.admits(wanted) == ()
    assert node.fitting(wanted) == []


def test_one_job_with_a_word_on_a_node() -> None:
    node = Node.of(BOX)
    database, other = need(anti_affinity="database"), need(anti_affinity="web")
    node.take(database, ())
    assert node.fitting(database) is None
    assert node.fitting(other) == []
    assert node.fitting(need()) == []
    node.give(database, ())
    assert node.fitting(database) == []


@pytest.mark.parametrize("parts", range(2, 21))
def test_equal_shares_make_a_whole(parts: int) -> None:
    """Whatever floats say: a demand is rounded up to thousandths, so that n of them never are more than one GPU."""
    node = Node.of(Offer(node="n1", cpus=64, gpus=(gpu("G1"),)))
    wanted, placed = need(gpus=1, gpu_share=1 / parts, gpu_memory_mb=80_000 // parts, cpus=0), 0
    while node.fitting(wanted) is not None:
        node.take(wanted, (0,))
        placed += 1
    assert placed == WHOLE // -(-WHOLE // parts)
    assert 0 <= node.gpus[0].share < wanted.share


SHAPES = st.fixed_dictionaries(
    {},
    optional={
        "cpus": st.sampled_from([0, 0.1, 0.3, 1, 2.5]),
        "memory_mb": st.integers(0, 4_000),
        "gpus": st.integers(0, 2),
        "gpu_memory_mb": st.integers(0, 40_000),
        "gpu_share": st.sampled_from([0.1, 1 / 3, 1]),
        "anti_affinity": st.sampled_from(["x", "y"]),
    },
)


@given(st.lists(st.tuples(SHAPES, st.permutations([0, 1])), max_size=12), st.randoms(use_true_random=False))
def test_what_is_taken_and_given_back_in_any_order_is_exactly_what_it_was(moves: list[Any], random: Any) -> None:
    node, untouched = Node.of(BOX), Node.of(BOX)
    taken = [(need(**shape), tuple(gpus[: shape.get("gpus", 0)])) for shape, gpus in moves]
    for wanted, gpus in taken:
        node.take(wanted, gpus)
    random.shuffle(taken)
    for wanted, gpus in taken:
        node.give(wanted, gpus)
    untouched.version, node.tags = node.version, {word: n for word, n in node.tags.items() if n}
    assert repr(node) == repr(untouched)


def test_copy_moves_by_itself() -> None:
    node = Node.of(BOX)
    copy = node.copy()
    copy.take(need(gpus=2, anti_affinity="x"), (0, 1))
    assert node.fitting(need(gpus=2, anti_affinity="x", cpus=8)) == [0, 1]


def test_nodes_are_of_one_kind_if_they_differ_only_in_what_is_free() -> None:
    one = Node.of(Offer(node="n1", cpus=1, gpus=(gpu("G1", share_free=0.2),), labels={"zone": "eu"}), BOX)
    assert one.same_kind(Node.of(BOX))
    assert not one.same_kind(Node.of(Offer(node="n", cpus=1)))
    relabelled = Offer(node="n", cpus=8, memory_mb=16_000, disk_mb=1_000, gpus=BOX.gpus, labels={"zone": "us"})
    assert not one.same_kind(Node.of(relabelled))


def test_numbers_of_gpus_are_those_of_their_uuids_in_any_order() -> None:
    node = Node.of(Offer(node="n", gpus=(gpu("c"), gpu("a"), gpu("b"))))
    assert node.uuids((0, 2)) == ("a", "c")
    assert node.numbers(["c", "gone", "a"]) == [2, 0]


# -- needs -----------------------------------------------------------------------------------------------------------


def test_equal_requirements_are_one_shape_in_any_order() -> None:
    one = Requires(cpus=2, labels={"a": "1", "b": "2"})
    other = Requires(labels={"b": "2", "a": "1"}, cpus=2.0, gpus=0)
    assert one.demands() == other.demands()
    assert Requires().demands() == {}
    assert read_shape("{}")["cpus"] == 1.0


def test_one_text_is_one_need() -> None:
    assert need_of('{"gpus":1}') is need_of('{"gpus":1}')
    assert need_of('{"gpus":1}') != need_of('{"gpus":2}')


def test_demands_are_rounded_up() -> None:
    assert need(cpus=0.0001).cpu_milli == 1
    assert need(cpus=0.3).cpu_milli == 300, "which floats say is a little more than it is"
    assert need(gpus=1, gpu_share=0.3335).share == 334


def test_share_counts_only_with_a_gpu() -> None:
    assert need(gpu_share=0.5).gpu_milli == 0
    assert need(gpus=1, gpu_share=0.5).gpu_milli == 500
    assert need(gpus=4).gpu_milli == 4_000


def test_hints_are_given_up_one_after_the_other() -> None:
    hinted = need(gpus=1, avoid=["n1"], gpu_memory_above_mb=24_000)
    told = [(variant.avoid, variant.gpu_memory_above_mb) for variant in without_hints(hinted)]
    assert told == [({"n1"}, 24_000), (set(), 24_000), ({"n1"}, 0), (set(), 0)]
    plain = need(gpus=1)
    assert without_hints(plain) == (plain,)


# -- GPUs that are near each other -----------------------------------------------------------------------------------


def linked(*islands: str, numa: str = "") -> Node:
    """One GPU a letter; NVLink joins those of an island; `numa` gives each one's NUMA node, by the letters."""
    links = {letter: tuple(other for other in island if other != letter) for island in islands for letter in island}
    letters = sorted(links)
    nodes = dict(zip(letters, numa or ["-1"] * len(letters), strict=True))
    return Node.of(
        Offer(
            node="n", gpus=tuple(gpu(letter, links=links[letter], numa_node=int(nodes[letter])) for letter in letters)
        )
    )


@pytest.mark.parametrize(
    ("node", "free", "wanted", "chosen"),
    [
        pytest.param(linked("abcd", "efgh"), "abcdefgh", 4, "abcd", id="one island"),
        pytest.param(linked("abcd", "efgh"), "bcdefgh", 4, "efgh", id="the one that is whole"),
        pytest.param(linked("abcd", "efgh"), "abefgh", 2, "ab", id="the smaller rest, so that the larger stays"),
        pytest.param(linked("abcd", "efgh"), "acdefg", 3, "acd", id="the first of equals"),
        pytest.param(linked("ab", "cd", "ef"), "abdef", 4, "abef", id="two whole pairs, and none broken"),
        pytest.param(linked("ab", "cd", "ef"), "abcdef", 3, "abc", id="a pair and one more"),
        pytest.param(linked(*"abcd", numa="0011"), "abcd", 2, "ab", id="one NUMA node"),
        pytest.param(linked(*"abcd", numa="0110"), "bcd", 2, "bc", id="the NUMA node that has two"),
        pytest.param(linked("bc", "a", "d", numa="0101"), "abcd", 2, "bc", id="NVLink before NUMA"),
        pytest.param(linked("ab", "cd", numa="0000"), "acd", 2, "cd", id="the pair that is whole"),
        pytest.param(linked("ab", "cd", "ef", "gh", numa="00001111"), "cdefgh", 4, "efgh", id="pairs of one NUMA node"),
        pytest.param(linked(*"abc"), "abc", 2, "ab", id="nothing is known: the first"),
        pytest.param(linked(*"abc"), "c", 1, "c", id="one"),
        pytest.param(linked("abc"), "abc", 3, "abc", id="all there are"),
    ],
)
def test_gpus_of_one_job_are_near_each_other(node: Node, free: str, wanted: int, chosen: str) -> None:
    assert node.uuids(closest(node, node.numbers(free), wanted)) == tuple(chosen)


def test_chain_of_links_is_used_where_it_is_joined() -> None:
    """Not every machine joins all with all: in a ring of four a is joined to b and d only."""
    ring = {"a": "bd", "b": "ac", "c": "bd", "d": "ac"}
    node = Node.of(Offer(node="n", gpus=tuple(gpu(name, links=tuple(ring[name])) for name in ring)))
    chosen = node.uuids(closest(node, node.numbers("acd"), 2))
    assert chosen[1] in ring[chosen[0]]
    star = {"a": "d", "b": "d", "c": "d", "d": "abc"}
    node = Node.of(Offer(node="n", gpus=tuple(gpu(name, links=tuple(star[name])) for name in star)))
    assert "d" in node.uuids(closest(node, node.numbers("abcd"), 3))


@given(
    st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=8, max_size=8), st.sets(st.integers(0, 7), min_size=1)
)
def test_closest_gives_what_was_asked_for_of_what_is_free(links: list[list[int]], free: set[int]) -> None:
    node = Node.of(Offer(node="n", gpus=tuple(gpu(str(n), links=tuple(map(str, to))) for n, to in enumerate(links))))
    for wanted in range(1, len(free) + 1):
        chosen = closest(node, sorted(free), wanted)
        assert len(set(chosen)) == wanted
        assert set(chosen) <= free
        assert list(chosen) == sorted(chosen)


# -- offers, as a worker counts them ---------------------------------------------------------------------------------


def test_take_leaves_the_rest() -> None:
    shape = with_defaults({"cpus": 2.5, "memory_mb": 1_000, "disk_mb": 10, "gpus": 1, "gpu_memory_mb": 50_000})
    left = take(BOX, shape, ("G2",))
    assert (left.cpus, left.memory_mb, left.disk_mb) == (5.5, 15_000, 990)
    assert left.gpus[0] == BOX.gpus[0]
    assert (left.gpus[1].share_free, left.gpus[1].memory_free_mb) == (0.0, 30_000)
    assert BOX.gpus[1].share_free == 1.0, "the offer itself is not changed"
