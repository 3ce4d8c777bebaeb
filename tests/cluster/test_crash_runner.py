"""The runner killed, both killed, and the orchestrator away while jobs end: the agent is not the job (DESIGN §8.5)."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.cluster.crashes import alive, finished_or_none, job_processes, kill_runner, runner_of
from tests.nodes import NodeProcess, wait_until

FOREVER = ["sh", "-c", "sleep 600"]


SMALL = {"cpus": 0.1}


def gated(gate: Path, then: str) -> list[str]:
    """A job that waits for a file."""
    return ["sh", "-c", f'while [ ! -e "{gate}" ]; do sleep 0.05; done; {then}']


def test_a_killed_runner_fails_its_jobs_with_that_reason_and_leaves_no_process(node: NodeProcess) -> None:
    job = node.submit(command=FOREVER, max_attempts=1, grace_seconds=1)
    node.wait_for(job, "running")
    processes = wait_until(lambda: job_processes(node, job))
    before = kill_runner(node)
    record = node.wait_for(job, "failed")
    assert record["history"][-1]["reason"] == "runner_lost"
    assert "the runner was killed" in record["error"]
    assert record["attempt"] == 1
    assert not any(map(alive, processes))
    later = node.wait_for(node.submit(command=["sh", "-c", "exit 0"]), "completed")
    assert later["exit_code"] == 0
    after = runner_of(node)
    assert after is not None
    assert after.pid != before


def test_a_job_with_attempts_left_is_run_again_after_its_runner_was_killed(node: NodeProcess) -> None:
    script = 'if [ "$P2P_ATTEMPT" = 1 ]; then sleep 600; fi; exit 0'
    job = node.submit(command=["sh", "-c", script], max_attempts=2, retry_backoff_seconds=0, grace_seconds=1)
    node.wait_for(job, "running")
    kill_runner(node)
    record = node.wait_for(job, "completed")
    assert (record["attempt"], record["failed_attempts"], record["exit_code"]) == (2, 1, 0)
    assert "retry: runner_lost" in [step["reason"] for step in record["history"]]


def test_a_runner_killed_again_and_again_is_replaced_each_time(node: NodeProcess) -> None:
    for _ in range(4):
        job = node.submit(command=FOREVER, max_attempts=1, grace_seconds=1)
        node.wait_for(job, "running")
        kill_runner(node)
        assert node.wait_for(job, "failed")["history"][-1]["reason"] == "runner_lost"


def test_both_killed_at_once_is_told_as_a_lost_runner_at_the_next_start(node: NodeProcess) -> None:
    once = node.submit(command=FOREVER, max_attempts=1, grace_seconds=1)
    script = 'if [ "$P2P_ATTEMPT" = 1 ]; then sleep 600; fi; exit 0'
    twice = node.submit(command=["sh", "-c", script], max_attempts=2, retry_backoff_seconds=0, grace_seconds=1)
    for job in (once, twice):
        node.wait_for(job, "running")
    runner = runner_of(node)
    assert runner is not None
    assert node.process is not None
    node.process.send_signal(signal.SIGKILL)
    runner.kill()
    node.process.wait(30)
    node.start()
    assert node.wait_for(once, "failed")["history"][-1]["reason"] == "runner_lost"
    assert node.wait_for(twice, "completed")["attempt"] == 2
    assert not job_processes(node, once)


def test_ends_that_nobody_heard_are_reported_on_return(node: NodeProcess) -> None:
    """The runner's records are the outbox: exit code and result of what ended while the orchestrator was away."""
    gate = node.folder / "gate"
    good = node.submit(
        command=gated(gate, 'echo \'{"score": 9}\' > "$P2P_JOB_DIR/result.json"'), max_attempts=1, requires=SMALL
    )
    bad = node.submit(command=gated(gate, "echo last words >&2; exit 42"), max_attempts=1, requires=SMALL)
    hit = node.submit(command=gated(gate, "kill -KILL $$"), max_attempts=1, requires=SMALL)
    for job in (good, bad, hit):
        node.wait_for(job, "running")
    processes = [process for job in (good, bad, hit) for process in job_processes(node, job)]
    node.kill()
    gate.touch()
    psutil.wait_procs(processes, timeout=20)
    node.start()
    record = node.wait_for(good, "completed")
    assert (record["exit_code"], record["result"], record["attempt"]) == (0, {"score": 9}, 1)
    record = node.wait_for(bad, "failed")
    assert (record["exit_code"], record["attempt"]) == (42, 1)
    assert "last words" in record["error"]
    assert node.wait_for(hit, "failed")["exit_code"] == -9


