"""The life of a job with real processes: what a failure leads to, what goes on where another attempt stopped, what
recurs."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.nodes import NodeProcess, wait_until

GPUS = [
    {"model": "NVIDIA A40", "memory_mb": 46_000, "uuid": "GPU-aa", "compute_capability": "8.6"},
    {"model": "NVIDIA GeForce RTX 4090", "memory_mb": 24_000, "uuid": "GPU-bb", "compute_capability": "8.9"},
]
KINDS = {
    "kinds": {
        "strict": {
            "command": ["sh", "-c", "exit {code}"],
            "no_retry_exit_codes": [2, "64-78"],
            "retry_backoff_seconds": 0,
            "requires": {"cpus": 0.1},
        },
        "slow": {"aliases": ["lazy"], "command": ["sleep", "600"], "max_attempts": 1, "grace_seconds": 1.0},
    },
    "schedules": {"from-the-file": {"cron": "0 0 1 1 *", "job": {"kind": "strict", "params": {"code": 0}}}},
}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    folder = tmp_path_factory.mktemp("life")
    (folder / "resources.yaml").write_text(yaml.safe_dump({"cpus": 8, "memory_mb": 8_000, "gpus": GPUS}))
    (folder / "jobs.yaml").write_text(yaml.safe_dump(KINDS))
    flags = ["--no-populate", "--resources", str(folder / "resources.yaml"), "--jobs-file", str(folder / "jobs.yaml")]
    node = NodeProcess(folder, flags)
    node.environment["RINGRIFT_LAZY_TIMEOUT"] = "0.5"
    try:
        node.start()
        yield node
    finally:
        node.destroy()


def sh(script: str, **more: Any) -> dict[str, Any]:
    return {"command": ["sh", "-c", script], "requires": {"cpus": 0.1}, "retry_backoff_seconds": 0, **more}


# -- exit codes and memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "attempts", "reason"),
    [
        ({"kind": "strict", "params": {"code": 65}}, 1, "exit: code 65 is not retried"),
        ({"kind": "strict", "params": {"code": 2}}, 1, "exit: code 2 is not retried"),
        ({"kind": "strict", "params": {"code": 3}, "max_attempts": 2}, 2, "exit"),
        ({"kind": "strict", "params": {"code": 2}, "no_retry_exit_codes": [], "max_attempts": 2}, 2, "exit"),
        (sh("exit 9", no_retry_exit_codes=["5-10"], max_attempts=5), 1, "exit: code 9 is not retried"),
        (sh("kill -9 $$", no_retry_exit_codes=[9], max_attempts=2), 2, "exit"),
    ],
    ids=["range of the kind", "code of the kind", "another code", "the job's own list", "range of the job", "a signal"],
)
def test_exit_code_decides_whether_a_job_is_tried_again(
    node: NodeProcess, job: dict[str, Any], attempts: int, reason: str
) -> None:
    record = node.wait_for(node.submit(**job), "failed")
    assert (record["failed_attempts"], record["reason"]) == (attempts, reason)
    if "not retried" in reason:
        assert record["error"].endswith(f"(exit code {record['exit_code']} is one of no_retry_exit_codes)")


def test_process_that_ran_out_of_gpu_memory_is_retried_asking_for_more(node: NodeProcess) -> None:
    words = "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB"
    script = f'if [ "$P2P_ATTEMPT" = 1 ]; then echo "{words}" >&2; seq 1 200 >&2; exit 1; fi'
    job = node.submit(**sh(script, requires={"cpus": 0.1, "gpus": 1, "gpu_model": "4090"}))
    record = node.wait_for(job, "completed")
    assert [step["reason"] for step in record["history"] if step["reason"]] == ["retry: cuda_oom"]
    assert record["placement_hints"] == {"avoid": ["n1"], "gpu_memory_above_mb": 24_000}
    assert record["requires"] == {"cpus": 0.1, "gpus": 1, "gpu_model": "4090"}


# -- checkpoints -----------------------------------------------------------------------------------------------------

RESUMING = """
import json, os, pathlib, signal, sys, time
at = pathlib.Path(os.environ["P2P_JOB_DIR"], "checkpoint.json")
step = json.loads(at.read_text())["step"] if at.exists() else 0
def save(*_):
    at.write_text(json.dumps({"step": step + 10}))
    sys.exit(int(sys.argv[2]))
