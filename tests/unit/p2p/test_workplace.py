"""What a job's files may be, and what its process sees."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from coordination.placement import Offer
from p2p.gpus import Gpu, Holder, Reading, Who
from p2p.workplace import Workplace, read_json

LIMIT = 10_000


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"score": 7}', {"score": 7}),
        ('{"loss": NaN, "best": -Infinity}', {"loss": None, "best": None}),
        ("[" * 60 + "]" * 60, json.loads("[" * 60 + "]" * 60)),
    ],
    ids=["an object", "what Python writes for not a number", "as deep as it may be"],
)
def test_a_jobs_file_is_read_as_json(tmp_path: Path, text: str, value: object) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    read = read_json(path, LIMIT)
    assert read is not None
    assert json.loads(read) == value


def test_no_file_is_no_result(tmp_path: Path) -> None:
    assert read_json(tmp_path / "result.json", LIMIT) is None


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: os.mkfifo(path), "is not a file"),
        (lambda path: path.mkdir(), "is not a file"),
        (lambda path: path.symlink_to("/etc/passwd"), "cannot be read"),
        (lambda path: path.write_text("{"), "is not JSON"),
        (lambda path: path.write_bytes(b"\xff"), "is not JSON"),
        (lambda path: path.write_text("1" * (LIMIT + 1)), "is larger than"),
        (lambda path: path.write_text("[" * 70 + "]" * 70), "levels deep"),
    ],
    ids=["pipe", "folder", "link", "half written", "bytes", "too large", "too deep"],
)
def test_what_a_job_leaves_never_holds_up_its_node(tmp_path: Path, make: object, why: str) -> None:
    path = tmp_path / "result.json"
    assert callable(make)
    make(path)
    with pytest.raises(ValueError, match=why):
        read_json(path, LIMIT)


def test_tidying_spares_what_runs_and_what_is_young_and_survives_company(tmp_path: Path) -> None:
    place = Workplace("n", Offer(node="n", cpus=1), tmp_path, "http://x", 4)
    running = place.add({"id": "runs", "attempt": 1, "requires": {}})
    old = time.time() - 1_000
    for name in (running.folder.name, "old.1", "older.1", "young.1"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / "old.1", (old, old))
    os.utime(tmp_path / "older.1", (old - 1, old - 1))
    os.utime(running.folder, (old, old))
    assert place.prune(keep=1, hours=24) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.1", "runs.1", "young.1"]
    assert place.prune(keep=0, hours=24) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs.1", "young.1"]


# -- GPUs as measured -------------------------------------------------------------------------------------------------


def reading(**changes: Any) -> Reading:
    return Reading(
        gpus=(Gpu(uuid="G1", memory_mb=40_000, reserved_mb=500, **changes), Gpu(uuid="G2", memory_mb=40_000))
    )


def place_of(tmp_path: Path, told: list[Reading]) -> Workplace:
    return Workplace("n", Offer(node="n", cpus=8), tmp_path, "http://x", 4, gpus=lambda: told[0])


def with_gpu(place: Workplace, job: str = "j", **requires: Any) -> None:
    asked = {"gpus": 1, "gpu_memory_mb": 16_000, "gpu_share": 0.5, **requires}
    place.add({"id": job, "attempt": 1, "requires": asked, "gpus": ["G1"]})


def free(place: Workplace) -> list[tuple[int, float]]:
    return [(gpu.memory_free_mb, gpu.share_free) for gpu in place.free().gpus]


def test_what_is_free_of_a_gpu_is_measured(tmp_path: Path) -> None:
    stranger = Holder(7, 10_000, None, Who(1, 7))
    told = [reading(used_mb=10_000, holders=(stranger,))]
    place = place_of(tmp_path, told)
    assert free(place) == [(29_500, 1.0), (40_000, 1.0)]
    assert [gpu.memory_free_mb for gpu in place.total.gpus] == [39_500, 40_000], "with nobody there"
    with_gpu(place)
    assert free(place) == [(13_500, 0.5), (40_000, 1.0)]
    own = Holder(8, 12_000, None, Who(1, 8, "python", "j", 1, str(place.attempt_folder("j", 1))))
    told[0] = reading(used_mb=22_000, holders=(stranger, own))
    assert free(place)[0] == (13_500, 0.5), "what the job uses is what it was granted"
    place.jobs["j", 1].ended = True
    assert free(place)[0] == (17_500, 1.0), "until the driver has it back it is not free"


def test_of_an_unhealthy_gpu_nothing_is_free_whoever_runs_there(tmp_path: Path) -> None:
    place = place_of(tmp_path, [reading(why="Xid 79: it has fallen off the bus")])
    assert free(place) == [(0, 0.0), (40_000, 1.0)]
    with_gpu(place)
    assert free(place) == [(0, 0.0), (40_000, 1.0)]
    assert [gpu.healthy for gpu in place.free().gpus] == [False, True]


def test_gpus_that_appear_while_the_node_runs_are_offered(tmp_path: Path) -> None:
    told = [Reading(error="NVML has not answered for over 10 s")]
    place = place_of(tmp_path, told)
    assert place.free().gpus == ()
    told[0] = reading()
    assert len(place.free().gpus) == len(place.total.gpus) == 2
