"""How nodes become one cluster, and when they refuse to (DESIGN §3, "Starting rules")."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import START_SECONDS, ClusterProcesses, NodeProcess, wait_until

SHIFTED = """import time
_time, _ns = time.time, time.time_ns
time.time = lambda: _time() + {seconds}
time.time_ns = lambda: _ns() + {seconds} * 10**9
"""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., ClusterProcesses]]:
    """A function that makes clusters, none of whose processes outlives the test."""
    made: list[ClusterProcesses] = []

    def make(n: int = 3, *, name: str = "c", **more: Any) -> ClusterProcesses:
        made.append(ClusterProcesses(tmp_path / name, n, **more))
        return made[-1]

    yield make
    for cluster in made:
        cluster.destroy()


def reason(node: NodeProcess) -> str:
    """Why it is not ready; empty if it is, or does not answer yet."""
    try:
        status, told = node.request("GET", "/ready")
    except OSError:
        return ""
    return str(told["reason"]) if status == 503 else ""


def cluster_id(node: NodeProcess) -> str:
    return str(node.status()["cluster_id"])


def test_three_boxes_started_together_have_three_voters_within_20_s(make: Callable[..., ClusterProcesses]) -> None:
    """With the default settings, and one of them coming late: nobody founds before it is there."""
    cluster = make(settings={})
    for name in ("n1", "n2"):
        cluster[name].start(wait=False)
    for node in (cluster["n1"], cluster["n2"]):
        why = wait_until(lambda node=node: reason(node))
        assert why.startswith("waiting: ")
        wait_until(lambda node=node: cluster["n3"].address in reason(node))
        assert (
            f"waiting: no peer belongs to a cluster yet, and {cluster['n3'].address} cannot be reached" in node.log_text
        )
        status, told = node.request("POST", "/jobs", {"command": ["true"]}, headers={"X-P2P-Deadline-Ms": "300"})
        assert (status, "nothing was done" in told["detail"]) == (503, True), told
        assert node.request("GET", "/health")[0] == 200
        assert node.request("GET", "/status?consistency=stale")[1]["cluster_id"] is None
    began = time.monotonic()
    cluster["n3"].start()
    leader = cluster.wait_voters(3, seconds=20)
    assert time.monotonic() - began < 20
    assert leader.node_id == "n3", "of equal priority, the highest id founds"
    assert len({cluster_id(node) for node in cluster.all}) == 1
    assert {node.status()["role"] for node in cluster.followers()} == {"follower"}


def test_nodes_started_one_after_another_join_through_whoever_is_there(make: Callable[..., ClusterProcesses]) -> None:
    cluster = make(0)
    first = cluster.make("n1")
    first.start()
    job = first.submit(command=["true"])
    for name, through in (("n2", first), ("n3", None)):
        node = cluster.make(name)
        node.flags += ["--peers", (through or cluster["n2"]).address]
        node.start()
    assert cluster.wait_voters(3) is first
    for node in cluster.all:
        assert node.job(job)["state"] == "pending"
    assert set(cluster.wait_equal()) == {job}


def test_two_boxes_are_one_voter_and_one_copy(make: Callable[..., ClusterProcesses]) -> None:
    """Two voters would survive nothing, and there would be two ways to have nothing (PROTOCOL §2.12)."""
    cluster = make(2).start()
    leader = cluster.wait_voters(1)
    job = leader.submit(command=["true"])
    wait_until(lambda: leader.status()["learners"])
    assert set(cluster.wait_equal()) == {job}
    (other,) = cluster.followers()
    assert other.status()["voters"] == [leader.node_id]
    other.kill()
    leader.submit(command=["true"])


def test_flags_say_who_votes_and_who_leads(make: Callable[..., ClusterProcesses]) -> None:
    cluster = make(4, each={"n2": ["--priority", "7"], "n4": ["--no-voter"], "n1": ["--voter"]}).start()
    leader = cluster.wait_voters(3)
    assert leader.node_id == "n2"
    assert leader.status()["voters"] == ["n1", "n2", "n3"]
    assert leader.status()["learners"] == []
    worker = cluster["n4"]
    assert worker.status()["role"] == "worker"
    job = worker.submit(command=["true"])
    assert worker.job(job)["state"] == "pending"
    # It keeps no copy: what it is asked for comes from one that does.
    assert [record["id"] for record in worker.request("GET", "/jobs?consistency=stale")[1]["jobs"]] == [job]
    assert worker.request("GET", f"/jobs/{job}?min_index=1")[0] == 200


def test_two_clusters_that_meet_never_merge(make: Callable[..., ClusterProcesses]) -> None:
    clusters = make(0)
    one, two, blank = (clusters.make(name) for name in ("n1", "n2", "n3"))
    one.start()
    two.start()
    ids = cluster_id(one), cluster_id(two)
    jobs = one.submit(command=["true"]), two.submit(command=["true"])
    assert two.kill(15) == 0
    two.flags += ["--peers", one.address]
    two.start()
    blank.flags += ["--peers", f"{one.address},{two.address}"]
    blank.start(wait=False)
    for node in (one, two):
        wait_until(lambda node=node: all(cluster in node.log_text for cluster in ids))
    wait_until(lambda: all(cluster in reason(blank) for cluster in ids))
    assert "never merge" in reason(blank)
    for node, cluster, job in zip((one, two), ids, jobs, strict=True):
        assert cluster_id(node) == cluster
        assert [record["id"] for record in node.request("GET", "/jobs")[1]["jobs"]] == [job]
        assert list(node.request("GET", "/nodes")[1]["nodes"]) == [node.node_id]


def test_a_wrong_token_is_refused_with_the_fix(make: Callable[..., ClusterProcesses], tmp_path: Path) -> None:
    cluster = make(0)
    nodes = [cluster.make(name, "--host", "127.0.0.1") for name in ("n1", "n2")]
    for node in nodes:
        node.token = f"the-secret-of-{node.node_id}-and-more"
        file = tmp_path / f"token-{node.node_id}"
        file.write_text(node.token)
        file.chmod(0o600)
        node.flags += ["--auth-token-file", str(file)]
    nodes[0].start()
    nodes[1].flags += ["--peers", nodes[0].address]
    nodes[1].start(wait=False)
    wait_until(lambda: "refuses this node's token: give all nodes the same --auth-token-file" in reason(nodes[1]))
    assert list(nodes[0].request("GET", "/nodes")[1]["nodes"]) == ["n1"]
    for node in nodes:
        assert node.token is not None
        assert node.token not in node.log_text


def test_a_clock_that_is_off_is_refused_with_the_fix(make: Callable[..., ClusterProcesses], tmp_path: Path) -> None:
    cluster = make(0)
    one, two = cluster.make("n1"), cluster.make("n2")
    (tmp_path / "shifted").mkdir()
    (tmp_path / "shifted/sitecustomize.py").write_text(SHIFTED.format(seconds=90))
    two.environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "shifted"), os.environ.get("PYTHONPATH", "")])
    two.flags += ["--peers", one.address]
    one.start()
    two.start(wait=False)
    wait_until(lambda: "its clock is 90 s off from this node's: set both by NTP" in reason(two))
    assert list(one.request("GET", "/nodes")[1]["nodes"]) == ["n1"]
    del two.environment["PYTHONPATH"]
    two.kill()
    two.start()
    wait_until(lambda: sorted(one.request("GET", "/nodes")[1]["nodes"]) == ["n1", "n2"])


def test_the_second_node_of_one_name_stops_and_says_why(make: Callable[..., ClusterProcesses]) -> None:
    cluster = make(2).start()
    leader = cluster.wait_voters(1)
    twin = NodeProcess(cluster.folder / "twin", [*cluster.flags, "--peers", leader.address], cluster.settings)
    twin.node_id = next(node.node_id for node in cluster.all if node is not leader)
    cluster.nodes["twin"] = twin
    twin.start(wait=False)
    assert twin.process is not None
    assert twin.process.wait(START_SECONDS) != 0, "a supervisor must see that it failed"
    assert f"already goes by the node id {twin.node_id}" in twin.log_text
    assert "Traceback" not in twin.log_text
    del cluster.nodes["twin"]
    assert all(node.running and node.request("GET", "/ready")[0] == 200 for node in cluster.all)
    assert cluster.wait_voters(1) is leader
