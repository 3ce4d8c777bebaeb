"""Thirty real cores on one virtual clock: loss, partition and heal, sleepers, and no false deaths.

The seed is in the test's id. The cores' invariants are checked as they go.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

from p2p.ids import NodeId
from p2p.membership.core import MembershipCore
from p2p.membership.events import Changed, Conflict, Effect, JoinThrough, Leave, SetMeta, Updated
from p2p.membership.figures import Figures
from p2p.membership.hint import LeaderHint
from p2p.membership.member import State
from p2p.membership.simulated import Network
from tests.unit.p2p.membership.driving import cluster_of, record

SEEDS = [1, 2, 3]


class Deaths:
    """Who was declared dead by whom, and when."""

    def __init__(self) -> None:
        self.seen: dict[NodeId, dict[NodeId, float]] = {}

    def __call__(self, node: NodeId, effect: Effect, now: float) -> None:
        if isinstance(effect, Changed) and effect.member.state is State.DEAD:
            self.seen.setdefault(effect.member.node, {}).setdefault(node, now)


def digests(net: Network) -> set[bytes]:
    return {host.core.digest for host in net.hosts.values() if host.alive}


def believed(net: Network, about: str) -> set[State]:
    node = NodeId(about)
    return {host.core.members[node].state for name, host in net.hosts.items() if host.alive and name != node}


def disturb(net: Network, draw: random.Random, names: list[str]) -> None:
    """These stand still for 1 to 5 s, go on for 1 to 5 s, and so for ever."""
    for name in names:
        net.disturb(NodeId(name), lambda: (draw.uniform(1.0, 5.0), draw.uniform(1.0, 5.0)))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_healthy_cluster_declares_nobody_dead_and_agrees(seed: int) -> None:
    deaths = Deaths()
    net = cluster_of(30, seed=seed, outbound=[7, 8], watch=deaths)
    net.run(180.0)
    assert not deaths.seen and len(digests(net)) == 1
    assert not any(host.core.health.score for host in net.hosts.values())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_death_is_known_everywhere_within_the_published_time(seed: int) -> None:
    deaths = Deaths()
    net = cluster_of(30, seed=seed, outbound=[7], watch=deaths)
    net.run(20.0)
    for victim in ("n3", "n7"):
        net.kill(NodeId(victim))
    net.run(50.0)
    assert set(deaths.seen) == {"n3", "n7"}
    for seen in deaths.seen.values():
        assert len(seen) == 28 and max(seen.values()) - 20.0 < 17.0
        assert max(seen.values()) - min(seen.values()) < 2.0


@pytest.mark.parametrize("seed", SEEDS)
def test_sleepers_and_loss_kill_nobody(seed: int) -> None:
    """5 % of the members stand still for 1 to 5 s again and again, and 2 % of all exchanges are lost."""
    deaths = Deaths()
    net = cluster_of(40, seed=seed, watch=deaths, loss=0.02)
    disturb(net, random.Random(seed), ["n1", "n2"])
    net.run(120.0)
    assert not deaths.seen


@pytest.mark.parametrize("seed", SEEDS)
def test_a_partition_heals_and_all_agree_again(seed: int) -> None:
    deaths = Deaths()
    net = cluster_of(30, seed=seed, outbound=[20], watch=deaths)
    left = {NodeId(f"n{i}") for i in range(15)}
    net.run(10.0)
    net.cut = lambda a, b: (a in left) != (b in left)
    net.run(120.0)
    for name, host in net.hosts.items():
        alive = {n for n, m in host.core.members.items() if m.state is State.ALIVE}
        assert alive == (left if name in left else set(net.hosts) - left)
    net.cut = lambda _a, _b: False
    net.run(220.0)
    assert len(digests(net)) == 1
    assert all(host.core.size == 30 and not host.core._suspicions for host in net.hosts.values())


@pytest.mark.parametrize("seed", SEEDS)
def test_thirty_that_join_through_one_seed_soon_all_know_each_other(seed: int) -> None:
    net = Network(random.Random(seed))
    net.check_every = 5
    for n in range(30):
        net.add(MembershipCore(record(f"n{n}"), random.Random(seed + n), 0.0))
    for n in range(1, 30):
        net.tell(NodeId(f"n{n}"), JoinThrough(("n0:1",), 0))
    net.run(5.0)
    assert all(host.core.size == 30 for host in net.hosts.values()) and len(digests(net)) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_new_leader_is_known_to_thirty_in_well_under_a_second(seed: int) -> None:
    net = cluster_of(30, seed=seed, outbound=[4])
    net.run(20.0)
    net.tell(NodeId("n2"), LeaderHint(3, NodeId("n2"), "n2:1"))
    net.run(20.2)
    knowing = [host.core.leader_hint.leader == "n2" for host in net.hosts.values()]
    assert sum(knowing) >= 24
    net.run(20.8)
    assert all(host.core.leader_hint.leader == "n2" for host in net.hosts.values())


@pytest.mark.parametrize("seed", SEEDS)
def test_new_meta_reaches_everybody_within_the_published_rounds(seed: int) -> None:
    net = cluster_of(30, seed=seed, outbound=[4], loss=0.05)
    net.run(20.0)
    net.tell(NodeId("n2"), SetMeta({"zone": "b"}))
    net.run(22.0)
    assert all(host.core.members[NodeId("n2")].meta == {"zone": "b"} for host in net.hosts.values())


@pytest.mark.parametrize("seed", SEEDS)
def test_one_who_leaves_is_known_to_have_left_and_one_who_restarts_to_be_back(seed: int) -> None:
    deaths = Deaths()
    net = cluster_of(30, seed=seed, watch=deaths)
    net.run(10.0)
    net.tell(NodeId("n3"), Leave())
    net.kill(NodeId("n4"))
    net.run(10.1)
    net.kill(NodeId("n3"))
    reborn = MembershipCore(record("n4", boot="again", incarnation=9_000, started_ms=9_000), random.Random(9), net.now)
    net.add(reborn)
    net.tell(NodeId("n4"), JoinThrough(("n0:1",), 10_100))
    net.run(40.0)
    assert believed(net, "n3") == {State.LEFT} and believed(net, "n4") == {State.ALIVE} and not deaths.seen
    assert {host.core.members[NodeId("n4")].boot for host in net.hosts.values() if host.alive} == {"again"}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cloned_node_in_another_partition_yields_to_the_older_when_they_meet(seed: int) -> None:
    """The clone joins where its elder cannot be asked; nothing of it remains once they can speak."""
    conflicts: list[Conflict] = []

    def watch(_: NodeId, effect: Effect, __: float) -> None:
        if isinstance(effect, Conflict):
            conflicts.append(effect)

    net = cluster_of(10, seed=seed, watch=watch)
    left = {NodeId(f"n{i}") for i in range(5)}
    net.run(5.0)
    net.cut = lambda a, b: (a in left) != (b in left)
    net.run(60.0)
    clone = MembershipCore(
        record("n0", boot="clone", address="clone:1", incarnation=9_000, started_ms=9_000), random.Random(7), net.now
    )
    net.add(clone, name=NodeId("clone"))
    net.tell(NodeId("clone"), JoinThrough(("n7:1",), 60_000))
    net.run(70.0)
    assert not conflicts and net.hosts[NodeId("n7")].core.members[NodeId("n0")].boot == "clone"
    net.cut = lambda _a, _b: False
    net.run(200.0)
    assert clone.displaced_by is not None and {c.holder.boot for c in conflicts} == {"boot-n0"}
    assert all(net.hosts[NodeId(f"n{i}")].core.members[NodeId("n0")].boot == "boot-n0" for i in range(10))


def test_the_same_seed_gives_the_same_run() -> None:
    def run() -> list[tuple[float, NodeId, str]]:
        seen: list[tuple[float, NodeId, str]] = []
        net = cluster_of(12, seed=5, loss=0.1, watch=lambda n, e, t: seen.append((t, n, repr(e))))
        net.run(5.0)
        net.kill(NodeId("n3"))
        net.run(30.0)
        return seen

    assert run() == run()


def test_idle_members_send_a_probe_a_second_and_nothing_rides_on_it() -> None:
    updates = 0

    def watch(_: NodeId, effect: Effect, __: float) -> None:
        nonlocal updates
        updates += isinstance(effect, Updated | Changed)

    net = cluster_of(30, watch=watch)
    net.run(20.0)
    updates = 0
    net.counted.clear()
    net.count_bytes = True
    net.run(80.0)
    per_node = net.counted["messages"] / 30 / 60
    assert updates == 0 and 1.9 < per_node < 2.3, "one probe and one answer, and a digest now and then"
    assert net.counted["bytes"] / 30 / 60 < 200


def test_plain_swim_slanders_the_healthy_where_lifeguard_hardly_does() -> None:
    """The point of it: a sleeper wakes, finds its probe unanswered, and accuses somebody who had answered."""
    slandered: Counter[bool] = Counter()
    for lifeguard in (False, True):

        def watch(_: NodeId, effect: Effect, __: float, lifeguard: bool = lifeguard) -> None:
            if isinstance(effect, Changed) and effect.member.by == "n1" and effect.member.state is State.SUSPECT:
                slandered[lifeguard] += 1

        net = cluster_of(20, seed=1, watch=watch, figures=Figures(lifeguard=lifeguard))
        disturb(net, random.Random(1), ["n1"])
        net.run(240.0)
    assert slandered[False] > 5 * slandered[True]
