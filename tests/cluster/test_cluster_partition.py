"""Networks that break in the ways networks do: a leader cut off from its majority, one direction lost, a bridge, long
and jittery lines. What is acknowledged stays, and a majority that is connected has a leader (DESIGN §8; PROTOCOL §2.5,
§2.6).

Each node has a network namespace and every packet passes through a switch of ours, see `netns`. Needs root.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from tests.cluster import netns
from tests.cluster.histories import Clients, check
from tests.nodes import ClusterProcesses, NodeProcess, wait_until

pytestmark = pytest.mark.skipif(bool(netns.why_not()), reason=netns.why_not())
JITTER_SECONDS = float(os.environ.get("P2P_JITTER_SECONDS", "6"))
JOB = {"command": ["true"], "requires": {"cpus": 900}}


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ClusterProcesses, netns.Net]]:
    with netns.networked(tmp_path_factory.mktemp("net"), 3) as (cluster, net):
        cluster.start(voters=3)
        yield cluster, net


@pytest.fixture
def cluster(boxes: tuple[ClusterProcesses, netns.Net]) -> Iterator[ClusterProcesses]:
    """Three voters, each in a box of its own, that hear each other again after every test."""
    yield boxes[0]
    boxes[1].heal()
    boxes[0].wait_voters(3)


@pytest.fixture
def net(boxes: tuple[ClusterProcesses, netns.Net]) -> netns.Net:
    return boxes[1]


def others(cluster: ClusterProcesses, node: NodeProcess) -> list[NodeProcess]:
    return [other for other in cluster.all if other is not node]


def wait_time(seconds: float) -> None:
    """Lets time pass in which nothing is to happen: there is no signal for that."""
    until = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= until, seconds=seconds + 5)


def leads_for_itself(node: NodeProcess) -> bool:
    return bool(node.status()["role"] == "leader")


def test_a_leader_in_the_minority_acknowledges_nothing_and_the_majority_goes_on(
    cluster: ClusterProcesses, net: netns.Net
) -> None:
    leader = cluster.leader()
    a, b = others(cluster, leader)
    with Clients(cluster.all, seed=1) as clients:
        clients.wait_acks(50)
        net.split([leader.node_id], [a.node_id, b.node_id])
        cut = time.monotonic()
        clients.wait_acks(12, since=cut)
        told_by_it = [ack for ack in clients.acks if ack.via == leader.node_id and ack.asked > cut]
        assert not told_by_it
        wait_until(lambda: not leads_for_itself(leader))
        status, problem = leader.request("POST", "/jobs", JOB, headers={"X-P2P-Deadline-Ms": "500"})
        assert status == 503, problem
        successor = cluster.leader(other_than=leader)
        net.heal()
        wait_until(lambda: leader.status()["leader_id"] == successor.node_id)
        clients.wait_acks()
    assert leads_for_itself(successor), "who comes back disturbs nobody"
    check(clients, cluster)


def test_a_follower_in_the_minority_disturbs_nobody_when_it_returns(cluster: ClusterProcesses, net: netns.Net) -> None:
    leader = cluster.leader()
    term = leader.status()["term"]
    away, stays = others(cluster, leader)
    with Clients([leader, stays], seed=2) as clients:
        clients.wait_acks()
        net.split([leader.node_id, stays.node_id], [away.node_id])
        clients.wait_acks()
        wait_until(lambda: away.status()["leader_id"] is None)
        wait_time(2)
        net.heal()
        wait_until(lambda: away.status()["leader_id"] == leader.node_id)
        clients.wait_acks()
    assert leader.status()["term"] == term
    check(clients, cluster)


@pytest.mark.parametrize("direction", ["cannot send", "cannot hear"])
def test_a_leader_that_works_in_one_direction_only_is_replaced(
    cluster: ClusterProcesses, net: netns.Net, direction: str
) -> None:
    leader = cluster.leader()
    rest = others(cluster, leader)
    pairs = [(leader.node_id, other.node_id) for other in rest]
    with Clients(rest, seed=3) as clients:
        clients.wait_acks()
        net.cut(*(pairs if direction == "cannot send" else [(b, a) for a, b in pairs]))
        successor = cluster.leader(other_than=leader)
        clients.wait_acks()
        wait_until(lambda: not leads_for_itself(leader))
        net.heal()
        wait_until(lambda: leader.status()["leader_id"] == successor.node_id)
        clients.wait_acks()
    check(clients, cluster)


def test_two_that_do_not_hear_each_other_but_both_the_third_have_one_steady_leader(
    cluster: ClusterProcesses, net: netns.Net
) -> None:
    """The partial partition that took a large site down for six hours: leaders must not take turns."""
    leader = cluster.leader()
    a, b = others(cluster, leader)
    with Clients(cluster.all, seed=4) as clients:
        clients.wait_acks()
        net.cut((a.node_id, b.node_id), (b.node_id, a.node_id))  # the leader is the bridge
        term = leader.status()["term"]
        wait_time(3)
        assert leader.status()["term"] == term
        clients.wait_acks()
        net.cut((leader.node_id, a.node_id), (a.node_id, leader.node_id))  # now b is
        cut = time.monotonic()
        clients.wait_acks(12, since=cut)
        wait_until(lambda: cluster.leads() is not None)
        wait_time(1.5)
        before = max(node.status()["term"] for node in cluster.all)
        wait_time(3)
        # A box that gets no processor for a second may lose its seat once; the partition alone must not cost one.
        assert max(node.status()["term"] for node in cluster.all) <= before + 1, "leaders take turns"
        clients.wait_acks()
        net.heal()
        cluster.wait_voters(3)
    check(clients, cluster)


def test_jitter_of_200_ms_changes_no_leader(cluster: ClusterProcesses, net: netns.Net) -> None:
    leader = cluster.leader()
    term = leader.status()["term"]
    with Clients(cluster.all, seed=5, submitters=1, workers=0) as clients:
        net.shape(jitter=0.2)
        wait_time(JITTER_SECONDS)
        clients.wait_acks(3)
        net.heal()
    assert (leader.status()["term"], leader.status()["role"]) == (term, "leader")
    check(clients, cluster)


def test_a_lossy_line_that_reorders_loses_nothing(cluster: ClusterProcesses, net: netns.Net) -> None:
    with Clients(cluster.all, seed=6) as clients:
        net.shape(delay=0.005, jitter=0.03, loss=0.02, reorder=True)
        clients.wait_acks(50, seconds=40)
        net.heal()
        clients.wait_acks()
    check(clients, cluster)
