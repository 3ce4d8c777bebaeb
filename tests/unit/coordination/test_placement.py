"""Placement: what fits, what is said of what does not, and in which order jobs are chosen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from coordination.job import Requires
from coordination.placement import GpuOffer, Offer, Placed, choose, choose_gpus, misfits, read_shape, take
from coordination.queue_state import Head


def gpu(uuid: str, **changes: Any) -> GpuOffer:
    plain: dict[str, Any] = {"model": "NVIDIA A100-SXM4-80GB", "memory_mb": 80_000, "memory_free_mb": 80_000}
    return GpuOffer(**{"uuid": uuid, "compute_capability": "8.0", **plain, **changes})


def shape(**requires: Any) -> dict[str, Any]:
    return read_shape(Requires(**requires).shape())


BOX = Offer(
    node="n1", cpus=8, memory_mb=16_000, disk_mb=1_000, gpus=(gpu("G1"), gpu("G2")), labels={"zone": "eu"}
)  # fmt: skip


@pytest.mark.parametrize(
    ("requires", "sentence"),
    [
        ({"cpus": 8}, None),
        ({"cpus": 8.5}, "needs 8.5 cores; 8 free on n1"),
        ({"memory_mb": 16_000}, None),
        ({"memory_mb": 16_001}, "needs 16001 MB of memory; 16000 free on n1"),
        ({"disk_mb": 1_001}, "needs 1001 MB of disk; 1000 free on n1"),
        ({"node": "n1"}, None),
        ({"node": "n2"}, "asks for node n2; this is n1"),
        ({"labels": {"zone": "eu"}}, None),
        ({"labels": {"zone": "us"}}, "needs label zone=us; n1 has zone=eu"),
        ({"labels": {"rack": "7"}}, "needs label rack=7; n1 has rack=(none)"),
        ({"gpus": 2}, None),
        ({"gpus": 3}, "needs 3 GPU(s) (any); 2 of 2 on n1 fit, the largest free is 80000 MB"),
        ({"gpus": 1, "gpu_memory_mb": 80_000}, None),
        (
            {"gpus": 1, "gpu_memory_mb": 80_001},
            "needs 1 GPU(s) (80001 MB free each); 0 of 2 on n1 fit, the largest free is 80000 MB",
        ),
        ({"gpus": 1, "gpu_model": "A100|H100"}, None),
        (
            {"gpus": 1, "gpu_model": "H100"},
            "needs 1 GPU(s) of model H100 (any); 0 of 2 on n1 fit, the largest free is 80000 MB",
        ),
        ({"gpus": 1, "min_compute_capability": "8.0"}, None),
        ({"gpus": 1, "min_compute_capability": "7.10"}, None),
        ({"gpus": 1, "min_compute_capability": "8.6"}, "needs 1 GPU(s) (any); 0 of 2 on n1 fit"),
        ({"gpus": 1, "min_compute_capability": "10.0"}, "needs 1 GPU(s) (any); 0 of 2 on n1 fit"),
    ],
)
def test_requirement_fits_or_says_why_not(requires: dict[str, Any], sentence: str | None) -> None:
    why = misfits(shape(**requires), BOX)
    if sentence is None:
        assert why == []
    else:
        assert len(why) == 1
        assert why[0].startswith(sentence)


def test_every_requirement_that_fails_has_its_sentence() -> None:
    why = misfits(shape(cpus=9, memory_mb=99_999, node="n2", gpus=3), BOX)
    assert len(why) == 4


def test_node_without_gpus_says_so() -> None:
    assert misfits(shape(gpus=1), Offer(node="n1", cpus=1)) == ["needs 1 GPU(s); n1 has none free"]


def test_gang_is_not_placed_on_one_node() -> None:
    assert "gangs" in misfits({**shape(), "nodes": 2}, BOX)[0]


def test_shares_go_to_the_fullest_gpu_that_still_fits() -> None:
    offer = Offer(node="n1", gpus=(gpu("G1"), gpu("G2", share_free=0.5), gpu("G3", share_free=0.2)))
    assert choose_gpus(shape(gpus=1, gpu_share=0.25), offer) == ("G2",)
    assert choose_gpus(shape(gpus=1), offer) == ("G1",)
    assert choose_gpus(shape(gpus=2), offer) is None, "a shared GPU is not a whole one"


def test_whole_demand_goes_to_the_smallest_gpu_that_fits() -> None:
    offer = Offer(node="n1", gpus=(gpu("big"), gpu("small", memory_free_mb=16_000), gpu("tiny", memory_free_mb=8_000)))
    assert choose_gpus(shape(gpus=1, gpu_memory_mb=10_000), offer) == ("small",)


@pytest.mark.parametrize("parts", range(2, 21))
def test_shares_fill_one_gpu_before_the_next(parts: int) -> None:
    """However many equal parts, they make a whole, whatever floats say."""
    offer = Offer(node="n1", cpus=64, gpus=(gpu("G1"), gpu("G2")))
    wants = shape(gpus=1, gpu_share=1 / parts, gpu_memory_mb=80_000 // parts, cpus=0)
    placed = []
    while (chosen := choose_gpus(wants, offer)) is not None:
        placed += chosen
        offer = take(offer, wants, chosen)
    assert placed == ["G1"] * parts + ["G2"] * parts


def test_take_leaves_the_rest() -> None:
    left = take(BOX, shape(cpus=2.5, memory_mb=1_000, disk_mb=10, gpus=1, gpu_memory_mb=50_000), ("G2",))
    assert (left.cpus, left.memory_mb, left.disk_mb) == (5.5, 15_000, 990)
    assert left.gpus[0] == BOX.gpus[0]
    assert (left.gpus[1].share_free, left.gpus[1].memory_free_mb) == (0.0, 30_000)
    assert BOX.gpus[1].share_free == 1.0, "the offer itself is not changed"


class Pending:
    """Pending jobs by shape; remembers which shapes were asked for."""

    def __init__(self, **jobs: list[tuple[int, int]]) -> None:
        self.jobs = {int(name[1:]): queue for name, queue in jobs.items()}
        self.asked: list[int] = []

    def __call__(self, number: int) -> Iterator[Head]:
        self.asked.append(number)
        ordered = sorted(self.jobs[number], key=lambda job: (-job[1], job[0]))
        return iter([Head(seq, priority, number) for seq, priority in ordered])


def test_jobs_of_all_shapes_are_merged_by_priority_then_age() -> None:
    pending = Pending(s1=[(1, 50), (4, 90), (6, 50)], s2=[(2, 50), (3, 90), (5, 10)])
    picks = choose([(1, shape(cpus=1)), (2, shape(cpus=0.5))], pending, BOX, 5)
    assert [pick.seq for pick in picks] == [3, 4, 1, 2, 6]


def test_no_more_than_asked_for() -> None:
    pending = Pending(s1=[(n, 50) for n in range(10)])
    assert len(choose([(1, shape())], pending, BOX, 3)) == 3
    assert choose([(1, shape())], pending, BOX, 0) == []


def test_shape_that_does_not_fit_blocks_nobody_and_is_not_even_read() -> None:
    pending = Pending(s1=[(1, 100)], s2=[(2, 1)])
    assert choose([(1, shape(cpus=99)), (2, shape())], pending, BOX, 5) == [Placed(2, ())]
    assert pending.asked == [2]


def test_shape_that_has_stopped_fitting_leaves_the_merge() -> None:
    pending = Pending(s1=[(1, 90), (2, 90)], s2=[(3, 10), (4, 10)])
    picks = choose([(1, shape(cpus=6)), (2, shape(cpus=1))], pending, BOX, 9)
    assert [pick.seq for pick in picks] == [1, 3, 4]


def test_the_offer_is_never_exceeded() -> None:
    pending = Pending(s1=[(n, 50) for n in range(9)], s2=[(n, 50) for n in range(10, 19)])
    picks = choose([(1, shape(gpus=1, cpus=1)), (2, shape(cpus=3))], pending, BOX, 99)
    assert [pick.gpus for pick in picks if pick.seq < 9] == [("G1",), ("G2",)]
    assert sum(pick.seq >= 10 for pick in picks) == 2


def test_equal_requirements_are_one_shape_in_any_order() -> None:
    one = Requires(cpus=2, labels={"a": "1", "b": "2"})
    other = Requires(labels={"b": "2", "a": "1"}, cpus=2.0, gpus=0)
    assert one.shape() == other.shape()
    assert Requires().shape() == "{}"
    assert read_shape("{}")["cpus"] == 1.0
