"""What a job asked for is what it gets, seen from the outside: memory, and a job that lets itself be interrupted."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from config.settings import WorkerSettings
from coordination.placement import with_defaults
from p2p.workplace import memory_limit_mb
from tests.jobs import counting
from tests.nodes import NodeProcess, wait_until

HOG = "x = bytearray(int(__import__('sys').argv[1]) << 20); __import__('time').sleep(float(__import__('sys').argv[2]))"


def hog(mb: int, seconds: float, **requires: Any) -> dict[str, Any]:
    return {
        "command": ["python", "-c", HOG, str(mb), str(seconds)],
        "requires": {"cpus": 0.1, **requires},
        "max_attempts": 1,
    }


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    node = NodeProcess(tmp_path_factory.mktemp("limits"), ["--no-populate"])
    try:
        node.start()
        yield node
    finally:
        node.destroy()


@pytest.mark.parametrize(
    ("asked", "settings", "limit"),
    [
        (0, {}, 0),
        (100, {}, 100),
        (100, {"memory_headroom": 1.5}, 150),
        (1, {"memory_headroom": 1.1}, 2),
        (100, {"memory_policy": "warn"}, 100),
        (100, {"memory_policy": "off"}, 0),
        (0, {"memory_headroom": 2}, 0),
    ],
)
def test_the_limit_is_what_was_asked_for_with_its_headroom(asked: int, settings: dict[str, Any], limit: int) -> None:
    assert memory_limit_mb(with_defaults({"memory_mb": asked}), WorkerSettings(**settings)) == limit


def test_a_job_that_uses_more_than_it_asked_for_is_ended_with_that_reason(node: NodeProcess) -> None:
    record = node.wait_for(node.submit(**hog(200, 600, memory_mb=100)), "failed", "completed")
    assert (record["state"], record["reason"], record["exit_code"]) == ("failed", "memory_limit", -9)
    assert record["error"].startswith("killed: used more than its memory limit of 100 MB")


def test_a_job_that_asked_for_nothing_has_no_limit(node: NodeProcess) -> None:
    record = node.wait_for(node.submit(**hog(200, 1.5)), "failed", "completed")
    assert (record["state"], record["error"]) == ("completed", None)


def test_its_neighbour_is_left_alone_and_a_retry_is_one(node: NodeProcess) -> None:
    neighbour = node.submit(**hog(40, 3, memory_mb=100))
    job = node.submit(**{**hog(200, 600, memory_mb=100), "max_attempts": 2, "retry_backoff_seconds": 0})
    record = node.wait_for(job, "failed", "completed")
    assert (record["state"], record["attempt"], record["failed_attempts"]) == ("failed", 2, 2)
    assert [row["reason"] for row in record["history"] if row["state"] == "pending"][1:] == ["retry: memory_limit"]
    assert node.wait_for(neighbour, "failed", "completed")["state"] == "completed"


def test_a_warning_ends_nothing_and_stays_on_the_record(start_node: Callable[..., NodeProcess]) -> None:
    node = start_node("--no-populate", work={"memory_policy": "warn"}, queue={"heartbeat_seconds": 0.2})
    job = node.submit(**hog(200, 3, memory_mb=100))
    wait_until(lambda: f"job {job}, attempt 1 uses" in node.log_text)
    record = node.wait_for(job, "failed", "completed")
    assert (record["state"], record["exit_code"]) == ("completed", 0)
    assert "MB of memory, more than its limit" in record["error"]
    assert node.log_text.count(f"job {job}, attempt 1 uses") == 1


def test_without_a_policy_nothing_is_held(start_node: Callable[..., NodeProcess]) -> None:
    node = start_node("--no-populate", work={"memory_policy": "off"})
    record = node.wait_for(node.submit(**hog(200, 1.5, memory_mb=100)), "failed", "completed")
    assert (record["state"], record["error"]) == ("completed", None)


# -- a job that lets itself be interrupted -----------------------------------------------------------------------------


def count(ledger: Path, checkpoint: Path, steps: int, *flags: str, **more: Any) -> dict[str, Any]:
    command = [sys.executable, counting.__file__, str(steps), "--ledger", str(ledger), "--checkpoint", str(checkpoint)]
    return {"command": [*command, *flags], "requires": {"cpus": 0.1}, "max_attempts": 1, **more}


def test_an_interrupted_job_counts_on_in_its_next_attempt(node: NodeProcess, tmp_path: Path) -> None:
    ledger, checkpoint = tmp_path / "ledger", tmp_path / "checkpoint.json"
    job = node.submit(**count(ledger, checkpoint, 150))
    wait_until(lambda: ledger.exists() and len(ledger.read_text().splitlines()) >= 20)
    assert node.request("POST", f"/jobs/{job}/release", {"reason": "a better use"})[0] == 200
    record = node.wait_for(job, "completed", "failed")
    assert (record["state"], record["attempt"], record["failed_attempts"]) == ("completed", 2, 0)
    began = record["result"]["began_at"]
    assert record["result"] == {"steps": 150, "began_at": began} and began >= 20
    rows = [tuple(map(int, line.split())) for line in ledger.read_text().splitlines()]
    # The next attempt may begin before the one before it has seen its SIGTERM; none is lost.
    assert {step for step, _ in rows} == set(range(1, 151))
    assert json.loads(checkpoint.read_text())["step"] == began
    assert f"interrupted at {began}" in node.request("GET", f"/jobs/{job}/logs?attempt=1")[1]


def test_one_that_does_not_listen_is_killed_after_its_grace(node: NodeProcess, tmp_path: Path) -> None:
    job = node.submit(**count(tmp_path / "ledger", tmp_path / "checkpoint", 10_000, "--deaf", grace_seconds=0.5))
    wait_until(lambda: (tmp_path / "ledger").exists())
    began = time.monotonic()
    assert node.request("POST", f"/jobs/{job}/cancel", {})[0] == 200

    def still() -> bool:
        before = (tmp_path / "ledger").stat().st_size
        time.sleep(0.3)
        return (tmp_path / "ledger").stat().st_size == before

    wait_until(still)
    assert time.monotonic() - began < 15
    assert not (tmp_path / "checkpoint").exists()
