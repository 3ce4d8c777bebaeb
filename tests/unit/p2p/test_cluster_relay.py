"""Logs that lie on another node: asked directly or through an anchor, streamed as they come, and cut off rather than
ended where they break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from coordination import commands as c
from p2p.api import relay
from p2p.ids import NodeId
from p2p.transport.streams import NoTunnel, TunnelLost
from tests.unit.p2p.boxes import SECONDS, Boxes, boxes
from tests.unit.p2p.test_forward import dead_address


@pytest.fixture
async def led(tmp_path: Path) -> AsyncIterator[Boxes]:
    """`a` leads; `c` works on the only job."""
    async with boxes(tmp_path) as made:
        await made.elect(made.a)
        for box in (made.a, made.b):
            box.cluster.ways = {"c": (made.c.address, ())}
        yield made


async def job_on_c(led: Boxes, text: str = "hello\n") -> str:
    answer = await led.a.desk.submit([{"command": ["true"]}], batch=True, key="", digest="")
    job: str = answer["ids"][0]
    await led.a.desk.propose(c.Claim(led.a.clock.now_ms(), "c", (c.Pick(1, None),)))
    folder = led.c.folder / f"{job}.1"
    folder.mkdir()
    (folder / "stdout").write_text(text)
    return job


@pytest.mark.parametrize("at", ["a", "b", "c"], ids=["the leader", "a follower", "its own node"])
async def test_logs_are_had_through_any_peer(led: Boxes, at: str) -> None:
    job = await job_on_c(led)
    answer = await getattr(led, at).ask("GET", f"/jobs/{job}/logs")
    assert (answer.status, answer.body) == (200, b"hello\n")
    assert answer.headers["x-p2p-attempt"] == "1"
    assert answer.headers["content-type"].startswith("text/plain")


async def test_what_was_asked_for_travels_along(led: Boxes) -> None:
    job = await job_on_c(led, "1\n2\n3\n")
    assert (await led.b.ask("GET", f"/jobs/{job}/logs?tail=2")).body == b"2\n3\n"
    assert led.c.asked[-1][1] == f"/jobs/{job}/logs?tail=2&attempt=1"
    assert led.c.heads[-1]["x-p2p-direct"] == "live", "by its record it is not over yet"
    part = await led.b.ask("GET", f"/jobs/{job}/logs", headers={"Range": "bytes=2-3"})
    assert (part.status, part.body, part.headers["content-range"]) == (206, b"2\n", "bytes 2-3/6")
    assert led.c.heads[-1]["range"] == "bytes=2-3"
    missing = await led.b.ask("GET", f"/jobs/{job}/logs?attempt=7")
    assert (missing.status, missing.body["field"]) == (404, "attempt")


async def test_logs_are_followed_across_nodes_until_the_job_ends(led: Boxes) -> None:
    job = await job_on_c(led)
    led.c.running.add((job, 1))
    async with (
        asyncio.timeout(SECONDS),
        aiohttp.ClientSession() as session,
        session.get(f"http://{led.b.address}/jobs/{job}/logs?follow=1") as answer,
    ):
        assert await answer.content.readany() == b"hello\n"
        with (led.c.folder / f"{job}.1" / "stdout").open("a") as file:
            file.write("more\n")
        assert await answer.content.readany() == b"more\n"
        led.c.running.clear()
        assert await answer.content.read() == b""


async def test_whoever_stops_following_a_silent_job_is_let_go(led: Boxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "LISTEN_SECONDS", 0.01)
    job = await job_on_c(led)
    led.c.running.add((job, 1))
    async with asyncio.timeout(SECONDS):
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://{led.b.address}/jobs/{job}/logs?follow=1") as answer,
        ):
            assert await answer.content.readany() == b"hello\n"
            connector = led.b.peers.session.connector
            assert connector is not None
            assert connector._acquired
        while connector._acquired:
            await asyncio.sleep(0.005)


async def test_half_a_log_is_not_taken_for_a_whole_one(led: Boxes) -> None:
    """The worker's machine dies in the middle: the asker's connection breaks off too. Once the answer had begun there
    followed the text of an error, and a second answer's head."""

    async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-P2P-Attempt: 1\r\n\r\n5\r\nhalf \r\n")
        await writer.drain()
        writer.close()

    job = await job_on_c(led)
    server = await asyncio.start_server(dies, "127.0.0.1", 0)
    async with server, asyncio.timeout(SECONDS):
        led.b.cluster.ways = {"c": ("{}:{}".format(*server.sockets[0].getsockname()), ())}
        told = await led.b.raw(f"GET /jobs/{job}/logs HTTP/1.1\r\nHost: {led.b.address}\r\n\r\n".encode())
    assert b"half " in told
    assert told.count(b"HTTP/1.1") == 1
    assert not told.endswith(b"0\r\n\r\n")


