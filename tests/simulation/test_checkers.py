"""The checkers against hand-made histories: each bad one must be flagged by its checker, each good one by none."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from p2p.effects import COMMAND, Config, Entry, HardState
from p2p.ids import Index, Term, VoterId
from tests.simulation import checkers as c
from tests.simulation import model
from tests.simulation.world import Violation


def entry(index: int, term: int, body: bytes = b"x", kind: int = COMMAND) -> Entry:
    return Entry(Index(index), Term(term), body, kind)


def state(term: int, vote: str | None = None) -> HardState:
    return HardState(Term(term), VoterId(vote) if vote else None)


def config(voters: str, learners: str = "") -> Config:
    return Config(tuple(map(VoterId, voters)), tuple(map(VoterId, learners)))


def commits(*terms: int, in_term: int) -> c.Commits:
    """A leader of `in_term` has committed entries 1.. of these terms."""
    made = c.Commits()
    made.committed("a", True, in_term, 0, len(terms), lambda index: terms[index - 1])
    return made


def attempts() -> c.Attempts:
    """Job 7: attempt 1 of worker 1 expired, attempt 2 of worker 2 runs; job 8 is done."""
    books = c.Attempts()
    books.applied(5, model.Claim(0, 7, 1), (7, 1, 5))
    books.applied(6, model.Expire(0, 7, 1), (1,))
    books.applied(7, model.Claim(0, 7, 2), (7, 2, 7))
    books.applied(8, model.Claim(0, 8, 1), (8, 1, 8))
    books.applied(9, model.Finish(0, 8, 1, 1), (1,))
    return books


def two_leaders() -> None:
    checker = c.ElectionSafety()
    checker.elected("a", 3, 2, 3)
    checker.elected("b", 3, 2, 3)


def leader_by_a_minority() -> None:
    c.ElectionSafety().elected("a", 3, 2, 4)


def two_votes() -> None:
    checker = c.OneVote()
    checker.granted("a", 3, "b", state(3, "b"))
    checker.granted("a", 3, "c", state(3, "c"))


def vote_not_on_disk() -> None:
    c.OneVote().granted("a", 3, "b", state(2))


def vote_without_its_name_on_disk() -> None:
    c.OneVote().granted("a", 3, "b", state(3))


def vote_for_a_shorter_log() -> None:
    c.OneVote.judged("a", "b", (2, 4), (2, 5), True, True)


def vote_for_a_longer_log_of_an_earlier_term() -> None:
    c.OneVote.judged("a", "b", (1, 9), (2, 5), True, True)


def vote_refused_without_a_reason() -> None:
    c.OneVote.judged("a", "b", (2, 5), (2, 5), False, True)


def leader_cuts_its_log() -> None:
    c.LogMatching().wrote("a", True, 4, [entry(4, 2)], 1)


def other_body_of_the_same_term() -> None:
    checker = c.LogMatching()
    checker.wrote("a", True, None, [entry(4, 2, b"x")], 1)
    checker.wrote("b", False, None, [entry(4, 2, b"y")], 1)


def other_past_of_the_same_entry() -> None:
    checker = c.LogMatching()
    checker.wrote("a", True, None, [entry(4, 2)], 1)
    checker.wrote("b", False, None, [entry(4, 2)], 2)


def other_entry_committed() -> None:
    commits(1, 1, 2, in_term=2).committed("b", False, 3, 1, 3, lambda index: (1, 1, 1)[index - 1])


def committed_by_a_follower_first() -> None:
    commits(1, in_term=1).committed("b", False, 1, 1, 2, lambda index: 1)


def commit_goes_back() -> None:
    commits(1, 1, in_term=1).committed("a", True, 1, 2, 1, lambda index: 1)


def committed_on_a_minority() -> None:
    commits(1, in_term=1).holders(1, 1, 2, 5)


def old_term_by_count() -> None:
    commits(1, in_term=2).own_term(1, 1, 2)


def leader_without_a_committed_entry() -> None:
    commits(1, 1, 2, in_term=2).elected("b", 3, 0, lambda index: 1 if index <= 2 else None)


def leader_with_another_committed_entry() -> None:
    commits(1, 1, 2, in_term=2).elected("b", 3, 0, lambda index: 1)


def applied_another_command() -> None:
    checker = c.StateMachineSafety()
    checker.applied("a", entry(1, 1, b"x"), 11)
    checker.applied("b", entry(1, 1, b"y"), 11)


def applied_to_another_state() -> None:
    checker = c.StateMachineSafety()
    checker.applied("a", entry(1, 1), 11)
    checker.applied("b", entry(1, 1), 12)


def snapshot_of_another_history() -> None:
    checker = c.StateMachineSafety()
    checker.applied("a", entry(1, 1), 11)
    checker.adopted("b", 1, 12, 0)


def snapshot_that_lacks_something() -> None:
    checker = c.StateMachineSafety()
    checker.adopted("a", 1, 11, 100)
    checker.adopted("b", 1, 11, 101)


def acknowledged_what_is_not_on_disk() -> None:
    c.Acknowledgements.told("a", 5, 4)


def term_goes_back() -> None:
    checker = c.Monotonic()
    checker.saw("a", state(3))
    checker.saw("a", state(2))


def vote_changes() -> None:
    checker = c.Monotonic()
    checker.saw("a", state(3, "b"))
    checker.saw("a", state(3, "c"))


def starts_in_an_earlier_term_than_it_spoke_in() -> None:
    c.Monotonic.started("a", 2, 3, 2)


def starts_in_an_earlier_term_than_its_log() -> None:
    c.Monotonic.started("a", 2, 0, 3)


def key_answered_with_two_jobs() -> None:
    checker = c.Keys()
    checker.told(1, 10)
    checker.told(1, 11)


def acknowledged_job_lost() -> None:
    checker = c.Keys()
    checker.told(1, 10)
    checker.state("a", {})


def key_done_twice() -> None:
    checker = c.Keys()
    checker.told(1, 10)
    checker.state("a", {1: [10, 11]})


def claimed_while_held() -> None:
    attempts().applied(10, model.Claim(0, 7, 3), (7, 3, 10))


def claimed_when_finished() -> None:
    attempts().applied(10, model.Claim(0, 8, 3), (8, 2, 10))


def token_goes_back() -> None:
    books = attempts()
    books.applied(10, model.Expire(0, 7, 2), (1,))
    books.applied(11, model.Claim(0, 7, 3), (7, 3, 4))


def attempt_number_twice() -> None:
    books = attempts()
    books.applied(10, model.Expire(0, 7, 2), (1,))
    books.applied(11, model.Claim(0, 7, 3), (7, 2, 11))


def stale_attempt_finishes() -> None:
    attempts().applied(10, model.Finish(0, 7, 1, 1), (1,))


def finished_by_two() -> None:
    books = attempts()
    books.applied(10, model.Finish(0, 7, 2, 2), (1,))
    books.applied(11, model.Finish(0, 7, 1, 1), (1,))


def stale_attempt_expires() -> None:
    attempts().applied(10, model.Expire(0, 7, 1), (1,))


def attempt_that_nobody_logged() -> None:
    attempts().began(7, 3, 1)


def grace_cut_short() -> None:
    c.Grace.gave_up("a", 7, 1.0, 2.0)


def read_of_the_past() -> None:
    c.Reads.ready("a", 4, 5)


def two_voters_at_once() -> None:
    c.Configurations.appended("a", config("abc"), config("abcde"), 1, 2, True)


def change_upon_change() -> None:
    c.Configurations.appended("a", config("abc"), config("abcd"), 3, 2, True)


def change_before_the_term_has_committed() -> None:
    c.Configurations.appended("a", config("abc"), config("abcd"), 1, 2, False)


def voter_that_holds_nothing() -> None:
    c.Configurations.promoted("a", "d", 0, 100, 64)


def counts_by_other_voters_than_its_log() -> None:
    c.Configurations.active("a", config("abc"), config("abd"))


def compacted_too_far() -> None:
    c.Compaction.compacted("a", 10, 9)


def frozen_leader_commits() -> None:
    checker = c.Frozen()
    checker.thawed("a", 3)
    checker.acted("a", 3, "commits 7")


def leader_changes_in_the_calm() -> None:
    checker = c.Changes()
    checker.elected(4.0, "a", 3)
    checker.calm(3.0, 5.0)


def term_rises_in_the_calm() -> None:
    c.Changes().terms_still(3, 4)


def nobody_leads() -> None:
    c.Deadlines.within("a leader", None, 1.5)


def leads_too_late() -> None:
    c.Deadlines.within("a leader", 1.6, 1.5)


BAD: dict[Callable[[], None], str] = {
    two_leaders: "election safety",
    leader_by_a_minority: "votes",
    two_votes: "one vote",
    vote_not_on_disk: "durable vote",
    vote_without_its_name_on_disk: "durable vote",
    vote_for_a_shorter_log: "up to date",
    vote_for_a_longer_log_of_an_earlier_term: "up to date",
    vote_refused_without_a_reason: "priority",
    leader_cuts_its_log: "leader append-only",
    other_body_of_the_same_term: "log matching",
    other_past_of_the_same_entry: "log matching",
    other_entry_committed: "commit",
    committed_by_a_follower_first: "commit",
    commit_goes_back: "monotonic",
    committed_on_a_minority: "durability",
    old_term_by_count: "own term",
    leader_without_a_committed_entry: "leader completeness",
    leader_with_another_committed_entry: "leader completeness",
    applied_another_command: "state machine safety",
    applied_to_another_state: "state machine safety",
    snapshot_of_another_history: "state machine safety",
    snapshot_that_lacks_something: "state machine safety",
    acknowledged_what_is_not_on_disk: "durability",
    term_goes_back: "monotonic",
    vote_changes: "monotonic",
    starts_in_an_earlier_term_than_it_spoke_in: "monotonic",
    starts_in_an_earlier_term_than_its_log: "monotonic",
    key_answered_with_two_jobs: "exactly once",
    acknowledged_job_lost: "acknowledged",
    key_done_twice: "exactly once",
    claimed_while_held: "one claim",
    claimed_when_finished: "one claim",
    token_goes_back: "token",
    attempt_number_twice: "token",
    stale_attempt_finishes: "stale attempt",
    finished_by_two: "stale attempt",
    stale_attempt_expires: "stale attempt",
    attempt_that_nobody_logged: "one claim",
    grace_cut_short: "grace",
    read_of_the_past: "read index",
    two_voters_at_once: "configuration",
    change_upon_change: "configuration",
    change_before_the_term_has_committed: "configuration",
    voter_that_holds_nothing: "catching up",
    counts_by_other_voters_than_its_log: "configuration",
    compacted_too_far: "compaction",
    frozen_leader_commits: "frozen leader",
    leader_changes_in_the_calm: "calm",
    term_rises_in_the_calm: "calm",
    nobody_leads: "liveness",
    leads_too_late: "liveness",
}


@pytest.mark.parametrize("history", BAD, ids=lambda history: history.__name__)
def test_bad_history_is_flagged(history: Callable[[], None]) -> None:
    with pytest.raises(Violation) as found:
        history()
    assert found.value.kind == BAD[history]


def test_a_good_election_is_not_flagged() -> None:
    elections, votes = c.ElectionSafety(), c.OneVote()
    votes.judged("b", "a", (2, 5), (2, 5), True, True)
    votes.judged("c", "a", (2, 5), (2, 6), False, True)  # its log is longer
    votes.judged("d", "a", (2, 5), (2, 5), False, False)  # it has voted
    votes.granted("b", 3, "a", state(3, "a"))
    votes.granted("b", 3, "a", state(4))  # the answer is late, and it has moved on
    elections.elected("a", 3, 2, 3)
    elections.elected("a", 3, 2, 3)
    elections.elected("b", 4, 3, 5)


def test_a_good_log_is_not_flagged() -> None:
    logs = c.LogMatching()
    logs.wrote("a", True, None, [entry(1, 1), entry(2, 1)], 0)
    logs.wrote("b", False, None, [entry(1, 1), entry(2, 1)], 0)
    logs.wrote("c", True, None, [entry(2, 2, b"y")], 1)
    logs.wrote("b", False, 2, [entry(2, 2, b"y")], 1)
    logs.wrote("d", False, None, [entry(2, 2, b"y")], None)  # behind a snapshot


def test_a_late_leader_of_an_earlier_term_may_lack_what_a_later_one_committed() -> None:
    """It was elected by a majority of the old voters before; it will never commit anything."""
    commits(1, 1, 2, in_term=4).elected("b", 3, 0, lambda index: 1 if index <= 2 else None)


def test_good_books_are_not_flagged() -> None:
    books = attempts()
    books.began(7, 2, 2)
    books.applied(10, model.Finish(0, 7, 1, 1), model.REFUSED)
    books.applied(11, model.Finish(0, 7, 2, 2), (1,))
    books.applied(12, model.Finish(0, 7, 2, 2), (1,))  # told again
    books.applied(13, model.Release(0, 8, 99), model.REFUSED)
    keys = c.Keys()
    keys.told(1, 10)
    keys.told(1, 10)
    keys.state("a", {1: [10], 2: [11]})
