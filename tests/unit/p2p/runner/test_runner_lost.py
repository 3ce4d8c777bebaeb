"""The runner is killed, the machine restarts, the record is broken: what the next runner makes of it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

import apsw
import pytest

from p2p.runner import processes


async def test_orphans_of_a_killed_runner_are_ended_and_reported(running, new_signal):
    leader, child = new_signal("leader"), new_signal("child")
    inner = f"trap '' TERM; echo $$ > {child.path}; while :; do sleep 1000; done"
    (running.root / "inner").write_text(inner)
    await running.start("job", f"sh {running.root}/inner & echo $$ > {leader.path}; wait", grace_seconds=0.3)
    pids = [int(await leader.line()), int(await child.line())]
    await running.run("barrier", "true")  # the pid is on record
    await running.kill_runner()
    assert all(processes.read_stat(pid) for pid in pids), "jobs go on without a runner"
    known = {r.job: r.state for r in await running.connect()}
    assert known == {"job": "running", "barrier": "exited"}
    report = await running.exited("job")
    assert (report.reason, report.exit_code, report.signal) == ("runner_lost", None, None)
    assert report.error == "the runner was killed while this job ran; its orphaned process group was ended"
    for pid in pids:
        await running.gone(pid)


async def test_orphan_in_its_own_session_is_found_by_its_environment(running, new_signal):
    ready = new_signal()
    await running.start("job", f"setsid sh -c 'echo $$ > {ready.path}; exec sleep 1000' & wait", grace_seconds=1)
    escaped = int(await ready.line())
    leader = (await running.reported("job", "running")).pid
    await running.kill_runner()
    os.kill(leader, 9)
    await running.gone(leader)
    await running.connect()
    assert (await running.exited("job")).error.endswith("was ended")
    await running.gone(escaped)


async def test_job_that_ended_without_a_runner_has_an_unknown_status(running, new_signal):
    go = new_signal("go")
    await running.start("job", f"read line < {go.path}; exit 9")
    leader = (await running.reported("job", "running")).pid
    await running.run("barrier", "true")
    await running.kill_runner()
    go.path.write_text("go\n")
    await running.gone(leader)
    await running.connect()
    report = await running.exited("job")
    assert (report.reason, report.exit_code) == ("runner_lost", None)
    assert report.error.endswith("its exit status is unknown")


async def test_process_of_an_intent_without_pid_is_found_by_its_environment(running, new_signal):
    """Killed between the spawn and its record."""
    ready = new_signal()
    await running.start("job", f"echo $$ > {ready.path}; exec sleep 1000")
    leader = int(await ready.line())
    await running.run("barrier", "true")
    await running.kill_runner()
    edit(running, "UPDATE attempts SET state = 'starting', pid = NULL, pid_start = NULL WHERE job = 'job'")
    await running.connect()
    report = await running.exited("job")
    assert (report.reason, report.error.split(";")[1]) == ("runner_lost", " its orphaned process group was ended")
    await running.gone(leader)


@pytest.mark.parametrize(
    ("earlier", "boot", "ended"),
    [(1, None, False), (0, "before", False), (0, None, True)],
    ids=["recycled pid", "earlier boot", "same process"],  # the last is the control: the rule is not about strangers
)
async def test_recycled_pid_is_never_signalled(running, earlier, boot, ended):
    await running.start("job", "sleep 1000")
    await running.reported("job", "running")
    await running.run("barrier", "true")
    with sleeper() as stranger:
        start = processes.read_stat(stranger.pid).start - earlier
        await running.kill_runner()
        edit(
            running,
            f"UPDATE attempts SET pid = {stranger.pid}, pid_start = {start}, directory = '/elsewhere',"
            f" boot_id = '{boot or processes.boot_id()}' WHERE job = 'job'",
        )
        end_marked(running, "job")
        await running.connect()
        report = await running.exited("job")
        assert report.reason == ("machine_restarted" if boot else "runner_lost")
        if ended:
            assert stranger.wait(10) == -15
        assert (stranger.poll() is not None) == ended


async def test_attempt_of_an_earlier_boot_is_machine_restarted(running):
    await running.start("job", "sleep 1000")
    await running.reported("job", "running")
    await running.run("barrier", "true")
    await running.kill_runner()
    edit(running, "UPDATE attempts SET boot_id = 'before' WHERE job = 'job'")
    end_marked(running, "job")
    await running.connect()
    report = await running.exited("job")
    assert (report.reason, report.error) == ("machine_restarted", "the machine restarted while this job ran")


@pytest.mark.parametrize(
    "break_it", [lambda b: b"not a database" * 1000, lambda b: b[:100] + os.urandom(len(b) - 100)], ids=["all", "pages"]
)
async def test_broken_record_is_moved_aside_and_its_jobs_are_found_and_ended(running, new_signal, break_it):
    ready = new_signal()
    await running.start("job", f"echo $$ > {ready.path}; exec sleep 1000", grace_seconds=1)
    leader = int(await ready.line())
    await running.run("barrier", "true")
    await running.kill_runner()
    path = running.directory / "runner.db"
    edit(running, "PRAGMA wal_checkpoint(TRUNCATE)")
    path.write_bytes(break_it(path.read_bytes()))
    await running.connect()
    report = await running.exited("job")
    assert (report.reason, report.attempt) == ("runner_lost", 1)
    await running.gone(leader)
    assert (running.directory / "runner.db.broken").exists()
    assert "moved aside" in (running.directory / "runner.log").read_text()
    assert (await running.run("next", "exit 3")).exit_code == 3


async def test_broken_record_does_not_touch_another_nodes_jobs(running):
    """Another data directory on the same machine, or a job whose own runner lives."""
    neighbour = running.new_client()
    neighbour._directory = running.root / "neighbour" / "runner"
    await neighbour.connect()
    await neighbour.start([running.spec("looked-after", "sleep 1000")])
    await running.reported("looked-after", "running")
    env = {"P2P_JOB_ID": "theirs", "P2P_ATTEMPT": "1", "P2P_JOB_DIR": "/elsewhere/jobs/theirs"}
    with sleeper(env) as stranger:
        await running.run("barrier", "true")
        await running.kill_runner()
        edit(running, "PRAGMA wal_checkpoint(TRUNCATE)")  # else the log of the last changes heals the file
        (running.directory / "runner.db").write_bytes(b"not a database" * 1000)
        assert await running.connect() == []
        assert stranger.poll() is None


@contextlib.contextmanager
def sleeper(env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is no job of the runner under test."""
    with subprocess.Popen(["/bin/sleep", "1000"], env=env, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def edit(node, statement: str) -> None:
    database = apsw.Connection(str(node.directory / "runner.db"))
    database.execute(statement).fetchall()
    database.close()


def end_marked(node, job: str) -> None:
    """The real process of a record that a test has rewritten."""
    for stat in processes.scan():
        mark = processes.mark_of(stat.pid)
        if mark is not None and mark.job == job and mark.directory.startswith(str(node.root)):
            processes.signal_exactly(stat.pid, stat.start, 9)
