"""Memory cgroups: where they may be made, and, where they may, that the kernel holds the limit."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2p.runner import groups
from p2p.runner.groups import Group, Groups, Unusable
from p2p.runner.kernel_log import KernelLog
from tests.nodes import ROOT

HOG = "x = bytearray(int(__import__('sys').argv[1]) << 20); print('full', flush=True); __import__('time').sleep(1000)"


def usable() -> str:
    """Why limits are not held by cgroups here; empty if they are."""
    try:
        Groups.find(Path("/p2p-test"), print).close()
    except Unusable as reason:
        return str(reason)
    return ""


WHY_NOT = usable()
needs_groups = pytest.mark.skipif(bool(WHY_NOT), reason=f"no memory cgroups here: {WHY_NOT}")


# -- where they may be made --------------------------------------------------------------------------------------------


def tree(root: Path, **files: str) -> Path:
    """A tree of plain folders that reads as cgroups do: the unit ``a/b`` and what is above it."""
    own = root / "a" / "b"
    own.mkdir(parents=True)
    for path in (root, root / "a", own):
        (path / "cgroup.controllers").write_text("cpu memory pids\n")
        if path != root:
            (path / "cgroup.type").write_text("domain\n")
            (path / "memory.max").write_text("max\n")
            (path / "cpu.max").write_text("max 100000\n")
    for name, text in files.items():
        (root / name.replace("__", "/").replace("_", ".")).write_text(text)
    return own


def test_the_nearest_delegated_cgroup_is_used(tmp_path, monkeypatch):
    own = tree(tmp_path)
    monkeypatch.setattr(groups, "_is_delegated", lambda path: path in (tmp_path, tmp_path / "a"))
    assert groups._parent(tmp_path, own) == tmp_path / "a"


def test_a_delegated_cgroup_is_told_by_its_mark(tmp_path):
    try:
        os.setxattr(tmp_path, "user.delegate", b"1")
    except OSError:
        pytest.skip("this file system has no extended attributes")
    assert groups._is_delegated(tmp_path)
    os.setxattr(tmp_path, "user.delegate", b"0")
    assert not groups._is_delegated(tmp_path)


@pytest.mark.parametrize(
    ("user", "files", "says"),
    [
        (0, {}, ""),
        (1000, {}, "not delegated to this user"),
        (0, {"a__memory_max": "1000000\n"}, "would escape .*/a/memory.max"),
        (0, {"a__b__cpu_max": "50000 100000\n"}, "would escape .*/a/b/cpu.max"),
        (0, {"cgroup_type": "domain\n"}, "not delegated to it"),
        (0, {"cgroup_controllers": "hugetlb\n", "a__b__cgroup_controllers": "hugetlb\n"}, "no memory controller"),
    ],
    ids=["root", "user", "memory-limit-above", "cpu-limit-here", "root-of-a-container", "memory-in-v1"],
)
def test_nothing_is_made_where_jobs_would_escape_or_others_manage(tmp_path, monkeypatch, user, files, says):
    own = tree(tmp_path, **files)
    monkeypatch.setattr(groups.os, "geteuid", lambda: user)
    if not says:
        assert groups._parent(tmp_path, own) == tmp_path
        return
    with pytest.raises(Unusable, match=says):
        groups._parent(tmp_path, own)


def test_events_tell_ones_own_limit_from_everything_else(tmp_path):
    for text, kills in (
        ("low 0\nhigh 0\nmax 9\noom 0\noom_kill 0\n", (0, False)),
        ("max 40\noom 1\noom_kill 3\noom_group_kill 1\n", (3, True)),
        ("max 0\noom 0\noom_kill 1\n", (1, False)),
    ):
        (tmp_path / "memory.events").write_text(text)
        assert Group(tmp_path).kills() == kills
    assert Group(tmp_path / "gone").kills() == (0, False)


async def test_why_limits_are_only_watched_is_told_once(running):
    for index in range(3):
        await running.run(f"job{index}", "true", memory_limit_mb=100)
    lines = [line for line in (running.directory / "runner.log").read_text().splitlines() if "memory limits" in line]
    assert len(lines) == 1
    assert (f"watched, not held by cgroups: {WHY_NOT}" if WHY_NOT else "held by cgroups below") in lines[0]


# -- any cgroup that can be written ------------------------------------------------------------------------------------


@pytest.fixture
def bare() -> Iterator[Path]:
    """A cgroup of version 2 without any limit."""
    try:
        mount, _ = groups._where()
        path = mount / f"p2p-test-{secrets.token_hex(4)}"
        path.mkdir()
    except (Unusable, OSError) as error:
        pytest.skip(f"no cgroup can be made: {error}")
    yield path
    with contextlib.suppress(OSError):
        Path(path / "cgroup.kill").write_text("1")
    for _ in range(100):
        with contextlib.suppress(OSError):
            path.rmdir()
            break
        time.sleep(0.02)


def test_a_process_is_moved_with_all_that_it_has_started(bare):
    script = "sh -c 'sleep 1000 & sleep 1000' & setsid sleep 1000 & echo ready; wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.2)  # the shells fork
        group = Group(bare)
        assert not group.holds
        group.enter(process.pid)
        assert group.holds
        assert len((bare / "cgroup.procs").read_text().split()) == 5
        assert not group.remove(), "somebody is in it"
        group.kill()
        assert process.wait(10) == -9
    for _ in range(200):
        if group.remove():
            break
        time.sleep(0.02)
    assert not bare.exists()


def test_moving_a_process_that_has_gone_is_nothing(bare):
    with subprocess.Popen(["true"]) as process:
        pass
    Group(bare).enter(process.pid)


# -- where the kernel holds the limit ----------------------------------------------------------------------------------


def base_of(running) -> Path:
    (found,) = re.findall(r"held by cgroups below (\S+)", (running.directory / "runner.log").read_text())
    return Path(found)


@needs_groups
async def test_the_kernel_ends_a_job_over_its_limit_and_it_is_told_as_that(running):
    report = await running.run("job", sys.executable, "-c", HOG, "300", memory_limit_mb=100)
    assert (report.reason, report.signal) == ("memory_limit", 9)
    assert report.error == "killed: used more than its memory limit of 100 MB"
    assert list(base_of(running).glob("job-*")) == []


@needs_groups
async def test_the_kernel_ends_all_of_a_job_at_once(running, new_signal):
    """Also what has left its session; and the leader, which is small, does not live on without it."""
    ready = new_signal()
    inner = running.root / "inner.py"
    inner.write_text(HOG)
    script = f"setsid sleep 1000 & echo x > {ready.path}; {sys.executable} {inner} 300; echo went on; sleep 1000"
    spec = await running.start("job", script, memory_limit_mb=100)
    await ready.line()
    report = await running.exited("job")
    assert (report.reason, report.signal) == ("memory_limit", 9)
    assert running.stream(spec) == b""


@needs_groups
async def test_a_job_within_its_limit_may_read_more_than_that(running):
    """Cached files are taken back before anybody is killed."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", running.root], capture_output=True, text=True, check=True).stdout
    if kind.strip() in ("tmpfs", "ramfs"):
        pytest.skip("files here are memory, not cached")
    script = "head -c 300000000 /dev/zero > data; cat data > /dev/null; cat data data | wc -c; rm data"
    spec = await running.start("job", script, memory_limit_mb=60)
    assert (await running.exited("job")).exit_code == 0
    assert running.stream(spec) == b"600000000\n"


