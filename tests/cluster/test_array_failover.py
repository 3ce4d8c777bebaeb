"""An array on three nodes whose leader is killed in the middle: every member completes, and all voters agree on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.nodes import QUICK, ClusterProcesses, wait_until

MEMBERS = 1_500


@pytest.fixture
def cluster(tmp_path: Path) -> ClusterProcesses:
    (tmp_path / "resources.yaml").write_text(yaml.safe_dump({"cpus": 1, "memory_mb": 1_000}))
    flags = ["--no-populate", "--resources", str(tmp_path / "resources.yaml")]
    return ClusterProcesses(tmp_path, 3, flags=flags, settings=QUICK | {"queue": {"lease_seconds": 5}})


def test_array_outlives_its_leader(cluster: ClusterProcesses) -> None:
    with cluster:
        leader = cluster.start(voters=3).leader()
        body = {"command": ["sleep", "0.1"], "array": f"1-{MEMBERS}", "requires": {"cpus": 0.03}}
        status, told = leader.request("POST", "/jobs", body)
        assert status == 201, told
        array = told["id"]
        after = leader.submit(command=["true"], depends_on=[array])
        other = cluster.followers()[0]
        wait_until(lambda: other.job(array)["counts"]["completed"] > MEMBERS / 5, seconds=60)
        leader.kill()
        wait_until(lambda: other.job(array)["counts"]["completed"] > MEMBERS / 2, seconds=60)
        leader.start(wait=False)
        wait_until(lambda: other.job(array)["finished_at"] is not None, seconds=90, every=0.2)
        told = other.job(array)
        assert (told["state"], told["counts"]["completed"]) == ("completed", MEMBERS)
        other.wait_for(after, "completed")
        cluster.wait_voters(3, seconds=30)
        queue = cluster.wait_equal(seconds=30)
        members = [record for record in queue.values() if record["array"]]
        assert len(members) == MEMBERS
        assert {record["state"] for record in members} == {"completed"}
        summaries = {str(node.request("GET", f"/jobs/{array}?consistency=stale")[1]["counts"]) for node in cluster.all}
        assert len(summaries) == 1
