"""Plain requests to other nodes: one session, msgpack bodies, the cluster's token, deadlines. Errors of the network
become `PeerUnreachable` here and nowhere above; whether the request may have arrived is part of the error.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp
import msgpack

PACKED = "application/msgpack"
CONNECT_SECONDS = 1.0
KEPT_CONNECTIONS = 64


class PeerUnreachable(Exception):
    """No answer. `sent` tells whether the peer may have got the request all the same."""

    def __init__(self, address: str, why: str, *, sent: bool) -> None:
        super().__init__(f"{address}: {why}")
        self.sent = sent


class PeerRefused(Exception):
    """The peer answered with an error: `status`, `detail` and, for a wrong request, `field`."""

    def __init__(self, status: int, detail: str, field: str | None = None) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail, self.field = status, detail, field


class Peers:
    """The session. `start` and `stop` belong to the node."""

    def __init__(self, token: str | None) -> None:
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, limit_per_host=KEPT_CONNECTIONS, keepalive_timeout=30.0)
        self._session = aiohttp.ClientSession(
            connector=connector, headers=self._headers, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
        )

    async def stop(self) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session is not None, "the peers' session has not been started"
        return self._session

    async def fetch(self, address: str, path: str, *, seconds: float) -> bytes:
        """The bytes of a 200 answer. Raises PeerUnreachable or PeerRefused."""
        try:
            async with asyncio.timeout(seconds), self.session.get(f"http://{address}{path}") as answer:
                raw = await answer.read()
        except TimeoutError:
            raise PeerUnreachable(address, f"no answer within {seconds:g} s", sent=True) from None
        except (aiohttp.ClientError, OSError) as error:
            raise PeerUnreachable(address, str(error) or type(error).__name__, sent=True) from None
        if answer.status != 200:
            raise PeerRefused(answer.status, str(answer.reason))
        return raw

    async def call(
        self,
        method: str,
        address: str,
        path: str,
        body: Any = None,
        *,
        seconds: float,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """The unpacked body of a 2xx answer. Raises PeerUnreachable or PeerRefused."""
        raw = msgpack.packb(body) if body is not None else None
        try:
            async with (
                asyncio.timeout(seconds),
                self.session.request(
                    method,
                    f"http://{address}{path}",
                    data=raw,
                    headers={"Content-Type": PACKED, "Accept": PACKED, **(headers or {})},
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=min(seconds, CONNECT_SECONDS)),
                ) as answer,
            ):
                told = unpack(answer.content_type, await answer.read())
                if answer.status >= 300:
                    about = told if isinstance(told, dict) else {}
                    raise PeerRefused(answer.status, str(about.get("detail", answer.reason)), about.get("field"))
                return told
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL) as error:
            cause = getattr(error, "os_error", None) or error
            raise PeerUnreachable(address, str(cause) or type(cause).__name__, sent=False) from None
        except TimeoutError:
            raise PeerUnreachable(address, f"no answer within {seconds:g} s", sent=True) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise PeerUnreachable(address, str(error) or type(error).__name__, sent=True) from None


def unpack(content_type: str, raw: bytes) -> Any:
    """What a peer said; a sentence of JSON (a problem) is understood too. Raises ValueError."""
    if content_type == PACKED:
        try:
            return msgpack.unpackb(raw, strict_map_key=False)
        except msgpack.UnpackException as error:
            raise ValueError(f"the answer is not msgpack: {error}") from None
    if content_type.endswith("json"):
        return json.loads(raw)
    return None
