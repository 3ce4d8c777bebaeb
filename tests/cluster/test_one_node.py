"""A real node runs real processes: the whole path from a request to a finished job."""

from __future__ import annotations

import signal

from tests.nodes import NodeProcess


def test_a_job_runs_and_its_output_exit_code_and_result_are_kept(node: NodeProcess) -> None:
    script = 'echo "on $P2P_NODE_ID"; echo oops >&2; echo \'{"score": 7}\' > "$P2P_JOB_DIR/result.json"'
    job = node.submit(command=["sh", "-c", script])
    record = node.wait_for(job, "completed", "failed")
    assert record["state"] == "completed"
    assert record["exit_code"] == 0
    assert record["result"] == {"score": 7}
    assert [step["state"] for step in record["history"]] == ["pending", "claimed", "running", "completed"]
    assert node.request("GET", f"/jobs/{job}/logs") == (200, "on n1\n")
    assert node.request("GET", f"/jobs/{job}/logs?stream=stderr") == (200, "oops\n")


def test_a_failing_job_is_retried_then_failed_with_its_last_words(node: NodeProcess) -> None:
    job = node.submit(command=["sh", "-c", "echo no luck >&2; exit 3"], max_attempts=2, retry_backoff_seconds=0)
    record = node.wait_for(job, "failed")
    assert (record["attempt"], record["failed_attempts"], record["exit_code"]) == (2, 2, 3)
    assert "no luck" in record["error"]


def test_a_job_outlives_a_killed_orchestrator_and_ends_with_its_true_exit_code(node: NodeProcess) -> None:
    gate = node.folder / "gate"
    job = node.submit(command=["sh", "-c", f'while [ ! -e "{gate}" ]; do sleep 0.05; done; exit 7'], max_attempts=1)
    node.wait_for(job, "running")
    node.kill(signal.SIGKILL)
    gate.touch()
    node.start()
    record = node.wait_for(job, "failed")
    assert (record["exit_code"], record["attempt"]) == (7, 1)
