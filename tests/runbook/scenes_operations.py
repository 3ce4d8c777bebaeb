"""For every section of P2P_ORCHESTRATOR_OPERATIONS.md: its situation, and what must be true after each block. See
`scenes`."""

from __future__ import annotations

import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

from tests.nodes import wait_until
from tests.runbook.deployment import Outcome
from tests.runbook.fleet import VOTERS, Box, Fleet

Steps = Generator[None, Outcome, None]
SCENES: dict[str, Callable[[Fleet], Steps]] = {}
UNHEALED = {"Start three boxes", "Two boxes only"}  # sections that begin with nothing


def scene(section: str) -> Callable[[Callable[[Fleet], Steps]], Callable[[Fleet], Steps]]:
    def register(function: Callable[[Fleet], Steps]) -> Callable[[Fleet], Steps]:
        assert section not in SCENES, section
        SCENES[section] = function
        return function

    return register


def rows(output: str) -> dict[str, list[str]]:
    """The lines of a table by their first word; the first of each counts."""
    found: dict[str, list[str]] = {}
    for line in output.splitlines():
        if line.strip():
            found.setdefault(line.split()[0], line.split())
    return found


def running_job(f: Fleet, box: str) -> str:
    job = f.here.submit("sleep", "600", requires={"node": box, "cpus": 0.1})
    f.here.wait_for(job, "running")
    return job


def assert_untouched(f: Fleet, job: str) -> None:
    """It runs in its first attempt, and its worker has taken it up."""

    def taken_up() -> bool:
        record = f.here.job(job)
        assert (record["state"], record["attempt"]) == ("running", 1), record
        return bool(f[record["worker"]].ask("/status")["peers"][record["worker"]]["running_jobs"])

    wait_until(taken_up)


@scene("Before you begin")
def before_you_begin(f: Fleet) -> Steps:
    (f.here.home / ".p2p/.curlrc").unlink()
    done = yield
    assert set(VOTERS) <= set(rows(done.output))
    assert (f.here.home / ".p2p/.curlrc").stat().st_mode & 0o077 == 0
    f.use_token(str(f.here.token))


@scene("Start three boxes")
def start_three_boxes(f: Fleet) -> Steps:
    f.wipe(*f.boxes)
    for box in f.boxes.values():
        (box.project / "config/token").unlink(missing_ok=True)
    yield
    token = (f.here.project / "config/token").read_text().strip()
    assert len(token) == 64
    for name in VOTERS:
        file = f[name].project / "config/token"
        assert file.read_text().strip() == token
        assert file.stat().st_mode & 0o077 == 0
    f.use_token(token)
    yield
    f.settle(*VOTERS)
    yield
    assert len({f[name].status()["cluster_id"] for name in VOTERS}) == 1
    done = yield
    assert {row[1] for row in rows(done.output).values() if row[0] in VOTERS} == {"voter", "leader"}


@scene("A healthy cluster")
def a_healthy_cluster(f: Fleet) -> Steps:
    done = yield
    table = rows(done.output)
    assert table["NODE"] == ["NODE", "ROLE", "STATE", "LAG", "JOBS", "ADDRESS", "VERSION"]
    assert sorted(table[name][1] for name in VOTERS) == ["follower", "follower", "leader"]
    assert {table[name][2] for name in VOTERS} == {"alive"}
    done = yield
    assert done.output.splitlines() == [f'{name}: {{"ready":true}}' for name in VOTERS]
    done = yield
    assert done.output.startswith("3 of 3 voters alive, ")


@scene("Add a node")
def add_a_node(f: Fleet) -> Steps:
    f.wipe("box-4")
    done = yield
    assert rows(done.output)["box-4"][1:3] == ["worker", "alive"]
    done = yield
    assert rows(done.output)["box-4"][1] == "voter"
    assert "4 voters survive no more failures than 3" in done.output
    f.here.order("/admin/voters/remove", node="box-4")


@scene("Remove a node for good")
def remove_a_node(f: Fleet) -> Steps:
    f.settle("box-4")
    f["box-4"].launch()
    wait_until(f["box-4"].ready)
    job = f.here.submit("sleep", "0.5", requires={"node": "box-4"})
    f.here.wait_for(job, "running")
    f.here.order("/admin/voters/add", node="box-4")
    yield
    assert f.here.wait_for(job, "completed")["worker"] == "box-4"
    assert f["box-4"].ask("/status")["peers"]["box-4"]["draining"]
    yield
    wait_until(lambda: not f["box-4"].running)
    wait_until(lambda: f.here.ask("/nodes")["nodes"]["box-4"]["state"] == "left")
    assert "NODE_LEFT node=box-4" in (f.here.project / "logs/coordination.log").read_text()
    assert f.here.status()["voters"] == list(VOTERS)
    f.wipe("box-4")


