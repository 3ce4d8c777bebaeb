"""The leader is killed, frozen or told to stop while clients write through every node: nothing acknowledged is lost,
nothing is doubled, and a survivor takes over in time (DESIGN §8.1 to §8.4)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cluster.histories import Clients, check
from tests.nodes import ClusterProcesses, wait_until

FROZEN_SECONDS = float(os.environ.get("P2P_FROZEN_SECONDS", "3"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcesses]:
    """Three voters that take jobs and run none."""
    with ClusterProcesses(tmp_path_factory.mktemp("three"), 3) as cluster:
        cluster.start(voters=3)
        yield cluster


@pytest.fixture(autouse=True)
def whole(cluster: ClusterProcesses) -> Iterator[None]:
    """Every test finds and leaves three voters that agree, and an empty queue."""
    yield
    cluster.mend()
    cluster.wait_equal()
    assert cluster.leader().request("POST", "/work_queue/clear", {"include_running": True})[0] == 200
    assert cluster.leader().request("POST", "/work_queue/purge_failed", {"max_age_hours": 0})[0] == 200


Record = Callable[[str, object], None]


def test_kill_9_of_the_leader_loses_and_doubles_nothing(cluster: ClusterProcesses, record_property: Record) -> None:
    leader = cluster.leader()
    with Clients(cluster.all, seed=1) as clients:
        clients.wait_acks(50)
        killed = time.monotonic()
        leader.kill()
        successor = cluster.leader(other_than=leader)
        clients.wait_acks(50, since=killed)
        leader.start()
        cluster.wait_voters(3)
        clients.wait_acks(50)
    record_property("gap_seconds", round(clients.gap(killed), 3))
    assert clients.gap(killed) < 2.0
    assert successor is not leader
    check(clients, cluster)


def test_a_leader_frozen_past_its_term_acknowledges_nothing_of_it(cluster: ClusterProcesses) -> None:
    leader = cluster.leader()
    term = leader.status()["term"]
    others = [node for node in cluster.all if node is not leader]
    answers: dict[str, tuple[int, Any]] = {}

    def ask_it(key: str) -> None:
        body = {"command": ["true"], "requires": {"cpus": 900}, "params": {"key": key}}
        answers[key] = leader.request("POST", "/jobs", body, headers={"Idempotency-Key": key}, timeout=30)

    with Clients(others, seed=2, cancels=False, workers=0) as clients:
        clients.wait_acks()
        leader.freeze()
        asking = [threading.Thread(target=ask_it, args=(f"frozen-{n}",)) for n in range(10)]
        for thread in asking:
            thread.start()
        successor = cluster.leader(other_than=leader)
        since = clients.wait_acks()
        wait_until(lambda: time.monotonic() - since > FROZEN_SECONDS - 1, seconds=FROZEN_SECONDS + 5)
        leader.thaw()
        asking += [threading.Thread(target=ask_it, args=(f"thawed-{n}",)) for n in range(10)]
        for thread in asking[10:]:
            thread.start()
        for thread in asking:
            thread.join(40)
        # What it answers now is its successor's answer, or none.
        told = wait_until(lambda: (s := leader.status())["leader_id"] == successor.node_id and s)
        assert (told["role"], told["term"] > term) == ("follower", True)
        clients.wait_acks()
    assert len(answers) == 20
    queue = cluster.wait_equal()
    kept = {record["params"].get("key"): job for job, record in queue.items()}
    for key, (status, answer) in answers.items():
        assert status in (200, 201, 503, 504), answer
        if status in (200, 201):
            assert kept.get(key) == answer["id"], f"{key} was acknowledged and is not there"
        elif status == 503:
            assert key not in kept, f"{key} was said not to be done, and is"
    clients.before |= {job for key, job in kept.items() if key in answers}
    check(clients, cluster)


def test_a_frozen_follower_disturbs_nobody(cluster: ClusterProcesses) -> None:
    leader = cluster.leader()
    term = leader.status()["term"]
    follower = cluster.followers()[0]
    with Clients([node for node in cluster.all if node is not follower], seed=3) as clients:
        clients.wait_acks()
        follower.freeze()
        frozen = clients.wait_acks(100)
        wait_until(lambda: time.monotonic() - frozen > 1.5)
        follower.thaw()
        clients.wait_acks(50)
        wait_until(lambda: follower.status()["leader_id"] == leader.node_id)
    assert clients.longest_gap() < 0.5
    assert leader.status()["term"] == term
    assert leader.status()["role"] == "leader"
    check(clients, cluster)


def test_a_follower_killed_and_started_again_catches_up(cluster: ClusterProcesses) -> None:
    leader = cluster.leader()
    term = leader.status()["term"]
    follower = cluster.followers()[0]
    with Clients(cluster.all, seed=4) as clients:
        clients.wait_acks()
        follower.kill()
        clients.wait_acks(50)
        follower.start()
        clients.wait_acks()
    assert leader.status()["term"] == term
    check(clients, cluster)


def test_all_voters_killed_at_once_go_on_where_they_were(cluster: ClusterProcesses) -> None:
    """The founder too: it is started without --peers, as it may have been the first time."""
    first = cluster.nodes["n1"]
    at = first.flags.index("--peers")
    peers, first.flags[at : at + 2] = first.flags[at : at + 2], []
    try:
        with Clients(cluster.all, seed=5) as clients:
            clients.wait_acks(50)
            for node in cluster.all:
                node.kill()
            cluster.start()
            clients.wait_acks(50)
        cluster.wait_voters(3)
        check(clients, cluster)
    finally:
        first.flags += peers


def test_a_rolling_restart_by_sigterm_hands_the_seat_over(cluster: ClusterProcesses, record_property: Record) -> None:
    gaps = []
    with Clients(cluster.all, seed=6) as clients:
        clients.wait_acks(50)
        for node in [*cluster.followers(), cluster.leader()]:
            told = clients.wait_acks()
            assert node.kill(signal.SIGTERM) == 0
            gaps.append(clients.longest_gap(since=told))
            clients.wait_acks()
            node.start()
            cluster.wait_voters(3)
        clients.wait_acks()
    record_property("gaps_seconds", [round(gap, 3) for gap in gaps])
    assert max(gaps) < 1.0, f"a hand-over is no failover: {gaps}"
    failed = {what: n for what, n in clients.answers.items() if what.endswith((" 503", " 504", " 500"))}
    assert sum(failed.values()) <= 10, failed
    check(clients, cluster)
