"""Full states, tombstones, the leader hint, outbound-only members, sizes and bounds."""

from __future__ import annotations

import random

import pytest

from p2p.ids import NodeId
from p2p.membership import roster as roster_module
from p2p.membership.core import MembershipCore
from p2p.membership.events import Changed, Failed, Garbled, Hinted
from p2p.membership.figures import Figures
from p2p.membership.hint import LeaderHint
from p2p.membership.member import State
from p2p.membership.message import Ack, Digest, FullState, Nack, News, Ping, Probe, encode
from p2p.membership.roster import Roster
from tests.unit.p2p.membership.driving import Driven, only, record, sends, the_reply

PEERS = [record(f"n{i}") for i in range(6)]
DAY = 86_400.0


# --- push/pull --------------------------------------------------------------------------------------------------------


def test_equal_states_cost_sixteen_bytes() -> None:
    driven = Driven(*PEERS)
    assert len(driven.core.digest) == 16
    assert the_reply(driven.ask(PEERS[0], Digest(driven.core.digest))).body == Ack()


def test_different_states_are_answered_in_full() -> None:
    driven = Driven(*PEERS)
    body = the_reply(driven.ask(PEERS[0], Digest(bytes(16)))).body
    assert isinstance(body, FullState) and len(body.members) == 7


def test_two_that_differ_end_equal_after_one_comparison() -> None:
    one = Driven(*PEERS[:3])
    other = Driven(*PEERS[3:], me=record("you"), seed=2)
    one.hear(record("you"))
    other.hear(record("me"))
    digest = one.sends_until(Digest, "you")
    answer = the_reply(other.ask(one.core.me, digest.message.body, to="you")).body
    (push,) = [s for s in sends(one.answer(digest, answer)) if isinstance(s.message.body, FullState)]
    other.ask(one.core.me, push.message.body, to="you")
    assert one.core.digest == other.core.digest and set(one.core.members) == set(other.core.members)


def test_the_digest_does_not_depend_on_the_order_of_events() -> None:
    digests = set()
    for seed in range(5):
        order = list(PEERS)
        random.Random(seed).shuffle(order)
        driven = Driven()
        for peer in order:
            driven.hear(peer)
        digests.add(driven.core.digest)
    assert len(digests) == 1


@pytest.mark.parametrize(("members", "seconds"), [(30, 30.0), (300, 150.0), (1_000, 180.0)])
def test_full_comparisons_become_rarer_in_large_clusters(members: int, seconds: float) -> None:
    driven = Driven()
    for n in range(members - 1):
        driven.core.step(  # without the invariants, which scan
            _heard(driven, record(f"n{n}")), driven.now
        )
    times = []
    end = driven.now + 3 * seconds + 1
    while len(times) < 3 and driven.now < end:
        due = driven.core.next_deadline()
        assert due is not None
        driven.now = max(due, driven.now)
        for send in sends(driven.core.step(_tick(), driven.now)):
            body = send.message.body
            if isinstance(body, Digest) and driven.state_of(str(send.to_node)) is State.ALIVE:
                times.append(driven.now)
            driven.core.step(_acked(driven, send), driven.now)
    assert times[2] - times[1] == pytest.approx(seconds)


def _heard(driven: Driven, member: object) -> object:
    from p2p.membership.events import Requested

    return Requested(1, driven.message(member, News(), [member]), 0)  # type: ignore[arg-type, list-item]


def _tick() -> object:
    from p2p.membership.events import Tick

    return Tick()


def _acked(driven: Driven, send: object) -> object:
    from p2p.membership.events import Answered

    target = driven.core.members[send.to_node]  # type: ignore[attr-defined]
    return Answered(send.id, driven.message(target, Ack()))  # type: ignore[attr-defined]


def test_their_dead_are_only_suspects_here_so_that_the_living_can_refute() -> None:
    driven = Driven(*PEERS)
    driven.ask(PEERS[1], FullState((PEERS[0].as_(State.DEAD, by=NodeId("n2")),)))
    assert driven.state_of("n0") is State.SUSPECT


