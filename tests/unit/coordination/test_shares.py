"""Who has had how much: what is held now and what was held lately, by group and by kind."""

from __future__ import annotations

import pytest

from coordination.shares import FLOOR, Shares

HOUR = 3_600_000


@pytest.fixture
def shares() -> Shares:
    return Shares({"heavy": 2.0}, {"cheap": 0.5}, half_life_ms=HOUR)


def test_what_is_held_counts_at_once(shares: Shares) -> None:
    shares.add("a", "k", 0.25, 0)
    assert shares.of_group("a", 0) == 0.25
    shares.add("a", "k", -0.25, 0)
    assert shares.of_group("a", 0) == 0


def test_what_was_held_halves_every_half_life(shares: Shares) -> None:
    shares.add("a", "k", 1.0, 0)
    assert shares.of_group("a", HOUR) == pytest.approx(1.5), "held, and half of what would be remembered"
    shares.add("a", "k", -1.0, HOUR)
    assert shares.of_group("a", HOUR) == pytest.approx(0.5)
    assert shares.of_group("a", 2 * HOUR) == pytest.approx(0.25)
    assert shares.of_group("a", 3 * HOUR) == pytest.approx(0.125)


def test_memory_does_not_depend_on_how_often_it_is_asked() -> None:
    seldom, often = Shares(half_life_ms=HOUR), Shares(half_life_ms=HOUR)
    for shares in (seldom, often):
        shares.add("a", "k", 0.5, 0)
    for minute in range(60):
        often.of_group("a", minute * 60_000)
    assert often.of_group("a", HOUR) == pytest.approx(seldom.of_group("a", HOUR))


def test_weight_divides(shares: Shares) -> None:
    shares.add("heavy", "k", 0.5, 0)
    shares.add("light", "k", 0.5, 0)
    assert shares.of_group("heavy", 0) == shares.of_group("light", 0) / 2


def test_own_part_can_be_left_out(shares: Shares) -> None:
    shares.add("a", "k", 0.25, 0)
    shares.add("a", "k", 0.5, 0)
    assert shares.of_group("a", 0, 0.25) == 0.5


def test_kinds_below_their_floor_are_told(shares: Shares) -> None:
    shares.add("a", "cheap", 0.4, 0)
    shares.add("a", "dear", 0.57, 0)
    shares.add("b", "seldom", 0.03, 0)
    assert shares.kinds_below_floor({"cheap", "dear", "new"}, 0) == {"cheap", "seldom", "new"}
    assert FLOOR == 0.05


def test_where_nothing_was_used_nobody_is_below(shares: Shares) -> None:
    assert shares.kinds_below_floor({"cheap", "dear"}, 0) == set()


def test_parts_of_all_use_are_told_for_people(shares: Shares) -> None:
    assert shares.groups(0) == {}
    shares.add("a", "k", 0.6, 0)
    shares.add("b", "k", 0.2, 0)
    assert shares.groups(0) == pytest.approx({"a": 0.75, "b": 0.25})


def test_names_of_the_long_idle_are_forgotten(shares: Shares) -> None:
    shares.add("gone", "k", 0.5, 0)
    shares.add("gone", "k", -0.5, HOUR)
    shares.add("here", "k", 0.5, 0)
    shares.forget_idle(2 * HOUR)
    assert shares.of_group("gone", 2 * HOUR) > 0
    shares.forget_idle(40 * HOUR)
    assert list(shares.groups(40 * HOUR)) == ["here"]


def test_use_is_never_less_than_nothing(shares: Shares) -> None:
    """What a job held is told twice if the cluster has grown meanwhile; that must not make a debt."""
    shares.add("a", "k", 0.1, 0)
    shares.add("a", "k", -0.2, 0)
    assert shares.of_group("a", 0) == 0
