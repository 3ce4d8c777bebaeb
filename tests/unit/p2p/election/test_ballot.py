"""Counting one round of votes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.election.ballot import Ballot
from p2p.ids import Term, VoterId

VOTERS = tuple(VoterId(name) for name in ("a@1", "b@1", "c@1", "d@1", "e@1"))
A, B, C, D, E = VOTERS


def ballot(voters: int = 3) -> Ballot:
    return Ballot(Term(1), VOTERS[:voters], real=True)


@pytest.mark.parametrize(("voters", "needed"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)])
def test_a_majority_wins(voters: int, needed: int) -> None:
    count = ballot(voters)
    for given_so_far, voter in enumerate(count.voters):
        assert count.won == (given_so_far >= needed)
        count.count(voter, True)
    assert count.won


def test_a_vote_told_twice_counts_once() -> None:
    count = ballot()
    count.count(A, True)
    count.count(A, True)
    assert not count.won


def test_who_was_not_asked_does_not_count() -> None:
    """PROTOCOL §2.8: the same node with another disk is somebody else."""
    count = ballot()
    count.count(A, True)
    count.count(VoterId("b@2"), True)
    count.count(VoterId("d@1"), True)
    assert not count.won


def test_a_vote_once_given_is_not_taken_back_by_a_late_refusal() -> None:
    count = ballot()
    count.count(A, True)
    count.count(A, False, "voted")
    count.count(B, True)
    assert count.won
    assert not count.refused


def test_a_refusal_can_turn_into_a_vote() -> None:
    """A pre-vote is asked for again."""
    count = ballot()
    count.count(A, True)
    count.count(B, False, "higher")
    count.count(B, True)
    assert count.won


@given(st.lists(st.tuples(st.sampled_from(VOTERS), st.booleans()), max_size=20), st.integers(1, 5))
def test_a_ballot_is_never_won_and_lost(told: list[tuple[VoterId, bool]], voters: int) -> None:
    count = ballot(voters)
    for voter, granted in told:
        count.count(voter, granted, "no")
        assert not (count.won and count.lost)
        assert count.granted <= set(count.voters)
        assert not count.granted & count.refused.keys()
        silent = voters - len(count.refused) - len(count.granted)
        assert count.lost == (len(count.granted) + silent <= voters // 2)
