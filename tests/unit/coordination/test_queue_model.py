"""The queue against its model: the same commands must leave the same jobs, whatever they are.

``P2P_CAMPAIGN=5000`` runs that many examples of twice the length.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordination import commands as c
from coordination.errors import Refused
from coordination.queue_state import EDGES, QueueState, ReadyLane
from coordination.retry import backoff_ms
from tests.unit.coordination.drive import DAY, T0, Queue, connection, dump, new_job
from tests.unit.coordination.model import FINISHED, UNFINISHED, QueueModel, Refusal

AHEAD, AT_ONCE = 3, 2
SHAPES = ('{"cpus":1.0}', '{"gpus":1}')
WORKERS = st.sampled_from(["w1", "w2", "w3"])
NUMBERS = st.integers(0, 1 << 12)
KEYS = st.sampled_from(["", "", "", "k1", "k2"])
LIMITS = st.sampled_from([1, 2, 3, 1_000])


def plain(answer: Any) -> Any:
    """An answer of the queue in the model's terms."""
    if isinstance(answer, Refused):
        return Refusal(answer.status)
    if isinstance(answer, list):
        return [plain(item) for item in answer]
    return answer


class QueueMachine(RuleBasedStateMachine):
    """Any sequence of commands, applied to both."""

    @initialize()
    def begin(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("coordination.arrays.MOST_AHEAD", AHEAD)
        self.patch.setattr("coordination.queue_state.MOST_AT_ONCE", AT_ONCE)
        self.queue = Queue()
        self.model = QueueModel(backoff_ms, ahead=AHEAD, at_once=AT_ONCE)
        self.submitted = 0
        self.untended = False
        self.finished: dict[str, tuple[str, int]] = {}
        self.followed: dict[int, ReadyLane] = {}
        self.followed_to = 0

    def teardown(self) -> None:
        if hasattr(self, "queue"):
            self.same_in_other_batches()
            self.queue.state.close()
            self.patch.undo()

    # -- drawing ---------------------------------------------------------------------------------------------------

    def some(self, number: int, *states: str) -> str:
        """A job in one of these states if there is one; one time in sixteen any job, known or not."""
        fitting = [job.id for job in self.model.in_state(*states)]
        choice = [*self.model.jobs, *self.model.arrays, "unknown"] if number % 16 == 15 or not fitting else fitting
        return choice[number // 16 % len(choice)]

    def apply(self, command: c.Command) -> Any:
        self.tend()
        self.model.now = max(self.model.now, command.at_ms)
        self.untended = True
        return plain(self.queue.apply(command))

    def tend(self) -> None:
        """The model's part of what follows every command; the machine's is done."""
        if self.untended:
            self.model.tend()
        self.untended = False

    # -- rules -----------------------------------------------------------------------------------------------------

    @rule(ms=st.sampled_from([1_000, 1, 30_000, 600_000, -500, 2 * DAY]))
    def time_passes(self, ms: int) -> None:
        self.queue.now += ms

    @rule(
        jobs=st.lists(
            st.fixed_dictionaries(
                {
                    "kind": st.sampled_from(["command", "training"]),
                    "group": st.sampled_from(["default", "team"]),
                    "priority": st.sampled_from([10, 50, 50, 90]),
                    "requires": st.sampled_from(SHAPES),
                    "max_attempts": st.sampled_from([1, 2, 3]),
                    "backoff_ms": st.sampled_from([0, 1_000, 400_000]),
                    "not_before_ms": st.sampled_from([0, 0, 0, T0 - 1, T0 + 20_000]),
                    "unique_key": st.sampled_from([None, None, None, "u1", "u2"]),
                    "no_retry": st.sampled_from(["", "", "1"]),
                    "array": st.sampled_from([*[""] * 8, "1-3", "7,1-4%2", "0-9", "1-9:4%1"]),
                    "deps": st.lists(NUMBERS, max_size=3),
                }
            ),
            min_size=1,
            max_size=4,
        ),
        key=KEYS,
        digest=st.sampled_from(["d1", "d1", "d2"]),
    )
    def submit(self, jobs: list[dict[str, Any]], key: str, digest: str) -> None:
        batch = []
        for fields in jobs:
            known = [*(job.id for job in batch), *self.model.jobs, *self.model.arrays]
            numbers = fields.pop("deps")
            deps = [known[number // 16 % len(known)] if number % 16 < 15 else "unknown" for number in numbers if known]
            self.submitted += 1
            batch.append(new_job(f"j{self.submitted}", **fields, depends_on=tuple(deps)))
        answer = self.apply(c.Submit(self.queue.now, tuple(batch), key, digest))
        expected = self.model.submit(batch, key, digest)
        assert (answer if isinstance(answer, Refusal) else answer["ids"]) == expected

    @precondition(lambda self: self.queue.state.pending_total)
    @rule(worker=WORKERS, n=st.integers(1, 4), number=NUMBERS)
    def claim_the_heads(self, worker: str, n: int, number: int) -> None:
        heads = [head.seq for lane in self.queue.state.changed_lanes(n).lanes for head in lane.heads]
        picks = [*heads[:n], number % (self.model.seq + 2)]  # and one that may be in any state or none
        answer = self.apply(c.Claim(self.queue.now, worker, tuple(c.Pick(seq, None) for seq in picks)))
        assert [(job.id, job.attempt) for job in answer] == self.model.claim(worker, picks)
        assert all(job.token == len(self.queue.entries) for job in answer)

    @precondition(lambda self: self.model.in_state("claimed"))
    @rule(
        number=NUMBERS,
        worker=WORKERS,
        own=st.sampled_from([True, True, False]),
        older=st.sampled_from([0, 0, 0, 1, -1]),
    )
    def begin_one(self, number: int, worker: str, own: bool, older: int) -> None:
        id, attempt, worker = self.attempt_of(number, worker, own, older, "claimed")
        self.apply(c.Begin(self.queue.now, worker, (c.Began(id, attempt, self.queue.now),)))
        self.model.begin(worker, id, attempt)

    @precondition(lambda self: self.model.in_state("claimed", "running"))
    @rule(
        number=NUMBERS,
        worker=WORKERS,
        own=st.sampled_from([True, True, True, False]),
        older=st.sampled_from([0, 0, 0, 1, -1]),
        ok=st.booleans(),
        retryable=st.sampled_from([True, True, False]),
        started=st.booleans(),
        cause=st.sampled_from(["exit", "exit", "timeout", "cuda_oom", "preempted", "drained"]),
        gpu_memory_mb=st.sampled_from([0, 24_000, 40_000]),
        checkpoint=st.sampled_from([None, b'{"step":1}', b'{"step":2}']),
    )
    def finish_one(
        self,
        number: int,
        worker: str,
        own: bool,
        older: int,
        ok: bool,
        retryable: bool,
        started: bool,
        cause: str,
        gpu_memory_mb: int,
        checkpoint: bytes | None,
    ) -> None:
        id, attempt, worker = self.attempt_of(number, worker, own, older, "claimed", "running")
        item = c.AttemptDone(
            id, attempt, worker, ok, b"{}" if ok else None, None if ok else "boom", 0 if ok else 1, retryable,
            self.queue.now if started else 0, "exit" if ok else cause, gpu_memory_mb, checkpoint,
        )  # fmt: skip
        stale = id in self.model.jobs and self.model.jobs[id].attempt != attempt
        before = dump(self.queue.state)["jobs"] if not self.queue.state.arrays_want else None
        (answer,) = self.apply(c.Finish(self.queue.now, (item,)))
        assert answer == self.model.finish(item)
        if stale:
            assert answer == Refusal(409)
            # Any entry makes members of arrays that want some; this one does nothing else.
            assert before is None or dump(self.queue.state)["jobs"] == before

    @precondition(lambda self: self.queue.state.pending_total)
    @rule(worker=WORKERS, ok=st.booleans(), begun=st.booleans())
    def a_worker_does_one_job(self, worker: str, ok: bool, begun: bool) -> None:
        """Claim, begin and finish at once, so that jobs get to their ends often."""
        self.claim_the_heads(worker, 1, 0)
        held = self.model.in_state("claimed")
        self.finish_one(held[0].seq * 16, worker, True, 0, ok, True, begun, "exit", 0, None)

    @precondition(lambda self: self.model.in_state("completed", "failed"))
    @rule(number=NUMBERS, worker=WORKERS)
    def report_the_same_end_again(self, number: int, worker: str) -> None:
        id, attempt, worker = self.attempt_of(number, worker, True, 0, "completed", "failed")
        item = c.AttemptDone(id, attempt, worker, True, None, None, 0, True, 0, "exit")
        (answer,) = self.apply(c.Finish(self.queue.now, (item,)))
        assert answer == self.model.finish(item)

    @precondition(lambda self: self.model.in_state("claimed", "running"))
    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=3), older=st.sampled_from([0, 0, 0, 1]))
    def expire(self, numbers: list[int], older: int) -> None:
        picked = [self.attempt_of(number, "w1", True, older, "claimed", "running")[:2] for number in numbers]
        command = c.Expire(self.queue.now, tuple(c.Lapse(id, attempt, "lease_lapsed") for id, attempt in picked))
        assert self.apply(command) == self.model.expire(picked)

    @precondition(lambda self: self.model.in_state("claimed", "running"))
    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=3), key=KEYS)
    def release(self, numbers: list[int], key: str) -> None:
        ids = tuple(self.some(number, "claimed", "running") for number in numbers)
        assert self.apply(c.Release(self.queue.now, ids, "why", key)) == self.resulting(self.model.release(ids, key))

    @precondition(lambda self: self.model.in_state(*UNFINISHED))
    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=2), key=KEYS)
    def cancel(self, numbers: list[int], key: str) -> None:
        ids = tuple(self.some(number, *UNFINISHED) for number in numbers)
        assert self.apply(c.Cancel(self.queue.now, ids, "why", key)) == self.resulting(self.model.cancel(ids, key))

    @precondition(lambda self: self.model.in_state("failed", "cancelled"))
    @rule(number=NUMBERS, key=KEYS)
    def retry(self, number: int, key: str) -> None:
        id = self.some(number, "failed", "cancelled")
        assert self.apply(c.Retry(self.queue.now, id, key)) == self.resulting(self.model.retry(id, key))

    @precondition(lambda self: self.model.in_state("failed"))
    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=3))
    def retry_many(self, numbers: list[int]) -> None:
        ids = tuple(self.some(number, "failed") for number in numbers)
        failed = {job.id for job in self.model.in_state("failed")}
        retried = self.apply(c.RetryMany(self.queue.now, ids))
        expected = []
        for id in ids:
            if id in failed and id not in expected and not isinstance(self.model.retry(id, ""), Refusal):
                expected.append(id)
        assert retried == expected

    @precondition(lambda self: any(not array.state for array in self.model.arrays.values()))
    @rule(number=NUMBERS)
    def cancel_an_array(self, number: int) -> None:
        open_ones = [array.id for array in self.model.arrays.values() if not array.state]
        ids = (open_ones[number % len(open_ones)],)
        assert self.apply(c.Cancel(self.queue.now, ids, "why", "")) == self.model.cancel(ids, "")

    @precondition(lambda self: any("." in job.id for job in self.model.in_state("failed", "cancelled")))
    @rule(number=NUMBERS)
    def retry_a_member(self, number: int) -> None:
        members = [job.id for job in self.model.in_state("failed", "cancelled") if "." in job.id]
        id = members[number % len(members)]
        assert self.apply(c.Retry(self.queue.now, id, "")) == self.model.retry(id, "")

    @precondition(lambda self: self.model.in_state("waiting"))
    @rule(limit=LIMITS)
    def wake(self, limit: int) -> None:
        assert self.apply(c.Wake(self.queue.now, limit)) == self.model.wake(limit)

    @precondition(lambda self: self.model.seq > 12)
    @rule(number=NUMBERS, include_running=st.booleans(), limit=LIMITS)
    def clear(self, number: int, include_running: bool, limit: int) -> None:
        upto = number % (self.model.seq + 1)
        command = c.Clear(self.queue.now, upto, include_running, limit)
        assert self.apply(command) == self.model.clear(upto, include_running, limit)

    @precondition(lambda self: len(self.model.in_state(*FINISHED)) > 2)
    @rule(
        states=st.sampled_from([FINISHED, ("failed",), ("completed", "cancelled")]),
        age=st.sampled_from([-1, 0, 10_000, 10 * DAY]),
        keep=st.sampled_from([-1, 0, 1, 3]),
        limit=LIMITS,
    )
    def prune(self, states: tuple[str, ...], age: int, keep: int, limit: int) -> None:
        unfinished = {job.id for job in self.model.in_state(*UNFINISHED)}
        before = self.queue.now - age
        command = c.Prune(self.queue.now, states, before, keep, limit)
        assert self.apply(command) == self.model.prune(states, before, keep, limit)
        assert all(self.queue.has(id) for id in unfinished)

    @precondition(lambda self: self.model.books)
    @rule(workers=st.lists(WORKERS, min_size=1, max_size=2, unique=True))
    def forget_workers(self, workers: list[str]) -> None:
        assert self.apply(c.ForgetWorkers(self.queue.now, tuple(workers), "silent")) == self.model.forget(workers)

    def attempt_of(self, number: int, worker: str, own: bool, older: int, *states: str) -> tuple[str, int, str]:
        id = self.some(number, *states)
        job = self.model.jobs.get(id)
        if job is None:
            return id, 1, worker
        return id, job.attempt - older, (job.worker or worker) if own else worker

    @staticmethod
    def resulting(answer: Any) -> Any:
        return answer["ids"] if isinstance(answer, dict) else answer

    # -- what must hold after every step -----------------------------------------------------------------------------

    @invariant()
    def arrays_are_the_models(self) -> None:
        """The first of all: it brings the model to where the machine is."""
        self.tend()
        found = {}
        for row in self.queue.rows("arrays"):
            (seq, id, size, *_), (state, _, finished, blockers, closed, made, parked, pruned, *counts) = (
                row[:9],
                row[9:],
            )
            found[id] = (seq, size, state, finished or 0, blockers, closed, made, parked, pruned, counts)
        expected = {}
        for a in self.model.arrays.values():
            ends = Counter(job.state for job in self.model.members(a, *UNFINISHED, *FINISHED)) + a.gone
            blockers = 0 if a.closed or a.state else len(self.model.unfinished_dependencies(a))
            expected[a.id] = (
                a.seq, len(a.indexes), a.state, a.finished_ms if a.state else 0, blockers, a.closed, a.made,
                len(a.parked), a.pruned, [ends[state] for state in (*UNFINISHED, *FINISHED)],
            )  # fmt: skip
        assert found == expected
        assert self.queue.state.array_backlog == self.model.to_come
        assert self.queue.state.arrays_want == any(self.model.wants(a) for a in self.model.arrays.values())

    @invariant()
    def no_more_of_a_throttled_array_run_than_it_allows(self) -> None:
        for a in self.model.arrays.values():
            if a.at_once:
                assert len(self.model.members(a, "claimed", "running")) <= a.at_once

    @invariant()
    def jobs_are_the_models(self) -> None:
        rows = connection(self.queue.state).execute(
            "SELECT id, seq, state, attempt, failures, worker, checkpoint FROM jobs"
        )
        expected = {
            job.id: (job.seq, job.state, job.attempt, job.failures, job.worker, job.checkpoint)
            for job in self.model.jobs.values()
        }
        assert {row[0]: row[1:] for row in rows.fetchall()} == expected

    @invariant()
    def blocked_by_what_is_unfinished(self) -> None:
        rows = connection(self.queue.state).execute("SELECT id, blockers FROM jobs WHERE state = 'waiting'").fetchall()
        waiting = self.model.in_state("waiting")
        expected = {job.id: len(self.model.unfinished_dependencies(job)) for job in waiting}
        assert dict(rows) == expected
        arrays = [a for a in self.model.arrays.values() if not a.state and not a.closed]
        numbers = {thing.id: thing.seq for thing in (*self.model.jobs.values(), *self.model.arrays.values())}
        numbers |= {f"turn of {a.id}": -a.seq for a in self.model.arrays.values()}
        edges = {(numbers[d], j.seq) for j in (*waiting, *arrays) for d in self.model.unfinished_dependencies(j)}
        assert set(self.queue.rows("deps")) == edges

    @invariant()
    def heads_come_in_order(self) -> None:
        told = self.queue.state.changed_lanes(1_000)
        assert told.whole
        ready = {lane.requires: (lane.shape, lane.jobs) for lane in told.lanes}
        for requires in {*SHAPES, *ready, *(job.requires for job in self.model.jobs.values())}:
            expected = self.model.heads(requires)
            shape, n = ready.get(requires, (0, 0))
            assert n == len(expected)
            assert [head.seq for head in self.queue.state.heads(shape, 1_000)] == expected

    @rule()
    def a_reader_that_follows_the_changes_knows_what_there_is(self) -> None:
        told = self.queue.state.changed_lanes(1_000, self.followed_to)
        if told.whole:
            self.followed.clear()
        self.followed_to = told.upto
        for lane in told.lanes:
            if lane.jobs:
                self.followed[lane.shape] = lane
            else:
                self.followed.pop(lane.shape, None)
        assert sorted(self.followed.values()) == self.queue.state.changed_lanes(1_000).lanes
        assert self.queue.state.changed_lanes(1_000, told.upto).lanes == []

    @invariant()
    def sums_are_recounts(self) -> None:
        jobs = self.model.jobs.values()
        state = self.queue.state
        counts = Counter((job.state, job.new.kind, job.new.group) for job in jobs)
        assert {row[:3]: row[3] for row in self.queue.rows("counts")} == counts
        shapes = {shape: (requires, n) for shape, requires, n in self.queue.rows("shapes")}
        assert dict(shapes.values()) == Counter(job.requires for job in jobs)
        pending = Counter(job.requires for job in jobs if job.state == "pending")
        assert {shapes[shape][0]: n for shape, n in self.queue.rows("shape_counts")} == pending
        assert state.pending_total == pending.total()
        assert state.waiting_total == len(self.model.in_state("waiting"))
        assert state.unfinished_total == len(self.model.in_state(*UNFINISHED))
        assert {(kind, what): n for kind, what, n in self.queue.rows("totals")} == self.model.totals
        books = {row[0]: row[1:4] for row in self.queue.rows("workers")}
        assert books == {w: (b["completed"], b["failed"], b["claimed"]) for w, b in self.model.books.items()}

    @invariant()
    def histories_are_whole_and_legal(self) -> None:
        found: dict[int, list[tuple[int, str, int]]] = {}
        for seq, n, _at, state, attempt, _worker, _reason in self.queue.rows("history"):
            found.setdefault(seq, []).append((n, state, attempt))
        expected = {j.seq: [(n, *step) for n, step in enumerate(j.story, 1)] for j in self.model.jobs.values()}
        assert {seq: sorted(story) for seq, story in found.items()} == expected
        edges = {(str(old) if old else None, str(new)) for old, new in EDGES}
        for job in self.model.jobs.values():
            states = [None, *(state for state, _ in job.story)]
            assert edges.issuperset(pairwise(states))

    @invariant()
    def a_completed_job_stays_completed_by_the_same_attempt(self) -> None:
        for job in self.model.in_state("completed"):
            assert self.finished.setdefault(job.id, (job.state, job.attempt)) == (job.state, job.attempt)
        for id, first in self.finished.items():
            if id in self.model.jobs:
                assert (self.model.jobs[id].state, self.model.jobs[id].attempt) == first

    # -- and at the end ----------------------------------------------------------------------------------------------

    def same_in_other_batches(self) -> None:
        """The same entries in other batches, with a reopening and a replay in the middle, leave the same tables."""
        entries, random = self.queue.entries, Random(len(self.queue.entries))
        with tempfile.TemporaryDirectory() as folder:
            other = QueueState(str(Path(folder) / "state.db"))
            at, reopen_at = 0, random.randint(0, len(entries))
            while at < len(entries):
                n = random.choice([1, 2, 3, 8, 40])
                other.apply_batch(entries[max(at - 3, 0) : at + n])  # the first three are a replay
                at += n
                if at >= reopen_at:
                    reopen_at = len(entries)
                    other.close()
                    other = QueueState(str(Path(folder) / "state.db"))
            assert dump(other) == dump(self.queue.state)
            other.close()


CAMPAIGN = int(os.environ.get("P2P_CAMPAIGN", "0"))
TestQueueAgreesWithItsModel = QueueMachine.TestCase
TestQueueAgreesWithItsModel.settings = settings(
    max_examples=CAMPAIGN or 150,
    stateful_step_count=80 if CAMPAIGN else 40,
    deadline=None,
    database=None,
    derandomize=not CAMPAIGN,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    print_blob=True,
)
