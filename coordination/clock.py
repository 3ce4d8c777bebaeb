"""The two clocks of the work layer, at a seam so that tests can hold time still."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """`now_ms` is unix time, data only; `mono_ms` measures leases and must run through suspend (PROTOCOL §2.14)."""

    def now_ms(self) -> int: ...
    def mono_ms(self) -> int: ...


class SystemClock:
    """The machine's clocks."""

    _BOOT = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def mono_ms(self) -> int:
        return time.clock_gettime_ns(self._BOOT) // 1_000_000
