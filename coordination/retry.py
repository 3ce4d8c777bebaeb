"""When a failed attempt may be tried again. Pure: the jitter is a hash, so every voter computes the same delay."""

from __future__ import annotations

from zlib import crc32

MAX_BACKOFF_MS = 600_000


def backoff_ms(base_ms: int, failures: int, job_id: str) -> int:
    """The wait before the next attempt, in ms: `base_ms` doubled for each failure beyond the first, capped at ten
    minutes, then jittered down by up to a half so that a thousand jobs felled by one cause do not return together
    (Brooker, "Exponential Backoff and Jitter", AWS 2015).

    The jitter comes from ``crc32(job_id:failures)`` and not from a random source: `queue_state.apply` must give
    the same answer on every voter.
    """
    if base_ms <= 0:
        return 0
    full = min(base_ms << min(failures - 1, 30), MAX_BACKOFF_MS)
    return full - (full * (crc32(f"{job_id}:{failures}".encode()) % 1000)) // 2000
