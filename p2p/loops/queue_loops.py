"""The leader's loops over the queue: stock it, wake what is due, run what recurs, forget what is old."""

from __future__ import annotations

from collections.abc import Mapping

from config.settings import QueueSettings
from coordination.dispatcher import Dispatcher
from coordination.scheduler import Scheduler
from coordination.schedules import Schedule
from coordination.unified_queue_populator import Populator
from p2p.loops.base import PASSING, Loop

PRUNE_SECONDS = 30.0
TICK_SECONDS = 0.9
SCHEDULE_SECONDS = 1.0
WAITING_SECONDS, IDLE_SECONDS = 0.2, 1.0  # how often it is looked for jobs that are due, with and without any
SILENT_WORKER_MS = 24 * 3_600_000  # pods come with a new name each time; the books do not keep them for ever


class QueuePopulatorLoop(Loop):
    """Keeps the queue stocked as ``config/jobs.yaml`` asks. What is added is `coordination.population`."""

    name = "QueuePopulatorLoop"

    def __init__(self, populator: Populator, interval_seconds: float) -> None:
        super().__init__(interval_seconds)
        self._populator = populator

    async def turn(self) -> None:
        if not self._populator.enabled or not self._populator.leads:
            return
        try:
            self.stats["items_added"] += await self._populator.populate()
            self._populator.last_error = None
        except PASSING as error:
            self._populator.last_error = str(error)
            raise


class SchedulerLoop(Loop):
    """Submits recurring jobs when they are due. At the beginning of each term jobs.yaml has its say."""

    name = "SchedulerLoop"

    def __init__(self, scheduler: Scheduler, from_file: Mapping[str, Schedule]) -> None:
        super().__init__(SCHEDULE_SECONDS)
        self._scheduler, self._from_file = scheduler, from_file
        self._taken_up = False
        self.stats.update(jobs_submitted=0)

    async def turn(self) -> None:
        if not self._scheduler.leads:
            self._taken_up = False
            return
        if not self._taken_up:
            await self._scheduler.take_up(self._from_file)
            self._taken_up = True
        self.stats["jobs_submitted"] += await self._scheduler.run_due()


class QueueMaintenanceLoop(Loop):
    """Moves waiting jobs whose time has come to pending, and prunes finished ones by policy; never unfinished ones."""

    name = "QueueMaintenanceLoop"

    def __init__(self, dispatcher: Dispatcher, policy: QueueSettings) -> None:
        super().__init__(IDLE_SECONDS)
        self._desk, self._policy = dispatcher, policy
        self._pruned_at = self._ticked_at = 0
        dispatcher.on_waiting = self._look_soon

    def _look_soon(self) -> None:
        if self.interval_seconds > WAITING_SECONDS:
            self.poke()

    async def turn(self) -> None:
        self.interval_seconds = WAITING_SECONDS if self._desk.anything_waits else IDLE_SECONDS
        if not self._desk.leads:
            return
        self.stats["jobs_woken"] += await self._desk.wake_due()
        now = self._desk.mono_ms()
        if now - self._ticked_at >= TICK_SECONDS * 1000:
            self._ticked_at = now
            await self._desk.tick()
        if now - self._pruned_at >= PRUNE_SECONDS * 1000:
            self._pruned_at = now
            self.stats["workers_forgotten"] += await self._desk.clear_inactive_workers(SILENT_WORKER_MS)
            await self._desk.forget_machines(SILENT_WORKER_MS)
            self.stats["jobs_pruned"] += await self._desk.purge(
                ("completed", "failed", "cancelled"),
                older_than_ms=int(self._policy.keep_finished_hours * 3_600_000),
                keep=self._policy.keep_finished,
            )
