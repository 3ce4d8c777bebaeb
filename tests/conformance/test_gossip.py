"""The real shell over real HTTP on loopback keeps what the core promises (the simulated twin is held to the same in
tests/unit/p2p/membership)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import msgpack
import pytest

from p2p.ids import ClusterId, DiskId, NodeId
from p2p.membership.member import InvalidMeta, MalformedMessage, MembershipError, State
from p2p.membership.message import Refuse, decode
from p2p.transport.gossip import Gossip, GossipStopped, JoinRefused, NotJoined
from p2p.transport.gossip_http import ExchangeFailed
from tests.conformance.gossips import FAST, Cluster, Peer, free_port


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    yield made
    await made.end()


async def five(cluster: Cluster) -> list[Peer]:
    """n1 to n4 dialable, n5 outbound-only; all know all."""
    first = await cluster.start("n1", cluster="c1", token="secret")
    others = [await cluster.start(f"n{n}", token="secret", dialable=n < 5) for n in (2, 3, 4, 5)]
    async with asyncio.timeout(20):
        for peer in others:
            await peer.gossip.join([first.address])
    peers = [first, *others]
    await cluster.until(lambda: all(alive(peer) == {"n1", "n2", "n3", "n4", "n5"} for peer in peers))
    return peers


def alive(peer: Peer) -> set[str]:
    return {member.node for member in peer.gossip.members().values() if member.state is State.ALIVE}


async def test_five_nodes_one_outbound_only_know_each_other_and_one_that_is_killed(cluster: Cluster) -> None:
    peers = await five(cluster)
    assert {peer.gossip.cluster for peer in peers} == {"c1"}, "blank nodes take the cluster that lets them in"
    survivors = [peer for peer in peers if peer.name != "n3"]
    await cluster.peers["n3"].kill()
    await cluster.until(lambda: all(peer.state_of("n3") is State.DEAD for peer in survivors))
    assert all(alive(peer) == {"n1", "n2", "n4", "n5"} for peer in survivors)
    assert cluster.peers["n1"].gossip.gone_age(NodeId("n3")) is not None


async def test_an_outbound_only_node_is_seen_to_die_and_never_dialled(cluster: Cluster) -> None:
    peers = await five(cluster)
    outbound = cluster.peers["n5"]
    await cluster.until(lambda: len(cluster.peers["n1"].gossip.members()[NodeId("n5")].via) == 3)
    assert outbound.gossip.me.address is None and outbound.requests == 0
    await outbound.kill()
    await cluster.until(lambda: all(peer.state_of("n5") is State.DEAD for peer in peers if peer is not outbound))


async def test_a_node_that_stops_has_left_and_is_not_dead(cluster: Cluster) -> None:
    peers = await five(cluster)
    await cluster.peers["n2"].stop()
    others = [peer for peer in peers if peer.name != "n2"]
    await cluster.until(lambda: all(peer.state_of("n2") is State.LEFT for peer in others))
    assert not any(what[0] == "change" and what[1].state is State.DEAD for peer in others for what in peer.seen)


async def test_a_restarted_node_is_one_member_with_a_new_boot_id(cluster: Cluster) -> None:
    peers = await five(cluster)
    await cluster.peers["n4"].kill()
    before = peers[0].gossip.members()[NodeId("n4")].boot
    again = await cluster.start("n4", token="secret", cluster="c1")
    await again.gossip.join([peers[0].address])
    others = peers[:3]
    await cluster.until(
        lambda: all(
            peer.state_of("n4") is State.ALIVE and peer.gossip.members()[NodeId("n4")].boot != before for peer in others
        )
    )


async def test_a_new_leader_is_known_everywhere(cluster: Cluster) -> None:
    """How soon is for `bench.gossip` to say."""
    peers = await five(cluster)
    peers[1].gossip.set_leader(7, NodeId("n2"), peers[1].address)
    await cluster.until(lambda: all(peer.gossip.leader_hint.leader == "n2" for peer in peers))
    peers[2].gossip.set_leader(6, NodeId("n3"), None)
    assert peers[2].gossip.leader_hint.leader == "n2", "an older term is no news"


async def test_meta_and_capabilities_reach_everybody(cluster: Cluster) -> None:
    peers = await five(cluster)
    cluster.peers["n2"].description = {"cpus": 64}
    cluster.peers["n2"].gossip.set_meta({"role": "worker", "caps": 1})
    cluster.peers["n5"].gossip.set_meta({"caps": "a"})
    reader = cluster.peers["n3"]
    await cluster.until(lambda: len(reader.gossip.capabilities) == 2)
    assert reader.gossip.capabilities_of(NodeId("n2")) == {"cpus": 64}
    assert reader.gossip.capabilities_of(NodeId("n5")) == {"asked_for": "n5"}, "an anchor answers for who cannot"
    assert all(peer.gossip.members()[NodeId("n2")].meta["role"] == "worker" for peer in peers[:3])
    assert await reader.gossip.fetch_capabilities(NodeId("n2")) == {"cpus": 64}
    with pytest.raises(ExchangeFailed, match="no member"):
        await reader.gossip.fetch_capabilities(NodeId("nobody"))


@pytest.mark.parametrize(
    ("code", "mine", "reason", "fix"),
    [
        ("token", {"token": "wrong"}, "token is not the one", "--auth-token-file"),
        ("cluster", {"cluster": "c2"}, "n1 belongs to cluster c1, n2 belongs to cluster c2", "never merge"),
        ("clock", {"unix_ms": lambda: 1_000_000_000_000}, "behind that of n1", "set-ntp"),
    ],
    ids=["token", "cluster", "clock"],
)
async def test_a_join_is_refused_with_reason_and_fix(
    cluster: Cluster, code: str, mine: dict[str, object], reason: str, fix: str
) -> None:
    first = await cluster.start("n1", cluster="c1", token="secret")
    second = await cluster.start("n2", **{"token": "secret", **mine})  # type: ignore[arg-type]
    with pytest.raises(JoinRefused) as refused:
        async with asyncio.timeout(20):
            await second.gossip.join([first.address], patient=False)
    assert (refused.value.code, refused.value.address) == (code, first.address)
    assert reason in refused.value.reason and fix in refused.value.fix
    assert second.gossip.refusals[first.address] is refused.value
    assert [what[1].code for what in second.seen if what[0] == "refused"] == [code]
    assert "secret" not in str(refused.value) and "wrong" not in str(refused.value)
    assert alive(first) == {"n1"} and alive(second) == {"n2"}


async def test_a_taken_node_id_is_refused_and_told_to_both(cluster: Cluster) -> None:
    first = await cluster.start("n1", cluster="c1")
    holder = await cluster.start("n2")
    await holder.gossip.join([first.address])
    await cluster.until(lambda: first.state_of("n2") is State.ALIVE)
    claimant = await cluster.start("n2", disk=DiskId("another"))
    with pytest.raises(JoinRefused, match="already goes by the node id n2"):
        await claimant.gossip.join([first.address], patient=False)
    assert [what[1].claimant.disk for what in first.seen if what[0] == "conflict"] == ["another"]
    assert first.gossip.members()[NodeId("n2")].disk == "disk-n2"


async def test_another_protocol_version_is_refused_with_the_reason(cluster: Cluster) -> None:
    first = await cluster.start("n1", cluster="c1")
    answer = decode(await first.gossip.handle(msgpack.packb({"v": 99})))
    assert isinstance(answer.body, Refuse) and answer.body.code == "version" and "99" in answer.body.detail


async def test_a_malformed_body_is_refused_counted_and_changes_nothing(cluster: Cluster) -> None:
    first = await cluster.start("n1", cluster="c1")
    before = dict(first.gossip.members())
    for body in (b"", b"\xc1", msgpack.packb([]), msgpack.packb({"v": 1})):
        with pytest.raises(MalformedMessage):
            await first.gossip.handle(body)
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://{first.address}/peer/gossip", data=b"nonsense") as answer,
    ):
        assert answer.status == 400
    assert first.gossip.stats["malformed"] == 5 and dict(first.gossip.members()) == before


async def test_a_join_goes_on_until_somebody_is_there(cluster: Cluster) -> None:
    second = await cluster.start("n2")
    port = free_port()
    joining = asyncio.create_task(second.gossip.join([f"127.0.0.1:{port}"]))
    while not second.gossip.unreachable:
        await asyncio.sleep(0)
    await cluster.start("n1", cluster="c1", port=port)
    async with asyncio.timeout(20):
        joined = await joining
    assert (joined.cluster, joined.node) == ("c1", "n1") and not second.gossip.unreachable


async def test_more_addresses_than_one_round_asks_are_all_asked_in_turn(cluster: Cluster) -> None:
    first = await cluster.start("n1", cluster="c1")
    second = await cluster.start("n2")
    nobody = [f"127.0.0.1:{free_port()}" for _ in range(20)]
    async with asyncio.timeout(20):
        assert (await second.gossip.join([*nobody, first.address])).node == "n1"


async def test_a_blank_node_prefers_the_address_that_belongs_to_a_cluster(cluster: Cluster) -> None:
    blank = await cluster.start("n1")
    member = await cluster.start("n2", cluster="c1")
    third = await cluster.start("n3")
    assert (await third.gossip.join([blank.address, member.address])).cluster == "c1"
    assert third.gossip.cluster == "c1"


async def test_blank_nodes_know_each_other_before_any_has_a_cluster(cluster: Cluster) -> None:
    first, second = await cluster.start("n1"), await cluster.start("n2")
    assert (await second.gossip.join([first.address])).cluster == ""
    await cluster.until(lambda: alive(first) == alive(second) == {"n1", "n2"})
    first.gossip.set_cluster(ClusterId("c1"))
    await cluster.until(lambda: second.gossip.cluster == "c1")


async def test_without_adoption_the_node_itself_says_which_cluster_it_belongs_to(cluster: Cluster) -> None:
    first = await cluster.start("n1", cluster="c1")
    second = await cluster.start("n2", adopt=False)
    joined = await second.gossip.join([first.address])
    assert (joined.cluster, second.gossip.cluster) == ("c1", "")
    second.gossip.set_cluster(joined.cluster)
    assert second.gossip.cluster == "c1"
    with pytest.raises(MembershipError, match="belongs to cluster c1"):
        second.gossip.set_cluster(ClusterId("c2"))


async def test_own_address_among_the_peers_does_no_harm(cluster: Cluster) -> None:
    first = await cluster.start("n1")
    with pytest.raises(NotJoined, match="own"):
        await first.gossip.join([first.address])
    alias = first.address.replace("127.0.0.1", "localhost")
    second = await cluster.start("n2")
    assert (await first.gossip.join([alias, second.address])).node == "n2"
    assert not first.gossip.refusals


async def test_a_slow_first_connection_gets_a_second_beside_it(cluster: Cluster) -> None:
    """The first connection of every ping is swallowed by a server that never answers; the second is answered."""
    first = await cluster.start("n1", cluster="c1")
    real = int(first.address.rpartition(":")[2])
    opened: list[asyncio.StreamWriter] = []

    async def pipe(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            sink.write(data)

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        if len(opened) == 1:
            return
        back, forth = await asyncio.open_connection("127.0.0.1", real)
        opened.append(forth)
        await asyncio.gather(pipe(reader, forth), pipe(back, writer))

    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    second = await cluster.start("n2", cluster="c1")
    try:
        answer = await second.gossip._poster.post(f"127.0.0.1:{port}", b"x", 5.0, hedged=True)
        raise AssertionError(answer)
    except ExchangeFailed as error:
        assert error.status == 400, "the second connection was answered"
    finally:
        for writer in opened:
            writer.close()
        server.close()
        await server.wait_closed()
    assert len(opened) == 3


def _belongs(task: asyncio.Task[object], gossip: Gossip) -> bool:
    frame = getattr(task.get_coro(), "cr_frame", None)
    return frame is not None and frame.f_locals.get("self") is gossip


async def test_stop_ends_every_task_at_once_and_may_be_repeated(cluster: Cluster) -> None:
    peers = await five(cluster)
    before = asyncio.all_tasks()
    stopped = peers[1]
    await stopped.gossip.stop()
    await stopped.gossip.stop()
    assert not stopped.gossip._tasks
    assert not [task for task in asyncio.all_tasks() - before if _belongs(task, stopped.gossip)]  # the others go on
    with pytest.raises(GossipStopped):
        await stopped.gossip.handle(b"")
    with pytest.raises(GossipStopped):
        stopped.gossip.set_meta({})


async def test_a_join_under_way_ends_when_gossip_stops(cluster: Cluster) -> None:
    second = await cluster.start("n2")
    joining = asyncio.create_task(second.gossip.join([f"127.0.0.1:{free_port()}"]))
    await asyncio.sleep(0)
    await second.gossip.stop()
    async with asyncio.timeout(5):  # half of what a round would wait for an answer
        with pytest.raises(GossipStopped):
            await joining


async def test_what_is_set_before_the_start_is_announced_after_it() -> None:
    gossip = Gossip(NodeId("n1"), DiskId("d"), address=None, figures=FAST)
    gossip.set_meta({"zone": "a"})
    gossip.set_leader(3, NodeId("n9"), None)
    await gossip.start()
    try:
        assert gossip.me.meta == {"zone": "a"} and gossip.leader_hint.term == 3
        with pytest.raises(InvalidMeta, match="400"):
            gossip.set_meta({"role": "x" * 500})
    finally:
        await gossip.stop()


async def test_a_listener_that_raises_does_not_stop_gossip(cluster: Cluster) -> None:
    first = await cluster.start("n1", cluster="c1")

    def broken(*_: object) -> None:
        raise RuntimeError("a bug of the listener")

    first.gossip.on_change = broken
    second = await cluster.start("n2")
    await second.gossip.join([first.address])
    assert first.state_of("n2") is State.ALIVE


async def test_a_core_that_contradicts_itself_stops_gossip_and_says_so(cluster: Cluster) -> None:
    first = await cluster.start("n1", cluster="c1")
    told: list[BaseException] = []
    first.gossip.on_broken = told.append
    assert first.gossip._core is not None
    first.gossip._core._now = float("inf")
    with pytest.raises(AssertionError):
        first.gossip.set_meta({"a": 1})
    assert len(told) == 1
    with pytest.raises(GossipStopped):
        await first.gossip.handle(b"")
