"""What any peer answers: the last acknowledged write while there is a leader, its own copy when asked for that, pages
for people always, and to a write without a leader a certain no (DESIGN §4)."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.nodes import UNKNOWN, ClusterProcesses, NodeProcess, wait_until

PAGES = ("/status", "/work_queue_status", "/work_assignment_status", "/nodes")
JOB = {"command": ["true"], "requires": {"cpus": 900}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcesses]:
    """Three voters, and a node that has no copy of the queue."""
    with ClusterProcesses(tmp_path_factory.mktemp("reads"), 4, each={"n4": ["--no-voter"]}) as cluster:
        cluster.start(voters=3)
        yield cluster


@pytest.fixture(autouse=True)
def whole(cluster: ClusterProcesses) -> Iterator[None]:
    """Every test leaves three voters that agree."""
    yield
    cluster.mend()


@contextlib.contextmanager
def frozen(nodes: list[NodeProcess]) -> Iterator[None]:
    for node in nodes:
        node.freeze()
    try:
        yield
    finally:
        for node in nodes:
            node.thaw()


def voters(cluster: ClusterProcesses) -> list[NodeProcess]:
    return [cluster[name] for name in ("n1", "n2", "n3")]


def without_leader(node: NodeProcess) -> bool:
    return bool(node.status()["leader_id"] is None)


def timed(node: NodeProcess, method: str, path: str, *rest: Any, **more: Any) -> tuple[float, int, dict[str, str], Any]:
    began = time.monotonic()
    status, headers, body = node.exchange(method, path, *rest, **more)
    return time.monotonic() - began, status, headers, body


def test_what_was_acknowledged_through_one_node_is_read_through_every_other(cluster: ClusterProcesses) -> None:
    for n, (through, at) in zip(range(48), itertools.cycle(itertools.product(cluster.all, cluster.all)), strict=False):
        job = through.submit(**JOB, params={"n": n})
        status, record = at.request("GET", f"/jobs/{job}")
        assert (status, record["state"]) == (200, "pending"), (through, at, record)
        assert record["as_of"]["consistency"] == "linearizable"
        assert at.request("POST", f"/jobs/{job}/cancel")[0] == 200
        status, page = through.request("GET", "/jobs?limit=1")
        assert (page["jobs"][0]["id"], page["jobs"][0]["state"]) == (job, "cancelled"), (through, at)


def test_reads_are_never_older_than_what_was_acknowledged_while_leaders_change(cluster: ClusterProcesses) -> None:
    over, seen, wrong = threading.Event(), [0], []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while not over.is_set():
            with contextlib.suppress(*UNKNOWN):
                status, told = rng.choice(cluster.all).request("POST", "/jobs", JOB, timeout=4)
                if status == 201:
                    status, record = rng.choice(cluster.all).request("GET", f"/jobs/{told['id']}", timeout=4)
                    seen[0] += status == 200
                    if status not in (200, 503, 504):
                        wrong.append((told, status, record))

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(4)]
    for thread in clients:
        thread.start()
    try:
        for _ in range(2):
            before = seen[0]
            wait_until(lambda before=before: seen[0] > before + 30)
            leader = cluster.leader()
            leader.kill()
            cluster.leader(other_than=leader)
            before = seen[0]
            wait_until(lambda before=before: seen[0] > before + 30)
            leader.start()
            cluster.wait_voters(3)
    finally:
        over.set()
        for thread in clients:
            thread.join(20)
    assert not wrong


def test_a_write_is_read_through_any_copy_by_its_index(cluster: ClusterProcesses) -> None:
    for _ in range(20):
        status, headers, told = cluster["n4"].exchange("POST", "/jobs", JOB)
        assert status == 201
        for node in cluster.all:
            status, headers_read, record = node.exchange(
                "GET", f"/jobs/{told['id']}?min_index={headers['x-p2p-index']}"
            )
            assert (status, record.get("state")) == (200, "pending"), (node, record)
            assert int(headers_read["x-p2p-index"]) >= int(headers["x-p2p-index"])
    seconds, status, _, problem = timed(cluster["n1"], "GET", "/jobs?min_index=99999999")
    assert (status, problem["field"]) == (503, "min_index")
    assert 1.5 < seconds < 3


def test_stale_reads_say_so_and_need_no_leader(cluster: ClusterProcesses) -> None:
    job = cluster["n4"].submit(**JOB)
    cluster.wait_equal()
    last, *others = voters(cluster)
    with frozen(others):
        wait_until(lambda: without_leader(last))
        for path in (f"/jobs/{job}?consistency=stale", "/jobs?consistency=stale&limit=1"):
            for node in (last, cluster["n4"]):
                seconds, status, headers, body = timed(node, "GET", path)
                assert status == 200, body
                assert seconds < 2
                assert body["as_of"]["consistency"] == headers["x-p2p-consistency"] == "stale"
                assert (body.get("id") or body["jobs"][0]["id"]) == job
        ages = [last.request("GET", f"/jobs/{job}?consistency=stale")[1]["as_of"]["age_seconds"] for _ in range(2)]
        assert 0.5 < ages[0] <= ages[1]
        seconds, status, headers, problem = timed(last, "GET", f"/jobs/{job}")
        assert (status, headers["retry-after"]) == (503, "1"), problem
        assert seconds < 2.5
    cluster.wait_voters(3)
    assert last.request("GET", f"/jobs/{job}")[0] == 200


@pytest.mark.parametrize("left", ["leader", "follower"])
def test_pages_never_go_dark(cluster: ClusterProcesses, left: str) -> None:
    """From the moment the majority is gone: a leader that does not know it yet, one that has stepped down, a follower,
    and a node that votes on nothing."""
    leader = cluster.leader()
    last = leader if left == "leader" else next(node for node in voters(cluster) if node is not leader)
    others = [node for node in voters(cluster) if node is not last]
    with frozen(others):
        began = time.monotonic()
        told_stale = dict.fromkeys(PAGES, False)
        while time.monotonic() - began < 2.5 or not all(told_stale.values()):
            assert time.monotonic() - began < 10, told_stale
            for page in PAGES:
                for node in (last, cluster["n4"]):
                    seconds, status, headers, body = timed(node, "GET", page)
                    assert status == 200, (node, page, body)
                    assert seconds < 2, (node, page)
                    if node is last:
                        told_stale[page] = headers["x-p2p-consistency"] == "stale"
        assert without_leader(last)
        status, told = last.request("GET", "/ready")
        assert (status, told["reason"]) == (503, "no leader")
        told = last.request("GET", "/status")[1]
        assert told["role"] == "follower"
        assert told["as_of"]["age_seconds"] > 1
    cluster.wait_voters(3)
    assert last.request("GET", "/ready")[0] == 200


def test_a_write_without_a_leader_is_refused_in_time_and_was_not_done(cluster: ClusterProcesses) -> None:
    last, *others = voters(cluster)
    refused = []
    with frozen(others):
        wait_until(lambda: without_leader(last))
        for n, deadline in enumerate((200, 500, 1500)):
            body = {**JOB, "params": {"refused": n}}
            limits = {"X-P2P-Deadline-Ms": str(deadline), "Idempotency-Key": f"refused-{n}"}
            seconds, status, headers, problem = timed(last, "POST", "/jobs", body, headers=limits)
            assert (status, headers["retry-after"]) == (503, "1"), problem
            assert "nothing was done" in problem["detail"]
            assert problem["idempotency_key"] == f"refused-{n}"
            assert deadline / 1000 * 0.5 < seconds < deadline / 1000 + 0.5
            refused.append(n)
    cluster.wait_voters(3)
    there = [record["params"].get("refused") for record in cluster.wait_equal().values()]
    assert not set(refused) & set(there)


def test_a_read_without_a_leader_is_refused_within_2_s(cluster: ClusterProcesses) -> None:
    last, *others = voters(cluster)
    with frozen(others):
        wait_until(lambda: without_leader(last))
        for node in (last, cluster["n4"]):
            seconds, status, headers, problem = timed(node, "GET", "/jobs")
            assert (status, headers["retry-after"]) == (503, "1"), problem
            assert seconds < 2.5


@pytest.mark.parametrize("told", ["soon", "-1", "1.5", "", "99999999999"])
def test_a_deadline_that_is_no_number_of_milliseconds_is_refused(cluster: ClusterProcesses, told: str) -> None:
    for node in cluster.all:
        status, problem = node.request("POST", "/jobs", JOB, headers={"X-P2P-Deadline-Ms": told})
        assert (status, problem["field"]) == (400, "X-P2P-Deadline-Ms")


def test_a_request_makes_two_hops_and_no_more(cluster: ClusterProcesses) -> None:
    follower = next(node for node in voters(cluster) if node is not cluster.leader())
    assert follower.request("POST", "/jobs", JOB, headers={"X-P2P-Hops": "1"})[0] == 201
    seconds, status, headers, problem = timed(follower, "POST", "/jobs", JOB, headers={"X-P2P-Hops": "2"})
    assert (status, headers["x-p2p-not-leader"]) == (503, "1"), problem
    assert seconds < 1
    assert follower.request("POST", "/jobs", JOB, headers={"X-P2P-Hops": "many"})[0] == 400


def test_a_key_is_recognised_through_every_node(cluster: ClusterProcesses) -> None:
    first: Any = None
    for node in cluster.all:
        status, told = node.request("POST", "/jobs", JOB, headers={"Idempotency-Key": "the same"})
        assert status == (200 if first else 201)
        first = first or told["id"]
        assert told["id"] == first
    status, headers, _ = cluster["n4"].exchange("POST", "/jobs", JOB)
    assert len(headers["idempotency-key"]) >= 16, "made, and told, if the caller gave none"
