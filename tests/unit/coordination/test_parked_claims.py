"""No claim sleeps through what it waits for: what happens while it looks is looked at too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from coordination import commands as c
from coordination.dispatcher import Room
from coordination.placement import Offer
from tests.unit.coordination.drive import T0, new_job
from tests.unit.coordination.test_new_leader import Desk

FULL, FREE = Offer(node="w1", cpus=0), Offer(node="w1", cpus=4)


class SlowDesk(Desk):
    """Its queries are answered by hand, so that a test can act while a claim looks."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.asked: list[tuple[Future[Any], Callable[[], Any]]] = []

    def query(self, question: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self.asked.append((future, question))
        return future

    async def next_query(self) -> tuple[Future[Any], Callable[[], Any]]:
        async with asyncio.timeout(5):
            while not self.asked:
                await asyncio.sleep(0)
        return self.asked.pop(0)

    async def answer_next(self) -> None:
        future, question = await self.next_query()
        future.set_result(question())

    def submit(self, id: str) -> None:
        self.apply(c.Submit(T0, (new_job(id),), "", ""))


@pytest.fixture
async def slow(tmp_path: Path) -> AsyncIterator[SlowDesk]:
    made = SlowDesk(str(tmp_path / "state.db"))
    await made.desk.begin_term()
    await made.answer_next()  # a new leader looks at the queue once, whoever waits
    yield made
    made.reader.close()
    made.state.close()


async def claim(slow: SlowDesk) -> Any:
    async with asyncio.timeout(5):
        jobs, _ = await slow.desk.claim("w1", wait_seconds=60)
    return [job["id"] for job in jobs]


async def test_room_that_comes_free_while_a_claim_looks_is_used_at_once(slow: SlowDesk) -> None:
    slow.submit("j1")
    slow.desk.make_room(Room(FULL, FREE, 8))
    claiming = asyncio.create_task(claim(slow))
    future, question = await slow.next_query()
    slow.desk.make_room(Room(FREE, FREE, 8))
    future.set_result(question())  # made for the room there was: nothing fits
    await slow.answer_next()
    assert await claiming == ["j1"]


async def test_a_job_that_comes_in_while_a_claim_looks_is_seen_at_once(slow: SlowDesk) -> None:
    slow.desk.make_room(Room(FREE, FREE, 8))
    claiming = asyncio.create_task(claim(slow))
    future, question = await slow.next_query()
    told = question()  # before it came in
    slow.submit("late")
    future.set_result(told)
    await slow.answer_next()
    assert await claiming == ["late"]


async def test_a_claim_whose_asker_has_hung_up_takes_nothing(slow: SlowDesk) -> None:
    slow.submit("j1")
    slow.desk.make_room(Room(FREE, FREE, 8))
    assert await slow.desk.claim("w1", wait_seconds=60, gone=lambda: True) == ([], [])
    assert slow.asked == []
