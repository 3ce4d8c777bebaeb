"""Which processes are whose, told by descent: one scan of /proc for all attempts.

Every process of a job is its leader, an adopted orphan of it (a stray), or descends from one of the two, whatever
session or group it has moved to: the runner is their subreaper. Decides: who belongs to whom. Does not decide: what
they use (``activity.py``, ``memory.py``), who is signalled (``supervisor.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from p2p.runner import processes
from p2p.runner.processes import Stat

T = TypeVar("T")


def members(roots: Mapping[int, T]) -> list[tuple[Stat, T]]:
    """Blocking. ``roots``: the pids of leaders and strays, which nobody else can have while they are unreaped."""
    if not roots:
        return []
    stats = {stat.pid: stat for stat in processes.scan()}
    owners: dict[int, T | None] = dict(roots)
    found = []
    for stat in stats.values():
        owner = _owner(stat, stats, owners)
        if owner is None:
            owner = roots.get(stat.session)  # its parent has just died, and it is not known as a stray yet
        if owner is not None:
            found.append((stat, owner))
    return found


def _owner(stat: Stat, stats: Mapping[int, Stat], owners: dict[int, T | None]) -> T | None:
    """Climbs to the nearest ancestor whose owner is known, and remembers it for all on the way."""
    way, pid = [], stat.pid
    while pid not in owners and pid in stats:
        way.append(pid)
        pid = stats[pid].parent
    owner = owners.get(pid)
    owners.update(dict.fromkeys(way, owner))
    return owner
