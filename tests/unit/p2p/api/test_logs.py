"""Whose log is meant: the worker's, an earlier attempt's, or one member's of a gang."""

from __future__ import annotations

from typing import Any

import pytest

from coordination.errors import Refused
from p2p.api.logs import _range_of, _worker_of

ALONE: dict[str, Any] = {
    "id": "j",
    "attempt": 2,
    "worker": "n2",
    "history": [{"attempt": 0, "worker": None}, {"attempt": 1, "worker": "n1"}, {"attempt": 2, "worker": "n2"}],
}
GANG = {**ALONE, "members": [{"rank": 0, "worker": "n2"}, {"rank": 1, "worker": "n3"}]}


@pytest.mark.parametrize(
    ("job", "attempt", "rank", "worker"),
    [
        (ALONE, 2, None, "n2"),
        (ALONE, 1, None, "n1"),
        (ALONE, 2, 0, "n2"),
        (ALONE, 1, 0, "n1"),
        (GANG, 2, None, "n2"),
        (GANG, 2, 1, "n3"),
        ({**GANG, "members": None}, 2, 0, "n2"),
        ({**ALONE, "attempt": 0, "worker": None, "history": []}, 0, None, None),
    ],
)
def test_the_node_that_has_a_log(job: dict[str, Any], attempt: int, rank: int | None, worker: str | None) -> None:
    assert _worker_of(job, attempt, rank) == worker


@pytest.mark.parametrize(("job", "attempt", "rank"), [(ALONE, 2, 1), (GANG, 2, 2), (GANG, 1, 1)])
def test_a_member_that_is_not_there_is_refused(job: dict[str, Any], attempt: int, rank: int) -> None:
    with pytest.raises(Refused, match=f"no member of rank {rank}"):
        _worker_of(job, attempt, rank)


@pytest.mark.parametrize(
    ("header", "range_"),
    [
        (None, None),
        ("bytes=0-9", (0, 9)),
        (" bytes=5- ", (5, None)),
        ("bytes=-5", (None, 5)),
        ("bytes=-", None),
        ("bytes=9-0", None),
        ("bytes=0-1,3-4", None),
        ("Bytes=0-1", None),
        ("bytes=" + "9" * 30 + "-", None),
    ],
)
def test_a_range_header_is_read_or_ignored(header: str | None, range_: tuple[int | None, int | None] | None) -> None:
    assert _range_of(header) == range_
