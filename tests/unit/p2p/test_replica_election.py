"""Who stands, who is granted, who leads no more: the replica's part of the election."""

from __future__ import annotations

import itertools

import pytest

from p2p.effects import Effect, RoleChanged, Send
from p2p.ids import Index, Term
from p2p.messages import Append, AppendReply, Message, PreVote, PreVoteReply, TimeoutNow, Vote, VoteReply
from p2p.replica import CANDIDATE, FOLLOWER, LEADER, ConfigRefused, Received, SetFitness, Tick, Transfer
from tests.unit.p2p.interaction import Cluster, voter


def pre_vote(term: int = 0, *, log: tuple[int, int] = (0, 0), priority: int = 0) -> PreVote:
    """For the term after `term`; `log` is (index, term) of the asker's last entry."""
    return PreVote(Term(term), Term(term + 1), Index(log[0]), Term(log[1]), priority)


def sent(effects: list[Effect]) -> list[Message]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


# -- durability --------------------------------------------------------------------------------------------------------


def test_votes_are_asked_for_only_after_the_own_vote_is_on_disk() -> None:
    """Raft Figure 2, persistent state."""
    cluster = Cluster(3)
    cluster.nodes["n3"].disk_hangs = True
    cluster.now = 0.65
    cluster.tick("n3")
    cluster.stabilize()
    assert cluster.nodes["n3"].replica.role == CANDIDATE
    assert not cluster.nodes["n1"].replica.term
    cluster.nodes["n3"].disk_hangs = False
    cluster.stabilize()
    assert cluster.nodes["n3"].replica.role == LEADER


def test_an_earlier_vote_on_disk_says_nothing_about_a_later_one() -> None:
    """A candidate whose first round ran out before its disk answered stands again: two votes are under way to the disk,
    and the first to arrive is not the one that the second ballot waits for. (Else a power cut here lets it vote for
    another in a term that it may have won.)"""
    cluster = Cluster(3)
    node = cluster.nodes["n3"]
    node.disk_hangs = True
    cluster.now = 0.65
    cluster.tick("n3")
    cluster.stabilize()
    cluster.now = node.replica.election.deadline
    cluster.tick("n3")
    cluster.stabilize()
    assert (node.replica.role, node.replica.term, len(node.writes)) == (CANDIDATE, 2, 2)
    cluster.sync("n3", 1)
    assert not cluster.wire.get(("n3", "n1"))
    cluster.sync("n3")
    assert cluster.wire["n3", "n1"][-1] == Vote(Term(2), Index(0), Term(0), False)


def test_a_vote_is_told_only_after_it_is_on_disk() -> None:
    cluster = Cluster(3)
    cluster.nodes["n1"].disk_hangs = True
    cluster.cut("n3", "n2")
    cluster.now = 0.65
    cluster.tick("n3")
    cluster.stabilize()
    n3 = cluster.nodes["n3"].replica
    assert n3.role == CANDIDATE
    cluster.receive("n1", "n3", Vote(Term(1), Index(0), Term(0), False))  # asked again: still on its way to the disk
    cluster.stabilize()
    assert n3.role == CANDIDATE
    cluster.sync("n1")
    cluster.stabilize()
    assert n3.role == LEADER


def test_a_vote_on_disk_is_told_again_at_once() -> None:
    cluster = Cluster(3)
    ask = Vote(Term(1), Index(0), Term(0), False)
    cluster.now = 0.65
    cluster.receive("n1", "n3", ask)
    cluster.stabilize()
    effects = cluster.nodes["n1"].replica.step(Received(voter("n3"), ask), cluster.now)
    assert sent(effects) == [VoteReply(Term(1), True, "")]


def test_nothing_is_acknowledged_in_a_term_that_is_not_on_disk() -> None:
    """Raft Figure 2. Else: the new term's first entries are under way to the disk, what lies before them is
    acknowledged to the new leader, the power fails, and the old leader has it cut off; the new one never learns why
    what it takes for held is refused."""
    cluster = Cluster(3)
    cluster.preset("n1", [1])
    cluster.nodes["n1"].disk_hangs = True
    cluster.now = 0.65
    append = Append(Term(2), Index(1), Term(1), ((2, 0, b""),), Index(0), 7, ())
    cluster.receive("n1", "n3", append)
    cluster.receive("n1", "n3", append._replace(entries=(), prev_index=Index(1), round=8))
    assert not cluster.wire.get(("n1", "n3"))
    cluster.sync("n1")
    (reply,) = cluster.wire["n1", "n3"]
    assert isinstance(reply, AppendReply)
    assert (reply.match, reply.round, reply.term) == (2, 8, 2)


