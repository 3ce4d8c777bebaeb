"""Bringing a job down: all of it, in time, and nobody else."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

IGNORE_TERM = "trap '' TERM; echo $$ > {path}; while :; do sleep 1000; done"


async def test_stop_ends_a_grandchild_that_ignores_sigterm(running, new_signal):
    stubborn = new_signal()
    script = f'(exec sh -c "{IGNORE_TERM.format(path=stubborn.path).replace("$", chr(92) + "$")}") & wait'
    await running.start("job", script)
    grandchild = int(await stubborn.line())
    await running.client.stop("job", 1, reason="cancelled", grace_seconds=0.3)
    report = await running.exited("job")
    assert (report.signal, report.reason, report.error) == (15, "cancelled", "cancelled: killed by SIGTERM")
    assert not _exists(grandchild), "told before all of it was gone"


async def test_leader_that_ignores_sigterm_is_killed_after_its_grace(running, new_signal):
    ready = new_signal()
    await running.start("job", IGNORE_TERM.format(path=ready.path))
    await ready.line()
    began = time.monotonic()
    await running.client.stop("job", 1, reason="stale", grace_seconds=0.5)
    report = await running.exited("job")
    assert (report.signal, report.reason) == (9, "stale")
    assert time.monotonic() - began >= 0.5


async def test_job_that_ends_well_in_its_grace_keeps_its_exit_code(running, new_signal):
    ready = new_signal()
    script = f"trap 'echo bye; exit 7' TERM; echo x > {ready.path}; while :; do sleep 0.01; done"
    spec = await running.start("job", script)
    await ready.line()
    await running.client.stop("job", 1, reason="cancelled", grace_seconds=30)
    report = await running.exited("job")
    assert (report.exit_code, report.signal, report.reason) == (7, None, "cancelled")
    assert running.stream(spec) == b"bye\n"


async def test_stopped_process_is_woken_to_take_its_sigterm(running, new_signal):
    ready = new_signal()
    await running.start("job", f"echo x > {ready.path}; kill -STOP $$; sleep 1000")
    await ready.line()
    await running.client.stop("job", 1, reason="cancelled", grace_seconds=1000)
    assert (await running.exited("job")).signal == 15


async def test_stop_twice_keeps_the_first_reason_and_the_shorter_grace(running, new_signal):
    ready = new_signal()
    await running.start("job", IGNORE_TERM.format(path=ready.path))
    await ready.line()
    await running.client.stop("job", 1, reason="cancelled", grace_seconds=1000)
    await running.client.stop("job", 1, reason="stale", grace_seconds=0)
    report = await running.exited("job")
    assert (report.signal, report.reason) == (9, "cancelled")


async def test_stop_right_behind_start_ends_it_whether_or_not_it_ran(running):
    await running.start("job", "sleep 1000")
    await running.client.stop("job", 1, reason="cancelled", grace_seconds=5)
    report = await running.exited("job")
    assert report.reason == "cancelled"


async def test_stop_of_an_unknown_attempt_is_nothing(running):
    await running.client.stop("nobody", 1, reason="cancelled", grace_seconds=5)
    assert (await running.run("job", "true")).exit_code == 0


async def test_timeout_is_sigterm_then_sigkill(running, new_signal):
    ready = new_signal()
    await running.start("job", IGNORE_TERM.format(path=ready.path), timeout_seconds=0.5, grace_seconds=0.2)
    await ready.line()
    report = await running.exited("job")
    assert (report.signal, report.reason, report.error) == (9, "timeout", "timeout after 0.5 s")
    assert report.ended_ms - report.started_ms >= 690


async def test_job_within_its_timeout_is_left_alone(running):
    assert (await running.run("job", "sleep 0.1", timeout_seconds=1000)).reason == "exit"


@pytest.mark.parametrize(
    "escape",
    ["", "setsid ", "env -i PATH=/usr/bin:/bin ", "set -m; "],
    ids=["same group", "own session", "no environment", "own group"],
)
async def test_what_a_finished_job_left_behind_is_ended(running, new_signal, escape):
    ready = new_signal()
    script = f"{escape}sh -c 'echo $$ > {ready.path}; exec sleep 1000' & read line < {running.root / 'go'}; exit 4"
    os.mkfifo(running.root / "go")
    await running.start("job", script)
    leftover = int(await ready.line())
    assert _exists(leftover)
    with (running.root / "go").open("w") as go:
        go.write("go\n")
    report = await running.exited("job")
    assert (report.exit_code, report.reason) == (4, "exit")
    assert not _exists(leftover)


async def test_leftover_that_ignores_sigterm_is_killed(running, new_signal):
    ready = new_signal()
    inner = IGNORE_TERM.format(path=ready.path)
    (running.root / "inner").write_text(inner)
    os.mkfifo(running.root / "go")
    script = f"sh {running.root / 'inner'} & read line < {running.root / 'go'}; exit 0"
    await running.start("job", script, grace_seconds=0.3)
    leftover = int(await ready.line())
    with (running.root / "go").open("w") as go:
        go.write("go\n")
    assert (await running.exited("job")).exit_code == 0
    assert not _exists(leftover)


async def test_one_jobs_end_does_not_touch_anothers_daemon(running, new_signal):
    """Both leave an adopted orphan; only the one whose leader ended is ended."""
    ready = new_signal()
    await running.start("stays", f"(setsid sh -c 'echo $$ > {ready.path}; exec sleep 1000' &); exec sleep 1000")
    daemon = int(await ready.line())
    assert (await running.run("ends", "(setsid sleep 1000 &); exit 0")).exit_code == 0
    assert _exists(daemon)
    await running.client.stop("stays", 1, reason="cancelled", grace_seconds=5)
    await running.exited("stays")
    assert not _exists(daemon)


async def test_sigterm_to_the_runner_ends_all_jobs_records_them_and_exits(running, new_signal):
    ready = new_signal()
    await running.start("job", f"echo $$ > {ready.path}; exec sleep 1000")
    leader, runner = int(await ready.line()), running.client.runner_pid
    os.kill(runner, signal.SIGTERM)
    await running.gone(runner)
    assert not _exists(leader)
    await running.until(lambda: running.losses == 1)
    (known,) = await running.client.connect()
    assert (known.state, known.reason, known.signal) == ("exited", "runner_stopped", 15)
    await asyncio.sleep(0)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
