"""HTTP to a node that only dials: whole, in pieces, for ever, cut off, refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from p2p.ids import NodeId, VoterId
from p2p.transport.streams import (
    DATA,
    HEAD,
    OPEN,
    RESET,
    WINDOW,
    NoTunnel,
    TunnelBusy,
    TunnelFailed,
    TunnelLost,
    TunnelTimeout,
)
from p2p.transport.tunnel import CHANNEL, MAX_STREAMS, Tunnel, TunnelResponse
from tests.unit.p2p.transport.endpoints import PATIENCE, Endpoint, OverSockets, nothing_leaks, persist

ANCHOR, HIDDEN = NodeId("a"), NodeId("o")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Site:
    """The hidden node's own HTTP port."""

    handlers: dict[str, Handler] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    left: int = 0  # handlers that were cut off
    news: asyncio.Event = field(default_factory=asyncio.Event)
    runner: web.AppRunner | None = None

    async def start(self) -> str:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{tail:.*}", self.handle)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        try:
            handler = self.handlers.get(request.path)
            if handler is not None:
                return await handler(request)
            self.requests.append((request.method, request.path_qs, dict(request.headers), await request.read()))
            return web.Response(body=b"answer to " + request.path_qs.encode(), headers={"X-Mine": "1"})
        except (asyncio.CancelledError, ConnectionError):
            self.left += 1
            self.news.set()
            raise

    async def until(self, enough: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not enough():
                self.news.clear()
                await self.news.wait()


@dataclass
class World:
    network: OverSockets
    anchor: Endpoint
    near: Tunnel
    hidden: Endpoint
    far: Tunnel
    site: Site

    async def get(self, path: str, **more: Any) -> TunnelResponse:
        return await self.near.open(HIDDEN, "GET", path, timeout=PATIENCE, **more)

    async def body(self, path: str, **more: Any) -> bytes:
        async with await self.get(path, **more) as response:
            return await response.read()

    def busy(self) -> int:
        """Streams that any end still knows."""
        return sum(len(side.streams) for tunnel in (self.near, self.far) for side in tunnel._sides.values())


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with nothing_leaks():
        network, site = OverSockets(), Site()
        anchor = Endpoint(network.links("a@1"), VoterId("a@1"))
        near = Tunnel(anchor.transport, base_url=None)
        await network.listen(anchor)
        hidden = Endpoint(network.links("o@1"), VoterId("o@1"))
        far = Tunnel(hidden.transport, base_url=await site.start(), token="sesame")
        await near.start()
        await far.start()
        await hidden.transport.start()
        far.hold({ANCHOR})
        await persist(lambda: None, lambda: near.reaches(HIDDEN))
        yield World(network, anchor, near, hidden, far, site)
        await near.stop()
        await far.stop()
        await hidden.transport.stop()
        await network.close()
        assert site.runner is not None
        await site.runner.cleanup()


# -- what travels ----------------------------------------------------------------------------------------------------


async def test_a_request_and_its_answer_travel_whole(world: World) -> None:
    async with await world.get("/jobs/%37/logs?stream=stdout&tail=2&q=%C3%BC+x") as response:
        assert response.status == 200
        assert ("X-Mine", "1") in response.headers
        assert await response.read() == b"answer to /jobs/%37/logs?stream=stdout&tail=2&q=%C3%BC+x"
    ((method, path, _, body),) = world.site.requests
    assert (method, path, body) == ("GET", "/jobs/%37/logs?stream=stdout&tail=2&q=%C3%BC+x", b"")
    assert world.busy() == 0


@pytest.mark.parametrize("size", [1, 1000, WINDOW + 1, 5 << 20])
async def test_bodies_of_any_size_travel_both_ways(world: World, size: int) -> None:
    async def echo(request: web.Request) -> web.StreamResponse:
        assert request.content_length == size
        return web.Response(body=await request.read())

    world.site.handlers["/echo"] = echo
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)
    async with await world.near.open(HIDDEN, "POST", "/echo", body=body, timeout=PATIENCE) as response:
        assert await response.read() == body
    assert world.busy() == 0


@pytest.mark.parametrize("status", [204, 302, 404, 503])
async def test_any_status_is_passed_on_as_it_is(world: World, status: int) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, headers={"Location": "/elsewhere"})

    world.site.handlers["/x"] = answer
    async with await world.get("/x") as response:
        assert (response.status, await response.read()) == (status, b"")


