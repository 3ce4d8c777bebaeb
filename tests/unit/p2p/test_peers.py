"""Requests between nodes: whether one that failed may have arrived is part of the failure."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import pytest
from aiohttp import web

from p2p import peers as module
from p2p.peers import PACKED, PeerRefused, Peers, PeerUnreachable, unpack

TOKEN = "token-token-token-token"
SECONDS = 10.0


@pytest.fixture
async def peers() -> AsyncIterator[Peers]:
    made = Peers(TOKEN)
    await made.start()
    yield made
    await made.stop()


@asynccontextmanager
async def served(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"{host}:{port}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def said(*parts: bytes, hang: bool = False) -> AsyncIterator[str]:
    """A server that reads a request and says just this, then hangs up (or does not)."""
    done = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
        await writer.drain()
        if hang:
            await done.wait()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield "{}:{}".format(*server.sockets[0].getsockname())
        done.set()


async def test_what_is_said_and_heard(peers: Peers) -> None:
    heard: list[Any] = []

    async def handler(request: web.Request) -> web.Response:
        heard.append((request.method, request.raw_path, dict(request.headers), await request.read()))
        return web.Response(body=msgpack.packb({"x": b"\xff", "y": [1]}), content_type=PACKED)

    async with served(handler) as address:
        told = await peers.call("POST", address, "/p/%2F?q=a%26b", {"k": None}, seconds=SECONDS, headers={"X-A": "1"})
    assert told == {"x": b"\xff", "y": [1]}
    method, path, headers, body = heard[0]
    assert (method, path, msgpack.unpackb(body)) == ("POST", "/p/%2F?q=a%26b", {"k": None})
    assert (headers["Authorization"], headers["Content-Type"], headers["X-A"]) == (f"Bearer {TOKEN}", PACKED, "1")


@pytest.mark.parametrize(
    ("status", "body", "kind", "detail", "field"),
    [
        (409, {"detail": "no", "field": "f"}, "application/problem+json", "no", "f"),
        (404, {"detail": "none"}, PACKED, "none", None),
        (500, "oops", "text/plain", "Internal Server Error", None),
        (403, ["odd"], "application/json", "Forbidden", None),
        (307, {}, PACKED, "Temporary Redirect", None),
    ],
)
async def test_a_refusal_keeps_its_words(
    peers: Peers, status: int, body: Any, kind: str, detail: str, field: str | None
) -> None:
    raw = msgpack.packb(body) if kind == PACKED else json.dumps(body).encode()

    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status, body=raw, content_type=kind, headers={"Location": "http://other.invalid/"})

    async with served(handler) as address:
        with pytest.raises(PeerRefused) as error:
            await peers.call("GET", address, "/", seconds=SECONDS)
    assert (error.value.status, error.value.detail, error.value.field) == (status, detail, field)


def nobody() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("address", ["nobody", "no.such.host.invalid:1", "127.0.0.1:99999", "[::1"])
async def test_what_could_not_be_dialled_was_not_sent(peers: Peers, address: str) -> None:
    with pytest.raises(PeerUnreachable) as error:
        await peers.call("POST", nobody() if address == "nobody" else address, "/", {}, seconds=SECONDS)
    assert error.value.sent is False
    assert str(error.value)


async def test_a_dial_that_takes_too_long_was_not_sent(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is off answers no SYN. A listener whose queue is full does not either."""
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        address = listener.getsockname()
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(address)
            fillers.append(filler)
        with pytest.raises(PeerUnreachable) as error:
            await peers.call("POST", f"127.0.0.1:{address[1]}", "/", {}, seconds=0.5)
        for filler in fillers:
            filler.close()
    assert error.value.sent is False


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param((), id="hangs up"),
        pytest.param((b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n123",), id="hangs up in the middle"),
        pytest.param((b"not http\r\n\r\n",), id="speaks something else"),
        pytest.param(
            (b"HTTP/1.1 200 OK\r\nContent-Type: application/msgpack\r\nContent-Length: 1\r\n\r\n\xc1",),
            id="not msgpack",
        ),
        pytest.param(
            (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1\r\n\r\n{",), id="not JSON"
        ),
    ],
)
async def test_what_got_no_answer_may_have_arrived(peers: Peers, parts: tuple[bytes, ...]) -> None:
    async with said(*parts) as address:
        with pytest.raises(PeerUnreachable) as error:
            await peers.call("POST", address, "/", {}, seconds=SECONDS)
    assert error.value.sent is True
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize("parts", [(), (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n123",)], ids=["at all", "whole"])
async def test_the_deadline_is_for_the_whole_answer(peers: Peers, parts: tuple[bytes, ...]) -> None:
    async with said(*parts, hang=True) as address:
        with pytest.raises(PeerUnreachable, match=r"no answer within 0\.05 s") as error:
            await peers.call("GET", address, "/", seconds=0.05)
    assert error.value.sent is True


async def test_bytes_are_fetched_whole_or_not_at_all(peers: Peers) -> None:
    async with said(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc") as address:
        assert await peers.fetch(address, "/", seconds=SECONDS) == b"abc"
    async with said(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc") as address:
        with pytest.raises(PeerUnreachable):
            await peers.fetch(address, "/", seconds=SECONDS)
    async with said(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n") as address:
        with pytest.raises(PeerRefused):
            await peers.fetch(address, "/", seconds=SECONDS)


@pytest.mark.parametrize(
    ("kind", "raw", "value"),
    [
        (PACKED, msgpack.packb({1: "x"}), {1: "x"}),
        ("application/problem+json", b'{"detail": "x"}', {"detail": "x"}),
        ("text/html", b"<html>", None),
    ],
)
def test_what_a_body_means(kind: str, raw: bytes, value: Any) -> None:
    assert unpack(kind, raw) == value
