"""How many jobs of which kind the populator adds, and which params each one gets."""

from __future__ import annotations

from typing import Any

import pytest

from coordination.kinds import Kind, Kinds
from coordination.population import MAX_ADDED_AT_ONCE, KindCounts, Wanted, wanted


def plan(rule: dict[str, Any], *, force: bool = False, totals: dict[str, int] | None = None, **have: Any) -> Wanted:
    kinds = Kinds({"play": Kind.model_validate({"command": ["play"], "populate": rule})}, {})
    (want,) = wanted(kinds, {"play": KindCounts(**have)}, force=force, totals=totals)
    return want


@pytest.mark.parametrize(
    ("rule", "have", "force", "added"),
    [
        ({"pending": 8}, {}, False, 8),
        ({"pending": 8}, {"unfinished": 5}, False, 3),
        ({"pending": 8}, {"unfinished": 8}, False, 0),
        ({"pending": 8}, {"unfinished": 9}, True, 0),
        ({"pending": 0}, {}, True, 0),
        ({"pending": 5_000}, {}, False, MAX_ADDED_AT_ONCE),
        ({"pending": 8, "total": 10}, {"submitted_ever": 7}, False, 3),
        ({"pending": 8, "total": 10}, {"submitted_ever": 10}, False, 0),
        ({"pending": 8, "total": 10}, {"submitted_ever": 11}, True, 0),
        ({"pending": 8, "total": 0}, {}, False, 0),
        ({"pending": 8, "every_seconds": 60}, {"since_added": 59.9}, False, 0),
        ({"pending": 8, "every_seconds": 60}, {"since_added": 60.0}, False, 8),
        ({"pending": 8, "every_seconds": 60}, {"since_added": 1.0}, True, 8),
        ({"pending": 8}, {"failed_hour": 9}, False, 8),
        ({"pending": 8}, {"failed_hour": 10}, False, 0),
        ({"pending": 8}, {"failed_hour": 10, "completed_hour": 1}, False, 8),
        ({"pending": 8}, {"failed_hour": 10}, True, 8),
    ],
)
def test_how_many_are_added(rule: dict[str, Any], have: dict[str, Any], force: bool, added: int) -> None:
    assert len(plan(rule, force=force, **have).jobs) == added


def test_settings_total_takes_the_place_of_the_kinds() -> None:
    assert len(plan({"pending": 8, "total": 1}, totals={"play": 5}).jobs) == 5
    assert len(plan({"pending": 8}, totals={"other": 0}).jobs) == 8


def test_why_is_said() -> None:
    assert plan({"pending": 8, "total": 10}, unfinished=2, submitted_ever=9).why == "2 of 8 in the queue, 9 of 10 ever"
    assert plan({"pending": 8}, failed_hour=12).why == "paused: all 12 of the last hour failed"
    assert plan({"pending": 8, "every_seconds": 60}, since_added=18.0).why.endswith("next in 42 s")


def test_varied_params_cycle_like_the_digits_of_a_counter() -> None:
    rule = {"pending": 7, "vary": {"b": [1, 2], "a": ["x", "y", "z"]}, "seed_param": "seed"}
    params = [job["params"] for job in plan(rule).jobs]
    assert [(p["a"], p["b"]) for p in params] == [
        ("x", 1), ("y", 1), ("z", 1), ("x", 2), ("y", 2), ("z", 2), ("x", 1),
    ]  # fmt: skip
    assert [p["seed"] for p in params] == [1, 2, 3, 4, 5, 6, 7]


def test_numbering_goes_on_where_it_was() -> None:
    rule = {"pending": 2, "vary": {"a": ["x", "y", "z"]}, "seed_param": "seed"}
    assert [job["params"] for job in plan(rule, submitted_ever=4).jobs] == [
        {"a": "y", "seed": 5},
        {"a": "z", "seed": 6},
    ]


def test_job_is_a_body_of_its_kind_and_group() -> None:
    assert plan({"pending": 1}).jobs == [{"kind": "play", "params": {}, "group": "populator"}]


def test_kind_without_a_rule_is_left_alone() -> None:
    assert wanted(Kinds({"play": Kind()}, {}), {}, force=True) == []