@scene("Rolling restart and upgrade")
def rolling_restart(f: Fleet) -> Steps:
    jobs = [running_job(f, name) for name in VOTERS]
    before = {name: f[name].node_pid for name in VOTERS}
    yield
    assert not {f[name].node_pid for name in VOTERS} & set(before.values())
    f.wait_voters(*VOTERS)
    for job in jobs:
        assert_untouched(f, job)
        f.here.order(f"/jobs/{job}/cancel")


@scene("Stop a node")
def stop_a_node(f: Fleet) -> Steps:
    f.lead("box-3")
    done = yield
    assert not f["box-3"].running
    assert done.output.startswith(("box-1 leads term ", "box-2 leads term "))
    wait_until(lambda: "NODE_LEFT node=box-3" in (f.here.project / "logs/coordination.log").read_text())


@scene("A data directory in another place")
def another_place(f: Fleet) -> Steps:
    disk = f.here.ask("/admin/voters")["voters"][0]["disk"]
    done = yield
    assert "is a copy (a restored backup, or a cloned image)" in done.output
    assert "Start with --adopt" in done.output
    yield

    def disks() -> set[str]:
        return {row["disk"] for row in f["box-2"].ask("/admin/voters")["voters"] if row["node"] == "box-1"}

    wait_until(lambda: disk not in disks())
    f.wait_voters(*VOTERS)
    old, moved = f.here.data, f.here.project / "data/moved"
    shutil.rmtree(old)
    moved.replace(old)  # within the file system: nothing to adopt
    f.here.kill(signal.SIGTERM)
    f.here.launch()
    f.wait_voters(*VOTERS)


@scene("An emptied disk")
def an_emptied_disk(f: Fleet) -> Steps:
    before = {row["node"]: row["disk"] for row in f.here.ask("/admin/voters")["voters"]}
    f.wipe("box-2")
    done = yield
    after = {row["node"]: row["disk"] for row in f.here.ask("/admin/voters")["voters"]}
    assert set(after) == set(VOTERS)
    assert after["box-2"] != before["box-2"]
    assert (after["box-1"], after["box-3"]) == (before["box-1"], before["box-3"])
    assert set(VOTERS) <= set(rows(done.output))


@scene("Nodes that nobody can dial")
def nobody_can_dial(f: Fleet) -> Steps:
    f.wipe("box-4")
    f.settle("box-4")
    done = yield
    row = rows(done.output)["box-4"]
    assert (row[1], row[2], row[5]) == ("worker", "alive", "-")
    job = f.here.submit("sh", "-c", "echo from behind the wall", requires={"node": "box-4"})
    f.here.wait_for(job, "completed")
    wait_until(lambda: b"from behind the wall" in f.here.page(f"/jobs/{job}/logs"))  # its tunnels take a moment
    f.wipe("box-4")


@scene("Two boxes only")
def two_boxes(f: Fleet) -> Steps:
    f.wipe(*f.boxes)
    two = ("box-1", "box-2")
    f.settle(*two, peers=two)
    for name in two:
        f[name].launch()
    wait_until(lambda: len(f.here.status().get("learners", ())) == 1, seconds=30)
    done = yield
    assert sorted(row[1] for row in rows(done.output).values() if row[0] in two) == ["leader", "learner"]
    assert "1 voter of 3 wanted" in done.output


@scene("The token")
def the_token(f: Fleet) -> Steps:
    job = running_job(f, "box-2")
    old = f.here.token
    yield
    new = (f.here.project / "config/token").read_text().strip()
    assert new != old
    assert f.here.request("POST", "/work_queue/purge_failed")[0] == 401
    f.use_token(new)
    f.wait_voters(*VOTERS)
    assert_untouched(f, job)
    f.here.order(f"/jobs/{job}/cancel")


@scene("Clocks")
def clocks(f: Fleet) -> Steps:
    f.lead("box-2")
    done = yield
    ahead = {line.split()[0]: abs(int(line.split()[1])) for line in done.output.splitlines()}
    assert "box-2" in ahead
    assert max(ahead.values()) < 1_000


@scene("Two clusters that met")
def two_clusters(f: Fleet) -> Steps:
    f.wipe("box-4")
    f.settle("box-4", peers=())
    box = f["box-4"]
    box.launch()
    wait_until(box.ready)
    other = box.status()["cluster_id"]
    box.kill(signal.SIGTERM)
    f.settle("box-4")
    box.launch()
    wait_until(lambda: f"belongs to cluster {other}" in f.here.log(), seconds=30)
    done = yield
    assert other in done.output
    assert f.here.status()["cluster_id"] in done.output
    done = yield
    assert rows(done.output)["box-4"][2] == "alive"
    assert box.status()["cluster_id"] == f.here.status()["cluster_id"]
    f.wipe("box-4")


