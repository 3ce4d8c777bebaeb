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
REMEMBERED = 200  # ends of one node
OTHERS_FAIL_AT_MOST = 0.5  # of what ended elsewhere in the window


@dataclass(slots=True)
class _Ends:
    """How attempts ended on one node lately: (when, job, whether well)."""

    ends: deque[tuple[int, str, bool]] = field(default_factory=deque)
    bad: int = 0  # of them

    def add(self, at: int, job: str, ok: bool) -> None:
        if len(self.ends) == REMEMBERED:
            self._drop()
        self.ends.append((at, job, ok))
        self.bad += not ok

    def _drop(self) -> None:
        self.bad -= not self.ends.popleft()[2]

    def forget_before(self, at: int) -> None:
        while self.ends and self.ends[0][0] < at:
            self._drop()

    def streak(self) -> int:
        """How many different jobs failed last, with none that succeeded in between; no more than `JOBS` are counted."""
        jobs: set[str] = set()
        for _, job, ok in reversed(self.ends):
            if ok or len(jobs) == JOBS:
                break
            jobs.add(job)
        return len(jobs)


class Trouble:
    """Counts ends by node."""

    def __init__(self) -> None:
        self._nodes: dict[str, _Ends] = {}

    def note(self, node: str, job: str, ok: bool, now: int) -> bool:
        """An attempt ended by itself. True if this node should get no more work."""
        mine = self._nodes.setdefault(node, _Ends())
        mine.add(now, job, ok)
        mine.forget_before(now - WINDOW_MS)
        return not ok and self._is_black_hole(node, now)

    def _is_black_hole(self, node: str, now: int) -> bool:
        return self._nodes[node].streak() == JOBS and self._others_do_better(node, now)

    def _others_do_better(self, node: str, now: int) -> bool:
        """Without a word from any other node it may as well be the jobs."""
        total = bad = 0
        for name, others in self._nodes.items():
            if name != node:
                others.forget_before(now - WINDOW_MS)
                total += len(others.ends)
                bad += others.bad
        return total > 0 and bad <= OTHERS_FAIL_AT_MOST * total

    def black_holes(self, now: int) -> list[str]:
        """The nodes that should get no more work. A sick node may have eaten all there was before any other node had
        ended anything; then it is found out once they have."""
        return [name for name in self._nodes if self._is_black_hole(name, now)]

    def forget(self, node: str) -> None:
        """It is given another chance."""
        self._nodes.pop(node, None)

    def forget_old(self, now: int) -> None:
        for ends in self._nodes.values():
            ends.forget_before(now - WINDOW_MS)
        for name in [name for name, ends in self._nodes.items() if not ends.ends]:
            del self._nodes[name]
