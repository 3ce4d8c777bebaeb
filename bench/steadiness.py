"""Does the leader change when nothing has failed?

Three voters for some minutes, a write every tenth of a second through each of them, and meanwhile: *idle* (nothing),
*spinners* (16 processes that want all the cores there are) or *jitter* (every packet between the nodes is up to 200 ms
late; each node in a network namespace of its own, which needs root). Every change of term is a leader that was given up
for dead, and the aim is none.

Usage: python -m bench.steadiness [--minutes N] [--load idle|spinners|jitter]
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench.harness import quantile, report
from bench.voters import Caller, voters
from tests.cluster import netns
from tests.nodes import ClusterProcesses

SPINNERS = 16
JITTER_SECONDS = 0.2
PAUSE_SECONDS = 0.1


@contextlib.contextmanager
def loaded(load: str) -> Iterator[ClusterProcesses]:
    """Three voters under this load."""
    if load == "jitter":
        if why := netns.why_not():
            raise SystemExit(why)
        with tempfile.TemporaryDirectory() as folder, netns.networked(Path(folder), 3) as (cluster, net):
            cluster.start(voters=3)
            net.shape(jitter=JITTER_SECONDS)
            yield cluster
        return
    with voters(3) as cluster:
        wanted = SPINNERS if load == "spinners" else 0
        spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(wanted)]
        try:
            yield cluster
        finally:
            for spinner in spinners:
                spinner.kill()
                spinner.wait()


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    flags.add_argument("--minutes", type=float, default=10)
    flags.add_argument("--load", choices=("idle", "spinners", "jitter"), default="spinners")
    asked = flags.parse_args()
    took: list[float] = []
    failed: list[int] = []
    over = threading.Event()

    def write(caller: Caller, name: str) -> None:
        n = 0
        while not over.is_set():
            n += 1
            began = time.monotonic()
            status = caller.submit(f"steady-{name}-{n}")
            took.append(time.monotonic() - began) if status in (200, 201) else failed.append(status)
            over.wait(PAUSE_SECONDS)

    with loaded(asked.load) as cluster:
        before = cluster.leader().status()["term"]
        writers = [
            threading.Thread(target=write, args=(Caller(node, timeout=12), node.node_id), daemon=True)
            for node in cluster.all
        ]
        for writer in writers:
            writer.start()
        time.sleep(asked.minutes * 60)
        over.set()
        for writer in writers:
            writer.join(30)
        after = max(node.status(timeout=20).get("term", before) for node in cluster.all)
    rows = [("leader changes", f"{after - before} (asked: 0)"), ("writes that failed", f"{len(failed)} of {len(took)}")]
    if took:
        figures = (("median", quantile(took, 0.5)), ("p99", quantile(took, 0.99)), ("worst", max(took)))
        rows.append(("a write took", ", ".join(f"{name} {1000 * seconds:,.0f} ms" for name, seconds in figures)))
    line = {"bench": "steadiness", "load": asked.load, "minutes": asked.minutes, "leader_changes": after - before}
    line |= {"writes": len(took), "failed": len(failed)}
    report(f"{asked.minutes:g} minutes of three voters, {asked.load}", rows, line)


if __name__ == "__main__":
    main()
