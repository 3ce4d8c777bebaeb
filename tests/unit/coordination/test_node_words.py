"""What is said of nodes: nothing of it is lost, and nothing that somebody else has said is taken back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from coordination import commands as c
from coordination.dispatcher import Room
from coordination.errors import OutcomeUnknown, Refused
from coordination.placement import Offer
from tests.unit.coordination.drive import T0, new_job
from tests.unit.coordination.test_new_leader import Desk

FREE = Offer(node="w", cpus=4)


class Journal(Desk):
    """Commits at once; may keep the answer to itself."""

    silent = False

    def propose(self, body: bytes) -> Future[Any]:
        answer = super().propose(body)
        if self.silent:
            answer = Future()
            answer.set_exception(OutcomeUnknown("no answer"))
        return answer


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Journal]:
    made = Journal(str(tmp_path / "state.db"))
    await made.desk.begin_term()
    yield made
    made.reader.close()
    made.state.close()


def said(desk: Journal, node: str = "w") -> tuple[bool, bool, str] | None:
    found = {mark.node: mark for mark in desk.reader.nodes()}
    mark = found.get(node)
    assert desk.desk.marks.get(node) == mark
    return None if mark is None else (bool(mark.cordoned), bool(mark.draining), mark.reason)


async def test_two_operators_at_once_lose_neither_word(desk: Journal) -> None:
    await asyncio.gather(
        desk.desk.mark_node("w", cordoned=True, reason="odd noises"),
        desk.desk.mark_node("w", draining=True, reason="a new disk"),
    )
    assert said(desk) == (True, True, "a new disk")


async def test_what_remains_keeps_its_reason(desk: Journal) -> None:
    await desk.desk.mark_node("w", draining=True, reason="a new disk")
    await desk.desk.mark_node("w", cordoned=False, reason="operator")
    assert said(desk) == (False, True, "a new disk")


async def test_a_node_that_comes_back_gives_up_its_own_notice(desk: Journal) -> None:
    await desk.desk.leave("w", 10)
    assert said(desk) == (False, True, "its machine is being taken away")
    await desk.desk.heartbeat("w", [], first=True)
    assert said(desk) is None


async def test_a_node_that_comes_back_does_not_lift_an_operators_cordon(desk: Journal) -> None:
    await desk.desk.mark_node("w", cordoned=True, reason="odd noises")
    await desk.desk.leave("w", 10)
    await desk.desk.heartbeat("w", [], first=True)
    assert said(desk) == (True, False, "odd noises")


async def test_a_node_that_comes_back_does_not_lift_an_operators_drain(desk: Journal) -> None:
    await desk.desk.mark_node("w", draining=True, deadline_ms=T0 + 3_600_000, reason="a new disk")
    await desk.desk.leave("w", 10)
    assert desk.desk.marks["w"].deadline_ms == T0 + 10_000
    await desk.desk.heartbeat("w", [], first=True)
    assert said(desk) == (False, True, "a new disk")


async def test_a_word_whose_answer_was_lost_binds_all_the_same(desk: Journal) -> None:
    desk.silent = True
    with pytest.raises(OutcomeUnknown):
        await desk.desk.mark_node("w", cordoned=True, reason="odd noises")
    desk.silent = False
    await desk.desk.tick()
    assert said(desk) == (True, False, "odd noises")
    assert desk.desk.matching.barred == {"w": "cordoned"}


async def test_nothing_is_placed_on_a_node_while_a_word_against_it_is_under_way(desk: Journal) -> None:
    """Else a job would get there after the drain was acknowledged, and after `drained` was told."""
    desk.apply(c.Submit(T0, (new_job("a"),), "", ""))
    barred = []
    propose = desk.propose

    def look(body: bytes) -> Future[Any]:
        barred.append(dict(desk.desk.matching.barred))
        return propose(body)

    desk.propose = look  # type: ignore[method-assign]
    await desk.desk.mark_node("w", draining=True, reason="a new disk")
    assert barred == [{"w": "draining"}]


async def test_a_claim_that_a_deposed_leader_dismisses_is_told_nothing_of_its_node(desk: Journal) -> None:
    """An answer without a word on the node reads as if nothing was said of it any more."""
    await desk.desk.mark_node("w", draining=True, reason="a new disk")
    desk.desk.make_room(Room(FREE, FREE, 1))
    claiming = asyncio.create_task(desk.desk.claim("w", wait_seconds=60))
    while not desk.desk.matching.parked("w"):
        await asyncio.sleep(0)
    desk.desk.end_term()
    with pytest.raises(Refused):
        await claiming


async def test_marks_of_machines_that_never_came_back_are_forgotten_with_them(desk: Journal) -> None:
    await desk.desk.leave("w", 10)
    await desk.desk.mark_node("kept", cordoned=True, reason="odd noises")
    desk.clock.advance(999)
    await desk.desk.forget_machines(1_000)
    assert said(desk) is not None
    desk.clock.advance(1)
    await desk.desk.forget_machines(1_000)
    assert said(desk) is None
    assert said(desk, "kept") == (True, False, "odd noises")


async def test_room_of_a_worker_that_never_claimed_is_forgotten(desk: Journal) -> None:
    desk.desk.make_room(Room(FREE, FREE, 1))
    desk.clock.advance(1_000)
    await desk.desk.clear_inactive_workers(1_000)
    assert desk.desk.rooms == {}
