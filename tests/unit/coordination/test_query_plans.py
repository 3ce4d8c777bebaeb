"""What a command costs does not grow with the queue: every hot statement has an index, and a claim's work is flat."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordination import commands as c
from coordination.queue_reads import QueueReader
from coordination.queue_state import QueueState
from coordination.sql import statements
from tests.unit.coordination.drive import T0, connection, new_job

# These read whole tables on purpose; none of those grows with the number of jobs, but that of `ahead`, which is asked
# on the reader's thread when a person looks at one pending job.
SMALL = {
    "ahead": "jobs",
    "counts": "counts",
    "totals": "totals",
    "workers": "w",
    "shape_counts": "c",
    "keys_beyond": "keys",
    "nodes": "nodes",
    "schedules": "schedules",
}


@pytest.fixture(scope="module")
def empty() -> QueueState:
    return QueueState(":memory:")


@pytest.mark.parametrize("name", sorted(statements()))
def test_statement_is_answered_by_an_index(empty: QueueState, name: str) -> None:
    statement = statements()[name]
    numbered = set(re.findall(r"\?(\d+)", statement))
    values = (1,) * (len(numbered) or statement.count("?"))
    plan = [str(row[3]) for row in connection(empty).execute(f"EXPLAIN QUERY PLAN {statement}", values)]
    for step in plan:
        assert "TEMP B-TREE" not in step, f"{name} sorts: {step}"
        scanned = re.match(r"SCAN (\w+)", step)
        assert scanned is None or SMALL.get(name) == scanned[1], f"{name} reads a whole table: {step}"


def steps(state: QueueState, work: Callable[[], Any]) -> int:
    """How many instructions of SQLite's virtual machine `work` takes."""
    n = 0

    def count() -> bool:
        nonlocal n
        n += 1
        return False

    connection(state).set_progress_handler(count, 1)
    try:
        work()
    finally:
        connection(state).set_progress_handler(None)
    return n


def filled(n: int) -> QueueState:
    state = QueueState(":memory:")
    jobs = [new_job(f"j{k}", priority=k % 100, requires=f'{{"gpus":{k % 5}}}') for k in range(n)]
    state.apply_batch([(1, 1, c.encode(c.Submit(T0, tuple(jobs), "", "")))])
    waiting = tuple(new_job(f"w{k}", not_before_ms=T0 + 1_000 + k) for k in range(n))
    state.apply_batch([(2, 1, c.encode(c.Submit(T0, waiting, "", "")))])
    return state


@pytest.fixture(scope="module")
def small() -> QueueState:
    return filled(10)


@pytest.fixture(scope="module")
def large() -> QueueState:
    return filled(50_000)


def choose(state: QueueState) -> list[int]:
    return [head.seq for lane in state.changed_lanes(2).lanes for head in lane.heads]


def step(state: QueueState, command: c.Command) -> Any:
    return state.apply_batch([(state.applied_index + 1, 1, c.encode(command))])[0][0]


def a_life(state: QueueState) -> dict[str, int]:
    """The cost of each command in the life of one job, in the presence of all the others."""
    seq = choose(state)[0]
    (job,) = [(job := step(state, c.Claim(T0, "w", (c.Pick(seq, None),))))]
    id = job[0].id
    done = c.AttemptDone(id, 2, "w", True, None, None, 0, True, 0, "exit")
    return {
        "choose": steps(state, lambda: choose(state)),
        "release": steps(state, lambda: step(state, c.Release(T0, (id,), "why"))),
        "claim": steps(state, lambda: step(state, c.Claim(T0, "w", (c.Pick(seq, None),)))),
        "begin": steps(state, lambda: step(state, c.Begin(T0, "w", (c.Began(id, 2, T0),)))),
        "finish": steps(state, lambda: step(state, c.Finish(T0, (done,)))),
        "wake": steps(state, lambda: step(state, c.Wake(T0 + 1_001, 2))),
        "submit": steps(state, lambda: step(state, c.Submit(T0, (new_job(f"late{seq}"),), "key", "d"))),
        "clear": steps(state, lambda: step(state, c.Clear(T0, 1 << 40, False, 2))),
        "prune": steps(state, lambda: step(state, c.Prune(T0, ("completed", "cancelled"), T0 + 9_999, -1, 1))),
    }


def test_cost_of_a_command_does_not_grow_with_the_queue(small: QueueState, large: QueueState) -> None:
    few, many = a_life(small), a_life(large)
    assert min(few.values()) > 10, "the counter counts"
    grown = {name: (few[name], many[name]) for name in few if many[name] > 2 * few[name]}
    assert not grown


def test_the_counter_would_see_a_scan(small: QueueState, large: QueueState) -> None:
    scan = "SELECT count(*) FROM jobs WHERE timeout_ms = 1"
    costs = [steps(state, lambda state=state: connection(state).execute(scan).fetchall()) for state in (small, large)]
    assert costs[1] > 100 * costs[0]


