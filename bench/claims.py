"""How long does the leader take to decide who gets what when a worker has room again?

A queue on a file with 100,000 pending jobs of 200 shapes (sizes, GPU models, parts of GPUs, gangs, groups, kinds, time
limits) and 500 unequal workers, all full and all waiting. Again and again a job ends somewhere; the time is from the
moment its worker's free room is known to the moment its claim is answered: a round over all shapes, the commit, the
answer. The journal is a thread that applies at once, so that no disk and no network is in it. *Planner* is the part
that the round's pure decision takes. Beside each time stands what it took of processor time, for machines that others
use too.

Usage: python -m bench.claims [--jobs N] [--shapes N] [--workers N] [--ends N] [--profile FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import queue
import random
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from bench.harness import quantile, report
from coordination import commands as c
from coordination.clock import SystemClock
from coordination.dispatcher import Dispatcher, Room
from coordination.events import EventBus
from coordination.kinds import Kinds
from coordination.lane import LaneKey, lane_text
from coordination.placement import GpuOffer, Offer, take, with_defaults
from coordination.queue_reads import QueueReader
from coordination.queue_state import QueueState

MODELS = {"NVIDIA H100 80GB": 81_559, "NVIDIA A100 40GB": 40_960, "NVIDIA A40": 46_068, "NVIDIA RTX 4090": 24_564}
MAX_JOBS = 32  # at one time on a worker
ANSWER_SECONDS = 2.0
T0 = 1_700_000_000_000


class Applier:
    """A journal of one voter that forgets: what is proposed is applied at once, in order, on a thread."""

    def __init__(self, state: QueueState, reader: QueueReader, bus: EventBus) -> None:
        self._state, self._reader, self._bus = state, reader, bus
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            work, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    def _do(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._work.put((work, future))
        return future

    def propose(self, body: bytes) -> Future[Any]:
        def apply() -> Any:
            ((result, events),) = self._state.apply_batch([(self._state.applied_index + 1, 1, body)])
            self._bus.publish(events)
            return result

        return self._do(apply)

    def query(self, question: Callable[[], Any]) -> Future[Any]:
        return self._do(question)

    def read(self, question: Callable[[QueueReader], Any]) -> Future[Any]:
        return self._do(lambda: question(self._reader))

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()


class Worker:
    """A worker as it would count its room, and its one claim that waits."""

    def __init__(self, offer: Offer) -> None:
        self.total = self.free = offer
        self.jobs: dict[str, dict[str, Any]] = {}
        self.claim: asyncio.Task[Any] | None = None

    def take_up(self, jobs: list[dict[str, Any]]) -> None:
        for job in jobs:
            self.jobs[job["id"]] = job
        self._count()

    def end(self, job: str) -> dict[str, Any]:
        ended = self.jobs.pop(job)
        self._count()
        return ended

    def _count(self) -> None:
        self.free = self.total
        for job in self.jobs.values():
            self.free = take(self.free, with_defaults(job["requires"]), job["gpus"])

    def room(self) -> Room:
        return Room(self.free, self.total, MAX_JOBS - len(self.jobs))


def workers(n: int, dice: random.Random) -> list[Worker]:
    made = []
    for number in range(n):
        name = f"node-{number:04}"
        model = dice.choice(list(MODELS))
        gpus = tuple(
            GpuOffer(
                uuid=f"{name}-{gpu}",
                model=model,
                memory_mb=MODELS[model],
                memory_free_mb=MODELS[model],
                compute_capability="8.6",
                numa_node=gpu // 4,
            )
            for gpu in range(dice.choice([0, 1, 2, 4, 8, 8]))
        )
        cpus = float(dice.choice([16, 32, 64, 128]))
        labels = {"zone": dice.choice(["eu", "us"])}
        made.append(Worker(Offer(node=name, cpus=cpus, memory_mb=256_000, disk_mb=999_999, gpus=gpus, labels=labels)))
    return made


def shapes(n: int, dice: random.Random) -> list[tuple[str, LaneKey, int]]:
    """Texts of so many different lanes, their keys and priorities."""
    made: dict[str, tuple[LaneKey, int]] = {}
    while len(made) < n:
        requires: dict[str, Any] = {
            "cpus": float(dice.choice([1, 2, 4, 8, 16])),
            "memory_mb": 1_000 * dice.randint(1, 60),
        }
        nodes = 1
        kind = dice.choice(["training", "evaluation", "tournament", "selfplay"])
        if dice.random() < 0.75:
            requires["gpus"] = dice.choice([1, 1, 1, 1, 2, 4, 8])
            if requires["gpus"] == 1 and dice.random() < 0.5:
                requires["gpu_share"] = dice.choice([0.1, 0.25, 0.5])
            requires["gpu_memory_mb"] = dice.choice([2_000, 4_000, 8_000, 20_000])
            if dice.random() < 0.3:
                requires["gpu_model"] = dice.choice(["H100|A100", "A40", "4090", "H100"])
            if requires["gpus"] >= 4 and dice.random() < 0.2:
                nodes = dice.choice([2, 4])
        if dice.random() < 0.2:
            requires["labels"] = {"zone": dice.choice(["eu", "us"])}
        key = LaneKey(dice.choice("abcde"), kind, dice.choice([0, 600_000, 3_600_000, 86_400_000]), True)
        made[lane_text(requires, key, nodes=nodes)] = (key, dice.choice([50, 75, 80, 85, 100]))
    return [(text, key, priority) for text, (key, priority) in made.items()]


class Bench:
    def __init__(self, folder: Path, asked: argparse.Namespace) -> None:
        self.dice = random.Random(asked.seed)
        self.asked = asked
        bus, path = EventBus(), str(folder / "state.db")
        self.state, self.reader = QueueState(path), QueueReader(path)
        self.applier = Applier(self.state, self.reader, bus)
        self.desk = Dispatcher(
            journal=self.applier,
            state=self.state,
            read=self.applier.read,
            kinds=Kinds({}, {}),
            clock=SystemClock(),
            bus=bus,
        )
        self.lanes = shapes(asked.shapes, self.dice)
        self.workers = {worker.total.node: worker for worker in workers(asked.workers, self.dice)}
        self.submitted = 0
        self.rounds: list[tuple[float, float]] = []  # of each decision of the planner: seconds, and of processor time

    async def submit(self, n: int) -> None:
        batch = []
        for _ in range(n):
            text, key, priority = self.lanes[self.submitted % len(self.lanes)]
            self.submitted += 1
            job = c.NewJob(
                id=f"j{self.submitted:08}", kind=key.kind, group=key.group, priority=priority, requires=text,
                max_attempts=3, backoff_ms=0, timeout_ms=key.bound_ms, not_before_ms=0, unique_key=None, depends_on=(),
                spec=b'{"command":["true"]}',
            )  # fmt: skip
            batch.append(job)
        for at in range(0, n, 5_000):
            await self.desk.propose(c.Submit(T0, tuple(batch[at : at + 5_000]), "", ""))

    def ask(self, worker: Worker) -> None:
        self.desk.make_room(worker.room())
        worker.claim = asyncio.ensure_future(self.desk.claim(worker.total.node, wait_seconds=3_600))

    async def answered(self, worker: Worker, seconds: float) -> bool:
        """Whether its claim has got something; if so it claims again."""
        assert worker.claim is not None
        await asyncio.wait([worker.claim], timeout=seconds)
        if not worker.claim.done():
            return False
        jobs, notices = worker.claim.result()
        worker.take_up(jobs)
        for notice in notices:
            if notice.job in worker.jobs:
                await self.end(worker, notice.job, notice.reason)
        self.ask(worker)
        return bool(jobs)

    async def fill(self) -> None:
        """Until everybody is full and waits."""
        for worker in self.workers.values():
            self.ask(worker)
        quiet = 0
        while quiet < 3:
            await asyncio.sleep(0.2)
            busy = [worker for worker in self.workers.values() if worker.claim is not None and worker.claim.done()]
            quiet = 0 if busy or self.desk.matching.planner.spoken_for else quiet + 1
            for worker in busy:
                await self.answered(worker, 0)

    async def end(self, worker: Worker, job: str, why: str) -> None:
        """A job ends, or makes way."""
        ok, attempt = why == "exit", worker.end(job)["attempt"]
        error, exit_code = (None, 0) if ok else (f"it was {why}", 143)
        done = c.AttemptDone(job, attempt, worker.total.node, ok, None, error, exit_code, True, T0, why)
        await self.desk.finish((done,))

    def _watch(self) -> None:
        """Times each decision of the planner."""
        matching, planner = self.desk.matching, self.desk.matching.planner
        plan, set_nodes = planner.plan, matching._set_nodes
        began = cpu = 0.0

        def timed_nodes() -> None:
            nonlocal began, cpu
            began, cpu = time.perf_counter(), time.thread_time()
            set_nodes()

        def timed_plan(*args: Any, **how: Any) -> Any:
            made = plan(*args, **how)
            self.rounds.append((time.perf_counter() - began, time.thread_time() - cpu))
            return made

        planner.plan, matching._set_nodes = timed_plan, timed_nodes  # type: ignore[method-assign]

    async def run(self) -> dict[str, Any]:
        await self.desk.begin_term()
        await self.submit(self.asked.jobs)
        began = time.perf_counter()
        await self.fill()
        filled = time.perf_counter() - began
        running = sum(len(worker.jobs) for worker in self.workers.values())
        await self.submit(running)
        await self.desk.tick()
        await asyncio.sleep(0.5)
        self._watch()
        gc.collect()
        gc.freeze()
        claims, planning, idle = [], [], 0
        profile = cProfile.Profile() if self.asked.profile else None
        ticked = time.monotonic()
        for _ in range(self.asked.ends):
            busy = [worker for worker in self.workers.values() if worker.jobs]
            worker = self.dice.choice(busy)
            await self.end(worker, self.dice.choice(sorted(worker.jobs)), "exit")
            await asyncio.sleep(0.002)
            if time.monotonic() - ticked >= 1:
                ticked = time.monotonic()
                await self.desk.tick()
                await asyncio.sleep(0.02)
            for other in self.workers.values():
                if other.claim is not None and other.claim.done():
                    await self.answered(other, 0)
            self.rounds.clear()
            if profile is not None:
                profile.enable()
            began, cpu = time.perf_counter(), time.process_time()
            self.desk.make_room(worker.room())
            assert worker.claim is not None
            await asyncio.wait([worker.claim], timeout=ANSWER_SECONDS if not self.rounds else 0.05)
            took = time.perf_counter() - began, time.process_time() - cpu
            if profile is not None:
                profile.disable()
            if worker.claim.done() and self.rounds:
                claims.append(took)
                planning.append(self.rounds[0])
                await self.answered(worker, 0)
            else:
                idle += 1
        if profile is not None:
            profile.dump_stats(self.asked.profile)
        for worker in self.workers.values():
            if worker.claim is not None:
                worker.claim.cancel()
        await asyncio.gather(*(w.claim for w in self.workers.values() if w.claim), return_exceptions=True)
        self.desk.end_term()
        pending = self.state.pending_total
        return {
            "pending": pending, "shapes": self.asked.shapes, "workers": len(self.workers), "running": running,
            "filled_s": round(filled, 2), "decided": len(claims), "nothing_fitted": idle,
            **_times("claim", claims), **_times("planner", planning),
        }  # fmt: skip

    def close(self) -> None:
        self.applier.close()
        self.reader.close()
        self.state.close()


def _times(what: str, taken: list[tuple[float, float]]) -> dict[str, float]:
    return {
        f"{what}_{unit}_{name}": round(1000 * quantile(sorted(times), part), 3)
        for unit, times in zip(("ms", "cpu_ms"), zip(*taken, strict=True), strict=True)
        for name, part in (("p50", 0.5), ("p99", 0.99), ("worst", 1.0))
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    flags.add_argument("--jobs", type=int, default=100_000)
    flags.add_argument("--shapes", type=int, default=200)
    flags.add_argument("--workers", type=int, default=500)
    flags.add_argument("--ends", type=int, default=2_000, help="jobs that end, one after the other")
    flags.add_argument("--seed", type=int, default=1)
    flags.add_argument("--profile", help="writes cProfile's statistics of the decisions to this file")
    asked = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), asked)
        try:
            told = asyncio.run(bench.run())
        finally:
            bench.close()
    report(
        "Deciding a claim on the leader",
        [
            ("pending jobs / shapes / waiting workers", f"{told['pending']:,} / {told['shapes']} / {told['workers']}"),
            ("running jobs", f"{told['running']:,}, placed in {told['filled_s']} s"),
            ("room free to claim answered, p50 / p99 / worst", _three(told, "claim_ms") + " ms (asked: p99 below 5)"),
            ("  of processor time", _three(told, "claim_cpu_ms") + " ms"),
            ("of that the planner, p50 / p99 / worst", _three(told, "planner_ms") + " ms"),
            ("  of processor time", _three(told, "planner_cpu_ms") + " ms"),
            ("decided / nothing fitted", f"{told['decided']} / {told['nothing_fitted']}"),
        ],
        told,
    )


def _three(told: dict[str, Any], name: str) -> str:
    return " / ".join(f"{told[f'{name}_{which}']:.2f}" for which in ("p50", "p99", "worst"))


if __name__ == "__main__":
    main()
