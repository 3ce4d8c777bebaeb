"""Limits of memory that are watched: what counts, what does not, and what is said of it."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from p2p.runner import memory, processes
from p2p.runner.memory import used_mb
from p2p.runner.protocol import StartSpec

MB = 1 << 20
HOG = "import sys, time; x = bytearray(int(sys.argv[1]) << 20); print('full', flush=True); time.sleep(1000)"
# Grows by a megabyte at a time, as fast as it can, to the end that argv names.
GROW = (
    "import sys\nx = [bytes(1 << 20) and bytearray(b'x' * (1 << 20)) for _ in range(int(sys.argv[1]))]\nprint('done')"
)
WATCHED = {"memory_group": False}


def hog(mb: int) -> tuple[str, ...]:
    return (sys.executable, "-c", HOG, str(mb))


async def test_a_job_over_its_limit_is_killed_and_told_why(running):
    report = await running.run("job", *hog(200), memory_limit_mb=100, **WATCHED)
    assert (report.reason, report.signal, report.exit_code) == ("memory_limit", 9, None)
    assert re.fullmatch(r"killed: used more than its memory limit of 100 MB \(it had \d{3} MB\)", report.error)
    assert 100 < report.usage["over_memory_mb"] < 260


async def test_a_job_within_its_limit_is_left_alone(running):
    report = await running.run("job", sys.executable, "-c", GROW, "60", memory_limit_mb=200, **WATCHED)
    assert (report.reason, report.exit_code, report.error) == ("exit", 0, None)
    assert "over_memory_mb" not in report.usage


async def test_without_a_limit_nothing_is_watched(running):
    assert (await running.run("job", sys.executable, "-c", GROW, "300", **WATCHED)).exit_code == 0


async def test_a_warning_ends_nothing_and_is_in_the_report(running):
    script = "import time; x = bytearray(200 << 20); time.sleep(2)"
    report = await running.run("job", sys.executable, "-c", script, memory_limit_mb=100, memory_kill=False)
    assert (report.reason, report.exit_code, report.error) == ("exit", 0, None)
    assert 200 <= report.usage["over_memory_mb"] < 260
    assert "more than its memory limit of 100 MB" in (running.directory / "runner.log").read_text()


@pytest.mark.parametrize("escape", ["", "setsid ", "env -i ", "setsid setsid --fork "])
async def test_all_processes_of_a_job_count_together_wherever_they_have_gone(running, new_signal, escape):
    """Three of 60 MB are above a limit of 150, none of them alone."""
    here = new_signal()
    child = f'{sys.executable} -c \'import time; x = bytearray(60 << 20); open("{here.path}", "w").write("x\\n"); '
    script = f"for n in 1 2 3; do {escape}{child}time.sleep(1000)' & done; wait; sleep 1000"
    await running.start("job", script, memory_limit_mb=150, **WATCHED)
    report = await running.exited("job")
    assert report.reason == "memory_limit"
    assert 150 < report.usage["over_memory_mb"] < 300


async def test_an_adopted_orphan_counts(running, new_signal):
    """Its parent is gone, and its session is its own."""
    inner = running.root / "inner.py"
    inner.write_text(HOG)
    script = f"(setsid {sys.executable} {inner} 200 &) ; sleep 1000"
    report = await running.run("job", script, memory_limit_mb=150, **WATCHED)
    assert report.reason == "memory_limit"


async def test_what_forked_workers_share_counts_once(running):
    """The workers of a data loader have all of their parent's memory, and none of their own."""
    script = (
        "import os, time\nx = bytearray(100 << 20)\nchildren = [os.fork() for _ in range(4) if os.getpid() == LEADER]\n"
    ).replace("LEADER", "L")
    script = "import os\nL = os.getpid()\n" + script + "time.sleep(2)\n"
    report = await running.run("job", sys.executable, "-c", script, memory_limit_mb=180, **WATCHED)
    assert (report.reason, report.exit_code) == ("exit", 0), report.error