def test_acknowledgements_that_wait_for_the_term_do_not_pile_up() -> None:
    cluster = Cluster(3)
    node = cluster.nodes["n1"]
    for beat in range(100):
        cluster.receive("n1", "n3", Append(Term(1), Index(0), Term(0), (), Index(0), beat + 1, ()))
    assert not cluster.wire.get(("n1", "n3"))
    assert len(node.writes) == 1
    cluster.sync("n1")
    (reply,) = cluster.wire["n1", "n3"]
    assert isinstance(reply, AppendReply)
    assert reply.round == 100


# -- standing ----------------------------------------------------------------------------------------------------------


def test_a_voter_that_is_alone_for_days_keeps_asking() -> None:
    """The pause between two rounds grows and is capped; once its formula grew past what a float can hold."""
    cluster = Cluster(3)
    cluster.crash("n1")
    cluster.crash("n2")
    n3 = cluster.nodes["n3"]
    n3.draw = 0.999
    for _ in range(5_000):
        cluster.now = n3.replica.election.deadline
        cluster.tick("n3")
    assert n3.replica.term == 0
    assert n3.replica.election.deadline - cluster.now <= cluster.timers.longest_backoff


def test_a_round_of_votes_begins_when_they_are_asked_for() -> None:
    """Not when the candidate's own disk was asked to keep its vote."""
    cluster = Cluster(3)
    node = cluster.nodes["n3"]
    node.disk_hangs = True
    cluster.now = 0.65
    cluster.tick("n3")
    cluster.stabilize()
    whole_round = node.replica.election.deadline - 0.65
    cluster.now = 0.85
    cluster.sync("n3")
    assert node.replica.election.deadline == pytest.approx(0.85 + whole_round)


def test_a_pre_vote_for_another_term_does_not_count() -> None:
    """It answers a question of an earlier round, when the asker's term was another."""
    cluster = Cluster(3)
    cluster.preset("n3", [4])
    cluster.now = 0.65
    cluster.tick("n3")
    cluster.receive("n3", "n1", PreVoteReply(Term(1), Term(2), True, ""))
    assert cluster.nodes["n3"].replica.role == FOLLOWER
    cluster.receive("n3", "n1", PreVoteReply(Term(4), Term(5), True, ""))
    assert cluster.nodes["n3"].replica.role == CANDIDATE


def test_disks_slower_than_a_round_elect_a_leader_at_last() -> None:
    """PROTOCOL §1, Timers: the round's time grows. Both fsyncs of a vote take 0.4 s here, more than a first round."""
    cluster = Cluster(3)
    cluster.crash("n1")
    for name in ("n2", "n3"):
        cluster.nodes[name].disk_hangs = True
    due: dict[str, float] = {}
    while cluster.now < 10.0 and not cluster.leaders:
        cluster.now = round(cluster.now + 0.01, 2)
        for name in ("n2", "n3"):
            node = cluster.nodes[name]
            if node.writes and name not in due:
                due[name] = cluster.now + 0.4
            if cluster.now >= due.get(name, 1e9):
                del due[name]
                cluster.sync(name, 1)
            if cluster.now >= (node.replica.next_deadline() or 1e9):
                cluster.tick(name)
        cluster.stabilize()
    assert cluster.leaders


def test_a_candidate_does_not_give_up_its_votes_to_answer_higher() -> None:
    """The bully's answer is a refusal; only one that is not standing has to stand because of it."""
    cluster = Cluster(3)
    cluster.now = 0.65
    cluster.tick("n3")
    cluster.deliver("n3", "n1")
    cluster.deliver("n1", "n3")
    cluster.sync("n3")
    n3 = cluster.nodes["n3"].replica
    assert (n3.role, n3.term) == (CANDIDATE, 1)
    cluster.receive("n3", "n2", pre_vote(1))
    assert n3.role == CANDIDATE
    assert cluster.wire["n3", "n2"][-1] == PreVoteReply(Term(1), Term(2), False, "higher")


def test_a_candidate_that_is_told_it_is_unwell_does_not_become_leader() -> None:
    cluster = Cluster(3)
    cluster.now = 0.65
    cluster.tick("n3")
    cluster.deliver("n3", "n1")
    cluster.deliver("n1", "n3")
    assert cluster.nodes["n3"].replica.role == CANDIDATE
    cluster.step("n3", SetFitness(0, "no memory"))
    cluster.stabilize()
    assert cluster.nodes["n3"].replica.role == FOLLOWER
    assert not cluster.leaders


