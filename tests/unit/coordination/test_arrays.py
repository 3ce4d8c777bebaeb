"""Arrays of jobs: what may be written, who is made when, and what an array comes to. That the books stay right whatever
happens is `test_queue_model`'s business."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordination import arrays
from coordination import commands as c
from coordination.arrays import MAX_MEMBERS, MOST_AHEAD, MOST_AT_ONCE, parse
from coordination.errors import InvalidInput, Refused
from coordination.kinds import Kind, Kinds
from coordination.queue_reads import QueueReader
from coordination.queue_state import QueueState
from coordination.submission import Submission
from tests.unit.coordination.drive import T0, Queue, connection, dump, new_job

SPEC = b'{"command":["run","--n","{array_index}"],"params":{"seed":"s{array_index}"},"env":{"N":"{array_index}"}}'


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    queue = Queue(str(tmp_path / "state.db"))
    yield queue
    queue.state.close()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three members ahead, so that a short array shows what a long one does."""
    monkeypatch.setattr(arrays, "MOST_AHEAD", 3)


def array(id: str, indexes: str, **changes: Any) -> c.NewJob:
    deps = changes.get("depends_on")
    job = new_job(id, array=indexes, **changes)
    return job if deps else job._replace(spec=SPEC)


def reader(queue: Queue) -> QueueReader:
    return QueueReader(queue.state._path)


def summary(queue: Queue, id: str = "a") -> dict[str, Any]:
    found = reader(queue).array(id)
    assert found is not None
    return found


def made(queue: Queue, id: str = "a") -> list[str]:
    rows = connection(queue.state).execute("SELECT id FROM jobs WHERE id LIKE ? ORDER BY seq", (f"{id}.%",))
    return [str(row[0]) for row in rows]


def run(queue: Queue, *ids: str, ok: bool = True) -> None:
    for id in ids:
        (claimed,) = queue.claim(id)
        assert queue.finish(id, ok=ok, attempt=claimed.attempt) is None


def tended(queue: Queue) -> None:
    """The entries that a leader adds for as long as arrays want something."""
    while queue.state.arrays_want:
        queue.wake()


# -- indexes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "indexes", "at_once"),
    [
        ("7", [7], 0),
        ("0-3", [0, 1, 2, 3], 0),
        ("1-10:3", [1, 4, 7, 10], 0),
        ("1,5,9-11", [1, 5, 9, 10, 11], 0),
        ("9-11, 1", [9, 10, 11, 1], 0),
        ("1-4%2", [1, 2, 3, 4], 2),
        ("9999999", [9_999_999], 0),
    ],
)
def test_indexes_are_read_as_slurm_writes_them(text: str, indexes: list[int], at_once: int) -> None:
    found = parse(text)
    assert [found.at(n) for n in range(found.size)] == indexes
    assert [found.position(index) for index in indexes] == list(range(len(indexes)))
    assert found.position(12_345) is None
    assert found.at_once == at_once
    with pytest.raises(IndexError):
        found.at(found.size)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "neither an index nor a range"),
        ("a-b", "neither an index nor a range"),
        ("1-", "neither an index nor a range"),
        ("-5", "neither an index nor a range"),
        ("1-5:", "neither an index nor a range"),
        ("1,,2", "neither an index nor a range"),
        ("\u0661-\u0663", "neither an index nor a range"),
        ("5-1", "'5-1' has no members"),
        ("1-5:0", "'1-5:0' has no members"),
        ("1-5,3", "index 3 is there twice"),
        ("1-9:2,2-10:2,9", "index 9 is there twice"),
        ("10000000", "larger than the largest index"),
        ("1-100001", "at most 100000 members an array; these are 100001"),
        ("1-60000,100001-160000", "these are 120000"),
        ("1-5%", "how many may run at once"),
        ("1-5%0", "how many may run at once"),
        ("1-5%x", "how many may run at once"),
    ],
)
def test_what_is_no_list_of_indexes_is_refused_saying_why(text: str, words: str) -> None:
    submission = Submission(Kinds({}, {}), T0, batch=False)
    with pytest.raises(InvalidInput) as refused:
        submission.add({"command": ["x"], "array": text})
    assert refused.value.field == "array"
    assert words in refused.value.detail


def test_longest_array_is_read_at_once() -> None:
    began = time.perf_counter()
    assert parse(f"1-{MAX_MEMBERS}").size == MAX_MEMBERS
    assert parse("0-9999900:100").size == MAX_MEMBERS
    assert time.perf_counter() - began < 1