async def test_a_mapped_file_does_not_count(running):
    """The kernel takes its pages back when it needs them."""
    script = (
        "import mmap, time\n"
        "with open('data', 'wb') as f:\n for _ in range(300): f.write(b'x' * (1 << 20))\n"
        "f = open('data', 'rb')\n"
        "m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n"
        "print(sum(m[n] for n in range(0, len(m), 4096)), flush=True)\n"
        "time.sleep(2)\n"
    )
    report = await running.run("job", sys.executable, "-c", script, memory_limit_mb=100, **WATCHED)
    assert (report.reason, report.exit_code) == ("exit", 0), report.error
    (Path(running.root) / "jobs/job/1/data").unlink()


async def test_shared_memory_counts(running):
    script = "import mmap, time; m = mmap.mmap(-1, 200 << 20); m.write(b'x' * (200 << 20)); time.sleep(1000)"
    report = await running.run("job", sys.executable, "-c", script, memory_limit_mb=100, **WATCHED)
    assert report.reason == "memory_limit"


async def test_a_job_that_ignores_sigterm_has_no_time_to(running):
    script = (
        "import signal, time; signal.signal(15, lambda *_: print('bye')); x = bytearray(200 << 20); time.sleep(1000)"
    )
    report = await running.run("job", sys.executable, "-c", script, memory_limit_mb=100, grace_seconds=1000, **WATCHED)
    assert (report.reason, report.signal) == ("memory_limit", 9)


async def test_one_that_is_being_stopped_is_killed_all_the_same_and_keeps_the_first_reason(running, new_signal):
    ready = new_signal()
    script = (
        "import signal, time\n"
        "def more(*_):\n global x\n x = bytearray(200 << 20)\n"
        f"signal.signal(15, more)\nopen('{ready.path}', 'w').write('x\\n')\n"
        "while True: time.sleep(0.01)\n"
    )
    await running.start("job", sys.executable, "-c", script, memory_limit_mb=100, **WATCHED)
    await ready.line()
    await running.client.stop("job", 1, reason="cancelled", grace_seconds=1000)
    report = await running.exited("job")
    assert (report.reason, report.signal) == ("cancelled", 9)


async def test_many_jobs_are_held_to_their_own_limits(running):
    for index in range(8):
        await running.start(f"job{index}", *hog(80 if index % 2 else 20), memory_limit_mb=60, **WATCHED)
    for index in (1, 3, 5, 7):
        assert (await running.exited(f"job{index}")).reason == "memory_limit"
    await asyncio.sleep(1)
    assert [r.job for r in running.history if r.state == "exited" and int(r.job[3:]) % 2 == 0] == []


async def test_a_fast_grower_is_met_before_it_is_far_beyond(running):
    """It is looked at sooner the faster it grows."""
    report = await running.run("job", sys.executable, "-c", GROW, "8000", memory_limit_mb=300, **WATCHED)
    assert report.reason == "memory_limit"
    assert report.usage["over_memory_mb"] < 3_000


def test_what_cannot_be_read_counts_as_what_is_resident(monkeypatch):
    stat = processes.read_stat(os.getpid())
    assert used_mb([stat], 1.0) < stat.rss_mb + 1
    monkeypatch.setattr(memory, "_sum_mb", lambda path, names: None)
    assert used_mb([stat], 1.0) == stat.rss_mb
    assert used_mb([stat], stat.rss_mb + 1) == stat.rss_mb


def test_a_process_that_has_gone_counts_nothing():
    stat = processes.read_stat(os.getpid())._replace(pid=2**22 - 1, rss_mb=1e6)
    assert used_mb([stat], 1.0) == 0.0


def test_an_older_client_is_understood():
    wire = StartSpec(job="j", attempt=1, argv=["true"], env={}, directory="/tmp/x").to_wire()
    for name in ("memory_limit_mb", "memory_kill", "memory_group"):
        del wire[name]
    spec = StartSpec.from_wire(wire)
    assert (spec.memory_limit_mb, spec.memory_kill) == (0, True)
