"""When to stand, whom to grant, how often the leader changed: one voter's view."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.election.core import CHANGES_SECONDS, MOST_ROUNDS, REMEMBERED_CHANGES, ElectionCore
from p2p.election.rank import Timers
from p2p.ids import Index, Term, VoterId
from p2p.messages import PreVote

A, B, C = (VoterId(name) for name in ("a@1", "b@1", "c@1"))
VOTERS = (A, B, C)
T = Timers()
E = T.election


def core(me: VoterId = B, *, draw: float = 0.0, now: float = 0.0) -> ElectionCore:
    return ElectionCore(me, T, lambda: draw, now)


def ask(*, next_term: int = 5, last: tuple[int, int] = (3, 10), priority: int = 0) -> PreVote:
    """`last` is the asker's (last term, last index)."""
    return PreVote(Term(next_term - 1), Term(next_term), Index(last[1]), Term(last[0]), priority)


def judged(voter: ElectionCore, message: PreVote, asker: VoterId = A, *, now: float = 10.0, fit: bool = True) -> str:
    return voter.judge(asker, message, term=Term(4), last=(Term(3), Index(10)), now=now, fit=fit)


# -- when to stand -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("me", "turn"), [(C, 0), (B, 1), (A, 2)])
def test_a_voter_waits_for_the_lease_the_guard_and_its_turn(me: VoterId, turn: int) -> None:
    voter = core(me)
    voter.rest(7.0, VOTERS)
    assert voter.deadline == pytest.approx(7.0 + E + T.guard + turn * T.rank_delay)


def test_jitter_is_less_than_a_rank() -> None:
    first, second = core(C, draw=0.999), core(B, draw=0.0)
    first.rest(0.0, VOTERS)
    second.rest(0.0, VOTERS)
    assert 0.63 < first.deadline < second.deadline


def test_nobody_stands_while_another_lease_may_run() -> None:
    """The guard: what a voter heard last, others may have heard a moment later."""
    voter = core(C)
    voter.heard(3.0, (), VOTERS)
    assert not voter.in_lease(voter.deadline)
    assert voter.deadline - E >= 3.0 + T.guard


def test_a_leader_that_is_heard_ends_the_ballot_and_names_the_heirs() -> None:
    voter = core(A)
    voter.stand(Term(1), VOTERS, 0.0, real=False)
    voter.heard(1.0, (A, C), VOTERS)
    assert voter.ballot is None
    assert voter.deadline == pytest.approx(1.0 + E + T.guard)
    assert voter.in_lease(1.0 + E - 0.001)
    assert not voter.in_lease(1.0 + E)


def test_a_voter_that_has_just_started_may_have_heard_a_leader() -> None:
    assert core(now=5.0).in_lease(5.5)


@pytest.mark.parametrize(
    ("asked", "gets"),
    [(0.0, E), (0.2, E), (2.0, 2.0), (99.0, T.longest_election)],
    ids=["none", "less", "more", "most"],
)
def test_a_leader_may_ask_for_a_longer_timeout_within_bounds(asked: float, gets: float) -> None:
    """PROTOCOL §1: adaptive, only upwards. The lease, the deadline and the excuse follow it."""
    voter = core(C)
    voter.heard(10.0, (), VOTERS, asked)
    assert voter.timeout == gets
    assert voter.deadline == pytest.approx(10.0 + gets + T.guard)
    assert voter.in_lease(10.0 + gets - 0.001)
    assert not voter.in_lease(10.0 + gets + 0.001)
    assert voter.excuse(voter.deadline + 30)
    assert voter.deadline == pytest.approx(10.0 + gets + T.guard + 30 + gets)


def test_where_answers_are_slow_a_round_takes_longer_too() -> None:
    voter = core(C, draw=1.0)
    voter.set_timeout(2.0)
    voter.stand(Term(1), VOTERS, 0.0, real=False)
    assert voter.deadline == 1.0


# -- excuses (PROTOCOL §2.15) ------------------------------------------------------------------------------------------


def test_a_timer_that_is_late_by_a_little_is_believed() -> None:
    voter = core()
    voter.deadline = 10.0
    assert not voter.excuse(10.0 + T.excuse - 0.001)


@pytest.mark.parametrize(("late", "pushed"), [(0.06, 0.06), (0.3, 0.3), (30.0, E)])
def test_a_timer_that_is_late_is_pushed_back_by_as_much_and_no_more_than_e(late: float, pushed: float) -> None:
    voter = core()
    voter.deadline = 10.0
    assert voter.excuse(10.0 + late)
    assert voter.deadline == pytest.approx(10.0 + late + pushed)


