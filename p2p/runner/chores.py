"""Work that goes on beside the daemon's messages: log caps, samples, orphans, and a round for what went missing.

All of it may block on /proc or on a slow disk, so it happens on one thread of its own; what it finds is acted on in the
event loop.  A defect in one chore must not cost the node its jobs: it is logged, and that chore begins again.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from p2p.runner import activity
from p2p.runner.attempts import Attempt
from p2p.runner.orphans import Orphans
from p2p.runner.protocol import ProtocolError
from p2p.runner.session import Session
from p2p.runner.supervisor import Supervisor

LOG_LOOK_SECONDS = 0.05
LOG_LOOKS_AT_ONCE = 256  # attempts looked at per look: a thousand quiet jobs cost no more than this
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
        """A look takes at most so many attempts, in turn; with few of them each is looked at every time."""
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
            await self._observe(partial(_enforce, some))
            await asyncio.sleep(LOG_LOOK_SECONDS)

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
            running = self._supervisor.running()
            session.send_sample(number, await self._observe(partial(activity.sample, running)))

    async def go_round(self, every: Callable[[], None]) -> None:
        """A death whose signal went missing is found within a second."""
        while True:
            await asyncio.sleep(ROUND_SECONDS)
            self._supervisor.reap()
            every()

    async def _observe(self, look: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, look)


def _enforce(attempts: list[Attempt]) -> None:
    for attempt in attempts:
        if (logs := attempt.logs) is not None:
            logs.enforce()
