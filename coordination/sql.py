"""Loads the named statements of ``queries.sql``: SQL is text with a name and a purpose, not strings in code
(the idea is procrastinate's ``procrastinate/sql/``)."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

_NAME = re.compile(r"^-- name: (\w+)", re.MULTILINE)
_TO = re.compile(r"^-- to: (\d+)$", re.MULTILINE)


@cache
def statements() -> dict[str, str]:
    """Name -> statement."""
    text = resources.files("coordination").joinpath("queries.sql").read_text(encoding="utf-8")
    parts = _NAME.split(text)[1:]
    named: dict[str, str] = {}
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        _, _, statement = body.partition("\n")
        assert name not in named, f"queries.sql names {name} twice"
        named[name] = " ".join(statement.split())
    return named


@cache
def migrations() -> dict[int, str]:
    """Version -> the script that leads to it from the one before."""
    text = resources.files("coordination").joinpath("migrations.sql").read_text(encoding="utf-8")
    parts = _TO.split(text)[1:]
    return {int(version): script for version, script in zip(parts[::2], parts[1::2], strict=True)}


@cache
def schema() -> str:
    """The script that makes an empty queue."""
    return resources.files("coordination").joinpath("schema.sql").read_text(encoding="utf-8")
