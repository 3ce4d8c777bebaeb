"""What a failure leads to: another try elsewhere, or none, and what the next attempt is handed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordination import commands as c
from coordination.events import EventType as E
from coordination.job import exit_codes, is_exit_code_of
from coordination.queue_reads import QueueReader
from coordination.queue_state import MAX_AVOIDED, MAX_ERROR_CHARS
from tests.unit.coordination.drive import Queue, new_job


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    queue = Queue(str(tmp_path / "state.db"))
    yield queue
    queue.state.close()


def record(queue: Queue, id: str) -> dict[str, Any]:
    reader = QueueReader(str(queue.state._path))
    found = reader.job(id)
    reader.close()
    assert found is not None
    return found


def fail(queue: Queue, id: str, *, worker: str = "w1", **changes: Any) -> c.Command | Any:
    """One attempt that fails on `worker`; answers what the claim gave."""
    (claimed,) = queue.claim(id, worker=worker)
    assert queue.finish(id, ok=False, attempt=claimed.attempt, worker=worker, **changes) is None
    return claimed


# -- away from where it failed ---------------------------------------------------------------------------------------


def test_retry_avoids_the_last_workers_where_it_failed(queue: Queue) -> None:
    queue.submit(new_job("a", max_attempts=10))
    seen = []
    for worker in ("w3", "w1", "w2", "w3", "w4"):
        fail(queue, "a", worker=worker)
        seen.append(record(queue, "a")["placement_hints"]["avoid"])
    assert seen == [["w3"], ["w1", "w3"], ["w1", "w2", "w3"], ["w1", "w2", "w3"], ["w2", "w3", "w4"]]
    assert MAX_AVOIDED == 3
    assert record(queue, "a")["requires"] == {"cpus": 1.0}, "what its author asked for is told as it was"


def test_attempt_that_nobody_answers_for_is_retried_elsewhere(queue: Queue) -> None:
    queue.submit(new_job("a"))
    queue.claim("a")
    queue.begin("a")
    queue.apply(c.Expire(queue.now, (c.Lapse("a", 1, "lease_lapsed"),)))
    assert record(queue, "a")["placement_hints"] == {"avoid": ["w1"]}


def test_hinted_job_is_pending_in_a_shape_of_its_own_and_leaves_none_behind(queue: Queue) -> None:
    queue.submit(new_job("a"), new_job("b"))
    fail(queue, "a")
    assert sorted(row[1:] for row in queue.rows("shapes")) == [('{"avoid":["w1"],"cpus":1.0}', 1), ('{"cpus":1.0}', 1)]
    assert sorted(lane.jobs for lane in queue.state.changed_lanes(1).lanes) == [1, 1]
    queue.claim("a")
    queue.finish("a", attempt=2)
    queue.cancel("b")
    queue.prune()
    assert queue.rows("shapes") == queue.rows("shape_counts") == []


def test_shape_that_lost_its_last_job_to_a_hint_goes_at_once(queue: Queue) -> None:
    queue.submit(new_job("a", max_attempts=5))
    for worker in ("w1", "w2"):
        fail(queue, "a", worker=worker)
        assert len(queue.rows("shapes")) == 1


def test_retry_by_hand_asks_for_what_its_author_asked(queue: Queue) -> None:
    queue.submit(new_job("a", max_attempts=2))
    fail(queue, "a", cause="cuda_oom", gpu_memory_mb=24_000)
    fail(queue, "a", worker="w2")
    assert queue.states("a") == ["failed"]
    assert record(queue, "a")["placement_hints"] == {"avoid": ["w1"], "gpu_memory_above_mb": 24_000}
    queue.retry("a")
    told = record(queue, "a")
    assert (told["state"], told["requires"], told["placement_hints"]) == ("pending", {"cpus": 1.0}, {})
    assert [row[1:] for row in queue.rows("shapes")] == [('{"cpus":1.0}', 1)]
    fail(queue, "a", worker="w9")
    assert record(queue, "a")["placement_hints"] == {"avoid": ["w9"]}, "the failures of its former life are forgotten"


def test_beyond_so_many_shapes_a_retry_has_no_hints(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordination.queue_state.MAX_HINTED_SHAPES", 2)
    queue.submit(new_job("a"), new_job("b"), new_job("other", requires='{"gpus":1}'))
    fail(queue, "a")
    assert record(queue, "a")["placement_hints"] == {}


# -- more memory -----------------------------------------------------------------------------------------------------


def test_job_that_ran_out_of_gpu_memory_asks_for_more_than_it_had(queue: Queue) -> None:
    queue.submit(new_job("a", max_attempts=9))
    fail(queue, "a", cause="cuda_oom", gpu_memory_mb=24_000)
    assert record(queue, "a")["placement_hints"]["gpu_memory_above_mb"] == 24_000
    fail(queue, "a", cause="cuda_oom", gpu_memory_mb=16_000)
    assert record(queue, "a")["placement_hints"]["gpu_memory_above_mb"] == 24_000, "it never asks for less again"
    fail(queue, "a", cause="cuda_oom", gpu_memory_mb=40_000)
    fail(queue, "a", cause="exit", gpu_memory_mb=80_000)
    told = record(queue, "a")
    assert told["placement_hints"]["gpu_memory_above_mb"] == 40_000
    assert told["reason"] == "retry: exit"
    assert [step["reason"] for step in told["history"]][2] == "retry: cuda_oom"


def test_claim_tells_the_worker_and_placement_of_the_hints(queue: Queue) -> None:
    queue.submit(new_job("a"))
    fail(queue, "a", cause="cuda_oom", gpu_memory_mb=24_000)
    (claimed,) = queue.claim("a")
    assert json.loads(claimed.requires) == {"avoid": ["w1"], "cpus": 1.0, "gpu_memory_above_mb": 24_000}


# -- not again -------------------------------------------------------------------------------------------------------


def test_exit_code_of_the_policy_fails_the_job_at_once_saying_so(queue: Queue) -> None:
    queue.submit(new_job("a", max_attempts=5, no_retry="2,64-78"))
    fail(queue, "a", exit_code=65, error="bad data")
    told = record(queue, "a")
    assert (told["state"], told["failed_attempts"]) == ("failed", 1)
    assert told["reason"] == "exit: code 65 is not retried"
    assert told["error"] == "bad data (exit code 65 is one of no_retry_exit_codes)"
    assert told["no_retry_exit_codes"] == ["2", "64-78"]
    (event,) = [event for event in queue.events if event.type is E.WORK_FAILED]
    assert "not retried" in event.fields["cause"]


@pytest.mark.parametrize(
    ("exit_code", "cause"), [(1, "exit"), (79, "exit"), (-9, "exit"), (None, "exit"), (65, "timeout")]
)
def test_other_ends_are_tried_again(queue: Queue, exit_code: int | None, cause: str) -> None:
    queue.submit(new_job("a", max_attempts=5, no_retry="2,64-78"))
    fail(queue, "a", exit_code=exit_code, cause=cause)
    assert queue.states("a") == ["pending"]


def test_long_error_still_says_why_it_was_not_tried_again(queue: Queue) -> None:
    queue.submit(new_job("a", no_retry="2"))
    fail(queue, "a", exit_code=2, error="x" * 20_000)
    error = queue.column("a", "error")
    assert error.endswith("(exit code 2 is one of no_retry_exit_codes)")
    assert len(error) <= MAX_ERROR_CHARS


def test_worker_that_says_so_ends_it_too(queue: Queue) -> None:
    queue.submit(new_job("a", max_attempts=5))
    fail(queue, "a", retryable=False)
    assert queue.states("a") == ["failed"]


def test_exit_codes_are_told_from_others() -> None:
    codes = exit_codes([78, "64-70", 2])
    assert codes == "2,64-70,78"
    assert [n for n in range(-1, 256) if is_exit_code_of(codes, n)] == [2, *range(64, 71), 78]
    assert not is_exit_code_of("", 0)


# -- checkpoints and preemption --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", ["exit", "timeout", "cuda_oom", "preempted", "drained"])
def test_checkpoint_reaches_the_next_attempt(queue: Queue, cause: str) -> None:
    queue.submit(new_job("a"))
    fail(queue, "a", cause=cause, checkpoint=b'{"step":7}')
    assert record(queue, "a")["checkpoint"] == {"step": 7}
    (claimed,) = queue.claim("a")
    assert claimed.checkpoint == b'{"step":7}'


def test_attempt_without_a_checkpoint_leaves_the_one_before(queue: Queue) -> None:
    queue.submit(new_job("a", max_attempts=9))
    fail(queue, "a", checkpoint=b"1")
    fail(queue, "a")
    assert queue.claim("a")[0].checkpoint == b"1"
    queue.finish("a", ok=False, attempt=3, checkpoint=b"2")
    assert queue.claim("a")[0].checkpoint == b"2"


def test_checkpoint_outlives_a_failure_for_good_and_goes_with_completion(queue: Queue) -> None:
    queue.submit(new_job("a", max_attempts=1))
    fail(queue, "a", checkpoint=b'{"step":7}')
    assert queue.states("a") == ["failed"]
    queue.retry("a")
    assert queue.claim("a")[0].checkpoint == b'{"step":7}', "a retry by hand goes on where it was"
    queue.finish("a", attempt=2)
    assert queue.column("a", "checkpoint") is None


@pytest.mark.parametrize("cause", ["preempted", "drained"])
def test_job_that_made_way_is_pending_again_and_nothing_is_spent(queue: Queue, cause: str) -> None:
    queue.submit(new_job("a", max_attempts=1, backoff_ms=60_000))
    queue.claim("a")
    queue.begin("a")
    assert queue.finish("a", ok=False, cause=cause, exit_code=-15, checkpoint=b"7") is None
    told = record(queue, "a")
    assert (told["state"], told["failed_attempts"], told["placement_hints"]) == ("pending", 0, {})
    assert told["reason"] == f"released: {cause}"
    assert [row[:3] for row in queue.rows("workers")] == [("w1", 0, 0)], "its worker is not blamed"
    event = queue.events[-1]
    assert (event.type, event.fields["reason"], event.fields["attempt"]) == (E.WORK_RELEASED, cause, 1)


def test_job_that_completed_though_asked_to_make_way_is_completed(queue: Queue) -> None:
    queue.submit(new_job("a"))
    queue.claim("a")
    assert queue.finish("a", ok=True, cause="preempted") is None
    assert queue.states("a") == ["completed"]


def test_late_word_of_preemption_changes_nothing(queue: Queue) -> None:
    queue.submit(new_job("a"))
    queue.claim("a")
    queue.release("a")
    answer = queue.finish("a", ok=False, cause="preempted", checkpoint=b"7")
    assert answer is not None and answer.status == 409
    assert queue.column("a", "checkpoint") is None
