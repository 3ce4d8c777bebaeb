"""Watches the queue's health and the node's disk; raises and clears alerts."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from coordination.alerts import AlertBook
from coordination.dispatcher import Dispatcher
from coordination.events import Event, EventBus
from coordination.events import EventType as E
from coordination.operations import Operations
from p2p.loops.base import Loop


class HealthMonitorLoop(Loop):
    """Each turn: judge the queue, tell what began or ended, notice silent jobs once, and look at the free disk."""

    name = "HealthMonitorLoop"

    def __init__(
        self,
        operations: Operations,
        dispatcher: Dispatcher,
        alerts: AlertBook,
        bus: EventBus,
        *,
        data_dir: Path,
        min_free_disk_mb: int,
        stuck_seconds: float,
        interval_seconds: float,
    ) -> None:
        super().__init__(interval_seconds)
        self._operations, self._desk, self._alerts, self._bus = operations, dispatcher, alerts, bus
        self._data_dir, self._min_free_disk_mb, self._stuck_seconds = data_dir, min_free_disk_mb, stuck_seconds

    async def turn(self) -> None:
        now_ms = self._desk.now_ms()
        if self._desk.leads:
            status = await self._operations.queue_status()
            self._alerts.reconcile("queue", status["health"]["details"]["breaches"], now_ms)
            await self._tell_stalled(now_ms)
        else:
            self._alerts.reconcile("queue", {}, now_ms)  # the leader's to tell
        free_mb = (await asyncio.to_thread(shutil.disk_usage, self._data_dir)).free >> 20
        self._desk.disk_low = free_mb < self._min_free_disk_mb
        low = f"{free_mb} MB free under {self._data_dir}; submits get 507 below {self._min_free_disk_mb} MB"
        self._alerts.reconcile("disk", {"disk_low": low} if self._desk.disk_low else {}, now_ms)

    async def _tell_stalled(self, now_ms: int) -> None:
        """WORK_STALLED, once for each attempt until it shows life again."""
        events = []
        for verdict in await self._operations.stalls.now(int(self._stuck_seconds * 1000)):
            held = verdict.held
            if not held.stalled:
                held.stalled = True
                fields = {"job": held.job, "kind": held.kind, "attempt": held.attempt, "worker": held.worker}
                events.append(Event(E.WORK_STALLED, now_ms, {**fields, "error": verdict.reason}))
        self.stats["stalls_told"] += len(events)
        self._bus.publish(events)