def chain(n: int) -> list[c.NewJob]:
    return [new_job("root"), *(new_job(f"j{k}", depends_on=(f"j{k - 1}" if k else "root",)) for k in range(n - 1))]


def fan_out(n: int) -> list[c.NewJob]:
    return [new_job("root"), *(new_job(f"j{k}", depends_on=("root",)) for k in range(n - 1))]


def diamond(n: int) -> list[c.NewJob]:
    """A thousand that wait for the root, one that waits for them, and so on."""
    jobs = [new_job("root")]
    while len(jobs) < n:
        width = min(999, n - len(jobs) - 1) or 1
        last = jobs[-1].id
        layer = [new_job(f"j{len(jobs)}.{k}", depends_on=(last,)) for k in range(width)]
        jobs += [*layer, new_job(f"d{len(jobs)}", depends_on=tuple(job.id for job in layer))]
    return jobs


def settle(jobs: list[c.NewJob], *, ok: bool) -> tuple[int, float]:
    """(instructions, seconds) of the one command by which the root ends."""
    state = QueueState(":memory:")
    step(state, c.Submit(T0, tuple(jobs), "", ""))
    (root,) = step(state, c.Claim(T0, "w", (c.Pick(1, None),)))
    done = c.AttemptDone(root.id, 1, "w", ok, None, None, 0 if ok else 1, False, 0, "exit")
    began = time.perf_counter()
    cost = steps(state, lambda: step(state, c.Finish(T0, (done,))))
    assert state.unfinished_total == (len(jobs) - 1 if ok else 0)
    return cost, time.perf_counter() - began


@pytest.mark.parametrize("ok", [True, False], ids=["completed", "failed"])
@pytest.mark.parametrize("shape", [chain, fan_out, diamond])
def test_end_of_a_root_costs_what_it_settles(shape: Callable[[int], list[c.NewJob]], ok: bool) -> None:
    small, large = settle(shape(1_000), ok=ok)[0], settle(shape(8_000), ok=ok)[0]
    assert large < 10 * small


@pytest.mark.parametrize("shape", [chain, fan_out, diamond])
def test_ten_thousand_jobs_are_settled_at_once(shape: Callable[[int], list[c.NewJob]]) -> None:
    state = QueueState(":memory:")
    step(state, c.Submit(T0, tuple(shape(10_000)), "", ""))
    began = time.perf_counter()
    step(state, c.Cancel(T0, ("root",), "enough"))
    assert state.unfinished_total == 0
    assert time.perf_counter() - began < 5


def test_reader_answers_every_question_on_a_real_file(tmp_path: Path) -> None:
    """Each named question is asked once: a statement that SQLite cannot plan fails here and not at an operator's."""
    path = str(tmp_path / "state.db")
    state = QueueState(path)
    step(state, c.Submit(T0, (new_job("a", max_attempts=1), new_job("b"), new_job("c", not_before_ms=T0 + 5)), "", ""))
    step(state, c.Claim(T0, "w", (c.Pick(1, '["GPU-1"]'), c.Pick(2, None))))
    step(state, c.Finish(T0 + 1, (c.AttemptDone("a", 1, "w", False, None, "boom", 3, True, T0, "exit"),)))
    reader = QueueReader(path)
    (failure,) = reader.recent_failures(5)
    assert (failure["id"], failure["error"], failure["exit_code"], failure["failed_at"]) == (
        "a",
        "boom",
        3,
        (T0 + 1) / 1000,
    )
    assert [row.job for row in reader.held()] == ["b"]
    assert reader.next_due_ms() == T0 + 5
    assert reader.oldest_pending_ms() is None
    assert reader.last_completion_ms() is None
    assert reader.last_seq() == 3
    assert reader.applied() == (1, 3)
    assert [tuple(book) for book in reader.workers()] == [("w", 0, 1, 1)]
    assert {(state, n) for state, _, _, n in reader.counts()} == {("failed", 1), ("claimed", 1), ("waiting", 1)}
    assert reader.shapes() == []
    assert reader.totals()[("command", "submitted")] == 3
    assert (T0 // 60_000, "command", "failed", 1) in reader.ends_since(T0 // 60_000)
    record = reader.job("a")
    assert record is not None
    assert [step["state"] for step in record["history"]] == ["pending", "claimed", "running", "failed"]
    page, cursor = reader.jobs(filters={"state": "claimed"}, limit=10, before=None)
    assert ([job["id"] for job in page], cursor) == (["b"], None)
    page, cursor = reader.jobs(filters={"kind": "command", "grp": "default"}, limit=2, before=None)
    assert [job["id"] for job in page] == ["c", "b"]
    assert [job["id"] for job in reader.jobs(filters={}, limit=2, before=cursor)[0]] == ["a"]
    reader.close()
    state.close()
