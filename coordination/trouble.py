"""Which nodes make jobs fail: many different jobs, one after the other, that other nodes have no such trouble with.
Pure: time is an argument. A node that is found out is cordoned by the leader, which says so (`Dispatcher`).

A bad driver or a full disk fails every job within seconds, so the fastest node to ask for work becomes the one that
eats the queue (the "black hole node" of grid and Condor pools). A bad job fails everywhere; hence the comparison.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

JOBS = 5  # different jobs that failed on it, with none that succeeded in between
WINDOW_MS = 600_000
OTHERS_FAIL_AT_MOST = 0.5  # of what ended elsewhere in the window


@dataclass(slots=True)
class _Ends:
    """How attempts ended on one node lately: (when, job, whether well)."""

    ends: deque[tuple[int, str, bool]] = field(default_factory=lambda: deque(maxlen=200))

    def since(self, at: int) -> list[tuple[int, str, bool]]:
        while self.ends and self.ends[0][0] < at:
            self.ends.popleft()
        return list(self.ends)


class Trouble:
    """Counts ends by node."""

    def __init__(self) -> None:
        self._nodes: dict[str, _Ends] = {}

    def note(self, node: str, job: str, ok: bool, now: int) -> bool:
        """An attempt ended by itself. True if this node should get no more work."""
        self._nodes.setdefault(node, _Ends()).ends.append((now, job, ok))
        return not ok and self._is_black_hole(node, now)

    def _is_black_hole(self, node: str, now: int) -> bool:
        streak: set[str] = set()
        for _, job, ok in reversed(self._nodes[node].since(now - WINDOW_MS)):
            if ok:
                break
            streak.add(job)
        if len(streak) < JOBS:
            return False
        elsewhere = [
            ok for name, ends in self._nodes.items() if name != node for _, _, ok in ends.since(now - WINDOW_MS)
        ]
        # Without a word from any other node it may as well be the jobs.
        return bool(elsewhere) and elsewhere.count(False) <= OTHERS_FAIL_AT_MOST * len(elsewhere)

    def forget(self, node: str) -> None:
        """It is given another chance."""
        self._nodes.pop(node, None)

    def forget_old(self, now: int) -> None:
        for name in [name for name, ends in self._nodes.items() if not ends.since(now - WINDOW_MS)]:
            del self._nodes[name]
