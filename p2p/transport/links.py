"""All of a node's links: the real `Transport`, WebSockets on the node's one HTTP port (``GET /peer/link?channel=…``).

Decides who is dialled, and lives with every link from the handshake to its end. When to dial is `dialer`'s to say, with
whom `handshake`'s, which link carries what `table`'s, and what waits or is dropped `outbox`'s.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import Counter
from collections.abc import Callable, Collection, Coroutine
from functools import partial
from typing import Any, Protocol, TypeVar

import aiohttp
from aiohttp import web

from p2p.ids import NodeId, VoterId, node_of
from p2p.transport import Channel, OnLink, OnReceive, check_size, ignore
from p2p.transport.dialer import Dialer, Timing
from p2p.transport.handshake import Handshake
from p2p.transport.hello import DONE, REFUSED, STOPPING, Hello, encode
from p2p.transport.link import End, Link, Socket
from p2p.transport.outbox import LIMITS, Outbox
from p2p.transport.table import LinkTable

log = logging.getLogger(__name__)
T = TypeVar("T")

RAFT: tuple[str, ...] = ("control", "log")


class Consumer(Protocol):
    """Who takes what comes on a channel that is not Raft's."""

    def link_message(self, link: Link, payload: bytes) -> None: ...
    def link_down(self, link: Link) -> None: ...


