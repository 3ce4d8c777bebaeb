"""Changing who votes, one voter at a time (Ongaro 2014, §4, and the fix of 2015; PROTOCOL §2.24)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.effects import Config, ReadReady
from p2p.ids import Index, Term, VoterId
from p2p.messages import Append, AppendReply, TimeoutNow
from p2p.replica import (
    CLOSE_ENTRIES,
    FAREWELL_SECONDS,
    FOLLOWER,
    LEADER,
    ConfigRefused,
    Farewell,
    Propose,
    Read,
    Reconfigure,
    Tick,
)
from tests.unit.p2p.interaction import Cluster, voter


def members(voters: str, learners: str = "") -> Config:
    return Config(tuple(map(voter, voters.split())), tuple(map(voter, learners.split())))


def test_a_removed_leader_stands_again_while_its_removal_is_not_committed() -> None:
    """Ongaro §4.2.2, Figure 4.6: of two voters the leader removes itself and its power fails before the other has
    heard of it. The other cannot win without a vote that the longer log refuses it, so only the removed one can lead:
    it stands without voting for itself, commits its removal, and leaves."""
    cluster = Cluster(2)
    cluster.elect("n1")
    cluster.cut("n1", "n2")
    cluster.step("n1", Reconfigure(members("n2")))
    cluster.sync("n1")
    cluster.crash("n1")
    cluster.cuts.clear()
    cluster.now += 10
    cluster.restart("n1")
    cluster.run_to(cluster.now + 20)
    n1, n2 = cluster.nodes["n1"].replica, cluster.nodes["n2"].replica
    assert n2.role == LEADER
    assert n2.config == members("n2")
    assert n1.role == FOLLOWER


def test_a_removed_voter_stands_no_more_once_it_knows_that_it_was_removed() -> None:
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.step("n3", Reconfigure(members("n2 n3")))
    cluster.run_to(cluster.now + 1)
    n1 = cluster.nodes["n1"].replica
    assert n1.config == members("n2 n3")
    cluster.run_to(cluster.now + 10)
    assert n1.next_deadline() is None
    assert cluster.leaders == {1: "n3"}


def test_a_voter_named_twice_counts_once() -> None:
    cluster = Cluster(3)
    cluster.elect("n3")
    twice = members("n1 n2 n3 n3", "")
    before = cluster.nodes["n3"].replica.journal.last_index
    cluster.step("n3", Reconfigure(twice))
    assert cluster.nodes["n3"].replica.config == members("n1 n2 n3")
    assert cluster.nodes["n3"].replica.journal.last_index == before


def with_learner() -> Cluster:
    """One voter n1, which leads, and the learner n2, which holds everything."""
    cluster = Cluster(1, strangers=1)
    cluster.elect("n1")
    cluster.step("n1", Reconfigure(members("n1", "n2")))
    cluster.run_to(cluster.now + 1)
    return cluster


def test_a_learner_that_holds_everything_may_vote() -> None:
    cluster = with_learner()
    cluster.step("n1", Reconfigure(members("n1 n2")))
    cluster.run_to(cluster.now + 1)
    assert cluster.nodes["n2"].replica.config == members("n1 n2")


def test_a_learner_that_is_silent_is_not_made_a_voter() -> None:
    """One voter and a dead one are no majority: the change would take the cluster down, and could not be undone."""
    cluster = with_learner()
    cluster.crash("n2")
    cluster.run_to(cluster.now + 1)
    with pytest.raises(ConfigRefused, match="not up to date"):
        cluster.step("n1", Reconfigure(members("n1 n2")))
    assert cluster.nodes["n1"].replica.config == members("n1", "n2")


def test_a_learner_that_has_lost_what_it_held_is_not_made_a_voter() -> None:
    cluster = with_learner()
    held = cluster.nodes["n1"].replica
    cluster.step("n1", Propose((b"x",)))
    cluster.stabilize()
    cluster.now += 0.1
    cluster.tick("n1")
    forgetful = AppendReply(Term(1), False, Index(0), Term(0), Index(2), Index(1), held._round, 0, True)
    cluster.receive("n1", "n2", forgetful)
    assert held.progress[voter("n2")].regressed
    with pytest.raises(ConfigRefused, match="not up to date"):
        cluster.step("n1", Reconfigure(members("n1 n2")))


def test_reads_that_wait_for_a_voter_that_is_removed_are_answered() -> None:
    cluster = Cluster(2)
    cluster.elect("n2")
    cluster.crash("n1")
    assert cluster.step("n2", Read(7)) != []
    cluster.step("n2", Reconfigure(members("n2")))
    cluster.stabilize()
    cluster.now += 0.1
    answers = [effect for effect in cluster.step("n2", Tick()) if isinstance(effect, ReadReady)]
    assert [answer.context for answer in answers] == [7]


def test_a_first_round_of_catching_up_is_not_over_before_anything_was_held() -> None:
    """Ongaro §4.2.1: a round is over when all that the log held at its beginning is held."""
    cluster = Cluster(1, strangers=1)
    cluster.elect("n1")
    cluster.step("n1", Propose((b"x",) * 1000))
    cluster.stabilize()
    cluster.nodes["n2"].disk_hangs = True
    cluster.step("n1", Reconfigure(members("n1", "n2")))
    cluster.run_to(cluster.now + 0.1)
    cluster.sync("n2", 1)  # the term; the entries are still on their way to the disk
    cluster.run_to(cluster.now + 0.3)
    learner = cluster.nodes["n1"].replica.progress[voter("n2")]
    assert (learner.match, learner.round_seconds) == (0, float("inf"))
    cluster.nodes["n2"].disk_hangs = False
    cluster.run_to(cluster.now + 0.3)
    assert learner.match == 1002
    assert learner.round_seconds < 1


def test_a_configuration_that_is_none_is_dropped_before_anything_changes() -> None:
    """A peer's nonsense is not our crash."""
    cluster = Cluster(3)
    cluster.preset("n1", [1, 1])
    replica = cluster.nodes["n1"].replica
    nonsense = Append(Term(2), Index(1), Term(1), ((2, 1, b"\xff no configuration"),), Index(0), 1, ())
    cluster.receive("n1", "n3", nonsense)
    cluster.stabilize()
    assert [e.term for e in cluster.log("n1")] == [1, 1]
    assert replica.dropped == 1


