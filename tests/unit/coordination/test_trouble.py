"""Which nodes make jobs fail, told from jobs that fail anywhere."""

from __future__ import annotations

import pytest

from coordination.trouble import JOBS, WINDOW_MS, Trouble

NOW = 1_000_000


def elsewhere(trouble: Trouble, *ends: bool, node: str = "good", now: int = NOW) -> None:
    for n, ok in enumerate(ends):
        trouble.note(node, f"{node}-{n}", ok, now)


def fail(trouble: Trouble, *jobs: str, node: str = "bad", now: int = NOW) -> list[bool]:
    """What is thought of the node after each of these failures."""
    return [trouble.note(node, job, False, now) for job in jobs]


@pytest.fixture
def trouble() -> Trouble:
    """Other nodes do well."""
    made = Trouble()
    elsewhere(made, True, True)
    return made


def test_five_different_jobs_in_a_row_are_the_nodes_fault(trouble: Trouble) -> None:
    assert JOBS == 5
    assert fail(trouble, *"abcde") == [False] * 4 + [True]


def test_one_job_that_fails_again_and_again_is_its_own_fault(trouble: Trouble) -> None:
    assert not any(fail(trouble, *"aaaaaaaaaa"))
    assert fail(trouble, *"bbccdde")[-1], "with four others it is not"


def test_a_success_in_between_begins_anew(trouble: Trouble) -> None:
    fail(trouble, *"abcd")
    assert not trouble.note("bad", "x", True, NOW)
    assert fail(trouble, *"efghi") == [False] * 4 + [True]


def test_a_success_is_never_held_against_a_node(trouble: Trouble) -> None:
    fail(trouble, *"abcde")
    assert not trouble.note("bad", "f", True, NOW)


@pytest.mark.parametrize(
    ("ends", "found"),
    [
        ([], False),  # without a word from any other it may as well be the jobs
        ([False] * 3, False),
        ([True, False, False], False),
        ([True, False], True),
        ([True, True, False], True),
    ],
    ids=str,
)
def test_jobs_that_fail_elsewhere_too_are_the_jobs_fault(ends: list[bool], found: bool) -> None:
    trouble = Trouble()
    elsewhere(trouble, *ends)
    assert fail(trouble, *"abcde")[-1] is found


def test_how_others_fare_is_counted_over_all_of_them() -> None:
    trouble = Trouble()
    for n in range(3):
        elsewhere(trouble, False, node=f"n{n}")
    elsewhere(trouble, True, True, node="n9")
    assert not fail(trouble, *"abcde")[-1]
    elsewhere(trouble, True, node="n8")
    assert fail(trouble, "f")[-1]


def test_what_is_long_past_does_not_count(trouble: Trouble) -> None:
    fail(trouble, *"abcd")
    later = NOW + WINDOW_MS + 1
    elsewhere(trouble, True, now=later)
    assert not fail(trouble, "e", now=later)[0]
    assert fail(trouble, *"fghi", now=later)[-1]


def test_what_others_did_long_ago_does_not_count(trouble: Trouble) -> None:
    assert not fail(trouble, *"abcde", now=NOW + WINDOW_MS + 1)[-1]


def test_a_node_that_is_given_another_chance_begins_anew(trouble: Trouble) -> None:
    fail(trouble, *"abcde")
    trouble.forget("bad")
    assert fail(trouble, *"fghij") == [False] * 4 + [True]
    trouble.forget("never heard of")


def test_nodes_without_news_are_forgotten(trouble: Trouble) -> None:
    elsewhere(trouble, True, node="late", now=NOW + WINDOW_MS)
    trouble.forget_old(NOW + WINDOW_MS + 1)
    assert set(trouble._nodes) == {"late"}
