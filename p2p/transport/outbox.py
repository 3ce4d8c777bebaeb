"""What waits to be sent on one link: bounded by count and by bytes, so that a slow peer costs a known amount of memory.

Decides what is dropped when it is full. A full control queue drops its oldest: the newest heartbeat or vote says all
that the ones before it said. A full log queue drops the newcomer: entries are of use only in order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

MiB = 1024 * 1024
BATCH_BYTES = MiB  # payloads are put together up to here; a larger one travels alone
BATCH_COUNT = 256
FRAME_OVERHEAD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one queue. One payload always fits into an empty queue."""

    count: int
    bytes: int
    drop: Literal["oldest", "newest"]


LIMITS = {
    "control": Limits(count=1024, bytes=8 * MiB, drop="oldest"),
    "log": Limits(count=4096, bytes=40 * MiB, drop="newest"),
    # A tunnel's streams hold their own credit, well below this; what does not fit ends the link, see `tunnel`.
    "tunnel": Limits(count=131_072, bytes=64 * MiB, drop="newest"),
}


class Outbox:
    """`dropped` counts what was given up, here or by `clear`."""

    __slots__ = ("_limits", "_queue", "bytes", "dropped")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._queue: deque[bytes] = deque()
        self.bytes = 0
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, payload: bytes) -> bool:
        """False: this one was dropped."""
        size = len(payload)
        queue, limits = self._queue, self._limits
        while queue and (len(queue) >= limits.count or self.bytes + size > limits.bytes):
            self.dropped += 1
            if limits.drop == "newest":
                return False
            self.bytes -= len(queue.popleft())
        queue.append(payload)
        self.bytes += size
        return True

    def take(self) -> list[bytes]:
        """The next batch, oldest first; empty if nothing waits."""
        queue = self._queue
        if not queue:
            return []
        batch = [queue.popleft()]
        size = len(batch[0]) + FRAME_OVERHEAD
        while queue and len(batch) < BATCH_COUNT and size + len(queue[0]) + FRAME_OVERHEAD <= BATCH_BYTES:
            batch.append(queue.popleft())
            size += len(batch[-1]) + FRAME_OVERHEAD
        self.bytes -= size - len(batch) * FRAME_OVERHEAD
        return batch

    def clear(self) -> None:
        """There is nobody to send it to."""
        self.dropped += len(self._queue)
        self._queue.clear()
        self.bytes = 0
