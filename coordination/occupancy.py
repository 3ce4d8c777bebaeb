"""What runs where, as far as the leader has given it, and what that leaves of each node. Pure.

A worker's word on what it has free and the leader's books differ for a moment after each change: what was given to it a
moment ago may not be in its sums yet, what has ended there is not in the books yet. No more is believed to be free than
both say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from coordination.placement import Need, Node, Offer

NEVER = 1 << 62


@dataclass(slots=True, kw_only=True, eq=False)
class Running:
    """An attempt on one node. `ends_ms` is when its limits will have ended it (NEVER: nothing will)."""

    job: str
    attempt: int
    node: str
    need: Need
    gpus: tuple[str, ...] = ()
    group: str = "default"
    kind: str = "command"
    priority: int = 0
    preemptible: bool = True
    started_ms: int = 0
    ends_ms: int = NEVER
    grace_ms: int = 0  # between SIGTERM and SIGKILL
    stopping: bool = False  # it has been asked to make way
    part: float = 0.0  # of the cluster, as it was when this began


class Began(NamedTuple):
    """What became of a decision on one node: an attempt of this name."""

    node: str
    job: str
    attempt: int
    ends_ms: int
    grace_ms: int
    preemptible: bool


class Occupancy:
    """Attempts by node. A gang's members are an attempt each, of one job on several nodes."""

    def __init__(self) -> None:
        self.running: dict[str, dict[str, Running]] = {}  # node -> job -> attempt
        self._left: dict[str, tuple[Offer, Node]] = {}  # what a node has in all, and what `running` leaves of it
        self._ending: dict[str, list[Running]] = {}
        self._priorities: Counter[int] = Counter()  # of those that may be asked to make way

    def on(self, node: str) -> Collection[Running]:
        return self.running.get(node, {}).values()

    def ending(self, node: str) -> list[Running]:
        """What runs there, in the order in which it will have ended."""
        known = self._ending.get(node)
        if known is None:
            known = sorted(self.on(node), key=lambda attempt: (attempt.ends_ms, -attempt.started_ms, attempt.job))
            self._ending[node] = known
        return known

    def least_priority(self) -> int:
        """Of all that may be asked to make way."""
        return min(self._priorities, default=NEVER)

    def add(self, attempt: Running) -> None:
        self.running.setdefault(attempt.node, {})[attempt.job] = attempt
        self._ending.pop(attempt.node, None)
        self._count(attempt, 1)
        if attempt.node in self._left:
            left = self._left[attempt.node][1]
            left.take(attempt.need, left.numbers(attempt.gpus))

    def remove(self, job: str, node: str) -> Running | None:
        mine = self.running.get(node, {})
        attempt = mine.pop(job, None)
        if attempt is None:
            return None
        if not mine:
            del self.running[node]
        self._ending.pop(node, None)
        self._count(attempt, -1)
        if node in self._left:
            left = self._left[node][1]
            left.give(attempt.need, left.numbers(attempt.gpus))
        return attempt

    def rename(self, standing: str, began: Began, now: int) -> None:
        """What stood in the books by another name is this attempt, and starts now."""
        mine = self.running[began.node]
        known = mine.pop(standing)
        self._count(known, -1)
        known.job, known.attempt, known.started_ms = began.job, began.attempt, now
        known.ends_ms, known.grace_ms, known.preemptible = began.ends_ms, began.grace_ms, began.preemptible
        self._count(known, 1)
        mine[known.job] = known
        self._ending.pop(known.node, None)

    def _count(self, attempt: Running, n: int) -> None:
        if attempt.preemptible:
            self._priorities[attempt.priority] += n
            if not self._priorities[attempt.priority]:
                del self._priorities[attempt.priority]

    def limit(self, node: Node, total: Offer | None) -> None:
        """Lessens what a node says is free to what the books leave of what it has in all, if it says that."""
        for attempt in self.on(node.name):
            word = attempt.need.anti_affinity
            if word is not None:
                node.tags[word] = node.tags.get(word, 0) + 1
        if total is None:
            self._left.pop(node.name, None)
            return
        known = self._left.get(node.name)
        if known is None or known[0] != total:
            known = self._left[node.name] = (total, Node.of(total))
            for attempt in self.on(node.name):
                known[1].take(attempt.need, known[1].numbers(attempt.gpus))
        left = known[1]
        node.cpu_milli = min(node.cpu_milli, left.cpu_milli)
        node.memory_mb = min(node.memory_mb, left.memory_mb)
        node.disk_mb = min(node.disk_mb, left.disk_mb)
        for mine, its in zip(node.gpus, left.gpus, strict=True):
            mine.share, mine.memory_mb = min(mine.share, its.share), min(mine.memory_mb, its.memory_mb)

    def forget(self, node: str) -> None:
        """What it has in all is not known any more; what runs there still does."""
        self._left.pop(node, None)
