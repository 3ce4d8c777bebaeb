"""Maintenance looks often while jobs wait for their time, and seldom otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from config.settings import QueueSettings
from p2p.loops.queue_loops import IDLE_SECONDS, WAITING_SECONDS, QueueMaintenanceLoop


class FakeDesk:
    leads, anything_waits = True, False
    on_waiting: Callable[[], None]

    def __init__(self) -> None:
        self.looks = self.ticks = 0

    async def wake_due(self) -> int:
        self.looks += 1
        return 3

    async def tick(self) -> None:
        self.ticks += 1

    async def clear_inactive_workers(self, silent_ms: int) -> int:
        return 1

    async def forget_machines(self, silent_ms: int) -> None: ...

    async def purge(self, states: tuple[str, ...], **limits: Any) -> int:
        return 2

    def mono_ms(self) -> int:
        return 1_000_000


async def test_it_looks_often_only_while_somebody_waits() -> None:
    desk = FakeDesk()
    loop = QueueMaintenanceLoop(desk, QueueSettings())  # type: ignore[arg-type]
    await loop.run_once()
    assert loop.interval_seconds == IDLE_SECONDS
    desk.on_waiting()
    assert loop._poke.is_set()  # whoever failed a moment ago may be due before the next look
    loop._poke.clear()
    desk.anything_waits = True
    await loop.run_once()
    desk.on_waiting()
    assert not loop._poke.is_set()  # it looks soon anyway; a thousand failures are not a thousand looks
    assert loop.interval_seconds == WAITING_SECONDS
    assert desk.ticks == 1, "about once a second, however often it looks"
    assert loop.stats == {"jobs_woken": 6, "workers_forgotten": 1, "jobs_pruned": 2}
    desk.anything_waits = False
    await loop.run_once()
    assert loop.interval_seconds == IDLE_SECONDS


async def test_who_does_not_lead_looks_at_nothing() -> None:
    desk = FakeDesk()
    desk.leads = False
    await QueueMaintenanceLoop(desk, QueueSettings()).run_once()  # type: ignore[arg-type]
    assert desk.looks == desk.ticks == 0
