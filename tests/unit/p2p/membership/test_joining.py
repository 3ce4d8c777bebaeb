"""Joining and being joined, two clusters, blank nodes, one name for two processes, leaving, coming back."""

from __future__ import annotations

import pytest

from p2p.ids import ClusterId, DiskId, NodeId
from p2p.membership.events import (
    Changed,
    Conflict,
    Effect,
    Joined,
    JoinFailed,
    JoinThrough,
    Leave,
    Met,
    Refused,
    Requested,
    Send,
    SetCluster,
    SetMeta,
)
from p2p.membership.figures import MAX_SEEDS
from p2p.membership.member import MalformedMessage, Member, MembershipError, State
from p2p.membership.message import (
    Ack,
    Digest,
    FullState,
    Join,
    Nack,
    News,
    Ping,
    Probe,
    Refuse,
    Welcome,
)
from tests.unit.p2p.membership.driving import NOW_MS, Driven, only, record, sends, the_reply

BLANK = ClusterId("")
PEERS = [record(f"n{i}") for i in range(6)]


def join(driven: Driven, member: Member, unix_ms: int = NOW_MS) -> list[Effect]:
    return driven.ask(member, Join(member, unix_ms), to="")


def blank() -> Driven:
    return Driven(me=record("me", cluster=BLANK))


def welcomed(driven: Driven, *members: Member) -> list[Effect]:
    (send,) = sends(driven.step(JoinThrough(("n0:1",), NOW_MS)))
    assert isinstance(send.message.body, Join) and send.to_node is None
    return driven.answer(send, Welcome(FullState(members)), by=members[0])


# --- letting in -------------------------------------------------------------------------------------------------------


def test_a_joiner_is_welcomed_with_everybody_and_announced() -> None:
    driven = Driven(*PEERS)
    effects = join(driven, record("new"))
    welcome = the_reply(effects).body
    assert isinstance(welcome, Welcome) and {m.node for m in welcome.state.members} >= {"me", "new", "n0", "n5"}
    assert [(c.member.node, c.old) for c in only(effects, Changed)] == [("new", None)]
    told = driven.until(lambda out: bool(sends(out)))
    assert all("new" in {u.node for u in s.message.updates} for s in sends(told) if s.to_node != "new")


@pytest.mark.parametrize(("off_ms", "word"), [(30_001, "ahead of"), (-30_001, "behind")])
def test_a_clock_off_by_more_than_30_s_is_refused_with_reason_and_fix(off_ms: int, word: str) -> None:
    driven = Driven(*PEERS)
    effects = join(driven, record("new"), NOW_MS + off_ms)
    refusal = the_reply(effects).body
    assert isinstance(refusal, Refuse) and refusal.code == "clock" and word in refusal.detail
    assert "set-ntp" in refusal.fix and driven.state_of("new") is None
    assert [(r.code, r.by_us) for r in only(effects, Refused)] == [("clock", True)]


def test_a_clock_off_by_30_s_is_good_enough() -> None:
    assert isinstance(the_reply(join(Driven(*PEERS), record("new"), NOW_MS + 30_000)).body, Welcome)


def test_another_cluster_is_refused_and_both_names_are_said_on_both_sides() -> None:
    driven = Driven(*PEERS)
    effects = join(driven, record("new", cluster=ClusterId("c2")))
    refusal = the_reply(effects).body
    assert isinstance(refusal, Refuse) and refusal.code == "cluster"
    assert "c1" in refusal.detail and "c2" in refusal.detail
    assert [r.detail for r in only(effects, Refused)] == [refusal.detail]
    other = Driven(me=record("new", cluster=ClusterId("c2")))
    (send,) = sends(other.step(JoinThrough(("me:1",), NOW_MS)))
    (refused,) = only(other.answer(send, refusal, by=driven.core.me), Refused)
    assert (refused.by_us, refused.joining, refused.address) == (False, True, "me:1")
    assert "c1" in refused.detail and "c2" in refused.detail


