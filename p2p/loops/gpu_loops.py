"""Watches this node's GPUs: tells which are not healthy, holds jobs to the GPU memory they were granted, and ends what
ended jobs left behind on a GPU.

The figures are `p2p.gpu_sampler`'s, what they mean is `p2p.gpus` and `p2p.gpu_jobs`; here it is acted upon. Strangers'
processes are never touched: only those that carry the mark of an attempt of this very node, which has ended.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from typing import Literal

from coordination.alerts import AlertBook
from p2p.gpu_jobs import Excess, Leftover, excesses, leftovers
from p2p.gpus import Reading
from p2p.loops.base import Loop
from p2p.loops.job_loops import WorkerPullLoop
from p2p.runner import processes

log = logging.getLogger(__name__)

SOURCE = "gpu"
GPU_MEMORY = "gpu_memory"  # the reason of an attempt that was ended for using too much of it
RUNNER_SECONDS = 10.0  # how long what an attempt left is its runner's to end
GRACE_SECONDS = 10.0  # from a leftover's SIGTERM to its SIGKILL
DETAILED = 3  # processes named in one alert


class GpuWatchLoop(Loop):
    """Each turn: tell the leader what is free now, raise and clear alerts, apply the memory policy, end leftovers."""

    name = "GpuWatchLoop"

    def __init__(
        self,
        worker: WorkerPullLoop,
        reading: Callable[[], Reading],
        alerts: AlertBook,
        now_ms: Callable[[], int],
        *,
        policy: Literal["warn", "kill"],
        interval_seconds: float,
    ) -> None:
        super().__init__(interval_seconds)
        self._worker, self._reading, self._alerts, self._now_ms = worker, reading, alerts, now_ms
        self._policy = policy
        self._seen: dict[tuple[int, int], float] = {}  # leftovers by (pid, start) -> loop time of the first look
        self._sent: dict[tuple[int, int], tuple[float, signal.Signals]] = {}  # since when, and what was sent last
        self.stats.update(leftovers_ended=0, memory_kills=0)

    async def turn(self) -> None:
        reading = self._reading()
        if not reading.sampled and reading.error is None:
            return
        self._worker.gpus_sampled()
        found = excesses(self._worker.workplace.gpu_claims(), reading)
        left = self._leftovers(reading)
        self._alerts.reconcile(SOURCE, {**_unhealthy(reading), **_excessive(found), **_left(left)}, self._now_ms())
        await self._apply_policy(found)
        await self._end(left)

    async def _apply_policy(self, found: list[Excess]) -> None:
        if self._policy != "kill":
            return
        for excess in found:
            self.stats["memory_kills"] += 1
            log.warning("ending job %s, attempt %d: %s", *excess.key, excess)
            await self._worker.end_attempt(excess.key, GPU_MEMORY, str(excess))

    # -- leftovers ---------------------------------------------------------------------------------------------------

    def _leftovers(self, reading: Reading) -> list[Leftover]:
        """Those whose runner has had its time: a job's end is its runner's business first."""
        known = self._worker.known_attempts()
        if known is None:
            return []  # before the runner has told what runs, everything would look left over
        place = self._worker.workplace
        found = leftovers(place.gpu_claims(), known, reading, place.folder)
        now = asyncio.get_running_loop().time()
        self._seen = {key: self._seen.get(key, now) for item in found for key in [(item.pid, item.start)]}
        return [item for item in found if now - self._seen[item.pid, item.start] >= RUNNER_SECONDS]

    async def _end(self, left: list[Leftover]) -> None:
        """SIGTERM, and after a while SIGKILL, once each: what even that does not end hangs in the kernel."""
        now = asyncio.get_running_loop().time()
        here = {(item.pid, item.start): item for item in left}
        self._sent = {key: sent for key, sent in self._sent.items() if key in here}
        for key, item in here.items():
            at, last = self._sent.get(key, (now, None))
            number = signal.SIGKILL if now - at >= GRACE_SECONDS else signal.SIGTERM
            if number is last:
                continue
            self._sent[key] = at, number
            log.warning("%s, which has ended: sending it %s", item, number.name)
            if await asyncio.to_thread(processes.signal_exactly, *key, number):
                self.stats["leftovers_ended"] += last is None


def _unhealthy(reading: Reading) -> dict[str, str]:
    """One alert a GPU, or one for all of them if none can be looked at."""
    if reading.error is not None:
        return {"gpu_error": f"no GPU of this node is offered: {reading.error}"}
    return {
        f"gpu_unhealthy_{gpu.uuid}": f"GPU {gpu.uuid} ({gpu.model}) is not offered: {gpu.why}"
        for gpu in reading.gpus
        if not gpu.healthy
    }


def _excessive(found: list[Excess]) -> dict[str, str]:
    return {f"gpu_memory_{item.key[0]}.{item.key[1]}": f"job {item.key[0]}: {item}" for item in found}


def _left(left: list[Leftover]) -> dict[str, str]:
    if not left:
        return {}
    more = f" and {len(left) - DETAILED} more" if len(left) > DETAILED else ""
    return {"gpu_leftovers": "; ".join(map(str, left[:DETAILED])) + more}
