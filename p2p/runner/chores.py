"""Work that goes on beside the daemon's messages: log caps, memory limits, samples, orphans, and a round for the rest.

All of it may block on /proc or on a slow disk, so it happens on threads of their own, one for the log caps, which are
a race with the writer, and one for the rest; what they find is acted on in the event loop.  A defect in one chore must
not cost the node its jobs: it is logged, and that chore begins again.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from p2p.runner import activity
from p2p.runner.attempts import Attempt
from p2p.runner.logs import LEAST_SECONDS
from p2p.runner.memory import MemoryWatch
from p2p.runner.orphans import Orphans
from p2p.runner.protocol import ProtocolError
from p2p.runner.session import Session
from p2p.runner.supervisor import Supervisor

LOG_TURN_SECONDS = 0.05  # which attempts are looked at is decided this often
LOG_LOOKS_AT_ONCE = 256  # attempts looked at per turn: a thousand quiet jobs cost no more than this
LOG_LOOK_SECONDS = 0.01  # between looks at a quiet file, if there are few
LOG_LOOK_EACH_SECONDS = 0.001  # …and longer with more: a look costs a hundredth of this
ORPHAN_LOOK_SECONDS = 0.05
ROUND_SECONDS = 1.0
MAX_WAITING_SAMPLES = 100


class Chores:
    """``keep(chore)`` runs one for ever."""

    def __init__(self, *, supervisor: Supervisor, orphans: Orphans, log: Callable[[str], None]) -> None:
        self._supervisor = supervisor
        self._orphans = orphans
        self._log = log
        self._thread = ThreadPoolExecutor(1, "observer")
        self._log_thread = ThreadPoolExecutor(1, "logs")
        self._samples: asyncio.Queue[tuple[Session, Any]] = asyncio.Queue(MAX_WAITING_SAMPLES)

    async def keep(self, chore: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await chore()
                return
            except Exception:
                self._log(traceback.format_exc())
                await asyncio.sleep(ROUND_SECONDS)

    async def cap_logs(self) -> None:
        """A turn takes at most so many attempts; with few of them each is looked at in every turn."""
        loop = asyncio.get_running_loop()
        position = 0
        while True:
            running = self._supervisor.running()
            position = 0 if position >= len(running) else position
            some = running[position : position + LOG_LOOKS_AT_ONCE]
            position += LOG_LOOKS_AT_ONCE
            if not running:
                self._supervisor.busy.clear()
                await self._supervisor.busy.wait()
                continue
            await loop.run_in_executor(self._log_thread, _cap_for_a_turn, some)

    async def end_orphans(self) -> None:
        while not self._orphans.done:
            for attempt in await self._observe(self._orphans.look):
                self._log(f"{attempt.key}: {attempt.ending_error}")
                self._supervisor.finish_orphan(attempt)
            await asyncio.sleep(ORPHAN_LOOK_SECONDS)

    def find_unrecorded(self, data_directory: Path) -> list[Attempt]:
        """Before anyone connects: a client that saw nothing known might start an attempt that still runs."""
        found = self._orphans.find_unrecorded(data_directory)
        for attempt in found:
            self._log(f"{attempt.key}: found running without a record")
        return found

    def ask_sample(self, session: Session, number: Any) -> None:
        try:
            self._samples.put_nowait((session, number))
        except asyncio.QueueFull:
            raise ProtocolError(f"more than {MAX_WAITING_SAMPLES} samples asked for at once") from None

    async def answer_samples(self) -> None:
        while True:
            session, number = await self._samples.get()
            look = partial(activity.sample, self._supervisor.running(), self._supervisor.roots())
            session.send_sample(number, await self._observe(look))

    async def watch_memory(self) -> None:
        """Of attempts with a limit that no cgroup holds."""
        supervisor, watch = self._supervisor, MemoryWatch()
        while True:
            supervisor.limited.clear()
            watched = supervisor.watched()
            if not watched:
                await supervisor.limited.wait()
                continue
            over, pause = await self._observe(partial(watch.look, watched, supervisor.roots()))
            for attempt, used_mb in over:
                supervisor.exceeded(attempt, used_mb)
            await asyncio.sleep(pause)

    async def go_round(self, every: Callable[[], None]) -> None:
        """A death whose signal went missing is found within a second."""
        while True:
            await asyncio.sleep(ROUND_SECONDS)
            self._supervisor.reap()
            every()

    async def _observe(self, look: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, look)


def _cap_for_a_turn(attempts: list[Attempt]) -> None:
    """Looks at all of them now and then, and at those that grow fast as often as they need, until the turn is over."""
    quiet = min(max(LOG_LOOK_SECONDS, LOG_LOOK_EACH_SECONDS * len(attempts)), LOG_TURN_SECONDS)
    now = time.monotonic()
    end, due = now + LOG_TURN_SECONDS, {attempt.key: now for attempt in attempts}
    while now < end:
        for attempt in attempts:
            if due[attempt.key] <= now and (logs := attempt.logs) is not None:
                due[attempt.key] = now + min(logs.enforce(), quiet)
        time.sleep(max(min(*due.values(), end) - time.monotonic(), LEAST_SECONDS))
        now = time.monotonic()
