"""The real queue and the real leases in the place of `model`: `coordination.queue_state` on SQLite in memory, and
`coordination.leases`. A share of the seeds runs on them; they speak the model's commands, translated.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any
from unittest.mock import patch
from zlib import crc32

import apsw

from coordination import commands as c
from coordination.errors import Refused
from coordination.leases import Held, LeaseTable, Signs
from coordination.queue_state import QueueState
from p2p.effects import COMMAND, Entry
from tests.simulation import model
from tests.simulation.workload import dump, new_job

_connect = apsw.Connection
LEASE_MS = int(model.LEASE_SECONDS * 1000)


class RealQueue:
    """What `node` and `desk` need of a state machine."""

    def __init__(self, saved: bytes | None = None) -> None:
        connection = _connect(":memory:")
        if saved is not None:
            connection.deserialize("main", saved)
        with patch("coordination.queue_state.apsw.Connection", lambda path: connection):
            self._state = QueueState(":memory:")
        self.digest = 0

    @property
    def applied_index(self) -> int:
        return self._state.applied_index

    @property
    def jobs(self) -> list[Any]:
        return self._rows("SELECT id FROM jobs")

    def _rows(self, question: str, *values: Any) -> list[Any]:
        return self._state._run(question, values).fetchall()

    def copy(self) -> RealQueue:
        twin = RealQueue(self._state._db.serialize("main"))
        twin.digest = self.digest
        return twin

    def apply(self, entry: Entry) -> tuple[int, ...]:
        body = entry.body if entry.kind == COMMAND else b""
        ((answer, events),) = self._state.apply_batch([(entry.index, entry.term, body)])
        self.digest = crc32(repr((self.digest, entry.index, answer, events)).encode())
        return _plain(answer, c.decode(body)) if body else ()

    def body(self, command: model.Command) -> bytes:
        return c.encode(self._translated(command))

    def _translated(self, command: model.Command) -> Any:
        at, job = command.at_ms, f"j{command.job}"
        if isinstance(command, model.Submit):
            return c.Submit(at, (new_job(job, f"k{command.key}", max_attempts=1_000),), f"k{command.key}", "digest")
        if isinstance(command, model.Claim):
            found = self._rows("SELECT seq FROM jobs WHERE id = ?", job)
            return c.Claim(at, f"w{command.worker}", (c.Pick(found[0][0] if found else 0, f"[{command.job}]"),))
        if isinstance(command, model.Finish):
            done = c.AttemptDone(
                job, command.attempt, f"w{command.worker}", True, None, None, 0, True, at, "exit"
            )  # fmt: skip
            return c.Finish(at, (done,))
        if isinstance(command, model.Expire):
            return c.Expire(at, (c.Lapse(job, command.attempt, "lease_lapsed"),))
        return c.Release(at, (job,), "operator", f"r{command.key}")

    @staticmethod
    def decode(body: bytes) -> model.Command:
        return _decode(body)

    def content(self) -> int:
        return crc32(repr(dump(self._state._db)).encode())

    def pending(self) -> list[int]:
        return [int(row[0][1:]) for row in self._rows("SELECT id FROM jobs WHERE state = 'pending' ORDER BY seq")]

    def claimed(self) -> list[tuple[int, int, int]]:
        found = self._rows("SELECT id, attempt, worker FROM jobs WHERE state IN ('claimed', 'running') ORDER BY seq")
        return [(int(job[1:]), attempt, int(worker[1:])) for job, attempt, worker in found]

    @staticmethod
    def leases() -> RealLeases:
        return RealLeases()

    def jobs_by_key(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for job, group in self._rows("SELECT id, grp FROM jobs ORDER BY seq"):
            found.setdefault(int(group[1:]), []).append(int(job[1:]))
        return found


class RealLeases:
    """`coordination.leases` behind the model's questions."""

    def __init__(self) -> None:
        self._table = LeaseTable(lease_ms=LEASE_MS)

    def grant(self, job: int, attempt: int, worker: int, now: float) -> None:
        at = int(now * 1000)
        held = Held(
            job=f"j{job}",
            attempt=attempt,
            worker=f"w{worker}",
            kind="custom",
            timeout_ms=0,
            claimed_ms=at,
            started_ms=None,
            renewed_at=at,
            alive_at=at,
        )
        self._table.grant(held)

    def drop(self, job: int) -> None:
        self._table.drop(f"j{job}")

    def renew(self, worker: int, held: list[tuple[int, int]], now: float) -> list[int]:
        signs = [Signs(f"j{job}", attempt) for job, attempt in held]
        stale, cancel = self._table.renew(f"w{worker}", signs, int(now * 1000))
        return [int(job[1:]) for job in (*stale, *cancel)]

    def lapsed(self, now: float) -> list[tuple[int, int]]:
        return [(int(v.held.job[1:]), v.held.attempt) for v in self._table.lapsed(int(now * 1000))]


@lru_cache(maxsize=4_096)
def _decode(body: bytes) -> model.Command:
    command = c.decode(body)
    at = command.at_ms
    if isinstance(command, c.Submit):
        return model.Submit(at, int(command.key[1:]), int(command.jobs[0].id[1:]))
    if isinstance(command, c.Claim):
        return model.Claim(at, json.loads(command.picks[0].gpus or "[0]")[0], int(command.worker[1:]))
    if isinstance(command, c.Finish):
        done = command.items[0]
        return model.Finish(at, int(done.id[1:]), done.attempt, int(done.worker[1:]))
    if isinstance(command, c.Expire):
        lapse = command.items[0]
        return model.Expire(at, int(lapse.id[1:]), lapse.attempt)
    assert isinstance(command, c.Release)
    return model.Release(at, int(command.ids[0][1:]), int(command.key[1:]))


def _plain(answer: Any, command: c.Command) -> tuple[int, ...]:
    """The model's answer to the same command."""
    if isinstance(answer, Refused) or answer == []:
        return model.REFUSED
    if isinstance(command, c.Submit):
        return (int(answer["ids"][0][1:]),)
    if isinstance(command, c.Claim):
        return (int(answer[0].id[1:]), answer[0].attempt, answer[0].token)
    if isinstance(command, c.Finish):
        return model.REFUSED if answer[0] is not None else (1,)
    if isinstance(command, c.Expire):
        return (1,) if answer else model.REFUSED
    return (1,)
