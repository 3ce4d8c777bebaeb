"""Who votes: operators' orders, the seat handed over on request, and the autopilot's replacements of the dead (DESIGN
§3; PROTOCOL §2.12, §2.24)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from p2p.replica import FAREWELL_SECONDS
from tests.cluster.histories import Clients, check
from tests.nodes import ClusterProcesses, NodeProcess, wait_until

JOB = {"command": ["true"], "requires": {"cpus": 900}}
SOON = {
    "cluster": {
        "young_steady_seconds": 0.3,
        "steady_seconds": 1,
        "replace_dead_after_seconds": 5,
    }
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcesses]:
    """Five nodes, of which three vote. A test may send one away for good."""
    with ClusterProcesses(tmp_path_factory.mktemp("voters"), 5, settings=SOON) as cluster:
        cluster.start(voters=3)
        yield cluster


@pytest.fixture(autouse=True)
def whole(cluster: ClusterProcesses) -> Iterator[None]:
    yield
    cluster.mend()


def order(at: NodeProcess, what: str, **body: Any) -> tuple[int, Any]:
    return at.request("POST", f"/admin/{what}", body, timeout=90)


def test_voters_are_shown_removed_and_added_through_any_node(cluster: ClusterProcesses) -> None:
    before = cluster["n1"].voters()
    assert len(before) == 3
    assert [row["node"] for row in before.values() if row["leads"]] == [cluster.leader().node_id]
    for node in cluster.all:
        assert node.voters().keys() == before.keys()
    spare = next(node for node in cluster.all if node.node_id not in before)
    rest = {node.node_id for node in cluster.all} - before.keys()
    gone = next(node for node in cluster.followers() if node.node_id in before)
    status, told = order(spare, "voters/remove", node=gone.node_id)
    assert status == 200, told
    assert gone.node_id not in spare.voters()
    # The autopilot fills the place, and not with the one that was sent away.
    wait_until(lambda: rest & gone.voters().keys(), seconds=30)
    assert gone.node_id not in gone.voters()
    (filled,) = rest & gone.voters().keys()
    wait_until(lambda: gone.status()["role"] == "worker")
    assert gone.job(gone.submit(**JOB))["state"] == "pending"
    gone.kill()
    gone.start()  # it remembers
    status, told = order(gone, "voters/remove", node=filled)
    assert status == 200, told
    status, told = order(gone, "voters/add", node=gone.node_id)
    assert status == 200, told
    wait_until(lambda: cluster["n1"].voters().keys() == before.keys())


def test_orders_about_voters_that_cannot_be_carried_out_are_refused(cluster: ClusterProcesses) -> None:
    at = cluster["n1"]
    assert order(at, "voters/add", node="nobody")[0] == 404
    assert order(at, "voters/remove", node="nobody")[0] == 404
    assert order(at, "leadership/transfer", to="nobody")[0] in (404, 409)
    spare = next(node for node in cluster.all if node.node_id not in at.voters())
    assert order(at, "leadership/transfer", to=spare.node_id)[0] == 409
    assert order(at, "voters/add", nodes="n1")[0] == 422


def test_the_seat_is_handed_over_on_request(cluster: ClusterProcesses) -> None:
    with Clients(cluster.all, seed=1) as clients:
        clients.wait_acks()
        for _ in range(3):
            leader = cluster.leader()
            heir = next(name for name in leader.voters() if name != leader.node_id)
            asked = time.monotonic()
            status, told = order(cluster["n1"], "leadership/transfer", to=heir)
            assert (status, told["leader"]) == (200, heir), told
            clients.wait_acks(since=asked)
        leader = cluster.leader()
        status, told = order(cluster["n2"], "election/start")
        assert (status, told["leader"] != leader.node_id) == (200, True), told
        clients.wait_acks()
    assert clients.longest_gap() < 1.0
    check(clients, cluster)


def test_a_voter_removed_while_it_is_down_learns_of_it(cluster: ClusterProcesses) -> None:
    down = next(node for node in cluster.followers() if node.node_id in cluster["n1"].voters())
    down.kill()
    leader = cluster.leader()
    assert order(leader, "voters/remove", node=down.node_id)[0] == 200
    removed = time.monotonic()
    wait_until(lambda: leader.submit(**JOB) and time.monotonic() > removed + FAREWELL_SECONDS + 0.5, every=0.2)
    down.start()
    wait_until(lambda: down.status()["role"] == "worker")
    assert down.status()["leader_id"] == leader.node_id
    assert down.node_id not in down.status()["voters"]
    assert down.job(down.submit(**JOB))["state"] == "pending"
    order(leader, "voters/add", node=down.node_id)


def test_the_autopilot_replaces_dead_voters_one_after_another(cluster: ClusterProcesses) -> None:
    with Clients(cluster.all, seed=2) as clients:
        clients.wait_acks()
        leader = cluster.leader()
        other = cluster.followers()[0]
        leader.kill()
        wait_until(lambda: leader.node_id not in other.voters(), seconds=40)
        cluster.wait_voters(3)
        second = cluster.leader()
        killed = time.monotonic()
        second.kill()  # the first one is still dead: with its vote in the count there would be no majority now
        clients.wait_acks(since=killed)
        leader.start()
        second.start()
        clients.wait_acks()
    check(clients, cluster)
