"""Whose process is whose, what a job uses, what it uses too much, and what ended jobs left."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from p2p.gpu_jobs import Claim, CpuWork, excesses, identify, leftovers, ownership, utilization
from p2p.gpus import Gpu, Holder, Reading, Who

JOBS = Path("/data/n1/jobs")
A, B = ("a", 1), ("b", 1)


def claim(key: tuple[str, int] = A, *gpus: str, **changes: Any) -> Claim:
    name = f"{key[0]}.{key[1]}"
    told = {"memory_mb": 10_000, "share": 1.0, "pid": 100 if key == A else 200, "folder": JOBS / name, **changes}
    return Claim(key, gpus or ("G1",), **told)


def process(pid: int, memory_mb: int | None = 1_000, use: float | None = None, **who: Any) -> Holder:
    told = Who(**{"start": 5, "session": pid, "name": "python", **who})
    return Holder(pid, memory_mb, use, told)


def marked(job: str, attempt: int = 1, folder: Path = JOBS) -> dict[str, Any]:
    return {"job": job, "attempt": attempt, "directory": str(folder / f"{job}.{attempt}")}


def reading(*holders: Holder, use: float | None = None, **changes: Any) -> Reading:
    gpu = Gpu(uuid="G1", memory_mb=40_000, utilization=use, holders=holders)
    return Reading(gpus=(gpu, Gpu(uuid="G2", memory_mb=40_000, utilization=0.0)), **changes)


@pytest.mark.parametrize(
    ("holder", "whose"),
    [
        (process(7, **marked("a")), A),
        (process(7, session=100), A),
        (process(7, session=200, **marked("a")), A),
        (process(7, **marked("a", 2)), None),
        (process(7, **marked("a", folder=Path("/data/n2/jobs"))), None),
        (process(7), None),
        (Holder(7, 1_000), None),
    ],
    ids=["marked", "in the session", "marked, in another's session", "another attempt", "another node's", "a stranger",
         "not to be seen"],
)  # fmt: skip
def test_ownership(holder: Holder, whose: tuple[str, int] | None) -> None:
    assert ownership([claim(), claim(B)])(holder) == whose


@pytest.mark.parametrize(
    ("told", "use"),
    [
        (reading(use=80.0), 80.0),
        (reading(use=1.0), 1.0),
        (reading(use=None), None),
        (reading(process(7, use=60.0, **marked("a")), use=61.0), 60.0),
        (reading(process(7, use=60.0, **marked("b")), process(8, use=0.0, **marked("a")), use=61.0), 0.0),
        (reading(process(7, use=30.0, **marked("a")), process(8, use=30.0, session=100), use=61.0), 60.0),
        (reading(Holder(7, 1_000, 60.0), process(8, use=0.0, **marked("a")), use=61.0), 61.0),
        (reading(use=80.0, error="NVML has not answered"), None),
        (Reading(sampled=False), None),
        (Reading(), None),
        (Reading(gpus=(Gpu(uuid="G1", fault="NVML: GPU is lost"),)), 0.0),
    ],
    ids=["the device's", "idle", "not measured", "by process", "the neighbour works", "two processes of the job",
         "somebody works whom we cannot see", "NVML hangs", "nobody has looked", "no such GPU",
         "a lost GPU does nothing"],
)  # fmt: skip
def test_use_of_a_job(told: Reading, use: float | None) -> None:
    one = claim()
    assert utilization(one, told, ownership([one, claim(B)])) == use


def test_a_job_of_two_gpus_works_if_one_of_them_does() -> None:
    one = claim(A, "G1", "G2")
    assert utilization(one, reading(use=50.0), ownership([one])) == 50.0
    assert utilization(one, reading(use=None), ownership([one])) is None, "the other may be busy"


@pytest.mark.parametrize(
    ("claims", "used", "found"),
    [
        ([claim(share=0.5)], 10_001, 1),
        ([claim(share=0.5)], 10_000, 0),
        ([claim()], 20_000, 0),
        ([claim(), claim(B)], 20_000, 1),
        ([claim(memory_mb=0, share=0.5)], 20_000, 0),
        ([claim(), claim(B, "G2")], 20_000, 0),
    ],
    ids=["beyond its grant", "just its grant", "alone on the GPU", "beside another", "declared nothing", "apart"],
)
def test_memory_beyond_the_grant(claims: list[Claim], used: int, found: int) -> None:
    told = reading(process(7, used - 1_000, **marked("a")), process(8, 1_000, session=100), process(9, 15_000))
    assert [excess.key for excess in excesses(claims, told)] == [A] * found
    assert not excesses(claims, replace(told, error="NVML hangs")), "old figures accuse nobody"


def test_an_excess_says_how_much_and_of_what() -> None:
    (excess,) = excesses([claim(share=0.5)], reading(process(7, 12_000, **marked("a"))))
    assert str(excess).startswith("it used 12000 MB of GPU G1, and was granted 10000 MB")


def test_only_processes_of_ended_attempts_of_this_node_are_left_over() -> None:
    told = reading(
        process(1, **marked("a")),
        process(2, **marked("gone")),
        process(3, **marked("gone", folder=Path("/data/n2/jobs"))),
        process(4),
        process(5, **marked("starting")),
        Holder(6, 1_000),
        process(7, 0, **marked("gone")),
        process(8, session=100, **marked("gone")),
        process(9, **marked("a", 0)),
    )
    found = leftovers([claim()], [A, ("starting", 1)], told, JOBS)
    assert [(item.pid, item.job, item.attempt) for item in found] == [(2, "gone", 1), (9, "a", 0)]
    assert str(found[0]) == "process 2 (python) of gone, attempt 1, holds 1000 MB of GPU G1"


def test_a_process_is_known_by_its_mark_and_session() -> None:
    marks = {"P2P_JOB_ID": "j", "P2P_ATTEMPT": "3", "P2P_JOB_DIR": "/data/n1/jobs/j.3"}
    script = "print('up', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, **marks}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,
    ) as child:  # fmt: skip
        assert child.stdin and child.stdout
        child.stdout.readline()
        who = identify(child.pid)
        assert who is not None
        assert (who.session, who.job, who.attempt, who.directory) == (child.pid, "j", 3, "/data/n1/jobs/j.3")
        child.stdin.close()
        child.wait()
    assert identify(child.pid) is None
    assert identify(2_000_000_001) is None


@pytest.mark.parametrize(
    ("gpus", "cores", "grows"),
    [(1, 0.0, False), (1, 1.0, False), (1, 1.05, False), (1, 2.0, True), (8, 8.0, False), (8, 12.0, True)],
    ids=["sleeps", "spins", "spins, measured late", "a core beside it", "eight ranks spin", "loaders beside them"],
)
def test_waiting_for_a_gpu_burns_a_core_and_is_no_work(gpus: int, cores: float, grows: bool) -> None:
    work = CpuWork(gpus)
    counted = [work.add(cores * at, at) for at in (0.0, 5.0, 10.0, 15.0)]
    assert counted[0] == 0
    assert counted == sorted(counted)
    assert (counted[-1] >= 0.01 * 15) is grows, counted


def test_cpu_work_survives_a_count_that_falls() -> None:
    work = CpuWork(1)
    assert [work.add(seconds, at) for at, seconds in ((0, 100), (5, 120), (10, 30), (15, 50))][-1] == pytest.approx(
        2 * (20 - 5 * 1.1 - 0.1)
    )