@needs_groups
async def test_files_in_shared_memory_count(running):
    name = f"/dev/shm/p2p-test-{secrets.token_hex(4)}"
    try:
        report = await running.run("job", f"head -c 300000000 /dev/zero > {name}; sleep 1000", memory_limit_mb=100)
    finally:
        Path(name).unlink(missing_ok=True)
    assert report.reason == "memory_limit"


@needs_groups
def test_a_delegated_unit_is_emptied_into_a_leaf_and_used():
    """As under systemd with Delegate=yes: a cgroup that hands out memory must not hold processes itself."""
    mount, _ = groups._where()
    unit = mount / f"p2p-test-{secrets.token_hex(4)}"
    unit.mkdir()
    os.setxattr(unit, "trusted.delegate", b"1")
    script = (
        "import sys; from pathlib import Path; from p2p.runner.groups import Groups\n"
        "found = Groups.find(Path('/of/a/runner'), print); print(found.base)\n"
        "print(open('/proc/self/cgroup').read().strip().rpartition('::')[2])\n"
        "group = found.make('j', 1, 100); print(group.kills()); print(group.remove()); found.close()\n"
    )
    try:
        enter = f'echo $$ > {unit}/cgroup.procs; sleep 100 > /dev/null 2>&1 & exec {sys.executable} -c "$0"'
        done = subprocess.run(["sh", "-c", enter, script], capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        base, own, kills, removed = done.stdout.splitlines()
        assert (Path(base).parent, own) == (unit, f"/{unit.name}/node")
        assert (kills, removed) == ("Kills(killed=0, own=False)", "True")
        assert not Path(base).exists()
        assert len((unit / "node/cgroup.procs").read_text().split()) == 1, "what else the unit had is there too"
    finally:
        (unit / "cgroup.kill").write_text("1")
        for path in (unit / "node", unit):
            for _ in range(200):
                with contextlib.suppress(OSError):
                    path.rmdir()
                    break
                time.sleep(0.02)
    assert not unit.exists()


@needs_groups
async def test_hundred_jobs_leave_no_group_behind(running):
    for index in range(100):
        await running.start(f"job/{index}" if index % 2 else f"job{index}", "true", memory_limit_mb=100)
    for index in range(100):
        assert (await running.exited(f"job/{index}" if index % 2 else f"job{index}")).exit_code == 0
    base = base_of(running)
    for _ in range(300):
        if not list(base.glob("job-*")):
            break
        time.sleep(0.02)
    assert list(base.glob("job-*")) == []
    pid = running.client.runner_pid
    await running.client.shutdown()
    await running.gone(pid)
    assert not base.exists()


@needs_groups
async def test_groups_of_a_killed_runner_go_with_the_next_one(running, new_signal):
    ready = new_signal()
    await running.start("job", f"echo x > {ready.path}; sleep 1000", memory_limit_mb=100)
    await ready.line()
    base = base_of(running)
    await running.run("barrier", "true")
    await running.kill_runner()
    assert len(list(base.glob("job-*"))) == 1
    await running.connect()
    await running.exited("job")
    await running.run("next", "true", memory_limit_mb=100)
    for _ in range(300):
        if not list(base.glob("job-*")):
            break
        time.sleep(0.02)
    assert list(base.glob("job-*")) == []


@needs_groups
async def test_a_cancelled_job_is_told_as_cancelled(running, new_signal):
    ready = new_signal()
    await running.start("job", f"trap '' TERM; echo x > {ready.path}; while :; do sleep 1; done", memory_limit_mb=100)
    await ready.line()
    await running.client.stop("job", 1, reason="cancelled", grace_seconds=0.2)
    assert (await running.exited("job")).reason == "cancelled"


# -- killed by others --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A cgroup of 60 MB that is not the runner's, of whichever version."""
    name = f"p2p-test-{secrets.token_hex(4)}"
    for path, limit in (
        (Path("/sys/fs/cgroup/memory") / name, "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup") / name, "memory.max"),
    ):
        with contextlib.suppress(OSError):
            path.mkdir()
            try:
                (path / limit).write_text(str(60 << 20))
            except OSError:
                path.rmdir()
                continue
            yield path
            for _ in range(100):
                with contextlib.suppress(OSError):
                    path.rmdir()
                    return
                time.sleep(0.02)
            return
    pytest.skip("no cgroup with a memory limit can be made here")


async def test_the_kernels_word_on_its_oom_killer_is_passed_on(running, small_cgroup):
    if KernelLog.open() is None:
        pytest.skip("the kernel's log cannot be read here, or names other pids")
    script = f'echo $$ > {small_cgroup}/cgroup.procs; exec {sys.executable} -c "{HOG}" 300'
    report = await running.run("job", script)
    assert (report.reason, report.signal) == ("out_of_memory", 9)
    assert report.error == (
        "killed by SIGKILL (the kernel's OOM killer ended it: the memory cgroup it was in was full)"
    )  # fmt: skip
    # By hand is by hand, also for one that gets the same pid's place in the log.
    assert (await running.run("other", "kill -9 $$")).error == "killed by SIGKILL"
