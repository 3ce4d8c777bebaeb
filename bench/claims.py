"""How soon is a claim decided on a leader with a long queue and many workers that wait?

A real dispatcher over a real queue on disk holds 100,000 pending jobs of 200 shapes; 500 workers have parked their
claims and are full. Again and again one of them has room for something, and its claim is answered: heads read, order
kept, nodes scored, the entry applied on the queue's own thread. The journal is a stub that commits at once, so what is
measured is deciding, not fsync or the network (`bench.latency` has those).

Usage: python -m bench.claims [--jobs 100000] [--shapes 200] [--workers 500] [--claims 2000] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.harness import machine, quantile
from coordination import commands as c
from coordination.clock import SystemClock
from coordination.dispatcher import Dispatcher, Room
from coordination.events import EventBus
from coordination.kinds import Kinds
from coordination.lane import LaneKey, lane_text
from coordination.placement import GpuOffer, Offer
from coordination.planner import Plan
from coordination.queue_reads import QueueReader
from coordination.queue_state import QueueState

BATCH = 5_000
MODELS = ("A100", "H100", "RTX 4090", "A40")


class Bench:
    """A leader's desk, the queue under it, and the thread that applies."""

    def __init__(self, folder: Path) -> None:
        path = str(folder / "state.db")
        self._apply, self._read = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.state = QueueState(path)
        self.reader = QueueReader(path)
        self.bus = EventBus()
        self.index = 0
        self.desk = Dispatcher(
            journal=self,
            state=self.state,
            read=lambda question: self._read.submit(question, self.reader),
            kinds=Kinds({}, {}),
            clock=SystemClock(),
            bus=self.bus,
        )
        self.planned: list[float] = []

    def propose(self, body: bytes) -> Future[Any]:
        return self._apply.submit(self.commit, body)

    def query(self, question: Callable[[], Any]) -> Future[Any]:
        return self._apply.submit(question)

    def commit(self, body: bytes) -> Any:
        self.index += 1
        ((result, events),) = self.state.apply_batch([(self.index, 1, body)])
        self.bus.publish(events)
        return result

    def time_plans(self) -> None:
        """Notes how long each round's decision takes by itself."""
        planner = self.desk.matching.planner
        plan = planner.plan

        def timed(*args: Any, **more: Any) -> Plan:
            began = time.perf_counter()
            try:
                return plan(*args, **more)
            finally:
                self.planned.append(time.perf_counter() - began)

        planner.plan = timed  # type: ignore[method-assign]

    def close(self) -> None:
        self.desk.end_term()
        self._apply.shutdown()
        self._read.shutdown()
        self.reader.close()
        self.state.close()


def shape(n: int, rng: random.Random) -> str:
    """One of many requirements, most of them with a GPU."""
    requires: dict[str, Any] = {"cpus": float(1 + n % 7), "memory_mb": 500 * (1 + n % 11)}
    if n % 5:
        requires |= {"gpus": 1 + (n % 9 == 0), "gpu_memory_mb": 1_000 * (1 + n % 23)}
        if n % 3 == 0:
            requires["gpu_model"] = rng.choice(MODELS)
        if requires["gpus"] == 1 and n % 2:
            requires["gpu_share"] = 0.25
    key = LaneKey(f"group{n % 4}", ("selfplay", "training", "command")[n % 3], 3_600_000 if n % 2 else 0)
    return lane_text(requires, key)


def fill(bench: Bench, jobs: int, shapes: int, rng: random.Random) -> None:
    """Puts the pending jobs into the queue."""
    texts = [shape(n, rng) for n in range(shapes)]
    for first in range(0, jobs, BATCH):
        batch = tuple(
            c.NewJob(
                id=f"j{n}", kind="command", group=f"group{n % 4}", priority=rng.randrange(100),
                requires=texts[n % shapes], max_attempts=3, backoff_ms=0, timeout_ms=0, not_before_ms=0,
                unique_key=None, depends_on=(), spec=b'{"command":["true"]}',
            )
            for n in range(first, min(first + BATCH, jobs))
        )  # fmt: skip
        bench.commit(c.encode(c.Submit(bench.desk.now_ms(), batch, "", "")))


def rooms(worker: str, n: int) -> tuple[Room, Room]:
    """(a worker that is full, the same with room for something)."""
    gpus = tuple(
        GpuOffer(uuid=f"{worker}-{k}", model=MODELS[n % 4], memory_mb=24_000, memory_free_mb=24_000) for k in (0, 1)
    )
    total = Offer(node=worker, cpus=32, memory_mb=128_000, disk_mb=100_000, gpus=gpus)
    return Room(Offer(node=worker), None, 0), Room(total, None, 1)


async def measure(bench: Bench, workers: int, claims: int, rng: random.Random) -> list[float]:
    """Seconds from room to answer, of each claim."""
    names = [f"w{n}" for n in range(workers)]
    told = {name: rooms(name, n) for n, name in enumerate(names)}
    waiting: dict[str, asyncio.Task[Any]] = {}

    def park(name: str) -> None:
        bench.desk.make_room(told[name][0])
        waiting[name] = asyncio.create_task(bench.desk.claim(name, wait_seconds=600))

    for name in names:
        park(name)
    while not all(bench.desk.matching.parked(name) for name in names):
        await asyncio.sleep(0)
    seconds = []
    for _ in range(claims):
        name = rng.choice(names)
        await asyncio.sleep(0.001)  # what the last one left to do is done
        began = time.perf_counter()
        bench.desk.make_room(told[name][1])
        jobs, _ = await waiting[name]
        seconds.append(time.perf_counter() - began)
        assert len(jobs) == 1, jobs
        park(name)
        if rng.random() < 0.5:
            await bench.desk.tick()
    for task in waiting.values():
        task.cancel()
    await asyncio.gather(*waiting.values(), return_exceptions=True)
    return seconds


async def run(options: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(1)
    with tempfile.TemporaryDirectory(prefix="claims-") as folder:
        bench = Bench(Path(folder))
        try:
            fill(bench, options.jobs, options.shapes, rng)
            await bench.desk.begin_term()
            bench.time_plans()
            gc.collect()
            gc.freeze()
            seconds = await measure(bench, options.workers, options.claims, rng)
        finally:
            bench.close()
    millis, planned = [1000 * s for s in seconds], [1000 * s for s in bench.planned]
    return {
        "bench": "claims",
        "jobs": options.jobs,
        "shapes": options.shapes,
        "workers": options.workers,
        "claims": options.claims,
        "claim_ms_median": round(statistics.median(millis), 2),
        "claim_ms_p99": round(quantile(millis, 0.99), 2),
        "claim_ms_worst": round(max(millis), 2),
        "plan_ms_median": round(statistics.median(planned), 2),
        "plan_ms_p99": round(quantile(planned, 0.99), 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("jobs", 100_000), ("shapes", 200), ("workers", 500), ("claims", 2_000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    options = parser.parse_args()
    told = asyncio.run(run(options))
    if not options.json:
        print(f"\nOne claim of {told['workers']} that wait, {told['jobs']} jobs of {told['shapes']} shapes pending")
        print(f"{machine()}\n")
        for what, label in (("claim", "from room to answer"), ("plan", "the decision by itself")):
            print(f"  {label:<26}{told[f'{what}_ms_median']:>8} ms median{told[f'{what}_ms_p99']:>8} ms p99")
        print()
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
