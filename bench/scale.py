"""Does a claim stay cheap, and the node small, from ten to a million pending jobs?

Memory is the resident set of the orchestrator, and of its runner beside it, idle and with the queue full. Claims are
of one job each over HTTP, on a node with nothing else to do; every claimed job is completed outside the measured time.

Usage: python -m bench.scale [--pending N] [--claims N]
"""

from __future__ import annotations

import argparse
import http.client
import json
import time
from typing import Any

import psutil

from bench.harness import node, quantile, report

BATCH = 10_000
SHAPES = 20


class Client:
    """One kept connection."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def post(self, path: str, body: Any) -> Any:
        self._connection.request("POST", path, body=json.dumps(body), headers={"Content-Type": "application/json"})
        response = self._connection.getresponse()
        told = json.loads(response.read())
        if response.status >= 300:
            raise SystemExit(f"{path}: {response.status} {told}")
        return told


def fill(client: Client, jobs: int) -> float:
    """Submits that many jobs of twenty shapes and mixed priorities; jobs a second."""
    began = time.perf_counter()
    for first in range(0, jobs, BATCH):
        count = min(BATCH, jobs - first)
        batch = [
            {
                "command": ["python", "-m", "examples.selfplay", "play", "--seed", str(first + n)],
                "requires": {"cpus": 0, "memory_mb": (first + n) % SHAPES},
                "priority": (first + n) % 100,
            }
            for n in range(count)
        ]
        client.post("/jobs", {"jobs": batch})
    return jobs / (time.perf_counter() - began)


def claims(client: Client, count: int) -> list[float]:
    """Milliseconds of each claim of one job."""
    taken = []
    resources = {"cpus": 1, "memory_mb": 1_000}
    for _ in range(count):
        began = time.perf_counter()
        jobs = client.post("/worker/claim", {"worker": "w", "resources": resources, "max_jobs": 1})["jobs"]
        taken.append((time.perf_counter() - began) * 1000)
        if len(jobs) != 1:
            raise SystemExit("a claim came back empty")
        client.post("/worker/complete", {"id": jobs[0]["id"], "attempt": jobs[0]["attempt"], "worker": "w"})
    return taken


def rss_mb(pid: int | None) -> float:
    return psutil.Process(pid).memory_info().rss / 1e6 if pid is not None else 0.0


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    flags.add_argument("--pending", type=int, default=1_000_000)
    flags.add_argument("--claims", type=int, default=500)
    asked = flags.parse_args()
    with node() as idle:
        time.sleep(3)
        idle_mb, runner_mb = rss_mb(idle.pid), rss_mb(idle.runner_pid())
    with node("--no-worker") as full:
        client = Client(full.port)
        before_mb = rss_mb(full.pid)
        fill(client, asked.claims + 10)
        few = claims(client, asked.claims)
        rate = fill(client, asked.pending)
        full_mb = rss_mb(full.pid)
        many = claims(client, asked.claims)
        disk_mb = sum(path.stat().st_size for path in (full.folder / "data").glob("*.db*")) / 1e6
    per_job = max(full_mb - before_mb, 0) * 1e6 / asked.pending
    report(
        f"One node with {asked.pending:,} pending jobs",
        [
            ("resident set, idle", f"{idle_mb:.0f} MB + {runner_mb:.0f} MB runner (asked: 90)"),
            ("resident set, full", f"{full_mb:.0f} MB: {per_job:.0f} B a pending job (asked: 1,500)"),
            ("on disk, full", f"{disk_mb:,.0f} MB"),
            ("submitted in batches of 10,000", f"{rate:,.0f} jobs/s"),
            ("claim with tens pending, median / p99", f"{quantile(few, 0.5):.2f} / {quantile(few, 0.99):.2f} ms"),
            (
                f"claim with {asked.pending:,} pending, median / p99",
                f"{quantile(many, 0.5):.2f} / {quantile(many, 0.99):.2f} ms (asked: p99 10)",
            ),
        ],
        {
            "bench": "scale",
            "pending": asked.pending,
            "idle_mb": round(idle_mb, 1),
            "runner_mb": round(runner_mb, 1),
            "full_mb": round(full_mb, 1),
            "bytes_a_job": round(per_job),
            "claim_ms_median_few": round(quantile(few, 0.5), 2),
            "claim_ms_p99_few": round(quantile(few, 0.99), 2),
            "claim_ms_median": round(quantile(many, 0.5), 2),
            "claim_ms_p99": round(quantile(many, 0.99), 2),
            "submit_per_second": round(rate),
        },
    )


if __name__ == "__main__":
    main()
