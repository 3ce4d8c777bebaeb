"""Probes, help, suspicion, refutation, and a node that doubts itself."""

from __future__ import annotations

from itertools import pairwise

import pytest

from p2p.ids import NodeId
from p2p.membership.core import GOSSIP
from p2p.membership.events import Changed, LoopLag, SetMeta, Tick, Updated
from p2p.membership.member import State
from p2p.membership.message import Ack, Nack, News, Ping, Probe
from tests.unit.p2p.membership.driving import Driven, only, record, sends, the_reply

PEERS = [record(f"n{i}") for i in range(6)]


def test_one_member_is_probed_each_second_in_rounds() -> None:
    driven = Driven(*PEERS)
    probed, times = [], []
    for _ in range(18):
        ping = driven.sends_until(Ping)
        probed.append(str(ping.to_node))
        times.append(driven.now)
        driven.answer(ping)
    assert all(later - sooner == pytest.approx(1.0) for sooner, later in pairwise(times))
    assert all(set(probed[at : at + 11]) == {peer.node for peer in PEERS} for at in range(8)), "within two rounds"


def test_no_answer_in_half_a_second_asks_three_others_and_an_ack_of_theirs_is_enough() -> None:
    driven = Driven(*PEERS)
    ping = driven.sends_until(Ping)
    began = driven.now
    helpers = [s for s in sends(driven.until(lambda out: bool(sends(out)))) if isinstance(s.message.body, Probe)]
    assert driven.now == pytest.approx(began + 0.5)
    assert len({s.to_node for s in helpers}) == 3 and ping.to_node not in {s.to_node for s in helpers}
    assert {s.message.body for s in helpers} == {Probe(ping.to_node or NodeId(""), 500)}
    driven.answer(helpers[0], Ack())
    driven.advance(1.0)
    assert driven.state_of(str(ping.to_node)) is State.ALIVE


def test_a_refused_connection_asks_others_at_once() -> None:
    driven = Driven(*PEERS)
    ping = driven.sends_until(Ping)
    assert len([s for s in sends(driven.fail(ping)) if isinstance(s.message.body, Probe)]) == 3


def test_one_who_answers_nobody_is_suspected_and_everybody_is_told() -> None:
    driven = Driven(*PEERS)
    suspect = driven.sends_until(Ping).to_node
    effects = driven.advance(1.01)
    (changed,) = only(effects, Changed)
    assert (changed.member.node, changed.member.state, changed.member.by) == (suspect, State.SUSPECT, "me")
    told = [s for s in sends(effects) if isinstance(s.message.body, News)]
    assert len(told) == 3 and all(suspect in {u.node for u in s.message.updates} for s in told)


def test_a_late_direct_answer_still_counts() -> None:
    driven = Driven(*PEERS)
    ping = driven.sends_until(Ping)
    driven.advance(0.9)
    driven.answer(ping)
    driven.advance(0.2)
    assert driven.state_of(str(ping.to_node)) is State.ALIVE


def test_an_answer_from_another_node_at_that_address_is_none() -> None:
    driven = Driven(*PEERS)
    ping = driven.sends_until(Ping)
    other = next(peer for peer in PEERS if peer.node != ping.to_node)
    driven.answer(ping, Ack(), by=other)
    driven.advance(1.1)
    assert driven.state_of(str(ping.to_node)) is State.SUSPECT


def test_a_ping_meant_for_the_former_owner_of_this_address_gets_nack() -> None:
    driven = Driven(*PEERS)
    assert the_reply(driven.ask(PEERS[0], Ping(), to="somebody")).body == Nack()
    assert the_reply(driven.ask(PEERS[0], Ping())).body == Ack()


def test_a_suspect_that_does_not_refute_is_dead_after_its_suspicion_and_stays_so() -> None:
    driven = Driven(*PEERS, health_silent=9)
    driven.hear(PEERS[0].as_(State.SUSPECT, by=NodeId("n1")), by=PEERS[1])
    began = driven.now
    assert began + 24 > driven.now
    driven.until(lambda out: any(c.member.node == "n0" for c in only(out, Changed) if c.member.state is State.DEAD))
    assert driven.now - began == pytest.approx(24.0, abs=1.5), "4 x log10 of fewer than ten is 4 s; times 6"
    assert driven.state_of("n0") is State.DEAD
    driven.hear(PEERS[0], by=PEERS[1])
    assert driven.state_of("n0") is State.DEAD, "an old record does not raise the dead"


def test_confirmations_of_others_shorten_the_suspicion() -> None:
    driven = Driven(*PEERS, health_silent=9)
    for accuser in ("n1", "n2", "n3"):
        driven.hear(PEERS[0].as_(State.SUSPECT, by=NodeId(accuser)), by=PEERS[4])
    began = driven.now
    driven.until(lambda out: driven.state_of("n0") is State.DEAD)
    assert driven.now - began == pytest.approx(4.0, abs=0.5)


