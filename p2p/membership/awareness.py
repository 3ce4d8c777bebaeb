"""How far a node trusts itself: Lifeguard's local health multiplier (Dadgar et al. 2017, §IV-A).

0 is healthy. Every sign that *this* node is slow raises it: probes without an answer, helpers that did not even say
nack, having to refute, an event loop that runs late. It stretches the node's own probes and, from `silent` on, keeps it
from suspecting others: a node that cannot hear is not a witness.
"""

from __future__ import annotations


class Awareness:
    """`score` runs from 0 to `highest`."""

    def __init__(self, *, highest: int, silent: int, enabled: bool = True) -> None:
        self._highest = highest
        self._silent = silent
        self._enabled = enabled
        self.score = 0

    def add(self, delta: int) -> None:
        if self._enabled:
            self.score = min(max(self.score + delta, 0), self._highest)

    def scaled(self, seconds: float) -> float:
        """A timeout, stretched by how little this node trusts itself."""
        return seconds * (self.score + 1)

    @property
    def may_accuse(self) -> bool:
        return self.score < self._silent
