"""What every transport must do, asked of the one on sockets and of its twin in memory.

A payload may be lost by promise, so what is asked for again and again (`persist`) is only what a start or an end of a
peer may have swallowed; between two endpoints that have heard each other nothing is lost.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from p2p.transport import MAX_PAYLOAD_BYTES, PayloadTooLarge
from p2p.transport.outbox import LIMITS
from tests.unit.p2p.transport.endpoints import NETWORKS, Endpoint, Network, nothing_leaks, persist, turns


@pytest.fixture(params=NETWORKS)
async def network(request: pytest.FixtureRequest) -> AsyncIterator[Network]:
    async with nothing_leaks():
        network = NETWORKS[request.param]()
        yield network
        await network.close()


@pytest.fixture
async def two(network: Network) -> tuple[Endpoint, Endpoint]:
    """Two endpoints that have heard each other on both channels."""
    a, b = await network.start("a@1"), await network.start("b@1")
    for channel in ("control", "log"):
        hello = f"hello on {channel}".encode()
        a.send(b, hello, channel)
        await b.ears.hears(hello)
        b.send(a, hello, channel)
        await a.ears.hears(hello)
    a.ears.received.clear()
    b.ears.received.clear()
    return a, b


async def test_the_first_payload_to_a_peer_arrives_with_its_senders_name(network: Network) -> None:
    a, b = await network.start("a@1"), await network.start("b@1")
    a.send(b, b"vote for me")
    await b.ears.count(1)
    assert b.ears.received == [("a@1", b"vote for me")]


async def test_peers_answer_each_other(two: tuple[Endpoint, Endpoint]) -> None:
    a, b = two
    a.send(b, b"ping", "log")
    await b.ears.hears(b"ping")
    b.send(a, b"pong", "log")
    await a.ears.hears(b"pong")


@pytest.mark.parametrize("channel", ["control", "log"])
async def test_what_is_sent_on_a_channel_arrives_in_order(two: tuple[Endpoint, Endpoint], channel: str) -> None:
    a, b = two
    wanted = [b"%d" % n for n in range(1000)]
    for n, payload in enumerate(wanted):
        a.send(b, payload, channel)
        if n % 37 == 0:
            await turns(2)
    await b.ears.count(len(wanted))
    assert b.ears.payloads == wanted


@pytest.mark.parametrize("size", [0, 1, 125, 126, 70_000, 4 << 20, MAX_PAYLOAD_BYTES])
async def test_payloads_of_any_size_arrive_whole(two: tuple[Endpoint, Endpoint], size: int) -> None:
    a, b = two
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    a.send(b, payload, "log")
    a.send(b, b"after", "log")
    await b.ears.count(2)
    assert b.ears.payloads == [payload, b"after"]


async def test_a_payload_that_no_link_can_carry_is_an_error_of_its_sender(two: tuple[Endpoint, Endpoint]) -> None:
    a, b = two
    with pytest.raises(PayloadTooLarge):
        a.send(b, bytes(MAX_PAYLOAD_BYTES + 1), "log")
    a.send(b, b"next", "log")
    await b.ears.count(1)
    assert b.ears.payloads == [b"next"]


async def test_nothing_reaches_another_disk_of_the_node_it_was_meant_for(two: tuple[Endpoint, Endpoint]) -> None:
    a, b = two
    for _ in range(20):
        a.send("b@emptied", b"not for you")
        await turns()
    a.send(b, b"for you")
    await b.ears.hears(b"for you")
    assert b.ears.payloads == [b"for you"]


async def test_a_payload_for_nobody_is_dropped(two: tuple[Endpoint, Endpoint]) -> None:
    a, b = two
    a.send("nobody@1", b"lost")
    a.send(b, b"kept")
    await b.ears.count(1)
    assert b.ears.payloads == [b"kept"]


async def test_a_payload_to_oneself_is_dropped(two: tuple[Endpoint, Endpoint]) -> None:
    a, b = two
    a.send(a, b"to myself")
    b.send(a, b"kept")
    await a.ears.count(1)
    assert a.ears.payloads == [b"kept"]


async def test_send_calls_nobody_back(two: tuple[Endpoint, Endpoint]) -> None:
    a, b = two
    a.send(b, b"later")
    assert b.ears.received == []
    await b.ears.count(1)


async def test_a_burst_beyond_the_control_queue_keeps_the_newest(two: tuple[Endpoint, Endpoint]) -> None:
    a, b = two
    limit = LIMITS["control"].count
    for n in range(limit + 10):
        a.send(b, b"%d" % n)
    await b.ears.hears(b"%d" % (limit + 9))
    assert b.ears.payloads == [b"%d" % n for n in range(10, limit + 10)]


async def test_a_burst_beyond_the_log_queue_keeps_the_oldest(two: tuple[Endpoint, Endpoint]) -> None:
    a, b = two
    limit = LIMITS["log"].count
    for n in range(limit + 10):
        a.send(b, b"%d" % n, "log")
    await b.ears.hears(b"%d" % (limit - 1))
    a.send(b, b"end", "log")
    await b.ears.hears(b"end")
    assert b.ears.payloads == [*(b"%d" % n for n in range(limit)), b"end"]


async def test_a_burst_of_large_payloads_is_bounded_by_its_bytes(two: tuple[Endpoint, Endpoint]) -> None:
    a, b = two
    large = bytes(4 << 20)
    fit = LIMITS["log"].bytes // len(large)
    for n in range(fit + 3):
        a.send(b, b"%d" % n + large[1:], "log")
    await b.ears.count(fit)
    a.send(b, b"end", "log")
    await b.ears.hears(b"end")
    assert [payload[:1] for payload in b.ears.payloads] == [*(b"%d" % n for n in range(fit)), b"e"]


async def test_a_peer_that_comes_and_goes_is_told_once_each(network: Network) -> None:
    a, b = await network.start("a@1"), await network.start("b@1")
    a.send(b, b"hello")
    await b.ears.hears(b"hello")
    await a.ears.until(lambda: a.ears.hints == [("b", True)])
    await network.stop(b)
    await a.ears.until(lambda: a.ears.hints == [("b", True), ("b", False)])


async def test_a_peer_that_starts_again_is_heard_and_hears_again(network: Network) -> None:
    a, b = await network.start("a@1"), await network.start("b@1")
    a.send(b, b"one")
    await b.ears.hears(b"one")
    b.send(a, b"one")
    await a.ears.hears(b"one")
    await network.stop(b)
    again = await network.start("b@1")
    await persist(lambda: a.send(again, b"two"), lambda: b"two" in again.ears.payloads)
    await persist(lambda: again.send(a, b"two"), lambda: b"two" in a.ears.payloads)


async def test_a_peer_on_a_new_disk_hears_only_what_is_for_that_disk(network: Network) -> None:
    a, b = await network.start("a@1"), await network.start("b@1")
    a.send(b, b"one")
    await b.ears.hears(b"one")
    await network.stop(b)
    again = await network.start("b@2")
    await persist(lambda: (a.send("b@1", b"old"), a.send("b@2", b"new")), lambda: b"new" in again.ears.payloads)
    assert set(again.ears.payloads) == {b"new"}


async def test_an_endpoint_that_has_stopped_sends_and_hears_nothing(two: tuple[Endpoint, Endpoint]) -> None:
    a, b = two
    await b.transport.stop()
    b.send(a, b"from beyond")
    a.send(b, b"to nobody")
    await turns(20)
    assert (a.ears.payloads, b.ears.payloads) == ([], [])


async def test_what_was_sent_just_before_a_stop_arrives(two: tuple[Endpoint, Endpoint]) -> None:
    a, b = two
    a.send(b, b"stand for election now")
    await a.transport.stop()
    await b.ears.hears(b"stand for election now")


async def test_stopping_twice_or_unstarted_is_nothing_special(network: Network) -> None:
    a = await network.start("a@1")
    await a.transport.stop()
    await a.transport.stop()


async def test_start_and_stop_under_fire(network: Network) -> None:
    a = await network.start("a@1")
    for _ in range(10):
        b = await network.start("b@1")
        for n in range(20):
            a.send(b, b"%d" % n)
            a.send(b, bytes(100_000), "log")
            b.send(a, b"%d" % n)
            if n % 3 == 0:
                await turns()
        await network.stop(b)
