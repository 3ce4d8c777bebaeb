"""How far can a job get beyond its limits before the runner has seen it, and what does looking cost?

*Log cap*: ``yes`` under a cap of 16 MB for a while; what its folder takes of the disk, looked at every millisecond.
*Memory limit*: a job that grows as fast as Python lets it, under a watched limit of 1,000 MB; how far its resident set
was above that when it was killed. *Quiet*: CPU time of a runner whose jobs sleep, with and without a limit.

Usage: python -m bench.limits [--seconds S] [--runs N] [--folder DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

from bench.harness import quantile, report
from p2p.runner.client import AttemptReport, RunnerClient, StartSpec
from p2p.runner.processes import read_stat

CAP_MB, LIMIT_MB, QUIET_JOBS = 16, 1_000, 20
GROW = f"x = [bytearray(b'x' * (1 << 20)) for _ in range({6 * LIMIT_MB})]; import time; time.sleep(60)"


class Runner:
    """A runner of its own in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ended: dict[str, AttemptReport] = {}
        self._news = asyncio.Event()
        self.client = RunnerClient(root / "runner", on_report=self._told, on_lost=lambda: None)

    def _told(self, reports: list[AttemptReport]) -> None:
        self.ended |= {report.job: report for report in reports if report.state == "exited"}
        self._news.set()

    async def start(self, job: str, *argv: str, memory_limit_mb: int = 0) -> Path:
        folder = self.root / job
        spec = StartSpec(
            job=job, attempt=1, argv=list(argv), env={"PATH": os.defpath}, directory=str(folder),
            log_cap_bytes=CAP_MB << 20, memory_limit_mb=memory_limit_mb, memory_group=False, grace_seconds=1,
        )  # fmt: skip
        await self.client.start([spec])
        return folder

    async def stop(self, job: str) -> None:
        await self.client.stop(job, 1, reason="measured", grace_seconds=1)
        await self.end(job)

    async def end(self, job: str) -> AttemptReport:
        while job not in self.ended:
            self._news.clear()
            await self._news.wait()
        return self.ended[job]

    def cpu_seconds(self) -> float:
        stat = read_stat(self.client.runner_pid or 0)
        return stat.cpu_seconds if stat else 0.0


@contextlib.asynccontextmanager
async def runner(folder: Path | None) -> AsyncIterator[Runner]:
    root = Path(tempfile.mkdtemp(dir=folder))
    made = Runner(root)
    await made.client.connect()
    try:
        yield made
    finally:
        await made.client.ack([(job, 1) for job in made.ended])
        await made.client.shutdown()
        await asyncio.to_thread(shutil.rmtree, root)


def taken_mb(folder: Path, stop: threading.Event, seen: list[float]) -> None:
    while not stop.is_set():
        with contextlib.suppress(FileNotFoundError):
            seen.append(sum(entry.stat().st_blocks for entry in os.scandir(folder)) / 2048)
        time.sleep(0.001)


async def flood(folder: Path | None, seconds: float) -> tuple[float, list[float]]:
    """(MB/s that ``yes`` wrote, MB on disk at each look)."""
    seen: list[float] = []
    stop = threading.Event()
    async with runner(folder) as made:
        watcher = threading.Thread(target=taken_mb, args=(made.root / "yes", stop, seen))
        watcher.start()
        await made.start("yes", "/usr/bin/yes")
        await asyncio.sleep(seconds)
        (sample,) = await made.client.sample()
        await made.stop("yes")
        stop.set()
        watcher.join()
    return sample.stdout_bytes / seconds / 1e6, seen


async def growth(folder: Path | None, runs: int) -> list[float]:
    """MB above the limit, for each run."""
    over = []
    async with runner(folder) as made:
        for run in range(runs):
            await made.start(f"grow{run}", sys.executable, "-c", GROW, memory_limit_mb=LIMIT_MB)
            ended = await made.end(f"grow{run}")
            assert ended.reason == "memory_limit", ended
            over.append(ended.usage["max_rss_mb"] - LIMIT_MB)
    return over


async def quiet(folder: Path | None, seconds: float, limit_mb: int) -> float:
    """Share of a core."""
    async with runner(folder) as made:
        for job in range(QUIET_JOBS):
            await made.start(f"quiet{job}", "/bin/sleep", "1000", memory_limit_mb=limit_mb)
        await asyncio.sleep(1)
        before = made.cpu_seconds()
        await asyncio.sleep(seconds)
        used = made.cpu_seconds() - before
        for job in range(QUIET_JOBS):
            await made.stop(f"quiet{job}")
    return used / seconds


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    flags.add_argument("--seconds", type=float, default=10.0)
    flags.add_argument("--runs", type=int, default=8)
    flags.add_argument("--folder", type=Path, help="on the file system that is asked about")
    asked = flags.parse_args()
    rate, disk = asyncio.run(flood(asked.folder, asked.seconds))
    over = asyncio.run(growth(asked.folder, asked.runs))
    shares = [asyncio.run(quiet(asked.folder, asked.seconds, limit)) for limit in (0, LIMIT_MB)]
    report(
        "Limits that hold",
        [
            (f"yes at {rate:,.0f} MB/s, cap {CAP_MB} MB: on disk, median", f"{quantile(disk, 0.5):.0f} MB"),
            ("the same, p99", f"{quantile(disk, 0.99):.0f} MB"),
            ("the same, highest", f"{max(disk):.0f} MB"),
            (f"memory above a watched limit of {LIMIT_MB} MB, median", f"{quantile(over, 0.5):.0f} MB"),
            ("the same, highest", f"{max(over):.0f} MB of {len(over)} runs"),
            (f"{QUIET_JOBS} quiet jobs, of a core", f"{shares[0]:.1%}; with memory limits {shares[1]:.1%}"),
        ],
        {
            "bench": "limits",
            "log_mb_p99": round(quantile(disk, 0.99), 1),
            "log_mb_highest": round(max(disk), 1),
            "memory_over_mb_median": round(quantile(over, 0.5), 1),
            "memory_over_mb_highest": round(max(over), 1),
            "quiet_share": round(shares[0], 4),
            "quiet_share_limited": round(shares[1], 4),
        },
    )


if __name__ == "__main__":
    main()