def test_array_index_is_left_for_the_members_to_fill() -> None:
    kinds = Kinds({"play": Kind.model_validate({"command": ["play", "{game}", "{array_index}"]})}, {})
    submission = Submission(kinds, T0, batch=True)
    submission.add({"kind": "play", "params": {"game": "seed{array_index}"}, "array": "1-3"})
    submission.add({"command": ["x{array_index}", "{other}"], "array": "1-3"})
    commands = [json.loads(job.spec)["command"] for job in submission.finish()]
    assert commands == [["play", "seed{array_index}", "{array_index}"], ["x{array_index}", "{other}"]]


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"params": {"array_index": 5}}, "params", "set by the array"),
        ({"array": 5}, "array", ""),
        ({"array": ["1-3"]}, "array", ""),
        ({"array": "1-100000", "env": {"A": "x" * 6_000}}, "array", "100000 members may carry 5368 bytes each"),
    ],
)
def test_array_that_cannot_be_taken_is_refused_by_field(body: dict[str, Any], field: str, words: str) -> None:
    submission = Submission(Kinds({}, {}), T0, batch=False)
    with pytest.raises(InvalidInput) as refused:
        submission.add({"command": ["x"], "array": "1-3", **body})
    assert refused.value.field == field
    assert words in refused.value.detail


def test_array_index_is_an_ordinary_param_of_an_ordinary_job() -> None:
    submission = Submission(Kinds({}, {}), T0, batch=False)
    submission.add({"command": ["x", "{array_index}"], "params": {"array_index": 5}})
    (job,) = submission.finish()
    assert json.loads(job.spec)["command"] == ["x", "5"]


# -- members ---------------------------------------------------------------------------------------------------------


def test_array_is_submitted_under_one_id_and_says_how_many_it_has(queue: Queue) -> None:
    assert queue.submit(array("a", "1-3")) == {"ids": ["a"], "created": [True], "counts": [3]}
    assert made(queue) == ["a.1", "a.2", "a.3"]


def test_batch_says_which_of_its_jobs_are_arrays(queue: Queue) -> None:
    told = queue.submit(new_job("x"), array("a", "1-3"), key="k", digest="d")
    assert told == {"ids": ["x", "a"], "created": [True, True], "counts": [None, 3]}
    again = queue.submit(new_job("y"), array("b", "1-3"), key="k", digest="d")
    assert again == {"ids": ["x", "a"], "created": [False, False], "counts": [None, 3]}


def test_each_member_is_told_its_index(queue: Queue) -> None:
    queue.submit(array("a", "5,7"))
    (claimed,) = queue.claim("a.7")
    assert json.loads(claimed.spec) == {
        "command": ["run", "--n", "7"],
        "params": {"seed": "s7"},
        "env": {"N": "7"},
        "array": {"id": "a", "index": 7, "size": 2},
    }


def test_members_keep_the_place_in_line_that_they_were_submitted_in(queue: Queue, few: None) -> None:
    queue.submit(new_job("before"), array("a", "1-5"), new_job("after"))
    order = []
    while heads := [head.seq for lane in queue.state.changed_lanes(1).lanes for head in lane.heads]:
        (claimed,) = queue.apply(c.Claim(queue.now, "w1", (c.Pick(heads[0], None),)))
        order.append(claimed.id)
    assert order == ["before", "a.1", "a.2", "a.3", "a.4", "a.5", "after"]


def test_only_so_many_members_are_made_ahead(queue: Queue, few: None) -> None:
    queue.submit(array("a", "1-9"))
    assert made(queue) == ["a.1", "a.2", "a.3"]
    assert (queue.state.array_backlog, queue.state.unfinished_total) == (6, 3)
    queue.claim("a.1", "a.2")
    assert made(queue)[3:] == ["a.4", "a.5"], "as many as have started"
    queue.finish("a.1")
    assert len(made(queue)) == 5, "an end makes no room among those that wait"


def test_array_of_the_largest_size_is_submitted_in_bounded_time(queue: Queue) -> None:
    entry = c.encode(c.Submit(T0, (array("a", f"1-{MAX_MEMBERS}"),), "", ""))
    assert len(entry) < 1_000, "the journal carries the template once"
    began = time.perf_counter()
    queue.submit(array("a", f"1-{MAX_MEMBERS}"))
    assert len(made(queue)) == MOST_AT_ONCE
    tended(queue)
    assert len(made(queue)) == MOST_AHEAD
    assert time.perf_counter() - began < 5
    assert summary(queue)["to_come"] == MAX_MEMBERS - MOST_AHEAD


