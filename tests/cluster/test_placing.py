"""Placement on real nodes: gangs, work that makes way and goes on where it was, memory that was too small, nodes that
are cordoned, drained or taken away, and why a job waits (DESIGN §5)."""

from __future__ import annotations

import re
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.crashes import job_processes
from tests.nodes import ClusterProcesses, NodeProcess, wait_until

SETTINGS = {
    "cluster": {"young_steady_seconds": 0.3},
    "queue": {"lease_seconds": 6},
    "placement": {"preempt_after_seconds": 0.2},
}
SMALL, LARGE = 24_000, 80_000  # MiB of the GPUs

# Counts to a number, a step each time the gate file lets it; told to end, it leaves how far it came.
COUNTER = """
import json, os, pathlib, signal, sys, time
folder, gate, ledger = pathlib.Path(os.environ["P2P_JOB_DIR"]), pathlib.Path(sys.argv[1]), sys.argv[2]
kept = folder / "checkpoint.json"
step = json.loads(kept.read_text())["step"] if kept.exists() else 0
with open(ledger, "a") as book:
    book.write(f"{step}\\n")
def end(*_):
    kept.write_text(json.dumps({"step": step}))
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
while not gate.exists():
    step += 1
    (folder / "progress.json").write_text(json.dumps({"step": step}))
    time.sleep(0.02)
(folder / "result.json").write_text(json.dumps({"step": step}))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcesses]:
    """Three voters with a GPU each, the third one's larger than the others'."""
    folder = tmp_path_factory.mktemp("placing")
    each = {}
    for name, memory in (("n1", SMALL), ("n2", SMALL), ("n3", LARGE)):
        file = folder / f"{name}.yaml"
        gpus = [{"model": "A100", "memory_mb": memory, "uuid": f"GPU-{name}"}]
        file.write_text(yaml.safe_dump({"cpus": 4, "memory_mb": 8000, "gpus": gpus, "labels": {"at": name}}))
        each[name] = ["--resources", str(file)]
    cluster = ClusterProcesses(folder, 3, flags=["--no-populate"], settings=SETTINGS, each=each)
    with cluster:
        cluster.start(voters=3)
        yield cluster


@pytest.fixture
def any_node(cluster: ClusterProcesses) -> Iterator[NodeProcess]:
    """A node to ask; afterwards nothing is left in the queue, and nothing is said of nodes."""
    cluster.mend()
    node = cluster.followers()[0]
    yield node
    for name in cluster.nodes:
        for verb in ("uncordon", "undrain"):
            assert node.request("POST", f"/nodes/{name}/{verb}")[0] == 200
    assert node.request("POST", "/work_queue/clear", {"include_running": True})[0] == 200
    wait_until(lambda: not any(each.get("jobs_left", 1) for each in nodes(node).values()))


def nodes(node: NodeProcess) -> dict[str, Any]:
    """``/nodes``, as the leader tells it."""
    return dict(node.request("GET", "/nodes")[1]["nodes"])


def until_open(gate: Path) -> list[str]:
    return ["/bin/sh", "-c", f'while [ ! -e "{gate}" ]; do sleep 0.02; done']


def counter(folder: Path, **more: Any) -> dict[str, Any]:
    script = folder / "counter.py"
    script.write_text(textwrap.dedent(COUNTER))
    command = [sys.executable, str(script), str(folder / "gate"), str(folder / "ledger")]
    return {"command": command, "requires": {"gpus": 1}, **more}


# -- gangs -----------------------------------------------------------------------------------------------------------

GANG = 'echo "$RANK $NODE_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $CUDA_VISIBLE_DEVICES $P2P_NODE_ID" >> "$0"'


def test_a_gang_starts_on_three_nodes_together_and_knows_its_ranks(any_node: NodeProcess, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    command = ["/bin/sh", "-c", f'{GANG}; echo "[$RANK]" > "$P2P_JOB_DIR/result.json"', str(ledger)]
    job = any_node.submit(command=command, nodes=3, requires={"gpus": 1})
    record = any_node.wait_for(job, "completed", "failed")
    assert (record["state"], record["attempt"], record["result"]) == ("completed", 1, [0])
    lines = sorted(line.split() for line in ledger.read_text().splitlines())
    assert [line[:3] for line in lines] == [[str(rank), str(rank), "3"] for rank in range(3)]
    assert len({(line[3], line[4]) for line in lines}) == 1, "one place to meet"
    assert [(line[5], line[6]) for line in lines] == [
        (f"GPU-{member['worker']}", member["worker"]) for member in record["members"]
    ]
    assert {member["state"] for member in record["members"]} == {"ended"}


def test_a_gang_waits_until_all_its_nodes_are_free(any_node: NodeProcess, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    blocker = any_node.submit(command=until_open(gate), requires={"gpus": 1}, priority=100)
    any_node.wait_for(blocker, "running")
    gang = any_node.submit(command=["true"], nodes=3, requires={"gpus": 1})
    wait_until(lambda: "needs 3 nodes at once, 2 fit now" in any_node.job(gang).get("why_pending", ""))
    gate.touch()
    assert any_node.wait_for(gang, "completed")["attempt"] == 1


def test_a_member_that_fails_ends_its_gang_which_is_tried_again_as_a_whole(
    any_node: NodeProcess, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"
    script = f'{GANG}; if [ "$RANK$P2P_ATTEMPT" = 11 ]; then exit 7; fi; if [ "$P2P_ATTEMPT" = 1 ]; then sleep 600; fi'
    job = any_node.submit(
        command=["/bin/sh", "-c", script, str(ledger)],
        nodes=3,
        requires={"gpus": 1},
        retry_backoff_seconds=1,
        grace_seconds=1,
    )
    error = any_node.wait_for(job, "waiting")["error"]
    assert re.match(r"rank 1 on n\d: exit code 7", error), error
    record = any_node.wait_for(job, "completed", "failed")
    assert (record["state"], record["attempt"], record["failed_attempts"]) == ("completed", 2, 1)
    assert len(ledger.read_text().splitlines()) == 6, "each member ran twice"


def test_a_gang_is_started_anew_when_the_node_of_a_member_dies(
    cluster: ClusterProcesses, any_node: NodeProcess
) -> None:
    job = any_node.submit(command=["sleep", "600"], nodes=2, requires={"gpus": 1}, retry_backoff_seconds=0)
    record = any_node.wait_for(job, "running")
    victim = next(cluster[m["worker"]] for m in record["members"] if m["worker"] != any_node.node_id)
    other = next(cluster[m["worker"]] for m in record["members"] if m["worker"] != victim.node_id)
    left = job_processes(other, job)
    victim.destroy()
    again = lambda: any_node.job(job)["attempt"] == 2 and any_node.job(job)["state"] == "running"  # noqa: E731
    wait_until(again, seconds=40)
    assert victim.node_id not in {member["worker"] for member in any_node.job(job)["members"]}
    wait_until(lambda: not any(process.is_running() for process in left))


# -- making way ------------------------------------------------------------------------------------------------------


def test_less_important_work_makes_way_and_goes_on_where_it_was(any_node: NodeProcess, tmp_path: Path) -> None:
    low = any_node.submit(**counter(tmp_path, priority=10), max_attempts=1)
    others = [any_node.submit(command=["sleep", "600"], requires={"gpus": 1}, priority=60) for _ in range(2)]
    for job in (low, *others):
        any_node.wait_for(job, "running")
    reached = lambda: (any_node.job(low).get("progress") or {}).get("step", 0) > 5  # noqa: E731
    wait_until(reached)
    gate = tmp_path / "urgent"
    urgent = any_node.submit(command=until_open(gate), requires={"gpus": 1}, priority=90)
    any_node.wait_for(urgent, "running")
    record = any_node.job(low)
    assert (record["state"], record["failed_attempts"]) == ("pending", 0), "no attempt was spent"
    assert record["reason"] == "released: preempted"
    assert record["checkpoint"]["step"] > 5
    assert [any_node.job(job)["state"] for job in others] == ["running", "running"]
    gate.touch()
    any_node.wait_for(low, "running")
    (tmp_path / "gate").touch()
    done = any_node.wait_for(low, "completed")
    first, second = map(int, (tmp_path / "ledger").read_text().split())
    assert (first, second) == (0, record["checkpoint"]["step"]), "it went on where it had been stopped"
    assert (done["attempt"], done["result"]["step"] >= second) == (2, True)


def test_work_that_is_not_preemptible_or_nearly_as_important_is_left_alone(any_node: NodeProcess) -> None:
    kept = [
        any_node.submit(command=["sleep", "600"], requires={"gpus": 1}, priority=10, preemptible=False),
        any_node.submit(command=["sleep", "600"], requires={"gpus": 1}, priority=71),
        any_node.submit(command=["sleep", "600"], requires={"gpus": 1}, priority=72),
    ]
    for job in kept:
        any_node.wait_for(job, "running")
    urgent = any_node.submit(command=["true"], requires={"gpus": 1}, priority=90)
    wait_until(lambda: "waits for room" in any_node.job(urgent).get("why_pending", ""))
    # Long enough for it to have been looked at many times: as long as another job takes.
    any_node.wait_for(any_node.submit(command=["sleep", "2"], requires={"cpus": 0.1}, priority=100), "completed")
    assert [any_node.job(job)["state"] for job in kept] == ["running"] * 3


# -- memory that was too small ---------------------------------------------------------------------------------------


def test_a_job_that_ran_out_of_gpu_memory_is_tried_again_on_a_larger_gpu(any_node: NodeProcess) -> None:
    oom = "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 40.00 GiB"
    script = f'if [ "$CUDA_VISIBLE_DEVICES" != GPU-n3 ]; then echo "{oom}" >&2; exit 1; fi'
    assert any_node.request("POST", "/nodes/n3/cordon")[0] == 200
    job = any_node.submit(command=["/bin/sh", "-c", script], requires={"gpus": 1}, retry_backoff_seconds=1)
    any_node.wait_for(job, "waiting", "pending")
    assert any_node.request("POST", "/nodes/n3/uncordon")[0] == 200
    record = any_node.wait_for(job, "completed", "failed")
    assert (record["state"], record["worker"], record["attempt"]) == ("completed", "n3", 2)
    assert record["placement_hints"]["gpu_memory_above_mb"] == SMALL


# -- nodes that get nothing new --------------------------------------------------------------------------------------


def test_a_cordoned_node_keeps_what_it_has_and_gets_nothing_new(any_node: NodeProcess, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    at_n1 = {"cpus": 1, "labels": {"at": "n1"}}
    running = any_node.submit(command=until_open(gate), requires=at_n1)
    any_node.wait_for(running, "running")
    status, told = any_node.request("POST", "/nodes/n1/cordon", {"reason": "it smells"})
    assert (status, told["cordoned"], told["mark_reason"]) == (200, True, "it smells")
    late = any_node.submit(command=["true"], requires=at_n1)
    wait_until(lambda: "1 node is cordoned or draining" in any_node.job(late).get("why_pending", ""))
    gate.touch()
    any_node.wait_for(running, "completed")
    assert any_node.job(late)["state"] == "pending"
    assert any_node.request("POST", "/nodes/n1/uncordon")[0] == 200
    any_node.wait_for(late, "completed")


def test_what_is_said_of_a_node_outlives_the_leader(cluster: ClusterProcesses, any_node: NodeProcess) -> None:
    assert any_node.request("POST", "/nodes/n2/cordon", {"reason": "loose cable"})[0] == 200
    leader = cluster.leader()
    leader.kill()
    successor = cluster.leader(other_than=leader)
    wait_until(lambda: nodes(successor)["n2"]["mark_reason"] == "loose cable")
    assert nodes(successor)["n2"]["cordoned"] is True
    leader.start()


def test_a_drain_lets_jobs_finish_and_then_says_so(
    cluster: ClusterProcesses, any_node: NodeProcess, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    job = any_node.submit(command=until_open(gate), requires={"gpus": 1, "labels": {"at": "n2"}})
    any_node.wait_for(job, "running")
    status, told = any_node.request("POST", "/nodes/n2/drain")
    assert (status, told["draining"], told["drained"], told["jobs_left"]) == (200, True, False, 1)
    wait_until(lambda: cluster["n2"].request("GET", "/ready")[1].get("reason") == "draining")
    gate.touch()
    assert any_node.wait_for(job, "completed")["attempt"] == 1
    leader = cluster.leader()
    wait_until(lambda: nodes(leader)["n2"]["drained"] is True)
    assert any_node.request("POST", "/nodes/n2/undrain")[0] == 200
    wait_until(lambda: cluster["n2"].request("GET", "/ready")[0] == 200)


def test_a_drain_with_a_deadline_moves_what_still_runs(any_node: NodeProcess, tmp_path: Path) -> None:
    job = any_node.submit(**counter(tmp_path), max_attempts=1)
    at = any_node.wait_for(job, "running")["worker"]
    wait_until(lambda: (any_node.job(job).get("progress") or {}).get("step", 0) > 5)
    assert any_node.request("POST", f"/nodes/{at}/drain", {"deadline_seconds": 0.1})[0] == 200
    wait_until(lambda: any_node.job(job)["attempt"] == 2 and any_node.job(job)["state"] == "running")
    record = any_node.job(job)
    assert (record["worker"] != at, record["failed_attempts"]) == (True, 0)
    (tmp_path / "gate").touch()
    any_node.wait_for(job, "completed")
    first, second = map(int, (tmp_path / "ledger").read_text().split())
    assert (first, second > 5) == (0, True)


def test_a_node_that_is_given_notice_hands_its_jobs_on_and_stops(
    cluster: ClusterProcesses, any_node: NodeProcess, tmp_path: Path
) -> None:
    spot = cluster.followers()[1]
    cluster.mend()
    assert spot.kill(signal.SIGTERM) == 0
    spot.settings = {**SETTINGS, "work": {"drain_on_sigterm": True, "notice_seconds": 30}}
    spot.start()
    at_spot = {"gpus": 1, "labels": {"at": spot.node_id}}
    job = any_node.submit(**{**counter(tmp_path, grace_seconds=20), "requires": at_spot}, max_attempts=1)
    any_node.wait_for(job, "running")
    wait_until(lambda: (any_node.job(job).get("progress") or {}).get("step", 0) > 5)
    assert spot.kill(signal.SIGTERM) == 0
    record = any_node.job(job)
    assert (record["state"], record["reason"], record["failed_attempts"]) == ("pending", "released: drained", 0)
    spot.settings = SETTINGS
    spot.start()
    any_node.wait_for(job, "running")  # back again, it is no longer draining
    (tmp_path / "gate").touch()
    assert any_node.wait_for(job, "completed")["attempt"] == 2


# -- why it waits ----------------------------------------------------------------------------------------------------

WHY = {
    "memory": ({"gpus": 1, "gpu_memory_mb": 90_000}, r"needs 90000 MB on one GPU; the largest GPU has 80000 MB on n3"),
    "model": ({"gpus": 1, "gpu_model": "H100"}, r"needs 1 GPU of model H100; the most on one node is 0"),
    "count": ({"gpus": 2}, r"needs 2 GPUs; the most on one node is 1"),
    "cpus": ({"cpus": 64}, r"needs 64 cores; the largest node has 4"),
    "label": ({"labels": {"zone": "eu"}}, r"needs label zone=eu; n\d has zone=\(none\) \(fails on 3 of 3 nodes\)"),
    "node": ({"node": "elsewhere"}, r"asks for node elsewhere \(fails on 3 of 3 nodes\)"),
}


@pytest.mark.parametrize("case", WHY)
def test_a_job_that_fits_nowhere_says_what_comes_nearest(any_node: NodeProcess, case: str) -> None:
    requires, words = WHY[case]
    job = any_node.submit(command=["true"], requires=requires)
    wait_until(lambda: "fits on none of 3 nodes, even when idle" in any_node.job(job).get("why_pending", ""))
    assert re.search(words, any_node.job(job)["why_pending"]), any_node.job(job)["why_pending"]
