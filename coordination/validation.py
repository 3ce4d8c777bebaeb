"""Turns a pydantic failure into one field and one sentence, with the nearest right name for a wrong one."""

from __future__ import annotations

import difflib
import types
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

_TAGS = ("function-", "list[", "dict[", "constrained-", "is-instance[")
_UNION_TAGS = {"str", "bool", "int", "float", "none"}


def first_problem(error: ValidationError, model: type[BaseModel], *, prefix: str = "") -> tuple[str, str]:
    """(field, sentence) of the first problem. The field reads as people write it: ``jobs[3].requires.gpus``."""
    problems = error.errors(include_url=False, include_context=False)
    problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    location = _real_steps(problem["loc"])
    sentence = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        name = str(location[-1])
        near = difflib.get_close_matches(name, _fields_at(model, location[:-1]), 1)
        sentence = "there is no such field" + (f"; did you mean {near[0]!r}?" if near else "")
    elif problem["type"] == "missing":
        sentence = "is required"
    elif not location and ":" in sentence and sentence.partition(":")[0].isidentifier():
        # A whole-model check names its field in its sentence.
        name, _, rest = sentence.partition(": ")
        location, sentence = (name,), rest
    return join(prefix, *location) or "(body)", sentence


def join(*steps: str | int) -> str:
    """``join("jobs", 3, "requires")`` is ``jobs[3].requires``. Names are cut at 80 characters."""
    text = ""
    for step in steps:
        if isinstance(step, int):
            text += f"[{step}]"
        elif step:
            text += f".{step[:80]}" if text else step[:80]
    return text


def _real_steps(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Leaves out what pydantic adds for itself: validator names, union members, and the [key] of a mapping."""
    steps: list[int | str] = []
    for step in location:
        if isinstance(step, str) and (step.startswith(_TAGS) or step in _UNION_TAGS or step == "[key]"):
            continue
        steps.append(step)
    return tuple(steps)


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for step in location:
        if isinstance(step, int) or not (isinstance(current, type) and issubclass(current, BaseModel)):
            continue
        field = current.model_fields.get(step)
        current = _model_in(field.annotation) if field is not None else None
    if isinstance(current, type) and issubclass(current, BaseModel):
        return list(current.model_fields)
    return []


def _model_in(annotation: Any) -> Any:
    """The model inside ``Model | None``, ``list[Model]`` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, list, dict, tuple):
        for inside in get_args(annotation):
            found = _model_in(inside)
            if found is not None:
                return found
    return None
