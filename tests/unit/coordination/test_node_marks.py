"""What is said of nodes: journaled, told to who is concerned, and carried out against who does not obey."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from coordination.dispatcher import LEAVING, UNMOVED_SLACK_MS, Beat
from coordination.leases import TELL_AGAIN_MS, Notice, Signs
from tests.unit.coordination.office import Office

GRACE = 30_000  # of a job that says nothing of it


@pytest.fixture
async def office(tmp_path: Path) -> AsyncIterator[Office]:
    """Two workers."""
    office = Office(str(tmp_path / "state.db"))
    await office.desk.begin_term()
    office.hire("w", "v")
    yield office
    office.close()


def marks(office: Office) -> dict[str, tuple[int, int, int, str]]:
    """(cordoned, draining, deadline, reason) by node."""
    return {m.node: (m.cordoned, m.draining, m.deadline_ms, m.reason) for m in office.desk.marks.values()}


async def parked(office: Office, worker: str) -> asyncio.Task[Any]:
    """A claim that waits for a minute."""
    claim = asyncio.create_task(office.desk.claim(worker, wait_seconds=60))
    async with asyncio.timeout(5):
        while not office.desk.matching.parked(worker):
            await asyncio.sleep(0)
    return claim


async def answer(claim: asyncio.Task[Any]) -> tuple[list[str], list[Notice]]:
    async with asyncio.timeout(5):
        jobs, notices = await claim
    return [job["id"] for job in jobs], notices


async def claimed(office: Office, worker: str, *jobs: str) -> None:
    """These jobs are given to the worker by its claim."""
    office.submit(*jobs)
    given: list[str] = []
    while len(given) < len(jobs):
        given += (await answer(await parked(office, worker)))[0]
    assert given == list(jobs)


# -- what is said, and by whom it is known ---------------------------------------------------------------------------


async def test_what_is_said_is_journaled_and_a_new_leader_knows_it(office: Office) -> None:
    await office.desk.mark_node("w", cordoned=True, reason="loose cable")
    await office.desk.mark_node("v", draining=True, deadline_ms=office.clock.now + 5_000, reason="maintenance")
    assert marks(office) == {
        "w": (1, 0, 0, "loose cable"),
        "v": (0, 1, office.clock.now + 5_000, "maintenance"),
    }
    office.desk.end_term()
    successor = office.successor()
    await successor.begin_term()
    assert successor.marks == office.desk.marks
    assert successor.matching.barred == {"w": "cordoned", "v": "draining"}
    successor.end_term()


async def test_cordon_and_drain_are_said_and_taken_back_each_by_itself(office: Office) -> None:
    deadline = office.clock.now + 5_000
    await office.desk.mark_node("w", draining=True, deadline_ms=deadline, reason="1")
    await office.desk.mark_node("w", cordoned=True, reason="2")
    assert marks(office) == {"w": (1, 1, deadline, "2")}
    await office.desk.mark_node("w", draining=False, reason="3")
    assert marks(office) == {"w": (1, 0, 0, "2")}
    mark = await office.desk.mark_node("w", cordoned=False, reason="4")
    assert (mark, marks(office), office.desk.matching.barred) == (None, {}, {})


async def test_a_claim_of_a_node_that_is_cordoned_is_answered_at_once(office: Office) -> None:
    claim = await parked(office, "w")
    await office.desk.mark_node("w", cordoned=True, reason="x")
    assert await answer(claim) == ([], [])
    assert office.desk.matching.barred["w"] == "cordoned", "which its answer says"
    claim = await parked(office, "w")
    await office.desk.mark_node("v", cordoned=True, reason="x")
    assert not claim.done(), "another's mark is none of its business"
    await office.desk.mark_node("w", cordoned=False, reason="y")
    assert await answer(claim) == ([], [])


async def test_a_cordoned_node_gets_nothing_new_and_its_fellow_gets_it(office: Office) -> None:
    await office.desk.mark_node("w", cordoned=True, reason="x")
    barred, open_ = await parked(office, "w"), await parked(office, "v")
    office.submit("a")
    assert await answer(open_) == (["a"], [])
    office.submit("b")
    await office.turn()
    assert not barred.done()
    await office.desk.mark_node("w", cordoned=False, reason="y")
    assert await answer(barred) == ([], [])
    assert await answer(await parked(office, "w")) == (["b"], [])


# -- drains ----------------------------------------------------------------------------------------------------------


async def test_a_drain_without_a_deadline_lets_jobs_finish(office: Office) -> None:
    office.give("a", "w")
    await office.desk.mark_node("w", draining=True, reason="maintenance")
    await office.turn(3_600_000)
    assert office.notices("w") == []


async def test_when_its_deadline_has_come_what_still_runs_is_asked_once_to_make_way(office: Office) -> None:
    office.give("a", "w")
    office.give("b", "w")
    office.give("elsewhere", "v")
    await office.desk.mark_node("w", draining=True, deadline_ms=office.clock.now + 1_000, reason="maintenance")
    await office.turn(999)
    assert office.notices("w") == []
    claim = await parked(office, "w")
    await office.turn(1)
    told = [Notice("a", 1, "drained"), Notice("b", 1, "drained")]
    assert await answer(claim) == ([], told), "it hears of it at once"
    asked_at = office.desk.leases.by_job["a"].ordered_at
    for _ in range(3):
        await office.turn(1_000)
    assert office.notices("w") == []
    assert office.desk.leases.by_job["a"].ordered_at == asked_at, "its grace does not begin anew"
    assert office.notices("v") == []


async def test_an_order_is_told_again_after_a_while(office: Office) -> None:
    office.give("a", "w")
    await office.desk.mark_node("w", draining=True, deadline_ms=office.clock.now, reason="maintenance")
    await office.turn()
    assert office.notices("w") == [Notice("a", 1, "drained")]
    office.clock.advance(TELL_AGAIN_MS - 1)
    assert office.notices("w") == []
    office.clock.advance(1)
    assert office.notices("w") == [Notice("a", 1, "drained")]
    assert office.notices("w") == []
    assert TELL_AGAIN_MS == 5_000


async def test_who_does_not_obey_within_its_grace_and_a_minute_is_released(office: Office) -> None:
    await claimed(office, "w", "a", "b")
    office.give("elsewhere", "v")
    await office.desk.mark_node("w", draining=True, deadline_ms=office.clock.now, reason="maintenance")
    await office.turn()
    assert len(office.notices("w")) == 2
    office.attempts["b"] = 1
    office.end("b", "w", ok=False, cause="drained")  # obeys
    await office.turn(GRACE + UNMOVED_SLACK_MS - 1)
    assert sorted(office.desk.leases.by_job) == ["a", "elsewhere"]
    await office.turn(1)
    await asyncio.sleep(0)
    assert sorted(office.desk.leases.by_job) == ["elsewhere"]
    record = office.reader.job("a")
    assert record is not None
    assert (record["state"], record["failed_attempts"]) == ("pending", 0), "no attempt is spent"
    assert record["reason"] == "released: it did not make way when it was asked to"
    assert Notice("a", 1) in office.notices("w"), "and its worker is told to end it"
    assert UNMOVED_SLACK_MS == 60_000


# -- a machine that is taken away, and comes back --------------------------------------------------------------------


async def back(office: Office, worker: str, *attempts: tuple[str, int]) -> None:
    beats = [Beat(Signs(job, attempt), None) for job, attempt in attempts]
    await office.desk.heartbeat(worker, beats, first=True)


async def test_a_node_that_leaves_hands_its_jobs_on_in_time_and_is_taken_back(office: Office) -> None:
    office.give("a", "w")
    await office.desk.leave("w", 110)
    assert marks(office) == {"w": (0, 1, office.clock.now + 110_000, LEAVING)}
    assert office.notices("w") == []
    await office.turn(110_000)
    assert office.notices("w") == [Notice("a", 1, "drained")]
    await office.desk.heartbeat("w", [Beat(Signs("a", 1), None)], first=False)
    assert "w" in marks(office), "it is still on its way"
    await back(office, "w", ("a", 1))
    assert marks(office) == {}


async def test_without_any_notice_its_jobs_are_asked_at_once(office: Office) -> None:
    office.give("a", "w")
    await office.desk.leave("w", 0)
    assert office.notices("w") == [Notice("a", 1, "drained")]


@pytest.mark.parametrize("times", [1, 2])
async def test_a_cordon_outlives_a_leave(office: Office, times: int) -> None:
    await office.desk.mark_node("w", cordoned=True, reason="loose cable")
    for _ in range(times):
        await office.desk.leave("w", 1)
    assert marks(office)["w"][:2] == (1, 1)
    await back(office, "w")
    assert marks(office) == {"w": (1, 0, 0, "loose cable")}


async def test_an_operators_drain_outlives_a_leave(office: Office) -> None:
    await office.desk.mark_node("w", draining=True, reason="maintenance")
    await office.desk.leave("w", 1)
    await back(office, "w")
    assert marks(office)["w"][1::2] == (1, "maintenance")


async def test_an_operators_drain_is_not_taken_back_by_a_restart(office: Office) -> None:
    await office.desk.mark_node("w", draining=True, reason="maintenance")
    await back(office, "w")
    assert marks(office)["w"][1::2] == (1, "maintenance")