async def test_headers_of_the_connection_and_of_the_callers_identity_do_not_travel(world: World) -> None:
    headers = [
        ("Accept", "text/plain"),
        ("Content-Type", "application/json"),
        ("X-Kept", "1"),
        ("Connection", "keep-alive, X-Named"),
        ("X-Named", "1"),
        ("Host", "evil.example"),
        ("Origin", "http://evil.example"),
        ("Sec-Fetch-Site", "cross-site"),
        ("Cookie", "a=b"),
        ("Authorization", "Bearer somebody-elses"),
        ("Transfer-Encoding", "chunked"),
        ("Content-Length", "999"),
        ("Upgrade", "websocket"),
    ]
    await world.body("/x", headers=headers)
    ((_, _, seen, _),) = world.site.requests
    assert {name: seen.get(name) for name in ("Accept", "Content-Type", "X-Kept")} == {
        "Accept": "text/plain",
        "Content-Type": "application/json",
        "X-Kept": "1",
    }
    assert seen["Authorization"] == "Bearer sesame"
    assert seen["Host"].startswith("127.0.0.1:")
    gone = {"X-Named", "Origin", "Sec-Fetch-Site", "Cookie", "Transfer-Encoding", "Upgrade", "Accept-Encoding"}
    assert not gone & set(seen)
    assert seen.get("Content-Length") in (None, "0")


async def test_an_answers_connection_headers_do_not_travel_and_its_encoding_is_left_alone(world: World) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.Response(body=b'{"log": "' + b"x" * 5000 + b'"}', headers={"Connection": "close"})
        response.enable_compression(web.ContentCoding.gzip)
        return response

    world.site.handlers["/x"] = answer
    async with await world.get("/x", headers=[("Accept-Encoding", "gzip")]) as response:
        names = {name.lower(): value for name, value in response.headers}
        body = await response.read()
    assert "connection" not in names
    assert "transfer-encoding" not in names
    assert names["content-encoding"] == "gzip"
    assert body.startswith(b"\x1f\x8b")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "http://evil/"),
        ("GET", "x"),
        ("GET", "/a b"),
        ("GET", "/\r\nX: 1"),
        ("GET", ""),
        ("get", "/"),
        ("", "/"),
    ],
)
async def test_what_is_no_request_is_an_error_of_the_caller(world: World, method: str, path: str) -> None:
    with pytest.raises(ValueError, match="not a request"):
        await world.near.open(HIDDEN, method, path, timeout=1)
    assert world.busy() == 0


async def test_a_path_cannot_lead_to_another_host(world: World) -> None:
    for path in ("//evil.example/x", "/@evil.example/", "/../x"):
        await world.body(path)
    assert len(world.site.requests) == 3


async def test_a_head_too_large_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="head is larger"):
        await world.get("/x", headers=[("X-Long", "x" * 70_000)])


# -- for ever --------------------------------------------------------------------------------------------------------


def lines(produced: list[int], piece: bytes = b"line\n", *, stop_after: int | None = None) -> Handler:
    """An answer that never ends, as a followed log; counts what it has written."""

    async def follow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while stop_after is None or len(produced) < stop_after:
            await response.write(piece)
            produced.append(1)
            await asyncio.sleep(0)
        return response

    return follow


async def test_a_followed_log_is_read_while_it_grows_and_ends_when_the_reader_leaves(world: World) -> None:
    produced: list[int] = []
    world.site.handlers["/follow"] = lines(produced, b"a line of a log\n" * 32)
    response = await world.get("/follow")
    got = 0
    async with response:
        async for chunk in response.chunks:
            got += len(chunk)
            if got > 3 * WINDOW:
                break
    await world.site.until(lambda: world.site.left == 1)
    await persist(lambda: None, lambda: world.busy() == 0)


async def test_pieces_arrive_when_they_are_written(world: World) -> None:
    go = asyncio.Event()

    async def two(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"one")
        await go.wait()
        await response.write(b"two")
        return response

    world.site.handlers["/two"] = two
    async with await world.get("/two") as response:
        assert await anext(response.chunks) == b"one"
        go.set()
        assert await anext(response.chunks) == b"two"
        with pytest.raises(StopAsyncIteration):
            await anext(response.chunks)


async def test_a_slow_reader_holds_at_most_a_window_and_stops_the_writer(world: World) -> None:
    produced: list[int] = []
    piece = bytes(64 * 1024)
    world.site.handlers["/flood"] = lines(produced, piece)
    async with await world.get("/flood") as response:
        last = -1
        while len(produced) > last:  # until the writer is stopped by its own socket
            last = len(produced)
            await asyncio.sleep(0.2)
        (side,) = world.near._sides.values()
        (stream,) = side.streams.values()
        assert 0 < stream.buffered <= WINDOW
        assert world.far._sides[next(iter(world.far._sides))].link.outbox.bytes <= WINDOW
        assert len(produced) * len(piece) < 16 << 20  # the sockets' own buffers on loopback
        async for _ in response.chunks:
            if len(produced) > last + 10:
                break  # it goes on when it is read


