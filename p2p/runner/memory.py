"""How much memory a job takes from its neighbours, watched where no cgroup holds it.

Counted is what cannot be dropped: private and shared memory, each page once, however many processes of the job share
it. Files that are mapped are not: the kernel takes those pages back when it needs them, and a job that maps a data set
of 100 GB harms nobody. The exact number (``smaps_rollup``) costs a walk over all pages, so cheaper upper bounds are
asked first, and it is only needed for a job that is near its limit or maps or shares a lot:

    resident, from the scan        >= private and shared, process by process        >= each page counted once

Not seen: files in /dev/shm that no process maps, what grows and shrinks between two looks, and swap. A cgroup sees all
of it (``groups.py``). Decides: how much it is, and when to look again. Does not decide: what follows.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from p2p.runner import family
from p2p.runner.attempts import Attempt
from p2p.runner.pace import Pace
from p2p.runner.processes import Stat
from p2p.runner.protocol import Key

LEAST_SECONDS, MOST_SECONDS = 0.05, 0.5  # between two looks
MOST_SHARE = 0.05  # of one core's time, for looking
_ROLLUP = Path("/proc/self/smaps_rollup").exists()  # a kernel may be built without


class MemoryWatch:
    """Belongs to one thread."""

    def __init__(self) -> None:
        self._paces: dict[Key, Pace] = {}

    def look(
        self, limited: Sequence[Attempt], roots: Mapping[int, Attempt]
    ) -> tuple[list[tuple[Attempt, float]], float]:
        """Blocking. Who has more than its limit, with how many MB, and how many seconds the next look may wait."""
        began = time.monotonic()
        processes: defaultdict[Key, list[Stat]] = defaultdict(list)
        for stat, owner in family.members(roots):
            if stat.alive:
                processes[owner.key].append(stat)
        keys = {attempt.key for attempt in limited}
        self._paces = {key: pace for key, pace in self._paces.items() if key in keys}
        over, pause = [], MOST_SECONDS
        for attempt in limited:
            used = used_mb(processes[attempt.key], attempt.memory_limit_mb)
            if used > attempt.memory_limit_mb:
                over.append((attempt, used))
            pace = self._paces.get(attempt.key)
            if pace is None:
                pace = self._paces[attempt.key] = Pace(0.0, least_seconds=LEAST_SECONDS, most_seconds=MOST_SECONDS)
            pace.seen(used)
            pause = min(pause, pace.pause(max(attempt.memory_limit_mb - used, 0.0)))
        return over, max(pause, (time.monotonic() - began) / MOST_SHARE)


def used_mb(processes: Sequence[Stat], limit_mb: float) -> float:
    """Exact if it is above the limit, else an upper bound."""
    bound = sum(stat.rss_mb for stat in processes)
    if bound <= limit_mb:
        return bound
    unshared = {stat.pid: _resident_mb(stat.pid, stat.rss_mb) for stat in processes}
    bound = sum(unshared.values())
    if bound <= limit_mb:
        return bound
    return sum(_proportional_mb(pid, at_most) for pid, at_most in unshared.items())


def _resident_mb(pid: int, rss_mb: float) -> float:
    """Private and shared memory that is resident, without mapped files (man 5 proc_pid_status)."""
    found = _sum_mb(f"/proc/{pid}/status", (b"RssAnon:", b"RssShmem:"))
    return rss_mb if found is None else found


def _proportional_mb(pid: int, at_most: float) -> float:
    """The same, a page that n processes share counted as 1/n (man 5 proc_pid_smaps)."""
    found = _sum_mb(f"/proc/{pid}/smaps_rollup", (b"Pss_Anon:", b"Pss_Shmem:")) if _ROLLUP else None
    return at_most if found is None else found


def _sum_mb(path: str, names: tuple[bytes, ...]) -> float | None:
    """Of these lines; 0 for a process that has gone, None for one that is not ours to read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(fd, 1 << 14)
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    except OSError:
        return None
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(names)) / 1024
