"""The same line in the log once in a while: what can be provoked from outside must not be able to fill a disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

MAX_KEYS = 256


class Seldom:
    """`say` logs at most once in `seconds` for each key, and then says how often it was silent."""

    def __init__(self, log: logging.Logger, seconds: float, now: Callable[[], float]) -> None:
        self._log, self._seconds, self._now = log, seconds, now
        self._said: dict[Hashable, tuple[float, int]] = {}

    def say(self, level: int, key: Hashable, text: str, *values: object) -> bool:
        """True: it was said."""
        now = self._now()
        at, silent = self._said.get(key, (float("-inf"), 0))
        if now - at < self._seconds:
            self._said[key] = (at, silent + 1)
            return False
        if len(self._said) >= MAX_KEYS:
            self._said.clear()
        self._said[key] = (now, 0)
        more = f" (and {silent} times before)" if silent else ""
        self._log.log(level, text + "%s", *values, more)
        return True