@pytest.mark.parametrize("body", [Ping(), News(), Digest(bytes(16)), FullState(()), Probe(NodeId("n0"), 500)])
def test_nothing_of_another_cluster_is_listened_to(body: object) -> None:
    driven = Driven(*PEERS)
    stranger = record("s", cluster=ClusterId("c2"))
    reply = the_reply(driven.ask(stranger, body, [stranger, record("x")]))  # type: ignore[arg-type]
    assert isinstance(reply.body, Refuse) and driven.state_of("x") is None


def test_a_record_of_another_cluster_is_not_believed_whoever_passes_it_on() -> None:
    driven = Driven(*PEERS)
    driven.hear(record("x", cluster=ClusterId("c2")), by=PEERS[0])
    assert driven.state_of("x") is None and driven.core.stats["foreign_records"] == 1


def test_a_join_for_somebody_else_is_malformed_and_changes_nothing() -> None:
    driven = Driven(*PEERS)
    before = dict(driven.core.members)
    for member in (record("other"), PEERS[0].as_(State.DEAD), record("n0", boot="x")):
        with pytest.raises(MalformedMessage):
            driven.step(Requested(1, driven.message(PEERS[0], Join(member, NOW_MS)), NOW_MS))
    assert driven.core.members == before and driven.core.stats["malformed"] == 3


@pytest.mark.parametrize("body", [Ack(), Nack(), Welcome(FullState(())), Refuse("x", "", "")])
def test_an_answer_that_comes_as_a_request_is_malformed(body: object) -> None:
    driven = Driven(*PEERS)
    with pytest.raises(MalformedMessage):
        driven.ask(PEERS[0], body)  # type: ignore[arg-type]
    assert driven.core.stats["malformed"] == 1


def test_a_request_that_comes_as_an_answer_is_malformed() -> None:
    driven = Driven(*PEERS)
    ping = driven.sends_until(Ping)
    with pytest.raises(MalformedMessage):
        driven.answer(ping, Ping())


# --- being let in -----------------------------------------------------------------------------------------------------


def test_a_welcome_brings_everybody_and_is_told() -> None:
    driven = Driven()
    effects = welcomed(driven, *PEERS)
    assert [(j.cluster, j.node, j.address) for j in only(effects, Joined)] == [("c1", "n0", "n0:1")]
    assert set(driven.core.members) == {"me", *(peer.node for peer in PEERS)}


def test_what_the_welcomer_lacks_is_sent_to_it() -> None:
    driven = Driven(record("mine"))
    (push,) = [s for s in sends(welcomed(driven, *PEERS)) if isinstance(s.message.body, FullState)]
    assert isinstance(push.message.body, FullState)
    assert push.to_address == "n0:1" and {m.node for m in push.message.body.members} >= {"mine"}


def test_an_address_where_nobody_answers_is_told_as_such() -> None:
    driven = Driven()
    (send,) = sends(driven.step(JoinThrough(("h:1",), NOW_MS)))
    assert [f.address for f in only(driven.fail(send), JoinFailed)] == ["h:1"]


def test_a_join_tries_a_bounded_number_of_addresses() -> None:
    driven = Driven()
    assert len(sends(driven.step(JoinThrough(tuple(f"h:{n}" for n in range(99)), NOW_MS)))) == MAX_SEEDS


def test_a_node_that_calls_itself_is_told_so() -> None:
    driven = Driven()
    reply = the_reply(driven.ask(driven.core.me, Join(driven.core.me, NOW_MS), to=""))
    assert isinstance(reply.body, Refuse) and reply.body.code == "self"


# --- blank nodes ------------------------------------------------------------------------------------------------------


def test_a_blank_node_is_let_in_and_belongs_once_it_says_so() -> None:
    driven = blank()
    welcomed(driven, *PEERS)
    assert driven.core.me.cluster == ""
    driven.step(SetCluster(ClusterId("c1")))
    assert driven.core.me.cluster == "c1"
    with pytest.raises(MembershipError):
        driven.step(SetCluster(ClusterId("c2")))
    driven.step(SetCluster(ClusterId("c1")))


def test_a_node_that_got_its_cluster_compares_states_at_once() -> None:
    driven = blank()
    welcomed(driven, *PEERS)
    driven.step(SetCluster(ClusterId("c1")))
    assert any(isinstance(s.message.body, Digest) for s in sends(driven.advance(0.0)))


