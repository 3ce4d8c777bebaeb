"""Job arrays from the outside: one request, one id, real processes that know their index."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import NodeProcess, node_offering, wait_until

# P2P_ARRAY_MEMBERS=100000 runs the largest there is, in some two minutes on two cores.
MEMBERS = int(os.environ.get("P2P_ARRAY_MEMBERS", "2000"))
SECONDS = 60 + MEMBERS / 200


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with node_offering(tmp_path_factory.mktemp("arrays"), {"cpus": 8, "memory_mb": 8_000}) as node:
        yield node


def submit(node: NodeProcess, **job: Any) -> tuple[str, int]:
    status, told = node.request("POST", "/jobs", job)
    assert status == 201, told
    assert set(told) == {"id", "created", "count"}
    return told["id"], told["count"]


def wait_over(node: NodeProcess, array: str, *, seconds: float = 60.0) -> dict[str, Any]:
    wait_until(lambda: node.job(array)["finished_at"] is not None, seconds=seconds, every=0.1)
    return node.job(array)


def members(node: NodeProcess, array: str, **filters: str) -> list[dict[str, Any]]:
    wanted = "".join(f"&{name}={value}" for name, value in filters.items())
    found: list[dict[str, Any]] = []
    cursor = ""
    while True:
        status, page = node.request("GET", f"/jobs?array={array}&limit=1000{wanted}{cursor}")
        assert status == 200, page
        found += page["jobs"]
        if page["cursor"] is None:
            return found
        cursor = f"&cursor={page['cursor']}"


def test_each_process_is_told_its_index_its_array_and_its_size(node: NodeProcess) -> None:
    script = 'echo "$P2P_ARRAY_ID $P2P_ARRAY_INDEX $P2P_ARRAY_SIZE $OWN $1" >&1; [ "$P2P_JOB_ID" = "$P2P_ARRAY_ID.$2" ]'
    command = ["sh", "-c", script, "sh", "p{n}", "{array_index}"]
    array, count = submit(
        node, command=command, params={"n": "{array_index}"}, env={"OWN": "e{array_index}"}, array="3,10-12:2"
    )
    assert count == 3
    told = wait_over(node, array)
    assert (told["state"], told["counts"]["completed"]) == ("completed", 3)
    for index in (3, 10, 12):
        status, log = node.request("GET", f"/jobs/{array}.{index}/logs")
        assert (status, str(log).strip()) == (200, f"{array} {index} 3 e{index} p{index}")
        assert node.job(f"{array}.{index}")["array"] == {"id": array, "index": index, "size": 3}


def test_ordinary_process_is_told_of_no_array(node: NodeProcess) -> None:
    job = node.submit(command=["sh", "-c", "env | grep -c P2P_ARRAY; true"])
    node.wait_for(job, "completed")
    assert node.request("GET", f"/jobs/{job}/logs")[1] == 0
    assert node.job(job)["array"] is None


def test_summary_counts_by_state_and_listing_finds_the_members(node: NodeProcess) -> None:
    fails = 'test "$P2P_ARRAY_INDEX" != 2'
    array, _ = submit(node, command=["sh", "-c", fails], array="1-4", max_attempts=1, requires={"cpus": 0.1})
    after = node.submit(command=["true"], depends_on=[array])
    told = wait_over(node, array)
    assert (told["state"], told["count"], told["to_come"]) == ("failed", 4, 0)
    assert (told["counts"]["completed"], told["counts"]["failed"]) == (3, 1)
    assert [job["id"] for job in members(node, array, state="failed")] == [f"{array}.2"]
    assert len(members(node, array)) == 4
    assert node.wait_for(after, "cancelled")["reason"] == f"dependency {array} failed"


def test_array_is_cancelled_as_a_whole_with_its_running_processes(node: NodeProcess) -> None:
    array, _ = submit(node, command=["sleep", "600"], array="1-3000", requires={"cpus": 2})
    wait_until(lambda: node.job(array)["counts"]["running"] == 4)
    assert node.job(f"{array}.2999")["state"] == "waiting", "a member that is not made yet can be looked at"
    status, told = node.request("POST", f"/jobs/{array}/cancel", {"reason": "enough"})
    assert (status, told["state"], told["reason"]) == (200, "cancelled", "enough")
    assert told["counts"]["cancelled"] == told["count"] == 3000
    job = node.submit(command=["true"], requires={"cpus": 8})
    node.wait_for(job, "completed")
    assert node.request("POST", f"/jobs/{array}/cancel")[0] == 409


def test_throttled_array_runs_no_more_at_once_than_it_says(node: NodeProcess, tmp_path: Path) -> None:
    mark = f'd="{tmp_path}"; touch "$d/$P2P_ARRAY_INDEX"; ls "$d" | wc -l; sleep 0.1; rm "$d/$P2P_ARRAY_INDEX"'
    array, _ = submit(node, command=["sh", "-c", mark], array="1-12%3", requires={"cpus": 0.1})
    assert wait_over(node, array)["state"] == "completed"
    at_once = [int(node.request("GET", f"/jobs/{array}.{n}/logs")[1]) for n in range(1, 13)]
    assert 1 <= max(at_once) <= 3


def test_array_in_a_batch_may_be_waited_for_by_number(node: NodeProcess) -> None:
    batch = [
        {"command": ["true"], "array": "1-5", "requires": {"cpus": 0.1}},
        {"command": ["true"], "depends_on": ["#0"]},
    ]
    status, told = node.request("POST", "/jobs", {"jobs": batch})
    assert (status, told["counts"]) == (201, [5, None])
    assert node.job(told["ids"][1])["depends_on"] == [told["ids"][0]]
    node.wait_for(told["ids"][1], "completed")


def test_array_of_another_request_under_the_same_key_is_the_first_one(node: NodeProcess) -> None:
    headers = {"Idempotency-Key": "array-once"}
    body = {"command": ["true"], "array": "1-2", "requires": {"cpus": 0.1}}
    first, again = (node.exchange("POST", "/jobs", body, headers=headers) for _ in range(2))
    assert (first[0], again[0]) == (201, 200)
    assert (again[2]["id"], again[2]["count"]) == (first[2]["id"], 2)


def test_log_of_an_array_is_that_of_a_member(node: NodeProcess) -> None:
    array, _ = submit(node, command=["true"], array="1-2", requires={"cpus": 0.1})
    status, told = node.request("GET", f"/jobs/{array}/logs")
    assert (status, told["field"]) == (409, "id")
    assert f"/jobs/{array}.INDEX/logs" in told["detail"]
    assert node.request("GET", f"/jobs/{array}.9/logs")[0] == 404
    for name in ("..", f"{array}.x", f"{array}.1.1", f"{array}..", ".1"):
        assert node.request("GET", f"/jobs/{name.replace('.', '%2E')}/logs")[0] == 404


@pytest.mark.parametrize(
    ("text", "words"), [("5-1", "has no members"), ("1-100001", "at most 100000 members"), ("x", "neither")]
)
def test_bad_indexes_are_refused_by_name_and_nothing_is_made(node: NodeProcess, text: str, words: str) -> None:
    before = sum(node.request("GET", "/work_queue_status")[1]["by_state"].values())
    status, told = node.request("POST", "/jobs", {"command": ["true"], "array": text})
    assert (status, told["field"]) == (422, "array")
    assert words in told["detail"]
    assert sum(node.request("GET", "/work_queue_status")[1]["by_state"].values()) == before


def test_large_array_runs_to_its_end_on_a_real_node(node: NodeProcess) -> None:
    """Every member once, and the node answers all the while."""
    began = time.monotonic()
    array, count = submit(node, command=["/bin/true"], array=f"1-{MEMBERS}", requires={"cpus": 0.02})
    assert count == MEMBERS
    assert time.monotonic() - began < 2
    slowest = 0.0

    def over() -> bool:
        nonlocal slowest
        asked = time.monotonic()
        told = node.job(array)
        slowest = max(slowest, time.monotonic() - asked)
        assert told["counts"]["failed"] == 0
        return told["finished_at"] is not None

    wait_until(over, seconds=SECONDS, every=0.2)
    told = node.job(array)
    took = time.monotonic() - began
    print(f"{MEMBERS} members in {took:.1f} s, {MEMBERS / took:,.0f} a second; slowest look {slowest:.2f} s")
    assert (told["state"], told["counts"]["completed"]) == ("completed", MEMBERS)
    assert slowest < 5
    if MEMBERS <= 20_000:
        rows = members(node, array)
        assert len({job["id"] for job in rows}) == MEMBERS
        assert {job["attempt"] for job in rows} == {1}
