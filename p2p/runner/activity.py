"""Signs of life of the running attempts, from one scan of /proc for all of them.

Decides: which numbers mean life.  Does not decide: how long without them is stuck.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence

from p2p.runner import processes
from p2p.runner.attempts import Attempt
from p2p.runner.protocol import ActivitySample


def sample(attempts: Sequence[Attempt]) -> list[ActivitySample]:
    """Blocking.  An attempt that ends meanwhile is left out."""
    cpu_seconds: defaultdict[int, float] = defaultdict(float)
    rss_mb: defaultdict[int, float] = defaultdict(float)
    wanted = {attempt.pid for attempt in attempts}
    if wanted:
        for stat in processes.scan():
            if stat.session in wanted:
                cpu_seconds[stat.session] += stat.cpu_seconds
                rss_mb[stat.session] += stat.rss_mb
    samples = []
    for attempt in attempts:
        logs = attempt.logs
        if attempt.pid is None or logs is None:
            continue  # it ended since it was asked for
        samples.append(
            ActivitySample(
                job=attempt.job,
                attempt=attempt.attempt,
                cpu_seconds=round(cpu_seconds[attempt.pid], 2),
                rss_mb=round(rss_mb[attempt.pid], 2),
                stdout_bytes=logs.stdout.written_bytes(),
                stderr_bytes=logs.stderr.written_bytes(),
                progress_mtime_ms=_mtime_ms(attempt.directory + "/progress.json"),
            )
        )
    return samples


def _mtime_ms(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns // 1_000_000  # noqa: PTH116
    except OSError:
        return 0