@scene("A majority that is lost for good")
def lost_majority(f: Fleet) -> Steps:
    jobs = {f.here.submit("true", requires={"cpus": 900}) for _ in range(5)}
    running = running_job(f, "box-3")
    cluster = f.here.status()["cluster_id"]
    wait_until(lambda: {j["id"] for j in f.here.ask("/jobs?consistency=stale")["jobs"]} >= jobs | {running})
    for name in ("box-2", "box-3"):
        f[name].kill()
    shutil.rmtree(f["box-2"].project / "data")
    for database in f["box-3"].data.glob("raft.db*"):
        database.write_bytes(b"")
    wait_until(lambda: f.here.status().get("not_ready") == "no leader")
    done = yield
    assert "box-1 holds entries up to" in done.output
    assert "Lost: whatever box-2, box-3 acknowledged behind entry" in done.output
    assert "Nothing was changed" in done.output
    done = yield
    assert "box-1 is the only voter of the new cluster" in done.output
    assert f.here.status()["cluster_id"] != cluster
    assert {j["id"] for j in f.here.ask("/jobs?state=pending")["jobs"]} >= jobs
    done = yield
    assert {rows(done.output)[name][2] for name in VOTERS} == {"alive"}
    f.wait_voters(*VOTERS)
    assert_untouched(f, running)
    f.here.order(f"/jobs/{running}/cancel")


@scene("Back up")
def back_up(f: Fleet) -> Steps:
    jobs = {f.here.submit("true", requires={"cpus": 900}) for _ in range(3)}
    f.lead("box-1")
    done = yield
    assert {"./raft.db", "./state.db"} <= set(done.output.split())
    assert not {line for line in done.output.split() if line.startswith(("./jobs", "./runner"))}
    # Every voter is gone, and this is what is left.
    archive = f["box-3"].home / "backup.tar.gz"
    f.wipe(*VOTERS)
    box = f["box-3"]
    box.data.mkdir(parents=True)
    shutil.unpack_archive(archive, box.data, filter="data")
    box.shell("python -m p2p recover --data-dir data/box-3 --i-accept-data-loss")
    box.launch()
    wait_until(box.ready)
    assert {j["id"] for j in box.ask("/jobs?state=pending")["jobs"]} >= jobs
    f.wait_voters("box-3")


@scene("A full disk")
def a_full_disk(f: Fleet) -> Steps:
    done = yield
    assert "data/box-1/raft.db" in done.output


@scene("A job's log")
def a_jobs_log(f: Fleet) -> Steps:
    go = f["box-2"].home / "go"
    go.unlink(missing_ok=True)
    script = f'for n in 1 2 3 4 5 6; do echo "line $n"; done; while [ ! -e {go} ]; do sleep 0.1; done; echo last'
    job = f.here.submit("sh", "-c", script, requires={"node": "box-2", "cpus": 0.1})
    f.here.wait_for(job, "running")
    wait_until(lambda: b"line 6" in f.here.page(f"/jobs/{job}/logs"))
    done = yield
    assert "line 1\n" not in done.output
    assert "line 2\nline 3\nline 4\nline 5\nline 6\n" in done.output
    headers = {line.partition(": ")[0].lower(): line.partition(": ")[2].strip() for line in done.output.splitlines()}
    assert (headers["x-p2p-log-size"], headers["x-p2p-node"]) == ("42", "box-2")
    # While it is followed, the node that has it is killed and comes back.
    threading.Thread(target=_kill_and_start, args=(f["box-2"], go)).start()
    done = yield
    assert done.output.splitlines()[-1] == "47 followed"
    assert (f.here.project / "followed").read_text() == "".join(f"line {n}\n" for n in range(1, 7)) + "last\n"
    assert f.here.wait_for(job, "completed")["attempt"] == 1


def _kill_and_start(box: Box, go: Path) -> None:
    time.sleep(1)
    box.kill()
    time.sleep(1)
    box.launch()
    wait_until(box.ready, seconds=30)
    go.touch()


@scene("Memory limits")
def memory_limits(f: Fleet) -> Steps:
    f.lead("box-1")
    hog = "x = bytearray(200 << 20); __import__('time').sleep(600)"
    for name in VOTERS:
        requires = {"node": name, "cpus": 0.1, "memory_mb": 50}
        job = f.here.submit("python", "-c", hog, requires=requires, max_attempts=1)
        assert f.here.wait_for(job, "failed")["reason"] == "memory_limit"
    done = yield
    assert "killed: used more than its memory limit of 50 MB" in done.output
    done = yield
    for name in VOTERS:
        assert re.search(rf"^{name}: .*memory limits are (held by cgroups below|watched, not held)", done.output, re.M)
    yield
    assert f.here.settings["work"]["memory_policy"] == "kill"
    f.quick()


@scene("Settings that matter")
def settings_that_matter(f: Fleet) -> Steps:
    yield
    assert f.here.settings["cluster"]["voter_target"] == 3
    f.quick()


@scene("Reading the log")
def reading_the_log(f: Fleet) -> Steps:
    f.lead("box-1" if f.leader.name != "box-1" else "box-2")
    done = yield
    assert " LEADER_ELECTED node=" in done.output
    assert " NODE_JOINED node=" in done.output