def test_a_removal_that_is_not_committed_yet_removes_no_leader() -> None:
    """What lies before it in the log may be committed earlier."""
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.3)
    cluster.step("n3", Propose((b"x",)))
    cluster.step("n3", Reconfigure(members("n1 n2")))
    for name in ("n1", "n2"):
        cluster.deliver("n3", name, 1)
        cluster.sync(name)
        cluster.deliver(name, "n3")
    leader = cluster.nodes["n3"].replica
    assert (leader.journal.commit_index, leader.journal.log.config_index) == (2, 3)
    assert leader.role == LEADER
    cluster.stabilize()
    assert leader.role == FOLLOWER


def test_a_voter_removed_while_it_was_down_is_told_when_it_is_heard_of() -> None:
    """Nobody who follows the new configuration speaks to it by itself, and its questions are refused for a lease."""
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.3)
    cluster.crash("n1")
    cluster.step("n3", Reconfigure(members("n2 n3")))
    cluster.run_to(cluster.now + FAREWELL_SECONDS + 1)
    cluster.restart("n1")
    cluster.run_to(cluster.now + 3)
    leader = cluster.nodes["n3"].replica
    assert (leader.role, leader.term) == (LEADER, 1)
    assert cluster.nodes["n1"].replica.config == members("n1 n2 n3")
    for wrong in ("n2", "n3"):  # they belong
        before = dict(leader.progress)
        cluster.step("n3", Farewell(voter(wrong)))
        assert leader.progress == before
    cluster.step("n2", Farewell(voter("n1")))  # does not lead
    cluster.step("n3", Farewell(voter("n3")))
    assert voter("n3") not in leader.progress
    cluster.step("n3", Farewell(voter("n1")))
    told = leader.progress[voter("n1")]
    cluster.step("n3", Farewell(voter("n1")))
    assert leader.progress[voter("n1")] is told
    cluster.run_to(cluster.now + 0.3)
    assert cluster.nodes["n1"].replica.config == members("n2 n3")
    cluster.run_to(cluster.now + FAREWELL_SECONDS + 0.5)
    assert voter("n1") not in leader.progress
    assert (leader.role, leader.term) == (LEADER, 1)


