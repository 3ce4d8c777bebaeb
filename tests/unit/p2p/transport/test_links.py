"""Links over real sockets on loopback: who is let in, who is dialled and dialled again, what is kept apart."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import replace
from typing import Any

import aiohttp
import msgpack
import pytest
from aiohttp import WSMsgType, web

from p2p.ids import NodeId, VoterId
from p2p.transport import MAX_FRAME_BYTES, MAX_PAYLOAD_BYTES
from p2p.transport.frames import pack
from p2p.transport.handshake import PATH
from p2p.transport.hello import REFUSED, WIRE_VERSION, decode
from p2p.transport.outbox import LIMITS
from tests.unit.p2p.transport.endpoints import CLUSTER, QUICK, Endpoint, OverSockets, Server, persist, turns

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


async def meet(a: Endpoint, b: Endpoint, channel: str = "control") -> None:
    a.send(b, b"hello", channel)
    await b.ears.hears(b"hello")
    b.ears.received.clear()


@asynccontextmanager
async def stranger(
    network: OverSockets, endpoint: Endpoint, channel: str = "control", **said: Any
) -> AsyncIterator[Any]:
    """A peer made by hand, which has said its hello; `said` changes it."""
    hello = {"v": WIRE_VERSION, "cluster": CLUSTER, "from": "x@1", "to": endpoint.voter, "boot": "bx", "time_ms": 0}
    async with aiohttp.ClientSession() as session:
        url = f"http://{network.server(endpoint).address}{PATH}?channel={channel}"
        async with session.ws_connect(url, autoping=False, timeout=aiohttp.ClientWSTimeout(ws_close=0.1)) as ws:
            if said.get("hello", ...) is not None:
                await ws.send_bytes(said.get("hello") or msgpack.packb(hello | said))
            yield ws


async def refusal(ws: Any) -> str:
    message = await ws.receive(timeout=5)
    assert (message.type, message.data) == (WSMsgType.CLOSE, REFUSED)
    return str(message.extra)


# -- whom we let in --------------------------------------------------------------------------------------------------

STRANGERS = {
    "wrong cluster": ({"cluster": "c2"}, "cluster: this is cluster c1, not c2"),
    "wrong disk": ({"to": "a@emptied"}, "disk: this is a@1, another disk"),
    "wrong node": ({"to": "z@1"}, "node: this is node a, not z"),
    "old version": ({"v": 0}, "version: you speak version 0"),
    "ourselves, copied": ({"from": "a@1"}, "clone: you are a@1, and so am I"),
    "no hello": ({"hello": b"GET / HTTP"}, "hello: this is not a hello"),
}


@pytest.mark.parametrize(("said", "reason"), STRANGERS.values(), ids=STRANGERS)
async def test_strangers_are_refused_with_the_reason_counted_and_logged_once(
    network: OverSockets, said: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "p2p.transport")
    a = await network.start("a@1")
    for _ in range(3):
        async with stranger(network, a, **said) as ws:
            assert (await refusal(ws)).startswith(reason)
    kind = reason.partition(":")[0]
    assert a.transport.refused == {kind: 3}
    assert len(caplog.records) == 1
    assert reason.partition(": ")[2] in caplog.text
    assert (a.ears.received, a.ears.hints) == ([], [])


async def test_an_unknown_channel_is_refused(network: OverSockets) -> None:
    a = await network.start("a@1")
    async with stranger(network, a, channel="gossip") as ws:
        assert await refusal(ws) == "channel: there is no channel 'gossip' here"


async def test_who_says_nothing_is_not_waited_for(network: OverSockets) -> None:
    a = await network.start("a@1", timing=replace(QUICK, hello_seconds=0.05))
    async with stranger(network, a, hello=None) as ws:
        assert (await ws.receive(timeout=5)).type is WSMsgType.CLOSE


async def test_a_stop_does_not_wait_for_who_says_nothing(network: OverSockets) -> None:
    a = await network.start("a@1", timing=replace(QUICK, hello_seconds=3600.0))
    async with stranger(network, a, hello=None):
        async with asyncio.timeout(5):
            await a.transport.stop()


async def test_a_hello_is_answered_with_ours(network: OverSockets) -> None:
    a = await network.start("a@1")
    async with stranger(network, a) as ws:
        ours = decode((await ws.receive(timeout=5)).data)
        assert (ours.cluster, ours.sender, ours.to) == (CLUSTER, "a@1", "x@1")
        await ws.send_bytes(pack([b"one", b"two"]))
        await a.ears.count(2)
        assert a.ears.received == [("x@1", b"one"), ("x@1", b"two")]


BROKEN = {
    "a length beyond the end": lambda ws: ws.send_bytes(b"\0\0\1\0x"),
    "a text": lambda ws: ws.send_str("hello"),
    "a frame too large": lambda ws: ws.send_bytes(bytes(MAX_FRAME_BYTES + 1)),
}


@pytest.mark.parametrize("act", BROKEN.values(), ids=BROKEN)
async def test_nonsense_ends_the_link_and_nothing_else(network: OverSockets, act: Any) -> None:
    a = await network.start("a@1")
    b = await network.start("b@1")
    await meet(b, a)
    async with stranger(network, a) as ws:
        await ws.receive(timeout=5)
        try:
            await act(ws)
        except ConnectionError:
            pass  # refused before all of it was sent
        while (await ws.receive(timeout=5)).type not in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.ERROR):
            pass
    b.send(a, b"still here")
    await a.ears.hears(b"still here")
    assert a.ears.payloads == [b"still here"]


async def test_pings_are_answered(network: OverSockets) -> None:
    a = await network.start("a@1")
    async with stranger(network, a) as ws:
        await ws.receive(timeout=5)
        await ws.ping(b"there?")
        message = await ws.receive(timeout=5)
        assert (message.type, bytes(message.data)) == (WSMsgType.PONG, b"there?")


async def test_a_callback_that_fails_ends_the_link_not_the_node(
    network: OverSockets, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = await network.start("a@1"), await network.start("b@1")

    def fail(*_: object) -> None:
        b.ears.listen(b.transport)
        raise RuntimeError("broken core")

    b.transport.on_receive = fail
    a.send(b, b"one")
    await persist(lambda: a.send(b, b"two"), lambda: b"two" in b.ears.payloads)
    assert "broken core" in caplog.text


async def test_the_token_is_sent_and_never_logged(network: OverSockets, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    a = await network.start("a@1", token="sesame")
    b = await network.start("b@1")
    await meet(a, b)
    network.addresses[C] = "127.0.0.1:1"
    a.send("c@1", b"nobody there")
    await a.ears.until(lambda: ("c", False) in a.ears.hints)
    assert network.server(b).authorizations == ["Bearer sesame"]
    assert "sesame" not in caplog.text


async def test_who_answers_with_an_error_is_dialled_again_later(network: OverSockets) -> None:
    a = await network.start("a@1")
    asked = []

    async def unauthorized(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        return web.Response(status=401)

    server = Server(unauthorized)
    await server.start()
    network.addresses[B] = server.address
    await persist(lambda: a.send("b@1", b"x"), lambda: len(asked) >= 3)
    await server.stop()


# -- whom we dial ----------------------------------------------------------------------------------------------------


async def test_whoever_answers_the_dial_must_be_the_voter_we_mean(network: OverSockets) -> None:
    a, b = await network.start("a@1"), await network.start("b@1")
    network.addresses[C] = network.server(b).address  # b has c's old address
    for refusing in (b, a):  # one refuses, the other is told
        await persist(lambda: a.send("c@1", b"not for b"), lambda end=refusing: end.transport.refused["node"] >= 2)
    assert b.ears.received == []


async def test_a_peer_whose_server_restarts_on_the_same_port_is_found_again(network: OverSockets) -> None:
    a, b = await network.start("a@1"), await network.start("b@1")
    await meet(a, b)
    port = network.server(b).port
    await network.stop(b)
    await a.ears.until(lambda: a.ears.hints[-1:] == [("b", False)])
    again = await network.start("b@1", port=port)
    await persist(lambda: a.send(again, b"back?"), lambda: b"back?" in again.ears.payloads)
    assert a.ears.hints == [("b", True), ("b", False), ("b", True)]


async def test_a_new_address_is_picked_up(network: OverSockets) -> None:
    a, b = await network.start("a@1"), await network.start("b@1")
    await meet(a, b)
    old = network.server(b).port
    await network.stop(b)
    again = await network.start("b@1")
    assert network.server(again).port != old
    await persist(lambda: a.send(again, b"found"), lambda: b"found" in again.ears.payloads)


async def test_a_dead_address_is_not_dialled_in_a_hot_loop(network: OverSockets) -> None:
    a = await network.start("a@1", timing=replace(QUICK, backoff_min_seconds=0.02, backoff_max_seconds=0.1))
    network.addresses[B] = "127.0.0.1:1"
    loop = asyncio.get_running_loop()
    began = loop.time()
    await persist(lambda: a.send("b@1", b"x"), lambda: loop.time() - began > 0.5, every=0.001)
    assert 3 <= a.transport.counts["dials"] <= 20


async def test_dialling_ends_with_the_last_send(network: OverSockets) -> None:
    a = await network.start("a@1", timing=replace(QUICK, wanted_seconds=0.1))
    network.addresses[B] = "127.0.0.1:1"
    a.send("b@1", b"x")
    before = asyncio.all_tasks()
    await persist(lambda: None, lambda: asyncio.all_tasks() < before)
    dials = a.transport.counts["dials"]
    await asyncio.sleep(0.2)
    assert a.transport.counts["dials"] == dials


async def test_a_link_that_was_in_use_is_dialled_again_without_a_further_send(network: OverSockets) -> None:
    a, b = await network.start("a@1", timing=replace(QUICK, wanted_seconds=0.5)), await network.start("b@1")
    loop = asyncio.get_running_loop()
    end = loop.time() + 0.7
    await persist(lambda: a.send(b, b"beat"), lambda: loop.time() > end)
    port = network.server(b).port
    await network.stop(b)
    again = await network.start("b@1", port=port)
    await again.ears.until(lambda: again.ears.hints == [("a", True)])


async def test_a_peer_that_shows_itself_is_dialled_at_once(network: OverSockets) -> None:
    slow = replace(QUICK, backoff_min_seconds=3600.0, backoff_max_seconds=3600.0, wanted_seconds=3600.0)
    a, b = await network.start("a@1", timing=slow), await network.start("b@1")
    port = network.server(b).port
    await network.stop(b)
    a.send(b, b"lost")
    await a.ears.until(lambda: a.ears.hints == [("b", False)])
    again = await network.start("b@1", port=port)
    again.send(a, b"here I am")
    await persist(lambda: None, lambda: any(link["dialed"] for link in a.transport.peers()))


async def test_a_refused_dial_is_a_hint_once(network: OverSockets) -> None:
    a = await network.start("a@1")
    network.addresses[B] = "127.0.0.1:1"
    await persist(lambda: a.send("b@1", b"x"), lambda: a.transport.counts["dials"] >= 3)
    assert a.ears.hints == [("b", False)]


async def test_a_reset_connection_is_a_hint_at_once(network: OverSockets) -> None:
    """What a killed process leaves: its kernel resets the connection, and nobody has to wait for a timeout."""
    a = await network.start("a@1")
    async with stranger(network, a) as ws:
        await a.ears.until(lambda: a.ears.hints == [("x", True)])
        connection = ws.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        ws._response.connection.transport.abort()
        await a.ears.until(lambda: a.ears.hints == [("x", True), ("x", False)])


async def test_a_silent_address_gets_a_second_attempt_and_no_third(network: OverSockets) -> None:
    """A listener whose queue is full answers no SYN, as a lost one is not answered."""
    a = await network.start("a@1", timing=replace(QUICK, second_attempt_seconds=0.02, connect_seconds=0.3))
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        listener.setblocking(False)
        network.addresses[B] = f"127.0.0.1:{listener.getsockname()[1]}"
        a.send("b@1", b"x")
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(5):
            first, _ = await loop.sock_accept(listener)
            second, _ = await loop.sock_accept(listener)
        assert a.transport.counts["dials"] == 1
        await persist(lambda: a.send("b@1", b"x"), lambda: a.transport.counts["dials"] == 2)
        await a.transport.stop()
        first.close()
        second.close()
    assert a.ears.hints == []  # a timeout is no refusal


async def test_both_ends_have_no_delay_and_a_short_user_timeout(network: OverSockets) -> None:
    a, b = await network.start("a@1"), await network.start("b@1")
    await meet(a, b)
    for endpoint in (a, b):
        (link,) = endpoint.transport._table.links
        connection = link._socket
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2000


async def test_idle_links_are_closed_and_come_back_and_that_is_no_news(network: OverSockets) -> None:
    a = await network.start("a@1", timing=replace(QUICK, idle_seconds=0.05, wanted_seconds=0.01))
    b = await network.start("b@1")
    await meet(a, b)
    await persist(lambda: None, lambda: not a.transport.peers() and not b.transport.peers())
    a.send(b, b"again")
    await b.ears.hears(b"again")
    assert ("b", False) not in a.ears.hints
    assert ("a", False) not in b.ears.hints


async def test_a_link_that_is_only_listened_to_is_not_idle(network: OverSockets) -> None:
    a = await network.start("a@1", hidden=True, timing=replace(QUICK, idle_seconds=0.1))
    b = await network.start("b@1")
    await meet(a, b)
    loop = asyncio.get_running_loop()
    end = loop.time() + 0.5
    await persist(lambda: b.send(a, b"beat"), lambda: loop.time() > end)
    assert a.transport.counts["dials"] == 1
    assert a.ears.hints == [("b", True)]


async def test_nothing_is_dialled_before_the_node_belongs_to_a_cluster(network: OverSockets) -> None:
    a, b = await network.start("a@1", cluster=""), await network.start("b@1")
    for _ in range(10):
        a.send(b, b"too early")
        await turns()
    assert (a.transport.counts["dials"], b.transport.refused) == (0, {})
    b.send(a, b"too early")
    await persist(lambda: None, lambda: a.transport.refused["cluster"] > 0)
    a.transport.adopt(CLUSTER)
    await persist(lambda: a.send(b, b"one of you"), lambda: b"one of you" in b.ears.payloads)


# -- what is kept apart ----------------------------------------------------------------------------------------------


async def test_a_large_append_does_not_hold_up_a_heartbeat(network: OverSockets) -> None:
    a, b = await network.start("a@1"), await network.start("b@1")
    await meet(a, b, "log")
    await meet(a, b, "control")
    large = bytes(4 << 20)
    for _ in range(4):
        a.send(b, large, "log")
    a.send(b, b"heartbeat", "control")
    await b.ears.count(5)
    assert b.ears.payloads.index(b"heartbeat") <= 1


async def test_each_side_dials_its_own_pair(network: OverSockets) -> None:
    a, b = await network.start("a@1"), await network.start("b@1")
    for channel in ("control", "log"):
        await meet(a, b, channel)
        await meet(b, a, channel)
    await persist(lambda: None, lambda: len(a.transport.peers()) == 4)
    ways = sorted((link["channel"], link["dialed"]) for link in a.transport.peers())
    assert ways == [("control", False), ("control", True), ("log", False), ("log", True)]
    a.send(b, b"on ours")
    await b.ears.hears(b"on ours")
    sent = {link["dialed"]: link["sent"] for link in a.transport.peers() if link["channel"] == "control"}
    assert sent[True] == 2


async def test_what_waits_goes_out_together(network: OverSockets) -> None:
    a, b = await network.start("a@1"), await network.start("b@1")
    await meet(a, b)
    (link,) = a.transport._table.links
    before = link.frames_sent
    for n in range(100):
        a.send(b, b"%d" % n)
    await b.ears.count(100)
    assert link.frames_sent - before == 1


async def test_a_peer_that_does_not_read_costs_a_bounded_queue(network: OverSockets) -> None:
    a = await network.start("a@1")
    async with stranger(network, a) as ws:
        await ws.receive(timeout=5)
        ws._response.connection.transport.pause_reading()
        await a.ears.until(lambda: a.ears.hints == [("x", True)])
        (link,) = a.transport._table.links
        megabyte = bytes(1 << 20)
        for _ in range(100):
            a.send("x@1", megabyte)
            await turns()
        assert link.outbox.bytes <= LIMITS["control"].bytes
        assert link.outbox.dropped >= 50
        # What the process holds beside the queue: a batch in the transport.
        assert link._ws._writer.transport.get_write_buffer_size() <= 3 << 20
        async with asyncio.timeout(1.5):
            await a.transport.stop()  # nor does it hold up a stop, until the kernel would end it


async def test_the_kernel_gives_up_on_a_peer_that_does_not_read(network: OverSockets) -> None:
    a = await network.start("a@1")
    async with stranger(network, a) as ws:
        await ws.receive(timeout=5)
        ws._response.connection.transport.pause_reading()
        for _ in range(20):
            a.send("x@1", bytes(1 << 20))
        await a.ears.until(lambda: a.ears.hints == [("x", True), ("x", False)])


# -- nodes that nobody can dial --------------------------------------------------------------------------------------


async def test_a_node_that_only_dials_is_answered_on_its_own_links(network: OverSockets) -> None:
    a, o = await network.start("a@1"), await network.start_outbound("o@1")
    o.transport.hold({A})
    await a.ears.until(lambda: ("o", True) in a.ears.hints)
    await persist(lambda: a.send(o, b"are you there?", "log"), lambda: b"are you there?" in o.ears.payloads)
    a.send(o, b"control too")
    await o.ears.hears(b"control too")
    o.send(a, b"yes")
    await a.ears.hears(b"yes")
    large = bytes(MAX_PAYLOAD_BYTES)
    a.send(o, large, "log")
    await o.ears.hears(large)
    assert a.transport.counts["dials"] == 0
    assert {link["dialed"] for link in o.transport.peers()} == {True}
    assert len(o.transport.peers()) == 2  # held, and used: no second pair


async def test_held_links_stay_open_without_a_word_and_come_back(network: OverSockets) -> None:
    a = await network.start("a@1")
    timing = replace(QUICK, idle_seconds=0.02, wanted_seconds=0.0)
    o = await network.start_outbound("o@1", timing=timing)
    o.transport.hold({A})
    await a.ears.until(lambda: ("o", True) in a.ears.hints)
    await asyncio.sleep(0.2)
    assert o.transport.counts["dials"] == 2
    port = network.server(a).port
    await network.stop(a)
    again = await network.start("a@1", port=port)
    await persist(lambda: again.send(o, b"found you"), lambda: b"found you" in o.ears.payloads)


async def test_what_is_held_no_more_is_closed(network: OverSockets) -> None:
    a, b = await network.start("a@1"), await network.start("b@1")
    o = await network.start_outbound("o@1", timing=replace(QUICK, idle_seconds=0.05, wanted_seconds=0.0))
    o.transport.hold({A})
    await persist(lambda: None, lambda: len(o.transport.peers()) == 2)
    o.transport.hold({B})
    await persist(lambda: None, lambda: not a.transport.peers() and len(b.transport.peers()) == 2)


async def test_holding_before_the_start_is_remembered(network: OverSockets) -> None:
    a = await network.start("a@1")
    links = network.links("o@1")
    links.hold({A})
    await links.start()
    await a.ears.until(lambda: ("o", True) in a.ears.hints)
    await links.stop()


async def test_what_is_sent_to_another_disk_of_a_held_node_is_dropped(network: OverSockets) -> None:
    a, o = await network.start("a@1"), await network.start_outbound("o@1")
    o.transport.hold({A})
    await persist(lambda: o.send(a, b"mine"), lambda: b"mine" in a.ears.payloads)
    dials = o.transport.counts["dials"]
    o.send("a@0", b"not yours")
    o.send(a, b"end")
    await a.ears.hears(b"end")
    assert b"not yours" not in a.ears.payloads
    assert o.transport.counts["dials"] == dials


async def test_a_peer_that_cannot_be_dialled_now_is_answered_on_its_link(network: OverSockets) -> None:
    """The address that gossip tells is wrong, or the way there is shut: its own link still carries our answers."""
    a, b = await network.start("a@1"), await network.start("b@1")
    await meet(b, a)
    network.addresses[B] = "127.0.0.1:1"
    for n in range(10):
        a.send(b, b"%d" % n)
        await turns()
    await b.ears.count(10)
    assert b.ears.payloads == [b"%d" % n for n in range(10)]


# -- twice the same voter --------------------------------------------------------------------------------------------


async def test_a_second_living_voter_of_the_same_disk_is_refused_and_told(network: OverSockets) -> None:
    a, b = await network.start("a@1"), await network.start("b@1")
    await meet(b, a)
    clone = await network.start("b@1", hidden=True)
    await persist(lambda: clone.send(a, b"me too"), lambda: a.ears.clones)
    assert set(a.ears.clones) == {"b@1"}
    assert a.transport.refused["clone"] >= 1
    b.send(a, b"the real one")
    await a.ears.hears(b"the real one")
    assert b"me too" not in a.ears.payloads
    assert ("b", False) not in a.ears.hints


async def test_a_clone_that_is_dialled_is_refused_too(network: OverSockets) -> None:
    a = await network.start("a@1")
    b = await network.start("b@1")
    await meet(b, a)
    clone = await network.start("b@1")  # gossip tells its address now
    await persist(lambda: a.send(b, b"for whom?", "log"), lambda: a.ears.clones)
    assert clone.ears.payloads == []
    assert a.transport.refused["clone"] >= 1


async def test_a_restart_is_no_clone_when_the_old_links_are_closed(network: OverSockets) -> None:
    a, b = await network.start("a@1"), await network.start("b@1")
    await meet(b, a)
    await network.stop(b)
    again = await network.start("b@1")
    await persist(lambda: again.send(a, b"back"), lambda: b"back" in a.ears.payloads)
    assert a.ears.clones == []


async def test_a_restart_is_no_clone_when_the_old_links_are_silent(network: OverSockets) -> None:
    """The machine lost its power: nobody has closed the old connection, and nobody answers on it."""
    a = await network.start("a@1")
    async with stranger(network, a, **{"from": "b@1", "boot": "before"}) as dead:
        await dead.receive(timeout=5)
        dead._response.connection.transport.pause_reading()
        await a.ears.until(lambda: a.ears.hints == [("b", True)])
        b = await network.start("b@1")
        await persist(lambda: b.send(a, b"back"), lambda: b"back" in a.ears.payloads)
        a.send(b, b"welcome")
        await b.ears.hears(b"welcome")
        assert {link.boot for link in a.transport._table.links} == {b.transport._handshake._boot}
        with suppress(ConnectionError):
            await dead.send_bytes(pack([b"a ghost"]))  # it was only frozen, and thaws
        dead._response.connection.transport.resume_reading()
        while (await dead.receive(timeout=5)).type not in (WSMsgType.CLOSED, WSMsgType.ERROR, WSMsgType.CLOSE):
            pass
    assert b"a ghost" not in a.ears.payloads
    assert a.ears.clones == []
    assert a.transport.refused == {}


async def test_what_a_dead_voter_had_sent_before_is_no_proof_of_life(network: OverSockets) -> None:
    """Its last words may lie in our buffers when its next start says hello, after we were stalled for a while."""
    a = await network.start("a@1")
    async with stranger(network, a, **{"from": "b@1", "boot": "before"}) as dead:
        await dead.receive(timeout=5)
        async with stranger(network, a, **{"from": "b@1", "boot": "after"}) as living:
            await turns(5)
            await dead.send_bytes(pack([b"last words"]))
            message = await living.receive(timeout=5)
            assert message.type is WSMsgType.BINARY
    assert a.ears.clones == []


async def test_a_hello_of_the_dead_is_no_clone_of_the_living(network: OverSockets) -> None:
    """The hello of the old start is read late: its sender has gone, the new start is the only one."""
    a, b = await network.start("a@1"), await network.start("b@1")
    await meet(b, a)
    async with stranger(network, a, **{"from": "b@1", "boot": "before"}) as late:
        late._response.connection.transport.pause_reading()
        await asyncio.sleep(3 * QUICK.proof_seconds)
    await persist(lambda: b.send(a, b"alone"), lambda: b"alone" in a.ears.payloads)
    assert a.ears.clones == []
    assert a.transport.refused == {}


# -- the end ---------------------------------------------------------------------------------------------------------


async def test_a_stop_while_dialling_leaves_nothing(network: OverSockets) -> None:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        network.addresses[B] = f"127.0.0.1:{listener.getsockname()[1]}"
        for pause in range(12):
            a = Endpoint(network.links("a@1"), VoterId("a@1"))
            await a.transport.start()
            a.send("b@1", b"x")
            await turns(pause)
            async with asyncio.timeout(5):
                await a.transport.stop()


async def test_after_the_stop_nobody_is_let_in(network: OverSockets) -> None:
    a = await network.start("a@1")
    await a.transport.stop()
    url = f"http://{network.server(a).address}{PATH}?channel=control"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        assert response.status == 503
