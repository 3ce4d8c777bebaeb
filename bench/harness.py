"""What every benchmark shares: a real node on a free port and a folder of its own, and the printing of results."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 60.0
KEEP_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class BenchNode:
    """A running node. `pid` is the orchestrator's."""

    url: str
    port: int
    pid: int
    folder: Path

    def runner_pid(self) -> int | None:
        """The node's runner, found by its environment."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("P2P_RUNNER_DIR", "").startswith(str(self.folder)):
                    return process.pid
        return None


@contextlib.contextmanager
def node(*flags: str, settings: dict[str, Any] | None = None) -> Iterator[BenchNode]:
    """Starts a node that does not fill its own queue; ends it, its runner and its jobs afterwards."""
    # Not under /tmp: ext4 looks for free inodes near the parent folder, passes over those freed in the last minutes and
    # is ten times slower at it where thousands were. For the same reason a run leaves its folder for a later one to
    # delete: what it deletes itself, the next run pays for.
    (ROOT / "data").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=ROOT / "data"))
    atexit.register(_delete_old)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "cluster.yaml").write_text(yaml.safe_dump(settings or {}))
    command = [
        sys.executable,
        str(ROOT / "scripts/p2p_orchestrator.py"),
        *("--node-id", "bench", "--port", str(port), "--no-populate", "--config", str(folder / "cluster.yaml")),
        *("--data-dir", str(folder / "data"), "--log-dir", str(folder / "logs"), *flags),
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("P2P_", "RINGRIFT_"))}
    with (folder / "p2p.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env, cwd=folder)
    bench_node = BenchNode(f"http://127.0.0.1:{port}", port, process.pid, folder)
    try:
        _wait_ready(bench_node.url, process)
        yield bench_node
    finally:
        runner = bench_node.runner_pid()
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        if runner is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(runner, signal.SIGTERM)


def _delete_old() -> None:
    """Deletes what benchmarks of more than ten minutes ago have left."""
    for folder in (ROOT / "data").glob("bench-*"):
        if folder.stat().st_mtime < time.time() - KEEP_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        if process.poll() is not None:
            raise SystemExit(f"the node ended with {process.returncode}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            if answer.status == 200:
                return
        if time.monotonic() > deadline:
            raise SystemExit("the node did not get ready")
        time.sleep(0.05)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the sorted values lie (nearest rank)."""
    ranked = sorted(values)
    return ranked[min(int(share * len(ranked)), len(ranked) - 1)]


def machine() -> str:
    """One line about this machine."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    gib = psutil.virtual_memory().total / (1 << 30)
    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} cores ({model}), {gib:.0f} GiB, {system}"


def report(title: str, rows: Sequence[tuple[str, str]], line: dict[str, Any]) -> None:
    """Prints the table for people and one JSON line for programs."""
    print(f"\n{title}\n{machine()}\n")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    print()
    print(json.dumps(line))
