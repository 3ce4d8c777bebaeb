"""`Transport` without sockets, for tests: endpoints on one event loop, joined by a hub that loses and cuts.

It keeps the promises of `links.Links` and its limits; tests/conformance holds both to them. A cut is silent, as a
partition is: nobody is told. An endpoint that stops is told about, as a process that dies is.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection

from p2p.ids import NodeId, VoterId, node_of
from p2p.transport import Channel, OnLink, OnReceive, check_size, ignore
from p2p.transport.outbox import LIMITS, Outbox


class Hub:
    """The network. `loss` is the share of payloads that vanish, drawn from `seed`."""

    def __init__(self, *, seed: int = 0) -> None:
        self.loss = 0.0
        self.lost = 0  # payloads
        self._random = random.Random(seed)  # noqa: S311  (a test's dice)
        self._endpoints: dict[NodeId, MemoryTransport] = {}
        self._cuts: set[tuple[NodeId, NodeId]] = set()

    def join(self, voter: VoterId) -> MemoryTransport:
        """An endpoint for this voter; it is on the network from `start` to `stop`."""
        return MemoryTransport(self, voter)

    def cut(self, sender: NodeId, receiver: NodeId) -> None:
        """One way only."""
        self._cuts.add((sender, receiver))

    def partition(self, *groups: Collection[NodeId]) -> None:
        """Nothing passes between the groups, either way."""
        for group in groups:
            for other in groups:
                if group is not other:
                    self._cuts.update((a, b) for a in group for b in other)

    def heal(self) -> None:
        """Everything passes again."""
        self._cuts.clear()
        self.loss = 0.0

    def passes(self, sender: NodeId, receiver: NodeId) -> bool:
        """Whether one payload gets through now."""
        if (sender, receiver) in self._cuts or self._random.random() < self.loss:
            self.lost += 1
            return False
        return True

    def at(self, node: NodeId) -> MemoryTransport | None:
        """Whoever is on the network as this node, with whatever disk."""
        return self._endpoints.get(node)

    def plug(self, endpoint: MemoryTransport) -> None:
        """Takes the place of what an earlier start of the node has left."""
        self._endpoints[node_of(endpoint.voter)] = endpoint

    def unplug(self, endpoint: MemoryTransport) -> None:
        """Every endpoint that has heard of it is told."""
        if self._endpoints.get(node_of(endpoint.voter)) is endpoint:
            del self._endpoints[node_of(endpoint.voter)]
            for other in self._endpoints.values():
                other.tell(node_of(endpoint.voter), False)


class MemoryTransport:
    """See `p2p.transport.Transport`."""

    def __init__(self, hub: Hub, voter: VoterId) -> None:
        self.voter = voter
        self.on_receive: OnReceive = ignore
        self.on_link: OnLink = ignore
        self._hub = hub
        self._outboxes: dict[tuple[VoterId, Channel], Outbox] = {}
        self._told: dict[NodeId, bool] = {}
        self._running = False

    async def start(self) -> None:
        """On the network from here on."""
        self._hub.plug(self)
        self._running = True

    async def stop(self) -> None:
        """What is queued still goes, as far as it goes."""
        for (to, channel), outbox in self._outboxes.items():
            self._flush(to, channel, outbox)
        self._running = False
        self._hub.unplug(self)

    def send(self, to: VoterId, channel: Channel, payload: bytes) -> None:
        """See `p2p.transport.Transport.send`."""
        check_size(payload)
        if not self._running or to == self.voter:
            return
        outbox = self._outboxes.get((to, channel))
        if outbox is None:
            outbox = self._outboxes[to, channel] = Outbox(LIMITS[channel])
        if not len(outbox):
            asyncio.get_running_loop().call_soon(self._flush, to, channel, outbox)
        outbox.put(payload)

    def tell(self, node: NodeId, up: bool) -> None:
        """A hint, once per change; nobody who was never heard of is missed."""
        known = self._told.get(node)
        if self._running and known is not up and (up or known is not None):
            self._told[node] = up
            self.on_link(node, up)

    def _flush(self, to: VoterId, channel: Channel, outbox: Outbox) -> None:
        if not self._running:
            return
        while batch := outbox.take():
            for payload in batch:
                self._carry(to, channel, payload)

    def _carry(self, to: VoterId, channel: Channel, payload: bytes) -> None:
        here, there = node_of(self.voter), node_of(to)
        if not self._hub.passes(here, there):
            return
        endpoint = self._hub.at(there)
        if endpoint is None:
            self._told.setdefault(there, True)  # a refused dial is news even of a node never heard of
            self.tell(there, False)
            return
        if endpoint.voter != to:
            return
        self.tell(there, True)
        endpoint.tell(here, True)
        endpoint.on_receive(self.voter, payload)
