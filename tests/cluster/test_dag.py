"""Ten thousand jobs that wait for each other, as real processes on a real node: each starts after all it waits for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.nodes import NodeProcess, node_offering, queue_of, wait_until

JOBS = int(os.environ.get("P2P_DAG_JOBS", "10000"))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with node_offering(tmp_path_factory.mktemp("dag"), {"cpus": 8, "memory_mb": 8_000}) as node:
        yield node


def layered(n: int, seed: int) -> list[dict[str, Any]]:
    """A random graph, wide and some fifty levels deep: each job waits for up to three of the 200 to 400
    before it, every hundredth for a hundred of them, and some for none."""
    random = Random(seed)
    jobs: list[dict[str, Any]] = []
    for k in range(n):
        recent = range(max(0, k - 400), max(0, k - 200))
        most = 100 if k % 100 == 99 else 3
        deps = random.sample(recent, min(len(recent), random.randint(0, most)))
        jobs.append({"command": ["true"], "requires": {"cpus": 0.02}, "depends_on": [f"#{dep}" for dep in deps]})
    return jobs


def test_graph_of_ten_thousand_jobs_runs_in_an_order_that_respects_every_edge(node: NodeProcess) -> None:
    jobs = layered(JOBS, seed=42)
    began = time.monotonic()
    status, told = node.request("POST", "/jobs", {"jobs": jobs}, timeout=60)
    assert status == 201, told
    submitted = time.monotonic() - began

    def over() -> bool:
        by_state = node.request("GET", "/work_queue_status")[1]["by_state"]
        assert by_state["failed"] == by_state["cancelled"] == 0
        return bool(by_state["completed"] == JOBS)

    wait_until(over, seconds=60 + JOBS / 100, every=0.2)
    took = time.monotonic() - began
    print(f"{JOBS} jobs: submitted in {submitted:.1f} s, run in {took:.1f} s, {JOBS / took:,.0f} a second")
    records = queue_of(node)
    assert len(records) == JOBS
    edges = 0
    for record, job in zip((records[id] for id in told["ids"]), jobs, strict=True):
        assert record["attempt"] == 1
        assert record["depends_on"] == [told["ids"][int(dep[1:])] for dep in job["depends_on"]]
        for dep in record["depends_on"]:
            edges += 1
            assert records[dep]["finished_at"] <= record["claimed_at"], f"{record['id']} was begun before {dep} ended"
    assert edges > JOBS


def test_cycle_cannot_be_written(node: NodeProcess) -> None:
    before = sum(node.request("GET", "/work_queue_status")[1]["by_state"].values())
    for deps, words in ((["#1"], "comes after"), (["#0"], "a cycle")):
        jobs = [{"command": ["true"], "depends_on": deps}, {"command": ["true"], "depends_on": ["#0"]}]
        status, told = node.request("POST", "/jobs", {"jobs": jobs})
        assert (status, told["field"]) == (422, "jobs[0].depends_on[0]")
        assert words in told["detail"]
    assert sum(node.request("GET", "/work_queue_status")[1]["by_state"].values()) == before


def test_long_chain_that_is_cancelled_at_its_root_is_gone_at_once(node: NodeProcess, tmp_path: Path) -> None:
    root: dict[str, Any] = {"command": ["sleep", "600"], "grace_seconds": 1}
    jobs = [root, *({"command": ["true"], "depends_on": [f"#{k}"]} for k in range(JOBS - 1))]
    status, told = node.request("POST", "/jobs", {"jobs": jobs}, timeout=60)
    assert status == 201, told
    node.wait_for(told["ids"][0], "running")
    began = time.monotonic()
    assert node.request("POST", f"/jobs/{told['ids'][0]}/cancel")[0] == 200
    last = node.job(told["ids"][-1])
    assert (last["state"], last["reason"]) == ("cancelled", f"dependency {told['ids'][-2]} cancelled")
    print(f"a chain of {JOBS} was cancelled in {time.monotonic() - began:.2f} s")
    assert time.monotonic() - began < 10