@pytest.mark.parametrize(
    ("body", "taken"), [(Ping(), True), (News(), False), (Digest(bytes(16)), False), (Probe(NodeId("n0"), 1), False)]
)
def test_between_blank_and_not_blank_only_joins_and_pings_pass(body: object, taken: bool) -> None:
    for driven, peer in ((Driven(*PEERS), record("b", cluster=BLANK)), (blank(), record("b"))):
        reply = the_reply(driven.ask(peer, body, [record("rumour", cluster=BLANK)]))  # type: ignore[arg-type]
        assert isinstance(reply.body, Refuse) is not taken
        assert driven.state_of("rumour") is None, "and nothing that rides on them"


def test_blank_nodes_gossip_among_each_other() -> None:
    driven = blank()
    driven.ask(record("b", cluster=BLANK), News(), [record("b", cluster=BLANK), record("d", cluster=BLANK)])
    assert driven.state_of("d") is State.ALIVE


def test_a_blank_node_that_hears_from_a_cluster_says_so_once() -> None:
    driven = blank()
    effects = [*driven.ask(record("n0"), Ping()), *driven.ask(record("n0"), Ping())]
    assert [(met.cluster, met.node) for met in only(effects, Met)] == [("c1", "n0")]


def test_a_blank_node_forgets_members_of_the_cluster_it_did_not_choose() -> None:
    driven = blank()
    welcomed(driven, *PEERS)
    welcomed(driven, record("other", cluster=ClusterId("c2")))
    driven.step(SetCluster(ClusterId("c1")))
    assert driven.state_of("other") is None and driven.state_of("n0") is State.ALIVE


# --- one name, two processes ------------------------------------------------------------------------------------------


def claimant(**fields: object) -> Member:
    return record("n0", **{"boot": "new", "incarnation": 2_000, "started_ms": 2_000, **fields})


def test_a_restart_in_place_is_let_in_at_once() -> None:
    driven = Driven(*PEERS)
    effects = join(driven, claimant())
    assert isinstance(the_reply(effects).body, Welcome)
    (changed,) = only(effects, Changed)
    assert changed.old is not None and (changed.old.boot, changed.member.boot) == ("boot-n0", "new")


@pytest.mark.parametrize("state", [State.DEAD, State.LEFT])
def test_a_name_whose_owner_is_gone_is_free(state: State) -> None:
    driven = Driven(*PEERS)
    driven.hear(PEERS[0].as_(state), by=PEERS[1])
    effects = join(driven, claimant(disk=DiskId("other"), address="elsewhere:1"))
    assert isinstance(the_reply(effects).body, Welcome) and driven.state_of("n0") is State.ALIVE


def verifying(driven: Driven, member: Member) -> Send:
    effects = join(driven, member)
    (ping,) = [s for s in sends(effects) if isinstance(s.message.body, Ping | Probe)]
    return ping


def test_a_taken_name_is_refused_when_its_owner_still_answers() -> None:
    driven = Driven(*PEERS)
    ping = verifying(driven, claimant(disk=DiskId("other"), address="elsewhere:1"))
    assert ping.to_address == "n0:1"
    effects = driven.answer(ping, Ack())
    refusal = the_reply(effects).body
    assert isinstance(refusal, Refuse) and refusal.code == "conflict" and "--node-id" in refusal.fix
    (conflict,) = only(effects, Conflict)
    assert (conflict.holder.boot, conflict.claimant.boot, conflict.ours) == ("boot-n0", "new", False)
    assert driven.core.members[NodeId("n0")].boot == "boot-n0"


def test_a_taken_name_is_given_when_its_owner_does_not_answer_in_half_a_second() -> None:
    driven = Driven(*PEERS)
    verifying(driven, claimant(disk=DiskId("other"), address="elsewhere:1"))
    began = driven.now
    effects = driven.until(lambda out: any(type(e).__name__ == "Reply" for e in out))
    assert isinstance(the_reply(effects).body, Welcome) and driven.now <= began + 0.5
    assert driven.core.members[NodeId("n0")].boot == "new"


def test_the_claimant_itself_at_the_old_address_is_no_sign_of_the_owners_life() -> None:
    driven = Driven(*PEERS)
    new = claimant(disk=DiskId("wiped"))
    ping = verifying(driven, new)
    assert isinstance(the_reply(driven.answer(ping, Ack(), by=new)).body, Welcome)