if step >= int(sys.argv[1]):
    pathlib.Path(os.environ["P2P_JOB_DIR"], "result.json").write_text(json.dumps({"resumed_at": step}))
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
if len(sys.argv) > 3:
    time.sleep(600)
save()
"""


def resuming(until: int, code: int, *more: str, **job: Any) -> dict[str, Any]:
    command = ["python", "-c", RESUMING, str(until), str(code), *more]
    return {"command": command, "requires": {"cpus": 0.1}, "retry_backoff_seconds": 0, **job}


def test_next_attempt_goes_on_from_the_checkpoint_of_a_failed_one(node: NodeProcess) -> None:
    record = node.wait_for(node.submit(**resuming(20, 1)), "completed")
    assert (record["attempt"], record["result"], record["checkpoint"]) == (3, {"resumed_at": 20}, None)


def test_checkpoint_written_on_sigterm_outlives_a_timeout(node: NodeProcess) -> None:
    job = node.submit(**resuming(10, 0, "sleep", timeout_seconds=1.5))
    record = node.wait_for(job, "completed")
    assert (record["attempt"], record["result"]) == (2, {"resumed_at": 10})
    assert record["failed_attempts"] == 1, "a timeout is a failure"


def test_checkpoint_of_a_job_that_failed_for_good_is_there_for_a_retry_by_hand(node: NodeProcess) -> None:
    job = node.submit(**resuming(20, 1, max_attempts=1))
    assert node.wait_for(job, "failed")["checkpoint"] == {"step": 10}
    assert node.request("POST", f"/jobs/{job}/retry")[0] == 200
    assert node.wait_for(job, "failed")["checkpoint"] == {"step": 20}
    node.request("POST", f"/jobs/{job}/retry")
    assert node.wait_for(job, "completed")["result"] == {"resumed_at": 20}


def test_checkpoint_survives_a_kill_of_the_node(node: NodeProcess) -> None:
    job = node.submit(**resuming(10, 1, retry_backoff_seconds=3))
    wait_until(lambda: node.job(job)["checkpoint"] == {"step": 10})
    node.kill()
    node.start()
    assert node.wait_for(job, "completed")["result"] == {"resumed_at": 10}


# -- timeouts --------------------------------------------------------------------------------------------------------


def test_timeout_from_the_environment_ends_a_job_of_that_kind(node: NodeProcess) -> None:
    record = node.wait_for(node.submit(kind="slow"), "failed")
    assert (record["timeout_seconds"], record["reason"], record["error"]) == (0.5, "timeout", "timeout after 0.5 s")


def test_jobs_own_timeout_wins(node: NodeProcess) -> None:
    job = node.submit(kind="lazy", timeout_seconds=2)
    record = node.wait_for(job, "failed")
    assert (record["timeout_seconds"], record["error"]) == (2.0, "timeout after 2 s")
    assert record["finished_at"] - record["started_at"] > 1.9


# -- progress --------------------------------------------------------------------------------------------------------


def test_progress_that_is_too_long_is_told_to_whoever_looks(node: NodeProcess) -> None:
    script = 'head -c 70000 /dev/zero | tr "\\0" 1 > "$P2P_JOB_DIR/progress.json"; sleep 600'
    job = node.submit(**sh(script, grace_seconds=0))
    told = wait_until(lambda: node.job(job).get("progress"), seconds=30)
    assert told == {"error": "progress.json is larger than 65536 bytes"}
    node.request("POST", f"/jobs/{job}/cancel")


# -- dead letters ----------------------------------------------------------------------------------------------------


def test_dead_letters_of_one_group_are_retried_together(node: NodeProcess, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    jobs = [node.submit(**sh(f'test -e "{gate}"', max_attempts=1, group="letters")) for _ in range(5)]
    for job in jobs:
        node.wait_for(job, "failed")
    gate.touch()
    status, told = node.request("POST", "/work_queue/retry_failed", {"group": "letters", "limit": 2})
    assert (status, told) == (200, {"retried": 2})
    status, told = node.request("POST", "/work_queue/retry_failed", {"group": "letters"})
    assert (status, told) == (200, {"retried": 3})
    for job in jobs:
        node.wait_for(job, "completed")
    assert node.request("POST", "/work_queue/retry_failed", {"group": "letters"})[1] == {"retried": 0}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"kind": "nobody"}, "kind"),
        ({"kind": 5}, "kind"),
        ({"limit": 0}, "limit"),
        ({"max_age_hours": -1}, "max_age_hours"),
        ({"group": ""}, "group"),
        ({"grp": "x"}, "grp"),
    ],
)
def test_bad_order_for_dead_letters_is_refused_by_field(node: NodeProcess, body: dict[str, Any], field: str) -> None:
    status, told = node.request("POST", "/work_queue/retry_failed", body)
    assert (status, told["field"]) == (422, field)


# -- schedules -------------------------------------------------------------------------------------------------------


def test_schedules_are_put_shown_and_dropped(node: NodeProcess) -> None:
    body = {"name": "nightly", "cron": "30 3 * * *", "timezone": "Europe/Berlin", "job": sh("true")}
    status, told = node.request("POST", "/schedules", body)
    assert status == 200, told
    assert (told["name"], told["origin"], told["runs"], told["last_job"]) == ("nightly", "api", 0, None)
    assert 0 < told["next_due_at"] - time.time() <= 25 * 3600
    rows = {row["name"]: row["origin"] for row in node.request("GET", "/schedules")[1]["schedules"]}
    assert rows == {"from-the-file": "file", "nightly": "api"}
    assert node.request("GET", "/schedules/nightly")[1]["schedule"]["timezone"] == "Europe/Berlin"
    assert node.request("DELETE", "/schedules/nightly") == (200, {"dropped": "nightly"})
    assert node.request("GET", "/schedules/nightly")[0] == 404
    assert node.request("DELETE", "/schedules/nightly")[0] == 404
    status, told = node.request("DELETE", "/schedules/from-the-file")
    assert (status, told["field"]) == (409, "name")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"cron": "x"}, "cron"),
        ({"timezone": "Mars/Olympus"}, "timezone"),
        ({"name": "a b"}, "name"),
        ({"name": None}, "name"),
        ({"job": {"kind": "nobody"}}, "job.kind"),
        ({"job": {"command": ["x"], "array": "5-1"}}, "job.array"),
        ({"jobs": {}}, "jobs"),
    ],
)
def test_bad_schedule_is_refused_by_field(node: NodeProcess, change: dict[str, Any], field: str) -> None:
    body = {"name": "bad", "cron": "* * * * *", "job": sh("true"), **change}
    status, told = node.request("POST", "/schedules", body)
    assert (status, told["field"]) == (422, field)
    assert node.request("GET", "/schedules/bad")[0] == 404


def test_run_that_was_due_while_the_node_was_down_is_made_up_for_once(node: NodeProcess) -> None:
    """The next full minute passes while nobody is there: it waits for that, up to a minute."""
    if time.time() % 60 > 50:
        time.sleep(60 - time.time() % 60 + 1)
    body = {"name": "minutely", "cron": "* * * * *", "job": sh("date", group="minutely")}
    status, told = node.request("POST", "/schedules", body)
    assert status == 200, told
    due = told["next_due_at"]
    node.kill(signal.SIGKILL)
    time.sleep(max(due - time.time() + 0.5, 0))
    node.start()
    row = wait_until(lambda: (found := node.request("GET", "/schedules/minutely")[1])["runs"] and found)
    assert (row["runs"], row["last_due_at"], row["next_due_at"]) == (1, due, due + 60)
    assert node.request("DELETE", "/schedules/minutely")[0] == 200
    node.wait_for(row["last_job"], "completed")
    jobs = node.request("GET", "/jobs?group=minutely")[1]["jobs"]
    assert [job["id"] for job in jobs] == [row["last_job"]]
    assert json.dumps(jobs[0]["unique_key"]) == '"schedule:minutely"'