def test_a_dead_member_is_dialled_again_now_and_then() -> None:
    driven = Driven(*PEERS)
    driven.hear(PEERS[0].as_(State.DEAD), by=PEERS[1])
    asked = set()
    for _ in range(400):
        for send in sends(driven.advance(0.1)):
            if isinstance(send.message.body, Digest):
                asked.add(send.to_node)
    assert "n0" in asked


def test_who_has_left_is_not_dialled_again() -> None:
    driven = Driven(*PEERS)
    driven.hear(PEERS[0].as_(State.LEFT), by=PEERS[1])
    driven.quiet()
    assert "n0" not in {send.to_node for send in sends(driven.advance(90.0))}


# --- tombstones -------------------------------------------------------------------------------------------------------


def test_tombstones_are_kept_for_24_hours_and_then_forgotten() -> None:
    driven = Driven(*PEERS)
    driven.hear(PEERS[0].as_(State.DEAD), by=PEERS[1])
    driven.core._roster.gone_at[NodeId("n0")] = driven.now - DAY + 100
    driven.quiet(90.0)
    assert driven.state_of("n0") is State.DEAD
    driven.quiet(120.0)
    assert driven.state_of("n0") is None and driven.core.gone_at(NodeId("n0")) is None


def test_a_tombstone_travels_with_its_age_so_that_it_ends_everywhere() -> None:
    driven = Driven(*PEERS)
    gone = {NodeId("old"): int(DAY) - 60, NodeId("older"): int(DAY)}
    dead = tuple(record(str(node), state=State.DEAD) for node in gone)
    driven.ask(PEERS[0], FullState(dead, gone))
    assert driven.state_of("old") is State.DEAD and driven.state_of("older") is None
    driven.quiet(180.0)
    assert driven.state_of("old") is None
    state = Driven(PEERS[0]).core._roster
    state.put(PEERS[0].as_(State.DEAD), 10.0)
    assert state.full(70.0).ages == {"n0": 60}


def test_there_are_only_so_many_tombstones_and_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster_module, "MAX_TOMBSTONES", 3)
    roster = Roster(record("me"), random.Random(1), Figures())
    for n in range(6):
        roster.put(record(f"n{n}", state=State.DEAD), float(n))
    assert sorted(roster.forget(10.0)) == ["n0", "n1", "n2"] and set(roster.gone_at) == {"n3", "n4", "n5"}
    roster.check_invariants()


# --- leader hint ------------------------------------------------------------------------------------------------------


def test_a_newer_leader_is_passed_on_at_once_to_three_members() -> None:
    driven = Driven(*PEERS)
    effects = driven.step(LeaderHint(5, NodeId("n1"), "n1:1"))
    assert [h.hint.leader for h in only(effects, Hinted)] == ["n1"]
    assert len(sends(effects)) == 3 and all(s.message.hint.term == 5 for s in sends(effects))
    assert not driven.step(LeaderHint(4, NodeId("n2"), None))


def test_a_hint_heard_is_told_and_passed_on_at_once() -> None:
    driven = Driven(*PEERS)
    effects = driven.ask(PEERS[0], Ping(), hint=LeaderHint(6, NodeId("n2"), "n2:1"))
    assert driven.core.leader_hint.leader == "n2" and only(effects, Hinted)
    assert any(isinstance(s.message.body, News) for s in sends(effects))
    assert the_reply(effects).hint == driven.core.leader_hint


def test_every_message_carries_the_hint() -> None:
    driven = Driven(*PEERS)
    driven.step(LeaderHint(5, NodeId("n1"), "n1:1"))
    driven.quiet()
    assert all(send.message.hint.term == 5 for send in sends(driven.advance(5.0)))


