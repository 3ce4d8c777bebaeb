"""What happened, as facts with stable names (DESIGN §7), and the bus that carries them inside one node.

The state machine returns events, the leader's loops add those about nodes and daemons. Who listens: the event log
(`coordination.event_log`), ``GET /events``, the dispatcher. The bus keeps a bounded tail; a slow listener loses the
oldest, and is told how many, rather than slowing the queue.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any, NamedTuple

log = logging.getLogger(__name__)


class EventType(StrEnum):
    """Released names never change."""

    WORK_QUEUED = "WORK_QUEUED"
    WORK_CLAIMED = "WORK_CLAIMED"
    WORK_STARTED = "WORK_STARTED"
    WORK_COMPLETED = "WORK_COMPLETED"
    WORK_FAILED = "WORK_FAILED"
    WORK_RETRIED = "WORK_RETRIED"
    WORK_TIMEOUT = "WORK_TIMEOUT"
    WORK_RELEASED = "WORK_RELEASED"
    WORK_CANCELLED = "WORK_CANCELLED"
    WORK_STALLED = "WORK_STALLED"
    NODE_JOINED = "NODE_JOINED"
    NODE_SUSPECT = "NODE_SUSPECT"
    NODE_DEAD = "NODE_DEAD"
    NODE_LEFT = "NODE_LEFT"
    LEADER_ELECTED = "LEADER_ELECTED"
    LEADER_LOST = "LEADER_LOST"
    VOTER_ADDED = "VOTER_ADDED"
    VOTER_REMOVED = "VOTER_REMOVED"
    DAEMON_RESTARTED = "DAEMON_RESTARTED"
    DAEMON_FAILED = "DAEMON_FAILED"
    ALERT_RAISED = "ALERT_RAISED"
    ALERT_CLEARED = "ALERT_CLEARED"


WARNINGS = frozenset(
    {
        EventType.WORK_FAILED,
        EventType.WORK_RETRIED,
        EventType.WORK_TIMEOUT,
        EventType.WORK_STALLED,
        EventType.NODE_SUSPECT,
        EventType.NODE_DEAD,
        EventType.LEADER_LOST,
        EventType.DAEMON_RESTARTED,
        EventType.DAEMON_FAILED,
        EventType.ALERT_RAISED,
    }
)


class Event(NamedTuple):
    """One fact. `at_ms` is unix milliseconds; `fields` are JSON values, `job` first where there is one."""

    type: EventType
    at_ms: int
    fields: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """``{"event", "at" (unix seconds), …fields}``."""
        return {"event": str(self.type), "at": self.at_ms / 1000, **self.fields}


Listener = Callable[[list[tuple[int, Event]]], None]


class EventBus:
    """Hands batches of numbered events to listeners, in order. Thread-safe; listeners must not block.

    A batch has reached every listener when `publish` returns, except when a listener publishes: what it adds follows
    as soon as everybody has what came before. A listener that raises is logged and does not stop the others.
    """

    TAIL = 2_000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._delivery = threading.RLock()
        self._undelivered: deque[list[tuple[int, Event]]] = deque()
        self._delivering = False
        self._tail: deque[tuple[int, Event]] = deque(maxlen=self.TAIL)
        self._listeners: list[Listener] = []
        self._next = 1

    def publish(self, events: Iterable[Event]) -> None:
        """Numbers the events and calls every listener with the batch."""
        with self._delivery:
            with self._lock:
                batch = list(enumerate(events, self._next))
                if not batch:
                    return
                self._next += len(batch)
                self._tail.extend(batch[-self.TAIL :])
            self._undelivered.append(batch)
            if self._delivering:
                return
            self._delivering = True
            try:
                while self._undelivered:
                    self._deliver(self._undelivered.popleft())
            finally:
                self._delivering = False

    def _deliver(self, batch: list[tuple[int, Event]]) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener(batch)
            except Exception:
                log.exception("a listener failed on events %d to %d", batch[0][0], batch[-1][0])

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Adds a listener; the answer takes it away again."""
        with self._lock:
            self._listeners.append(listener)

        def unsubscribe() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return unsubscribe

    def tail(self, after: int = 0) -> list[tuple[int, Event]]:
        """The remembered events numbered above `after`, oldest first. A number that is yet to come is of an earlier run
        of this node: everything remembered is news to whoever gives it."""
        with self._lock:
            if after >= self._next:
                after = 0
            return [item for item in self._tail if item[0] > after]
