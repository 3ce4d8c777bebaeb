"""Majority arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.quorum import committed, majority


@pytest.mark.parametrize(("voters", "least"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (6, 4), (7, 4)])
def test_a_majority_is_the_least_number_above_half(voters: int, least: int) -> None:
    assert majority(voters) == least


def test_there_is_no_majority_of_nobody() -> None:
    with pytest.raises(ValueError, match="at least one voter"):
        majority(0)


COMMITTED = {
    "one voter": ([7], 7),
    "two voters wait for both": ([7, 3], 3),
    "three, one behind": ([7, 7, 0], 7),
    "three, two behind": ([7, 2, 0], 2),
    "four, two ahead": ([9, 9, 4, 1], 4),
    "five": ([9, 8, 7, 1, 0], 7),
    "nothing yet": ([0, 0, 0], 0),
}


@pytest.mark.parametrize(("matches", "index"), COMMITTED.values(), ids=COMMITTED)
def test_an_index_is_committed_when_a_majority_holds_it(matches: list[int], index: int) -> None:
    assert committed(matches) == index


@given(st.lists(st.integers(0, 50), min_size=1, max_size=7))
def test_committed_is_the_highest_index_that_a_majority_holds(matches: list[int]) -> None:
    def held(index: int) -> bool:
        return sum(match >= index for match in matches) >= majority(len(matches))

    assert held(committed(matches))
    assert not held(committed(matches) + 1)
