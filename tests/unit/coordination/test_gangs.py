"""Gangs at the desk: each member is its own to start, to be blamed and to be forgotten."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from coordination import commands as c
from coordination.dispatcher import Beat
from coordination.leases import Signs
from tests.unit.coordination.drive import T0, Queue, connection, new_job
from tests.unit.coordination.test_new_leader import LEASE, Desk

GANG = c.ClaimGang(T0, 1, (c.Place("w0", None), c.Place("w1", None)))


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    made = Desk(str(tmp_path / "state.db"))
    gang = new_job("g", spec=b'{"command":["true"],"nodes":2}', requires='{"cpus":1.0,"nodes":2}')
    made.apply(c.Submit(T0, (gang,), "", ""))
    yield made
    made.reader.close()
    made.state.close()


def column(desk: Desk, name: str) -> Any:
    record = desk.reader.job("g")
    assert record is not None
    return record[name]


def beat(*, attempt: int = 1) -> list[Beat]:
    return [Beat(Signs("g", attempt), T0)]


@pytest.mark.parametrize("then", ["the same leader", "another leader"])
async def test_a_member_that_was_never_told_of_its_gang_is_missed_though_another_has_started(
    desk: Desk, then: str
) -> None:
    await desk.desk.begin_term()
    await desk.desk.propose(GANG)
    await desk.desk.heartbeat("w1", beat(), first=False, whole=True)
    assert column(desk, "state") == "running"
    if then == "another leader":
        await desk.desk.begin_term()
    desk.clock.advance(LEASE // 2)
    await desk.desk.heartbeat("w1", beat(), first=False, whole=True)
    await desk.desk.heartbeat("w0", [], first=False, whole=True)
    assert (column(desk, "state"), column(desk, "failed_attempts")) == ("pending", 0)


async def test_every_member_that_starts_is_told_to_the_queue(desk: Desk) -> None:
    await desk.desk.begin_term()
    await desk.desk.propose(GANG)
    await desk.desk.heartbeat("w1", beat(), first=False)
    await desk.desk.heartbeat("w0", beat(), first=False)
    assert [member["state"] for member in column(desk, "members")] == ["running", "running"]


async def test_a_ghost_of_a_gang_is_given_up_once_and_then_forgotten(desk: Desk) -> None:
    """Whichever of its members lapses first."""
    await desk.desk.begin_term()
    await desk.desk.propose(GANG)
    unheard = c.encode(c.Cancel(T0, ("g",), "why"))
    desk.state.apply_batch([(desk.state.applied_index + 1, 1, unheard)])
    desk.clock.advance(LEASE)
    desk.desk.leases.of("w0", "g").renewed_at = desk.clock.mono  # type: ignore[union-attr]
    (verdict,) = desk.desk.leases.lapsed(desk.clock.mono)
    assert verdict.held.worker == "w1"
    assert await desk.desk.expire([verdict]) == 0
    assert not desk.desk.leases.by_job
    assert not desk.desk.leases.by_worker


async def test_a_gang_that_is_told_of_by_rows_and_by_events_is_held_once(desk: Desk) -> None:
    desk.before_reading = lambda: desk.apply(GANG)
    await desk.desk.begin_term()
    desk.before_reading = lambda: None
    await desk.desk.begin_term()
    await desk.desk.ask(lambda reader: None)
    desk.desk._grant(next(event for _, event in desk.bus.tail(0) if event.type == "WORK_CLAIMED"))
    assert [held.worker for held in desk.desk.leases.gangs["g"]] == ["w0", "w1"]


def test_what_fails_with_one_member_is_held_against_its_node_and_no_other(tmp_path: Path) -> None:
    queue = Queue(str(tmp_path / "state.db"))
    gang = new_job("g", spec=b'{"command":["true"],"nodes":2}', requires='{"cpus":1.0,"nodes":2}')
    queue.submit(gang)
    queue.apply(GANG)
    queue.begin("g", worker="w0")
    queue.finish("g", ok=False, worker="w1")
    assert queue.column("g", "failed_on") == '["w1"]'
    assert queue.events[-1].fields["worker"] == "w1"


def test_the_silence_of_one_member_is_held_against_its_node_and_no_other(tmp_path: Path) -> None:
    queue = Queue(str(tmp_path / "state.db"))
    queue.submit(new_job("g", spec=b'{"command":["true"],"nodes":2}', requires='{"cpus":1.0,"nodes":2}'))
    queue.apply(GANG)
    queue.begin("g", worker="w0")
    queue.apply(c.Expire(queue.now, (c.Lapse("g", 1, "lease_lapsed", "w1"),)))
    assert queue.column("g", "failed_on") == '["w1"]'
    assert "worker w1 stopped" in queue.column("g", "error")


def test_a_worker_whose_member_has_ended_well_may_go(tmp_path: Path) -> None:
    queue = Queue(str(tmp_path / "state.db"))
    gang = new_job("g", spec=b'{"command":["true"],"nodes":2}', requires='{"cpus":1.0,"nodes":2}')
    queue.submit(gang)
    queue.apply(GANG)
    queue.begin("g", worker="w0")
    queue.finish("g", worker="w0")
    queue.apply(c.ForgetWorkers(queue.now, ("w0",), "silent"))
    assert queue.column("g", "state") == "running"
    queue.finish("g", worker="w1")
    assert queue.column("g", "state") == "completed"


async def test_the_books_of_each_worker_count_its_member(desk: Desk) -> None:
    desk.apply(GANG)
    assert {book.worker: book.assigned for book in desk.reader.workers()} == {"w0": 1, "w1": 1}
    done = c.AttemptDone("g", 1, "w0", True, None, None, 0, True, T0, "exit")
    desk.apply(c.Finish(T0, (done,)))
    assert {book.worker: book.assigned for book in desk.reader.workers()} == {"w0": 0, "w1": 1}


def test_of_the_results_of_a_gang_only_the_first_is_kept(tmp_path: Path) -> None:
    queue = Queue(str(tmp_path / "state.db"))
    queue.submit(new_job("g", spec=b'{"command":["true"],"nodes":2}', requires='{"cpus":1.0,"nodes":2}'))
    queue.apply(GANG)
    for worker in ("w0", "w1"):
        queue.finish("g", worker=worker, result=b'"of %s"' % worker.encode())
    assert queue.column("g", "result") == b'"of w0"'
    rows = connection(queue.state).execute("SELECT rank, result FROM members ORDER BY rank").fetchall()
    assert rows == [(0, b'"of w0"'), (1, None)]
