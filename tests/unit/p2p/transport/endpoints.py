"""Nodes that speak to each other, real or in memory, each with what it has heard. Tests wait for news, not for time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from aiohttp import web

from p2p.ids import NodeId, VoterId, node_of
from p2p.transport import Transport
from p2p.transport.dialer import Timing
from p2p.transport.handshake import PATH
from p2p.transport.links import Links
from p2p.transport.memory import Hub

T = TypeVar("T")
PATIENCE = 10.0
CLUSTER = "c1"
QUICK = replace(
    Timing(),
    backoff_min_seconds=0.01,
    backoff_max_seconds=0.05,
    close_seconds=0.2,
    proof_seconds=0.3,
    hello_seconds=1.0,
    connect_seconds=1.0,
)


class Ears:
    """What one endpoint was told. `until` waits until it is enough."""

    def __init__(self) -> None:
        self.received: list[tuple[str, bytes]] = []
        self.hints: list[tuple[str, bool]] = []
        self.clones: list[str] = []
        self._news = asyncio.Event()

    def listen(self, transport: Transport) -> None:
        transport.on_receive = lambda sender, payload: self._note(self.received, (sender, payload))
        transport.on_link = lambda node, up: self._note(self.hints, (node, up))
        if isinstance(transport, Links):
            transport.on_clone = lambda voter: self._note(self.clones, voter)

    def _note(self, where: list[Any], what: Any) -> None:
        where.append(what)
        self._news.set()

    @property
    def payloads(self) -> list[bytes]:
        return [payload for _, payload in self.received]

    async def until(self, enough: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not enough():
                self._news.clear()
                await self._news.wait()

    async def hears(self, payload: bytes) -> None:
        await self.until(lambda: payload in self.payloads)

    async def count(self, wanted: int) -> None:
        await self.until(lambda: len(self.received) >= wanted)


async def turns(number: int = 3) -> None:
    """Lets everything that is due run a few times."""
    for _ in range(number):
        await asyncio.sleep(0)


async def persist(act: Callable[[], object], enough: Callable[[], object], every: float = 0.01) -> None:
    """Acts again and again, as Raft does, until it was enough: one payload may be lost."""
    async with asyncio.timeout(PATIENCE):
        while not enough():
            act()
            await asyncio.sleep(every)


class Endpoint:
    """A transport with ears, under one name."""

    def __init__(self, transport: Any, voter: VoterId) -> None:
        self.transport = transport
        self.voter = voter
        self.ears = Ears()
        self.ears.listen(transport)

    def send(self, to: Endpoint | str, payload: bytes, channel: Any = "control") -> None:
        self.transport.send(to.voter if isinstance(to, Endpoint) else VoterId(to), channel, payload)


class Network(Protocol):
    """Where endpoints are started and stopped."""

    async def start(self, voter: str) -> Endpoint: ...
    async def stop(self, endpoint: Endpoint) -> None: ...
    async def close(self) -> None: ...


class InMemory:
    def __init__(self) -> None:
        self.hub = Hub()
        self._started: list[Endpoint] = []

    async def start(self, voter: str) -> Endpoint:
        endpoint = Endpoint(self.hub.join(VoterId(voter)), VoterId(voter))
        await endpoint.transport.start()
        self._started.append(endpoint)
        return endpoint

    async def stop(self, endpoint: Endpoint) -> None:
        await endpoint.transport.stop()

    async def close(self) -> None:
        for endpoint in self._started:
            await endpoint.transport.stop()


class Server:
    """A node's HTTP port on loopback, without the node."""

    def __init__(self, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> None:
        self._handler = handler
        self.port = 0
        self._listeners: list[int] = []
        self.authorizations: list[str | None] = []
        self._runner: web.AppRunner | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> None:
        app = web.Application()
        app.router.add_get(PATH, self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        listener = socket.create_server(("127.0.0.1", port or self.port), backlog=128)
        self._listeners = [listener.fileno()]
        await web.SockSite(self._runner, listener).start()
        self.port = listener.getsockname()[1]

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.authorizations.append(request.headers.get("Authorization"))
        return await self._handler(request)

    async def stop(self) -> None:
        if self._runner is None:
            return
        # Python 3.11 leaks a connection that is accepted in the turn in which its server closes (CPython gh-109564), so
        # the accepting ends first.
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.remove_reader(listener)
        await turns()
        await self._runner.cleanup()
        self._runner = None


class OverSockets:
    """Real nodes; `addresses` is what gossip would tell of each."""

    def __init__(self) -> None:
        self.addresses: dict[NodeId, str] = {}
        self._servers: dict[Endpoint, Server] = {}
        self._boots = 0

    def links(self, voter: str, **more: Any) -> Links:
        """A node's links that nobody can dial."""
        self._boots += 1
        settings: dict[str, Any] = {"cluster": CLUSTER, "boot": f"boot{self._boots}", "timing": QUICK}
        return Links(voter=VoterId(voter), resolve=self.addresses.get, **(settings | more))

    async def start(self, voter: str, *, port: int = 0, hidden: bool = False, **more: Any) -> Endpoint:
        """A node that listens; `hidden`: nobody is told where."""
        endpoint = Endpoint(self.links(voter, **more), VoterId(voter))
        await self.listen(endpoint, port=port, hidden=hidden)
        return endpoint

    async def listen(self, endpoint: Endpoint, *, port: int = 0, hidden: bool = False) -> None:
        """Starts an endpoint that was made by hand."""
        server = self._servers[endpoint] = Server(endpoint.transport.serve)
        await server.start(port)
        if not hidden:
            self.addresses[node_of(endpoint.voter)] = server.address
        await endpoint.transport.start()

    async def start_outbound(self, voter: str, **more: Any) -> Endpoint:
        """A node that only dials."""
        endpoint = Endpoint(self.links(voter, **more), VoterId(voter))
        self._servers[endpoint] = Server(endpoint.transport.serve)
        await endpoint.transport.start()
        return endpoint

    def server(self, endpoint: Endpoint) -> Server:
        return self._servers[endpoint]

    async def stop(self, endpoint: Endpoint) -> None:
        await endpoint.transport.stop()
        await self._servers[endpoint].stop()

    async def close(self) -> None:
        for endpoint in self._servers:
            await self.stop(endpoint)


NETWORKS: dict[str, Callable[[], Network]] = {"memory": InMemory, "sockets": OverSockets}


def _sockets() -> set[str]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue  # the descriptor of this very listing
        if target.startswith("socket:"):
            found.add(target)
    return found


@asynccontextmanager
async def nothing_leaks() -> AsyncIterator[None]:
    """No task and no socket is left that was not there before."""
    before, sockets = _tasks(), _sockets()
    yield
    for _ in range(100):
        if _tasks() <= before and _sockets() <= sockets:
            return
        await asyncio.sleep(0.01)  # transports close in the turns after their close
    assert _tasks() - before == set()
    assert _sockets() - sockets == set()


def _tasks() -> set[Any]:
    """All but the one that asks: a fixture is begun and ended by two."""
    return asyncio.all_tasks() - {asyncio.current_task()}