def test_one_entry_makes_a_bounded_number_of_members_however_many_arrays_there_are(queue: Queue) -> None:
    queue.submit(*(array(f"a{n}", "1-100") for n in range(10)))
    assert queue.state.unfinished_total == MOST_AT_ONCE
    tended(queue)
    assert (queue.state.unfinished_total, queue.state.array_backlog) == (1_000, 0)


def test_whole_array_runs_to_its_end(queue: Queue, few: None) -> None:
    queue.submit(array("a", "1-9"))
    for n in range(1, 10):
        assert summary(queue)["state"] == ("pending" if n == 1 else "running")
        run(queue, f"a.{n}")
    told = summary(queue)
    assert (told["state"], told["finished_at"], told["to_come"]) == ("completed", T0 / 1000, 0)
    assert told["counts"]["completed"] == told["count"] == 9


def test_throttled_array_has_no_more_in_progress_than_it_allows(queue: Queue) -> None:
    queue.submit(array("a", "1-5%2"))
    queue.claim("a.1", "a.2")
    assert made(queue) == ["a.1", "a.2"]
    queue.finish("a.1")
    assert made(queue) == ["a.1", "a.2", "a.3"]
    assert summary(queue)["at_once"] == 2


def test_member_of_a_throttled_array_that_is_retried_by_hand_waits_for_its_turn(queue: Queue) -> None:
    queue.submit(array("a", "1-4%1", max_attempts=1))
    run(queue, "a.1", ok=False)
    assert made(queue) == ["a.1", "a.2"]
    queue.retry("a.1")
    assert queue.states("a.1", "a.2") == ["waiting", "pending"]
    run(queue, "a.2")
    assert queue.states("a.1") == ["pending"], "those that are retried go before those that are to come"
    assert made(queue) == ["a.1", "a.2"]
    run(queue, "a.1", "a.3", "a.4")
    assert summary(queue)["state"] == "completed"


def test_failed_array_that_is_mended_by_hand_is_completed(queue: Queue) -> None:
    queue.submit(array("a", "1-2", max_attempts=1))
    run(queue, "a.1", ok=False)
    run(queue, "a.2")
    assert (summary(queue)["state"], summary(queue)["counts"]["failed"]) == ("failed", 1)
    queue.retry("a.1")
    assert (summary(queue)["state"], summary(queue)["finished_at"]) == ("running", None)
    run(queue, "a.1")
    assert summary(queue)["state"] == "completed"


def test_member_of_a_cancelled_array_can_be_retried_alone(queue: Queue, few: None) -> None:
    queue.submit(array("a", "1-9"))
    run(queue, "a.1")
    queue.cancel("a")
    assert queue.retry("a.2") == ["a.2"]
    assert queue.states("a.2", "a.3") == ["pending", "cancelled"]
    assert summary(queue)["state"] == "running"
    run(queue, "a.2")
    told = summary(queue)
    assert (told["state"], told["counts"]["completed"], told["counts"]["cancelled"]) == ("cancelled", 2, 7)
    assert len(made(queue)) == 4, "those that were to come stay cancelled"


def test_member_that_waits_for_its_turn_can_be_cancelled(queue: Queue) -> None:
    queue.submit(array("a", "1-3%1", max_attempts=1))
    run(queue, "a.1", ok=False)
    queue.retry("a.1")
    assert queue.cancel("a.1") == ["a.1"]
    assert queue.rows("deps") == []
    run(queue, "a.2", "a.3")
    told = summary(queue)
    assert (told["state"], told["counts"]["completed"], told["counts"]["cancelled"]) == ("cancelled", 2, 1)


def test_array_goes_on_where_it_was_after_a_restart(queue: Queue, tmp_path: Path) -> None:
    """What is still to be made is in the rows, so a voter that was restarted makes the same."""
    queue.submit(array("a", "1-1200"), array("b", "1-700"))
    assert queue.state.arrays_want
    again = Queue(str(tmp_path / "other.db"))
    again.state.apply_batch(queue.entries)
    again.state.close()
    again.state = QueueState(str(tmp_path / "other.db"))
    assert (again.state.arrays_want, again.state.array_backlog) == (True, 1_400)
    again.entries = list(queue.entries)
    for other in (queue, again):
        tended(other)
        run(other, "a.1", "b.1")
    assert dump(again.state) == dump(queue.state)
    assert len(made(queue)) == 1_001
    again.state.close()


