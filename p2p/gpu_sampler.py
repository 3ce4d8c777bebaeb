"""Looks at the GPUs again and again, on one thread of its own; whoever asks gets the newest look at once.

A hung driver keeps that one thread and nothing else: there is never a second one, nobody waits for it, and from the
deadline on every GPU counts as unhealthy, with that as the reason. When NVML answers again, so does this. Decides
nothing about GPUs (`p2p.gpus`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from p2p.gpus import Gpu, Health, Reading, Who

log = logging.getLogger(__name__)

STOP_SECONDS = 2.0  # for a look that is under way; a hung one is left to the end of the process


class GpuSampler:
    """`reading` is safe on any thread and never waits."""

    def __init__(
        self,
        look: Callable[[], Reading],
        *,
        identify: Callable[[int], Who | None] = lambda _pid: None,
        interval_seconds: float = 5.0,
        deadline_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`identify` says who a process is; it is called on the sampling thread too."""
        self._look, self._identify, self._clock = look, identify, clock
        self._interval, self._deadline = interval_seconds, deadline_seconds
        self._newest = Reading(sampled=False)
        self._since: float | None = None  # a look is under way since
        self._health = Health()
        self._wake, self._first = threading.Event(), threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.on_sample: Callable[[], None] = lambda: None  # after each look, on the sampling thread

    @property
    def late(self) -> str:
        """The sentence for a hung driver: the same all the while, for it is part of what others are told."""
        return f"NVML has not answered for over {self._deadline:g} s"

    def start(self) -> None:
        """Begins to look. Blocks until the first look is done, or is late."""
        self._thread = threading.Thread(target=self._run, name="gpu-sampler", daemon=True)
        self._thread.start()
        self._first.wait(self._deadline)

    def stop(self) -> bool:
        """Blocks for a moment; whether it has ended. What hangs is left behind, and ends with the process."""
        self._stopping = True
        self._wake.set()
        if self._thread is None:
            return True
        self._thread.join(0 if self._is_late() else STOP_SECONDS)
        return not self._thread.is_alive()

    def poke(self) -> None:
        """Looks again soon: something has changed."""
        self._wake.set()

    @property
    def reading(self) -> Reading:
        """The newest look; all of its GPUs in doubt while the next one hangs."""
        newest = self._newest
        return newest.in_doubt(self.late) if self._is_late() else newest

    def _is_late(self) -> bool:
        since = self._since
        return since is not None and self._clock() - since >= self._deadline

    def _run(self) -> None:
        while not self._stopping:
            self._since = self._clock()
            try:
                newest = self._judge(self._look())
            except Exception as error:  # whatever it was, the thread goes on and the GPUs are not offered
                log.exception("looking at the GPUs failed")
                newest = self._newest.in_doubt(f"looking at the GPUs failed: {type(error).__name__}: {error}")
            self._newest, self._since = newest, None
            self._first.set()
            self.on_sample()
            self._wake.wait(self._interval)
            self._wake.clear()

    def _judge(self, reading: Reading) -> Reading:
        judged = self._health.judge(reading)
        return replace(judged, gpus=tuple(self._identified(gpu) for gpu in judged.gpus))

    def _identified(self, gpu: Gpu) -> Gpu:
        named = (h if h.who is not None else h._replace(who=self._identify(h.pid)) for h in gpu.holders)
        return replace(gpu, holders=tuple(named))
