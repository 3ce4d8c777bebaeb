"""Stopping, restarting over a predecessor, and a disk that fills: the process ends when and as it should."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.crashes import UNKNOWN
from tests.nodes import START_SECONDS, NodeProcess, wait_until

SMALL = {"cpus": 0.1}


def successor(node: NodeProcess, **settings: object) -> NodeProcess:
    """Another process for the same data directory and port, started but not waited for."""
    other = NodeProcess(node.folder, node.flags, {**node.settings, **settings})
    other.port = node.port
    return other


# -- over a predecessor ----------------------------------------------------------------------------------------------


def test_a_restart_waits_for_its_predecessor_says_so_and_takes_over(node: NodeProcess) -> None:
    job = node.submit(command=["sh", "-c", "exit 0"])
    node.wait_for(job, "completed")
    assert node.process is not None
    other = successor(node)
    other.start(wait=False)
    assert other.process is not None
    wait_until(lambda: "waiting for the data directory" in other.log_text)
    assert f"node process {node.process.pid}" in other.log_text
    assert other.process.poll() is None
    assert node.job(job)["state"] == "completed"
    node.kill()
    try:
        wait_until(lambda: " listens on " in other.log_text.split("waiting for")[-1], seconds=START_SECONDS)
        other.wait_ready()
        assert other.job(job)["state"] == "completed"
    finally:
        other.kill()


def test_a_restart_gives_up_on_a_predecessor_that_stays(node: NodeProcess) -> None:
    other = successor(node, start_wait_seconds=1)
    began = time.monotonic()
    other.start(wait=False)
    assert other.process is not None
    assert other.process.wait(START_SECONDS) == 1
    assert time.monotonic() - began >= 1
    assert "the data directory is still in use after 1 s" in other.log_text
    assert "Traceback" not in other.log_text
    assert node.request("GET", "/ready")[0] == 200


def test_a_taken_port_is_told_with_what_to_do(start_node: Callable[..., NodeProcess]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        node = start_node("--no-populate", start_wait_seconds=0)
        node.kill(signal.SIGTERM)
        node.port = taken.getsockname()[1]
        node.start(wait=False)
        assert node.process is not None
        assert node.process.wait(START_SECONDS) == 1
    assert f"port {node.port} is still in use" in node.log_text
    assert "Traceback" not in node.log_text


def test_a_start_that_waits_can_be_told_to_stop(node: NodeProcess) -> None:
    other = successor(node)
    other.start(wait=False)
    assert other.process is not None
    wait_until(lambda: "waiting for the data directory" in other.log_text)
    began = time.monotonic()
    assert other.kill(signal.SIGTERM) == 0
    assert time.monotonic() - began < 3
    assert node.request("GET", "/ready")[0] == 200


# -- stopping --------------------------------------------------------------------------------------------------------


def hold_open(node: NodeProcess, request: bytes) -> socket.socket:
    """A connection whose answer has begun, or is awaited."""
    connection = socket.create_connection(("127.0.0.1", node.port), timeout=20)
    connection.sendall(request)
    return connection


def head(method: str, path: str, body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    return ("\r\n".join([*lines, f"Content-Length: {len(body)}"]) + "\r\n\r\n").encode() + body


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_takes_less_than_3_s_whoever_is_connected_and_jobs_run_on(node: NodeProcess, number: int) -> None:
    gate = node.folder / "gate"
    script = f'echo begun; while [ ! -e "{gate}" ]; do sleep 0.05; done; exit 5'
    job = node.submit(command=["sh", "-c", script], max_attempts=1, requires=SMALL)
    node.wait_for(job, "running")
    wait_until(lambda: node.request("GET", f"/jobs/{job}/logs")[1])
    held = [
        hold_open(node, head("GET", "/events")),
        hold_open(node, head("GET", "/events?after=0")),
        hold_open(node, head("GET", f"/jobs/{job}/logs?follow=1")),
    ]
    for connection in held:
        assert connection.recv(200).startswith(b"HTTP/1.1 200")
    claim = b'{"worker": "far", "resources": {"cpus": 0.01}, "max_jobs": 1, "wait_seconds": 30}'
    held += [hold_open(node, head("POST", "/worker/claim", claim.replace(b"far", b"far%d" % n))) for n in range(5)]
    held += [hold_open(node, b"GET /status HTTP/1.1\r\nHost: 127.0")]  # a request that never ends
    held += [hold_open(node, b"")]
    wait_until(lambda: len(node.request("GET", "/work_assignment_status")[1]) >= 5)
    began = time.monotonic()
    assert node.kill(number) == 0
    assert time.monotonic() - began < 3
    for connection in held:
        connection.close()
    assert "Traceback" not in node.log_text
    gate.touch()
    node.start()
    record = node.wait_for(job, "failed")
    assert (record["exit_code"], record["attempt"]) == (5, 1)


def test_requests_during_a_stop_are_answered_or_refused_never_half_done(node: NodeProcess) -> None:
    acked: list[str] = []
    going = threading.Event()

    def client() -> None:
        while True:
            try:
                status, answer = node.request("POST", "/jobs", {"command": ["true"], "requires": {"cpus": 900}})
            except UNKNOWN:
                return
            if status == 201:
                acked.append(answer["id"])
                going.set()
            else:
                assert status in (503, 504), answer

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert going.wait(20)
    assert node.kill(signal.SIGTERM) == 0
    for thread in threads:
        thread.join(30)
    node.start()
    for job in acked:
        assert node.job(job)["state"] == "pending"


def test_twenty_clean_restarts_in_a_row_leave_nothing_behind(node: NodeProcess) -> None:
    jobs = []
    for _ in range(20):
        jobs.append(node.submit(command=["true"], requires={"cpus": 900}))
        assert node.kill(signal.SIGTERM) == 0
        node.start()
    assert [node.job(job)["state"] for job in jobs] == ["pending"] * 20
    assert node.request("GET", "/status")[1]["term"] == 21
    assert "Traceback" not in node.log_text


# -- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "n1" / "data"
    folder.mkdir(parents=True)
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("needs root to mount a small file system")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"cannot mount a small file system: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def small_node(tmp_path: Path, min_free_disk_mb: int) -> NodeProcess:
    queue = {"min_free_disk_mb": min_free_disk_mb}
    return NodeProcess(
        tmp_path / "n1", ["--no-populate", "--no-worker"], {"queue": queue, "health": {"interval_seconds": 0.2}}
    )


def test_below_the_limit_of_free_disk_submits_get_507_and_other_work_goes_on(small_disk: Path, tmp_path: Path) -> None:
    node = small_node(tmp_path, min_free_disk_mb=3)
    try:
        node.start()
        job = node.submit(command=["true"])
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(3 << 20))
        _, answer = wait_until(lambda: (got := node.request("POST", "/jobs", {"command": ["true"]}))[0] == 507 and got)
        assert "disk" in answer["detail"]
        assert node.request("POST", f"/jobs/{job}/cancel", {})[0] == 200
        ballast.unlink()
        wait_until(lambda: node.request("POST", "/jobs", {"command": ["true"]})[0] == 201)
    finally:
        node.destroy()


def test_a_full_disk_ends_the_node_with_70_rather_than_acknowledging_what_is_not_written(
    small_disk: Path, tmp_path: Path
) -> None:
    node = small_node(tmp_path, min_free_disk_mb=0)
    acked: list[str] = []
    try:
        node.start()
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(3 << 20))
        with contextlib.suppress(*UNKNOWN):
            while True:
                jobs = [{"command": ["true"], "params": {"filler": "x" * 9_000}}] * 10
                status, answer = node.request("POST", "/jobs", {"jobs": jobs})
                if status in (504, 507):  # not known, or refused: nothing is acknowledged any more
                    break
                assert status == 201, answer
                acked.extend(answer["ids"])
                assert len(acked) < 5_000, "the disk is not full"
        process = node.process
        assert process is not None
        # Its queue's file cannot be written: it ends. Its journal cannot be written first: it leads no more.
        wait_until(lambda: process.poll() is not None or node.status().get("not_ready"))
        assert process.poll() in (None, 70)
        if node.running:
            node.kill()
        assert acked
        assert exit_code_without_space(node) in (1, 70)
        ballast.unlink()
        node.start()
        for job in acked:
            assert node.job(job)["state"] == "pending"
        node.submit(command=["true"])
    finally:
        node.destroy()


def exit_code_without_space(node: NodeProcess) -> int:
    """Of a start on the disk that is still full: it cannot write that it began a term."""
    node.start(wait=False)
    assert node.process is not None
    return node.process.wait(START_SECONDS)
