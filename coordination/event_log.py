"""Writes events to ``coordination.log`` and troubles to ``work_queue.log`` (DESIGN §7), off everybody's way.

One thread formats and writes batches, so that twenty thousand events a second cost the queue nothing but a list. The
files rotate at 50 MB, five kept. ``work_queue.log`` has one JSON object a line, whose ordinary lines never contain the
words stall, stuck or timeout: grepping for those finds only trouble.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from coordination.events import WARNINGS, Event
from coordination.events import EventType as E

log = logging.getLogger(__name__)

ROTATE_BYTES = 50 << 20
KEPT = 5
MAX_WAITING = 200_000  # events; beyond it the oldest are dropped and counted
TROUBLES = frozenset({E.WORK_FAILED, E.WORK_RETRIED, E.WORK_TIMEOUT, E.WORK_STALLED})


class RotatingFile:
    """Appends text; renames to .1 … .5 when full. One thread writes."""

    def __init__(self, path: Path, *, limit: int = ROTATE_BYTES, kept: int = KEPT) -> None:
        self._path, self._limit, self._kept = path, limit, kept
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._size = path.stat().st_size

    def write(self, text: str) -> None:
        """Appends and flushes; a file removed by somebody's clean-up is made anew."""
        data = text.encode("utf-8", "backslashreplace")
        if not self._path.exists():
            self._reopen()
        elif self._size + len(data) > self._limit and self._size:
            self._rotate()
        self._file.write(data)
        self._file.flush()
        self._size += len(data)

    def _rotate(self) -> None:
        for n in range(self._kept - 1, 0, -1):
            older = Path(f"{self._path}.{n}")
            if older.exists():
                older.replace(f"{self._path}.{n + 1}")
        self._path.replace(f"{self._path}.1")
        self._reopen()

    def _reopen(self) -> None:
        self._file.close()
        self._file = self._path.open("ab")
        self._size = 0

    def close(self) -> None:
        self._file.close()


def line(event: Event) -> str:
    """``<ISO time> <LEVEL> <EVENT> key=value …``; a value with spaces or control characters is quoted as JSON."""
    level = "WARNING" if event.type in WARNINGS else "INFO"
    fields = " ".join(f"{key}={_plain(value)}" for key, value in event.fields.items() if value is not None)
    return f"{_iso(event.at_ms)} {level} {event.type} {fields}\n"


_second: tuple[int, str] = (-1, "")


def _iso(ms: int) -> str:
    """UTC with milliseconds; the second's text is kept, since events come in crowds."""
    global _second  # noqa: PLW0603 - a cache of one
    seconds, rest = divmod(ms, 1000)
    if _second[0] != seconds:
        _second = (seconds, datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S"))
    return f"{_second[1]}.{rest:03d}Z"


def _plain(value: Any) -> str:
    if type(value) is int:
        return str(value)
    text = value if isinstance(value, str) else json.dumps(value)
    if text.isprintable() and " " not in text and '"' not in text:
        return text
    return json.dumps(text)


def trouble(event: Event) -> str:
    """One JSON object a line. ``"error": "…"`` reads as the runbook greps for it: the outcome and the last line a job
    wrote, which is where a Python traceback says what it was, and no double quotes, at which the grep would stop. What
    that leaves out is in ``detail``."""
    body = {"at": _iso(event.at_ms), "event": str(event.type), **event.fields}
    error = body.get("error")
    if isinstance(error, str) and (short := _short(error)) != error:
        body["error"], body["detail"] = short, error
    if event.type not in (E.WORK_TIMEOUT, E.WORK_STALLED) and body.get("cause") not in ("timeout", "no_sign_of_life"):
        body.pop("timeout_ms", None)
    return json.dumps(body) + "\n"


def _short(error: str) -> str:
    outcome, _, said = error.partition(": ")
    lines = said.strip().splitlines()
    return (f"{outcome}: {lines[-1].strip()}" if lines else error.strip()).replace('"', "'")


class EventLog:
    """The listener and its thread. `close` writes what is waiting and ends it."""

    def __init__(self, directory: Path) -> None:
        self._events = RotatingFile(directory / "coordination.log")
        self._queue = RotatingFile(directory / "work_queue.log")
        self._waiting: deque[Event] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="event-log", daemon=True)
        self._thread.start()

    def on_events(self, batch: list[tuple[int, Event]]) -> None:
        """An EventBus listener; never blocks on a disk."""
        with self._wake:
            self._waiting.extend(event for _, event in batch)
            while len(self._waiting) > MAX_WAITING:
                self._waiting.popleft()
                self.dropped += 1
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._closing:
                    self._wake.wait()
                if not self._waiting:
                    return
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), 2_000))]
            self._write(self._events, line, batch)
            self._write(self._queue, trouble, [event for event in batch if event.type in TROUBLES])

    @staticmethod
    def _write(file: RotatingFile, form: Callable[[Event], str], batch: list[Event]) -> None:
        if not batch:
            return
        try:
            file.write("".join(form(event) for event in batch))
        except OSError as error:
            log.error("cannot write an event log: %s", error)

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._events.close()
        self._queue.close()
