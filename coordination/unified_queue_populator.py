"""Keeps the queue stocked as ``config/jobs.yaml`` asks. How many of what is `coordination.population`; this submits it.

`Populator` is the live one, inside a node; `get_queue_populator()` is the operators' handle from any shell.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from coordination import live
from coordination.answers import Answer, Count
from coordination.dispatcher import Dispatcher
from coordination.population import KindCounts, wanted
from coordination.queue_reads import QueueReader

WAIT_SECONDS = 0.01


class Populator:
    """Fills the queue when asked; when that is, is `p2p.loops.queue_loops.QueuePopulatorLoop`."""

    def __init__(
        self, dispatcher: Dispatcher, *, enabled: bool = True, totals: Mapping[str, int] | None = None
    ) -> None:
        self._desk = dispatcher
        self.enabled = enabled
        self._totals = dict(totals or {})
        self._added_at: dict[str, int] = {}  # kind -> monotonic ms
        self._filling = threading.Lock()  # not asyncio's: the operators' calls come on loops of their own
        self.last_populate_ms: int | None = None
        self.last_error: str | None = None
        self._added: list[tuple[int, int]] = []  # (unix ms, jobs), of the last hour
        self._why: dict[str, str] = {}

    @property
    def leads(self) -> bool:
        """Only the leader fills the queue."""
        return self._desk.leads

    async def populate(self, *, force: bool = False) -> int:
        """Adds what is lacking; how many. Raises what submitting raises. One at a time, whoever asks: two that count
        before either adds would fill the queue twice."""
        while not self._filling.acquire(blocking=False):  # noqa: ASYNC110 - the holder may be on another loop
            await asyncio.sleep(WAIT_SECONDS)
        try:
            return await self._populate(force)
        finally:
            self._filling.release()

    async def _populate(self, force: bool) -> int:
        plan = wanted(self._desk.kinds, await self._counts(), force=force, totals=self._totals)
        added = 0
        for want in plan:
            self._why[want.kind] = want.why
            if not want.jobs:
                continue
            key = f"populator-{secrets.token_hex(12)}"
            answer = await self._desk.submit(want.jobs, batch=True, key=key, digest="")
            added += sum(answer["created"])
            self._added_at[want.kind] = self._desk.mono_ms()
        now = self._desk.now_ms()
        self.last_populate_ms = now
        self._added = [(at, n) for at, n in self._added if at > now - 3_600_000]
        if added:
            self._added.append((now, added))
        return added

    async def _counts(self) -> dict[str, KindCounts]:
        minute = self._desk.now_ms() // 60_000 - 59

        def read(reader: QueueReader) -> tuple[Any, ...]:
            return reader.counts(), reader.ends_since(minute), reader.totals()

        counts, ends, totals = await self._desk.ask(read)
        unfinished: defaultdict[str, int] = defaultdict(int)
        for state, kind, _group, n in counts:
            if state in ("waiting", "pending", "claimed", "running"):
                unfinished[kind] += n
        hour: defaultdict[tuple[str, str], int] = defaultdict(int)
        for _minute, kind, what, n in ends:
            hour[(kind, what)] += n
        now = self._desk.mono_ms()
        return {
            kind: KindCounts(
                unfinished=unfinished[kind],
                submitted_ever=totals.get((kind, "submitted"), 0),
                completed_hour=hour[(kind, "completed")],
                failed_hour=hour[(kind, "failed")],
                since_added=(now - self._added_at[kind]) / 1000 if kind in self._added_at else float("inf"),
            )
            for kind in self._desk.kinds.by_name
        }

    async def health(self) -> dict[str, Any]:
        """``{"is_healthy", "message", "details": {last_populate_time, items_added_hour, enabled, kinds, last_error}}``;
        times are unix seconds, None = never."""
        last = self.last_populate_ms
        hour = self._desk.now_ms() - 3_600_000
        healthy = self.last_error is None and (not self.enabled or last is not None)
        message = "populating" if self.enabled else "switched off; populate by hand with force"
        if self.last_error:
            message = f"the last attempt failed: {self.last_error}"
        elif self.enabled and last is None:
            message = "has not populated yet"
        return {
            "is_healthy": healthy,
            "message": message,
            "details": {
                "last_populate_time": last / 1000 if last is not None else None,
                "items_added_hour": sum(n for at, n in self._added if at > hour),
                "enabled": self.enabled,
                "kinds": dict(self._why),
                "last_error": self.last_error,
            },
        }


class QueuePopulator:
    """The operators' handle; every call may be awaited or not."""

    def health_check(self) -> Answer:
        """``.is_healthy .message .details["last_populate_time"] .details["items_added_hour"]``."""
        return live.backend().call("populator")

    def populate_all_queues(self, force: bool = False) -> Count:
        """Fills now; how many jobs were added."""
        return Count(live.backend().call("populate", force=force)["added"])


_populator = QueuePopulator()


def get_queue_populator() -> QueuePopulator:
    """The populator of the node beside (or around) this process."""
    return _populator
