"""Jobs outlive leaders: what runs goes on, its result arrives at whoever leads then, once, and its log is read through
every node, also of a worker that nobody can dial (DESIGN §5, §8.2, §8.5)."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.crashes import job_processes
from tests.logs import NUMBERS, Reader, numbered
from tests.nodes import ClusterProcesses, NodeProcess, wait_until

SETTINGS = {"cluster": {"young_steady_seconds": 0.3}, "queue": {"lease_seconds": 6}}
HIDDEN = "n4"  # dials, and cannot be dialled


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcesses]:
    """Three voters, each with a label of its own, and a worker behind a NAT."""
    folder = tmp_path_factory.mktemp("workers")
    each = {}
    for name in ("n1", "n2", "n3", HIDDEN):
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"cpus": 8, "memory_mb": 8000, "gpus": [], "labels": {"at": name}}))
        each[name] = ["--resources", str(file)]
    each[HIDDEN] += ["--advertise", "none"]
    cluster = ClusterProcesses(folder, 3, flags=["--no-populate"], settings=SETTINGS, each=each)
    hidden = cluster.make(HIDDEN, *each[HIDDEN])
    hidden.flags += ["--peers", cluster["n1"].address]
    with cluster:
        cluster.start("n1", "n2", "n3", voters=3)
        cluster.start(HIDDEN)
        yield cluster


@pytest.fixture(autouse=True)
def whole(cluster: ClusterProcesses) -> Iterator[None]:
    yield
    cluster.mend()


def gated(gate: Path, ledger: Path, at: NodeProcess, **more: Any) -> dict[str, Any]:
    """A job of that node that signs the ledger, says something, waits for the gate, and leaves a result."""
    script = (
        f'echo "$P2P_JOB_ID $P2P_ATTEMPT" >> "{ledger}"; echo begun; while [ ! -e "{gate}" ]; do sleep 0.02; done; '
        'echo opened; echo \'{"answer": 42}\' > "$P2P_JOB_DIR/result.json"'
    )
    return {
        "command": ["/bin/sh", "-c", script],
        "requires": {"cpus": 0.1, "labels": {"at": at.node_id}},
        "max_attempts": 2,
        **more,
    }


def voters_behind(cluster: ClusterProcesses) -> list[NodeProcess]:
    """The running voters that do not lead."""
    return [node for node in cluster.followers() if node.node_id != HIDDEN]


@pytest.mark.parametrize("where", ["leader", "follower", "hidden"])
def test_a_running_job_outlives_the_leader_and_runs_once(cluster: ClusterProcesses, tmp_path: Path, where: str) -> None:
    leader = cluster.leader()
    at = {"leader": leader, "follower": voters_behind(cluster)[0], "hidden": cluster[HIDDEN]}[where]
    gate, ledger = tmp_path / "gate", tmp_path / "ledger"
    job = at.submit(**gated(gate, ledger, at))
    at.wait_for(job, "running")
    (process, *_) = job_processes(at, job)
    leader.kill()
    cluster.leader(other_than=leader)
    gate.touch()
    if where == "leader":
        wait_until(lambda: not process.is_running() or process.status() == "zombie")
        assert cluster.leader().job(job)["state"] == "running", "its node is away, and its lease has not passed"
        leader.start()
    survivor = voters_behind(cluster)[0]
    record = survivor.wait_for(job, "completed")
    assert (record["attempt"], record["result"], record["worker"]) == (1, {"answer": 42}, at.node_id)
    assert ledger.read_text().split() == [job, "1"]


def test_a_worker_finds_the_new_leader_within_a_second(cluster: ClusterProcesses, tmp_path: Path) -> None:
    """From the election on: a job that is pending by then is running a second later on each of the others."""
    leader = cluster.leader()
    leader.kill()
    successor = cluster.leader(other_than=leader)
    began = time.monotonic()
    others = [node for node in cluster.all if node is not leader]
    jobs = []
    for node in others:
        gate = tmp_path / node.node_id
        jobs.append(successor.submit(**gated(gate, tmp_path / "ledger", node)))
    for job in jobs:
        successor.wait_for(job, "running", seconds=5)
    took = time.monotonic() - began
    for node in others:
        (tmp_path / node.node_id).touch()
    for job in jobs:
        successor.wait_for(job, "completed")
    assert took < 2.0, f"{took:.2f} s"


def test_a_result_waits_for_a_leader(cluster: ClusterProcesses, tmp_path: Path) -> None:
    leader = cluster.leader()
    at, other = voters_behind(cluster)
    gates = {node: tmp_path / node.node_id for node in (at, cluster[HIDDEN])}
    jobs = {node: leader.submit(**gated(gate, tmp_path / "ledger", node)) for node, gate in gates.items()}
    for job in jobs.values():
        leader.wait_for(job, "running")
    processes = [job_processes(node, job)[0] for node, job in jobs.items()]
    cluster.wait_equal()
    leader.freeze()
    other.freeze()
    wait_until(lambda: at.status()["leader_id"] is None)
    for gate in gates.values():
        gate.touch()
    wait_until(lambda: all(not p.is_running() or p.status() == "zombie" for p in processes))
    frozen = time.monotonic()
    wait_until(lambda: time.monotonic() - frozen > 1.5)
    assert at.job_stale(jobs[at])["state"] == "running"
    leader.thaw()
    other.thaw()
    for job in jobs.values():
        record = at.wait_for(job, "completed")
        assert (record["attempt"], record["result"]) == (1, {"answer": 42})
    assert len((tmp_path / "ledger").read_text().splitlines()) == 2


def test_a_new_leader_gives_every_attempt_a_full_lease(cluster: ClusterProcesses, tmp_path: Path) -> None:
    """A worker that was silent for most of its lease when the leader died keeps its job for a whole one more."""
    leader, (at, other) = cluster.leader(), voters_behind(cluster)
    gate, ledger = tmp_path / "gate", tmp_path / "ledger"
    body = {"worker": "outside", "resources": {"cpus": 1, "labels": {"at": "outside"}}, "max_jobs": 1}
    job = leader.submit(command=["true"], requires={"cpus": 0.1, "labels": {"at": "outside"}}, max_attempts=2)
    _, told = other.request("POST", "/worker/claim", body)
    claimed = time.monotonic()
    assert [one["id"] for one in told["jobs"]] == [job]
    wait_until(lambda: time.monotonic() - claimed > 4)  # of 6 seconds
    leader.kill()
    successor = cluster.leader(other_than=leader)
    elected = time.monotonic()
    wait_until(lambda: time.monotonic() - elected > 4)
    assert successor.job(job)["state"] == "claimed"
    record = successor.wait_for(job, "pending", "waiting", seconds=15)
    assert "lease" in record["history"][-1]["reason"]
    assert time.monotonic() - elected > 5.5
    late = {"id": job, "attempt": 1, "worker": "outside", "result": {}}
    assert at.request("POST", "/worker/complete", late)[0] == 409
    assert successor.request("POST", f"/jobs/{job}/cancel")[0] == 200
    assert not gate.exists() and not ledger.exists()


@pytest.mark.parametrize("where", ["n1", "n2", HIDDEN])
def test_logs_are_read_through_every_node(cluster: ClusterProcesses, tmp_path: Path, where: str) -> None:
    at = cluster[where]
    gate = tmp_path / "gate"
    job = at.submit(**gated(gate, tmp_path / "ledger", at))
    at.wait_for(job, "running")
    for node in cluster.all:
        wait_until(lambda node=node: node.request("GET", f"/jobs/{job}/logs") == (200, "begun\n"))
    followed: dict[str, str] = {}

    def follow(node: NodeProcess) -> None:
        connection = http.client.HTTPConnection(node.host, node.port, timeout=30)
        try:
            connection.request("GET", f"/jobs/{job}/logs?follow=1")
            response = connection.getresponse()
            first = response.readline()
            assert first == b"begun\n"
            reading.release()
            followed[node.node_id] = (first + response.read()).decode()
        finally:
            connection.close()

    reading = threading.Semaphore(0)
    readers = [threading.Thread(target=follow, args=(node,)) for node in cluster.all]
    for thread in readers:
        thread.start()
    for _ in readers:
        assert reading.acquire(timeout=20), "the log is told as it is written"
    gate.touch()
    for thread in readers:
        thread.join(30)
    assert followed == {node.node_id: "begun\nopened\n" for node in cluster.all}
    for node in cluster.all:
        status, text = node.request("GET", f"/jobs/{job}/logs?tail=1")
        assert (status, text) == (200, "opened\n"), node
        assert node.request("GET", f"/jobs/{job}/logs?stream=stderr") == (200, "")
        assert node.request("GET", f"/jobs/{job}/logs?attempt=9")[0] == 404


@pytest.mark.parametrize("where", ["n1", HIDDEN])
def test_a_place_in_a_log_is_told_alike_by_every_node(cluster: ClusterProcesses, tmp_path: Path, where: str) -> None:
    at = cluster[where]
    script = "printf 0123456789; echo away >&2"
    job = at.submit(command=["sh", "-c", script], requires={"cpus": 0.1, "labels": {"at": at.node_id}})
    at.wait_for(job, "completed")
    for node in cluster.all:
        wait_until(lambda node=node: node.request("GET", f"/jobs/{job}/logs")[0] == 200)  # until it knows every member
        status, headers, body = node.exchange("GET", f"/jobs/{job}/logs", headers={"Range": "bytes=2-4"})
        assert (status, headers["content-range"], str(body)) == (206, "bytes 2-4/10", "234"), node
        status, headers, body = node.exchange("GET", f"/jobs/{job}/logs?offset=7&limit=2&attempt=1")
        assert (status, headers["x-p2p-log-offset"], headers["x-p2p-log-size"], str(body)) == (200, "7", "10", "78")
        assert headers["x-p2p-node"] == where
        status, headers, told = node.exchange("GET", f"/jobs/{job}/logs?offset=11")
        assert (status, told["field"], headers["content-range"]) == (416, "offset", "bytes */10")
        status, headers, _ = node.exchange("HEAD", f"/jobs/{job}/logs?node={where}&stream=stderr", raw=b"")
        assert (status, headers["x-p2p-log-size"]) == (200, "5")
        other = next(name for name in cluster.nodes if name != where)
        assert node.request("GET", f"/jobs/{job}/logs?node={other}")[0] == 404, "that one has none of it"


@pytest.mark.parametrize("where", ["n1", HIDDEN])
def test_a_log_is_read_on_when_the_node_that_has_it_is_back(
    cluster: ClusterProcesses, tmp_path: Path, where: str
) -> None:
    """While its orchestrator is away the job writes on, and whoever asks is told 503, when to ask again, and of whom;
    then nothing is missing and nothing comes twice."""
    at = cluster[where]
    through = next(node for node in cluster.followers() if node is not at and node.node_id != HIDDEN)
    gate = tmp_path / "gate"
    job = at.submit(
        command=["python", "-c", NUMBERS, str(gate), "10", "0.01"],
        requires={"cpus": 0.1, "labels": {"at": at.node_id}},
        max_attempts=1,
    )
    at.wait_for(job, "running")
    reader = Reader(through, job)
    pieces = reader.pieces(follow=1)
    next(pieces)
    at.kill()
    with pytest.raises((http.client.HTTPException, OSError)):
        for piece in pieces:
            assert piece == numbered(reader.at, reader.at + len(piece))
    status, headers, told = through.exchange("GET", f"/jobs/{job}/logs?offset={reader.at}")
    assert (status, told["field"]) == (503, "node")
    assert f"node {where} cannot be asked now" in told["detail"] and int(headers["retry-after"]) >= 1
    before = reader.at
    at.start()
    for offset, piece in reader.all():
        assert piece == numbered(offset, offset + len(piece))
        if reader.at > before + 5_000:
            gate.touch()
    record = through.wait_for(job, "completed")
    assert (record["attempt"], reader.skipped) == (1, 0)
    size = int(through.exchange("HEAD", f"/jobs/{job}/logs", raw=b"")[1]["x-p2p-log-size"])
    assert reader.at == size


def test_who_has_just_started_does_not_call_a_log_whole(cluster: ClusterProcesses, tmp_path: Path) -> None:
    """Without a leader it is not known yet, after a start, what runs here. Whoever follows a job stays."""
    leader, (through, other) = cluster.leader(), voters_behind(cluster)
    at, gate = cluster[HIDDEN], tmp_path / "gate"
    job = at.submit(**gated(gate, tmp_path / "ledger", at))
    at.wait_for(job, "running")
    cluster.wait_equal()
    leader.freeze()
    other.freeze()
    wait_until(lambda: through.status()["leader_id"] is None)
    at.kill()
    at.start(wait=False)
    wait_until(lambda: through.request("GET", f"/jobs/{job}/logs") == (200, "begun\n"), seconds=30)
    reader, seen = Reader(through, job, follow=1), b""
    pieces = reader.pieces()
    seen += next(pieces)
    opener = threading.Timer(1.5, lambda: (leader.thaw(), other.thaw(), gate.touch()))
    opener.start()
    try:
        for piece in pieces:
            seen += piece
    finally:
        opener.join()
    assert seen == b"begun\nopened\n"
    at.wait_ready()
    assert through.wait_for(job, "completed")["attempt"] == 1


def test_a_cancel_reaches_a_worker_that_nobody_can_dial(cluster: ClusterProcesses, tmp_path: Path) -> None:
    at = cluster[HIDDEN]
    job = cluster["n2"].submit(**gated(tmp_path / "gate", tmp_path / "ledger", at, grace_seconds=1))
    at.wait_for(job, "running")
    assert cluster["n3"].request("POST", f"/jobs/{job}/cancel")[0] == 200
    wait_until(lambda: not job_processes(at, job))


def test_a_node_that_nobody_can_dial_is_let_in_again_right_after_it_was_killed(cluster: ClusterProcesses) -> None:
    """Its anchors still take its earlier life for living, and the node once ended for the sake of that."""
    hidden = cluster[HIDDEN]
    for _ in range(3):
        hidden.kill()
        hidden.start()
        for node in cluster.all:
            wait_until(lambda node=node: node.request("GET", "/nodes")[1]["nodes"][HIDDEN]["state"] == "alive")
        job = hidden.submit(command=["true"], requires={"cpus": 0.1, "labels": {"at": HIDDEN}})
        assert cluster["n2"].wait_for(job, "completed")["worker"] == HIDDEN
        for node in cluster.all:
            wait_until(lambda node=node, job=job: node.request("GET", f"/jobs/{job}/logs")[0] == 200)
    assert hidden.running


def test_every_node_shows_every_node(cluster: ClusterProcesses) -> None:
    def missing(node: NodeProcess) -> list[tuple[str, Any]]:
        nodes = node.request("GET", "/nodes")[1]["nodes"]
        assert sorted(nodes) == sorted(cluster.nodes)
        return [
            (name, one)
            for name, one in nodes.items()
            if one["state"] != "alive" or (one["resources"] or {}).get("labels") != {"at": name}
        ]

    for node in cluster.all:
        began = time.monotonic()
        wait_until(lambda node=node, began=began: not missing(node) or time.monotonic() - began > 15)
        assert not missing(node), node
        nodes = node.request("GET", "/nodes")[1]["nodes"]
        assert nodes[HIDDEN]["address"] is None
        assert nodes[HIDDEN]["role"] == "worker"