class Links:
    """See `p2p.transport.Transport`. `voter` is who we are, `boot` a nonce of this start; `cluster` may be empty until
    `adopt`, and nobody is spoken with before. `resolve` gives the newest address of a node, None if it cannot be
    dialled; it is asked often and must be quick. The token is sent to whoever is dialled and never logged."""

    def __init__(
        self,
        *,
        cluster: str,
        voter: VoterId,
        boot: str,
        resolve: Callable[[NodeId], str | None],
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        timing: Timing | None = None,
    ) -> None:
        self.on_receive: OnReceive = ignore
        self.on_link: OnLink = ignore
        self.on_clone: Callable[[VoterId], None] = ignore  # a living voter was met twice; told at every refusal
        self.counts: Counter[str] = Counter()
        self._voter = voter
        self._resolve = resolve
        self._timing = timing or Timing()
        self._table: LinkTable[Link] = LinkTable()
        self._handshake = Handshake(
            cluster=cluster,
            voter=voter,
            boot=boot,
            token=token,
            tls=tls,
            timing=self._timing,
            rivals=self._table.rivals,
            displace=self._displace,
            on_clone=self._met_clone,
        )
        self.refused: Counter[str] = self._handshake.refused  # by kind, see `hello.Refused`
        self._dialers: dict[tuple[str, str], Dialer] = {}  # by voter, or by node where it is held, and channel
        self._held: dict[str, frozenset[NodeId]] = {}
        self._consumers: dict[str, Consumer] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._handlers: set[asyncio.Task[Any]] = set()
        self._running = False
        self._quiet = asyncio.Event()  # no link stands
        self._quiet.set()

    # -- what the node calls ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Dials whoever is held."""
        await self._handshake.start()
        self._running = True
        self._own(self._sweep())
        for channel, nodes in self._held.items():
            self.hold(nodes, channels=(channel,))

    async def stop(self) -> None:
        """Sends what is queued, within `Timing.close_seconds`, and closes everything."""
        self._running = False
        for link in self._table.links:
            link.shut(STOPPING, "this node is stopping")
        self._handshake.turn_away()
        for dialer in self._dialers.values():
            if dialer.link is None:
                dialer.end()
        await self._quiet.wait()
        for task in self._tasks:
            task.cancel()
        while self._tasks or self._handlers:
            await asyncio.gather(*self._tasks, *self._handlers, return_exceptions=True)
        await self._handshake.close()

    def send(self, to: VoterId, channel: Channel, payload: bytes) -> None:
        """See `p2p.transport.Transport.send`."""
        check_size(payload)
        link = self._table.best.get((to, channel))
        if link is not None:
            link.send(payload)
            if link.dialed:
                return
        dialer = self._dialer_of(to, channel)
        if dialer is not None:
            dialer.want()
            if link is None:
                dialer.outbox.put(payload)
        elif link is None:
            self.counts["dropped"] += 1

    def hold(self, nodes: Collection[NodeId], *, channels: Collection[str] = RAFT) -> None:
        """Keeps these channels open to exactly these nodes from now on, whether or not there is anything to send: a
        node that cannot be dialled is reached over what it holds. To others it dials when it sends, as all do."""
        for channel in channels:
            self._held[channel] = frozenset(nodes)
            for (target, other), dialer in self._dialers.items():
                if other == channel:
                    dialer.held = target in self._held[channel]
            if self._running:
                for node in nodes:
                    dialer = self._dialers.get((node, channel)) or self._dial(node, channel)
                    dialer.held = True

    def adopt(self, cluster: str) -> None:
        """This node has become a member of a cluster."""
        self._handshake.cluster = cluster
        for link in self._table.links:
            link.shut(REFUSED, "cluster: this node has joined another")

    def carry(self, channel: str, consumer: Consumer) -> None:
        """Gives another channel to somebody; before `start`."""
        self._consumers[channel] = consumer

    def newest(self, node: NodeId, channel: str) -> Link | None:
        """The newest link that stands with a node."""
        return self._table.newest(node, channel)

    def peers(self) -> list[dict[str, Any]]:
        """Every link, for a status page."""
        return [
            {
                "voter": link.voter,
                "channel": link.channel,
                "dialed": link.dialed,
                "seconds": round(link.age, 3),
                "sent": link.sent,
                "received": link.received,
                "queued_bytes": link.outbox.bytes,
                "clock_ahead_ms": link.clock_ahead_ms,
            }
            for link in self._table.links
        ]

    def totals(self) -> dict[str, int]:
        """Counters since the start: payloads ``sent received dropped``, ``frames`` sent, ``dials``, ``refused``."""
        links, dialers = self._table.links, self._dialers.values()
        waiting = {id(box): box for box in (*(link.outbox for link in links), *(dialer.outbox for dialer in dialers))}
        return {
            "sent": self.counts["sent"] + sum(link.sent for link in links),
            "received": self.counts["received"] + sum(link.received for link in links),
            "frames": self.counts["frames"] + sum(link.frames_sent for link in links),
            "dropped": self.counts["dropped"] + sum(box.dropped for box in waiting.values()),
            "dials": self.counts["dials"],
            "refused": self.refused.total(),
        }

    # -- dialling --------------------------------------------------------------------------------------------------

    def _dialer_of(self, to: VoterId, channel: str) -> Dialer | None:
        """Who dials this voter; None if nobody should."""
        dialer = self._dialers.get((to, channel))
        if dialer is not None or not self._running:
            return dialer
        node = node_of(to)
        if node in self._held.get(channel, ()) or to == self._voter or self._resolve(node) is None:
            return None
        return self._dial(to, channel)

    def _dial(self, target: str, channel: str) -> Dialer:
        outbox = Outbox(LIMITS[channel])
        dialer = self._dialers[target, channel] = Dialer(partial(self._attempt, target, channel), outbox, self._timing)

        async def run() -> None:
            try:
                await dialer.run()
            finally:
                del self._dialers[target, channel]
                self.counts["dropped"] += outbox.dropped

        dialer.task = self._own(run())
        return dialer

    async def _attempt(self, target: str, channel: str, dialer: Dialer) -> float:
        """One link from dial to end; see `Dialer`."""
        node = node_of(VoterId(target))
        address = self._resolve(node)
        if address is None or not self._handshake.cluster or not self._running:
            return 0.0
        self.counts["dials"] += 1
        try:
            ws = await self._handshake.connect(address, channel, own=self._own)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._failed(node, address, error)
            return 0.0
        peer = await self._handshake.greet(ws, target, channel, address)
        if peer is None:
            return 0.0
        link = self._link(ws, channel, peer, dialed=True, outbox=dialer.outbox)
        dialer.link = link
        try:
            await self._live(link)
        finally:
            dialer.link = None
            dialer.wanted_at = max(dialer.wanted_at, link.sent_at)
        return link.age

    def _failed(self, node: NodeId, address: str, error: Exception) -> None:
        what = str(error) or type(error).__name__
        self._handshake.say(("dial", node), "cannot dial %s at %s: %s", node, address, what)
        cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
        if isinstance(cause, ConnectionError) and self._table.refused(node):
            self.on_link(node, False)

    # -- being dialled ---------------------------------------------------------------------------------------------

    async def serve(self, request: web.Request) -> web.WebSocketResponse[bool]:
        """The handler of ``GET /peer/link``; who may ask at all has been decided before it."""
        if not self._running:
            raise web.HTTPServiceUnavailable(reason="this node is stopping")
        ws = self._handshake.upgrade()
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        try:
            await ws.prepare(request)
            await self._accept(ws, request.query.get("channel", ""), str(request.remote))
        finally:
            self._handlers.discard(task)
        return ws

    async def _accept(self, ws: Socket, channel: str, remote: str) -> None:
        known = channel in RAFT or channel in self._consumers
        peer = await self._handshake.accept(ws, channel=channel, known=known, remote=remote)
        if peer is None:
            return
        link = self._link(ws, channel, peer, dialed=False, outbox=Outbox(LIMITS[channel]))
        for (target, other), dialer in self._dialers.items():
            if other == channel and node_of(VoterId(target)) == link.node:
                dialer.hurry()
        await self._live(link, encode(self._handshake.hello(peer.sender)))

    # -- both ------------------------------------------------------------------------------------------------------

    def _link(self, ws: Socket, channel: str, peer: Hello, *, dialed: bool, outbox: Outbox) -> Link:
        """The link stands from here on: nothing is awaited between the last check of its peer and this."""
        consumer = self._consumers.get(channel)
        link = Link(
            ws,
            channel=channel,
            peer=peer,
            dialed=dialed,
            outbox=outbox,
            deliver=consumer.link_message if consumer is not None else self._deliver,
            close_seconds=self._timing.close_seconds,
        )
        self._quiet.clear()
        if self._table.add(link):
            self.on_link(link.node, True)
        if not self._running:
            link.shut(STOPPING, "this node is stopping")
        return link

    async def _live(self, link: Link, greeting: bytes | None = None) -> None:
        end = End(None, "it was cancelled")
        try:
            end = await link.run(greeting)
        except Exception:
            log.exception("the %s link with %s ends: what came on it could not be taken", link.channel, link.voter)
        finally:
            self._forget(link, end)

    def _forget(self, link: Link, end: End) -> None:
        if link not in self._table:
            return  # it had to give way to a newer start of its voter
        self.counts.update(sent=link.sent, received=link.received, frames=link.frames_sent)
        if not link.dialed:
            self.counts["dropped"] += link.outbox.dropped
        news = self._table.remove(link, broken=end.broken)
        consumer = self._consumers.get(link.channel)
        if consumer is not None:
            consumer.link_down(link)
        if not len(self._table):
            self._quiet.set()
        if not self._running:
            return
        if end.broken:
            key = ("broken", link.voter, link.channel)
            self._handshake.say(key, "%s link with %s: %s", link.channel, link.voter, end.reason)
        if news:
            self.on_link(link.node, False)

    def _deliver(self, link: Link, payload: bytes) -> None:
        self.on_receive(link.voter, payload)

    def _met_clone(self, voter: VoterId) -> None:
        self.on_clone(voter)

    def _displace(self, link: Link) -> None:
        self._forget(link, End(None, "its voter has been restarted"))
        link.disown()

    async def _sweep(self) -> None:
        """Closes what we dialled and nobody uses."""
        idle = self._timing.idle_seconds
        while True:
            await asyncio.sleep(idle / 4)
            for dialer in self._dialers.values():
                link = dialer.link
                if link is not None and not dialer.held and link.idle_seconds > idle:
                    link.shut(DONE, "idle")

    def _own(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
