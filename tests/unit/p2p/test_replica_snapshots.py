"""Offering and installing snapshots (Raft §7): what is here and acknowledged is never thrown away."""

from __future__ import annotations

import pytest

from p2p.effects import Config, Effect, HardState, Install, OfferSnapshot, RoleChanged, SnapshotMeta
from p2p.ids import Index, Term, VoterId
from p2p.journal.log import LogStart
from p2p.journal.progress import REPLICATE, SNAPSHOT
from p2p.messages import Append, AppendReply, PreVote, PreVoteReply, SnapshotOffer, TimeoutNow, Vote, VoteReply
from p2p.replica import (
    Compacted,
    Installed,
    InstallFailed,
    Persisted,
    Propose,
    Received,
    Replica,
    SnapshotOffered,
    Tick,
    Unreachable,
)
from tests.unit.p2p.interaction import Cluster, voter

CONFIG = Config((voter("n1"), voter("n2"), voter("n3")))


def offer(index: int, last_term: int, *, term: int = 2, config: Config = CONFIG) -> SnapshotOffer:
    return SnapshotOffer(
        Term(term), Index(index), Term(last_term), config.encode(), bytes(16), f"state-{index}", 1, "0" * 64, 7
    )


def meta(index: int, term: int) -> SnapshotMeta:
    return SnapshotMeta(Index(index), Term(term), CONFIG, bytes(16), f"state-{index}", 1, "0" * 64)


def follower(*terms: int) -> Cluster:
    """n1 with this log and nothing known to be committed."""
    cluster = Cluster(3)
    cluster.preset("n1", list(terms), term=2)
    return cluster


def installs(effects: list[Effect]) -> list[Install]:
    return [effect for effect in effects if isinstance(effect, Install)]


def last_answer(cluster: Cluster) -> AppendReply:
    cluster.stabilize("n1")
    answer = cluster.wire["n1", "n3"][-1]
    assert isinstance(answer, AppendReply)
    return answer


# -- whether to install ------------------------------------------------------------------------------------------------


def test_a_snapshot_of_what_is_here_is_not_installed_and_what_follows_stays() -> None:
    """n1 has acknowledged entries 4 and 5 to this leader: an install of the snapshot at 3 would take them back."""
    cluster = follower(1, 1, 2, 2, 2)
    effects = cluster.step("n1", Received(voter("n3"), offer(3, 2)))
    journal = cluster.nodes["n1"].replica.journal
    assert not installs(effects)
    assert (journal.last_index, journal.commit_index) == (5, 3)
    assert last_answer(cluster).match == 3


def test_a_snapshot_of_what_is_committed_here_is_not_installed() -> None:
    cluster = follower(1, 1, 2)
    cluster.receive("n1", "n3", Append(Term(2), Index(3), Term(2), (), Index(3), 1, ()))
    assert not installs(cluster.step("n1", Received(voter("n3"), offer(2, 1))))
    assert last_answer(cluster).match == 3


@pytest.mark.parametrize(
    ("log", "index", "last_term"),
    [((1, 1), 5, 2), ((), 5, 2), ((1, 1, 1, 1, 1, 1), 5, 2)],
    ids=["the log is shorter", "the log is blank", "another entry is there"],
)
def test_a_snapshot_of_what_is_not_here_is_installed(log: tuple[int, ...], index: int, last_term: int) -> None:
    cluster = follower(*log)
    (install,) = installs(cluster.step("n1", Received(voter("n3"), offer(index, last_term))))
    assert (install.source, install.snapshot.index, install.snapshot.config) == (voter("n3"), index, CONFIG)
    replica = cluster.nodes["n1"].replica
    replica.step(Installed(voter("n3"), install.snapshot), cluster.now)
    journal = replica.journal
    assert (journal.log.base, journal.last_index, journal.last) == (5, 5, (2, 5))
    assert (journal.commit_index, journal.applied_index, journal.stable_index) == (5, 5, 5)
    assert replica.config == CONFIG
    replica.check_invariants()


def test_one_install_at_a_time() -> None:
    cluster = follower(1)
    assert installs(cluster.step("n1", Received(voter("n3"), offer(5, 2))))
    assert not installs(cluster.step("n1", Received(voter("n3"), offer(9, 2))))
    cluster.step("n1", InstallFailed())
    assert installs(cluster.step("n1", Received(voter("n3"), offer(9, 2))))


def test_an_offer_with_a_configuration_that_is_none_is_dropped_and_counted() -> None:
    cluster = follower(1)
    nonsense = offer(5, 2)._replace(config=b"nonsense")
    assert not installs(cluster.step("n1", Received(voter("n3"), nonsense)))
    assert cluster.nodes["n1"].replica.dropped == 1
    assert cluster.nodes["n1"].replica.installing is None