def test_ends_wait_through_several_starts_that_never_got_far(node: NodeProcess) -> None:
    gate = node.folder / "gate"
    job = node.submit(command=gated(gate, "exit 7"), max_attempts=1)
    node.wait_for(job, "running")
    processes = job_processes(node, job)
    node.kill()
    gate.touch()
    psutil.wait_procs(processes, timeout=20)
    for _ in range(3):
        node.start(wait=False)
        wait_until(lambda: node.log_text)
        node.kill()
    node.start()
    record = node.wait_for(job, "failed")
    assert (record["exit_code"], record["attempt"]) == (7, 1)
    assert [step["state"] for step in record["history"]] == ["pending", "claimed", "running", "failed"]


def test_a_cancel_acknowledged_just_before_a_kill_ends_the_process_after_the_restart(node: NodeProcess) -> None:
    job = node.submit(command=FOREVER, max_attempts=1, grace_seconds=1)
    node.wait_for(job, "running")
    processes = wait_until(lambda: job_processes(node, job))
    assert node.request("POST", f"/jobs/{job}/cancel")[0] == 200
    node.kill()
    node.start()
    wait_until(lambda: not any(map(alive, processes)))
    assert node.job(job)["state"] == "cancelled"


def test_a_cancel_while_the_runner_is_dying_still_ends_the_process(node: NodeProcess) -> None:
    job = node.submit(command=["sh", "-c", "trap '' TERM; sleep 600"], max_attempts=1, grace_seconds=1)
    node.wait_for(job, "running")
    processes = wait_until(lambda: job_processes(node, job))
    runner = runner_of(node)
    assert runner is not None
    runner.suspend()
    assert node.request("POST", f"/jobs/{job}/cancel", {})[0] == 200
    runner.kill()
    wait_until(lambda: not any(map(alive, processes)))
    assert node.job(job)["state"] == "cancelled"


def test_a_released_job_is_not_confused_with_its_old_attempt_that_takes_its_time_to_end(
    start_node: Callable[..., NodeProcess],
) -> None:
    """Two attempts of one job run on one node for the length of a grace: only the old one is to go."""
    node = start_node("--no-populate", queue={"heartbeat_seconds": 0.1})
    deaf = "trap '' TERM; i=0; while [ $i -lt 40 ]; do sleep 0.1; i=$((i+1)); done"
    script = f'if [ "$P2P_ATTEMPT" = 1 ]; then {deaf}; fi; sleep 1; exit 0'
    job = node.submit(command=["sh", "-c", script], max_attempts=1, grace_seconds=60, requires=SMALL)
    node.wait_for(job, "running")
    assert node.request("POST", f"/jobs/{job}/release", {})[0] == 200
    record = wait_until(lambda: finished_or_none(node, job), seconds=30)
    assert (record["state"], record["attempt"], record["failed_attempts"]) == ("completed", 2, 0)


def test_a_restart_between_a_release_and_the_new_attempt_does_not_strand_the_job(node: NodeProcess) -> None:
    deaf = "trap '' TERM; i=0; while [ $i -lt 40 ]; do sleep 0.1; i=$((i+1)); done"
    script = f'if [ "$P2P_ATTEMPT" = 1 ]; then {deaf}; fi; exit 0'
    job = node.submit(command=["sh", "-c", script], max_attempts=1, grace_seconds=60, requires=SMALL)
    node.wait_for(job, "running")
    assert node.request("POST", f"/jobs/{job}/release", {})[0] == 200
    node.kill()
    node.start()
    record = wait_until(lambda: finished_or_none(node, job), seconds=20)
    assert (record["state"], record["failed_attempts"]) == ("completed", 0)


def test_people_who_kill_the_orchestrator_by_name_do_not_hit_the_runner_or_jobs(node: NodeProcess) -> None:
    """``pkill -f p2p_orchestrator`` is in every runbook."""
    job = node.submit(command=FOREVER, max_attempts=1, grace_seconds=1)
    node.wait_for(job, "running")
    runner = runner_of(node)
    assert runner is not None
    for process in (runner, *wait_until(lambda: job_processes(node, job))):
        assert "p2p_orchestrator" not in " ".join(process.cmdline())
        assert "p2p_orchestrator" not in process.name()
    assert node.process is not None
    assert "p2p_orchestrator" in " ".join(psutil.Process(node.process.pid).cmdline())
