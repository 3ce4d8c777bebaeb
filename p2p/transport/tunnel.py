"""HTTP to a node that nobody can dial, over a link that it holds open (PROTOCOL §4, outbound-only node).

The node dials its anchors and holds a ``tunnel`` link to each, a socket of its own beside ``control`` and ``log``. An
anchor puts a request on it; the node puts it to its own HTTP port on loopback, as any caller would, with the cluster's
token, and sends the answer back as it comes. Decides how many requests may be under way; how much of each may be is
`streams`' to say, and which headers travel `headers`'.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections.abc import AsyncIterator, Collection, Iterable
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgpack
from yarl import URL

from p2p.ids import NodeId
from p2p.transport.headers import Headers, of_answer, of_request
from p2p.transport.hello import REFUSED
from p2p.transport.link import Link
from p2p.transport.links import Links
from p2p.transport.streams import (
    CREDIT,
    DATA,
    END,
    HEAD,
    OPEN,
    RESET,
    NoTunnel,
    Stream,
    TunnelBusy,
    TunnelError,
    TunnelLost,
    TunnelMisused,
    TunnelTimeout,
    reset_error,
)

log = logging.getLogger(__name__)

CHANNEL = "tunnel"
MAX_STREAMS = 64  # on one link, each way
MAX_HEAD_BYTES = 64 * 1024
LOOPBACK_CONNECT_SECONDS = 5.0
_METHOD = re.compile(r"[A-Z]{1,16}")
_PATH = re.compile(r"/[!-~]*")


class TunnelResponse:
    """An answer that has begun. Used as ``async with await tunnel.open(...) as response``, so that it ends with the
    block: a response that is neither read to its end nor closed keeps its request running on the other node."""

    def __init__(self, stream: Stream, status: int, headers: Headers) -> None:
        self.status = status
        self.headers = headers  # as the node's server gave them, hop-by-hop ones left out
        self.chunks: AsyncIterator[bytes] = stream.chunks()  # raises TunnelError if the answer breaks off
        self._stream = stream

    async def read(self) -> bytes:
        """The rest of the body."""
        return b"".join([chunk async for chunk in self.chunks])

    def close(self) -> None:
        """The rest is not wanted; the node stops sending it."""
        self._stream.close("cancelled", "the answer is not wanted any more")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Side:
    """The streams of one link. Whoever dialled the link numbers its requests odd, the other even."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.streams: dict[int, Stream] = {}
        self.serving: dict[int, asyncio.Task[None]] = {}
        self.opened = 0  # by us, and under way
        self.accepted = 0  # by the peer
        self._numbers = itertools.count(1 if link.dialed else 2, 2)

    def open(self) -> Stream:
        """Raises TunnelBusy."""
        if self.opened >= MAX_STREAMS:
            raise TunnelBusy(f"{MAX_STREAMS} requests to node {self.link.node} are under way")
        self.opened += 1
        return self._add(next(self._numbers), self._closed)

    def accept(self, number: int) -> Stream:
        """Raises TunnelMisused."""
        if number in self.streams or number % 2 == self.link.dialed:
            raise TunnelMisused(f"stream {number} is not the peer's to open")
        self.accepted += 1
        return self._add(number, self._served)

    def _add(self, number: int, done: Any) -> Stream:
        stream = self.streams[number] = Stream(number, self.write, done)
        return stream

    def _closed(self, stream: Stream) -> None:
        self.opened -= 1
        self._forget(stream)

    def _served(self, stream: Stream) -> None:
        self.accepted -= 1
        self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        self.streams.pop(stream.number, None)

    def write(self, frame: list[Any]) -> None:
        """Credit keeps what is under way far below what the link's queue holds; a link that is full all the same
        carries frames of streams that are over, and none must be lost."""
        if not self.link.send(msgpack.packb(frame)):
            self.link.sever()


