"""The queue's rules one by one, where the model alone would not say what is expected."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordination import commands as c
from coordination.commands import UnknownCommand
from coordination.errors import Refused
from coordination.events import EventType as E
from coordination.queue_reads import QueueReader
from coordination.queue_state import DIGEST_RULES, KEY_AGE_MS, MARK_EVERY, MAX_ERROR_CHARS, MAX_HISTORY, QueueState
from coordination.retry import MAX_BACKOFF_MS
from tests.unit.coordination.drive import DAY, T0, Queue, connection, dump, new_job


@pytest.fixture
def queue() -> Iterator[Queue]:
    queue = Queue()
    yield queue
    queue.state.close()


def refused(answer: Any, status: int, field: str, *words: str) -> None:
    assert isinstance(answer, Refused), answer
    assert (answer.status, answer.field) == (status, field)
    for word in words:
        assert word in answer.detail


# -- submitting ------------------------------------------------------------------------------------------------------


def test_repeated_key_gives_the_first_answer_and_no_second_job(queue: Queue) -> None:
    first = queue.submit(new_job("a"), key="k", digest="d")
    again = queue.submit(new_job("b"), key="k", digest="d")
    assert first == {"ids": ["a"], "created": [True]}
    assert again == {"ids": ["a"], "created": [False]}
    assert not queue.has("b")


def test_key_of_another_request_is_refused(queue: Queue) -> None:
    queue.submit(new_job("a"), key="k", digest="d")
    refused(queue.submit(new_job("b"), key="k", digest="other"), 422, "Idempotency-Key")
    assert not queue.has("b")


@pytest.mark.parametrize("verb", ["cancel", "release"])
def test_key_of_a_verb_on_one_job_does_not_answer_for_another(queue: Queue, verb: str) -> None:
    queue.submit(new_job("a"), new_job("b"))
    queue.claim("a", "b")
    assert getattr(queue, verb)("a", key="k") == ["a"]
    refused(getattr(queue, verb)("b", key="k"), 422, "Idempotency-Key")
    assert queue.states("b") == ["claimed"]
    assert getattr(queue, verb)("a", key="k") == ["a"]


def test_refused_request_leaves_its_key_free(queue: Queue) -> None:
    refused(queue.cancel("a", key="k"), 404, "id")
    queue.submit(new_job("a"))
    assert queue.cancel("a", key="k") == ["a"]


def test_idempotency_keys_are_forgotten_after_a_day(queue: Queue) -> None:
    queue.submit(new_job("a"), key="old", digest="d")
    queue.now += KEY_AGE_MS
    queue.submit(new_job("b"), key="new", digest="d")
    queue.prune(before=0)
    assert {row[0] for row in queue.rows("keys")} == {"old", "new"}
    queue.now += 1
    queue.prune(before=0)
    assert {row[0] for row in queue.rows("keys")} == {"new"}


def test_keys_beyond_the_number_kept_go_oldest_first(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordination.queue_state.MAX_KEYS", 2)
    for n, name in enumerate("abcd"):
        queue.now = T0 + n
        queue.submit(new_job(name), key=name, digest="d")
    queue.prune(before=0)
    assert {row[0] for row in queue.rows("keys")} == {"c", "d"}


def test_batch_is_all_or_none(queue: Queue) -> None:
    before = dump(queue.state)["jobs"]
    refused(
        queue.submit(new_job("a"), new_job("b", depends_on=("a", "ghost"))), 422, "jobs[1].depends_on[1]", "'ghost'"
    )
    assert dump(queue.state)["jobs"] == before
    refused(queue.submit(new_job("c", depends_on=("ghost",))), 422, "depends_on[0]")


def test_dependency_named_twice_blocks_once(queue: Queue) -> None:
    queue.submit(new_job("a"), new_job("b", depends_on=("a", "a")))
    assert queue.column("b", "blockers") == 1
    queue.claim("a")
    queue.finish("a")
    assert queue.states("b") == ["pending"]


def test_unique_key_taken_within_the_batch_gives_the_first_of_them(queue: Queue) -> None:
    answer = queue.submit(new_job("a", unique_key="u"), new_job("b", unique_key="u"))
    assert answer == {"ids": ["a", "a"], "created": [True, False]}
    assert not queue.has("b")


def test_dependency_on_a_job_whose_unique_key_was_taken_waits_for_the_holder(queue: Queue) -> None:
    """It was once dropped, and the dependent ran before what it depends on."""
    queue.submit(new_job("holder", unique_key="u"))
    queue.submit(new_job("twin", unique_key="u"), new_job("after", depends_on=("twin",)))
    assert queue.states("after") == ["waiting"]
    assert json.loads(queue.column("after", "spec"))["depends_on"] == ["holder"]
    queue.claim("holder")
    queue.finish("holder")
    assert queue.states("after") == ["pending"]


def test_unique_key_is_free_once_its_job_has_finished(queue: Queue) -> None:
    queue.submit(new_job("a", unique_key="u"))
    queue.cancel("a")
    assert queue.submit(new_job("b", unique_key="u"))["created"] == [True]


def test_job_submitted_after_its_dependency_failed_is_cancelled_saying_so(queue: Queue) -> None:
    queue.submit(new_job("a", max_attempts=1))
    queue.claim("a")
    queue.finish("a", ok=False)
    queue.submit(new_job("b", depends_on=("a",)))
    assert queue.history("b") == [(1, "cancelled", 0, "dependency a failed")]
    assert queue.rows("deps") == []
    assert ("command", "cancelled", 1) in queue.rows("totals")


def test_long_chain_is_cancelled_in_one_command(queue: Queue) -> None:
    jobs = [new_job("j0"), *(new_job(f"j{n}", depends_on=(f"j{n - 1}",)) for n in range(1, 3_000))]
    queue.submit(*jobs)
    queue.cancel("j0")
    assert queue.state.unfinished_total == 0
    assert queue.rows("deps") == []
    assert queue.column("j2999", "reason") == "dependency j2998 cancelled"


def test_dependent_with_not_before_waits_for_both(queue: Queue) -> None:
    queue.submit(new_job("a"), new_job("b", depends_on=("a",), not_before_ms=T0 + 1_000))
    queue.claim("a")
    queue.finish("a")
    assert queue.states("b") == ["waiting"]
    queue.now = T0 + 999
    assert queue.wake() == 0
    queue.now = T0 + 1_000
    assert queue.wake() == 1
    assert queue.states("b") == ["pending"]


# -- attempts --------------------------------------------------------------------------------------------------------


def test_stale_attempt_cannot_complete_job(queue: Queue) -> None:
    queue.submit(new_job("a"))
    queue.claim("a")
    queue.release("a")
    queue.claim("a", worker="w2")
    refused(queue.finish("a", attempt=1), 409, "attempt", "newest attempt is 2")
    refused(queue.finish("a", attempt=2, worker="w1"), 409, "attempt")
    assert queue.states("a") == ["claimed"]
    assert queue.finish("a", attempt=2, worker="w2") is None
    assert queue.states("a") == ["completed"]


def test_completion_reported_twice_is_one_completion(queue: Queue) -> None:
    queue.submit(new_job("a"))
    queue.claim("a")
    assert queue.finish("a", result=b"1") is None
    assert queue.finish("a", result=b"2") is None
    assert queue.column("a", "result") == b"1"
    assert [event.type for event in queue.events].count(E.WORK_COMPLETED) == 1
    refused(queue.finish("a", ok=False), 409, "attempt")


def test_token_of_a_claim_is_its_journal_index_and_grows(queue: Queue) -> None:
    queue.submit(new_job("a"))
    tokens = []
    for _ in range(3):
        (claimed,) = queue.claim("a")
        tokens.append(claimed.token)
        assert claimed.token == len(queue.entries)
        queue.release("a")
    assert tokens == sorted(set(tokens))


def test_one_job_picked_twice_is_claimed_once(queue: Queue) -> None:
    queue.submit(new_job("a"))
    assert [job.attempt for job in queue.claim("a", "a")] == [1]


def test_release_spends_no_attempt_and_failure_does(queue: Queue) -> None:
    queue.submit(new_job("a", max_attempts=2))
    for attempt in (1, 2, 3):
        queue.claim("a")
        queue.release("a")
        assert (queue.column("a", "attempt"), queue.column("a", "failures")) == (attempt, 0)
    queue.claim("a")
    queue.finish("a", ok=False, attempt=4)
    assert queue.states("a") == ["pending"]
    queue.claim("a")
    queue.finish("a", ok=False, attempt=5)
    assert queue.states("a") == ["failed"]


def test_attempt_that_is_not_retryable_fails_the_job_at_once(queue: Queue) -> None:
    queue.submit(new_job("a", max_attempts=3))
    queue.claim("a")
    queue.finish("a", ok=False, retryable=False)
    assert queue.states("a") == ["failed"]


def test_failed_attempt_waits_its_backoff(queue: Queue) -> None:
    queue.submit(new_job("a", backoff_ms=1_000))
    queue.claim("a")
    queue.finish("a", ok=False)
    assert queue.states("a") == ["waiting"]
    ready = queue.column("a", "ready_ms")
    assert T0 + 500 <= ready <= T0 + 1_000
    queue.now = ready
    assert queue.wake() == 1


def test_timeout_is_told_as_such(queue: Queue) -> None:
    queue.submit(new_job("a", max_attempts=1))
    queue.claim("a")
    queue.begin("a")
    queue.apply(c.Expire(queue.now, (c.Lapse("a", 1, "timeout"),)))
    assert [event.type for event in queue.events][-2:] == [E.WORK_TIMEOUT, E.WORK_FAILED]
    assert "w1" in queue.column("a", "error")


def test_an_attempt_that_never_began_is_given_up_unspent(queue: Queue) -> None:
    queue.submit(new_job("a", max_attempts=1))
    queue.claim("a")
    assert queue.apply(c.Expire(queue.now, (c.Lapse("a", 1, "lease_lapsed"),))) == 1
    assert (queue.states("a"), queue.column("a", "failures")) == (["pending"], 0)
    assert queue.finish("a").status == 409, "the attempt is fenced off all the same"
    (again,) = queue.claim("a")
    assert again.attempt == 2


def test_a_clock_put_right_takes_the_queue_back_with_it(queue: Queue) -> None:
    right, wrong = queue.now, queue.now + 365 * 86_400_000
    queue.submit(new_job("later", not_before_ms=wrong + 86_400_000), new_job("failed", backoff_ms=10_000))
    queue.now = wrong
    queue.claim("failed")
    queue.finish("failed", ok=False)
    queue.now = right + 1_000
    queue.submit(new_job("new"))
    assert queue.column("new", "created_ms") == right + 1_000
    assert queue.column("failed", "ready_ms") == right + 1_000 + MAX_BACKOFF_MS
    assert queue.column("later", "ready_ms") == wrong + 86_400_000, "what its author asked for stays"


def test_the_little_that_two_leaders_clocks_differ_does_not_turn_time_back(queue: Queue) -> None:
    queue.submit(new_job("a"))
    began = queue.now
    queue.now = began - 30_000
    queue.submit(new_job("b"))
    assert queue.column("b", "created_ms") == began


def test_error_is_cut_to_its_limit(queue: Queue) -> None:
    queue.submit(new_job("a", max_attempts=1))
    queue.claim("a")
    queue.finish("a", ok=False, error="x" * (MAX_ERROR_CHARS + 1))
    assert len(queue.column("a", "error")) == MAX_ERROR_CHARS


def test_history_keeps_the_first_ten_and_the_newest(queue: Queue) -> None:
    queue.submit(new_job("a"))
    for _ in range(80):
        queue.claim("a")
        queue.release("a")
    numbers = [n for n, *_ in queue.history("a")]
    assert numbers == [*range(1, 11), *range(161 - 89, 162)]
    assert len(numbers) == MAX_HISTORY


# -- retry by hand ---------------------------------------------------------------------------------------------------


def test_retry_starts_over_with_all_attempts(queue: Queue) -> None:
    queue.submit(new_job("a", max_attempts=1, not_before_ms=T0 - 1))
    queue.claim("a")
    queue.finish("a", ok=False)
    assert queue.retry("a") == ["a"]
    assert (queue.column("a", "failures"), queue.column("a", "error"), queue.column("a", "finished_ms")) == (
        0,
        None,
        None,
    )
    (claimed,) = queue.claim("a")
    assert claimed.attempt == 2, "the fence never goes back"


def test_retry_is_refused_while_its_unique_key_is_taken(queue: Queue) -> None:
    queue.submit(new_job("a", unique_key="u"))
    queue.cancel("a")
    queue.submit(new_job("b", unique_key="u"))
    refused(queue.retry("a"), 409, "unique_key", "'u'", "job b")
    queue.cancel("b")
    assert queue.retry("a") == ["a"]


def test_retry_waits_for_a_dependency_that_is_unfinished(queue: Queue) -> None:
    """A job cancelled while it waited once ran at once when it was retried, before what it depends on."""
    queue.submit(new_job("a"), new_job("b", depends_on=("a",)))
    queue.cancel("b")
    queue.retry("b")
    assert queue.states("b") == ["waiting"]
    queue.claim("a")
    queue.finish("a")
    assert queue.states("b") == ["pending"]


def test_retry_is_refused_while_a_dependency_is_failed_and_names_it(queue: Queue) -> None:
    queue.submit(new_job("a"), new_job("b", depends_on=("a",)))
    queue.cancel("a")
    refused(queue.retry("b"), 409, "depends_on", "a is cancelled")
    queue.retry("a")
    assert queue.retry("b") == ["b"]
    assert queue.states("a", "b") == ["pending", "waiting"]


def test_retry_forgives_a_dependency_that_was_pruned(queue: Queue) -> None:
    queue.submit(new_job("a"), new_job("b", depends_on=("a",)))
    queue.claim("a")
    queue.finish("a")
    queue.cancel("b")
    queue.prune("completed")
    queue.retry("b")
    assert queue.states("b") == ["pending"]


@pytest.mark.parametrize("state", ["pending", "claimed", "completed"])
def test_only_failed_and_cancelled_jobs_can_be_retried(queue: Queue, state: str) -> None:
    queue.submit(new_job("a"))
    if state != "pending":
        queue.claim("a")
    if state == "completed":
        queue.finish("a")
    refused(queue.retry("a"), 409, "state", state)
    refused(queue.retry("ghost"), 404, "id")


# -- clearing and forgetting -----------------------------------------------------------------------------------------


def test_clear_counts_the_dependents_that_went_along(queue: Queue) -> None:
    chain = [new_job("j0"), *(new_job(f"j{n}", depends_on=(f"j{n - 1}",)) for n in range(1, 5))]
    queue.submit(*chain, new_job("other"))
    assert queue.apply(c.Clear(queue.now, queue.state._seq, False, 1_000)) == 6
    assert queue.apply(c.Clear(queue.now, queue.state._seq, False, 1_000)) == 0
    assert queue.state.unfinished_total == 0


def test_clear_spares_what_runs_and_what_came_later(queue: Queue) -> None:
    queue.submit(new_job("a"), new_job("b"))
    queue.claim("a")
    upto = queue.state._seq
    queue.submit(new_job("later"))
    assert queue.apply(c.Clear(queue.now, upto, False, 1_000)) == 1
    assert queue.states("a", "b", "later") == ["claimed", "cancelled", "pending"]
    assert queue.apply(c.Clear(queue.now, upto, True, 1_000)) == 1
    assert queue.states("a", "later") == ["cancelled", "pending"]


def test_clear_in_slices_takes_everything(queue: Queue) -> None:
    queue.submit(*(new_job(f"j{n}") for n in range(7)))
    answers = [queue.apply(c.Clear(queue.now, 100, False, 3)) for _ in range(4)]
    assert answers == [3, 3, 1, 0]


@pytest.mark.parametrize("state", ["waiting", "pending", "claimed", "running"])
def test_prune_never_takes_an_unfinished_state(queue: Queue, state: str) -> None:
    with pytest.raises(AssertionError, match="never deletes"):
        queue.prune(state)


def test_prune_takes_the_oldest_beyond_the_number_kept_of_those_states(queue: Queue) -> None:
    for n in range(4):
        queue.now = T0 + n
        queue.submit(new_job(f"c{n}"), new_job(f"f{n}", max_attempts=1))
        queue.claim(f"c{n}", f"f{n}")
        queue.finish(f"c{n}")
        queue.finish(f"f{n}", ok=False)
    assert queue.prune("failed", before=0, keep=3) == 1
    assert not queue.has("f0")
    assert all(queue.has(f"c{n}") for n in range(4)), "completed jobs were not asked for"


def test_pruned_jobs_leave_nothing_behind(queue: Queue) -> None:
    queue.submit(new_job("a", requires='{"gpus":7}', group="once"), new_job("b", depends_on=("a",)))
    queue.cancel("a")
    assert queue.prune() == 2
    for table in ("jobs", "history", "deps", "counts", "shape_counts", "shapes"):
        assert queue.rows(table) == [], table
    queue.submit(new_job("c", requires='{"gpus":7}'))
    assert [lane.requires for lane in queue.state.changed_lanes(1).lanes] == ['{"gpus":7}']
    assert queue.column("c", "seq") == 3, "numbers are not reused"


def test_books_say_when_a_worker_last_did_something(queue: Queue) -> None:
    """By the command, not by the batch it came in."""
    queue.submit(new_job("a"))
    queue.claim("a")
    queue.now += 5_000
    queue.submit(new_job("b"))
    state = QueueState(":memory:")
    state.apply_batch(queue.entries)
    assert dump(state)["workers"] == queue.rows("workers") == [("w1", 0, 0, 1, T0)]


def test_forgotten_worker_gives_its_jobs_back_unspent(queue: Queue) -> None:
    queue.submit(new_job("a"), new_job("b"))
    queue.claim("a", worker="gone")
    queue.claim("b", worker="here")
    assert queue.apply(c.ForgetWorkers(queue.now, ("gone", "never seen"), "silent")) == 1
    assert queue.states("a", "b") == ["pending", "claimed"]
    assert queue.column("a", "failures") == 0
    assert [row[0] for row in queue.rows("workers")] == ["here"]


# -- determinism -----------------------------------------------------------------------------------------------------


def a_days_work() -> list[tuple[int, int, bytes]]:
    """Entries that touch every table, with the commands that read sums amid those that change them."""
    queue = Queue()
    queue.submit(new_job("a", unique_key="u"), new_job("b", depends_on=("a",)), key="k", digest="d")
    queue.claim("a")
    queue.now += 5_000
    queue.claim("a", worker="w2")
    queue.finish("a")
    queue.claim("b", worker="w3")
    queue.now += 5_000
    queue.finish("b", ok=False, worker="w3")
    queue.apply(c.ForgetWorkers(queue.now, ("w3", "w2"), "silent"))
    queue.submit(new_job("c", group="once", requires='{"gpus":9}'))
    queue.cancel("c")
    queue.prune("cancelled")
    queue.submit(new_job("d", requires='{"gpus":8}'))
    queue.now += 3 * DAY
    queue.prune(keep=0)
    queue.entries.append((len(queue.entries) + 1, 2, b""))  # a new leader's no-op
    queue.state.close()
    return queue.entries


def test_tables_do_not_depend_on_how_entries_are_batched(tmp_path: Path) -> None:
    entries = a_days_work()
    dumps = []
    for size in (1, 2, 3, 5, len(entries)):
        state = QueueState(str(tmp_path / f"{size}.db"))
        for at in range(0, len(entries), size):
            state.apply_batch(entries[at : at + size])
        dumps.append(dump(state))
        state.close()
    assert all(other == dumps[0] for other in dumps[1:])


def test_answers_do_not_depend_on_how_entries_are_batched() -> None:
    entries = a_days_work()
    one, all_at_once = QueueState(":memory:"), QueueState(":memory:")
    single = [one.apply_batch([entry])[0] for entry in entries]
    assert repr(all_at_once.apply_batch(entries)) == repr(single)


@pytest.mark.parametrize("lost", [1, 4, 9])
def test_replay_after_a_crash_gives_the_same_tables(tmp_path: Path, lost: int) -> None:
    """After a power cut the tables may be behind the journal; what they have already is skipped."""
    entries = a_days_work()
    whole = QueueState(str(tmp_path / "whole.db"))
    whole.apply_batch(entries)
    behind = QueueState(str(tmp_path / "behind.db"))
    behind.apply_batch(entries[:-lost])
    behind.close()
    behind = QueueState(str(tmp_path / "behind.db"))
    assert behind.applied_index == len(entries) - lost
    answers = behind.apply_batch(entries)
    assert answers[: len(entries) - lost] == [(None, [])] * (len(entries) - lost)
    assert dump(behind) == dump(whole)
    assert (behind.applied_index, behind.applied_term) == (len(entries), 2)
    whole.close()
    behind.close()


def test_the_applied_index_moves_when_a_reader_can_see_the_entry(tmp_path: Path) -> None:
    """Who asks for a copy "not older than N" is answered from the file as soon as the number is N."""
    path = str(tmp_path / "state.db")
    state = QueueState(path)
    reader = QueueReader(path)
    seen: list[tuple[int, int]] = []

    def watched(statement: str, *values: Any) -> Any:
        seen.append((state.applied_index, reader.applied()[1]))
        return run(statement, *values)

    state.apply_batch(a_days_work()[:1])
    run, state._run = state._run, watched  # type: ignore[method-assign]
    state.apply_batch(a_days_work())
    assert len(seen) > len(a_days_work())
    assert set(seen) == {(1, 1)}
    assert state.applied_index == reader.applied()[1] == len(a_days_work())
    reader.close()
    state.close()


def two_windows() -> list[tuple[int, int, bytes]]:
    """Work, enough for two comparisons."""
    work = [(index, 1, body) for index, _, body in a_days_work()]
    return [*work, *((index, 1, b"") for index in range(len(work) + 1, 2 * MARK_EVERY + 1))]


def test_voters_compare_their_states_by_a_digest_at_fixed_entries(tmp_path: Path) -> None:
    """However the entries were cut into batches; but only what a process has seen the whole of."""
    entries = two_windows()
    one, cut, late = QueueState(":memory:"), QueueState(":memory:"), QueueState(str(tmp_path / "late.db"))
    one.apply_batch(entries[: MARK_EVERY + 10])
    for start in range(0, MARK_EVERY + 3, 7):
        cut.apply_batch(entries[start : start + 7])
    assert one.mark == cut.mark
    assert one.mark[0] == MARK_EVERY
    cut.apply_batch(entries[:40])  # a replay tells nothing new
    one.apply_batch(entries[MARK_EVERY + 10 :])
    cut.apply_batch(entries)
    assert one.mark == cut.mark
    assert one.mark[0] == 2 * MARK_EVERY
    late.apply_batch(entries[:3])
    late.close()
    late = QueueState(str(tmp_path / "late.db"))
    late.apply_batch(entries[: MARK_EVERY + 10])
    assert late.mark == (0, 0)
    late.apply_batch(entries)
    assert late.mark == one.mark
    late.close()


@pytest.mark.parametrize("name", ["now_ms", "_seq", "unfinished_total", "pending_total", "waiting_total"])
def test_a_state_of_other_sums_has_another_digest(name: str) -> None:
    entries = two_windows()
    marks = set()
    for more in (0, 1):
        state = QueueState(":memory:")
        state.apply_batch(entries[:MARK_EVERY])
        setattr(state, name, getattr(state, name) + more)
        state.apply_batch(entries)
        assert state.mark[0] == 2 * MARK_EVERY
        assert state.mark[1] >> 32 == DIGEST_RULES
        marks.add(state.mark)
    assert len(marks) == 2


@pytest.mark.parametrize("change", [{"worker": "w2"}, {"ok": False}])
def test_what_an_entry_does_is_part_of_the_digest(change: dict[str, Any]) -> None:
    """Equal sums: another worker's attempt, another end of it."""
    marks = set()
    for more in ({}, change):
        queue = Queue()
        queue.submit(new_job("a", max_attempts=1))
        queue.claim("a", worker=more.get("worker", "w1"))
        queue.finish("a", **{"worker": "w1", **more})
        state = queue.state
        state.apply_batch([(index, 1, b"") for index in range(state.applied_index + 1, MARK_EVERY + 1)])
        marks.add(state.mark)
    assert len(marks) == 2


