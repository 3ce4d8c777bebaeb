"""The ideas apart: suspicion, awareness, broadcasts, whose turn it is, timers, anchors."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.ids import NodeId
from p2p.membership import anchors
from p2p.membership.awareness import Awareness
from p2p.membership.broadcast import FEED_ENTRIES, Broadcasts, Feed, retransmit_limit
from p2p.membership.figures import Figures
from p2p.membership.rota import Rota
from p2p.membership.suspicion import Suspicion
from p2p.membership.timers import Timers
from tests.unit.p2p.membership.driving import record

NODES = [NodeId(f"n{i}") for i in range(40)]


@pytest.mark.parametrize(
    ("members", "confirmed"),
    [(30, (35.5, 16.8, 5.9)), (300, (59.5, 28.2, 9.9)), (1_000, (72.0, 34.1, 12.0))],
)
def test_suspicion_lasts_what_the_protocol_page_says(members: int, confirmed: tuple[float, ...]) -> None:
    suspicion = Suspicion(NODES[0], 0.0, members, Figures())
    for accuser, seconds in enumerate(confirmed, start=1):
        assert suspicion.deadline == pytest.approx(seconds, abs=0.1)
        suspicion.confirm(NODES[accuser])


def test_only_another_accuser_confirms_and_only_while_it_still_shortens() -> None:
    suspicion = Suspicion(NODES[0], 0.0, 30, Figures())
    assert not suspicion.confirm(NODES[0])
    assert suspicion.confirm(NODES[1]) and not suspicion.confirm(NODES[1])
    assert suspicion.confirm(NODES[2]) and not suspicion.confirm(NODES[3])


@pytest.mark.parametrize(("members", "figures"), [(3, Figures()), (100, Figures(lifeguard=False))])
def test_where_nobody_can_confirm_suspicion_takes_its_least(members: int, figures: Figures) -> None:
    suspicion = Suspicion(NODES[0], 10.0, members, figures)
    assert suspicion.deadline == pytest.approx(10.0 + 4.0 * (1.0 if members == 3 else 2.0))


def test_awareness_stays_in_its_bounds_and_stretches_timeouts() -> None:
    health = Awareness(highest=8, silent=4)
    health.add(-3)
    assert (health.score, health.scaled(0.5), health.may_accuse) == (0, 0.5, True)
    health.add(4)
    assert (health.scaled(0.5), health.may_accuse) == (2.5, False)
    health.add(100)
    assert health.score == 8


def test_an_update_is_sent_as_often_as_the_limit_says_and_then_forgotten() -> None:
    queue = Broadcasts()
    queue.put(record("a"))
    sent = 0
    while queue.take(1_000, 6):
        sent += 1
    assert sent == 6 and not queue


@pytest.mark.parametrize(("members", "limit"), [(1, 4), (9, 4), (30, 8), (300, 12), (999, 12), (1_000, 16)])
def test_the_limit_grows_with_the_logarithm_of_the_cluster(members: int, limit: int) -> None:
    assert retransmit_limit(members, 4) == limit


def test_those_sent_least_go_first_and_the_newest_of_them() -> None:
    queue = Broadcasts()
    for name in "abc":
        queue.put(record(name))
    size = record("a").size()
    assert [m.node for m in queue.take(2 * size, 9)] == ["c", "b"]
    queue.put(record("d"))
    assert [m.node for m in queue.take(2 * size, 9)] == ["d", "a"]


def test_a_newer_update_of_a_node_takes_the_place_of_the_older() -> None:
    queue = Broadcasts()
    queue.put(record("a"))
    queue.take(1_000, 9)
    queue.put(record("a", incarnation=2_000))
    (only,) = queue.take(1_000, 9)
    assert only.incarnation == 2_000 and len(queue) == 1


def test_an_update_is_not_sent_to_whom_it_is_about() -> None:
    queue = Broadcasts()
    queue.put(record("a"))
    assert queue.take(1_000, 1, but=[NodeId("a")]) == [] and len(queue) == 1


def test_an_uncounted_update_is_given_and_stays() -> None:
    queue = Broadcasts()
    queue.put(record("a"))
    for _ in range(5):
        assert queue.take(1_000, 1, uncounted=NodeId("a"))
    assert queue.take(1_000, 1) and not queue


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 400)), max_size=60))
def test_the_queue_never_exceeds_its_budget_nor_its_nodes(steps: list[tuple[int, int]]) -> None:
    queue = Broadcasts()
    for node, budget in steps:
        queue.put(record(f"n{node}"))
        taken = queue.take(budget, 3)
        assert sum(member.size() for member in taken) <= budget
        assert len({member.node for member in taken}) == len(taken)
        assert len(queue) <= 10
        queue.check_invariants()


def test_a_feed_tells_each_listener_once_what_changed_since() -> None:
    feed = Feed()
    feed.changed(NODES[0])
    feed.listener(NODES[9])
    assert feed.unheard(NODES[9], 10) == []
    for node in (NODES[1], NODES[2], NODES[1]):
        feed.changed(node)
    unheard = feed.unheard(NODES[9], 10)
    assert [node for _, node in unheard] == [NODES[2], NODES[1]], "only the newest change of a node"
    feed.told(NODES[9], unheard[0][0])
    assert [node for _, node in feed.unheard(NODES[9], 10)] == [NODES[1]]


def test_a_feed_is_bounded() -> None:
    feed = Feed()
    feed.listener(NODES[0])
    for n in range(3 * FEED_ENTRIES):
        feed.changed(NodeId(f"x{n}"))
    assert len(feed.unheard(NODES[0], 10**6)) == FEED_ENTRIES == len(feed._newest)


def test_every_member_has_its_turn_in_each_round() -> None:
    rota = Rota(random.Random(1))
    for node in NODES:
        rota.add(node)
    rounds = [[rota.next() for _ in NODES] for _ in range(3)]
    assert all(sorted(map(str, turns)) == sorted(NODES) for turns in rounds[1:])
    assert rounds[1] != rounds[2], "each round in an order of its own"


def test_one_who_comes_during_a_round_has_its_turn_in_it() -> None:
    for seed in range(50):
        rota = Rota(random.Random(seed))
        for node in NODES[:10]:
            rota.add(node)
        turns = [rota.next() for _ in range(15)]  # into the second round
        rota.add(NODES[20])
        assert NODES[20] in [rota.next() for _ in range(6)], turns


@given(st.lists(st.tuples(st.sampled_from("adn"), st.integers(0, 12)), max_size=80), st.integers(0, 5))
def test_a_rota_is_a_set_whatever_happens_to_it(steps: list[tuple[str, int]], seed: int) -> None:
    rota, model = Rota(random.Random(seed)), set[NodeId]()
    for what, n in steps:
        if what == "a":
            rota.add(NODES[n])
            model.add(NODES[n])
        elif what == "d":
            rota.discard(NODES[n])
            model.discard(NODES[n])
        else:
            assert rota.next() in (model or {None})
        assert set(rota) == model and len(rota) == len(model)
    picked = rota.pick(3, but=NODES[:2])
    assert len(set(picked)) == len(picked) == min(3, len(model - set(NODES[:2]))) and not set(picked) & set(NODES[:2])


def test_picks_are_even() -> None:
    rota = Rota(random.Random(3))
    for node in NODES:
        rota.add(node)
    counts = Counter(node for _ in range(4_000) for node in rota.pick(2))
    assert min(counts.values()) > 140 and max(counts.values()) < 260


@given(st.lists(st.tuples(st.sampled_from("scp"), st.integers(0, 5), st.integers(0, 100)), max_size=200))
def test_timers_come_in_order_and_only_the_newest_of_each(steps: list[tuple[str, int, int]]) -> None:
    timers, model = Timers(), dict[int, int]()
    for what, key, at in steps:
        if what == "s":
            timers.set(key, float(at))
            model[key] = at
        elif what == "c":
            timers.cancel(key)
            model.pop(key, None)
        else:
            first = min(model.values(), default=None)
            due = timers.pop_due(float(at))
            assert (due is None) == (first is None or first > at)
            if isinstance(due, int):
                assert model.pop(due) == first
        assert timers.next() == (min(model.values()) if model else None) and len(timers) == len(model)


def test_postponing_moves_every_timer() -> None:
    timers = Timers()
    timers.set("a", 5.0)
    timers.postpone(2.0)
    timers.set("b", 6.0)
    assert (timers.pop_due(6.5), timers.pop_due(6.5), timers.next()) == ("b", None, 7.0)


def test_the_heap_of_timers_that_are_moved_for_ever_stays_small() -> None:
    timers = Timers()
    for n in range(10_000):
        timers.set(n % 3, float(n))
    assert len(timers._heap) < 200


def test_anchors_spread_evenly_and_move_only_where_they_must() -> None:
    clients = [NodeId(f"c{i}") for i in range(600)]
    before = {client: set(anchors.choose(client, NODES[:10], 3)) for client in clients}
    load = Counter(anchor for chosen in before.values() for anchor in chosen)
    assert set(load) == set(NODES[:10]) and max(load.values()) < 1.4 * min(load.values())
    after = {client: set(anchors.choose(client, NODES[:9], 3)) for client in clients}
    assert all(before[client] - {NODES[9]} <= after[client] for client in clients)
