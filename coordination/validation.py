"""Turns a pydantic failure into one field and one sentence, with the nearest right name for a wrong one."""

from __future__ import annotations

import difflib
import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError


def first_problem(error: ValidationError, model: type[BaseModel], *, prefix: str = "") -> tuple[str, str]:
    """(field, sentence) of the first problem. The field reads as people write it: ``jobs[3].requires.gpus``."""
    problems = error.errors(include_url=False, include_context=False)
    problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    location = _walk(model, problem["loc"])[0]
    sentence = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        name = str(location[-1])
        near = difflib.get_close_matches(name, _fields_at(model, location[:-1]), 1)
        sentence = "there is no such field" + (f"; did you mean {near[0]!r}?" if near else "")
    elif problem["type"] == "missing":
        sentence = "is required"
    elif sentence.partition(": ")[0] in _fields_at(model, location):
        # A whole-model check names its field in its sentence.
        name, _, sentence = sentence.partition(": ")
        location = (*location, name)
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


def _walk(model: Any, location: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], Any]:
    """The steps that are in the input, and the type they end at.

    pydantic adds steps of its own: the members of a union, the names of validators, the [key] of a mapping. Only the
    types tell them from a key that somebody has named "str".
    """
    steps: list[int | str] = []
    current = model
    for step in location:
        container = _container(current)
        if container is None or step == "[key]":
            continue
        steps.append(step)
        if isinstance(container, type) and issubclass(container, BaseModel):
            field = container.model_fields.get(str(step))
            current = field.annotation if field is not None else None
        else:
            current = get_args(container)[-1]
    return tuple(steps), current


def _container(annotation: Any) -> Any:
    """The model, ``list[…]`` or ``dict[…]`` inside ``… | None``, ``Annotated[…]`` and the like, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    origin = get_origin(annotation)
    if origin in (list, dict):
        return annotation
    if origin is Annotated:
        return _container(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return next((found for inside in get_args(annotation) if (found := _container(inside)) is not None), None)
    return None


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    container = _container(_walk(model, location)[1])
    known = isinstance(container, type) and issubclass(container, BaseModel)
    return list(container.model_fields) if known else []


MAX_DEPTH = 64


def nested_deeper(value: Any, levels: int) -> bool:
    """Whether a JSON value is nested more than so many levels. Nothing of ours needs depth, and what recurses over
    such a value elsewhere would break on it."""
    level = [value]
    for _ in range(levels):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
