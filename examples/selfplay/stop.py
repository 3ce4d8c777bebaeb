"""Stopping politely: SIGTERM lets the current game end, but not for long.

The orchestrator sends SIGTERM on cancel, drain and timeout, and SIGKILL a grace period later. Games are short, so a
step ends the one in progress and leaves; with a huge `--simulations` a game can take minutes, so after
`PATIENCE_SECONDS` it is abandoned between two moves.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from .errors import Stopped

PATIENCE_SECONDS = 0.8
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Remembers the first stop signal and when it came. `clock` gives monotonic seconds."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._signum: int | None = None
        self._since = 0.0

    def request(self, signum: int) -> None:
        if self._signum is None:
            self._signum, self._since = signum, self._clock()

    def check(self) -> None:
        """Between games: raises `Stopped` if a signal has come."""
        if self._signum is not None:
            raise Stopped(self._signum)

    def check_patience(self) -> None:
        """Between moves: raises `Stopped` if a signal came more than `PATIENCE_SECONDS` ago."""
        if self._signum is not None and self._clock() - self._since > PATIENCE_SECONDS:
            raise Stopped(self._signum)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """A `StopRequest` fed by SIGTERM and SIGINT; puts the former handlers back. Main thread only (Python's rule)."""
    stop = StopRequest()

    def on_signal(signum: int, _frame: FrameType | None) -> None:
        stop.request(signum)

    former = {signum: signal.signal(signum, on_signal) for signum in SIGNALS}
    try:
        yield stop
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)