class Tunnel:
    """Both ends: `open` asks a node that holds a tunnel to this one; `base_url` is where requests that come through a
    tunnel are put, this node's own HTTP port on loopback, with `token`; None: none is taken."""

    def __init__(self, links: Links, *, base_url: str | None, token: str | None = None) -> None:
        self._links = links
        self._base_url = base_url.rstrip("/") if base_url is not None else None
        self._token = token
        self._sides: dict[Link, _Side] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None
        links.carry(CHANNEL, self)

    async def start(self) -> None:
        """Before the links."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )

    async def stop(self) -> None:
        """Before the links. Whoever waits for an answer is told that the tunnel is lost."""
        for side in list(self._sides.values()):
            self._lose(side, "this node is stopping")
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def hold(self, anchors: Collection[NodeId]) -> None:
        """Keeps a tunnel open to exactly these nodes, for a node that cannot be dialled."""
        self._links.hold(anchors, channels=(CHANNEL,))

    def reaches(self, node: NodeId) -> bool:
        """Whether the node holds a tunnel to this one."""
        return self._links.newest(node, CHANNEL) is not None

    async def open(
        self,
        node: NodeId,
        method: str,
        path_qs: str,
        *,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        timeout: float,
    ) -> TunnelResponse:
        """Asks; answers once the node has begun to answer, within `timeout` seconds. The body may take for ever.

        Raises NoTunnel and TunnelBusy (nothing was sent), TunnelTimeout, TunnelLost and TunnelFailed (the request may
        have been carried out), ValueError for what is no method or path.
        """
        if not _METHOD.fullmatch(method) or not _PATH.fullmatch(path_qs):
            raise ValueError(f"not a request: {method!a} {path_qs!a}")
        link = self._links.newest(node, CHANNEL)
        if link is None:
            raise NoTunnel(f"node {node} holds no tunnel open to this node")
        head = of_request(headers)
        if sum(len(name) + len(value) for name, value in head) + len(path_qs) > MAX_HEAD_BYTES:
            raise ValueError(f"the request's head is larger than {MAX_HEAD_BYTES} bytes")
        side = self._side(link)
        stream = side.open()
        try:
            async with asyncio.timeout(timeout):
                side.write([OPEN, stream.number, method, path_qs, head, len(body)])
                if body:
                    self._own(_pump(stream, body))
                return TunnelResponse(stream, *await stream.head())
        except TimeoutError:
            raise TunnelTimeout(f"node {node} did not begin to answer within {timeout:g} s") from None
        finally:
            if not stream.answered:
                stream.close("cancelled", "nobody waits for the answer any more")

    # -- from the link ---------------------------------------------------------------------------------------------

    def link_message(self, link: Link, payload: bytes) -> None:
        """One frame."""
        side = self._side(link)
        try:
            kind, number, *rest = msgpack.unpackb(payload)
            self._take(side, kind, number, rest)
        except (TunnelMisused, ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
            log.warning("the tunnel with %s ends: %s", link.voter, error)
            link.shut(REFUSED, f"tunnel: {error}"[:100])

    def link_down(self, link: Link) -> None:
        """Every request on it is over."""
        if link in self._sides:
            self._lose(self._sides[link], f"the tunnel with node {link.node} broke")

    def _take(self, side: _Side, kind: int, number: int, rest: list[Any]) -> None:
        if kind == OPEN:
            self._accept(side, number, *rest)
            return
        stream = side.streams.get(number)
        if stream is None:
            return  # it is over here, and the other end did not know yet
        if kind == DATA:
            stream.on_data(*rest)
        elif kind == CREDIT:
            stream.on_credit(*rest)
        elif kind == END:
            stream.on_end()
        elif kind == HEAD and number not in side.serving:
            status, headers = rest
            stream.on_head(int(status), tuple((str(name), str(value)) for name, value in headers))
        elif kind == RESET:
            stream.fail(reset_error(*rest))
            if number in side.serving:
                side.serving[number].cancel()
        else:
            raise TunnelMisused(f"a frame of kind {kind!a}")

    def _accept(self, side: _Side, number: int, method: str, path: str, headers: list[list[str]], length: int) -> None:
        if not isinstance(length, int) or length < 0:
            raise TunnelMisused("a body of no length")
        stream = side.accept(number)
        if self._base_url is None or not _METHOD.fullmatch(method) or not _PATH.fullmatch(path):
            stream.close("failed", "this node takes no such request through a tunnel")
        elif side.accepted > MAX_STREAMS:
            stream.close("busy", f"{MAX_STREAMS} requests from this tunnel are under way")
        else:
            pairs = [(str(name), str(value)) for name, value in headers]
            task = side.serving[number] = self._own(self._perform(side, stream, method, path, pairs, length))
            task.add_done_callback(lambda _: side.serving.pop(number, None))

    async def _perform(
        self, side: _Side, stream: Stream, method: str, path: str, headers: list[tuple[str, str]], length: int
    ) -> None:
        """One request that came through a tunnel, put to our own port."""
        assert self._session is not None
        sent = [*of_request(headers)]
        if self._token is not None:
            sent.append(("Authorization", f"Bearer {self._token}"))
        if length:
            sent.append(("Content-Length", str(length)))
        try:
            async with self._session.request(
                method,
                URL(f"{self._base_url}{path}", encoded=True),
                headers=sent,
                data=stream.body(length) if length else None,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=LOOPBACK_CONNECT_SECONDS),
            ) as response:
                side.write([HEAD, stream.number, response.status, of_answer(response.headers.items())])
                async for chunk in response.content.iter_any():
                    await stream.send(chunk)
            stream.end()
        except TunnelError:
            pass  # whoever asked has gone
        except (aiohttp.ClientError, OSError, ValueError) as error:
            stream.close("failed", f"{type(error).__name__}: {error}")
        finally:
            stream.close("failed", "the request was given up")

    # -- both ------------------------------------------------------------------------------------------------------

    def _side(self, link: Link) -> _Side:
        side = self._sides.get(link)
        if side is None:
            side = self._sides[link] = _Side(link)
        return side

    def _lose(self, side: _Side, why: str) -> None:
        self._sides.pop(side.link, None)
        for stream in list(side.streams.values()):
            stream.fail(TunnelLost(why))
        for task in side.serving.values():
            task.cancel()

    def _own(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _pump(stream: Stream, body: bytes) -> None:
    """A request's body, as fast as the other end takes it."""
    try:
        await stream.send(body)
    except TunnelError:
        pass  # the answer, or whoever waits for it, says so
