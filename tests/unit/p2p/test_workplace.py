"""What a job's files may be, and what its process sees."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from coordination.placement import Offer
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
