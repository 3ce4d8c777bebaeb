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

from bench.harness import quantile, report
from bench.voters import Caller, voters
from tests.nodes import ClusterProcesses


def gap(cluster: ClusterProcesses, number: int, tag: str) -> float:
    """Seconds from the signal to the first acknowledged write on a survivor."""
    leader = cluster.wait_voters(3)
    cluster.wait_equal()  # the survivors hold what they are to go on from
    survivor = Caller(next(node for node in cluster.all if node is not leader), timeout=30.0)
    assert leader.process is not None
    began = time.perf_counter()
    leader.process.send_signal(number)
    while survivor.submit(tag) not in (200, 201):
        pass
    taken = time.perf_counter() - began
    survivor.close()
    leader.process.wait(30)
    leader.start()
    return taken


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("--kills", type=int, default=100)
    flags.add_argument("--stops", type=int, default=20)
    told = flags.parse_args()
    with voters(3, settings={}) as cluster:
        kills = [gap(cluster, signal.SIGKILL, f"kill-{n}") for n in range(told.kills)]
        stops = [gap(cluster, signal.SIGTERM, f"stop-{n}") for n in range(told.stops)]
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