def test_a_learner_forgets_a_leader_that_it_no_longer_hears() -> None:
    """It never stands, but it forwards: to nobody rather than to the dead."""
    cluster = Cluster(3, learners=1)
    cluster.elect("n3")
    learner = cluster.nodes["n4"].replica
    assert learner.leader == voter("n3")
    cluster.crash("n3")
    deadline = learner.next_deadline()
    assert deadline is not None
    cluster.now = deadline
    (told,) = cluster.step("n4", Tick())
    assert isinstance(told, RoleChanged)
    assert told.leader is None
    assert learner.next_deadline() is None


def test_an_unwell_voter_forgets_a_leader_that_it_no_longer_hears() -> None:
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.step("n2", SetFitness(0, "no memory"))
    cluster.crash("n3")
    cluster.now = cluster.nodes["n2"].replica.election.deadline
    cluster.tick("n2")
    assert cluster.nodes["n2"].replica.leader is None


def test_hearing_the_same_leader_again_is_no_change_of_leader() -> None:
    """PROTOCOL §2.4: only changes double the hold-down."""
    cluster = Cluster(3)
    cluster.elect("n3")
    n1 = cluster.nodes["n1"].replica
    before = n1.election.preempt_after(cluster.now)
    for _ in range(3):
        cluster.now = n1.election.deadline
        cluster.tick("n1")  # it asks for votes, and hears n3 before it gets any
        assert n1.leader is None
        cluster.receive("n1", "n3", Append(Term(1), Index(0), Term(0), (), Index(0), 1, ()))
        assert n1.leader == voter("n3")
    assert n1.election.preempt_after(cluster.now) == before


def test_the_reason_of_a_lost_leader_is_told() -> None:
    cluster = Cluster(3)
    cluster.now = 0.65
    effects = cluster.step("n1", Received(voter("n3"), Vote(Term(1), Index(0), Term(0), False)))
    (told,) = [effect for effect in effects if isinstance(effect, RoleChanged)]
    assert "n3" in told.why


def test_one_voter_that_starts_slowly_does_not_wait_for_nobody() -> None:
    cluster = Cluster(1)
    cluster.now = 5.0
    cluster.tick("n1")
    cluster.stabilize()
    assert cluster.nodes["n1"].replica.role == LEADER


# -- handing over ------------------------------------------------------------------------------------------------------


def test_a_second_transfer_to_another_is_refused_while_one_is_under_way() -> None:
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.crash("n2")
    cluster.step("n3", Transfer(voter("n2")))
    cluster.step("n3", Transfer(voter("n2")))
    with pytest.raises(ConfigRefused, match="n2"):
        cluster.step("n3", Transfer(voter("n1")))


def test_a_favourite_that_does_not_take_the_seat_is_not_asked_again_at_once() -> None:
    """Else a leader would stop accepting for E of every E + 0.1 s."""
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.step("n1", SetFitness(9))
    cluster.lose = lambda message: isinstance(message, TimeoutNow)
    n3 = cluster.nodes["n3"].replica
    handovers, before = [], False
    while cluster.now < 200:
        cluster.run_to(cluster.now + 0.05)
        if n3.transferring and not before:
            handovers.append(cluster.now)
        before = n3.transferring
    assert len(handovers) > 1
    steady = cluster.timers.preempt_steady
    assert all(later - earlier >= steady for earlier, later in itertools.pairwise(handovers))


def test_an_order_to_stand_of_an_earlier_term_is_void() -> None:
    """It was on its way while its sender was deposed and elected anew."""
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.crash("n3")
    cluster.restart("n3")
    cluster.elect("n3")
    cluster.receive("n1", "n3", TimeoutNow(Term(1), Index(2)))
    assert (cluster.nodes["n1"].replica.role, cluster.nodes["n1"].replica.term) == (FOLLOWER, 2)
    cluster.receive("n1", "n3", TimeoutNow(Term(2), Index(2)))
    assert (cluster.nodes["n1"].replica.role, cluster.nodes["n1"].replica.term) == (CANDIDATE, 3)


