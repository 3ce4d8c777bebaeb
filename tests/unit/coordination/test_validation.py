"""The field and the sentence of the first problem, as the person who wrote the input would name it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from coordination.job import JobSpec
from coordination.kinds import Catalogue
from coordination.validation import first_problem, join


def problem(body: Any, model: Any = JobSpec, prefix: str = "") -> tuple[str, str]:
    with pytest.raises(ValidationError) as error:
        model.model_validate(body)
    return first_problem(error.value, model, prefix=prefix)


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ((), ""),
        (("a",), "a"),
        (("jobs", 3, "requires", "gpus"), "jobs[3].requires.gpus"),
        (("", "a"), "a"),
        (("jobs[2]", "a"), "jobs[2].a"),
        (("x" * 200,), "x" * 80),
    ],
)
def test_join(steps: tuple[str | int, ...], text: str) -> None:
    assert join(*steps) == text


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"command": ["a"], "env": {"str": 5}}, "env.str"),
        ({"command": ["a"], "requires": {"labels": {"int": 5}}}, "requires.labels.int"),
        ({"command": ["a"], "params": {"float": {}}}, "params.float"),
        ({"command": ["a"], "requires": 5}, "requires"),
        ({"command": ["a"], "requires": {"labels": {"a b": "x"}}}, "requires.labels.a b"),
        ({"command": ["a"], "timeout_seconds": "5"}, "timeout_seconds"),
    ],
)
def test_keys_named_like_types_are_still_keys(body: Any, field: str) -> None:
    assert problem(body)[0] == field


def test_unknown_field_comes_first_since_it_explains_the_others() -> None:
    assert problem({"comand": ["a"], "priority": 500}) == ("comand", "there is no such field; did you mean 'command'?")


def test_unknown_field_near_nothing_has_no_guess() -> None:
    assert problem({"command": ["a"], "zzzzzz": 1}) == ("zzzzzz", "there is no such field")


def test_nearest_is_looked_for_where_the_field_stands() -> None:
    body = {"kinds": {"a": {"populate": {"pendin": 1, "pending": 1}}}}
    assert problem(body, Catalogue) == (
        "kinds.a.populate.pendin",
        "there is no such field; did you mean 'pending'?",
    )


def test_missing_field_is_required() -> None:
    assert problem({}, Catalogue) == ("kinds", "is required")


def test_check_of_the_whole_names_its_field() -> None:
    assert problem({"command": ["a"], "cwd": "x"}, prefix="jobs[4]") == ("jobs[4].cwd", "must be an absolute path")


def test_problem_of_no_field_is_of_the_body() -> None:
    assert problem(5)[0] == "(body)"
    assert problem(5, prefix="jobs[1]")[0] == "jobs[1]"
