"""``p2pctl`` against real nodes: what it orders happens, what it says is true, and its exit code tells which."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import ROOT, ClusterProcesses, NodeProcess, free_port, queue_of, wait_until

DONE, REFUSED, USAGE, UNREACHABLE, UNKNOWN = range(5)


class Said:
    """How an order ended."""

    def __init__(self, process: subprocess.CompletedProcess[str]) -> None:
        self.code, self.out, self.err = process.returncode, process.stdout, process.stderr
        assert "Traceback" not in self.out + self.err, self.err

    @property
    def json(self) -> Any:
        assert self.code == DONE, (self.code, self.err)
        return json.loads(self.out)

    def refused(self, code: int, *words: str) -> None:
        """One sentence, and perhaps a hint."""
        assert self.code == code, (self.code, self.out, self.err)
        lines = self.err.splitlines()
        assert lines[0].startswith("p2pctl: ")
        assert len(lines) <= 2, self.err
        for word in words:
            assert word in self.err, (word, self.err)


def p2pctl(*words: object, via: NodeProcess | None = None, **environment: str) -> Said:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("P2P_", "RINGRIFT_"))} | environment
    if via is not None:
        env["P2P_URL"] = via.url
    command = [sys.executable, "-m", "p2p", *map(str, words)]
    return Said(subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcesses]:
    """Three voters and a node that never votes."""
    made = ClusterProcesses(tmp_path_factory.mktemp("cli"), 4, each={"n4": ["--no-voter"]})
    try:
        yield made.start(voters=3)
    finally:
        made.destroy()


@pytest.fixture
def three(cluster: ClusterProcesses) -> ClusterProcesses:
    cluster.wait_voters(3)
    return cluster


def names(told: dict[str, Any], key: str = "voters") -> list[str]:
    return [row["node"] for row in told[key]]


def test_the_voters_are_listed_through_any_node(three: ClusterProcesses) -> None:
    leader = three.leader()
    for node in three.all:
        told = p2pctl("voters", "list", "--json", via=node).json
        assert names(told) == ["n1", "n2", "n3"]
        assert [row["node"] for row in told["voters"] if row["leads"]] == [leader.node_id]
    lines = p2pctl("--url", three["n4"].url, "voters", "list").out.splitlines()
    assert lines[0].split() == ["NODE", "ROLE", "STATE", "LAG", "HEARD", "DISK"]
    assert {tuple(line.split()[:3]) for line in lines[1:4]} == {
        (name, "leader" if name == leader.node_id else "voter", "alive") for name in ("n1", "n2", "n3")
    }
    assert lines[4].startswith("3 voters of 3 wanted; ")


def test_who_leads_and_since_when(three: ClusterProcesses) -> None:
    leader = three.leader()
    for node in three.all:
        told = p2pctl("leader", "--json", via=node).json
        assert (told["leader"], told["term"]) == (leader.node_id, leader.status()["term"])
        assert 0 < told["seconds"] < 600
    assert p2pctl("leader", via=leader).out.startswith(f"{leader.node_id} leads term ")


def test_the_status_has_every_node(three: ClusterProcesses) -> None:
    three.wait_equal()
    told = p2pctl("status", "--json", via=three["n4"]).json
    rows = {row["node"]: row for row in told["nodes"]}
    assert set(rows) == {"n1", "n2", "n3", "n4"}
    assert {row["state"] for row in rows.values()} == {"alive"}
    assert (rows["n4"]["role"], rows["n4"]["lag"]) == ("worker", None)
    assert all(rows[name]["lag"] is not None for name in ("n1", "n2", "n3"))
    assert told["leader"] == three.leader().node_id
    lines = p2pctl("status", via=three["n4"]).out.splitlines()
    assert len(lines) == 6
    assert lines[-1].startswith(f"{told['leader']} leads term ")


def test_the_leadership_is_handed_over(three: ClusterProcesses) -> None:
    before = three.leader()
    heir = three.followers()[0] if three.followers()[0].node_id != "n4" else three.followers()[1]
    told = p2pctl("transfer", "--to", heir.node_id, "--json", via=three["n4"]).json
    assert told["leader"] == heir.node_id
    assert three.wait_voters(3) is heir
    told = p2pctl("transfer", via=before)
    assert told.code == DONE
    assert three.wait_voters(3) is not heir
    p2pctl("transfer", "--to", "n4", via=before).refused(REFUSED, "n4 is not a voter")


def test_a_vote_is_taken_away_and_given_back_even_the_leaders(three: ClusterProcesses) -> None:
    leader = three.leader()
    told = p2pctl("voters", "remove", leader.node_id, "--json", via=three["n4"]).json
    assert leader.node_id not in names(told)
    said = p2pctl("voters", "list", via=three["n4"])
    assert "2 voters survive no more failures than 1" in said.out
    assert three.wait_voters(2) is not leader
    assert leader.node_id in names(p2pctl("voters", "add", leader.node_id, "--json", via=leader).json)
    three.wait_voters(3)


def test_what_cannot_be_done_is_said_in_one_sentence(three: ClusterProcesses) -> None:
    node = three["n2"]
    p2pctl("voters", "add", "nobody", via=node).refused(REFUSED, "there is no node 'nobody'", "p2pctl status")
    p2pctl("voters", "remove", "n4", via=node).refused(REFUSED, "n4 is no voter")
    said = p2pctl("voters", "remove", "n4", "--json", via=node)
    assert json.loads(said.out) == {
        "error": "n4 is no voter",
        "hint": "see who there is: p2pctl status",
        "exit_code": 1,
    }


def test_without_a_majority_there_is_no_leader_and_the_table_is_still_there(three: ClusterProcesses) -> None:
    last = three.leader()
    others = [three[name] for name in ("n1", "n2", "n3") if three[name] is not last]
    for node in others:
        node.freeze()
    try:
        wait_until(lambda: last.status()["leader_id"] is None)
        p2pctl("leader", via=last).refused(REFUSED, "there is no leader now", "P2P_LEADER_FAILOVER.md")
        told = p2pctl("status", "--json", via=last).json
        assert (told["leader"], told["not_ready"]) == (None, "no leader")
        assert {row["node"] for row in told["nodes"]} == {"n1", "n2", "n3", "n4"}
        assert "no leader (term " in p2pctl("status", via=last).out
        assert p2pctl("--timeout", 1, "voters", "remove", others[0].node_id, via=last).code in (REFUSED, UNKNOWN)
    finally:
        for node in others:
            node.thaw()
    three.wait_voters(3)


# -- the command line --------------------------------------------------------------------------------------------------


def test_nobody_there_is_exit_code_3() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for words in (["status"], ["voters", "remove", "n1"], ["transfer"]):
        p2pctl(*words, "--url", url).refused(UNREACHABLE, url, "scripts/p2p_orchestrator.py")
    p2pctl("leader", P2P_URL=url).refused(UNREACHABLE, url)


@pytest.mark.parametrize(
    ("words", "code"),
    [(["leader"], UNREACHABLE), (["voters", "add", "n2"], UNKNOWN), (["transfer"], UNKNOWN)],
    ids=["a question", "an order", "another order"],
)
def test_a_node_that_goes_away_before_it_answers(words: list[str], code: int) -> None:
    """A question may be asked again; of an order nobody knows."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)

        thread = threading.Thread(target=hang_up)
        thread.start()
        said = p2pctl(*words, "--url", f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join(10)
    said.refused(code, "may have been done" if code == UNKNOWN else "does not answer")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["voters"],
        ["voters", "add"],
        ["lead"],
        ["status", "--token", "secret"],
        ["recover"],
        ["status", "--timeout", "0"],
        ["status", "--url", "https://x:1"],
        ["status", "--url", "http://127.0.0.1:port"],
        ["status", "--token-file", "/nowhere/token"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_exit_code_2(words: list[str]) -> None:
    assert p2pctl(*words).code == USAGE


def test_help_tells_the_exit_codes() -> None:
    said = p2pctl("--help")
    assert said.code == DONE
    assert "exit codes" in said.out


def test_the_token_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    secret = "a-secret-that-is-only-for-tests"
    file = tmp_path / "token"
    file.write_text(secret)
    file.chmod(0o600)
    node = NodeProcess(tmp_path / "n1", ["--no-worker", "--no-populate", "--auth-token-file", str(file)])
    try:
        node.token = secret
        node.start()
        assert p2pctl("voters", "list", via=node).code == DONE, "reads from the machine itself are open"
        order = ("voters", "add", "n1")
        p2pctl(*order, via=node).refused(REFUSED, "--token-file", "RINGRIFT_CLUSTER_AUTH_TOKEN_FILE")
        for words, environment in (
            (["--token-file", file], {}),
            ([], {"RINGRIFT_CLUSTER_AUTH_TOKEN_FILE": str(file)}),
            ([], {"RINGRIFT_CLUSTER_AUTH_TOKEN": secret}),
        ):
            assert p2pctl(*order, *words, via=node, **environment).code == DONE
        said = p2pctl(*order, via=node, RINGRIFT_CLUSTER_AUTH_TOKEN="a-wrong-" + secret)
        said.refused(REFUSED)
        assert secret not in said.err
        file.chmod(0o644)
        p2pctl(*order, "--token-file", file, via=node).refused(USAGE, "chmod 600")
    finally:
        node.destroy()


# -- a majority that is lost for good ----------------------------------------------------------------------------------


def test_the_last_voter_goes_on_as_a_new_cluster_with_everything_that_it_had(tmp_path: Path) -> None:
    with ClusterProcesses(tmp_path, 3) as cluster:
        cluster.start(voters=3)
        for n, node in enumerate(cluster.all * 4):
            job = node.submit(command=["true"], priority=n)
            if n % 3 == 1:
                assert node.request("POST", f"/jobs/{job}/cancel")[0] == 200
        queue = cluster.wait_equal()
        assert len(queue) == 12
        leader = cluster.leader()
        last, old, gone = leader, *(node for node in cluster.all if node is not leader)
        ids = [node.status()["cluster_id"] for node in cluster.all]

        for node in (old, gone):
            node.destroy()
        shutil.rmtree(gone.data)
        wait_until(lambda: last.status()["not_ready"] == "no leader")
        order = ("recover", "--data-dir", last.data)
        p2pctl(*order, "--i-accept-data-loss").refused(REFUSED, f"process {last.process.pid}", "pkill")  # type: ignore[union-attr]
        last.kill(signal.SIGTERM)
        said = p2pctl(*order)
        assert said.code == REFUSED
        assert f"{last.node_id} holds entries up to" in said.out
        assert "Nothing was changed" in said.out
        p2pctl(*order, "--node-id", "n9", "--i-accept-data-loss").refused(USAGE, last.node_id)
        told = p2pctl(*order, "--i-accept-data-loss", "--json").json
        assert told["old_cluster"] == ids[0]
        assert told["cluster"] != ids[0]
        assert told["others"] == sorted([old.node_id, gone.node_id])
        assert told["committed_index"] <= told["last_index"]
        p2pctl(*order, "--i-accept-data-loss").refused(REFUSED, "is the only voter", "start it")

        last.start()
        assert last.status()["cluster_id"] == told["cluster"]
        assert cluster.wait_voters(1) is last
        assert queue_of(last) == queue, "everything acknowledged that it had, and nothing else"
        queue[last.submit(command=["true"])] = {}

        old.start(wait=False)  # with its old journal
        for node in (old, last):
            wait_until(lambda node=node: all(name in node.log_text for name in (ids[0], told["cluster"])))
        assert list(last.request("GET", "/nodes")[1]["nodes"]) == [last.node_id]
        assert old.request("GET", "/ready")[0] == 503
        old.kill(signal.SIGTERM)
        for pattern in ("raft.db*", "state.db*", "snapshots"):
            for path in old.data.glob(pattern):
                path.rename(path.with_name(f"lost-{path.name}"))
        old.start(wait=False)
        gone.start(wait=False)
        cluster.wait_voters(3, seconds=30)
        assert set(cluster.wait_equal()) == set(queue)
        assert {node.status()["cluster_id"] for node in cluster.all} == {told["cluster"]}
        last.kill()
        assert cluster.leader(other_than=last).submit(command=["true"])


def test_there_is_nothing_to_recover_where_nothing_was_kept(tmp_path: Path) -> None:
    p2pctl("recover", "--data-dir", tmp_path).refused(USAGE, "there is no journal")
    with ClusterProcesses(tmp_path, 2, each={"n2": ["--no-voter"]}) as cluster:
        cluster.start(voters=1)
        for node in cluster.all:
            node.kill(signal.SIGTERM)
        flag = "--i-accept-data-loss"
        p2pctl("recover", "--data-dir", cluster["n1"].data, flag).refused(REFUSED, "is the only voter")
        p2pctl("recover", "--data-dir", cluster["n2"].data, flag).refused(REFUSED, "holds no copy")
        raft = cluster["n1"].data / "raft.db"
        raft.write_bytes(b"\0" * 100 + raft.read_bytes()[100:])
        p2pctl("recover", "--data-dir", cluster["n1"].data, flag).refused(REFUSED, "nothing was changed")
        cluster["n1"].start(wait=False)
        assert cluster["n1"].process is not None
        assert cluster["n1"].process.wait(30) == 1