# -- votes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["n1", "n3"], ids=["who hears the leader", "the leader itself"])
def test_a_vote_inside_a_lease_is_refused_and_its_term_not_taken(name: str) -> None:
    """Ongaro §4.2.3; but whoever was told to stand by the leader is not disturbing it."""
    cluster = Cluster(3)
    cluster.elect("n3")
    ask = Vote(Term(5), Index(9), Term(4), False)
    replica = cluster.nodes[name].replica
    assert sent(cluster.step(name, Received(voter("n2"), ask))) == [VoteReply(Term(1), False, "lease")]
    assert (replica.term, replica.leader) == (1, voter("n3"))
    cluster.receive(name, "n2", ask._replace(transfer=True))
    assert (replica.term, replica.voted_for) == (5, voter("n2"))


def test_one_vote_a_term() -> None:
    cluster = Cluster(3)
    cluster.now = 0.65
    ask = Vote(Term(1), Index(0), Term(0), False)
    for sender in ("n2", "n3", "n2"):
        cluster.receive("n1", sender, ask)
        cluster.stabilize("n1")
    assert cluster.wire["n1", "n3"][-1] == VoteReply(Term(1), False, "voted")
    assert list(cluster.wire["n1", "n2"]) == [VoteReply(Term(1), True, "")] * 2


def test_a_vote_for_a_term_that_is_past_is_refused_with_the_term() -> None:
    cluster = Cluster(3)
    cluster.preset("n1", [3])
    ask = Vote(Term(2), Index(9), Term(2), False)
    assert sent(cluster.step("n1", Received(voter("n3"), ask))) == [VoteReply(Term(3), False, "term")]


def test_giving_a_vote_gives_time_and_refusing_it_does_not() -> None:
    """Raft §5.2: only a candidate that may win is waited for."""
    cluster = Cluster(3)
    cluster.preset("n1", [1])
    replica = cluster.nodes["n1"].replica
    cluster.now = 0.65
    before = replica.election.deadline
    cluster.receive("n1", "n2", Vote(Term(2), Index(0), Term(0), False))
    assert replica.election.deadline == before
    cluster.receive("n1", "n3", Vote(Term(3), Index(1), Term(1), False))
    assert replica.election.deadline >= cluster.now + cluster.timers.election


# -- a timeout that follows the network (PROTOCOL §1: adaptive, only upwards) ------------------------------------------


def beat(cluster: Cluster, seconds: float, late: dict[str, int]) -> None:
    """Heartbeats of n3; the answers of each other arrive so many beats late."""
    end = cluster.now + seconds
    while cluster.now < end:
        cluster.now += cluster.timers.heartbeat + 1e-6
        cluster.tick("n3")
        for name, beats in late.items():
            cluster.deliver("n3", name)
            cluster.stabilize(name)
            while len(cluster.wire.get((name, "n3"), ())) > beats:
                cluster.deliver(name, "n3", 1)


def test_where_a_majority_answers_slowly_everybody_waits_longer_and_later_no_longer() -> None:
    cluster = Cluster(3)
    cluster.elect("n3")
    leader, n1 = cluster.nodes["n3"].replica, cluster.nodes["n1"].replica
    beat(cluster, 8, {"n1": 4, "n2": 4})
    slow = cluster.timers.slow_factor * 4 * cluster.timers.heartbeat
    assert leader.role == LEADER
    assert leader.election.timeout == pytest.approx(slow, rel=0.02)
    assert n1.election.timeout == pytest.approx(slow, rel=0.02)
    assert n1.election.deadline - n1.election.contact >= slow
    beat(cluster, 25, {"n1": 0, "n2": 0})
    assert leader.election.timeout == n1.election.timeout == cluster.timers.election


def test_one_slow_follower_of_two_slows_nobody() -> None:
    """A majority is the leader and the faster one."""
    cluster = Cluster(3)
    cluster.elect("n3")
    beat(cluster, 8, {"n1": 4, "n2": 0})
    assert cluster.nodes["n3"].replica.election.timeout == cluster.timers.election


def test_a_leader_that_waits_longer_also_leads_longer_unanswered() -> None:
    cluster = Cluster(3)
    cluster.elect("n3")
    beat(cluster, 8, {"n1": 4, "n2": 4})
    leader = cluster.nodes["n3"].replica
    contact = max(p.contact for p in leader.progress.values())
    cluster.now = contact + leader.election.timeout - 0.01
    cluster.tick("n3")
    assert leader.role == LEADER
    cluster.now = contact + leader.election.timeout + 0.01
    cluster.tick("n3")
    assert leader.role == FOLLOWER