async def test_a_slow_reader_holds_up_nobody_else(world: World) -> None:
    world.site.handlers["/flood"] = lines([], bytes(64 * 1024))
    async with await world.get("/flood"):
        for n in range(20):
            assert await world.body(f"/{n}") == b"answer to /%d" % n


async def test_a_slow_server_stops_the_body_of_a_request(world: World) -> None:
    async def never(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(3600)
        raise AssertionError

    world.site.handlers["/never"] = never
    asking = asyncio.create_task(world.near.open(HIDDEN, "POST", "/never", body=bytes(64 << 20), timeout=1))
    most = 0

    def look() -> None:
        nonlocal most
        (side,) = world.far._sides.values() or [None]
        (near,) = world.near._sides.values() or [None]
        for stream in side.streams.values() if side else ():
            most = max(most, stream.buffered)
        most = max(most, near.link.outbox.bytes if near else 0)

    await persist(look, asking.done)
    with pytest.raises(TunnelTimeout):
        await asking
    assert 0 < most <= WINDOW
    await persist(lambda: None, lambda: world.busy() == 0)


async def test_tiny_pieces_are_bounded_too(world: World) -> None:
    produced: list[int] = []
    world.site.handlers["/drip"] = lines(produced, b"x", stop_after=5000)
    async with await world.get("/drip") as response:
        assert len(await response.read()) == 5000


# -- what goes wrong -------------------------------------------------------------------------------------------------


async def test_a_node_without_a_tunnel_is_an_error_of_its_own(world: World) -> None:
    with pytest.raises(NoTunnel, match="node z"):
        await world.near.open(NodeId("z"), "GET", "/", timeout=1)


async def test_a_node_that_does_not_answer_in_time(world: World) -> None:
    async def never(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(3600)
        raise AssertionError

    world.site.handlers["/never"] = never
    with pytest.raises(TunnelTimeout, match="node o"):
        await world.near.open(HIDDEN, "GET", "/never", timeout=0.05)
    await world.site.until(lambda: world.site.left == 1)
    await persist(lambda: None, lambda: world.busy() == 0)


async def test_a_caller_that_is_cancelled_ends_its_request(world: World) -> None:
    begun = asyncio.Event()

    async def never(request: web.Request) -> web.StreamResponse:
        begun.set()
        await asyncio.sleep(3600)
        raise AssertionError

    world.site.handlers["/never"] = never
    asking = asyncio.create_task(world.get("/never"))
    await begun.wait()
    asking.cancel()
    await asyncio.wait({asking})
    await world.site.until(lambda: world.site.left == 1)
    await persist(lambda: None, lambda: world.busy() == 0)


async def test_a_broken_link_ends_the_answers_on_it(world: World) -> None:
    world.site.handlers["/follow"] = lines([])
    response = await world.get("/follow")
    await anext(response.chunks)
    (link,) = [link for link in world.anchor.transport._table.links if link.channel == CHANNEL]
    link.sever()
    with pytest.raises(TunnelLost, match="node o"):
        async for _ in response.chunks:
            pass
    await world.site.until(lambda: world.site.left == 1)
    await persist(lambda: None, lambda: world.busy() == 0)


async def test_an_answer_that_has_come_whole_outlives_its_link(world: World) -> None:
    response = await world.get("/x")
    await persist(lambda: None, lambda: response._stream._ended)
    (link,) = [link for link in world.anchor.transport._table.links if link.channel == CHANNEL]
    link.sever()
    await persist(lambda: None, lambda: link not in world.anchor.transport._table)
    assert await response.read() == b"answer to /x"


async def test_a_broken_link_ends_who_waits_for_an_answer(world: World) -> None:
    begun = asyncio.Event()

    async def never(request: web.Request) -> web.StreamResponse:
        begun.set()
        await asyncio.sleep(3600)
        raise AssertionError

    world.site.handlers["/never"] = never
    asking = asyncio.create_task(world.get("/never"))
    await begun.wait()
    await world.far.stop()
    await world.hidden.transport.stop()
    with pytest.raises(TunnelLost):
        await asking


async def test_a_tunnel_that_broke_comes_back(world: World) -> None:
    (link,) = [link for link in world.anchor.transport._table.links if link.channel == CHANNEL]
    link.sever()
    await persist(lambda: None, lambda: world.anchor.transport.newest(HIDDEN, CHANNEL) not in (None, link))
    assert await world.body("/again") == b"answer to /again"


async def test_an_answer_that_breaks_off_is_told(world: World) -> None:
    async def broken(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b"half")
        assert request.transport is not None
        request.transport.close()
        return response

    world.site.handlers["/broken"] = broken
    async with await world.get("/broken") as response:
        with pytest.raises(TunnelFailed, match="ClientPayloadError"):
            await response.read()


async def test_a_port_that_nobody_listens_on_is_told(world: World) -> None:
    world.far._base_url = "http://127.0.0.1:1"
    with pytest.raises(TunnelFailed, match="ClientConnectorError"):
        await world.get("/x")


async def test_a_node_that_takes_no_requests_says_so(world: World) -> None:
    world.far._base_url = None
    with pytest.raises(TunnelFailed, match="takes no such request"):
        await world.get("/x")


async def test_many_requests_run_side_by_side(world: World) -> None:
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(world.body(f"/{n}")) for n in range(MAX_STREAMS)]
    assert [task.result() for task in asked] == [b"answer to /%d" % n for n in range(MAX_STREAMS)]


async def test_one_request_too_many_is_refused_and_the_next_fits_again(world: World) -> None:
    world.site.handlers["/follow"] = lines([])
    held = [await world.get("/follow") for _ in range(MAX_STREAMS)]
    with pytest.raises(TunnelBusy, match=f"{MAX_STREAMS} requests to node o"):
        await world.get("/one-more")
    held.pop().close()
    assert await world.body("/fits") == b"answer to /fits"
    for response in held:
        response.close()
    await persist(lambda: None, lambda: world.busy() == 0)


async def test_the_other_end_refuses_too_many_by_itself(world: World) -> None:
    world.site.handlers["/follow"] = lines([])
    held = [await world.get("/follow") for _ in range(MAX_STREAMS)]
    (side,) = world.near._sides.values()
    side.opened = 0  # a peer that does not count
    with pytest.raises(TunnelBusy, match="from this tunnel"):
        await world.get("/one-more")
    side.opened = len(held)
    for response in held:
        response.close()
    await persist(lambda: None, lambda: world.busy() == 0)


MISUSE: dict[str, list[Any]] = {
    "not a frame": [7],
    "an unknown kind": [99, 2],
    "a stream that is ours to open": [OPEN, 1, "GET", "/", [], 0],
    "a body of no length": [OPEN, 6, "GET", "/", [], -1],
    "a method of bytes": [OPEN, 6, b"GET", "/", [], 0],
    "headers of no pairs": [OPEN, 6, "GET", "/", ["x"], 0],
    "an answer to nothing we asked": [HEAD, 4, 200],
}


@pytest.mark.parametrize("frame", MISUSE.values(), ids=MISUSE)
async def test_misuse_ends_the_link_and_is_survived(world: World, frame: list[Any]) -> None:
    world.site.handlers["/follow"] = lines([])
    async with await world.get("/follow"), await world.get("/follow"):  # streams 2 and 4
        (side,) = world.near._sides.values()
        assert set(side.streams) == {2, 4}
        side.write(frame)
        await persist(lambda: None, lambda: side.link not in world.anchor.transport._table)
    await persist(lambda: None, lambda: world.near.reaches(HIDDEN))
    assert await world.body("/again") == b"answer to /again"


async def test_more_data_than_credit_ends_the_link(world: World) -> None:
    begun = asyncio.Event()

    async def never(request: web.Request) -> web.StreamResponse:
        begun.set()
        await asyncio.sleep(3600)
        raise AssertionError

    world.site.handlers["/never"] = never
    asking = asyncio.create_task(world.get("/never"))
    await begun.wait()
    (side,) = world.near._sides.values()
    (number,) = side.streams
    for _ in range(3):
        side.write([DATA, number, bytes(WINDOW // 2)])
    with pytest.raises(TunnelLost):
        await asking


async def test_frames_of_streams_that_are_over_are_ignored(world: World) -> None:
    (side,) = [world.near._side(link) for link in world.anchor.transport._table.links if link.channel == CHANNEL]
    for frame in ([DATA, 98, b"x"], [RESET, 98, "cancelled", "late"], [HEAD, 98, 200, []]):
        side.write(frame)
    assert await world.body("/x") == b"answer to /x"