def test_a_voter_that_was_just_removed_is_a_learner_before_it_votes_again() -> None:
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.3)
    cluster.step("n3", Reconfigure(members("n2 n3")))
    cluster.stabilize()
    assert voter("n1") in cluster.nodes["n3"].replica.progress
    with pytest.raises(ConfigRefused, match="must be a learner first"):
        cluster.step("n3", Reconfigure(members("n1 n2 n3")))
    cluster.step("n3", Reconfigure(members("n2 n3", "n1")))
    cluster.run_to(cluster.now + FAREWELL_SECONDS + 1)
    assert voter("n1") in cluster.nodes["n3"].replica.progress
    cluster.step("n3", Reconfigure(members("n1 n2 n3")))
    cluster.run_to(cluster.now + 0.3)
    assert cluster.nodes["n1"].replica.config == members("n1 n2 n3")


def test_a_learner_that_is_far_behind_is_not_made_a_voter() -> None:
    cluster = with_learner()
    cluster.nodes["n2"].disk_hangs = True
    cluster.step("n1", Propose((b"x",) * (CLOSE_ENTRIES + 1)))
    cluster.stabilize()
    with pytest.raises(ConfigRefused, match="not up to date"):
        cluster.step("n1", Reconfigure(members("n1 n2")))
    cluster.nodes["n2"].disk_hangs = False
    cluster.stabilize()
    assert cluster.step("n1", Reconfigure(members("n1 n2")))


def test_who_has_no_vote_does_not_stand_though_its_leader_says_so() -> None:
    cluster = with_learner()
    cluster.receive("n2", "n1", TimeoutNow(Term(1), Index(2)))
    assert cluster.nodes["n2"].replica.role == FOLLOWER
    assert cluster.nodes["n2"].replica.term == 1


# -- the body of a configuration entry ---------------------------------------------------------------------------------

names = st.text("abcxyz0189-", min_size=1, max_size=4).map(lambda name: VoterId(f"{name}@{name}"))


@given(st.lists(names, unique=True, max_size=6), st.integers(0, 6))
def test_a_configuration_is_read_as_it_was_written(voters: list[VoterId], split: int) -> None:
    config = Config(tuple(sorted(voters[:split])), tuple(sorted(voters[split:])))
    assert Config.decode(config.encode()) == config


@pytest.mark.parametrize(
    "body",
    [b"", b"a@1", b"a@1,;", b",a@1;", b"a@1,,b@1;", b"a@1,a@1;", b"a@1;a@1", b";a@1,a@1", b"\xff;", b"a@1;b@1;c@1,"],
)
def test_what_is_no_configuration_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):
        Config.decode(body)


def test_other_voters_are_another_majority_at_once() -> None:
    """Who was answered by a majority of three a moment ago was not answered by three of four."""
    cluster = Cluster(3, learners=1)
    cluster.elect("n3")
    cluster.run_to(cluster.now + 1)
    leader = cluster.nodes["n3"].replica
    cluster.crash("n1")
    cluster.crash("n4")
    silent_since = leader.progress[voter("n1")].contact
    cluster.run_to(silent_since + leader.election.timeout - 0.05)
    assert leader.role == LEADER
    everybody = tuple(voter(f"n{n}") for n in range(1, 5))
    cluster.step("n3", Reconfigure(Config(everybody, ())))
    cluster.run_to(silent_since + leader.election.timeout + 0.01)
    assert leader.role == FOLLOWER
    assert leader.why == "a majority does not answer"