def test_an_offer_of_an_earlier_term_is_refused() -> None:
    cluster = follower(1)
    assert not installs(cluster.step("n1", Received(voter("n3"), offer(5, 1, term=1))))
    answer = cluster.wire["n1", "n3"][-1]
    assert isinstance(answer, AppendReply)
    assert (answer.ok, answer.term) == (False, 2)


# -- while it is being installed ---------------------------------------------------------------------------------------


def installing() -> Cluster:
    cluster = follower(1)
    cluster.nodes["n1"].chores_wait = True
    cluster.receive("n1", "n3", offer(5, 2))
    cluster.stabilize("n1")
    assert cluster.nodes["n1"].replica.installing is not None
    return cluster


def test_nothing_is_appended_or_applied_meanwhile_but_the_leader_is_answered() -> None:
    cluster = installing()
    replica = cluster.nodes["n1"].replica
    cluster.receive("n1", "n3", Append(Term(2), Index(1), Term(1), ((2, 0, b"x"),), Index(2), 9, ()))
    assert (replica.journal.last_index, replica.journal.commit_index) == (1, 0)
    answer = last_answer(cluster)
    assert (answer.ok, answer.match, answer.round, answer.ready) == (True, 0, 9, False)


def test_what_was_committed_before_is_not_applied_meanwhile() -> None:
    """The state is about to be replaced: whatever is applied to the old one could be applied to the new one again."""
    cluster = follower(1)
    cluster.nodes["n1"].disk_hangs = True
    cluster.receive("n1", "n3", Append(Term(2), Index(1), Term(1), ((2, 0, b"x"),), Index(2), 1, ()))
    cluster.receive("n1", "n3", offer(5, 2))
    replica = cluster.nodes["n1"].replica
    assert (replica.journal.commit_index, replica.installing is not None) == (2, True)
    cluster.sync("n1")
    assert cluster.nodes["n1"].applied == 1
    cluster.step("n1", InstallFailed())
    assert cluster.nodes["n1"].applied == 2


def test_who_installs_does_not_stand_but_votes() -> None:
    cluster = installing()
    replica = cluster.nodes["n1"].replica
    cluster.receive("n1", "n3", TimeoutNow(Term(2), Index(1)))
    assert replica.role == "follower"
    cluster.now = replica.election.deadline
    cluster.tick("n1")
    assert (replica.role, replica.term, replica.election.ballot) == ("follower", 2, None)
    cluster.receive("n1", "n2", Vote(Term(3), Index(9), Term(2), False))
    cluster.stabilize("n1")
    assert cluster.wire["n1", "n2"][-1] == VoteReply(Term(3), True, "")


def test_who_installs_is_not_higher() -> None:
    cluster = installing()
    cluster.nodes["n1"].replica.election.priority = 9
    cluster.now = 5.0
    cluster.receive("n1", "n2", PreVote(Term(2), Term(3), Index(1), Term(1), 0))
    reply = cluster.wire["n1", "n2"][-1]
    assert isinstance(reply, PreVoteReply)
    assert reply.granted


def test_a_write_of_the_old_log_says_nothing_about_the_new_one() -> None:
    """It was under way when the snapshot took the log's place."""
    cluster = follower(1)
    cluster.nodes["n1"].disk_hangs = True
    entries = tuple((2, 0, b"x") for _ in range(9))
    cluster.receive("n1", "n3", Append(Term(2), Index(1), Term(1), entries, Index(0), 1, ()))
    replica = cluster.nodes["n1"].replica
    seq = cluster.nodes["n1"].writes[-1].seq
    replica.step(Received(voter("n2"), offer(5, 3, term=3)), cluster.now)
    replica.step(Installed(voter("n2"), meta(5, 3)), cluster.now)
    replica.step(Persisted(seq + 1), cluster.now)
    assert (replica.journal.stable_index, replica.journal.last_index) == (5, 5)
    replica.check_invariants()


def test_an_install_for_an_earlier_leader_is_not_acknowledged_to_the_new_one() -> None:
    """It hears by itself where the log ends; the answer's round would be another leader's."""
    cluster = installing()
    replica = cluster.nodes["n1"].replica
    cluster.receive("n1", "n2", Append(Term(3), Index(0), Term(0), (), Index(0), 1, ()))
    cluster.stabilize("n1")
    before = len(cluster.wire["n1", "n2"])
    replica.step(Installed(voter("n3"), meta(5, 2)), cluster.now)
    assert len(cluster.wire["n1", "n2"]) == before
    assert replica.leader == voter("n2")


# -- offering ----------------------------------------------------------------------------------------------------------


def behind() -> Cluster:
    """n3 leads and has compacted what n1 lacks."""
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.2)
    cluster.crash("n1")
    cluster.step("n3", Propose((b"x",) * 5))
    cluster.run_to(cluster.now + 0.2)
    cluster.compact("n3", 6)
    cluster.nodes["n3"].chores_wait = True
    cluster.restart("n1")
    return cluster


def offers(cluster: Cluster) -> int:
    return sum(isinstance(chore, OfferSnapshot) for chore in cluster.nodes["n3"].chores)