def test_one_excuse_in_an_election_timeout() -> None:
    voter = core()
    voter.deadline = 10.0
    assert voter.excuse(10.2)
    assert not voter.excuse(10.2 + E - 0.001)
    assert voter.excuse(10.2 + E + 0.001)


# -- rounds ------------------------------------------------------------------------------------------------------------


def test_the_first_round_is_short_and_later_ones_grow() -> None:
    voter = core(draw=1.0)
    waits = []
    for _ in range(8):
        voter.stand(Term(1), VOTERS, 0.0, real=False)
        waits.append(voter.deadline)
    assert waits[:3] == [pytest.approx(0.3), pytest.approx(0.45), pytest.approx(0.675)]
    assert waits[-1] == T.longest_backoff


def test_a_round_is_never_shorter_than_half_its_time() -> None:
    voter = core(draw=0.0)
    voter.stand(Term(1), VOTERS, 0.0, real=False)
    assert voter.deadline == T.round_timeout / 2


def test_a_real_ballot_has_its_time_from_when_it_was_asked() -> None:
    voter = core()
    voter.stand(Term(1), VOTERS, 0.0, real=False)
    voter.stand(Term(1), VOTERS, 0.1, real=True)
    first_round = voter.deadline - 0.1
    assert T.round_timeout * 0.75 <= first_round <= T.round_timeout * 1.5
    voter.asked(0.5)
    assert voter.deadline == pytest.approx(0.5 + first_round)
    for _ in range(2):
        voter.stand(Term(1), VOTERS, 0.0, real=False)
    voter.asked(1.0)
    assert voter.deadline == pytest.approx(1.0 + first_round * T.backoff**2)


def test_two_that_have_split_the_votes_do_not_ask_again_at_the_same_moment() -> None:
    """Raft §5.2."""
    ends = []
    for draw in (0.0, 0.999):
        voter = core(draw=draw)
        voter.stand(Term(1), VOTERS, 0.0, real=False)
        voter.asked(1.0)
        ends.append(voter.deadline)
    assert ends[1] - ends[0] >= T.jitter


def test_who_refuses_an_older_log_stands_soon_itself() -> None:
    """The asker cannot win, so others can be reached again: a wait that grew while nobody answered is cut short."""
    voter = core(draw=1.0)
    for _ in range(9):
        voter.stand(Term(1), VOTERS, 5.0, real=False)
    assert voter.deadline == 5.0 + T.longest_backoff
    voter.hurry(6.0)
    assert voter.deadline == pytest.approx(6.0 + T.guard + T.jitter)


def test_a_round_that_has_just_begun_is_not_cut_short() -> None:
    voter = core(draw=1.0)
    for _ in range(9):
        voter.stand(Term(1), VOTERS, 5.0, real=False)
    voter.hurry(5.0)
    assert voter.deadline == pytest.approx(5.0 + T.round_timeout + T.guard + T.jitter)


def test_hurry_never_makes_a_voter_wait_longer() -> None:
    voter = core(draw=1.0)
    voter.deadline = 6.01
    voter.hurry(6.0)
    assert voter.deadline == 6.01


def test_no_number_of_rounds_is_too_many() -> None:
    voter = core(draw=1.0)
    for _ in range(MOST_ROUNDS * 50):
        voter.stand(Term(1), VOTERS, 0.0, real=False)
    assert voter.deadline == T.longest_backoff


@pytest.mark.parametrize("end", ["heard", "changed"])
def test_a_leader_makes_the_rounds_short_again(end: str) -> None:
    voter = core(draw=1.0)
    for _ in range(5):
        voter.stand(Term(1), VOTERS, 0.0, real=False)
    if end == "heard":
        voter.heard(0.0, (), VOTERS)
    else:
        voter.changed(0.0, Term(1))
    voter.stand(Term(2), VOTERS, 0.0, real=False)
    assert voter.deadline == pytest.approx(T.round_timeout)


def test_told_to_wait_once_then_stand_regardless() -> None:
    voter = core()
    voter.stand(Term(1), VOTERS, 5.0, real=False)
    voter.told_to_wait(5.0)
    assert voter.deadline == pytest.approx(5.0 + T.rank_delay)
    assert voter.ballot is None
    voter.stand(Term(1), VOTERS, 5.15, real=False)
    before = voter.deadline
    voter.told_to_wait(5.2)
    assert (voter.deadline, voter.ballot is None) == (before, False)


# -- whom to grant -----------------------------------------------------------------------------------------------------

JUDGED = {
    "granted": (ask(), ""),
    "for a term that is past": (ask(next_term=4), "term"),
    "with an older last term": (ask(last=(2, 99)), "log"),
    "with a shorter log": (ask(last=(3, 9)), "log"),
    "with a later last term": (ask(last=(4, 1)), ""),
    "with a longer log": (ask(last=(3, 11)), ""),
}


