"""From the queue to parked claims and back: what a round reads, decides and answers (`coordination.matching`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordination import commands as c
from coordination.dispatcher import Room
from coordination.lane import LaneKey, lane_text
from coordination.matching import ENDS_SLACK_MS, MOST_HEADS, master_port
from coordination.placement import Offer
from coordination.planner import NEVER
from tests.unit.coordination.drive import T0, new_job
from tests.unit.coordination.scheduling import box
from tests.unit.coordination.test_new_leader import Desk

SECONDS = 5


class Workers(Desk):
    """A desk, and workers that claim."""

    held_up: Future[Any] | None = None  # the next proposal is answered by this instead

    def propose(self, body: bytes) -> Future[Any]:
        if self.held_up is not None:
            held, self.held_up = self.held_up, None
            return held
        return super().propose(body)

    def submit(self, *ids: str, **changes: Any) -> None:
        jobs = [new_job(id, **{"requires": "{}", **changes}) for id in ids]
        self.apply(c.Submit(self.clock.now, tuple(jobs), "", ""))

    def claim(
        self, offer: Offer, *, places: int = 8, wait: float = 60, total: Offer | None = None, **how: Any
    ) -> asyncio.Task[Any]:
        self.desk.make_room(Room(offer, total or offer, places))
        return asyncio.ensure_future(self.desk.claim(offer.node, wait_seconds=wait, **how))

    async def given(self, claim: asyncio.Task[Any]) -> list[str]:
        async with asyncio.timeout(SECONDS):
            jobs, _ = await claim
        return [job["id"] for job in jobs]

    async def parked(self, n: int) -> None:
        """So many workers wait, and every round has come to its end."""
        matching = self.desk.matching
        async with asyncio.timeout(SECONDS):
            while len(matching._parked) < n or matching._rounds_task is not None:
                await asyncio.sleep(0)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Workers]:
    made = Workers(str(tmp_path / "state.db"))
    await made.desk.begin_term()
    yield made
    made.desk.end_term()
    made.reader.close()
    made.state.close()


async def test_new_job_goes_to_the_best_of_those_that_wait(desk: Workers) -> None:
    gpu, cpu = desk.claim(box("gpu", gpus=2)), desk.claim(box("cpu"))
    await desk.parked(2)
    desk.submit("job")
    assert await desk.given(cpu) == ["job"]
    assert not gpu.done()
    gpu.cancel()


async def test_freed_worker_gets_the_best_job(desk: Workers) -> None:
    desk.submit("low", priority=10)
    desk.submit("high", priority=90)
    desk.submit("huge", priority=99, requires='{"cpus":64}')
    full = replace(box("w"), cpus=0.0)
    claim = desk.claim(full)
    await desk.parked(1)
    desk.desk.make_room(Room(replace(full, cpus=1.0), box("w"), 8))
    assert await desk.given(claim) == ["high"]


async def test_one_claim_gets_as_many_as_it_has_room_for(desk: Workers) -> None:
    desk.submit(*(f"j{n:03}" for n in range(700)), requires='{"cpus":0.01}')
    assert len(await desk.given(desk.claim(box("w"), places=500))) == 500
    assert len(await desk.given(desk.claim(replace(box("v"), cpus=1.0), places=500))) == 100
    assert desk.desk.matching._heads == 500 <= MOST_HEADS


async def test_each_job_goes_to_one_worker(desk: Workers) -> None:
    desk.submit(*(f"j{n}" for n in range(6)))
    claims = [desk.claim(box(f"w{n}", cpus=2)) for n in range(3)]
    given = [await desk.given(claim) for claim in claims]
    assert sorted(job for jobs in given for job in jobs) == [f"j{n}" for n in range(6)]
    assert [len(jobs) for jobs in given] == [2, 2, 2]


async def test_jobs_that_are_being_committed_are_spoken_for(desk: Workers) -> None:
    desk.submit("a", "b")
    desk.held_up = first = Future()
    slow = desk.claim(box("w", cpus=1))
    async with asyncio.timeout(SECONDS):
        while desk.held_up is not None:
            await asyncio.sleep(0)
    assert await desk.given(desk.claim(box("v", cpus=8))) == ["b"]
    first.set_result([])  # it was not there any more, says the queue; it is looked again
    assert await desk.given(slow) == ["a"]


async def test_worker_that_hangs_up_while_it_waits_is_passed_over(desk: Workers) -> None:
    gone = False
    first = desk.claim(box("tight", cpus=1), gone=lambda: gone)
    second = desk.claim(box("roomy", cpus=8))
    await desk.parked(2)
    gone = True
    desk.submit("job")
    assert await desk.given(second) == ["job"]
    assert await desk.given(first) == []
    job = desk.reader.job("job")
    assert job is not None
    assert job["attempt"] == 1


async def test_claim_that_is_cancelled_during_its_commit_gives_the_job_back(desk: Workers) -> None:
    desk.submit("job")
    desk.held_up = commit = Future()
    claim = desk.claim(box("w"))
    async with asyncio.timeout(SECONDS):
        while desk.held_up is not None:
            await asyncio.sleep(0)
    claim.cancel()
    await asyncio.gather(claim, return_exceptions=True)
    commit.set_result(desk.apply(c.Claim(T0, "w", (c.Pick(1, None),))))
    assert await desk.given(desk.claim(box("v"))) == ["job"]
    job = desk.reader.job("job")
    assert job is not None
    assert (job["worker"], job["attempt"]) == ("v", 2)


async def test_worker_that_asks_only_once_is_answered_at_once(desk: Workers) -> None:
    assert await desk.given(desk.claim(box("w"), wait=0)) == []
    desk.submit("job")
    assert await desk.given(desk.claim(box("w"), wait=0)) == ["job"]


async def test_question_that_fails_is_everybodys_answer_and_then_forgotten(desk: Workers) -> None:
    asked = desk.query
    desk.query = lambda question: desk_failed()  # type: ignore[method-assign]

    def desk_failed() -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(RuntimeError("disk"))
        return future

    claims = [desk.claim(box("w")), desk.claim(box("v"))]
    for claim in claims:
        with pytest.raises(RuntimeError, match="disk"):
            await claim
    desk.query = asked  # type: ignore[method-assign]
    desk.submit("job")
    assert await desk.given(desk.claim(box("w"))) == ["job"]


async def test_node_that_is_barred_gets_nothing_until_it_is_not(desk: Workers) -> None:
    await desk.desk.mark_node("w", cordoned=True, reason="why")
    claim = desk.claim(box("w"))
    desk.submit("job")
    await desk.parked(1)
    assert not claim.done()
    await desk.desk.mark_node("w", cordoned=False, reason="why")
    assert await desk.given(claim) == [], "it hears of it with the answer"
    assert await desk.given(desk.claim(box("w"))) == ["job"]


# -- what runs ---------------------------------------------------------------------------------------------------------


def limited(seconds: int, **requires: Any) -> dict[str, Any]:
    """A job with a time limit, as a submission would write it; its grace is half a minute."""
    text = lane_text(requires, LaneKey("default", "command", (seconds + 30) * 1000, True))
    return {"requires": text, "timeout_ms": seconds * 1000}


async def test_attempt_is_known_to_end_when_its_limits_end_it(desk: Workers) -> None:
    desk.submit("bounded", **limited(60))
    desk.submit("endless")
    await desk.given(desk.claim(box("w")))
    running = desk.desk.matching.planner.running["w"]
    assert running["bounded"].ends_ms == desk.clock.mono + 60_000 + 30_000 + ENDS_SLACK_MS
    assert running["endless"].ends_ms == NEVER


async def test_new_leader_takes_up_what_runs(desk: Workers) -> None:
    desk.submit("a", **limited(60))
    await desk.given(desk.claim(box("w", cpus=1)))
    desk.apply(c.Begin(desk.clock.now, "w", (c.Began("a", 1, desk.clock.now),)))
    desk.desk.end_term()
    desk.clock.advance(20_000)
    await desk.desk.begin_term()
    attempt = desk.desk.matching.planner.running["w"]["a"]
    assert attempt.ends_ms - desk.clock.mono == 40_000 + 30_000 + ENDS_SLACK_MS
    assert attempt.started_ms == desk.clock.mono - 20_000
    desk.submit("b")
    claim = desk.claim(box("w", cpus=1))  # it has not heard of its own job yet: the books know
    await desk.parked(1)
    assert not claim.done()
    claim.cancel()


async def test_room_is_free_again_once_both_sides_say_so(desk: Workers) -> None:
    desk.submit("a", "b")
    assert await desk.given(desk.claim(box("w", cpus=1))) == ["a"]
    claim = desk.claim(box("w", cpus=1))
    await desk.parked(1)
    assert not claim.done()
    done = c.AttemptDone("a", 1, "w", True, None, None, 0, True, T0, "exit")
    await desk.desk.finish((done,))
    assert await desk.given(claim) == ["b"]


async def test_gang_is_told_to_all_its_members_at_once(desk: Workers) -> None:
    desk.submit("gang", requires='{"gpus":2,"nodes":3}')
    desk.desk.address_of = lambda node: f"{node}.example"
    claims = [desk.claim(box(f"w{n}", gpus=2)) for n in range(2)]
    await desk.parked(2)
    claims.append(desk.claim(box("w2", gpus=2)))
    told = {}
    for n, claim in enumerate(claims):
        async with asyncio.timeout(SECONDS):
            ((job,), _) = await claim
        told[job["gang"]["rank"]] = (f"w{n}", job)
    assert sorted(told) == [0, 1, 2]
    names = [told[rank][0] for rank in range(3)]
    for rank in range(3):
        gang = told[rank][1]["gang"]
        assert gang["members"] == names
        assert gang["master_addr"] == f"{names[0]}.example"
        assert gang["master_port"] == master_port(told[rank][1]["token"])
        assert len(told[rank][1]["gpus"]) == 2
    assert sorted(desk.desk.matching.planner.running) == ["w0", "w1", "w2"]


async def test_urgent_work_has_others_make_way_and_gets_their_room(desk: Workers) -> None:
    desk.submit("low", priority=10)
    offer = box("w", cpus=1)
    assert await desk.given(desk.claim(offer)) == ["low"]
    waiting = desk.claim(replace(offer, cpus=0.0), total=offer)
    desk.submit("urgent", priority=90)
    await desk.parked(1)
    await desk.desk.tick()
    await desk.parked(1)
    desk.clock.advance(5_000)
    await desk.desk.tick()
    async with asyncio.timeout(SECONDS):
        jobs, notices = await waiting
    assert (jobs, [tuple(notice) for notice in notices]) == ([], [("low", 1, "preempted")])
    gone = c.AttemptDone("low", 1, "w", False, None, "preempted", 143, True, T0, "preempted")
    await desk.desk.finish((gone,))
    assert await desk.given(desk.claim(offer)) == ["urgent"]
    job = desk.reader.job("low")
    assert job is not None
    assert (job["state"], job["history"][-1]["reason"]) == ("pending", "released: preempted")
