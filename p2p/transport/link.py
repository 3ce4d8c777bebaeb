"""One open socket between two nodes, from the hello to its end.

One task reads, one writes; nothing else touches the socket. What is sent while the writer is busy goes out together.
A peer that stops reading fills the outbox, which drops (`outbox`), and the kernel ends the connection after two seconds
of silence (TCP_USER_TIMEOUT).
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import WSMsgType, web

from p2p.ids import NodeId, VoterId
from p2p.transport import ignore
from p2p.transport.frames import BadFrame, pack, unpack
from p2p.transport.hello import DONE, Hello
from p2p.transport.outbox import Outbox

Socket = aiohttp.ClientWebSocketResponse[bool] | web.WebSocketResponse[bool]
TCP_USER_TIMEOUT_MS = 2_000
MAX_OWED = 64  # pongs and pings in wait; a peer that asks for more without reading is answered no more


@dataclass(frozen=True, slots=True)
class End:
    """How a link ended. `code` is the close frame's; None: it broke."""

    code: int | None
    reason: str

    @property
    def broken(self) -> bool:
        """Not closed because it was of no use any more."""
        return self.code != DONE


class Link:
    """`deliver` gets every payload, in order, on the event loop. `run` is the whole life of the link."""

    def __init__(
        self,
        ws: Socket,
        *,
        channel: str,
        peer: Hello,
        dialed: bool,
        outbox: Outbox,
        deliver: Callable[[Link, bytes], None],
        close_seconds: float,
    ) -> None:
        self._ws = ws
        self._socket = ws.get_extra_info("socket")
        self._deliver = deliver
        self._close_seconds = close_seconds
        self.outbox = outbox
        self.channel, self.dialed = channel, dialed
        self.voter: VoterId = peer.sender
        self.node: NodeId = peer.node
        self.boot = peer.boot
        self.clock_ahead_ms = peer.time_ms - time.time_ns() // 1_000_000  # the peer's clock, less the way here
        self._now = asyncio.get_running_loop().time
        self.opened_at = self.sent_at = self.heard_at = self._now()
        self.sent = self.received = self.frames_sent = 0
        self._owed: deque[tuple[WSMsgType, bytes]] = deque()
        self._proofs: dict[bytes, asyncio.Future[bool]] = {}
        self._idle: asyncio.Future[None] | None = None  # the writer waits on it
        self._ending: End | None = None

    def send(self, payload: bytes) -> bool:
        """False: the outbox is full and this payload was dropped."""
        self.sent_at = self._now()
        fits = self.outbox.put(payload)
        self._wake()
        return fits

    def shut(self, code: int, reason: str) -> None:
        """Closes after what is queued has gone, but soon. `run` returns when it is done."""
        if self._ending is None:
            self._ending = End(code, reason)
            self._wake()
            asyncio.get_running_loop().call_later(self._close_seconds, self.sever)

    def disown(self) -> None:
        """Closes at once; what still comes is nobody's."""
        self._deliver = ignore
        self.sever()

    def sever(self) -> None:
        """Closes at once."""
        sever(self._socket)

    async def alive(self, timeout: float) -> bool:
        """Whether the process at the other end answers now. What it had sent before proves nothing."""
        nonce = os.urandom(8)
        proof: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._proofs[nonce] = proof
        self._owe(WSMsgType.PING, nonce)
        try:
            async with asyncio.timeout(timeout):
                return await proof
        except TimeoutError:
            return False
        finally:
            del self._proofs[nonce]

    @property
    def age(self) -> float:
        """Seconds since it stands."""
        return self._now() - self.opened_at

    @property
    def idle_seconds(self) -> float:
        """Since a payload went either way."""
        return self._now() - max(self.sent_at, self.heard_at)

    async def run(self, greeting: bytes | None = None) -> End:
        """Sends the greeting, then reads until the link ends. However it ends, nothing is left open."""
        writer = asyncio.create_task(self._write(greeting))
        try:
            end = await self._read()
        finally:
            if self._ending is None:
                writer.cancel()
            try:
                async with asyncio.timeout(self._close_seconds):
                    await asyncio.wait({writer})
                    await self._ws.close()
            except TimeoutError:
                pass  # a peer that does not read does not answer a close either
            self.sever()
            writer.cancel()
            await asyncio.wait({writer})
            self.outbox.clear()
            for proof in self._proofs.values():
                if not proof.done():
                    proof.set_result(False)
        return self._ending or end

    async def _read(self) -> End:
        receive, now = self._ws.receive, self._now
        while True:
            message = await receive()
            if message.type is WSMsgType.BINARY:
                self.heard_at = now()
                try:
                    payloads = unpack(message.data)
                except BadFrame as error:
                    return End(None, str(error))
                self.received += len(payloads)
                for payload in payloads:
                    self._deliver(self, payload)
            elif message.type is WSMsgType.PING:
                self._owe(WSMsgType.PONG, message.data)
            elif message.type is WSMsgType.PONG:
                proof = self._proofs.get(bytes(message.data))
                if proof is not None and not proof.done():
                    proof.set_result(True)
            else:
                return _end_of(message)

    async def _write(self, greeting: bytes | None) -> None:
        """Ends when the link does; a broken socket is the reader's to notice."""
        ws, outbox = self._ws, self.outbox
        try:
            if greeting is not None:
                await ws.send_bytes(greeting)
            while True:
                if self._owed:
                    kind, data = self._owed.popleft()
                    await (ws.pong(data) if kind is WSMsgType.PONG else ws.ping(data))
                elif batch := outbox.take():
                    self.sent += len(batch)
                    self.frames_sent += 1
                    await ws.send_bytes(pack(batch))
                elif self._ending is not None:
                    await ws.close(code=self._ending.code or DONE, message=self._ending.reason.encode())
                    return
                else:
                    self._idle = asyncio.get_running_loop().create_future()
                    await self._idle
        except (OSError, aiohttp.ClientError):
            self.sever()

    def _owe(self, kind: WSMsgType, data: bytes) -> None:
        if len(self._owed) < MAX_OWED:
            self._owed.append((kind, bytes(data)))
            self._wake()

    def _wake(self) -> None:
        idle = self._idle
        if idle is not None and not idle.done():
            idle.set_result(None)


def _end_of(message: Any) -> End:
    if message.type is WSMsgType.CLOSE:
        return End(message.data, str(message.extra or "closed by the peer"))
    if message.type is WSMsgType.TEXT:
        return End(None, "a text frame, which no version sends")
    return End(None, str(message.data) if message.data else "the connection broke")


def sever(connection: Any) -> None:
    """Ends a socket under a transport, which then notices; also one whose peer does not read."""
    if connection is None:
        return
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it has ended already


def tune(connection: Any) -> None:
    """No Nagle delay, and two seconds until unacknowledged data ends the connection (PROTOCOL §2.17)."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)
