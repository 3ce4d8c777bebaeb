"""How a connection becomes a link: dial or be dialled, say hello both ways, agree or part with a reason.

Decides with whom a link may stand, by the rules of `hello` and `clones`. Which links there are, and when to dial, is
`links`' and `dialer`'s to say. The token goes to whoever is dialled and is never logged.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

from p2p.ids import VoterId
from p2p.transport import MAX_FRAME_BYTES
from p2p.transport.clones import be_the_only
from p2p.transport.dialer import Timing, race
from p2p.transport.greeting import answers, close, receive_hello
from p2p.transport.hello import (
    DONE,
    REFUSED,
    STOPPING,
    UNPROVEN,
    WIRE_VERSION,
    Hello,
    Refused,
    check,
    close_reason,
    encode,
)
from p2p.transport.link import Link, Socket, sever, tune
from p2p.transport.seldom import Seldom

log = logging.getLogger(__name__)

PATH = "/peer/link"
Own = Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]]


class Handshake:
    """Who we are, and the two ways to a link. `rivals` gives the links that another start of a voter has; `displace`
    takes one away; `on_clone` is told of every voter that is refused because another one of its name lives. After the
    two ways' return nothing is awaited: what they found holds until the caller awaits something."""

    def __init__(
        self,
        *,
        cluster: str,
        voter: VoterId,
        boot: str,
        token: str | None,
        tls: ssl.SSLContext | None,
        timing: Timing,
        rivals: Callable[[VoterId, str], list[Link]],
        displace: Callable[[Link], None],
        on_clone: Callable[[VoterId], None],
    ) -> None:
        self.cluster, self.voter, self._boot = cluster, voter, boot
        self.refused: Counter[str] = Counter()  # by `Refused.kind`
        self._headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        self._tls = tls
        self._timing = timing
        self._rivals, self._displace, self._on_clone = rivals, displace, on_clone
        self._seldom = Seldom(log, timing.said_seconds, time.monotonic)
        self._strangers: set[Any] = set()  # accepted sockets on which no hello has come yet
        self._closing = False
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Once."""
        assert self._session is None, "a node's links start once"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_tuned_socket),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            headers=self._headers,
        )

    def turn_away(self) -> None:
        """The node is stopping: whoever has not said hello yet need not."""
        self._closing = True
        for connection in self._strangers:
            sever(connection)

    async def close(self) -> None:
        """After the last dial."""
        if self._session is not None:
            await self._session.close()

    def hello(self, to: str) -> Hello:
        """Ours."""
        return Hello(WIRE_VERSION, self.cluster, self.voter, to, self._boot, time.time_ns() // 1_000_000)

    def say(self, key: object, text: str, *values: object, level: int = logging.INFO) -> None:
        """One line in the log, once in a while."""
        self._seldom.say(level, str(key), text, *values)

    # -- dialling --------------------------------------------------------------------------------------------------

    async def connect(self, address: str, channel: str, *, own: Own) -> Socket:
        """A connection on which nothing was said. Raises ClientError, OSError, ValueError (no address)."""
        timing = self._timing

        def discard(ws: Socket) -> None:
            own(close(ws, timing.close_seconds, code=DONE, reason=b"the other attempt was faster"))

        async with asyncio.timeout(timing.connect_seconds):
            attempt = partial(self._connect, address, channel)
            return await race(attempt, timing.second_attempt_seconds, own=own, discard=discard)

    async def _connect(self, address: str, channel: str) -> Socket:
        assert self._session is not None
        scheme = "http" if self._tls is None else "https"
        return await self._session.ws_connect(
            URL.build(scheme=scheme, authority=address, path=PATH, query={"channel": channel}),
            ssl=self._tls or True,
            timeout=aiohttp.ClientWSTimeout(ws_close=self._timing.close_seconds),
            autoping=False,
            heartbeat=self._timing.ping_seconds,
            max_msg_size=MAX_FRAME_BYTES + 1,
        )

    async def greet(self, ws: Socket, target: str, channel: str, address: str) -> Hello | None:
        """Both hellos on a connection that we dialled; None: no link, and the connection is closed."""
        ours = self.hello(target)
        try:
            async with asyncio.timeout(self._timing.hello_seconds):
                await ws.send_bytes(encode(ours))
                peer = await receive_hello(ws)
                await self._admit(peer, ours, _certain)  # its hello answers ours: it lives
                return peer
        except Refused as refused:
            await self._refuse(ws, refused, f"{target} at {address}")
        except (aiohttp.ClientError, OSError) as error:
            self.say(("no hello", target), "no %s link with %s: %s", channel, target, str(error) or "no hello in time")
            await close(ws, self._timing.close_seconds, code=UNPROVEN, reason=b"no hello in time")
        except asyncio.CancelledError:
            await close(ws, self._timing.close_seconds, code=STOPPING, reason=b"stopping")
            raise
        return None

    # -- being dialled ---------------------------------------------------------------------------------------------

    def upgrade(self) -> web.WebSocketResponse[bool]:
        """What a peer's request is answered with."""
        return web.WebSocketResponse(
            timeout=self._timing.close_seconds,
            autoping=False,
            heartbeat=self._timing.ping_seconds,
            compress=False,
            max_msg_size=MAX_FRAME_BYTES + 1,
        )

    async def accept(self, ws: Socket, *, channel: str, known: bool, remote: str) -> Hello | None:
        """The hello of whoever has dialled us, ours still to be sent; None: no link, and the connection is closed."""
        connection = ws.get_extra_info("socket")
        if connection is not None:
            tune(connection)
        self._strangers.add(connection)
        if self._closing:
            sever(connection)
        try:
            async with asyncio.timeout(self._timing.hello_seconds):
                peer = await receive_hello(ws)
                if not known:
                    raise Refused("channel", f"there is no channel {channel!a} here")
                await self._admit(peer, self.hello(""), partial(answers, ws, self._timing.proof_seconds))
                return peer
        except Refused as refused:
            await self._refuse(ws, refused, remote)
        except (aiohttp.ClientError, OSError):
            # A port scanner, the slower of two attempts, or a peer that died: nothing that anybody must know.
            await close(ws, self._timing.close_seconds, code=UNPROVEN, reason=b"no hello in time")
        finally:
            self._strangers.discard(connection)
        return None

    # -- both ------------------------------------------------------------------------------------------------------

    async def _admit(self, peer: Hello, ours: Hello, lives: Callable[[], Awaitable[bool]]) -> None:
        """Raises Refused, or ConnectionError if the peer has gone meanwhile."""
        check(peer, ours)
        try:
            if peer.sender == self.voter:
                raise Refused("clone", f"you are {peer.sender}, and so am I: one of us is a copy")
            await be_the_only(
                peer,
                rivals=partial(self._rivals, peer.sender, peer.boot),
                lives=lives,
                displace=self._displace,
                proof_seconds=self._timing.proof_seconds,
            )
        except Refused:
            self._on_clone(peer.sender)
            raise

    async def _refuse(self, ws: Socket, refused: Refused, who: str) -> None:
        self.refused[refused.kind] += 1
        self.say((refused.kind, who), "no link with %s: %s", who, refused, level=logging.WARNING)
        await close(ws, self._timing.close_seconds, code=REFUSED, reason=close_reason(refused))


async def _certain() -> bool:
    return True


def _tuned_socket(address: Any) -> socket.socket:
    family, kind, protocol, _, _ = address
    connection = socket.socket(family, kind, protocol)
    tune(connection)
    return connection