async def test_a_node_that_cannot_be_reached_is_503_with_the_reason(led: Boxes) -> None:
    job = await job_on_c(led)
    led.b.cluster.ways = {"c": (dead_address(), ())}
    answer = await led.b.ask("GET", f"/jobs/{job}/logs")
    assert (answer.status, answer.body["field"]) == (503, "node")
    led.b.cluster.ways = {"c": (None, ())}
    assert "it is not known how" in (await led.b.ask("GET", f"/jobs/{job}/logs")).detail


class FakeTunnel:
    """Answers as told; what is asked is kept."""

    def __init__(self, *chunks: bytes | Exception, begin: Exception | None = None) -> None:
        self._chunks, self._begin = chunks, begin
        self.asked: list[tuple[str, str, str]] = []
        self.status, self.headers = 200, {"content-type": "text/plain; charset=utf-8", "x-secret": "kept back"}

    async def open(self, node: NodeId, method: str, path: str, *, headers: Any, timeout: float) -> Any:
        self.asked.append((node, method, path))
        if self._begin is not None:
            raise self._begin
        return self

    async def __aenter__(self) -> FakeTunnel:
        return self

    async def __aexit__(self, *_: Any) -> None: ...

    @property
    def chunks(self) -> AsyncIterator[bytes]:
        async def give() -> AsyncIterator[bytes]:
            for chunk in self._chunks:
                if isinstance(chunk, Exception):
                    raise chunk
                yield chunk

        return give()


async def test_a_node_that_cannot_be_dialled_is_asked_through_its_anchors_one_after_the_other(led: Boxes) -> None:
    job = await job_on_c(led)
    led.b.cluster.ways = {"c": (None, (dead_address(), led.a.address))}
    led.a.cluster.tunnel = FakeTunnel(b"through ", b"the tunnel")
    answer = await led.b.ask("GET", f"/jobs/{job}/logs?tail=5")
    assert (answer.status, answer.body) == (200, b"through the tunnel")
    assert "x-secret" not in answer.headers
    assert led.a.cluster.tunnel.asked == [("c", "GET", f"/jobs/{job}/logs?tail=5&attempt=1")]


async def test_an_anchor_asks_through_its_own_tunnel(led: Boxes) -> None:
    job = await job_on_c(led)
    led.b.cluster.ways, led.b.cluster.anchors = {"c": (None, ())}, {"c": ("b",)}
    led.b.cluster.tunnel = FakeTunnel(b"x")
    assert (await led.b.ask("GET", f"/jobs/{job}/logs")).body == b"x"


class ReturningTunnel(FakeTunnel):
    """Is there again when it has been asked so often."""

    def __init__(self, absent: int) -> None:
        super().__init__(b"x")
        self._absent = absent

    async def open(self, *question: Any, **how: Any) -> Any:
        opened = await super().open(*question, **how)
        if len(self.asked) <= self._absent:
            raise NoTunnel("none")
        return opened


