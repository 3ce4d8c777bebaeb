"""Jobs with GPUs are told as stalled after ten idle minutes, others after the hour."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from coordination.leases import Held, LeaseTable, Signs, Verdict
from coordination.stalls import Stalls

MINUTE, HOUR = 60_000, 3_600_000
CLAIMED = 1_700_000_000_000


class Desk:
    """Two jobs, one with a GPU, and a clock that a test moves; every heartbeat comes on time."""

    def __init__(self) -> None:
        self.leases, self.now, self.asked = LeaseTable(), 0, list[str]()
        self.requires: dict[str, dict[str, Any]] = {"gpu": {"gpus": 1}, "cpu": {"cpus": 4}}
        for job in self.requires:
            held = Held(job=job, attempt=1, worker="w", kind="k", timeout_ms=0, claimed_ms=CLAIMED,
                        started_ms=CLAIMED, renewed_at=0, alive_at=0)  # fmt: skip
            self.leases.grant(held)

    def stuck(self, threshold_ms: int) -> list[Verdict]:
        return self.leases.stuck(self.now, CLAIMED + self.now, threshold_ms)

    async def ask(self, question: Callable[[Any], Any]) -> Any:
        return question(self)

    def job(self, job: str, *, history: bool) -> dict[str, Any] | None:
        self.asked.append(job)
        return {"requires": self.requires[job]} if job in self.requires else None

    def passes(self, ms: int, *busy: str) -> None:
        self.now += ms
        self.leases.renew("w", [Signs(job, 1, busy=job in busy) for job in ("gpu", "cpu")], self.now)


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def stalls(desk: Desk) -> Stalls:
    return Stalls(desk, gpu_idle_seconds=600)  # type: ignore[arg-type]


async def names(stalls: Stalls) -> list[str]:
    return sorted(verdict.held.job for verdict in await stalls.now(HOUR))


async def test_ten_idle_minutes_stall_a_job_with_gpus_and_no_other(desk: Desk, stalls: Stalls) -> None:
    desk.passes(10 * MINUTE - 1)
    assert await names(stalls) == []
    desk.passes(1)
    assert await names(stalls) == ["gpu"]
    (verdict,) = await stalls.now(HOUR)
    assert verdict.reason == "its GPUs idle below 5 %, and no output, progress or work, for 600 s"
    desk.passes(49 * MINUTE)
    assert await names(stalls) == ["gpu"]
    desk.passes(MINUTE)
    assert await names(stalls) == ["cpu", "gpu"]


async def test_a_sign_of_life_ends_it(desk: Desk, stalls: Stalls) -> None:
    desk.passes(11 * MINUTE)
    assert await names(stalls) == ["gpu"]
    desk.passes(MINUTE, "gpu")
    assert await names(stalls) == []
    desk.passes(10 * MINUTE)
    assert await names(stalls) == ["gpu"]


async def test_each_silent_attempt_is_looked_up_once(desk: Desk, stalls: Stalls) -> None:
    for _ in range(5):
        desk.passes(10 * MINUTE)
        await stalls.now(HOUR)
    assert sorted(desk.asked) == ["cpu", "gpu"]


async def test_a_job_that_is_forgotten_meanwhile_is_none(desk: Desk, stalls: Stalls) -> None:
    del desk.requires["gpu"]
    desk.passes(11 * MINUTE)
    assert await names(stalls) == []


async def test_a_threshold_below_the_gpus_own_stands_as_it_is(desk: Desk, stalls: Stalls) -> None:
    desk.passes(5 * MINUTE)
    assert len(await stalls.now(5 * MINUTE)) == 2
    assert desk.asked == []


async def test_a_silent_worker_is_no_idle_gpu(desk: Desk, stalls: Stalls) -> None:
    desk.now += 11 * MINUTE
    assert all(verdict.cause == "lease_lapsed" for verdict in desk.stuck(10 * MINUTE))
    assert await names(stalls) == []
