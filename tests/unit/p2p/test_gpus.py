"""Which GPUs are offered, and how much of each is free."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.gpus import FATAL_XIDS, GONE, Gpu, Health, Holder, Reading, Who, free_mb

OURS, OTHER = ("a", 1), ("b", 1)


def gpu(**changes: Any) -> Gpu:
    return Gpu(**{"uuid": "G1", "model": "NVIDIA A40", "memory_mb": 46_000, "uncorrected": 0, **changes})


def why(health: Health, *gpus: Gpu, **changes: Any) -> dict[str, str | None]:
    return {g.uuid: g.why for g in health.judge(Reading(gpus=gpus, **changes)).gpus}


@pytest.mark.parametrize("number", sorted(FATAL_XIDS))
def test_a_fatal_xid_is_remembered_until_the_node_starts_again(number: int) -> None:
    health = Health()
    told = why(health, gpu(xids=(number,)))["G1"]
    assert told is not None and told.startswith(f"Xid {number}: ")
    assert why(health, gpu())["G1"] == told
    assert why(Health(), gpu())["G1"] is None


@pytest.mark.parametrize("number", [13, 31, 43, 45, 63, 68, 109])
def test_an_error_of_the_application_takes_no_gpu_away(number: int) -> None:
    assert why(Health(), gpu(xids=(number,)))["G1"] is None


def test_ecc_errors_count_from_when_the_gpu_was_first_seen_or_reset() -> None:
    health = Health()
    assert why(health, gpu(uncorrected=3))["G1"] is None
    assert why(health, gpu(uncorrected=4))["G1"] == "1 new uncorrected ECC error"
    assert why(health, gpu(uncorrected=5))["G1"] == "2 new uncorrected ECC errors"
    assert why(health, gpu(uncorrected=0))["G1"] is None, "after a reset"
    assert why(health, gpu(uncorrected=1))["G1"] == "1 new uncorrected ECC error"
    assert why(health, gpu(uncorrected=None))["G1"] is None, "what is not told is no error"


def test_a_gpu_lost_off_the_bus_stays_in_the_list_until_it_is_back() -> None:
    health = Health()
    other = gpu(uuid="G2")
    why(health, gpu(), other)
    for _ in range(2):
        assert why(health, other) == {"G2": None, "G1": GONE}
    assert why(health, gpu(), other) == {"G1": None, "G2": None}


def test_a_mig_instance_that_was_taken_away_is_no_loss() -> None:
    health = Health()
    why(health, gpu(uuid="MIG-1", parent="G1"), gpu(uuid="MIG-2", parent="G1"))
    assert why(health, gpu(uuid="MIG-2", parent="G1")) == {"MIG-2": None}


def test_a_gpu_that_is_divided_now_is_not_lost() -> None:
    health = Health()
    why(health, gpu())
    assert why(health, gpu(uuid="MIG-1", parent="G1")) == {"MIG-1": None}


def test_what_nvml_says_of_this_moment_counts_for_this_moment() -> None:
    health = Health()
    assert why(health, gpu(fault="NVML: GPU requires restart"))["G1"] == "NVML: GPU requires restart"
    assert why(health, gpu())["G1"] is None
    assert why(health, gpu(remap_failed=True))["G1"] == "a broken memory row could not be remapped"


def test_when_nvml_fails_all_known_gpus_are_unhealthy_until_it_works() -> None:
    health = Health()
    why(health, gpu())
    assert why(health, error="NVML: Driver Not Loaded") == {"G1": "NVML: Driver Not Loaded"}
    assert why(health, gpu()) == {"G1": None}


def test_an_unhealthy_gpu_is_offered_with_nothing_free() -> None:
    (offer,) = Reading(gpus=(gpu(why="Xid 79"),)).offers()
    assert (offer.healthy, offer.share_free, offer.memory_free_mb, offer.memory_mb) == (False, 0.0, 0, 46_000)
    (offer,) = Reading(gpus=(gpu(reserved_mb=500, utilization=7.0, links=("G2",), numa_node=1),)).offers()
    assert (offer.healthy, offer.share_free, offer.memory_free_mb) == (True, 1.0, 45_500)
    assert (offer.utilization, offer.links, offer.numa_node) == (7.0, ("G2",), 1)


# -- free memory ------------------------------------------------------------------------------------------------------


def holder(pid: int, memory_mb: int | None, job: str | None = None) -> Holder:
    return Holder(pid, memory_mb, None, Who(1, pid, "python", job, 1 if job else 0))


def owner(one: Holder) -> tuple[str, int] | None:
    return (one.who.job, one.who.attempt) if one.who is not None and one.who.job is not None else None


HIDDEN = Holder(9, None)

FREE: dict[str, tuple[dict[str, Any], dict[Any, int], int]] = {
    "empty": ({}, {}, 46_000),
    "the driver's own": ({"reserved_mb": 500}, {}, 45_500),
    "granted, not used yet": ({}, {OURS: 16_000}, 30_000),
    "granted and used counts once": ({"used_mb": 9_000, "holders": (holder(1, 9_000, "a"),)}, {OURS: 16_000}, 30_000),
    "used beyond the grant": ({"used_mb": 20_000, "holders": (holder(1, 20_000, "a"),)}, {OURS: 16_000}, 26_000),
    "declared nothing": ({"used_mb": 20_000, "holders": (holder(1, 20_000, "a"),)}, {OURS: 0}, 26_000),
    "a stranger beside a job": (
        {"used_mb": 12_000, "holders": (holder(1, 2_000, "a"), holder(2, 10_000))}, {OURS: 16_000}, 20_000,
    ),
    "what an ended job left is a stranger's": ({"used_mb": 5_000, "holders": (holder(1, 5_000, "old"),)}, {}, 41_000),
    "nobody we see, no job of ours": ({"used_mb": 7_000, "holders": (HIDDEN,)}, {}, 39_000),
    "nobody we see may be our job": ({"used_mb": 7_000, "holders": (HIDDEN,)}, {OURS: 16_000}, 30_000),
    "but not beyond what it declared": ({"used_mb": 20_000, "holders": (HIDDEN,)}, {OURS: 16_000}, 26_000),
    "two jobs": (
        {"used_mb": 15_000, "holders": (holder(1, 5_000, "a"), holder(2, 10_000, "b"))},
        {OURS: 8_000, OTHER: 8_000}, 28_000,
    ),
    "never below nothing": ({"used_mb": 46_000, "holders": (holder(2, 46_000),)}, {OURS: 16_000}, 0),
}  # fmt: skip


@pytest.mark.parametrize(("state", "grants", "free"), FREE.values(), ids=FREE)
def test_free_memory(state: dict[str, Any], grants: dict[tuple[str, int], int], free: int) -> None:
    assert free_mb(gpu(**state), grants, owner) == free


def test_what_was_there_before_our_jobs_is_a_strangers() -> None:
    told = gpu(used_mb=7_000, holders=(HIDDEN,))
    assert free_mb(told, {OURS: 16_000}, owner, before=7_000) == 23_000
    assert free_mb(replace(told, used_mb=15_000), {OURS: 16_000}, owner, before=7_000) == 23_000, "8000 are the job's"
    assert free_mb(replace(told, used_mb=0), {OURS: 16_000}, owner, before=7_000) == 30_000


@given(
    grants=st.dictionaries(st.sampled_from([OURS, OTHER]), st.integers(0, 30_000)),
    held=st.lists(st.tuples(st.sampled_from(["a", "b", "old", None]), st.integers(0, 20_000)), max_size=6),
    unseen=st.integers(0, 20_000),
    more=st.integers(1, 5_000),
)
def test_free_memory_is_never_more_than_is_really_there(
    grants: dict[tuple[str, int], int], held: list[tuple[str | None, int]], unseen: int, more: int
) -> None:
    holders = tuple(holder(n, memory, job) for n, (job, memory) in enumerate(held))
    used = sum(memory for _, memory in held) + unseen
    now = gpu(memory_mb=100_000, used_mb=used, holders=holders)
    free = free_mb(now, grants, owner)
    assert free <= max(100_000 - used, 0), "what is used is not free"
    assert free <= max(100_000 - sum(grants.values()), 0), "what was promised is not free"
    strangers = sum(memory for job, memory in held if (job, 1) not in grants)
    assert free <= max(100_000 - strangers - sum(grants.values()), 0), "nor is a stranger's part of a promise"
    grown = replace(now, used_mb=used + more, holders=(*holders, holder(99, more)))
    assert free_mb(grown, grants, owner) == max(free - more, 0) or free == 0