# -- dependencies and unique keys ------------------------------------------------------------------------------------


def test_array_waits_for_its_dependency_before_any_member_is_made(queue: Queue) -> None:
    queue.submit(new_job("x"), array("a", "1-3", depends_on=("x",)))
    assert made(queue) == []
    told = summary(queue)
    assert (told["state"], told["unfinished_dependencies"], told["depends_on"]) == ("waiting", 1, ["x"])
    run(queue, "x")
    assert made(queue) == ["a.1", "a.2", "a.3"]


def test_job_may_wait_for_a_whole_array(queue: Queue, few: None) -> None:
    queue.submit(array("a", "1-5"), new_job("after", depends_on=("a",)))
    for n in range(1, 6):
        assert queue.states("after") == ["waiting"]
        run(queue, f"a.{n}")
    assert queue.states("after") == ["pending"]


def test_job_that_waits_for_an_array_with_a_failed_member_is_cancelled_at_its_end(queue: Queue) -> None:
    queue.submit(array("a", "1-2", max_attempts=1), new_job("after", depends_on=("a",)))
    run(queue, "a.1", ok=False)
    assert queue.states("after") == ["waiting"]
    run(queue, "a.2")
    assert queue.history("after")[-1] == (2, "cancelled", 0, "dependency a failed")


def test_array_whose_dependency_fails_is_cancelled_with_all_that_wait_for_it(queue: Queue) -> None:
    chain = [array(f"a{n}", "1-3", depends_on=(f"a{n - 1}" if n else "x",)) for n in range(2_000)]
    queue.submit(new_job("x", max_attempts=1), *chain, new_job("last", depends_on=("a1999",)))
    run(queue, "x", ok=False)
    assert [summary(queue, id)["state"] for id in ("a0", "a1999")] == ["cancelled", "cancelled"]
    assert summary(queue, "a0")["reason"] == "dependency x failed"
    assert summary(queue, "a1999")["counts"]["cancelled"] == 3
    assert queue.states("last") == ["cancelled"]
    assert (queue.state.unfinished_total, queue.state.array_backlog) == (0, 0)


def test_dependency_on_a_member_that_is_not_made_yet_is_refused_saying_so(queue: Queue, few: None) -> None:
    queue.submit(array("a", "1-9"))
    queue.submit(new_job("ok", depends_on=("a.2",)))
    for dep, words in (("a.9", "member of array a, whose turn has not come"), ("a.10", "there is no job 'a.10'")):
        answer = queue.submit(new_job("no", depends_on=(dep,)))
        assert isinstance(answer, Refused)
        assert (answer.status, answer.field) == (422, "depends_on[0]")
        assert words in answer.detail


def test_array_holds_its_unique_key_until_its_last_member_has_ended(queue: Queue) -> None:
    queue.submit(array("a", "1-2", unique_key="u", max_attempts=1))
    run(queue, "a.1", ok=False)
    assert queue.submit(array("b", "1-2", unique_key="u")) == {"ids": ["a"], "created": [False]}
    assert queue.submit(new_job("c", unique_key="u"))["ids"] == ["a"]
    run(queue, "a.2")
    assert queue.submit(array("b", "1-2", unique_key="u"))["ids"] == ["b"]
    answer = queue.retry("a.1")
    assert isinstance(answer, Refused)
    assert (answer.status, answer.field) == (409, "unique_key")


# -- orders ----------------------------------------------------------------------------------------------------------


def test_array_is_cancelled_as_a_whole(queue: Queue, few: None) -> None:
    queue.submit(array("a", "1-9"), new_job("after", depends_on=("a",)))
    run(queue, "a.1")
    queue.claim("a.2")
    assert queue.cancel("a") == ["a"]
    tended(queue)
    assert queue.states("a.1", "a.2", "a.3") == ["completed", "cancelled", "cancelled"]
    told = summary(queue)
    assert (told["state"], told["reason"], told["to_come"]) == ("cancelled", "by hand", 0)
    assert (told["counts"]["completed"], told["counts"]["cancelled"]) == (1, 8)
    assert queue.states("after") == ["cancelled"]
    assert (queue.state.unfinished_total, queue.state.array_backlog) == (0, 0)
    assert isinstance(queue.cancel("a"), Refused)


