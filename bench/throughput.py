"""How many jobs a second does one node take through their whole life?

Two measurements in one run. *No-op*: jobs submitted in batches, claimed and completed over HTTP by a client on the same
machine, journal fsynced, no process started. *Real processes*: ``/bin/true`` through the node's own worker and runner
(log files and exit codes kept), beside a bare asyncio spawn loop of the same command, before and after, for the ratio.

Usage: python -m bench.throughput [--noop N] [--real N] [--batch N]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import Any

import aiohttp

from bench.harness import node, report

CLAIMERS = 3
CLAIM_JOBS = 500


async def _post(session: aiohttp.ClientSession, path: str, body: Any) -> Any:
    async with session.post(path, data=json.dumps(body), headers={"Content-Type": "application/json"}) as answer:
        told = await answer.json()
        if answer.status >= 300:
            raise SystemExit(f"{path}: {answer.status} {told}")
        return told


async def noop(url: str, jobs: int, batch: int) -> float:
    """Jobs a second from the first submit to the last acknowledged completion."""
    done = 0
    async with aiohttp.ClientSession(url) as session:
        body = {"jobs": [{"command": ["true"], "requires": {"cpus": 0}} for _ in range(batch)]}
        began = time.perf_counter()

        async def submit() -> None:
            for _ in range(jobs // batch):
                await _post(session, "/jobs", body)

        async def work(name: str) -> None:
            nonlocal done
            claim = {"worker": name, "resources": {"cpus": 1}, "max_jobs": CLAIM_JOBS, "wait_seconds": 1}
            while done < jobs:
                claimed = (await _post(session, "/worker/claim", claim))["jobs"]
                items = [{"id": job["id"], "attempt": job["attempt"], "worker": name, "result": {}} for job in claimed]
                if items:
                    results = (await _post(session, "/worker/complete", {"items": items}))["results"]
                    done += sum(result["status"] == 200 for result in results)

        await asyncio.gather(submit(), *(work(f"w{n}") for n in range(CLAIMERS)))
        return jobs / (time.perf_counter() - began)


async def bare_spawn(count: int, at_once: int = 32) -> float:
    """Processes a second of a bare asyncio spawn loop: nothing kept but the exit code."""
    left = count

    async def loop() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            process = await asyncio.create_subprocess_exec("/bin/true", stdin=asyncio.subprocess.DEVNULL)
            await process.wait()

    began = time.perf_counter()
    await asyncio.gather(*(loop() for _ in range(at_once)))
    return count / (time.perf_counter() - began)


async def real(url: str, jobs: int, batch: int) -> float:
    """Real processes a second from the first submit to the last recorded completion."""
    async with aiohttp.ClientSession(url) as session:
        body = {"jobs": [{"command": ["/bin/true"], "requires": {"cpus": 0.005}} for _ in range(batch)]}
        before = await _completed(session)
        began = time.perf_counter()
        for _ in range(jobs // batch):
            await _post(session, "/jobs", body)
        while await _completed(session) - before < jobs:
            await asyncio.sleep(0.05)
        return jobs / (time.perf_counter() - began)


async def _completed(session: aiohttp.ClientSession) -> int:
    async with session.get("/work_queue_status") as answer:
        status = await answer.json()
        if status["by_state"]["failed"]:
            raise SystemExit("jobs failed")
        return int(status["by_state"]["completed"])


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    flags.add_argument("--noop", type=int, default=50_000, help="no-op jobs")
    flags.add_argument("--real", type=int, default=6_000, help="real processes")
    flags.add_argument("--batch", type=int, default=1_000, help="jobs a submission")
    asked = flags.parse_args()
    with node("--no-worker") as quiet:
        asyncio.run(noop(quiet.url, asked.batch * 5, asked.batch))  # warm up
        noop_rate = asyncio.run(noop(quiet.url, asked.noop, asked.batch))
    spawn_before = asyncio.run(bare_spawn(asked.real // 2))
    with node() as working:
        asyncio.run(real(working.url, asked.batch, asked.batch))  # warm up
        real_rate = asyncio.run(real(working.url, asked.real, asked.batch))
    spawn_after = asyncio.run(bare_spawn(asked.real // 2))
    spawn = (spawn_before + spawn_after) / 2
    report(
        "Throughput of one node",
        [
            ("no-op jobs over HTTP", f"{noop_rate:,.0f} jobs/s (asked: 5,000)"),
            ("real /bin/true through the runner", f"{real_rate:,.0f} processes/s"),
            (
                "bare asyncio spawn loop",
                f"{spawn:,.0f} processes/s ({spawn_before:,.0f} before, {spawn_after:,.0f} after)",
            ),
            ("real / bare", f"{100 * real_rate / spawn:.0f} % (asked: 60 %)"),
        ],
        {
            "bench": "throughput",
            "noop_per_second": round(noop_rate),
            "real_per_second": round(real_rate),
            "bare_spawn_per_second": round(spawn),
            "real_to_bare": round(real_rate / spawn, 3),
        },
    )


if __name__ == "__main__":
    main()
