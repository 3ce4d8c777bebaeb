"""The twin's own switches: loss, cuts, partitions."""

from __future__ import annotations

from p2p.ids import NodeId
from tests.unit.p2p.transport.endpoints import Endpoint, InMemory, turns

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


async def pair(network: InMemory) -> tuple[Endpoint, Endpoint]:
    return await network.start("a@1"), await network.start("b@1")


async def test_a_cut_is_one_way_and_silent() -> None:
    network = InMemory()
    a, b = await pair(network)
    network.hub.cut(A, B)
    a.send(b, b"lost")
    b.send(a, b"heard")
    await turns()
    assert (a.ears.payloads, b.ears.payloads) == ([b"heard"], [])
    assert ("b", False) not in a.ears.hints
    network.hub.heal()
    a.send(b, b"heard")
    await turns()
    assert b.ears.payloads == [b"heard"]


async def test_a_partition_parts_the_groups_and_no_more() -> None:
    network = InMemory()
    a, b = await pair(network)
    c = await network.start("c@1")
    network.hub.partition({A, B}, {C})
    for sender in (a, b, c):
        for receiver in (a, b, c):
            sender.send(receiver, b"from " + sender.voter.encode())
    await turns()
    assert (a.ears.payloads, b.ears.payloads, c.ears.payloads) == ([b"from b@1"], [b"from a@1"], [])


async def test_loss_takes_its_share_and_is_repeatable() -> None:
    heard = []
    for _ in range(2):
        network = InMemory()
        a, b = await pair(network)
        network.hub.loss = 0.3
        for n in range(1000):
            a.send(b, b"%d" % n)
        await turns()
        assert len(b.ears.payloads) + network.hub.lost == 1000
        assert 200 < network.hub.lost < 400
        heard.append(b.ears.payloads)
    assert heard[0] == heard[1]


async def test_a_peer_that_was_never_there_is_refused_once() -> None:
    network = InMemory()
    a, _ = await pair(network)
    for _ in range(3):
        a.send("x@1", b"anybody?")
        await turns()
    assert a.ears.hints == [("x", False)]
