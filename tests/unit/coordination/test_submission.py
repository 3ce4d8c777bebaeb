"""From the body of a request to the jobs of a command: every field, every refusal, and which field it names."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coordination.commands import NewJob
from coordination.errors import InvalidInput
from coordination.job import MAX_BATCH_JOBS, MAX_JOB_BYTES
from coordination.kinds import Kind, Kinds
from coordination.lane import LaneKey, lane_key, shown_requires
from coordination.placement import need_of
from coordination.submission import Submission, new_id

NOW = 1_700_000_000_000
KINDS = Kinds(
    {
        "train": Kind.model_validate(
            {
                "aliases": ["learn"], "command": ["train", "{game}"], "params": {"game": "hex"}, "priority": 90,
                "timeout_seconds": 60.0, "max_attempts": 5, "retry_backoff_seconds": 7.5, "grace_seconds": 99.0,
                "requires": {"gpus": 1, "cpus": 2.0}, "env": {"MODE": "kind", "KEEP": "1"},
            }
        )
    },
    {},
)  # fmt: skip


def submit(*bodies: Any, batch: bool = True, kinds: Kinds = KINDS) -> tuple[NewJob, ...]:
    submission = Submission(kinds, NOW, batch=batch)
    for body in bodies:
        submission.add(body)
    return submission.finish()


def one(**body: Any) -> NewJob:
    (job,) = submit({"command": ["true"], **body} if "kind" not in body else body, batch=False)
    return job


def test_job_takes_what_it_does_not_give_from_its_kind() -> None:
    job = one(kind="learn")
    assert (job.kind, job.group, job.priority, job.max_attempts) == ("train", "default", 90, 5)
    assert (job.backoff_ms, job.timeout_ms, job.not_before_ms, job.unique_key) == (7_500, 60_000, 0, None)
    assert shown_requires(job.requires) == {"cpus": 2.0, "gpus": 1}
    assert lane_key(job.requires) == LaneKey("default", "train", 60_000 + 99_000, True)
    carried = json.loads(job.spec)
    assert carried == {"command": ["train", "hex"], "env": {"MODE": "kind", "KEEP": "1"}, "grace_seconds": 99.0}


def test_what_the_job_gives_wins() -> None:
    job = one(
        kind="train", params={"game": "go"}, requires={"cpus": 3}, priority=0, group="team", timeout_seconds=5,
        max_attempts=1, retry_backoff_seconds=0, unique_key="u", not_before=1_800_000_000.5, nodes=2,
        env={"MODE": "job"}, cwd="/data", grace_seconds=1, fence="strict",
    )  # fmt: skip
    assert (job.priority, job.group, job.timeout_ms, job.max_attempts, job.backoff_ms) == (0, "team", 5_000, 1, 0)
    assert (job.unique_key, job.not_before_ms) == ("u", 1_800_000_000_500)
    assert shown_requires(job.requires) == {"cpus": 3.0}
    assert need_of(job.requires).nodes == 2
    assert lane_key(job.requires) == LaneKey("team", "train", 5_000 + 1_000, True)
    assert json.loads(job.spec) == {
        "command": ["train", "go"], "params": {"game": "go"}, "env": {"MODE": "job", "KEEP": "1"}, "cwd": "/data",
        "grace_seconds": 1.0, "fence": "strict", "nodes": 2,
    }  # fmt: skip


def test_exit_codes_that_are_not_retried_come_from_the_kind_unless_the_job_has_its_own() -> None:
    kinds = Kinds({"strict": Kind.model_validate({"command": ["x"], "no_retry_exit_codes": [78, 2, "64-77", 2]})}, {})
    (own,) = submit({"kind": "strict", "no_retry_exit_codes": []}, kinds=kinds)
    (default,) = submit({"kind": "strict"}, kinds=kinds)
    assert (default.no_retry, own.no_retry, one().no_retry) == ("2,64-77,78", "", "")


def test_whether_a_job_makes_way_comes_from_its_kind_unless_it_says_so() -> None:
    kinds = Kinds({"long": Kind.model_validate({"command": ["x"], "preemptible": False})}, {})
    kept, yields, default = submit(
        {"kind": "long"}, {"kind": "long", "preemptible": True}, {"command": ["x"]}, kinds=kinds
    )
    assert json.loads(kept.spec)["preemptible"] is False
    assert "preemptible" not in json.loads(yields.spec)
    assert "preemptible" not in json.loads(default.spec)


def test_what_a_node_must_not_have_is_part_of_the_shape() -> None:
    job = one(requires={"not_labels": {"zone": "us"}, "anti_affinity": "database"})
    assert shown_requires(job.requires) == {"not_labels": {"zone": "us"}, "anti_affinity": "database"}


def test_times_are_taken_as_people_write_them() -> None:
    assert one(not_before="2026-01-31T08:00:00+00:00").not_before_ms == 1_769_846_400_000
    assert one(not_before="2026-01-31T09:00:00+01:00").not_before_ms == 1_769_846_400_000
    assert one(not_before=5).not_before_ms == 5_000


def test_shortest_timeout_is_still_a_timeout() -> None:
    assert one(timeout_seconds=0.0001).timeout_ms == 1, "0 would mean: none"
    assert one().timeout_ms == 0


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"comand": ["true"]}, "comand", "did you mean 'command'"),
        ({"command": "echo hi"}, "command", "list of arguments"),
        ({"command": []}, "command", ""),
        ({"command": ["a\0b"]}, "command[0]", "NUL"),
        ({"command": ["a", 5]}, "command[1]", "string"),
        ({"command": ["\ud800"]}, "command[0]", ""),
        ({"command": ["x" * 131_072]}, "command[0]", "at most 131071 bytes"),
        ({}, "command", "needs a command"),
        ({"kind": "trian"}, "kind", "did you mean 'train'"),
        ({"kind": "a b"}, "kind", ""),
        ({"params": {"x": [1]}}, "params.x", ""),
        ({"requires": {"gpu": 1}}, "requires.gpu", "did you mean 'gpus'"),
        ({"requires": {"gpus": -1}}, "requires.gpus", ""),
        ({"requires": {"gpus": True}}, "requires.gpus", "not true or false"),
        ({"requires": {"gpus": 2, "gpu_share": 0.5}}, "requires.gpu_share", "gpus: 1"),
        ({"requires": {"gpu_model": "("}}, "requires.gpu_model", "is not a pattern"),
        ({"requires": {"gpu_model": "(a+)+"}}, "requires.gpu_model", ""),
        ({"requires": {"min_compute_capability": "8"}}, "requires.min_compute_capability", ""),
        ({"requires": {"cpus": float("inf")}}, "requires.cpus", ""),
        ({"requires": {"labels": {"zone": 5}}}, "requires.labels.zone", ""),
        ({"priority": 101}, "priority", "100"),
        ({"priority": -1}, "priority", "0"),
        ({"priority": "5"}, "priority", ""),
        ({"group": ""}, "group", ""),
        ({"timeout_seconds": 0}, "timeout_seconds", "greater than 0"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds", ""),
        ({"max_attempts": 0}, "max_attempts", "1"),
        ({"max_attempts": 1.5}, "max_attempts", ""),
        ({"retry_backoff_seconds": 601}, "retry_backoff_seconds", "600"),
        ({"depends_on": "abc"}, "depends_on", ""),
        ({"depends_on": [""]}, "depends_on[0]", ""),
        ({"unique_key": ""}, "unique_key", ""),
        ({"not_before": "tomorrow"}, "not_before", "ISO 8601"),
        ({"not_before": "2026-01-31T08:00:00"}, "not_before", "UTC offset"),
        ({"nodes": 0}, "nodes", "1"),
        ({"env": {"1A": "x"}}, "env", "'1A'"),
        ({"env": {"A\n": "x"}}, "env", "not an environment variable's name"),
        ({"env": {"P2P_URL": "x"}}, "env", "set by the node"),
        ({"env": {"CUDA_VISIBLE_DEVICES": "0"}}, "env", "set by the node"),
        ({"env": {"A": 5}}, "env.A", "string"),
        ({"cwd": "here"}, "cwd", "absolute"),
        ({"grace_seconds": 3601}, "grace_seconds", "3600"),
        ({"fence": "loose"}, "fence", "'attempt' or 'strict'"),
        ({"preemptible": "no"}, "preemptible", ""),
        ({"requires": {"anti_affinity": ""}}, "requires.anti_affinity", ""),
        ({"requires": {"anti_affinity": "a b"}}, "requires.anti_affinity", ""),
        ({"requires": {"not_labels": {"zone": 5}}}, "requires.not_labels.zone", ""),
        ({"requires": {"labels": {"z": "eu"}, "not_labels": {"z": "eu"}}}, "requires.not_labels", "no node could"),
        ({"no_retry_exit_codes": 2}, "no_retry_exit_codes", ""),
        ({"no_retry_exit_codes": [0]}, "no_retry_exit_codes", "'0' is neither an exit code"),
        ({"no_retry_exit_codes": [256]}, "no_retry_exit_codes", "'256'"),
        ({"no_retry_exit_codes": ["9-3"]}, "no_retry_exit_codes", "'9-3'"),
        ({"no_retry_exit_codes": ["-9"]}, "no_retry_exit_codes", "'-9'"),
        ({"no_retry_exit_codes": ["two"]}, "no_retry_exit_codes", "'two'"),
        ({"no_retry_exit_codes": [True]}, "no_retry_exit_codes[0]", ""),
        ({"no_retry_exit_codes": [1] * 65}, "no_retry_exit_codes", "64"),
        (["true"], "(body)", ""),
        (None, "(body)", ""),
    ],
)
def test_refusal_names_the_field_alone_and_in_a_batch(body: Any, field: str, words: str) -> None:
    if isinstance(body, dict) and body and not {"command", "comand", "kind"} & body.keys():
        body = {"command": ["true"], **body}
    with pytest.raises(InvalidInput) as alone:
        submit(body, batch=False)
    assert alone.value.field == field
    assert words in alone.value.detail
    with pytest.raises(InvalidInput) as third:
        submit({"command": ["a"]}, {"command": ["b"]}, body)
    assert third.value.field == ("jobs[2]" if field == "(body)" else f"jobs[2].{field}")
    assert third.value.detail == alone.value.detail


def test_batch_may_name_earlier_jobs_by_number() -> None:
    a, b, c = submit(
        {"command": ["a"]},
        {"command": ["b"], "depends_on": ["#0"]},
        {"command": ["c"], "depends_on": ["#1", "old", "#0"]},
    )
    assert b.depends_on == (a.id,)
    assert c.depends_on == (b.id, "old", a.id)
    assert json.loads(c.spec)["depends_on"] == [b.id, "old", a.id]


@pytest.mark.parametrize(
    ("dep", "words"),
    [
        ("#1", "depends on itself"),
        ("#2", "comes after"),
        ("#3", "is not a job of this batch (#0 to #2)"),
        ("#x", "is not a job"),
        ("#-1", "is not a job"),
        ("#", "is not a job"),
        ("#1e0", "is not a job"),
        ("#\u0660", "is not a job"),
        ("#99999999999", "is not a job"),
    ],
)
def test_reference_that_is_no_earlier_job_is_refused(dep: str, words: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        submit({"command": ["a"]}, {"command": ["b"], "depends_on": ["#0", dep]}, {"command": ["c"]})
    assert refused.value.field == "jobs[1].depends_on[1]"
    assert words in refused.value.detail


def test_reference_in_a_single_job_is_refused() -> None:
    with pytest.raises(InvalidInput) as refused:
        submit({"command": ["a"], "depends_on": ["#0"]}, batch=False)
    assert refused.value.field == "depends_on[0]"


def test_job_of_a_mebibyte_is_taken_and_one_byte_more_is_not() -> None:
    argument, n = "x" * 100_000, 10
    plain = len(one(command=["", *[argument] * n]).spec)
    room = MAX_JOB_BYTES - plain
    assert len(one(command=["y" * room, *[argument] * n]).spec) == MAX_JOB_BYTES
    with pytest.raises(InvalidInput, match=f"at most {MAX_JOB_BYTES} bytes; this one is {MAX_JOB_BYTES + 1}"):
        one(command=["y" * (room + 1), *[argument] * n])
    with pytest.raises(InvalidInput) as in_batch:
        submit({"command": ["y" * (room + 1), *[argument] * n]})
    assert in_batch.value.field == "jobs[0]"


def test_batch_is_bounded() -> None:
    submission = Submission(KINDS, NOW, batch=True)
    for _ in range(MAX_BATCH_JOBS):
        submission.add({"command": ["a"]})
    with pytest.raises(InvalidInput, match="at most 10000 jobs"):
        submission.add({"command": ["a"]})


def test_ids_are_unique_and_sort_by_age() -> None:
    ids = [new_id(NOW + n) for n in range(100)]
    assert ids == sorted(set(ids))
    assert {len(id) for id in ids} == {21}
    assert new_id(NOW) != new_id(NOW)
    batches = [submit(*[{"command": ["a"]}] * 1_500) for _ in range(2)]
    assert len({job.id for jobs in batches for job in jobs}) == 3_000
    assert {len(job.id) for job in batches[0]} == {21}