def test_terms_that_rise_fast_do_not_make_a_storm() -> None:
    driven = Driven(*PEERS)
    sent = sum(len(sends(driven.step(LeaderHint(term, None, None)))) for term in range(1, 50))
    assert sent == 3 and driven.core.leader_hint.term == 49
    assert {s.message.hint.term for s in sends(driven.advance(0.3))} == {49}, "the rest goes with the next round"


# --- outbound-only ----------------------------------------------------------------------------------------------------

OUTBOUND = record("out", address=None, via=(NodeId("n0"), NodeId("n1"), NodeId("n2")))


def probing(driven: Driven, node: str) -> list[str]:
    """Ticks until `node` is being asked about; answers whom."""
    out = driven.until(lambda out: any(_asks(send, node) for send in sends(out)))
    return [str(send.to_node) for send in sends(out) if _asks(send, node)]


def _asks(send: object, node: str) -> bool:
    body = send.message.body  # type: ignore[attr-defined]
    return isinstance(body, Probe) and body.target == node


def test_an_outbound_only_member_is_never_called() -> None:
    driven = Driven(*PEERS, OUTBOUND)
    driven.quiet(120.0)
    driven.step(LeaderHint(9, None, None))
    for _ in range(100):
        assert "out" not in {send.to_node for send in sends(driven.advance(0.5))}


def test_it_is_probed_through_one_of_its_anchors() -> None:
    driven = Driven(*PEERS, OUTBOUND)
    (anchor,) = probing(driven, "out")
    assert anchor in OUTBOUND.via


def test_it_is_suspected_only_when_all_its_anchors_report_it_gone() -> None:
    for reports in (2, 3):
        driven = Driven(*PEERS, OUTBOUND, health_silent=9)
        asked = driven.until(lambda out: any(_asks(s, "out") for s in sends(out)))
        (first,) = [s for s in sends(asked) if _asks(s, "out")]
        rest = [s for s in sends(driven.answer(first, Nack())) if _asks(s, "out")]
        assert {first.to_node, *(s.to_node for s in rest)} == set(OUTBOUND.via)
        for send in rest[: reports - 1]:
            driven.answer(send, Nack())
        driven.advance(1.05)
        assert driven.state_of("out") is (State.SUSPECT if reports == 3 else State.ALIVE)


def test_a_dead_anchor_vouches_for_nobody() -> None:
    driven = Driven(*PEERS, OUTBOUND, health_silent=9)
    for n in range(3):
        driven.hear(PEERS[n].as_(State.DEAD), by=PEERS[5])
    driven.until(lambda _: driven.state_of("out") is State.SUSPECT)


def test_an_anchor_vouches_for_whom_it_has_heard_within_three_seconds() -> None:
    driven = Driven(*PEERS, OUTBOUND)
    assert the_reply(driven.ask(PEERS[5], Probe(NodeId("out"), 500))).body == Nack()
    driven.ask(OUTBOUND, Ping())
    driven.advance(2.9)
    assert the_reply(driven.ask(PEERS[5], Probe(NodeId("out"), 500))).body == Ack()
    driven.advance(0.2)
    assert the_reply(driven.ask(PEERS[5], Probe(NodeId("out"), 500))).body == Nack()


def test_an_anchor_that_hears_it_needs_no_message_to_probe_it() -> None:
    me = record("n0")
    driven = Driven(*PEERS[1:], OUTBOUND, me=me)
    for _ in range(60):
        driven.ask(OUTBOUND, Ping(), to="n0")
        assert not any(_asks(send, "out") for send in sends(driven.advance(0.5)))
    assert driven.state_of("out") is State.ALIVE


def test_an_outbound_only_node_pings_three_anchors_each_second_in_turn() -> None:
    driven = Driven(*PEERS, me=record("me", address=None))
    assert len(driven.core.me.via) == 3
    pings = [str(s.to_node) for s in sends(driven.advance(3.0)) if isinstance(s.message.body, Ping)]
    assert all(pings.count(str(anchor)) >= 3 for anchor in driven.core.me.via)


