"""One request and its answer on a tunnel: frames, credit, the two ends of a stream. No I/O; `tunnel` moves the frames.

Decides how much may be under way. Each side may have a window's worth of a stream in flight; what the reader has taken
is given back as credit. A log that is followed by nobody in particular therefore costs at most one window at each end,
however long it grows, and one slow reader holds up no other stream.

Frames are msgpack arrays: ``[OPEN, n, method, path, headers, body length]``, ``[HEAD, n, status, headers]``,
``[DATA, n, bytes]``, ``[END, n]``, ``[CREDIT, n, cost]``, ``[RESET, n, kind, text]``.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from p2p.transport import TransportError
from p2p.transport.headers import Headers

OPEN, HEAD, DATA, END, CREDIT, RESET = range(1, 7)
WINDOW = 256 * 1024
CHUNK = 32 * 1024
FRAME_COST = 256  # each frame of data costs this much credit beside its bytes, so that tiny ones are bounded too


class TunnelError(TransportError):
    """Base of what can go wrong with a request through a tunnel."""


class NoTunnel(TunnelError):
    """The node holds no tunnel open to this one."""


class TunnelBusy(TunnelError):
    """As many requests as a tunnel carries are under way; ask again later."""


class TunnelTimeout(TunnelError):
    """The node has not begun to answer in time."""


class TunnelLost(TunnelError):
    """The tunnel broke while the request was under way; whether it was carried out is not known."""


class TunnelFailed(TunnelError):
    """The node could not put the request to its own HTTP port, or its answer broke off."""


class TunnelMisused(TunnelError):
    """A peer sent what the protocol does not allow; the link ends."""


_KINDS: dict[str, type[TunnelError]] = {"busy": TunnelBusy, "failed": TunnelFailed, "cancelled": TunnelFailed}


def reset_error(kind: object, text: object) -> TunnelError:
    """What a RESET means to whoever waits."""
    return _KINDS.get(str(kind), TunnelFailed)(str(text)[:500])


class Stream:
    """One end. `write` sends a frame; it never blocks. `done` is called once, when this end has no more use for it."""

    def __init__(self, number: int, write: Callable[[list[Any]], None], done: Callable[[Stream], None]) -> None:
        self.number = number
        self._write, self._done = write, done
        self._may_send, self._may_receive, self._freed = WINDOW, WINDOW, 0
        self._received: deque[bytes] = deque()
        self._ended = False  # the other end has sent all
        self._closed = False
        self._error: TunnelError | None = None
        self._head: tuple[int, Headers] | None = None
        self._news = asyncio.Event()  # for who reads
        self._credit = asyncio.Event()  # for who writes

    @property
    def answered(self) -> bool:
        """The other end has begun to answer."""
        return self._head is not None

    @property
    def buffered(self) -> int:
        """Bytes that came and were not read yet."""
        return sum(map(len, self._received))

    # -- whoever uses it -------------------------------------------------------------------------------------------

    async def send(self, data: bytes) -> None:
        """Waits for credit. Raises TunnelError once the stream is over."""
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            cost = len(chunk) + FRAME_COST
            while self._may_send < cost and not self._over:
                self._credit.clear()
                await self._credit.wait()
            if self._over:
                raise self._error or TunnelLost("the stream is over")
            self._may_send -= cost
            self._write([DATA, self.number, chunk])

    async def head(self) -> tuple[int, Headers]:
        """The answer's status and headers. Raises TunnelError."""
        while self._head is None:
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        return self._head

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises TunnelError if it breaks off."""
        try:
            while (chunk := await self._next()) is not None:
                yield chunk
                self._free(len(chunk) + FRAME_COST)
        finally:
            self.close("cancelled", "nobody reads the answer any more")

    async def body(self, length: int) -> AsyncIterator[bytes]:
        """A request's body of so many bytes. Raises TunnelError if it breaks off."""
        while length > 0 and (chunk := await self._next()) is not None:
            yield chunk
            self._free(len(chunk) + FRAME_COST)
            length -= len(chunk)

    async def _next(self) -> bytes | None:
        while not self._received:
            if self._error is not None:
                raise self._error
            if self._ended:
                return None
            self._news.clear()
            await self._news.wait()
        return self._received.popleft()

    def close(self, kind: str, text: str) -> None:
        """This end has no more use for the stream; the other end is told, unless it has finished by itself."""
        if not self._over:
            self._closed = True
            if not self._ended:
                self._write([RESET, self.number, kind, text])
            self._finish()

    def end(self) -> None:
        """This end has answered all; what may still come is of no interest."""
        if not self._over:
            self._closed = True
            self._write([END, self.number])
            self._finish()

    # -- from the wire ---------------------------------------------------------------------------------------------

    def on_head(self, status: int, headers: Headers) -> None:
        self._head = (status, headers)
        self._news.set()

    def on_data(self, chunk: bytes) -> None:
        """Raises TunnelMisused."""
        if not isinstance(chunk, bytes):
            raise TunnelMisused("data that is no bytes")
        self._may_receive -= len(chunk) + FRAME_COST
        if self._may_receive < 0:
            raise TunnelMisused("more data than there was credit for")
        self._received.append(chunk)
        self._news.set()

    def on_credit(self, cost: int) -> None:
        """Raises TunnelMisused."""
        if not isinstance(cost, int) or cost < 0:
            raise TunnelMisused("credit that is no cost")
        self._may_send = min(self._may_send + cost, WINDOW)
        self._credit.set()

    def on_end(self) -> None:
        self._ended = True
        self._news.set()

    def fail(self, error: TunnelError) -> None:
        """The other end or the link has given up. What came before can still be read."""
        if not self._over and not self._ended:
            self._error = error
            self._finish()

    @property
    def _over(self) -> bool:
        return self._closed or self._error is not None

    def _free(self, cost: int) -> None:
        self._freed += cost
        if self._freed >= WINDOW // 2 and not self._ended and not self._over:
            self._may_receive += self._freed
            self._write([CREDIT, self.number, self._freed])
            self._freed = 0

    def _finish(self) -> None:
        self._news.set()
        self._credit.set()
        self._done(self)
