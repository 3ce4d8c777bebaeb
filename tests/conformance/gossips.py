"""Real gossip shells on real HTTP servers on loopback, and waiting for what they come to believe."""

from __future__ import annotations

import asyncio
import hmac
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack
from aiohttp import web

from p2p.ids import ClusterId, DiskId, NodeId
from p2p.membership.figures import Figures
from p2p.membership.member import MalformedMessage, State
from p2p.transport.gossip import Gossip, GossipBusy, GossipStopped

PATIENCE_SECONDS = 20.0

# The proportions of the defaults, five times as fast: a death takes about a second.
FAST = Figures(
    probe_interval_seconds=0.2,
    probe_timeout_seconds=0.1,
    gossip_interval_seconds=0.04,
    push_pull_seconds=2.0,
    reconnect_seconds=2.0,
    anchor_fresh_seconds=0.7,
)


@dataclass
class Peer:
    """One node: a shell, and the server that a real node would have."""

    name: str
    gossip: Gossip
    token: str | None = None
    runner: web.AppRunner | None = None
    seen: list[Any] = field(default_factory=list)
    description: dict[str, Any] = field(default_factory=dict)
    requests: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def address(self) -> str:
        assert self.gossip.me.address is not None
        return self.gossip.me.address

    async def serve(self, port: int) -> None:
        async def gossip(request: web.Request) -> web.Response:
            self.requests += 1
            given = request.headers.get("Authorization", "")
            if self.token is not None and not hmac.compare_digest(given, f"Bearer {self.token}"):
                return web.Response(status=401)
            try:
                return web.Response(body=await self.gossip.handle(await request.read()))
            except MalformedMessage:
                return web.Response(status=400)
            except (GossipBusy, GossipStopped):
                return web.Response(status=503)

        async def capabilities(request: web.Request) -> web.Response:
            node = request.query.get("node")
            found = self.description if node is None else {"asked_for": node}
            return web.Response(body=msgpack.packb(found))

        app = web.Application(client_max_size=32 << 20)
        app.router.add_post("/peer/gossip", gossip)
        app.router.add_get("/peer/capabilities", capabilities)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", port).start()

    async def kill(self) -> None:
        """Gone without a word."""
        if self.runner is not None:
            await self.runner.cleanup()
            self.runner = None
        await self.gossip.stop(leave=False)

    async def stop(self) -> None:
        await self.gossip.stop()
        if self.runner is not None:
            await self.runner.cleanup()
            self.runner = None

    def state_of(self, name: str) -> State | None:
        member = self.gossip.member(NodeId(name))
        return None if member is None else member.state


class Cluster:
    """Makes peers and ends them all."""

    def __init__(self) -> None:
        self.peers: dict[str, Peer] = {}
        self.all: list[Peer] = []
        self._news = asyncio.Event()

    async def start(
        self,
        name: str,
        *,
        dialable: bool = True,
        token: str | None = None,
        cluster: str = "",
        port: int | None = None,
        **options: Any,
    ) -> Peer:
        port = port or free_port()
        options.setdefault("figures", FAST)
        options.setdefault("disk", DiskId(f"disk-{name}"))
        gossip = Gossip(
            NodeId(name),
            address=f"127.0.0.1:{port}" if dialable else None,
            cluster=ClusterId(cluster),
            token=token,
            draw=random.Random(name),
            **options,
        )
        peer = Peer(name, gossip, token)
        gossip.on_change = lambda *told: self._note(peer, ("change", *told))
        gossip.on_update = lambda *told: self._note(peer, ("update", *told))
        gossip.on_hint = lambda hint: self._note(peer, ("hint", hint))
        gossip.on_conflict = lambda conflict: self._note(peer, ("conflict", conflict))
        gossip.on_refused = lambda refusal: self._note(peer, ("refused", refusal))
        gossip.on_joined = lambda joined: self._note(peer, ("joined", joined))
        gossip.on_capabilities = lambda *told: self._note(peer, ("capabilities", *told))
        gossip.on_broken = lambda error: self._note(peer, ("broken", error))
        self.peers[name] = peer
        self.all.append(peer)
        await gossip.start()
        if dialable:
            await peer.serve(port)
        return peer

    def _note(self, peer: Peer, what: tuple[Any, ...]) -> None:
        peer.seen.append(what)
        self._news.set()

    async def until(self, true: Callable[[], bool]) -> None:
        """Waits for it: looks whenever any peer has told something."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not true():
                self._news.clear()
                await self._news.wait()

    async def end(self) -> None:
        for peer in self.all:
            await peer.kill()
        assert not any(kind == "broken" for peer in self.all for kind, *_ in peer.seen)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