def test_an_anchor_that_does_not_answer_is_replaced_and_others_are_told() -> None:
    driven = Driven(*PEERS, me=record("me", address=None))
    before = driven.core.me
    ping = next(
        s for s in iter(lambda: driven.sends_until(Ping), None) if s.to_node in before.via and s.timeout_seconds
    )
    for send in [e for e in driven.effects if getattr(e, "to_node", None) == ping.to_node]:
        driven.step(Failed(send.id, "refused"))  # type: ignore[union-attr]
    driven.advance(0.5)
    assert ping.to_node not in driven.core.me.via and len(driven.core.me.via) == 3
    assert driven.core.me.incarnation > before.incarnation


def test_news_comes_to_an_outbound_only_member_in_the_replies_and_once() -> None:
    driven = Driven(*PEERS, OUTBOUND)
    driven.ask(OUTBOUND, Ping())
    driven.hear(record("n3", incarnation=1_001, meta={"zone": "b"}))
    driven.quiet()  # by now the queue has sent it as often as it would
    assert [m.node for m in the_reply(driven.ask(OUTBOUND, Ping())).updates] == ["n3"]
    assert the_reply(driven.ask(OUTBOUND, Ping())).updates == ()


# --- sizes and bounds -------------------------------------------------------------------------------------------------


def test_a_message_with_its_piggyback_stays_within_one_frame() -> None:
    driven = Driven(*PEERS)
    big = {"text": "x" * 300}
    driven.core.step(_heard(driven, PEERS[0]), driven.now)
    for n in range(40):
        driven.hear(record(f"big{n}", meta=big), record(f"small{n}"), by=PEERS[0])
    for _ in range(50):
        for send in sends(driven.advance(0.2)):
            assert len(encode(send.message)) <= 1_400
    assert len(encode(the_reply(driven.ask(PEERS[0], Ping())))) <= 1_400


def test_the_table_of_members_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from p2p.membership import core as core_module
    from p2p.membership.message import Join, Refuse
    from tests.unit.p2p.membership.driving import NOW_MS

    monkeypatch.setattr(core_module, "MAX_MEMBERS", 7)
    driven = Driven(*PEERS)
    driven.hear(record("one too many"), by=PEERS[0])
    assert driven.state_of("one too many") is None and driven.core.stats["full"] == 1
    body = the_reply(driven.ask(record("x"), Join(record("x"), NOW_MS))).body
    assert isinstance(body, Refuse) and body.code == "full"


def test_the_story_tells_when_from_what_to_what_and_why_and_is_bounded() -> None:
    driven = Driven(*PEERS, story_entries=8)
    driven.hear(PEERS[0].as_(State.SUSPECT, by=NodeId("n1")), by=PEERS[1])
    last = driven.core.story(NodeId("n0"))[-1]
    assert (last.old, last.new, last.at) == ("alive", "suspect", driven.now) and "n1 says so" in last.why
    for n in range(50):
        driven.hear(record(f"x{n}"))
    assert driven.core.story(NodeId("n0")) == []


def test_garbled_input_is_counted_and_changes_nothing() -> None:
    driven = Driven(*PEERS)
    before = dict(driven.core.members)
    assert driven.step(Garbled("nonsense")) == []
    assert driven.core.stats["malformed"] == 1 and driven.core.members == before


def test_questions_whose_answer_is_lost_are_given_up() -> None:
    driven = Driven(*PEERS)
    driven.advance(300.0)  # the shell never answers nor fails anything
    assert len(driven.core._pending) < 100


def test_time_does_not_go_back() -> None:
    core = MembershipCore(record("me"), random.Random(1), 10.0)
    with pytest.raises(AssertionError, match="back"):
        core.step(Garbled(""), 9.0)


def test_first_heard_of_is_a_change_from_nothing() -> None:
    driven = Driven()
    (changed,) = only(driven.hear(PEERS[0]), Changed)
    assert changed.old is None and changed.member == PEERS[0]
