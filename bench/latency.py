"""How soon does a submitted job start on an idle node, and does the node answer while it is saturated?

*Submit to start*: one /bin/true at a time; from just before the POST to the start the runner records (wall clock of one
machine, millisecond resolution). *Health under load*: GET /health every 20 ms from a process of its own while the
no-op load of `bench.throughput` runs flat out.

Usage: python -m bench.latency [--jobs N] [--load N]
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import subprocess
import sys
import time

from bench.harness import node, quantile, report
from bench.throughput import noop

PING_SECONDS = 0.02


def submit_to_start(port: int, jobs: int) -> list[float]:
    """Milliseconds for each job."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    headers = {"Content-Type": "application/json"}
    body = json.dumps({"command": ["/bin/true"]})

    def ask(method: str, path: str, sent: str | None = None) -> dict[str, object]:
        connection.request(method, path, body=sent, headers=headers if sent else {})
        answer: dict[str, object] = json.loads(connection.getresponse().read())
        return answer

    taken = []
    for _ in range(jobs):
        began = time.time()
        job = ask("POST", "/jobs", body)["id"]
        while (record := ask("GET", f"/jobs/{job}"))["state"] != "completed":
            if record["state"] in ("failed", "cancelled"):
                raise SystemExit(f"job {job}: {record['error']}")
            time.sleep(0.002)
        started = record["started_at"]
        assert isinstance(started, float)
        taken.append((started - began) * 1000)
        time.sleep(0.01)  # idle again before the next one
    return taken


def ping(port: int, seconds: float) -> list[float]:
    """Milliseconds of each GET /health for a while; a connection each, as curl makes."""
    taken = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/health")
        connection.getresponse().read()
        connection.close()
        taken.append((time.perf_counter() - began) * 1000)
        time.sleep(PING_SECONDS)
    return taken


def health_under_load(url: str, port: int, jobs: int) -> tuple[list[float], float]:
    """(/health milliseconds, no-op jobs a second meanwhile)."""
    code = f"import json; from bench.latency import ping; print(json.dumps(ping({port}, {jobs / 2500:.1f})))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as pinger:
        rate = asyncio.run(noop(url, jobs, 1_000))
        text, _ = pinger.communicate()
    return json.loads(text), rate


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    flags.add_argument("--jobs", type=int, default=400)
    flags.add_argument("--load", type=int, default=30_000, help="no-op jobs during which /health is asked")
    asked = flags.parse_args()
    with node() as working:
        submit_to_start(working.port, 20)  # warm up
        starts = submit_to_start(working.port, asked.jobs)
    with node("--no-worker") as quiet:
        pings, rate = health_under_load(quiet.url, quiet.port, asked.load)
    report(
        "Latency of one node",
        [
            ("submit to start, median", f"{quantile(starts, 0.5):.1f} ms (asked: 10)"),
            ("submit to start, p99", f"{quantile(starts, 0.99):.1f} ms (asked: 40)"),
            (f"/health at {rate:,.0f} no-op jobs/s, median", f"{quantile(pings, 0.5):.1f} ms"),
            ("/health under that load, p99", f"{quantile(pings, 0.99):.1f} ms (asked: 50)"),
            ("/health under that load, worst", f"{max(pings):.1f} ms of {len(pings)}"),
        ],
        {
            "bench": "latency",
            "start_ms_median": round(quantile(starts, 0.5), 2),
            "start_ms_p99": round(quantile(starts, 0.99), 2),
            "health_ms_median": round(quantile(pings, 0.5), 2),
            "health_ms_p99": round(quantile(pings, 0.99), 2),
            "health_ms_worst": round(max(pings), 2),
        },
    )


if __name__ == "__main__":
    main()
