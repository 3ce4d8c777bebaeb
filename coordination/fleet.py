"""All nodes as placement sees them, and for each need the nodes that could take it now, best first.

A decision must not cost a look at every node: each need keeps a heap of the nodes that fit it, and only a node whose
free part has changed since is scored again for it (a lazily deleted heap: an entry of an older version of its node is
thrown away when it comes up). With N needs in use a change costs N set insertions at once and, for each need that is
asked about later, one score. Pure: no clock, no randomness; equal costs are settled by the node's name.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from coordination.placement import Need, Node, Scoring, without_hints

MAX_RANKS = 2_048  # needs remembered; the one longest unused goes


class Candidate(NamedTuple):
    """A node that fits a need now, and by which of its GPUs (numbers). The least is the best."""

    detour: int  # 1: a kind of node that should be kept for others, or that the job would rather not have
    cost: float
    name: str
    version: int
    gpus: tuple[int, ...]


@dataclass(slots=True)
class _Rank:
    need: Need  # as asked for, or without hints that no node could satisfy
    heap: list[Candidate] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)  # nodes to score again before the heap is believed
    epoch: int = -1


class Fleet:
    """Nodes by name. Only those that are open (they wait for work, and nobody has closed them) are candidates."""

    def __init__(self, scoring: Scoring) -> None:
        self._scoring = scoring
        self.nodes: dict[str, Node] = {}
        self.open: set[str] = set()
        self._ranks: OrderedDict[Need, _Rank] = OrderedDict()
        self._could: dict[Need, Need | None] = {}
        self.scored = 0  # how often a node was scored

    # -- nodes come, change and go --------------------------------------------------------------------------------

    def put(self, node: Node) -> Node:
        """This is the node now. Answers the object that stands for it from now on."""
        known = self.nodes.get(node.name)
        if known is not None and known.same_kind(node):
            known.become(node)
            self._touch(node.name)
            return known
        node.version = known.version + 1 if known is not None else 0
        self.nodes[node.name] = node
        self._forget()
        return node

    def remove(self, name: str) -> None:
        if self.nodes.pop(name, None) is not None:
            self.open.discard(name)
            self._forget()

    def _forget(self) -> None:
        """Who could ever serve which need may have changed, and with it which hints of failed attempts are followed."""
        self._ranks.clear()
        self._could.clear()

    def set_open(self, name: str, on: bool) -> None:
        """Whether this node may be given work now."""
        if on and name not in self.open:
            self.open.add(name)
            self.nodes[name].version += 1
            self._touch(name)
        elif not on:
            self.open.discard(name)  # its entries are passed over when they come up

    def take(self, need: Need, name: str, gpus: tuple[int, ...]) -> None:
        """The need is served by these GPUs of this node from now on."""
        self.nodes[name].take(need, gpus)
        self._touch(name)

    def give(self, need: Need, name: str, gpus: tuple[int, ...]) -> None:
        """The reverse of `take`."""
        self.nodes[name].give(need, gpus)
        self._touch(name)

    def _touch(self, name: str) -> None:
        for rank in self._ranks.values():
            rank.changed.add(name)

    # -- who could take it ----------------------------------------------------------------------------------------

    def could(self, need: Need) -> Need | None:
        """The need as it is looked for: with the hints of its failed attempts as far as any node could satisfy them;
        None if no node could ever serve it, even without."""
        if need in self._could:
            return self._could[need]
        found = next((variant for variant in without_hints(need) if self._any_admits(variant)), None)
        if not need.disk_mb:  # what a node has of disk moves all the time
            if len(self._could) >= 4 * MAX_RANKS:
                self._could.clear()
            self._could[need] = found
        return found

    def _any_admits(self, need: Need) -> bool:
        found = (True for node in self.nodes.values() if node.admits(need) is not None)
        return sum(islice(found, need.nodes)) >= need.nodes

    def _rank(self, need: Need) -> _Rank:
        rank = self._ranks.get(need)
        epoch = getattr(self._scoring, "epoch", 0)
        if rank is None:
            rank = self._ranks[need] = _Rank(self.could(need) or need)
            if len(self._ranks) > MAX_RANKS:
                self._ranks.popitem(last=False)
        else:
            self._ranks.move_to_end(need)
        if rank.epoch != epoch or len(rank.heap) > 4 * len(self.nodes) + 64:
            rank.epoch, rank.heap = epoch, []
            rank.changed = set(self.nodes)
        return rank

    def _score_changed(self, rank: _Rank) -> None:
        need, heap, scoring = rank.need, rank.heap, self._scoring
        for name in rank.changed:
            node = self.nodes.get(name)
            if node is None or name not in self.open:
                continue
            free = node.fitting(need)
            if free is None:
                continue
            cost, gpus = scoring.cost(need, node, free)
            if need.prefer == "memory":
                cost = -float(node.total_memory_mb)
            heapq.heappush(heap, Candidate(_detour(need, node), cost, name, node.version, gpus))
        self.scored += len(rank.changed)
        rank.changed.clear()

    def score(self, need: Need, node: Node, free: Sequence[int]) -> tuple[float, tuple[int, ...]]:
        """What serving the need there costs, and by which of these GPUs."""
        return self._scoring.cost(need, node, free)

    def candidates(self, need: Need) -> Generator[Candidate, None, None]:
        """The open nodes that fit now, best first. What is taken from them must wait until the iterator is closed."""
        rank = self._rank(need)
        if rank.changed:
            self._score_changed(rank)
        heap, seen = rank.heap, []
        try:
            while heap:
                best = heap[0]
                node = self.nodes.get(best.name)
                if node is None or node.version != best.version or best.name not in self.open:
                    heapq.heappop(heap)
                    continue
                seen.append(heapq.heappop(heap))
                yield best
        finally:
            for candidate in seen:
                heapq.heappush(heap, candidate)

    def best(self, need: Need) -> Candidate | None:
        """The best open node that fits now."""
        rank = self._rank(need)
        if rank.changed:
            self._score_changed(rank)
        heap = rank.heap
        while heap:
            best = heap[0]
            node = self.nodes.get(best.name)
            if node is not None and node.version == best.version and best.name in self.open:
                return best
            heapq.heappop(heap)
        return None


def _detour(need: Need, node: Node) -> int:
    """CPU work stays off GPU nodes while others can take it, unless it would rather be there."""
    if need.gpus:
        return 0
    return int(bool(node.gpus) != (need.prefer == "gpus"))
