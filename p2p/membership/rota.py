"""Whose turn it is: a shuffled round for probes, and random picks, at a cost that does not grow with the members.

SWIM §4.3: probing in shuffled rounds bounds the time to the first probe of a dead member to two rounds; picking at
random would not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

from p2p.ids import NodeId


class Draw(Protocol):
    """Where randomness comes from; `random.Random` is one."""

    def random(self) -> float: ...

    def randrange(self, start: int, stop: int, /) -> int: ...

    def shuffle(self, x: list[NodeId], /) -> None: ...


class Rota:
    """A set of node ids. What lies before the cursor has had its turn in this round."""

    __slots__ = ("_cursor", "_draw", "_order", "_place")

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self._order: list[NodeId] = []
        self._place: dict[NodeId, int] = {}
        self._cursor = 0

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, node: NodeId) -> bool:
        return node in self._place

    def __iter__(self) -> Iterator[NodeId]:
        return iter(self._order)

    def add(self, node: NodeId) -> None:
        """A new one gets its turn in this round, at a random place among those still to come."""
        if node in self._place:
            return
        self._place[node] = len(self._order)
        self._order.append(node)
        self._swap(len(self._order) - 1, self._draw.randrange(self._cursor, len(self._order)))

    def discard(self, node: NodeId) -> None:
        if node not in self._place:
            return
        at = self._place[node]
        if at < self._cursor:
            self._cursor -= 1
            self._swap(at, self._cursor)
            at = self._cursor
        self._swap(at, len(self._order) - 1)
        self._order.pop()
        del self._place[node]

    def next(self) -> NodeId | None:
        """Whose turn it is; a new round in a new order when all have had theirs."""
        if not self._order:
            return None
        if self._cursor >= len(self._order):
            self._draw.shuffle(self._order)
            self._place = {node: at for at, node in enumerate(self._order)}
            self._cursor = 0
        self._cursor += 1
        return self._order[self._cursor - 1]

    def pick(self, count: int, but: Collection[NodeId] = ()) -> list[NodeId]:
        """Up to `count` different ones at random, none of them in `but`."""
        total = len(self._order)
        if total <= 2 * (count + len(but)):
            rest = [node for node in self._order if node not in but]
            self._draw.shuffle(rest)
            return rest[:count]
        picked: list[NodeId] = []  # more than half of all are eligible, so few draws are wasted
        while len(picked) < count:
            node = self._order[self._draw.randrange(0, total)]
            if node not in but and node not in picked:
                picked.append(node)
        return picked

    def _swap(self, a: int, b: int) -> None:
        order = self._order
        order[a], order[b] = order[b], order[a]
        self._place[order[a]], self._place[order[b]] = a, b
