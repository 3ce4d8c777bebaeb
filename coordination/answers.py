"""Answers of the operators' API that read both ways: ``h.is_healthy`` and ``h["is_healthy"]``, awaited or not.

Runbooks written over the years use all four forms (DESIGN §6), so the objects honour all four.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Self


class Answer(dict[str, Any]):
    """A JSON object whose keys are attributes too; nested objects likewise. May be awaited; it is itself."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__({key: _wrap(value) for key, value in body.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            known = ", ".join(sorted(self))
            raise AttributeError(f"there is no {name!r} here; there is: {known}") from None

    def __await__(self) -> Generator[Any, None, Self]:
        return self
        yield


class Count(int):
    """A number that may be awaited; it is itself."""

    def __await__(self) -> Generator[Any, None, Self]:
        return self
        yield


def _wrap(value: Any) -> Any:
    if isinstance(value, dict):
        return Answer(value)
    if isinstance(value, list):
        return [_wrap(item) for item in value]
    return value