def test_a_higher_incarnation_ends_the_suspicion() -> None:
    driven = Driven(*PEERS)
    driven.hear(PEERS[0].as_(State.SUSPECT, by=NodeId("n1")), by=PEERS[1])
    driven.hear(record("n0", incarnation=1_001), by=PEERS[1])
    driven.quiet(60.0)
    assert driven.state_of("n0") is State.ALIVE


def test_a_rumour_about_this_node_is_refuted_with_the_next_incarnation() -> None:
    driven = Driven(*PEERS)
    before = driven.core.me
    reply = the_reply(driven.hear(before.as_(State.SUSPECT, by=NodeId("n1")), by=PEERS[1]))
    assert driven.core.me.incarnation == before.incarnation + 1
    assert driven.core.me in reply.updates, "in the very reply"
    assert driven.core.health.score == 1, "having to refute is a sign of being slow"
    assert [line.new for line in driven.core.story(driven.core.node)] == ["alive"]


def test_a_rumour_of_an_incarnation_never_announced_is_outbid_too() -> None:
    driven = Driven(*PEERS)
    driven.hear(record("me", incarnation=5_000, state=State.SUSPECT, by=NodeId("n1")), by=PEERS[1])
    assert driven.core.me.incarnation == 5_001


def test_the_suspect_is_told_first_of_all_when_it_is_spoken_to() -> None:
    driven = Driven(*PEERS)
    suspect = PEERS[0].as_(State.SUSPECT, by=NodeId("n1"))
    driven.hear(suspect, by=PEERS[1])
    assert the_reply(driven.ask(PEERS[0], Ping())).updates[0] == suspect
    ping = driven.sends_until(Ping, "n0")
    assert ping.message.updates[0] == suspect


def test_a_helper_pings_and_reports_what_came_back() -> None:
    driven = Driven(*PEERS)
    (ping,) = [s for s in sends(driven.ask(PEERS[0], Probe(NodeId("n1"), 500))) if isinstance(s.message.body, Ping)]
    assert ping.to_node == "n1"
    assert the_reply(driven.answer(ping, Ack())).body == Ack()


def test_a_helper_says_nack_at_four_fifths_of_the_askers_patience() -> None:
    driven = Driven(*PEERS)
    driven.ask(PEERS[0], Probe(NodeId("n1"), 500))
    began = driven.now
    reply = the_reply(driven.until(lambda out: any(type(e).__name__ == "Reply" for e in out)))
    assert reply.body == Nack() and driven.now == pytest.approx(began + 0.4)


@pytest.mark.parametrize("target", ["me", "stranger"])
def test_a_helper_answers_at_once_what_it_knows_without_asking(target: str) -> None:
    driven = Driven(*PEERS)
    body = the_reply(driven.ask(PEERS[0], Probe(NodeId(target), 500))).body
    assert body == (Ack() if target == "me" else Nack())


def test_a_helper_takes_on_a_bounded_number_at_once() -> None:
    driven = Driven(*PEERS)
    replies = [driven.ask(PEERS[0], Probe(NodeId("n1"), 500)) for _ in range(70)]
    assert sum(bool(sends(effects)) for effects in replies) >= 64
    assert the_reply(replies[-1]).body == Nack()


def test_missing_nacks_raise_the_nodes_doubt_in_itself_and_answered_probes_lower_it() -> None:
    driven = Driven(*PEERS)
    driven.sends_until(Ping)
    driven.advance(1.01)
    assert driven.core.health.score == 3, "three helpers and not even a nack"
    driven.quiet(60.0)
    assert driven.core.health.score == 0


def test_nacks_say_that_the_fault_is_not_here() -> None:
    driven = Driven(*PEERS)
    driven.sends_until(Ping)
    for send in sends(driven.until(lambda out: any(isinstance(s.message.body, Probe) for s in sends(out)))):
        driven.answer(send, Nack())
    driven.advance(0.51)
    assert driven.core.health.score == 0


def test_a_node_that_doubts_itself_enough_suspects_nobody() -> None:
    driven = Driven(*PEERS)
    driven.core.health.add(4)
    driven.advance(30.0)
    assert not [c for c in only(driven.effects, Changed) if c.member.state is State.SUSPECT]
    assert driven.core.stats["held_back"] > 0


def test_a_node_that_doubts_itself_declares_nobody_dead() -> None:
    driven = Driven(*PEERS)
    for accuser in ("n1", "n2", "n3"):
        driven.hear(PEERS[0].as_(State.SUSPECT, by=NodeId(accuser)), by=PEERS[4])
    driven.core.health.add(8)
    driven.advance(12.0)
    assert driven.state_of("n0") is State.SUSPECT


