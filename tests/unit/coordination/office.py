"""A leader's desk with workers, for tests of what it does about nodes."""

from __future__ import annotations

import asyncio
from typing import Any

from coordination import commands as c
from coordination.dispatcher import Dispatcher, Room
from coordination.kinds import Kinds
from coordination.leases import Notice
from coordination.placement import Offer
from tests.unit.coordination.drive import T0, new_job
from tests.unit.coordination.test_new_leader import LEASE, Desk


class Office(Desk):
    """Jobs are numbered as they come. What is told of nodes in trouble is in `told`."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.seqs: dict[str, int] = {}
        self.attempts: dict[str, int] = {}
        self.told: list[tuple[str, str]] = []
        self.desk.on_trouble = lambda node, why: self.told.append((node, why))

    def successor(self) -> Dispatcher:
        """The desk of another node, over the same queue."""
        return Dispatcher(
            journal=self,
            state=self.state,
            read=self.read,
            kinds=Kinds({}, {}),
            clock=self.clock,
            bus=self.bus,
            lease_ms=LEASE,
        )

    def close(self) -> None:
        self.desk.end_term()
        self.reader.close()
        self.state.close()

    def hire(self, *workers: str, cpus: float = 4) -> None:
        """These workers ask for work, and have room."""
        for worker in workers:
            offer = Offer(node=worker, cpus=cpus)
            self.desk.make_room(Room(offer, offer, 8))

    def submit(self, *jobs: str, **changes: Any) -> None:
        made = tuple(new_job(job, **{"max_attempts": 20, **changes}) for job in jobs)
        self.apply(c.Submit(T0, made, "", ""))
        for job in jobs:
            self.seqs[job] = len(self.seqs) + 1

    def give(self, job: str, *workers: str) -> None:
        """The job's next attempt is on this worker; with several it is a gang."""
        if job not in self.seqs:
            self.submit(job)
        if len(workers) > 1:
            self.apply(c.ClaimGang(T0, self.seqs[job], tuple(c.Place(worker, None) for worker in workers)))
        else:
            self.apply(c.Claim(T0, workers[0], (c.Pick(self.seqs[job], None),)))
        self.attempts[job] = self.attempts.get(job, 0) + 1

    def end(self, job: str, worker: str, *, ok: bool, cause: str = "exit") -> None:
        """Its attempt ends."""
        code = 0 if ok else 1
        done = c.AttemptDone(job, self.attempts[job], worker, ok, None, None if ok else "boom", code, True, 0, cause)
        assert self.apply(c.Finish(T0, (done,))) == [None]

    async def run(self, worker: str, *jobs: str, ok: bool, cause: str = "exit") -> None:
        """Each job has an attempt on the worker that ends so, and the desk hears of it and looks round."""
        for job in jobs:
            self.give(job, worker)
            self.end(job, worker, ok=ok, cause=cause)
        await self.turn()

    async def turn(self, ms: int = 0) -> None:
        """Time passes, what has happened is heard of, and the desk looks round."""
        self.clock.advance(ms)
        await asyncio.sleep(0)
        await self.desk.tick()

    def notices(self, worker: str) -> list[Notice]:
        return self.desk.leases.take_notices(worker, self.clock.mono)

    def reason(self, node: str) -> str | None:
        mark = self.desk.marks.get(node)
        return mark.reason if mark is not None else None
