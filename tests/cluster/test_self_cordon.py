"""A node on which every job fails takes itself out of service, and the rest of the cluster does its work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.nodes import ClusterProcesses, NodeProcess, wait_until

SETTINGS = {"cluster": {"young_steady_seconds": 0.3}}
ALERT = "node_cordoned:n2"
FAILS_ON_N2 = ["/bin/sh", "-c", 'test "$P2P_NODE_ID" != n2']


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcesses]:
    """Three voters with room for four jobs each."""
    folder = tmp_path_factory.mktemp("cordon")
    each = {}
    for name in ("n1", "n2", "n3"):
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"cpus": 4, "memory_mb": 8000, "gpus": [], "labels": {"at": name}}))
        each[name] = ["--resources", str(file)]
    cluster = ClusterProcesses(folder, 3, flags=["--no-populate"], settings=SETTINGS, each=each)
    with cluster:
        cluster.start(voters=3)
        yield cluster


def alerts(node: NodeProcess) -> dict[str, Any]:
    """The alerts that stand, by name, as any node tells them."""
    status, told = node.request("GET", "/work_queue_status")
    assert status == 200, told
    return {alert["alert"]: alert for alert in told["alerts"]}


def test_a_node_that_fails_every_job_is_cordoned_and_the_others_do_the_work(cluster: ClusterProcesses) -> None:
    node = cluster.followers()[0]
    jobs = [{"command": FAILS_ON_N2, "retry_backoff_seconds": 0, "max_attempts": 5}] * 60
    status, answer = node.request("POST", "/jobs", {"jobs": jobs})
    assert status in (200, 201), answer
    wait_until(lambda: ALERT in alerts(node), seconds=40)
    done = [node.wait_for(job, "completed", "failed") for job in answer["ids"]]
    assert {job["state"] for job in done} == {"completed"}
    assert {job["worker"] for job in done} == {"n1", "n3"}
    assert sum(job["failed_attempts"] for job in done) >= 5

    shown = node.request("GET", "/nodes")[1]["nodes"]
    assert [name for name in sorted(shown) if shown[name]["cordoned"]] == ["n2"]
    assert shown["n2"]["mark_reason"].startswith("by itself: 5 different jobs in a row failed on it")
    alert = alerts(node)[ALERT]
    assert alert["severity"] == "critical"
    assert "see its logs, then: POST /nodes/n2/uncordon" in alert["message"]

    at_n2 = {"cpus": 1, "labels": {"at": "n2"}}
    waits = node.submit(command=["true"], requires=at_n2)
    wait_until(lambda: "1 node is cordoned or draining" in node.job(waits).get("why_pending", ""))
    assert node.request("POST", "/nodes/n2/uncordon")[0] == 200
    assert node.wait_for(waits, "completed")["worker"] == "n2"
    assert ALERT not in alerts(node)