@pytest.mark.parametrize(("message", "why"), JUDGED.values(), ids=JUDGED)
def test_a_pre_vote_is_judged_by_term_then_log(message: PreVote, why: str) -> None:
    """Raft §5.4.1. The asker, c, is higher than this voter, b."""
    assert judged(core(), message, C) == why


def test_nobody_is_granted_inside_a_lease() -> None:
    voter = core()
    voter.heard(10.0, (), VOTERS)
    assert judged(voter, ask(last=(9, 9)), C, now=10.0 + E - 0.001) == "lease"
    assert judged(voter, ask(last=(9, 9)), C, now=10.0 + E + 0.001) == ""


def test_a_term_that_is_past_is_told_even_inside_a_lease() -> None:
    """Else one that lags behind in terms never learns (PROTOCOL §2.5)."""
    voter = core()
    voter.heard(10.0, (), VOTERS)
    assert judged(voter, ask(next_term=4), C, now=10.0) == "term"


def test_the_higher_one_answers_the_lower_one_once() -> None:
    """The bully's answer delays, for as long as a second try takes, and no longer."""
    voter = core()
    assert judged(voter, ask(), A, now=10.0) == "higher"
    assert judged(voter, ask(), A, now=10.15) == ""
    assert judged(voter, ask(), A, now=10.29) == ""
    assert judged(voter, ask(), A, now=10.31) == "higher"


def test_each_asker_is_answered_for_itself() -> None:
    voter = core(C)
    assert judged(voter, ask(), A, now=10.0) == "higher"
    assert judged(voter, ask(), B, now=10.0) == "higher"


HIGHER = {
    "a lower priority, though the node id is higher": (C, ask(priority=-1), True, "higher"),
    "a higher priority, though the node id is lower": (A, ask(priority=1), True, ""),
    "this voter could not stand": (A, ask(), False, ""),
    "this voter's log is shorter": (A, ask(last=(3, 11)), True, ""),
    "this voter's last term is older": (A, ask(last=(4, 1)), True, ""),
    "the asker's log is shorter": (A, ask(last=(3, 9)), True, "log"),
}


@pytest.mark.parametrize(("asker", "message", "fit", "why"), HIGHER.values(), ids=HIGHER)
def test_the_log_comes_before_the_priority(asker: VoterId, message: PreVote, fit: bool, why: str) -> None:
    """PROTOCOL §2.2."""
    assert judged(core(), message, asker, fit=fit) == why


def test_answers_to_strangers_are_forgotten() -> None:
    voter = core(VoterId("z@1"))
    for stranger in range(1_000):
        assert judged(voter, ask(), VoterId(f"{stranger}@1"), now=10.0 + stranger) == "higher"
    assert len(voter._refused_higher) <= 2


@given(st.integers(0, 9), st.tuples(st.integers(0, 9), st.integers(0, 20)), st.integers(-3, 3), st.sampled_from(VOTERS))
def test_priority_never_lets_anybody_win_against_the_up_to_date_rule(
    next_term: int, last: tuple[int, int], priority: int, asker: VoterId
) -> None:
    """PROTOCOL §3, I13."""
    why = judged(core(), ask(next_term=next_term, last=last, priority=priority), asker)
    if last < (3, 10):
        assert why in ("log", "term")
    if why == "higher":
        assert last == (3, 10)


# -- how often the leader changed (PROTOCOL §2.4) ----------------------------------------------------------------------


def test_the_hold_down_doubles_with_each_change_and_is_capped() -> None:
    voter = core()
    holds = []
    for term in range(1, 8):
        voter.changed(float(term), Term(term))
        holds.append(voter.preempt_after(float(term)))
    assert holds == [30, 60, 120, 240, 480, 600, 600]


def test_a_calm_hour_forgets() -> None:
    voter = core()
    voter.changed(0.0, Term(1))
    voter.changed(1_800.0, Term(2))
    assert voter.preempt_after(1_800.0) == 60
    assert voter.preempt_after(CHANGES_SECONDS) == 30
    assert voter.preempt_after(10 * CHANGES_SECONDS) == 30


def test_the_same_term_seen_again_is_no_change() -> None:
    voter = core()
    voter.changed(0.0, Term(3))
    voter.changed(5.0, Term(3))
    assert voter.preempt_after(5.0) == 30
    assert voter.since_change(5.0) == 5.0


def test_without_a_change_it_is_long_ago() -> None:
    assert core().since_change(0.0) == float("inf")


def test_what_is_remembered_of_changes_is_bounded() -> None:
    voter = core()
    for term in range(1, 1_000):
        voter.changed(term / 1000, Term(term))
    assert len(voter._changes) <= REMEMBERED_CHANGES + 1
    assert voter.preempt_after(1.0) == 600
