"""Answers of the operators' API read as attributes and as mappings, awaited or not."""

from __future__ import annotations

import json

import pytest

from coordination.answers import Answer, Count

BODY = {"is_healthy": True, "details": {"items": [{"id": "a"}, 5]}, "message": "fine"}


def test_attribute_and_key_are_the_same() -> None:
    answer = Answer(BODY)
    assert answer.is_healthy is answer["is_healthy"] is True
    assert answer.details["items"][0].id == answer["details"]["items"][0]["id"] == "a"
    assert answer.get("none", 3) == 3


def test_answer_is_plain_json() -> None:
    assert json.loads(json.dumps(Answer(BODY))) == BODY
    assert Answer(BODY) == BODY


def test_what_is_not_there_names_what_is() -> None:
    with pytest.raises(AttributeError, match="no 'healthy' here; there is: details, is_healthy, message"):
        _ = Answer(BODY).healthy


async def test_answer_may_be_awaited_and_is_itself() -> None:
    answer = Answer(BODY)
    assert await answer is answer


async def test_count_is_a_number_awaited_or_not() -> None:
    count = Count(3)
    assert await count == count + 0 == 3
    assert f"{count}" == "3"
