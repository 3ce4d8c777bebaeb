"""Signs of life of the running attempts, from one scan of /proc for all of them.

Decides: which numbers mean life.  Does not decide: how long without them is stuck.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence

from p2p.runner import family
from p2p.runner.attempts import Attempt
from p2p.runner.protocol import ActivitySample, Key


def sample(attempts: Sequence[Attempt], roots: Mapping[int, Attempt]) -> list[ActivitySample]:
    """Blocking.  An attempt that ends meanwhile is left out.  ``roots``: pids, see ``family.py``."""
    cpu_seconds: defaultdict[Key, float] = defaultdict(float)
    rss_mb: defaultdict[Key, float] = defaultdict(float)
    for stat, owner in family.members(roots):
        cpu_seconds[owner.key] += stat.cpu_seconds
        rss_mb[owner.key] += stat.rss_mb
    samples = []
    for attempt in attempts:
        logs = attempt.logs
        if attempt.pid is None or logs is None:
            continue  # it ended since it was asked for
        samples.append(
            ActivitySample(
                job=attempt.job,
                attempt=attempt.attempt,
                cpu_seconds=round(cpu_seconds[attempt.key] + attempt.stray_cpu_seconds, 2),
                rss_mb=round(rss_mb[attempt.key], 2),
                stdout_bytes=logs.stdout.written_bytes(),
                stderr_bytes=logs.stderr.written_bytes(),
                progress_mtime_ms=_mtime_ms(attempt.directory + "/progress.json"),
                over_memory_mb=round(attempt.over_memory_mb, 1),
            )
        )
    return samples


def _mtime_ms(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns // 1_000_000  # noqa: PTH116
    except OSError:
        return 0
