"""How soon to look again at something that grows towards a bound, by how fast it grew since the last look.

Decides: the pause. Does not decide: what is done at the bound (``logs.py``, ``memory.py``).
"""

from __future__ import annotations

import time


class Pace:
    """Half of what it would take to use up the room at the rate last seen: a rate that doubles is met in time."""

    __slots__ = ("_at", "_least", "_most", "_rate", "_total")

    def __init__(self, total: float, *, least_seconds: float, most_seconds: float) -> None:
        self._least, self._most = least_seconds, most_seconds
        self._at, self._total, self._rate = time.monotonic(), total, 0.0

    def seen(self, total: float) -> None:
        """It has grown to that; what has shrunk does not grow."""
        now = time.monotonic()
        self._rate = max(total - self._total, 0.0) / max(now - self._at, 1e-6)
        self._at, self._total = now, total

    def pause(self, room: float) -> float:
        """Seconds until the next look, with so much left until the bound."""
        if self._rate <= 0.0:
            return self._most
        return min(max(room / self._rate / 2, self._least), self._most)
