"""What does it cost to have every entry on a majority of three disks?

*No-op jobs*: submitted, claimed and completed over HTTP at the leader, by `bench.throughput.noop`, on one voter and
then on three in the same run. *One write*: single submits one after the other, at the leader and through a follower.
*At rest*: CPU time and memory of the three processes over a minute in which nobody asks anything.

Usage: python -m bench.replication [--noop N] [--writes N] [--rest SECONDS]
"""

from __future__ import annotations

import argparse
import asyncio
import time

import psutil

from bench.harness import quantile, report
from bench.throughput import noop
from bench.voters import Caller, voters
from tests.nodes import ClusterProcesses, NodeProcess

BATCH = 1_000


def rate(node: NodeProcess, jobs: int) -> float:
    asyncio.run(noop(node.url, BATCH * 3, BATCH))  # warm up
    return asyncio.run(noop(node.url, jobs, BATCH))


def latencies(node: NodeProcess, count: int, tag: str) -> list[float]:
    caller, took = Caller(node), []
    for n in range(count):
        began = time.perf_counter()
        if caller.submit(f"{tag}-{n}") not in (200, 201):
            raise SystemExit(f"{node} did not take a write")
        took.append(time.perf_counter() - began)
    caller.close()
    return took


def at_rest(cluster: ClusterProcesses, seconds: float) -> tuple[list[float], list[float]]:
    """(percent of one core, MB of memory) of each process, the leader's first."""
    leader = cluster.leader()
    nodes = [leader, *(node for node in cluster.all if node is not leader)]
    processes = [psutil.Process(node.process.pid) for node in nodes if node.process is not None]

    def used() -> list[float]:
        return [sum(process.cpu_times()[:2]) for process in processes]

    before, began = used(), time.monotonic()
    time.sleep(seconds)
    spent = time.monotonic() - began
    cpu = [100 * (b - a) / spent for a, b in zip(before, used(), strict=True)]
    return cpu, [process.memory_info().rss / (1 << 20) for process in processes]


def told(took: list[float]) -> str:
    return f"median {1000 * quantile(took, 0.5):.2f} ms, p99 {1000 * quantile(took, 0.99):.2f} ms"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    flags.add_argument("--noop", type=int, default=30_000, help="no-op jobs")
    flags.add_argument("--writes", type=int, default=2_000, help="single submits")
    flags.add_argument("--rest", type=float, default=60, help="seconds at rest")
    asked = flags.parse_args()
    with voters(1) as one:
        alone = latencies(one["n1"], asked.writes, "alone")
        single = rate(one["n1"], asked.noop)
    with voters(3) as three:
        leader = three.leader()
        follower = three.followers()[0]
        cpu, memory = at_rest(three, asked.rest)
        at_leader = latencies(leader, asked.writes, "leader")
        through = latencies(follower, asked.writes, "follower")
        replicated = rate(leader, asked.noop)
        changes = three.leader().status()["term"] - leader.status()["term"]
    report(
        "Replication to three voters on one machine (its cores and its disk are shared by all)",
        [
            ("no-op jobs, one voter", f"{single:,.0f} jobs/s"),
            ("no-op jobs, three voters", f"{replicated:,.0f} jobs/s ({100 * replicated / single:.0f} %)"),
            ("one write, one voter", told(alone)),
            ("one write, three voters", told(at_leader)),
            ("one write through a follower", told(through)),
            ("at rest, leader", f"{cpu[0]:.1f} % of a core, {memory[0]:.0f} MB"),
            (
                "at rest, followers",
                ", ".join(f"{c:.1f} %, {m:.0f} MB" for c, m in zip(cpu[1:], memory[1:], strict=True)),
            ),
        ],
        {
            "bench": "replication",
            "noop_one_voter_per_second": round(single),
            "noop_three_voters_per_second": round(replicated),
            "write_one_voter_p50_ms": round(1000 * quantile(alone, 0.5), 2),
            "write_p50_ms": round(1000 * quantile(at_leader, 0.5), 2),
            "write_p99_ms": round(1000 * quantile(at_leader, 0.99), 2),
            "write_through_follower_p50_ms": round(1000 * quantile(through, 0.5), 2),
            "idle_cpu_percent": [round(value, 1) for value in cpu],
            "rss_mb": [round(value) for value in memory],
            "leader_changes": changes,
        },
    )


if __name__ == "__main__":
    main()
