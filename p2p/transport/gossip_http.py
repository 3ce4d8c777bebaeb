"""One gossip exchange over HTTP: a POST and its answer. Decides how long and over how many connections it is tried.

Pings are tried on a second connection after 300 ms: a lost SYN costs a second and a lost segment at least 200 ms
(PROTOCOL §2.17), which would be most of a probe's patience. aiohttp sets TCP_NODELAY on every connection.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

import aiohttp

from p2p.membership.figures import MAX_MESSAGE_BYTES

PATH = "/peer/gossip"
CONTENT_TYPE = "application/msgpack"
SECOND_CONNECTION_SECONDS = 0.3
KEEP_ALIVE_SECONDS = 75.0  # members are probed in rounds: at 30 of them each comes up every half minute
MAX_CONNECTIONS = 128
MAX_CONNECTIONS_PER_HOST = 8
CHUNK_BYTES = 64 << 10


class ExchangeFailed(Exception):
    """No answer, or one that is none. `status` is HTTP's where there was one."""

    def __init__(self, why: str, status: int | None = None) -> None:
        super().__init__(why)
        self.status = status


class Poster:
    """The client of one node. Every request carries the cluster's token, if there is one; it is never logged."""

    def __init__(self, *, token: str | None, tls: ssl.SSLContext | None) -> None:
        self._headers = {"Content-Type": CONTENT_TYPE} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._scheme = "https" if tls else "http"
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        connector = aiohttp.TCPConnector(
            limit=MAX_CONNECTIONS,
            limit_per_host=MAX_CONNECTIONS_PER_HOST,
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            ssl=self._tls if self._tls else True,
        )
        self._session = aiohttp.ClientSession(
            connector=connector, headers=self._headers, timeout=aiohttp.ClientTimeout(total=None), trust_env=False
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def post(self, address: str, body: bytes, seconds: float, *, hedged: bool) -> bytes:
        """The answer's body; raises ExchangeFailed. `hedged`: tries a second connection when the first is slow."""
        try:
            async with asyncio.timeout(seconds):
                attempt = partial(self._request, "POST", address, PATH, {}, body)
                return await (_hedged(attempt) if hedged else attempt())
        except TimeoutError:
            raise ExchangeFailed(f"no answer within {seconds:.1f} s") from None

    async def get(self, address: str, path: str, query: Mapping[str, str], seconds: float) -> bytes:
        """The answer's body; raises ExchangeFailed."""
        try:
            async with asyncio.timeout(seconds):
                return await self._request("GET", address, path, query, None)
        except TimeoutError:
            raise ExchangeFailed(f"no answer within {seconds:.1f} s") from None

    async def _request(
        self, method: str, address: str, path: str, query: Mapping[str, str], body: bytes | None
    ) -> bytes:
        try:
            return await self._once(method, address, path, query, body)
        except (aiohttp.ServerDisconnectedError, ConnectionResetError):
            pass  # most likely a kept connection that the peer had closed meanwhile; gossip may be sent twice
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: an address that is no address
            raise _failed(error) from None
        try:
            return await self._once(method, address, path, query, body)
        except (aiohttp.ClientError, OSError) as error:
            raise _failed(error) from None

    async def _once(self, method: str, address: str, path: str, query: Mapping[str, str], body: bytes | None) -> bytes:
        assert self._session is not None, "the poster was not opened"
        url = f"{self._scheme}://{address}{path}"
        async with self._session.request(method, url, params=query, data=body, allow_redirects=False) as answer:
            if answer.status != 200:
                raise ExchangeFailed(f"HTTP {answer.status}", answer.status)
            return await _read(answer)


def _failed(error: Exception) -> ExchangeFailed:
    return ExchangeFailed(f"{type(error).__name__}: {error}"[:200])


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    received = bytearray()
    async for chunk in answer.content.iter_chunked(CHUNK_BYTES):
        received += chunk
        if len(received) > MAX_MESSAGE_BYTES:
            raise ExchangeFailed(f"the answer is larger than {MAX_MESSAGE_BYTES} bytes")
    return bytes(received)


async def _hedged(attempt: Callable[[], Coroutine[Any, Any, bytes]]) -> bytes:
    """The first good answer of two attempts, the second begun only if the first is slow."""
    tasks = {asyncio.create_task(attempt())}
    try:
        waiting: set[asyncio.Task[bytes]]
        done, waiting = await asyncio.wait(tasks, timeout=SECOND_CONNECTION_SECONDS)
        if not done:
            second = asyncio.create_task(attempt())
            tasks.add(second)
            waiting.add(second)
        while True:
            for task in done:
                if not waiting or _is_answer(task.exception()):
                    return task.result()
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _is_answer(error: BaseException | None) -> bool:
    """An answer that refuses is an answer: nothing better comes from the other connection."""
    return error is None or (isinstance(error, ExchangeFailed) and error.status is not None)
