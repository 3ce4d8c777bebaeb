"""The agent is not the job: what an orchestrator that dies, comes back or is replaced finds."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from p2p.runner.client import RunnerClient, RunnerUnavailable

ORCHESTRATOR = """
import asyncio, sys
from pathlib import Path
from p2p.runner.client import RunnerClient, StartSpec
async def main(directory, job_directory, script):
    client = RunnerClient(Path(directory), on_report=lambda r: print(r[0].state, flush=True), on_lost=lambda: None)
    await client.connect()
    spec = StartSpec(job="job", attempt=1, argv=["/bin/sh", "-c", script], env={"PATH": "/usr/bin:/bin"},
                     directory=job_directory)
    await client.start([spec])
    await asyncio.sleep(1000)
asyncio.run(main(*sys.argv[1:]))
"""


async def test_exit_code_survives_kill_9_of_the_orchestrator(node, new_signal):
    go = new_signal("go")
    script = f"read line < {go.path}; exit 42"
    argv = [sys.executable, "-c", ORCHESTRATOR, str(node.directory), str(node.root / "jobs" / "job"), script]
    source = str(Path(__file__).parents[4])
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": source}) as orchestrator:
        assert await asyncio.to_thread(orchestrator.stdout.readline) == b"running\n"
        orchestrator.send_signal(signal.SIGKILL)
    (known,) = await node.client.connect(spawn=False)
    assert known.state == "running"
    go.path.write_text("go\n")
    assert (await node.exited("job")).exit_code == 42


async def test_end_while_nobody_listens_is_told_at_each_connect_until_acknowledged(running, new_signal):
    go = new_signal("go")
    await running.start("job", f"read line < {go.path}; exit 5")
    leader = (await running.reported("job", "running")).pid
    await running.client.close()
    assert not running.client.connected and running.losses == 0, "closing is not losing"
    go.path.write_text("go\n")
    await running.gone(leader)
    for _ in range(2):
        known = await running.client.connect(spawn=False)
        if [r.state for r in known] != ["exited"]:  # reaped, but not on disk yet
            await running.exited("job")
        await running.client.close()
    (report,) = await running.client.connect(spawn=False)
    assert (report.state, report.exit_code) == ("exited", 5)
    await running.client.ack([("job", 1)])
    await running.client.close()
    assert await running.client.connect(spawn=False) == []


async def test_end_survives_the_runner_until_acknowledged(running):
    await running.run("job", "exit 6")
    await running.kill_runner()
    (report,) = await running.client.connect()
    assert (report.state, report.exit_code, report.reason) == ("exited", 6, "exit")
    await running.client.ack([("job", 1)])
    await running.client.sample()  # the acknowledgement was read...
    await running.run("barrier", "true")  # ...and a later end is on disk, so it is too
    await running.kill_runner()
    assert [r.job for r in await running.client.connect()] == ["barrier"]


async def test_attempt_runs_once_however_often_it_is_started(running):
    spec = running.spec("job", "echo ran")
    await running.client.start([spec, spec])
    await running.client.start([spec])
    await running.exited("job")
    await running.client.start([spec])
    await running.until(lambda: sum(r.state == "exited" for r in running.history) >= 2)
    assert running.stream(spec) == b"ran\n"
    assert len({r.pid for r in running.history if r.pid}) == 1


async def test_acknowledged_attempt_is_not_run_again_even_by_the_next_runner(running):
    spec = running.spec("job", "echo ran")
    await running.client.start([spec])
    await running.exited("job")
    await running.client.ack([spec.key])
    await running.client.start([spec])
    await running.reported("job", "forgotten")
    await running.run("barrier", "true")
    await running.kill_runner()
    running.history.clear()
    await running.client.connect()
    await running.client.start([spec])
    await running.reported("job", "forgotten")
    assert running.stream(spec) == b"ran\n"


async def test_next_attempt_of_an_acknowledged_job_runs(running):
    await running.run("job", "exit 1")
    await running.client.ack([("job", 1)])
    assert (await running.run("job", "exit 2", attempt=2)).exit_code == 2


async def test_acknowledgement_of_what_still_runs_changes_nothing(running, new_signal):
    go = new_signal("go")
    await running.start("job", f"read line < {go.path}; exit 3")
    await running.reported("job", "running")
    await running.client.ack([("job", 1), ("nobody", 7)])
    await running.client.close()
    (known,) = await running.client.connect(spawn=False)
    assert known.state == "running"
    go.path.write_text("go\n")
    assert (await running.exited("job")).exit_code == 3


async def test_newer_client_displaces_the_older_one(running):
    newer = running.new_client()
    await newer.connect(spawn=False)
    await running.until(lambda: running.losses == 1)
    assert not running.client.connected
    assert "newer" in running.client.lost_reason
    with pytest.raises(RunnerUnavailable):
        await running.client.start([running.spec("job", "true")])
    await newer.start([running.spec("job", "true")])
    assert (await running.exited("job")).exit_code == 0


async def test_loss_is_told_once_and_connect_starts_a_new_runner(running):
    first = running.client.runner_pid
    await running.kill_runner()
    assert not running.client.connected
    await running.client.connect()
    assert running.client.connected and running.client.runner_pid != first
    assert running.losses == 1


async def test_connect_without_spawn_says_that_nobody_is_there(node):
    with pytest.raises(RunnerUnavailable, match="no runner answers"):
        await node.client.connect(spawn=False)


async def test_frozen_runner_is_unavailable_not_replaced(running):
    """A second runner over the same jobs would be worse than none."""
    pid = running.client.runner_pid
    await running.client.close()
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(RunnerUnavailable, match="did not answer within"):
            await running.client.connect(timeout=0.5)
    finally:
        os.kill(pid, signal.SIGCONT)
    await running.client.connect()
    assert running.client.runner_pid == pid


async def test_shutdown_is_refused_while_jobs_run_and_ends_an_idle_runner(running, new_signal):
    from p2p.runner.client import RunnerBusy

    go = new_signal("go")
    await running.start("job", f"read line < {go.path}")
    with pytest.raises(RunnerBusy, match="1 jobs"):
        await running.client.shutdown()
    go.path.write_text("go\n")
    await running.exited("job")
    pid = running.client.runner_pid
    await running.client.shutdown()
    await running.gone(pid)
    assert running.losses == 0 and not running.client.connected
    (known,) = await running.client.connect()
    assert (known.job, known.state) == ("job", "exited"), "the end was kept on disk"


async def test_shutdown_then_connect_at_once_starts_a_new_runner(running):
    for _ in range(3):
        pid = running.client.runner_pid
        await running.client.shutdown()
        await running.client.connect()
        assert running.client.runner_pid != pid


async def test_batch_larger_than_a_frame_is_split(running):
    """Forty jobs of 1 MB of environment each; the kernel takes 128 KB a string."""
    specs = []
    for index in range(40):
        spec = running.spec(f"job{index}", "true")
        spec.env.update({f"V{n}": "x" * 100_000 for n in range(10)})
        specs.append(spec)
    await running.client.start(specs)
    for spec in specs:
        assert (await running.exited(spec.job)).exit_code == 0


async def test_two_clients_that_start_a_runner_at_once_share_one(node):
    other = RunnerClient(node.directory, on_report=lambda reports: None, on_lost=lambda: None)
    node.clients.append(other)
    await asyncio.gather(node.client.connect(), other.connect())
    assert node.client.runner_pid == other.runner_pid