def test_large_array_is_cancelled_in_slices(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.submit(array("a", "1-900"))
    tended(queue)
    monkeypatch.setattr("coordination.queue_state.MOST_AT_ONCE", 200)
    queue.cancel("a")
    assert queue.state.unfinished_total == 700
    assert made(queue) == [f"a.{n}" for n in range(1, 901)]
    queue.wake()
    assert queue.state.unfinished_total == 500
    answer = queue.retry("a.1")
    assert isinstance(answer, Refused) and "is being cancelled" in answer.detail
    tended(queue)
    assert summary(queue)["counts"]["cancelled"] == 900


@pytest.mark.parametrize("verb", ["retry", "release"])
def test_order_that_is_meant_for_a_job_is_refused_for_an_array(queue: Queue, verb: str) -> None:
    queue.submit(array("a", "1-3"))
    answer = getattr(queue, verb)("a")
    assert isinstance(answer, Refused)
    assert (answer.status, answer.field) == (409, "id")
    assert "a is an array; it is its members" in answer.detail


def test_member_that_is_not_made_yet_cannot_be_cancelled_alone(queue: Queue, few: None) -> None:
    queue.submit(array("a", "1-9"))
    answer = queue.cancel("a.9")
    assert isinstance(answer, Refused)
    assert (answer.status, answer.field) == (404, "id")
    assert "whose turn has not come" in answer.detail


@pytest.mark.parametrize("include_running", [False, True])
def test_clear_drops_what_is_to_come_too(queue: Queue, few: None, include_running: bool) -> None:
    queue.submit(array("a", "1-9"))
    queue.claim("a.1")
    n = queue.apply(c.Clear(queue.now, 1 << 40, include_running, 1_000))
    assert n == (9 if include_running else 8)
    assert queue.states("a.1") == ["cancelled" if include_running else "claimed"]
    if not include_running:
        assert summary(queue)["state"] == "running"
        queue.finish("a.1")
    assert (summary(queue)["state"], queue.state.array_backlog) == ("cancelled", 0)


def test_array_is_forgotten_with_the_last_of_its_members(queue: Queue) -> None:
    queue.submit(array("a", "1-3"))
    run(queue, "a.1", "a.2", "a.3")
    queue.prune(limit=2)
    assert summary(queue)["counts"]["completed"] == 3, "what is forgotten still counts"
    queue.prune(limit=2)
    assert queue.rows("arrays") == queue.rows("jobs") == queue.rows("shapes") == []


def test_array_that_never_had_a_member_is_forgotten_by_age(queue: Queue) -> None:
    queue.submit(new_job("x"), array("a", "1-3", depends_on=("x",)))
    queue.cancel("a")
    queue.prune(before=queue.now)
    assert summary(queue)["state"] == "cancelled"
    queue.prune()
    assert queue.rows("arrays") == []


# -- looking ---------------------------------------------------------------------------------------------------------


def test_members_are_listed_by_their_array(queue: Queue) -> None:
    queue.submit(new_job("x"), array("a", "1-5"), array("b", "1-2"), new_job("y"))
    run(queue, "a.2")
    look = reader(queue)
    page, cursor = look.jobs(filters={}, limit=3, before=None, array="a")
    assert [job["id"] for job in page] == ["a.5", "a.4", "a.3"]
    page, cursor = look.jobs(filters={}, limit=3, before=cursor, array="a")
    assert ([job["id"] for job in page], cursor) == (["a.2", "a.1"], None)
    page, _ = look.jobs(filters={"state": "completed"}, limit=9, before=None, array="a")
    assert [(job["id"], job["array"]) for job in page] == [("a.2", {"id": "a", "index": 2, "size": 5})]
    assert look.jobs(filters={}, limit=9, before=None, array="nobody") == ([], None)


def test_member_that_is_to_come_can_be_looked_at(queue: Queue, few: None) -> None:
    queue.submit(array("a", "1-9"))
    look = reader(queue)
    told = look.member_to_come("a.9")
    assert told is not None
    assert (told["state"], told["array"]["index"]) == ("waiting", 9)
    for other in ("a.1", "a.10", "a.09", "a.", "b.1", "x"):
        assert look.member_to_come(other) is None
    queue.cancel("a")
    told = look.member_to_come("a.9")
    assert told is not None
    assert (told["state"], told["reason"]) == ("cancelled", "by hand")