def test_an_offer_is_made_once_in_a_while() -> None:
    cluster = behind()
    cluster.run_to(cluster.now + 1.5)
    assert offers(cluster) == 1
    cluster.run_to(cluster.now + 2.5)
    assert offers(cluster) == 2


def test_a_broken_connection_does_not_stop_an_install() -> None:
    cluster = behind()
    cluster.run_to(cluster.now + 1)
    progress = cluster.nodes["n3"].replica.progress[voter("n1")]
    cluster.step("n3", Unreachable(voter("n1")))
    assert progress.state == SNAPSHOT


def test_what_was_read_for_somebody_who_needs_a_snapshot_by_now_is_not_sent() -> None:
    cluster = behind()
    cluster.nodes["n3"].chores_wait = False
    cluster.run_to(cluster.now + 1)
    progress = cluster.nodes["n3"].replica.progress[voter("n1")]
    assert progress.state == REPLICATE
    assert cluster.log("n1") == cluster.log("n3")
    # That it is installed is told unasked: no measure of how fast the follower answers.
    assert max(progress.answers) < 0.1


def test_compaction_of_what_a_fetch_was_asked_for_ends_in_a_snapshot() -> None:
    """Entries are asked of the disk; before they come, the log is compacted behind them."""
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.2)
    cluster.step("n3", Propose((b"x",) * 5))
    cluster.run_to(cluster.now + 0.2)
    cluster.crash("n1")
    cluster.step("n3", Propose((b"y",) * 5))
    cluster.run_to(cluster.now + 0.2)
    cluster.crash("n3")
    cluster.restart("n3")
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.7)
    node = cluster.nodes["n3"]
    node.chores_wait = True
    cluster.restart("n1")
    cluster.run_to(cluster.now + 0.7)
    progress = node.replica.progress[voter("n1")]
    assert progress.fetching
    node.store.compact(Index(12))
    cluster.take_snapshot("n3")
    cluster.step("n3", Compacted(Index(12)))
    node.chores_wait = False
    cluster.run_to(cluster.now + 1)
    assert progress.state == REPLICATE
    assert cluster.nodes["n1"].state == node.state


def test_a_role_is_told_once() -> None:
    """Whatever is repeated on the wire, the driver hears of changes only."""
    cluster = follower(1)
    beat = Append(Term(2), Index(0), Term(0), (), Index(0), 1, ())
    first = cluster.step("n1", Received(voter("n3"), beat))
    again = cluster.step("n1", Received(voter("n3"), beat))
    assert [isinstance(e, RoleChanged) for e in first].count(True) == 1
    assert not any(isinstance(e, RoleChanged) for e in again)
    assert not any(isinstance(e, RoleChanged) for e in cluster.step("n1", Tick()))


def test_a_voter_named_by_an_installed_configuration_stands_when_its_time_comes() -> None:
    cluster = Cluster(1, strangers=1)
    replica = cluster.nodes["n2"].replica
    config = Config((voter("n1"), VoterId("n2@d")))
    cluster.receive("n2", "n1", offer(5, 1, term=1, config=config))
    replica.step(Installed(voter("n1"), meta(5, 1)._replace(config=config)), cluster.now)
    deadline = replica.next_deadline()
    assert deadline is not None
    assert deadline > cluster.now
    replica.step(Tick(), deadline)
    assert replica.election.ballot is not None


def test_a_term_that_only_the_installed_log_tells_of_is_taken_over_at_a_start() -> None:
    """The power failed after the log was put in place and before the later term was written. In that term this voter
    has not voted: its vote would have been on disk first."""
    start = LogStart(base=Index(5), base_term=Term(7), base_config=CONFIG, last=Index(5))
    replica = Replica(voter("n1"), HardState(Term(4), voter("n2")), start, applied=Index(5), now=0.0, draw=lambda: 0.0)
    assert (replica.term, replica.voted_for) == (7, None)
    replica.step(Received(voter("n3"), Vote(Term(7), Index(5), Term(7), False)), 0.0)
    assert replica.voted_for == voter("n3")


def test_a_term_later_than_the_log_is_kept_with_its_vote() -> None:
    start = LogStart(base=Index(5), base_term=Term(4), base_config=CONFIG, last=Index(5))
    replica = Replica(voter("n1"), HardState(Term(4), voter("n2")), start, applied=Index(5), now=0.0, draw=lambda: 0.0)
    assert (replica.term, replica.voted_for) == (4, voter("n2"))


def test_a_snapshot_that_nobody_needs_any_more_is_not_offered() -> None:
    """It was made for a follower that has caught up, or has gone, meanwhile."""
    cluster = Cluster(3)
    cluster.elect("n3")
    for name in ("n1", "n9"):
        assert cluster.step("n3", SnapshotOffered(voter(name), meta(1, 1))) == []
    assert cluster.step("n2", SnapshotOffered(voter("n1"), meta(1, 1))) == []
