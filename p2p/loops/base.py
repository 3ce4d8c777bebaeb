"""One anatomy for every background loop: a name, a turn, a wait that can be cut short, and what it did.

A turn that fails for a reason that passes (the journal is overloaded, a peer is away) is counted and tried again after
the usual wait. Any other exception ends the loop; the daemon manager restarts it with backoff and says so.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from typing import Any, ClassVar, Self

from coordination import live
from coordination.answers import Answer
from coordination.errors import OutcomeUnknown, Refused
from p2p.driver import Overloaded, Stopped

log = logging.getLogger(__name__)
SAY_AGAIN_SECONDS = 30.0  # the same failure is logged once in this; it is counted every time
PASSING = (Refused, OutcomeUnknown, Overloaded, Stopped)


class Loop(ABC):
    """Subclasses say `name` and `turn`. `stats` are counters, told as they are under ``/status``."""

    name: ClassVar[str]
    _instance: ClassVar[Loop | None] = None

    def __init__(self, interval_seconds: float) -> None:
        self.interval_seconds = interval_seconds
        self.is_running = False
        self.last_run_time: float | None = None  # unix seconds of the newest turn
        self.runs = 0
        self.errors = 0
        self.last_error: str | None = None
        self._said_at = float("-inf")
        self.stats: Counter[str] = Counter()
        self._poke = asyncio.Event()
        type(self)._instance = self

    @classmethod
    def get_instance(cls) -> Self | LoopHandle:
        """The live loop inside a node; elsewhere a handle that reads the node's ``/status``."""
        if cls._instance is not None and live.is_live():
            assert isinstance(cls._instance, cls)
            return cls._instance
        return LoopHandle(cls.name)

    @abstractmethod
    async def turn(self) -> None:
        """One round of work."""

    def poke(self) -> None:
        """Cuts the wait short: there is something to do."""
        self._poke.set()

    async def run(self) -> None:
        """Turns until cancelled. What a turn began is finished or undone by the turn itself."""
        self.is_running = True
        try:
            while True:
                await self.run_once()
                try:
                    # Not wait_for: in Python 3.11 it loses a cancellation that comes together with the poke, and
                    # the loop would never stop.
                    async with asyncio.timeout(self.interval_seconds):
                        await self._poke.wait()
                except TimeoutError:
                    pass  # nobody cut the wait short
                self._poke.clear()
        finally:
            self.is_running = False

    async def run_once(self) -> None:
        """One counted turn; a passing failure is noted and survived."""
        self.began_turn()
        try:
            await self.turn()
        except PASSING as error:
            self._failed(error)
        except Exception as error:
            self._failed(error)
            raise

    def began_turn(self) -> None:
        """Counts a turn; a loop whose turn has rounds of its own counts each round."""
        self.last_run_time = time.time()
        self.runs += 1

    def _failed(self, error: Exception) -> None:
        self.errors += 1
        said, self.last_error = self.last_error, f"{type(error).__name__}: {error}"
        now = time.monotonic()
        if said != self.last_error or now - self._said_at >= SAY_AGAIN_SECONDS:
            self._said_at = now
            log.warning("%s: %s", self.name, self.last_error)

    def as_json(self) -> dict[str, Any]:
        """``{running, last_run_time, runs, errors, last_error, stats}``."""
        return {
            "running": self.is_running,
            "last_run_time": self.last_run_time,
            "runs": self.runs,
            "errors": self.errors,
            "last_error": self.last_error,
            "stats": dict(self.stats),
        }


class LoopHandle:
    """A loop of the node beside this shell, read afresh at every look."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _look(self) -> Answer:
        loops = live.backend().call("status")["loops"]
        found: Answer = loops.get(self._name) or Answer(
            {"running": False, "last_run_time": None, "runs": 0, "errors": 0, "last_error": None, "stats": {}}
        )
        return found

    @property
    def is_running(self) -> bool:
        return bool(self._look()["running"])

    @property
    def last_run_time(self) -> float | None:
        """Unix seconds of the newest turn; None before the first."""
        at: float | None = self._look()["last_run_time"]
        return at

    @property
    def runs(self) -> int:
        return int(self._look()["runs"])

    @property
    def errors(self) -> int:
        return int(self._look()["errors"])

    @property
    def stats(self) -> Answer:
        stats: Answer = self._look()["stats"]
        return stats