async def test_an_anchor_without_the_tunnel_is_not_the_last_word(led: Boxes) -> None:
    """The node has just moved its tunnels to other anchors, and not everybody has heard."""
    job = await job_on_c(led)
    led.b.cluster.ways = {"c": (None, (led.c.address, led.a.address))}
    led.b.cluster.anchors = {"c": ("b", "c", "a")}
    led.b.cluster.tunnel = FakeTunnel(begin=NoTunnel("none"))
    led.c.cluster.tunnel = FakeTunnel(begin=TunnelLost("gone"))
    led.a.cluster.tunnel = FakeTunnel(b"x")
    assert (await led.b.ask("GET", f"/jobs/{job}/logs")).body == b"x"
    assert [len(box.cluster.tunnel.asked) for box in (led.b, led.c, led.a)] == [1, 1, 1]


async def test_a_tunnel_that_is_back_in_a_moment_is_waited_for(led: Boxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "AGAIN_SECONDS", 0.001)
    job = await job_on_c(led)
    led.b.cluster.ways, led.b.cluster.anchors = {"c": (None, (led.a.address,))}, {"c": ("a",)}
    led.a.cluster.tunnel = ReturningTunnel(absent=3)
    assert (await led.b.ask("GET", f"/jobs/{job}/logs")).body == b"x"
    led.a.cluster.tunnel = FakeTunnel(begin=NoTunnel("none"))
    monkeypatch.setattr(relay, "TUNNEL_SECONDS", 0.02)
    answer = await led.b.ask("GET", f"/jobs/{job}/logs")
    assert (answer.status, answer.body["field"]) == (503, "node")
    assert "holds no tunnel to it now" in answer.detail
    assert len(led.a.cluster.tunnel.asked) > 1


async def test_the_target_passes_a_tunnel_as_it_came(led: Boxes) -> None:
    """Unquoted and put together again, a value with an ampersand would be two."""
    led.b.cluster.ways = {"c": (None, ())}
    led.b.cluster.tunnel = FakeTunnel(b"x")
    line = f"GET /peer/tunnel/c/jobs/a%2Fb?kind=a%26b HTTP/1.1\r\nHost: {led.b.address}\r\nConnection: close\r\n\r\n"
    assert b" 200 " in await led.b.raw(line.encode())
    assert led.b.cluster.tunnel.asked == [("c", "GET", "/jobs/a%2Fb?kind=a%26b")]


@pytest.mark.parametrize("begin", [NoTunnel("none"), TunnelLost("gone")])
async def test_a_tunnel_that_is_not_there_is_503(led: Boxes, begin: Exception) -> None:
    led.b.cluster.ways = {"c": (None, ())}
    led.b.cluster.tunnel = FakeTunnel(begin=begin)
    assert (await led.b.ask("GET", "/peer/tunnel/c/health")).status == 503


async def test_a_tunnel_that_breaks_breaks_the_answer_off(led: Boxes) -> None:
    led.b.cluster.ways = {"c": (None, ())}
    led.b.cluster.tunnel = FakeTunnel(b"half ", TunnelLost("gone"))
    told = await led.b.raw(f"GET /peer/tunnel/c/x HTTP/1.1\r\nHost: {led.b.address}\r\n\r\n".encode())
    assert b"half " in told
    assert not told.endswith(b"0\r\n\r\n")
    assert told.count(b"HTTP/1.1") == 1


async def test_the_job_is_looked_up_in_the_copy_when_there_is_no_leader(led: Boxes) -> None:
    job = await job_on_c(led)
    led.depose()
    led.b.leadership.lost(led.b.leadership.leader.term)
    assert (await led.b.ask("GET", f"/jobs/{job}/logs")).body == b"hello\n"
    led.b.cluster.copy = False
    assert (await led.b.ask("GET", f"/jobs/{job}/logs")).status == 503
    assert (await led.a.ask("GET", "/jobs/none/logs")).status == 404