def test_a_doubtful_node_probes_more_slowly() -> None:
    driven = Driven(*PEERS)
    driven.core.health.add(2)  # the probe that just ended well takes one of them back
    first = driven.sends_until(Ping)
    began = driven.now
    driven.answer(first)
    driven.sends_until(Ping)
    assert driven.now == pytest.approx(began + 2.0)


def test_loop_lag_over_100_ms_is_a_reason_for_doubt() -> None:
    driven = Driven(*PEERS)
    driven.step(LoopLag(0.1))
    assert driven.core.health.score == 0
    driven.step(LoopLag(0.11))
    assert driven.core.health.score == 1


def test_a_node_that_slept_reads_its_backlog_before_it_accuses() -> None:
    driven = Driven(*PEERS)
    ping = driven.sends_until(Ping)
    driven.now += 5.0  # stopped, and went on
    driven.step(Tick())
    driven.answer(ping)
    driven.advance(2.0)
    assert driven.state_of(str(ping.to_node)) is State.ALIVE and driven.core.stats["late"] == 1
    assert driven.core.health.score > 0


def test_a_node_that_slept_gives_suspects_the_time_it_was_not_there() -> None:
    driven = Driven(*PEERS)
    for accuser in ("n1", "n2", "n3"):
        driven.hear(PEERS[0].as_(State.SUSPECT, by=NodeId(accuser)), by=PEERS[4])
    driven.now += 30.0
    driven.step(Tick())
    assert driven.state_of("n0") is State.SUSPECT
    driven.hear(record("n0", incarnation=1_001), by=PEERS[1])
    assert driven.state_of("n0") is State.ALIVE


def test_confirmations_after_a_sleep_count_from_when_this_node_listened_again() -> None:
    driven = Driven(*PEERS, health_silent=9)
    driven.hear(PEERS[0].as_(State.SUSPECT, by=NodeId("n1")), by=PEERS[1])
    driven.now += 10.0
    driven.step(Tick())
    for accuser in ("n2", "n3"):
        driven.hear(PEERS[0].as_(State.SUSPECT, by=NodeId(accuser)), by=PEERS[4])
    driven.advance(3.0)
    assert driven.state_of("n0") is State.SUSPECT
    driven.until(lambda _: driven.state_of("n0") is State.DEAD, seconds=3.0)


def test_without_lifeguard_a_sleeper_accuses_as_soon_as_it_wakes() -> None:
    """The comparison `bench.gossip` makes; also shows that the tests above can fail."""
    driven = Driven(*PEERS, lifeguard=False)
    for accuser in ("n1", "n2", "n3"):
        driven.hear(PEERS[0].as_(State.SUSPECT, by=NodeId(accuser)), by=PEERS[4])
    driven.now += 30.0
    driven.step(Tick())
    assert driven.state_of("n0") is State.DEAD


def test_new_meta_is_announced_with_the_next_incarnation_and_the_same_meta_is_not() -> None:
    driven = Driven(*PEERS)
    before = driven.core.me.incarnation
    driven.step(SetMeta({"role": "worker"}))
    assert (driven.core.me.incarnation, driven.core.me.meta) == (before + 1, {"role": "worker"})
    driven.step(SetMeta({"role": "worker"}))
    assert driven.core.me.incarnation == before + 1
    told = driven.until(lambda out: bool(sends(out)))
    assert all(driven.core.me in s.message.updates for s in sends(told))


def test_what_a_member_announces_anew_is_an_update_and_no_change() -> None:
    driven = Driven(*PEERS)
    effects = driven.hear(record("n0", incarnation=1_001, meta={"zone": "a"}))
    assert [u.member.meta for u in only(effects, Updated)] == [{"zone": "a"}] and not only(effects, Changed)


def test_what_only_its_own_subject_could_be_told_is_told_to_nobody_and_forgotten() -> None:
    driven = Driven(record("n0"))
    driven.hear(record("n0", incarnation=1_001))
    told = [send for send in sends(driven.advance(1.0)) if isinstance(send.message.body, News)]
    assert not told and GOSSIP not in driven.core._timers


def test_idle_gossip_sends_nothing_but_probes() -> None:
    driven = Driven(*PEERS)
    driven.quiet(60.0)
    kinds = set()
    for _ in range(200):
        for send in sends(driven.advance(0.1)):
            kinds.add(type(send.message.body).__name__)
            assert send.message.updates == ()
            driven.answer(send)
    assert kinds == {"Ping"} or kinds == {"Ping", "Digest"}
