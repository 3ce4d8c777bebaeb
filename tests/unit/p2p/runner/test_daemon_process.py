"""The daemon as a process: what ps shows, what it holds, where it lives."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from p2p.runner.client import RunnerUnavailable
from p2p.runner.launch import FORBIDDEN_WORD, command_line, environment


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


async def test_pkill_of_the_orchestrator_spares_the_runner(node):
    node.directory = node.root / "p2p_orchestrator" / "data" / "runner"
    node.client = node.new_client()
    await node.client.connect()
    command = command_of(node.client.runner_pid)
    assert FORBIDDEN_WORD not in command and command.endswith("-m p2p.runner ")
    found = subprocess.run(["pgrep", "-f", FORBIDDEN_WORD], capture_output=True, text=True).stdout.split()
    assert str(node.client.runner_pid) not in found


async def test_pkill_spares_a_runner_of_an_interpreter_in_such_a_directory(node, monkeypatch):
    """A whole Python under that name: the runner's command line must not tell."""
    home = node.root / "p2p_orchestrator" / "python"
    (home / "bin").mkdir(parents=True)
    base = Path(os.path.realpath(sys._base_executable))
    shutil.copy2(base, home / "bin" / base.name)
    (home / "lib").symlink_to(base.parents[1] / "lib")
    monkeypatch.setattr(sys, "_base_executable", str(home / "bin" / base.name))
    await node.client.connect()
    assert FORBIDDEN_WORD in str(Path(f"/proc/{node.client.runner_pid}/exe").readlink())
    assert FORBIDDEN_WORD not in command_of(node.client.runner_pid)
    assert (await node.run("job", "exit 3")).exit_code == 3


def test_command_line_names_the_base_interpreter_not_the_environments():
    program, shown = command_line()
    assert program == shown[0] == os.path.realpath(sys._base_executable)
    assert shown[1:] == ["-S", "-P", "-m", "p2p.runner"]


def test_secrets_of_the_orchestrator_do_not_reach_the_runner(monkeypatch, tmp_path):
    monkeypatch.setenv("RINGRIFT_CLUSTER_AUTH_TOKEN", "secret")
    assert "secret" not in environment(tmp_path).values()


async def test_runner_holds_no_descriptor_of_the_orchestrator(node, tmp_path):
    held = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(held, True)
    try:
        await node.client.connect()
    finally:
        os.close(held)
    targets = [str(entry.readlink()) for entry in Path(f"/proc/{node.client.runner_pid}/fd").iterdir()]
    assert not [t for t in targets if t == str(tmp_path / "lock")]
    inside = [t for t in targets if t.startswith("/") and not t.startswith("/dev/")]
    assert all(t.startswith(str(node.directory)) for t in inside), inside


async def test_runner_is_a_daemon_of_its_own(running):
    pid = running.client.runner_pid
    assert os.getsid(pid) != os.getsid(0)
    assert int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) != os.getpid()
    assert Path(f"/proc/{pid}/comm").read_text() == "p2p-runner\n"
    for number in (signal.SIGHUP, signal.SIGINT):
        os.kill(pid, number)
    assert (await running.run("job", "true")).exit_code == 0


async def test_runner_is_small(running):
    for index in range(50):
        await running.start(f"job{index}", "/bin/true")
    for index in range(50):
        await running.exited(f"job{index}")
    status = Path(f"/proc/{running.client.runner_pid}/status").read_text()
    resident_kb = int(status.split("VmRSS:")[1].split()[0])
    assert resident_kb < 30_000


async def test_socket_is_for_its_user_only(running):
    assert stat.S_IMODE((running.directory / "runner.sock").stat().st_mode) == 0o600
    assert stat.S_IMODE(running.directory.stat().st_mode) == 0o700


async def test_path_longer_than_a_socket_address_works(node):
    node.directory = node.root.joinpath(*["a-long-directory-name"] * 10)
    assert len(str(node.directory)) > 200
    node.client = node.new_client()
    await node.client.connect()
    assert (await node.run("job", "exit 4")).exit_code == 4
    await node.client.close()
    await node.client.connect(spawn=False)


async def test_second_runner_for_a_directory_ends_quietly(running):
    program, arguments = command_line()
    env = environment(running.directory)
    done = subprocess.run(arguments, executable=program, env=env, stderr=subprocess.PIPE, text=True, timeout=20)
    assert done.returncode == 0
    assert "another runner serves" in done.stderr
    await running.client.close()
    await running.client.connect(spawn=False)


async def test_runner_that_cannot_start_says_why(node):
    (node.root / "runner").mkdir()
    (node.directory / "runner.db").mkdir()
    with pytest.raises(RunnerUnavailable, match=r"(?s)did not start: .*unable to open database file"):
        await node.client.connect()


async def test_stale_socket_of_a_killed_runner_is_replaced(running):
    await running.kill_runner()
    assert (running.directory / "runner.sock").exists()
    await running.client.connect()
    assert (await running.run("job", "true")).exit_code == 0


async def test_records_can_be_listed_from_a_shell(running):
    await running.run("job", "exit 3")
    argv = [sys.executable, "-m", "p2p.runner", "--list", str(running.directory)]
    source = Path(__file__).parents[4]
    listed = subprocess.run(argv, capture_output=True, text=True, cwd=source, check=True, timeout=20).stdout
    names, values = (line.split("\t") for line in listed.splitlines())
    record = dict(zip(names, values, strict=True))
    assert (record["job"], record["state"], record["exit_code"]) == ("job", "exited", "3")
    assert record["command"] == "/bin/sh -c exit 3"
