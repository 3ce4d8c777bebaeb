"""What becomes of an attempt: exit codes, signals, failures to start, and what the process finds around it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize("code", [0, 1, 3, 127, 255])
async def test_exit_code_is_reported(running, code):
    report = await running.run("job", f"exit {code}")
    assert (report.exit_code, report.signal, report.reason) == (code, None, "exit")
    assert (report.error is None) == (code == 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGRTMIN + 3])
async def test_signal_is_reported(running, number):
    report = await running.run("job", f"kill -{int(number)} $$")
    assert (report.exit_code, report.signal, report.reason) == (None, number, "exit")
    assert report.error is not None and report.error.startswith("killed by ")
    assert ("it used memory that it does not have" in report.error) == (number == signal.SIGSEGV)
    assert "OOM" not in report.error, "nobody knows who sent it, so nothing is said"


async def test_start_is_reported_before_the_end(running):
    report = await running.run("job", "true")
    assert [r.state for r in running.history] == ["running", "exited"]
    assert report.pid == running.history[0].pid
    assert report.started_ms <= report.ended_ms


async def test_error_has_the_last_lines_of_stderr_whatever_bytes_they_are(running):
    report = await running.run("job", r"seq 1000 >&2; printf 'caf\351\n' >&2; exit 3")
    assert report.error.startswith("exit code 3: 982\n983\n")
    assert report.error.endswith("1000\ncaf\ufffd")


async def test_error_of_one_endless_line_is_bounded(running):
    report = await running.run("job", "head -c 100000 /dev/zero | tr '\\0' x >&2; exit 1")
    assert 4_000 < len(report.error) < 4_200


async def test_usage_is_the_processes(running):
    burn = "x=bytearray(60_000_000)\nimport time\nwhile time.process_time() < 0.3: pass"
    report = await running.run("job", sys.executable, "-c", burn)
    assert report.exit_code == 0
    assert 0.25 < report.usage["user_seconds"] + report.usage["system_seconds"] < 3
    assert report.usage["max_rss_mb"] > 55


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"argv": ["no-such-program"]}, 127, "no such program in PATH"),
        ({"argv": ["/no/such/program"]}, 127, "No such file"),
        ({"argv": ["/etc/passwd"]}, 126, "Permission denied"),
        ({"argv": ["/tmp"]}, 126, "Permission denied"),
        ({"argv": ["/bin/true", "x" * 3_000_000]}, 126, "too long"),
        ({"argv": ["/bin/true", "a\0b"]}, 126, "null"),
        ({"env": {"A=B": "1"}}, 126, "environment"),
        ({"cwd": "/no/such/directory"}, 126, "cannot enter"),
        ({"cwd": "/etc/passwd"}, 126, "Not a directory"),
        ({"directory": "relative"}, 126, "absolute"),
        ({"directory": "/proc/no/such"}, 126, "cannot make the log files"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
async def test_failure_to_start_is_an_end_with_a_sentence(running, change, code, words):
    more = {key: value for key, value in change.items() if key != "argv"}
    report = await running.run("job", *change.get("argv", ["/bin/true"]), **more)
    assert (report.exit_code, report.reason, report.pid) == (code, "spawn_failed", None)
    assert words in report.error
    assert (await running.run("next", "true")).exit_code == 0, "the runner goes on"


async def test_script_without_interpreter_line_is_refused_with_advice(running):
    script = running.root / "script"
    script.write_text("echo hello\n")
    script.chmod(0o755)
    report = await running.run("job", str(script))
    assert (report.exit_code, report.reason) == (126, "spawn_failed")
    assert "#!/bin/sh" in report.error


async def test_process_sees_exactly_the_environment_it_was_given(running):
    odd = {"A": "", "B": "x=y\nz", "C": "caf\udce9"}  # the last: a byte that is not UTF-8
    spec = await running.start("job", "/usr/bin/env", "-0", env=odd)
    await running.exited("job")
    seen = dict(entry.split(b"=", 1) for entry in running.stream(spec).split(b"\0") if entry)
    assert seen == {b"A": b"", b"B": b"x=y\nz", b"C": b"caf\xe9"}


async def test_process_has_its_own_session_default_signals_and_no_descriptor_of_ours(running):
    probe = (
        "import os, signal\n"
        "print(os.getpid() == os.getsid(0) == os.getpgid(0), sorted(os.listdir('/proc/self/fd'), key=int)[:-1])\n"
        "status = dict(l.split(':', 1) for l in open('/proc/self/status'))\n"
        "print(status['SigBlk'].strip(), os.readlink('/proc/self/fd/0'))\n"
    )
    shell = await running.start("shell", "grep SigIgn /proc/self/status")
    spec = await running.start("job", sys.executable, "-I", "-c", probe)
    assert (await running.exited("job")).exit_code == 0
    await running.exited("shell")
    assert running.stream(spec).decode().splitlines() == ["True ['0', '1', '2']", f"{0:016x} /dev/null"]
    threads_own = (
        1 << 31 | 1 << 32
    )  # signals 32 and 33: glibc's posix_spawn ignores them, its threads install their own
    assert int(running.stream(shell).split()[1], 16) & ~threads_own == 0


async def test_process_stands_in_its_directory_unless_told_otherwise(running):
    inside = await running.start("inside", "/bin/pwd")
    elsewhere = await running.start("elsewhere", "/bin/pwd", cwd="/usr")
    await running.exited("inside")
    await running.exited("elsewhere")
    assert running.stream(inside).decode().strip() == inside.directory
    assert running.stream(elsewhere) == b"/usr\n"
    assert Path(f"/proc/{running.client.runner_pid}/cwd").readlink() == running.directory


async def test_process_inherits_the_umask_of_the_orchestrator(node):
    before = os.umask(0o027)
    try:
        await node.client.connect()
    finally:
        os.umask(before)
    spec = await node.start("job", "umask; touch file")
    await node.exited("job")
    assert node.stream(spec) == b"0027\n"
    assert all(path.stat().st_mode & 0o077 == 0 for path in node.directory.iterdir())


async def test_second_attempt_appends_to_logs_that_are_there(running):
    directory = str(running.root / "shared")
    for attempt in (1, 2):
        await running.run("job", "echo line", attempt=attempt, directory=directory)
    assert (Path(directory) / "stdout").read_bytes() == b"line\nline\n"


async def test_two_hundred_jobs_run_at_once_and_each_keeps_its_own_code(running, new_signal):
    """They wait for each other: all have started before one ends."""
    here, gate = new_signal("here"), new_signal("gate")
    script = f"echo x > {here.path}; read line < {gate.path}; exit $CODE"
    specs = []
    for index in range(200):
        spec = running.spec(f"job{index}", script)
        spec.env["CODE"] = str(index)
        specs.append(spec)
    await running.client.start(specs)
    for _ in specs:
        await here.line()
    assert len(await running.client.sample()) == 200
    gate.path.write_text("\n" * 200)
    for index in range(200):
        assert (await running.exited(f"job{index}")).exit_code == index


async def test_five_hundred_jobs_leave_no_descriptor_thread_or_zombie_behind(running):
    pid = running.client.runner_pid

    def held() -> tuple[int, int]:
        return len(list(Path(f"/proc/{pid}/fd").iterdir())), len(list(Path(f"/proc/{pid}/task").iterdir()))

    await running.run("warm", "true")
    await running.client.sample()
    before = held()
    specs = [running.spec(f"job{index}", "/bin/true") for index in range(500)]
    started = time.monotonic()
    await running.client.start(specs)
    for spec in specs:
        assert (await running.exited(spec.job)).exit_code == 0
    assert time.monotonic() - started < 10
    await running.client.ack([spec.key for spec in specs])
    await running.client.sample()
    assert held() == before
    assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""


async def test_sample_tells_signs_of_life(running, new_signal):
    ready = new_signal()
    burn = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done"  # in a child that lives on: the leader itself is idle
    child = f"({burn}; echo x > {ready.path}; exec sleep 1000)"
    script = f"printf 12345; printf 123 >&2; echo 1 > progress.json; {child} & wait"
    await running.start("job", script)
    await ready.line()
    (sample,) = await running.client.sample()
    assert (sample.job, sample.attempt) == ("job", 1)
    assert (sample.stdout_bytes, sample.stderr_bytes) == (5, 3)
    assert sample.cpu_seconds > 0.05 and sample.rss_mb > 0
    assert abs(sample.progress_mtime_ms / 1000 - time.time()) < 60
    await running.client.stop("job", 1, reason="cancelled", grace_seconds=1)
    await running.exited("job")
    assert await running.client.sample() == []


@pytest.mark.parametrize("escape", ["setsid ", "setsid setsid --fork "], ids=["own session", "orphan of its own"])
async def test_cpu_use_of_what_left_the_jobs_session_is_a_sign_of_life(running, new_signal, escape):
    """Also what it had used before it ended: the sum grows while anybody works."""
    ready, gate = new_signal(), new_signal("gate")
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    (running.root / "burn.py").write_text(
        burn + f"open('{ready.path}', 'w').write('x\\n'); open('{gate.path}').read(1)"
    )
    await running.start("job", f"{escape}{sys.executable} {running.root / 'burn.py'} & sleep 1000")
    await ready.line()
    (sample,) = await running.client.sample()
    assert sample.cpu_seconds >= 0.25
    assert sample.rss_mb > 5
    gate.path.write_text("x")
    async with asyncio.timeout(20):
        while len(await asyncio.to_thread(burners, running.root)):
            await asyncio.sleep(0.01)
    (later,) = await running.client.sample()
    assert later.cpu_seconds >= (
        0.25 if "fork" in escape else 0
    )  # a child's is its parent's, who has not waited for it
    assert later.rss_mb < sample.rss_mb
    await running.client.stop("job", 1, reason="cancelled", grace_seconds=1)
    await running.exited("job")


def burners(root: Path) -> list[int]:
    name = str(root / "burn.py").encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found += [int(entry.name)] if name in (entry / "cmdline").read_bytes().split(b"\0") else []
            except OSError:
                continue
    return found


async def test_jobs_go_on_while_the_runner_is_frozen(running):
    """The log files are the job's own: it never waits for the runner."""
    os.kill(running.client.runner_pid, signal.SIGSTOP)
    try:
        await running.start("job", "echo done")
    finally:
        os.kill(running.client.runner_pid, signal.SIGCONT)
    assert (await running.exited("job")).exit_code == 0
    await asyncio.sleep(0)
