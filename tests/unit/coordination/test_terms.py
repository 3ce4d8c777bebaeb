"""A desk that opens and closes: offices that are cut short, events between two looks, claims that never arrived."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from coordination import commands as c
from coordination.dispatcher import Beat, Room
from coordination.errors import OutcomeUnknown, Refused
from coordination.leases import Held, LeaseTable, Signs
from coordination.placement import Offer
from coordination.queue_reads import QueueReader
from coordination.queue_state import QueueState
from tests.unit.coordination.drive import T0, new_job
from tests.unit.coordination.test_new_leader import LEASE, Desk

FREE = Offer(node="w", cpus=8.0, memory_mb=8_000)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(str(tmp_path / "state.db"))
    desk.apply(c.Submit(T0, (new_job("a"), new_job("b"), new_job("c")), "", ""))
    desk.apply(c.Claim(T0, "w", (c.Pick(1, None), c.Pick(2, None))))
    desk.apply(c.Begin(T0, "w", (c.Began("a", 1, T0),)))
    yield desk
    desk.reader.close()
    desk.state.close()


async def test_a_desk_is_closed_until_its_term_begins_and_after_it_ended(desk: Desk) -> None:
    async def refused() -> None:
        for call in (
            desk.desk.submit([{"command": ["true"]}], batch=False, key="", digest=""),
            desk.desk.claim("w", wait_seconds=0),
            desk.desk.heartbeat("w", [], first=True),
            desk.desk.describe([("a", 1)]),
            desk.desk.finish(()),
            desk.desk.cancel(["a"], "why", key=""),
            desk.desk.clear(include_running=True),
        ):
            with pytest.raises(Refused) as error:
                await call
            assert error.value.status == 503
        with pytest.raises(Refused):
            desk.desk.make_room(Room(FREE, FREE, 1))

    before = desk.state.applied_index
    await refused()
    await desk.desk.begin_term()
    assert desk.desk.leads
    desk.desk.end_term()
    await refused()
    assert desk.state.applied_index == before


async def test_nothing_of_one_term_is_left_in_the_next(desk: Desk) -> None:
    await desk.desk.begin_term()
    desk.desk.make_room(Room(FREE, FREE, 1))
    await desk.desk.heartbeat("v", [], first=False)
    desk.apply(c.Cancel(T0, ("b",), "why"))
    await asyncio.sleep(0)  # its events have been noted
    assert desk.desk.leases.notices
    desk.desk.matching.planner.spoken_for.add(7)
    desk.desk.end_term()
    leases = desk.desk.leases
    assert (desk.desk.rooms, desk.desk.matching.planner.spoken_for) == ({}, set())
    assert (leases.by_job, leases.seen_at, dict(leases.notices)) == ({}, {}, {})
    assert leases.lease_ms == LEASE
    desk.apply(c.Finish(T0, (c.AttemptDone("a", 1, "w", True, None, None, 0, True, T0, "exit"),)))
    await desk.desk.begin_term()
    assert desk.desk.leases.by_job == {}


async def test_a_desk_that_is_closed_listens_to_nothing(desk: Desk) -> None:
    await desk.desk.begin_term()
    desk.desk.end_term()
    desk.apply(c.Claim(T0, "w", (c.Pick(3, None),)))
    await asyncio.sleep(0)
    assert desk.desk.leases.by_job == {}


async def test_events_of_the_term_before_that_were_under_way_are_of_the_queue_all_the_same(desk: Desk) -> None:
    """`on_events` is told on the apply thread, noted on the loop: what was told before the end is noted after the
    next beginning, which has read the same already."""
    await desk.desk.begin_term()
    desk.apply(c.Claim(T0, "w", (c.Pick(3, None),)))  # told; not noted yet
    desk.desk.end_term()
    await desk.desk.begin_term()
    await asyncio.sleep(0)
    leases = desk.desk.leases
    assert sorted(leases.by_job) == ["a", "b", "c"]
    assert leases.by_job["c"].attempt == 1


async def test_whoever_waits_for_work_is_sent_to_the_next_leader_at_once(desk: Desk) -> None:
    await desk.desk.begin_term()
    waiting = [asyncio.create_task(desk.desk.claim(worker, wait_seconds=60)) for worker in ("v", "x")]
    while len(desk.desk.matching._parked) < 2:
        await asyncio.sleep(0)
    desk.desk.end_term()
    async with asyncio.timeout(10):
        for task in waiting:
            with pytest.raises(Refused, match="does not lead"):
                await task


class SlowDesk(Desk):
    """Reads and proposals that take until they are let go."""

    reading: Future[Any] | None = None
    proposing: Future[Any] | None = None
    proposed = 0

    def read(self, question: Any) -> Future[Any]:
        if self.reading is not None:
            return self.reading
        return super().read(question)

    def propose(self, body: bytes) -> Future[Any]:
        self.proposed += 1
        if self.proposing is not None:
            return self.proposing
        return super().propose(body)


@pytest.fixture
async def slow(tmp_path: Path) -> AsyncIterator[SlowDesk]:
    desk = SlowDesk(str(tmp_path / "state.db"))
    desk.apply(c.Submit(T0, (new_job("a"), new_job("b"), new_job("c")), "", ""))
    desk.apply(c.Claim(T0, "w", (c.Pick(1, None),)))
    yield desk
    desk.reader.close()
    desk.state.close()


async def test_an_office_that_is_cut_short_leaves_the_desk_closed(slow: SlowDesk) -> None:
    slow.reading = Future()
    office = asyncio.create_task(slow.desk.begin_term())
    await asyncio.sleep(0)
    office.cancel()
    await asyncio.gather(office, return_exceptions=True)
    slow.desk.end_term()
    assert not slow.desk.leads
    slow.reading = None
    slow.apply(c.Claim(T0, "w", (c.Pick(2, None),)))
    await asyncio.sleep(0)
    assert slow.desk.leases.by_job == {}
    await slow.desk.begin_term()
    assert sorted(slow.desk.leases.by_job) == ["a", "b"]


async def test_an_attempt_that_ends_while_the_office_is_taken_is_given_up_once(slow: SlowDesk) -> None:
    """The rows were read before the end, the end was noted before they were taken up: a ghost. It lapses like any
    other attempt; giving it up changes nothing in the queue, and it is gone."""
    rows, marks = slow.reader.held(), slow.reader.nodes()
    slow.reading = Future()
    office = asyncio.create_task(slow.desk.begin_term())
    await asyncio.sleep(0)
    reading, slow.reading = slow.reading, None
    slow.apply(c.Cancel(T0, ("a",), "why"))
    await asyncio.sleep(0)
    reading.set_result((rows, marks))
    await office
    leases = slow.desk.leases
    if "a" in leases.by_job:
        slow.clock.advance(LEASE)
        assert await slow.desk.expire(leases.lapsed(slow.clock.mono)) == 0
    assert leases.by_job == {}


async def test_a_proposal_of_a_closed_term_still_says_how_it_ended(slow: SlowDesk) -> None:
    await slow.desk.begin_term()
    slow.proposing = Future()
    slow.proposing.set_running_or_notify_cancel()
    asking = asyncio.create_task(slow.desk.cancel(["a"], "why", key=""))
    await asyncio.sleep(0)
    slow.desk.end_term()
    slow.proposing.set_exception(OutcomeUnknown("deposed"))
    with pytest.raises(OutcomeUnknown):
        await asking


async def test_what_was_reserved_for_a_claim_of_a_closed_term_binds_nobody(slow: SlowDesk) -> None:
    await slow.desk.begin_term()
    slow.desk.make_room(Room(FREE, FREE, 1))
    slow.proposing = Future()
    slow.proposing.set_running_or_notify_cancel()
    asking = asyncio.create_task(slow.desk.claim("w", wait_seconds=0))
    proposed = slow.proposed
    while slow.proposed == proposed:
        await asyncio.sleep(0)
    slow.desk.end_term()
    slow.proposing.set_exception(OutcomeUnknown("deposed"))
    with pytest.raises(OutcomeUnknown):
        await asking
    slow.proposing = None
    await slow.desk.begin_term()
    slow.desk.make_room(Room(FREE, FREE, 5))
    jobs, _ = await slow.desk.claim("w", wait_seconds=0)
    assert [job["id"] for job in jobs] == ["b", "c"]


# -- claims that never arrived ---------------------------------------------------------------------------------------

PATIENCE = LEASE // 6


def held(job: str, worker: str = "w", *, at: int = 0, started: int | None = None) -> Held:
    return Held(
        job=job, attempt=1, worker=worker, kind="k", timeout_ms=0, claimed_ms=0, started_ms=started, renewed_at=at,
        alive_at=at,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("attempt", "listed", "now", "lost"),
    [
        pytest.param(held("a"), [], PATIENCE, ["a"], id="given a while ago, and not there"),
        pytest.param(held("a"), [], PATIENCE - 1, [], id="may still be on its way"),
        pytest.param(held("a"), ["a"], PATIENCE, [], id="there"),
        pytest.param(held("a", started=1), [], PATIENCE, [], id="has started: it did arrive"),
        pytest.param(held("a", "v"), [], PATIENCE, [], id="another worker's"),
        pytest.param(held("a", at=PATIENCE), [], PATIENCE + 1, [], id="was listed a moment ago"),
    ],
)
def test_which_claims_never_arrived(attempt: Held, listed: list[str], now: int, lost: list[str]) -> None:
    table = LeaseTable(lease_ms=LEASE)
    table.grant(attempt)
    assert table.never_arrived("w", listed, now, PATIENCE) == lost


async def test_a_claim_whose_answer_was_lost_goes_back_unspent_and_long_before_its_lease_ends(desk: Desk) -> None:
    await desk.desk.begin_term()
    desk.clock.advance(PATIENCE)
    running = Beat(Signs("a", 1), T0)
    await desk.desk.heartbeat("w", [running], first=False)  # some of what it has
    assert "b" in desk.desk.leases.by_job
    assert await desk.desk.heartbeat("w", [running], first=False, whole=True) == ([], [])
    await asyncio.sleep(0)
    assert sorted(desk.desk.leases.by_job) == ["a"]
    job = desk.reader.job("b")
    assert job is not None
    assert (job["state"], job["history"][-1]["reason"]) == ("pending", "released: its worker was never told of it")
    # Should the lost answer arrive after all, its attempt is one to be killed.
    stale, cancelled = await desk.desk.heartbeat("w", [running, Beat(Signs("b", 1), None)], first=False, whole=True)
    assert stale + cancelled == ["b"]


async def test_a_worker_that_lists_what_it_was_given_keeps_it(desk: Desk) -> None:
    await desk.desk.begin_term()
    for _ in range(10):
        desk.clock.advance(PATIENCE)
        beats = [Beat(Signs("a", 1), T0), Beat(Signs("b", 1), None)]
        assert await desk.desk.heartbeat("w", beats, first=False, whole=True) == ([], [])
    assert sorted(desk.desk.leases.by_job) == ["a", "b"]


# -- the reader of a node whose state is replaced --------------------------------------------------------------------


def test_a_reader_follows_the_file_when_a_snapshot_takes_its_place(tmp_path: Path) -> None:
    """It went on reading the file that was no longer there: a new leader took up the leases of a queue long past."""
    path, other = tmp_path / "state.db", tmp_path / "other.db"
    state = QueueState(str(path))
    reader = QueueReader(str(path))
    newer = QueueState(str(other))
    newer.apply_batch([(1, 1, c.encode(c.Submit(T0, (new_job("a"),), "", "")))])
    newer.close()
    with reader.snapshot():
        assert reader.job("a") is None

    def install() -> None:
        for side in ("-wal", "-shm"):
            Path(f"{path}{side}").unlink(missing_ok=True)
        other.replace(path)

    state.replace(install)
    with reader.snapshot():
        assert reader.job("a") is not None
    state.apply_batch([(2, 1, c.encode(c.Submit(T0, (new_job("b"),), "", "")))])
    with reader.snapshot():
        assert reader.job("b") is not None
    reader.close()
    state.close()
