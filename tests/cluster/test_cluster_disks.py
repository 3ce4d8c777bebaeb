"""What happens to a voter's disk: lost, copied, full, hanging, or so far behind that it is sent a snapshot. None of it
costs anything that was acknowledged (PROTOCOL §2.7 to §2.10, §2.18)."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.histories import Clients, check
from tests.nodes import START_SECONDS, ClusterProcesses, NodeProcess, wait_until

SETTINGS = {
    "cluster": {"young_steady_seconds": 0.3, "steady_seconds": 1, "snapshot_entries": 150, "keep_entries": 20},
    "queue": {"min_free_disk_mb": 0},
}
DISK_MB = 24
SMALL = "n1"  # its data directory is a file system of its own, of DISK_MB, if this machine lets us make one


def run(*command: str) -> str:
    """Why it failed; empty if it did not."""
    if shutil.which(command[0]) is None:
        return f"there is no {command[0]}"
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr.strip() or f"it ended with {done.returncode}" if done.returncode else ""


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """(the folder of the cluster, why n1's data is no small ext4 of its own; empty if it is)."""
    folder = tmp_path_factory.mktemp("disks")
    image, data = folder / "image", folder / SMALL / "data"
    data.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(DISK_MB << 20)
    why = "" if os.geteuid() == 0 else "mounting needs root"
    why = why or run("mkfs.ext4", "-q", "-m", "0", str(image)) or run("mount", "-o", "loop", str(image), str(data))
    try:
        yield folder, why
    finally:
        if not why:
            run("umount", "-l", str(data))


@pytest.fixture(scope="module")
def cluster(mounted: tuple[Path, str]) -> Iterator[ClusterProcesses]:
    """Four nodes, of which three vote."""
    with ClusterProcesses(mounted[0], 4, settings=SETTINGS, each={SMALL: ["--voter"]}) as cluster:
        cluster.start(voters=3)
        yield cluster


@pytest.fixture(autouse=True)
def whole(cluster: ClusterProcesses) -> Iterator[None]:
    yield
    cluster.mend()


@pytest.fixture
def small(cluster: ClusterProcesses, mounted: tuple[Path, str]) -> NodeProcess:
    """The node with the small disk, which leads."""
    if mounted[1]:
        pytest.skip(f"needs a file system of its own: {mounted[1]}")
    node = cluster[SMALL]
    wait_until(lambda: SMALL in node.voters())
    status, told = node.request("POST", "/admin/leadership/transfer", {"to": SMALL})
    assert status == 200, told
    return node


def a_follower(cluster: ClusterProcesses) -> NodeProcess:
    """A voter that does not lead, on an ordinary disk."""
    voting = cluster.leader().voters()
    return next(node for node in cluster.followers() if node.node_id in voting and node.node_id != SMALL)


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[None]:
    """While this lasts there is not a byte left on the folder's file system."""
    ballast = folder / "ballast"
    try:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
        yield
    finally:
        ballast.unlink()


def test_a_leader_whose_disk_is_full_acknowledges_nothing_and_others_take_over(
    cluster: ClusterProcesses, small: NodeProcess
) -> None:
    with Clients(cluster.all, seed=1) as clients:
        clients.wait_acks()
        with filled(small.data):
            successor = cluster.leader(other_than=small, seconds=20)
            clients.wait_acks()
            assert successor is not small
            if small.running:  # or it has ended itself: both are right, to go on as if nothing were wrong is not
                status, told = small.request("GET", "/ready")
                assert (status, "disk is full" in told["reason"]) == (503, True), told
            assert "disk" in small.log_text
        if not small.running:
            assert small.process is not None
            assert small.process.returncode == 70
            small.start()
        wait_until(lambda: small.request("GET", "/ready")[0] == 200)
        clients.wait_acks()
    check(clients, cluster)


def test_a_leader_whose_disk_hangs_is_replaced(cluster: ClusterProcesses, small: NodeProcess) -> None:
    """Its process lives and its network works: nothing but its own word tells that it is no leader any more."""
    if why := run("fsfreeze", "--help"):
        pytest.skip(why)
    with Clients(cluster.all, seed=2) as clients:
        clients.wait_acks()
        try:
            assert not run("fsfreeze", "-f", str(small.data))
            hung = time.monotonic()
            cluster.leader(other_than=small, seconds=20)
            took = time.monotonic() - hung
            clients.wait_acks(since=hung)
        finally:
            run("fsfreeze", "-u", str(small.data))
        wait_until(lambda: small.request("GET", "/ready")[0] == 200)
        clients.wait_acks()
    assert took < 5
    check(clients, cluster)


def test_a_voter_that_lost_its_disk_is_another_voter(cluster: ClusterProcesses) -> None:
    lost = a_follower(cluster)
    old = cluster["n1"].voters()[lost.node_id]["disk"]
    with Clients([node for node in cluster.all if node is not lost], seed=3) as clients:
        clients.wait_acks()
        lost.kill()
        shutil.rmtree(lost.data)
        lost.start(wait=False)
        other = cluster.leader()
        # Whoever takes the place, the old disk's vote is gone.
        wait_until(lambda: old not in [row["disk"] for row in other.voters().values()], seconds=30)
        cluster.wait_voters(3, seconds=30)
        clients.wait_acks()
    assert all(row["disk"] != old for row in other.voters().values())
    assert lost.request("GET", "/ready")[0] == 200
    check(clients, cluster)


def test_a_copied_data_directory_is_refused_unless_adopted(cluster: ClusterProcesses, tmp_path: Path) -> None:
    original = a_follower(cluster)
    old = cluster["n1"].voters()[original.node_id]["disk"]
    original.kill()
    copy = cluster.folder / "copied"
    shutil.copytree(original.data, copy)
    original.data, mine = copy, original.data
    original.start(wait=False)
    assert original.process is not None
    assert original.process.wait(START_SECONDS) == 1
    assert "--adopt" in original.log_text
    assert "Traceback" not in original.log_text
    original.flags.append("--adopt")
    original.start(wait=False)
    other = cluster.leader()
    wait_until(lambda: old not in [row["disk"] for row in other.voters().values()], seconds=30)
    cluster.wait_voters(3, seconds=30)
    original.flags.remove("--adopt")
    assert mine.exists()


def test_a_follower_behind_the_compacted_log_is_sent_a_snapshot(cluster: ClusterProcesses) -> None:
    """And if it is killed while that arrives or is put in place, it is sent again."""
    behind = a_follower(cluster)
    behind.kill()
    others = [node for node in cluster.all if node is not behind]
    last = behind_index(behind, cluster)
    with Clients(others, seed=4, submitters=6) as clients:
        wait_until(lambda: snapshot_index(cluster.leader()) > last + 400, seconds=40)
    for delay in (0.0, 0.02, 0.05, 0.1):  # of the kill, from the moment it takes part again: the moment is the test
        behind.start(wait=False)
        wait_until(lambda: "snapshot" in log_since(behind), seconds=20) if delay else None
        threading.Event().wait(delay)
        behind.kill()
    behind.start()
    cluster.wait_voters(3)
    check(clients, cluster)
    assert "fetched snapshot" in behind.log_text


def test_a_voter_whose_queue_went_wrong_is_noticed(cluster: ClusterProcesses) -> None:
    """A value in its tables was flipped: its journal is whole, its answers are not (PROTOCOL §2.23)."""
    cluster["n1"].submit(command=["true"], requires={"cpus": 900})
    cluster.wait_equal()
    odd = a_follower(cluster)
    odd.kill()
    with contextlib.closing(sqlite3.connect(odd.data / "state.db")) as db, db:
        assert db.execute("UPDATE counts SET n = n + 1 WHERE state = 'pending'").rowcount > 0
    odd.start()
    leader = cluster.leader()
    with Clients([node for node in cluster.all if node is not odd], seed=5, submitters=6) as clients:
        wait_until(lambda: leader.voters()[odd.node_id].get("diverged"), seconds=60)
    assert [name for name, row in leader.voters().items() if row.get("diverged")] == [odd.node_id]

    def alerted() -> str:
        alerts = leader.request("GET", "/work_queue_status")[1]["alerts"]
        return "".join(alert["message"] for alert in alerts if alert["alert"] == "diverged")

    wait_until(alerted)
    wait_until(lambda: f"{odd.node_id} went wrong" in alerted())
    odd.kill()  # what the runbook says
    shutil.rmtree(odd.data)
    odd.start(wait=False)
    wait_until(lambda: not any(row.get("diverged") for row in leader.voters().values()), seconds=30)
    wait_until(lambda: not alerted())
    cluster.wait_voters(3, seconds=30)
    check(clients, cluster)


def snapshot_index(node: NodeProcess) -> int:
    """Of its newest snapshot. The log is kept from the one before it on, and a little more."""
    return int(node.status()["journal"]["snapshot_index"])


def behind_index(node: NodeProcess, cluster: ClusterProcesses) -> int:
    return int(cluster.leader().voters()[node.node_id]["match_index"])


def log_since(node: NodeProcess) -> str:
    """What its newest start has logged."""
    return node.log_text.rpartition("listens on")[2]
