"""How long is nothing acknowledged when the leader dies?

Three nodes on this machine at default settings. The leader is killed with SIGKILL (or stopped with SIGTERM), at once a
survivor is asked to take a job, and the time until it says 201 is taken: election, taking office, replication and all.
Then the dead node is started again, and once it votes and is well the next leader dies.

Usage: python -m bench.failover [--kills N] [--stops N]
"""

from __future__ import annotations

import argparse
import signal
import statistics
import time

from bench.cluster import Boxes, boxes
from bench.harness import quantile, report

JOB = {"command": ["true"], "not_before": 32_000_000_000}  # accepted and never run


def gap(cluster: Boxes, number: int) -> float:
    """Seconds from the signal to the first acknowledged write on a survivor."""
    leader = cluster.wait_voters()
    survivor = next(box for box in cluster.all if box is not leader)
    survivor.ask("GET", "/health")
    assert leader.process is not None
    began = time.perf_counter()
    leader.process.send_signal(number)
    while True:
        status, _ = survivor.ask("POST", "/jobs", JOB, seconds=30.0)
        if status == 201:
            break
    taken = time.perf_counter() - began
    leader.process.wait(30)
    leader.start()
    return taken


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("--kills", type=int, default=100)
    flags.add_argument("--stops", type=int, default=20)
    told = flags.parse_args()
    with boxes(3, "--no-worker") as cluster:
        kills = [gap(cluster, signal.SIGKILL) for _ in range(told.kills)]
        stops = [gap(cluster, signal.SIGTERM) for _ in range(told.stops)]
    figures: dict[str, float | int] = {}
    for name, taken in (("kill", kills), ("stop", stops)):
        if taken:
            figures |= {
                f"{name}s": len(taken),
                f"{name}_median_s": round(statistics.median(taken), 3),
                f"{name}_p99_s": round(quantile(taken, 0.99), 3),
                f"{name}_worst_s": round(max(taken), 3),
            }
    report(
        "failover, three nodes",
        [(name, str(value)) for name, value in figures.items()],
        {"bench": "failover", **figures},
    )


if __name__ == "__main__":
    main()
