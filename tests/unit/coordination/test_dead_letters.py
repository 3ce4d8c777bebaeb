"""Many failed jobs at once: which are retried, in slices, and which stay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from coordination import commands as c
from coordination import dispatcher
from tests.unit.coordination.drive import T0, new_job
from tests.unit.coordination.test_new_leader import Desk


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(str(tmp_path / "state.db"))
    await desk.desk.begin_term()
    yield desk
    desk.reader.close()
    desk.state.close()


def dead(desk: Desk, *jobs: c.NewJob) -> None:
    """Submits these and lets each fail for good."""
    desk.apply(c.Submit(desk.clock.now, tuple(job._replace(max_attempts=1) for job in jobs), "", ""))
    for job in jobs:
        (seq,) = desk.state._db.execute("SELECT seq FROM jobs WHERE id = ?", (job.id,)).fetchone() or (0,)
        desk.apply(c.Claim(desk.clock.now, "w", (c.Pick(int(str(seq)), None),)))
        done = c.AttemptDone(job.id, 1, "w", False, None, "boom", 1, True, 0, "exit")
        desk.apply(c.Finish(desk.clock.now, (done,)))
        desk.clock.advance(1_000)


def failed(desk: Desk) -> list[str]:
    rows = desk.state._db.execute("SELECT id FROM jobs WHERE state = 'failed' ORDER BY seq")
    return [str(row[0]) for row in rows]


async def retry(desk: Desk, **asked: Any) -> int:
    some = {"kind": None, "group": None, "array": None, "max_age_ms": 1 << 40, "limit": 1_000_000, **asked}
    return await desk.desk.retry_failed(**some)


async def test_all_of_them_are_retried_in_slices(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "RETRY_SLICE", 3)
    dead(desk, *(new_job(f"j{n}") for n in range(10)))
    before = desk.state.applied_index
    assert await retry(desk) == 10
    assert failed(desk) == []
    assert desk.state.applied_index - before == 4
    assert await retry(desk) == 0


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ({"kind": "training"}, ["a", "c"]),
        ({"group": "team"}, ["a", "b"]),
        ({"kind": "command", "group": "team"}, ["a", "b"]),
        ({"max_age_ms": 2_500}, ["a"]),
        ({"limit": 2}, ["a"]),
        ({"limit": 1, "kind": "command"}, ["a", "b"]),
    ],
    ids=str,
)
async def test_only_those_that_are_asked_for_and_the_newest_first(
    desk: Desk, asked: dict[str, Any], left: list[str]
) -> None:
    dead(desk, new_job("a"), new_job("b", kind="training"), new_job("c", group="team"))
    assert await retry(desk, **asked) == 3 - len(left)
    assert failed(desk) == left


async def test_members_of_one_array_can_be_retried(desk: Desk) -> None:
    dead(desk, new_job("x"))
    desk.apply(c.Submit(desk.clock.now, (new_job("a", array="1-3", max_attempts=1),), "", ""))
    for n, job in enumerate(("a.1", "a.2")):
        desk.apply(c.Claim(desk.clock.now, "w", (c.Pick(3 + n, None),)))
        done = c.AttemptDone(job, 1, "w", False, None, "boom", 1, True, 0, "exit")
        assert desk.apply(c.Finish(desk.clock.now, (done,))) == [None]
    assert await retry(desk, array="a") == 2
    assert failed(desk) == ["x"]
    assert await retry(desk, array="nobody") == 0


async def test_what_cannot_be_retried_stays_and_does_not_stop_the_others(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "RETRY_SLICE", 1)
    dead(desk, new_job("dep"), new_job("held", unique_key="u"), new_job("free"))
    desk.apply(c.Submit(desk.clock.now, (new_job("holder", unique_key="u"), new_job("ok")), "", ""))
    async with asyncio.timeout(10):
        assert await retry(desk) == 2
    assert failed(desk) == ["held"]


async def test_job_that_fails_again_meanwhile_is_not_retried_twice(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended after the order was given."""
    monkeypatch.setattr(dispatcher, "RETRY_SLICE", 1)
    dead(desk, new_job("a"), new_job("b"))
    given = desk.clock.now
    once = True

    def fails_again() -> None:
        nonlocal once
        if once and desk.state.pending_total:
            once = False
            desk.clock.advance(1_000)
            desk.apply(c.Claim(desk.clock.now, "w", (c.Pick(2, None),)))
            done = c.AttemptDone("b", 2, "w", False, None, "again", 1, False, 0, "exit")
            desk.apply(c.Finish(desk.clock.now, (done,)))

    desk.before_reading = fails_again
    assert await retry(desk) == 2
    assert failed(desk) == ["b"]
    assert desk.clock.now > given >= T0