def test_what_entries_do_is_part_of_the_digest() -> None:
    """Two queues of equal sums in which another job was cancelled."""
    marks = set()
    for chosen in ("a", "b"):
        queue = Queue()
        queue.submit(new_job("a"), new_job("b"))
        queue.cancel(chosen)
        state = queue.state
        state.apply_batch([(index, 1, b"") for index in range(state.applied_index + 1, MARK_EVERY + 1)])
        marks.add(state.mark)
    assert len(marks) == 2


def test_gap_in_the_journal_stops_the_state_machine(queue: Queue) -> None:
    with pytest.raises(AssertionError, match="entry 3 applied after 0"):
        queue.state.apply_batch([(3, 1, b"")])


def test_unknown_entry_stops_the_batch_and_changes_no_table(tmp_path: Path) -> None:
    state = QueueState(str(tmp_path / "state.db"))
    before = dump(state)
    good = c.encode(c.Submit(T0, (new_job("a"),), "", ""))
    with pytest.raises(UnknownCommand):
        state.apply_batch([(1, 1, good), (2, 1, b"\x93\x01\xa7Explode\x00")])
    assert dump(state) == before


def test_time_of_the_queue_never_goes_back(queue: Queue) -> None:
    queue.submit(new_job("a"))
    queue.now -= 60_000
    queue.submit(new_job("b"))
    assert queue.column("b", "created_ms") == T0


def test_sums_in_memory_survive_a_reopening(tmp_path: Path) -> None:
    queue = Queue(str(tmp_path / "state.db"))
    queue.submit(new_job("a"), new_job("b"), new_job("c", not_before_ms=T0 + 1), new_job("d"))
    queue.claim("b")
    queue.cancel("d")
    was = (
        queue.state.pending_total,
        queue.state.waiting_total,
        queue.state.unfinished_total,
        queue.state.changed_lanes(9).lanes,
    )
    queue.state.close()
    again = QueueState(str(tmp_path / "state.db"))
    assert (again.pending_total, again.waiting_total, again.unfinished_total, again.changed_lanes(9).lanes) == was
    assert was[:3] == (1, 1, 3)
    again.close()


def test_queue_of_another_schema_is_refused(tmp_path: Path) -> None:
    state = QueueState(str(tmp_path / "state.db"))
    connection(state).execute("UPDATE meta SET value = 99 WHERE key = 'schema'")
    state.close()
    with pytest.raises(Refused, match="schema 99"):
        QueueState(str(tmp_path / "state.db"))
