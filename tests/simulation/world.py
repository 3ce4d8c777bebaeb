"""Virtual time, chance, and the network. One heap of (time, number): nothing happens but what is popped from it."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from p2p.ids import NodeId, VoterId, node_of
from p2p.messages import Message
from p2p.replica import Received, Unreachable
from tests.simulation.profile import Profile

if TYPE_CHECKING:
    from tests.simulation.node import Node

RESET_SECONDS = 0.001  # until both ends of a broken connection know


class Violation(AssertionError):
    """Something happened that must never happen. `kind` is the checker's name."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(f"{kind}: {what}")
        self.kind = kind


class World:
    """`run` pops events until a time. `note` writes the story, if anybody wants to read it."""

    def __init__(self, seed: int, profile: Profile, story: list[str] | None = None) -> None:
        self.seed, self.profile, self.story = seed, profile, story
        self.now = 0.0
        self.events = 0
        self.trace = 0  # a running hash of everything that happened
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        self.nodes: dict[NodeId, Node] = {}
        self.coverage: Counter[tuple[str, str]] = Counter()
        self.jobs = self.keys = 0  # numbers given to jobs and to requests' keys
        self.told: Callable[[Any, Any], None] = lambda request, value: None  # a client got its answer
        self.elected: list[Callable[[Any], None]] = []  # told of a node that has just begun to lead
        self.net = Network(self)
        self.draws = self.stream("draws")

    def stream(self, name: str) -> random.Random:
        """Random numbers of their own for every purpose: what one uses up does not change another's."""
        return random.Random(f"{name} {self.seed}")

    def at(self, when: float, act: Callable[..., None], *args: Any) -> None:
        self._number += 1
        heapq.heappush(self._heap, (when, self._number, act, args))

    def after(self, delay: float, act: Callable[..., None], *args: Any) -> None:
        self._number += 1
        heapq.heappush(self._heap, (self.now + delay, self._number, act, args))

    def run(self, until: float) -> None:
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until:
            self.now, number, act, args = pop(heap)
            self.events += 1
            self.trace = hash((self.trace, self.now, number))
            act(*args)
        self.now = until

    def note(self, who: str, what: str) -> None:
        if self.story is not None:
            self.story.append(f"{self.now:9.4f}  {who:<6} {what}")

    def cover(self, fault: str, role: str) -> None:
        """A fault has met a node in this role."""
        self.coverage[(fault, role)] += 1


class Network:
    """Directed links between nodes. `cut` holds those that carry nothing, `slow` the extra delay of those that do;
    `loss`, `duplicates` and `disorder` are for all of them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = world.stream("net")
        self.delay, self.jitter = world.profile.delay, world.profile.jitter
        self.cut: dict[tuple[NodeId, NodeId], int] = {}
        self.slow: dict[tuple[NodeId, NodeId], float] = {}
        self._links: dict[tuple[NodeId, VoterId], tuple[NodeId, NodeId]] = {}
        self._connection: dict[tuple[NodeId, NodeId], int] = {}  # broken so many times
        self.loss = self.duplicates = self.disorder = 0.0
        self.sent = self.delivered = 0

    def open(self, a: NodeId, b: NodeId) -> bool:
        """Whether something sent now from a to b would arrive."""
        return (a, b) not in self.cut

    def send(self, name: NodeId, sender: VoterId, to: VoterId, message: Message) -> None:
        """`name` is the sender's node."""
        self.sent += 1
        link = self._links.get((name, to)) or self._links.setdefault((name, to), (name, node_of(to)))
        if link in self.cut:
            return
        chance = self._rng.random
        if self.loss and chance() < self.loss:
            return
        delay = self.delay + self.jitter * chance() + self.slow.get(link, 0.0)
        if self.disorder and chance() < self.disorder:
            delay += 0.3 * chance()
        world = self._world
        broken = self._connection.get(link, 0)
        event = Received(sender, message)
        world.after(delay, self._deliver, link, broken, to, event)
        if self.duplicates and chance() < self.duplicates:
            world.after(delay + 0.2 * chance(), self._deliver, link, broken, to, event)

    def _deliver(self, link: tuple[NodeId, NodeId], broken: int, to: VoterId, event: Received) -> None:
        if link in self.cut or self._connection.get(link, 0) != broken:
            return
        node = self._world.nodes.get(link[1])
        if node is not None and node.voter == to:  # the transport drops what is for another disk
            self.delivered += 1
            node.receive(event)

    def reset(self, a: NodeId, b: NodeId) -> None:
        """The connection breaks: what is under way in it is lost, and both ends are told."""
        for link in ((a, b), (b, a)):
            self._connection[link] = self._connection.get(link, 0) + 1
            node, other = self._world.nodes.get(link[0]), self._world.nodes.get(link[1])
            if node is not None and other is not None:
                self._world.after(RESET_SECONDS, node.receive, Unreachable(other.voter))

    def block(self, links: list[tuple[NodeId, NodeId]]) -> None:
        for link in links:
            self.cut[link] = self.cut.get(link, 0) + 1

    def unblock(self, links: list[tuple[NodeId, NodeId]]) -> None:
        for link in links:
            left = self.cut.get(link, 0) - 1
            if left > 0:
                self.cut[link] = left
            else:
                self.cut.pop(link, None)

    def heal(self) -> None:
        self.cut.clear()
        self.slow.clear()
        self.loss = self.duplicates = self.disorder = 0.0
        self.delay, self.jitter = min(self.delay, 0.01), min(self.jitter, 0.005)
