"""Supervises the node's background loops: restarts the dead with backoff, gives up loudly, obeys by name.

`Supervisor` is the live one, inside a node. `get_daemon_manager()` is the operators' handle from any shell.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from coordination import live
from coordination.answers import Answer
from coordination.clock import Clock
from coordination.daemon_types import DaemonState, DaemonType
from coordination.errors import Refused
from coordination.events import Event, EventBus
from coordination.events import EventType as E

log = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 1.0
LAST_BACKOFF_SECONDS = 16.0
QUICK_DEATH_SECONDS = 60.0
MAX_QUICK_DEATHS = 5


@dataclass(slots=True)
class Daemon:
    """One supervised loop. `run` returns only by being cancelled; anything else is a death."""

    type: DaemonType
    run: Callable[[], Awaitable[None]]
    state: DaemonState = DaemonState.STOPPED
    restarts: int = 0
    quick_deaths: int = 0
    last_error: str | None = None
    since_ms: int = 0
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    def as_json(self) -> dict[str, Any]:
        return {
            "state": str(self.state),
            "since": self.since_ms / 1000,
            "restarts": self.restarts,
            "quick_deaths": self.quick_deaths,
            "last_error": self.last_error,
        }


def backoff_seconds(quick_deaths: int) -> float:
    """1, 2, 4, 8, 16 s after the first, second, … quick death in a row."""
    return min(FIRST_BACKOFF_SECONDS * 2.0 ** max(quick_deaths - 1, 0), LAST_BACKOFF_SECONDS)


class Supervisor:
    """Owns a task per daemon. Use inside a running event loop; `stop_all` before it ends."""

    def __init__(self, clock: Clock, bus: EventBus, *, backoff: Callable[[int], float] = backoff_seconds) -> None:
        self._clock, self._bus, self._backoff = clock, bus, backoff
        self._loop: asyncio.AbstractEventLoop | None = None
        self.daemons: dict[DaemonType, Daemon] = {}
        self._orders: set[asyncio.Task[None]] = set()

    def add(self, type: DaemonType, run: Callable[[], Awaitable[None]]) -> None:
        self.daemons[type] = Daemon(type, run)

    def get(self, name: str) -> Daemon:
        """By name, in either case. Raises Refused (404) with the known names."""
        daemon = self.daemons.get(name.lower())  # type: ignore[call-overload]  # a StrEnum key equals its value
        if daemon is None:
            known = ", ".join(sorted(self.daemons))
            raise Refused(404, f"there is no daemon {name[:60]!r}; there are: {known}", field="type")
        assert isinstance(daemon, Daemon)
        return daemon

    def start(self, daemon: Daemon) -> None:
        """Starts it if it is not running; a failed one gets all its chances again."""
        if daemon.task is not None and not daemon.task.done():
            return
        self._loop = asyncio.get_running_loop()
        daemon.quick_deaths = 0
        daemon.task = asyncio.create_task(self._supervise(daemon), name=f"daemon-{daemon.type}")
        self._enter(daemon, DaemonState.RUNNING)

    async def stop(self, daemon: Daemon) -> None:
        """Stops it and waits until it has stopped. Until then a start does nothing: there are never two of it."""
        task = daemon.task
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            if daemon.task is not task:
                return  # another stop was here first, and it has been started again since
            daemon.task = None
        self._enter(daemon, DaemonState.STOPPED)

    async def restart(self, daemon: Daemon) -> None:
        await self.stop(daemon)
        self.start(daemon)
        daemon.restarts += 1
        self._tell(E.DAEMON_RESTARTED, daemon, reason="by hand")

    def start_all(self) -> None:
        for daemon in self.daemons.values():
            self.start(daemon)

    async def stop_all(self) -> None:
        for daemon in reversed(list(self.daemons.values())):
            await self.stop(daemon)

    def as_json(self) -> dict[str, Any]:
        return {str(daemon.type): daemon.as_json() for daemon in self.daemons.values()}

    async def on_loop(self, work: Callable[[], Awaitable[None]]) -> None:
        """Runs `work` on the loop that owns the tasks, from whichever loop asks."""
        loop = self._loop or asyncio.get_running_loop()
        if loop is asyncio.get_running_loop():
            await work()
        else:
            # A caller that blocks the node's own loop cannot wait for it: the work is begun, not awaited.
            loop.call_soon_threadsafe(self._begin, loop, work)

    def _begin(self, loop: asyncio.AbstractEventLoop, work: Callable[[], Awaitable[None]]) -> None:
        task = loop.create_task(_run(work), name="daemon-order")
        self._orders.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._orders.discard)

    async def _supervise(self, daemon: Daemon) -> None:
        me = asyncio.current_task()
        assert me is not None
        while True:
            began = self._clock.mono_ms()
            self._enter(daemon, DaemonState.RUNNING)
            try:
                await daemon.run()
                daemon.last_error = "it ended without being asked to"
            except asyncio.CancelledError:
                if me.cancelling():
                    raise
                daemon.last_error = "something it waited for was cancelled"
            except Exception as error:
                log.exception("daemon %s died", daemon.type)
                daemon.last_error = f"{type(error).__name__}: {error}"
            if me.cancelling():
                raise asyncio.CancelledError  # it was asked to stop, however it took that
            quick = self._clock.mono_ms() - began < QUICK_DEATH_SECONDS * 1000
            daemon.quick_deaths = daemon.quick_deaths + 1 if quick else 1
            if daemon.quick_deaths >= MAX_QUICK_DEATHS:
                self._enter(daemon, DaemonState.FAILED)
                self._tell(E.DAEMON_FAILED, daemon, error=daemon.last_error)
                return
            self._enter(daemon, DaemonState.BACKOFF)
            await asyncio.sleep(self._backoff(daemon.quick_deaths))
            daemon.restarts += 1
            self._tell(E.DAEMON_RESTARTED, daemon, reason=daemon.last_error)

    def _enter(self, daemon: Daemon, state: DaemonState) -> None:
        if daemon.state is not state:
            daemon.state, daemon.since_ms = state, self._clock.now_ms()

    def _tell(self, type: E, daemon: Daemon, **fields: Any) -> None:
        self._bus.publish([Event(type, self._clock.now_ms(), {"daemon": str(daemon.type), **fields})])


async def _run(work: Callable[[], Awaitable[None]]) -> None:
    await work()


class DaemonManager:
    """The operators' handle; every call may be awaited or not."""

    def status(self) -> Answer:
        """Daemon -> ``{state, since, restarts, quick_deaths, last_error}``."""
        return live.backend().call("daemons")

    def restart_daemon(self, type: DaemonType | str) -> Answer:
        """Stops it if it runs, and starts it; its state. Raises Refused (404) for an unknown name."""
        return live.backend().call("daemon_restart", type=str(type))

    def start_daemon(self, type: DaemonType | str) -> Answer:
        return live.backend().call("daemon_start", type=str(type))

    def stop_daemon(self, type: DaemonType | str) -> Answer:
        return live.backend().call("daemon_stop", type=str(type))


_manager = DaemonManager()


def get_daemon_manager() -> DaemonManager:
    """The daemon manager of the node beside (or around) this process."""
    return _manager
