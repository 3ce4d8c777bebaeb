"""The reaper acts on reasons, and not on its own absence."""

from __future__ import annotations

from typing import Any

from coordination.leases import Held, LeaseTable, Verdict
from p2p.loops.job_loops import JobReaperConfig, JobReaperLoop


class FakeDesk:
    leads = True

    def __init__(self) -> None:
        self.leases = LeaseTable(lease_ms=30_000)
        self.mono = 1_000_000
        self.expired: list[str] = []

    def mono_ms(self) -> int:
        return self.mono

    def steady_ms(self) -> int:
        return self.mono

    async def expire(self, verdicts: list[Verdict]) -> int:
        self.expired.extend(verdict.held.job for verdict in verdicts)
        for verdict in verdicts:
            self.leases.drop(verdict.held.job)
        return len(verdicts)

    def hold(self, job: str) -> None:
        self.leases.grant(
            Held(
                job=job, attempt=1, worker="w", kind="k", timeout_ms=0, claimed_ms=self.mono, started_ms=self.mono,
                renewed_at=self.mono, alive_at=self.mono,
            )
        )  # fmt: skip


def reaper(desk: FakeDesk, **config: Any) -> JobReaperLoop:
    return JobReaperLoop(desk, JobReaperConfig(**config))  # type: ignore[arg-type]


async def test_a_silent_workers_attempts_are_given_up_after_a_lease() -> None:
    desk = FakeDesk()
    loop = reaper(desk)
    desk.hold("j")
    for _ in range(6):
        await loop.run_once()
        assert desk.expired == []
        desk.mono += 5_000
    await loop.run_once()
    assert desk.expired == ["j"]
    assert loop.stats["jobs_reaped"] == 1


async def test_a_node_that_was_frozen_does_not_reap_its_healthy_jobs_when_it_wakes() -> None:
    desk = FakeDesk()
    loop = reaper(desk)
    desk.hold("j")
    await loop.run_once()
    desk.mono += 3_600_000
    await loop.run_once()
    assert desk.expired == [], "the leader was away, not the worker"
    for _ in range(6):
        desk.mono += 5_000
        await loop.run_once()
    assert desk.expired == ["j"], "a lease later silence counts again"


async def test_one_cycle_reaps_no_more_than_its_limit_and_the_next_follows_at_once() -> None:
    desk = FakeDesk()
    loop = reaper(desk, max_jobs_to_reap_per_cycle=2)
    for n in range(3):
        desk.hold(f"j{n}")
    desk.mono += 30_000
    await loop.run_once()
    assert desk.expired == ["j0", "j1"]
    assert loop._poke.is_set()
    await loop.run_once()
    assert desk.expired == ["j0", "j1", "j2"]