def test_nobody_joins_under_this_nodes_own_name() -> None:
    driven = Driven(*PEERS)
    effects = join(driven, record("me", boot="b2", disk=DiskId("d2"), address="x:1"))
    refusal = the_reply(effects).body
    assert isinstance(refusal, Refuse) and refusal.code == "conflict" and only(effects, Conflict)


def test_records_of_this_nodes_earlier_life_are_outbid_at_the_welcome() -> None:
    for state in State:
        driven = Driven()
        earlier = record("me", boot="earlier", started_ms=500, incarnation=5_000, state=state)
        effects = welcomed(driven, PEERS[0], earlier)
        assert driven.core.me.incarnation == 5_001 and not only(effects, Conflict)


def test_of_two_living_processes_the_older_keeps_the_name_and_says_so() -> None:
    driven = Driven(*PEERS)
    rival = record("me", boot="newer", started_ms=9_000, incarnation=9_000, disk=DiskId("x"))
    effects = driven.hear(rival, by=PEERS[0])
    (conflict,) = only(effects, Conflict)
    assert (conflict.holder.boot, conflict.claimant.boot, conflict.ours) == ("boot-me", "newer", False)
    assert driven.core.me.incarnation == 9_001
    driven.hear(record("me", boot="newer", started_ms=9_000, incarnation=9_002, disk=DiskId("x")), by=PEERS[0])
    assert driven.core.me.incarnation == 9_003 and len(only(driven.effects, Conflict)) == 1


def test_of_two_living_processes_the_newer_stops_defending_the_name() -> None:
    driven = Driven(*PEERS, me=record("me", started_ms=9_000, incarnation=9_000))
    rival = record("me", boot="older", started_ms=500, incarnation=9_000 + 5)
    assert not only(driven.hear(rival, by=PEERS[0]), Conflict), "that may be a memory of our own earlier life"
    assert driven.core.me.incarnation == 9_006
    alive = record("me", boot="older", started_ms=500, incarnation=9_007)
    (conflict,) = only(driven.hear(alive, by=PEERS[0]), Conflict)
    assert conflict.ours and conflict.holder.boot == "older" and driven.core.displaced_by == alive
    driven.effects.clear()
    driven.advance(30.0)
    assert not sends(driven.effects), "it is silent from then on"


# --- leaving and coming back ------------------------------------------------------------------------------------------


def test_a_farewell_is_told_at_once_and_is_the_last_word() -> None:
    driven = Driven(*PEERS)
    told = sends(driven.step(Leave()))
    assert len(told) == len(PEERS) and all(s.message.updates == (driven.core.me,) for s in told)
    assert driven.core.me.state is State.LEFT and driven.core.next_deadline() is None
    driven.hear(driven.core.me.as_(State.DEAD), by=PEERS[0])
    driven.step(SetMeta({"a": 1}))
    assert driven.step(Leave()) == [] and driven.core.me.state is State.LEFT


def test_who_has_left_is_not_dead_and_does_not_become_so() -> None:
    driven = Driven(*PEERS)
    driven.hear(record("n0", incarnation=1_001, state=State.LEFT))
    driven.hear(record("n0", incarnation=1_001, state=State.DEAD), by=PEERS[1])
    driven.quiet(60.0)
    assert driven.state_of("n0") is State.LEFT


def test_one_taken_for_dead_comes_back_with_a_higher_incarnation() -> None:
    driven = Driven(*PEERS)
    driven.hear(PEERS[0].as_(State.DEAD), by=PEERS[1])
    (changed,) = only(driven.hear(record("n0", incarnation=1_001), by=PEERS[1]), Changed)
    assert changed.member.state is State.ALIVE and changed.old is not None and changed.old.state is State.DEAD


def test_one_taken_for_dead_that_speaks_is_told_so() -> None:
    driven = Driven(*PEERS)
    dead = PEERS[0].as_(State.DEAD)
    driven.hear(dead, by=PEERS[1])
    assert the_reply(driven.ask(PEERS[0], Ping())).updates[0] == dead
