"""Named deadlines on one heap. Cancelling and moving are cheap: a stale heap entry is skipped when it comes up."""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import Any

SLACK = 64  # stale entries tolerated beyond the live ones, before the heap is rebuilt


class Timers:
    """`postpone` moves all of them at once, at no cost, by moving the origin."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Any]] = []
        self._live: dict[Hashable, tuple[float, int, Any]] = {}
        self._count = 0
        self._shift = 0.0

    def set(self, key: Hashable, at: float) -> None:
        """Arms `key`, or moves it."""
        self._count += 1
        entry = (at - self._shift, self._count, key)
        self._live[key] = entry
        heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._live) + SLACK:
            self._heap = list(self._live.values())
            heapify(self._heap)

    def cancel(self, key: Hashable) -> None:
        self._live.pop(key, None)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._live

    def __len__(self) -> int:
        return len(self._live)

    def next(self) -> float | None:
        """When the first one is due."""
        heap, live = self._heap, self._live
        while heap and live.get(heap[0][2]) is not heap[0]:
            heappop(heap)
        return heap[0][0] + self._shift if heap else None

    def pop_due(self, now: float) -> Hashable | None:
        """The first key that is due, disarmed; None if none is."""
        at = self.next()
        if at is None or at > now:
            return None
        key: Hashable = heappop(self._heap)[2]
        del self._live[key]
        return key

    def postpone(self, seconds: float) -> None:
        self._shift += seconds
