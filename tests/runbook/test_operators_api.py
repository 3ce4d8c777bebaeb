"""The operators' Python API, name by name (DESIGN §6): beside a node in another process, and inside one."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from config.settings import build
from coordination import live
from coordination.alerts import clear_alert, emit_alert
from coordination.daemon_manager import get_daemon_manager
from coordination.daemon_types import DaemonType
from coordination.errors import InvalidInput, NodeUnreachable, Refused
from coordination.unified_queue_populator import get_queue_populator
from coordination.work_queue import get_work_queue
from p2p.loops.base import LoopHandle
from p2p.loops.job_loops import JobReaperConfig, JobReaperLoop, WorkerPullLoop
from p2p.node import Node
from tests.nodes import ROOT, NodeProcess, free_port, wait_until

QUICK = {
    "queue": {"heartbeat_seconds": 0.1},
    "reaper": {"interval_seconds": 600},
    "health": {"interval_seconds": 0.2},
}
NOWHERE = {"labels": {"zone": "moon"}}
IMPORTS = [
    ("app.coordination.work_queue", "coordination.work_queue"),
    ("app.coordination.unified_queue_populator", "coordination.unified_queue_populator"),
    ("app.coordination.daemon_manager", "coordination.daemon_manager"),
    ("app.coordination.daemon_types", "coordination.daemon_types"),
    ("app.coordination.alerts", "coordination.alerts"),
    ("scripts.p2p.loops.job_loops", "p2p.loops.job_loops"),
]


@pytest.fixture
def box(start_node: Callable[..., NodeProcess], monkeypatch: pytest.MonkeyPatch) -> NodeProcess:
    """A node in another process, which fills no queue by itself, and this process beside it."""
    node = start_node("--no-populate", "--jobs-file", str(ROOT / "config/jobs.yaml"), **QUICK)
    monkeypatch.setenv("P2P_URL", node.url)
    return node


@pytest.mark.parametrize(("historical", "canonical"), IMPORTS, ids=[real for _, real in IMPORTS])
def test_both_import_paths_give_the_same_module(historical: str, canonical: str) -> None:
    assert importlib.import_module(historical) is importlib.import_module(canonical)


# -- beside a node, inside a running event loop -----------------------------------------------------------------------


async def test_the_queue_answers_name_by_name(box: NodeProcess) -> None:
    q = get_work_queue()
    stats = q.get_stats()
    for name in ("pending", "in_progress", "completed_hour", "failed_hour", "oldest_item_age_seconds"):
        assert stats[name] == getattr(stats, name) == 0
    assert (q.get_pending_count(), q.get_in_progress_count()) == (0, 0)
    job = q.add_job(command=["sleep", "600"], grace_seconds=0)
    box.wait_for(job, "running")
    assert q.get_in_progress_count() == 1
    assert q.get_job(job).state == q.get_job(job)["state"] == "running"
    (worker,) = q.get_active_workers()
    assert worker.node == worker["node"] == "n1"
    assert abs(worker.last_heartbeat - time.time()) < 60
    assert worker.assigned == 1
    released = q.release_job(job, reason="stuck_timeout")
    assert released.id == job
    record = box.wait_for(job, "running")
    assert (record["attempt"], record["failed_attempts"]) == (2, 0)
    assert q.cancel_job(job).state == "cancelled"


async def test_counts_and_answers_may_be_awaited_or_not(box: NodeProcess) -> None:
    q, pop, daemons = get_work_queue(), get_queue_populator(), get_daemon_manager()
    waiting = q.add_job(command=["true"], requires=NOWHERE)
    assert (await q.get_stats()).pending == q.get_stats()["pending"] == 1
    assert (await q.health_check()).is_healthy is q.health_check()["is_healthy"] is True
    assert await q.clear_all() == 1
    assert q.clear_all() == 0
    assert (await q.get_job(waiting)).state == "cancelled"
    assert await q.purge_failed_jobs(max_age_hours=24) == q.purge_failed_jobs(max_age_hours=24) == 0
    assert await q.clear_inactive_workers(threshold_seconds=300) == q.clear_inactive_workers() == 0
    assert await q.release_stuck_jobs() == q.release_stuck_jobs() == 0
    assert await pop.populate_all_queues(force=True) == 12
    assert pop.populate_all_queues(force=True) >= 0
    assert (await daemons.restart_daemon(DaemonType.QUEUE_POPULATOR)).state == "running"
    assert daemons.restart_daemon("queue_populator")["state"] == "running"
    assert (await emit_alert("drill", "a drill", who="me")).raised is True
    assert emit_alert("drill", "a drill")["raised"] is False
    assert (await clear_alert("drill")).cleared is True
    assert q.clear_all(include_running=True) >= 0


def test_failures_come_newest_first_with_their_error(box: NodeProcess) -> None:
    q = get_work_queue()
    jobs = [q.add_job(command=["sh", "-c", f"echo {n} >&2; exit 1"], max_attempts=1) for n in ("first", "second")]
    for job in jobs:
        box.wait_for(job, "failed")
        time.sleep(0.01)
    failures = q.get_recent_failures(limit=20)
    assert {failure.id for failure in failures} == set(jobs)
    assert [failure.failed_at for failure in failures] == sorted((f.failed_at for f in failures), reverse=True)
    assert len(q.get_recent_failures(limit=1)) == 1
    assert "second" in next(failure["error"] for failure in failures if failure.id == jobs[1])
    assert q.purge_failed_jobs(max_age_hours=0) == 2
    assert q.get_recent_failures() == []
    with pytest.raises(Refused):
        q.get_job(jobs[0])


def test_health_has_a_verdict_a_message_and_every_metric(box: NodeProcess) -> None:
    health = get_work_queue().health_check()
    assert (health.is_healthy, health.message) == (True, "healthy")
    assert {"queue_depth", "stuck_jobs", "failure_rate", "time_since_completion"} <= set(health.details)
    with pytest.raises(AttributeError, match="there is no 'nonsense' here; there is: details, is_healthy, message"):
        _ = health.nonsense


def test_clear_all_spares_what_runs_unless_told_otherwise(box: NodeProcess) -> None:
    q = get_work_queue()
    running = q.add_job(command=["sleep", "600"], grace_seconds=0)
    box.wait_for(running, "running")
    waiting = [q.add_job(command=["true"], requires=NOWHERE), q.add_job(command=["true"], not_before=time.time() + 999)]
    assert q.clear_all() == 2
    assert q.get_job(running).state == "running"
    assert {q.get_job(job).state for job in waiting} == {"cancelled"}
    assert q.clear_all(include_running=True) == 1
    assert q.get_job(running).state == "cancelled"


def test_the_populator_says_when_it_filled_and_when_its_daemon_does_not_run(
    start_node: Callable[..., NodeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start_node("--jobs-file", str(ROOT / "config/jobs.yaml"), "--no-worker", **QUICK)
    monkeypatch.setenv("P2P_URL", node.url)
    pop = get_queue_populator()
    wait_until(lambda: pop.health_check().details["last_populate_time"])
    health = pop.health_check()
    assert health.is_healthy
    assert health.details["items_added_hour"] == 12
    assert abs(health.details["last_populate_time"] - time.time()) < 60
    get_daemon_manager().stop_daemon(DaemonType.QUEUE_POPULATOR)
    health = pop.health_check()
    assert not health.is_healthy
    assert "its daemon is not running (stopped)" in health.message
    assert get_daemon_manager().start_daemon(DaemonType.QUEUE_POPULATOR).state == "running"
    assert pop.health_check().is_healthy


def test_loops_are_read_afresh_through_their_handles(box: NodeProcess) -> None:
    reaper, worker = JobReaperLoop.get_instance(), WorkerPullLoop.get_instance()
    assert isinstance(reaper, LoopHandle)
    wait_until(lambda: reaper.is_running)
    assert reaper.last_run_time is not None
    assert abs(reaper.last_run_time - time.time()) < 60
    assert reaper.stats.get("jobs_reaped", 0) == 0
    box.wait_for(get_work_queue().add_job(command=["true"]), "completed")
    assert (worker.stats.get("jobs_pulled", 0), worker.stats.get("pull_failures", 0)) == (1, 0)
    assert worker.is_running
    get_daemon_manager().stop_daemon("worker_pull")
    assert not worker.is_running


def test_the_reapers_defaults_are_the_documented_ones() -> None:
    assert JobReaperConfig() == JobReaperConfig(
        stale_job_threshold_seconds=1800, stuck_job_threshold_seconds=3600, max_jobs_to_reap_per_cycle=10
    )


def test_an_alert_is_told_once_while_it_stands_and_again_after_it_was_cleared(box: NodeProcess) -> None:
    for _ in range(2):
        assert emit_alert("drill", "this is a drill", severity="critical", depth=7).raised
        assert not emit_alert("drill", "this is a drill").raised
        (alert,) = get_work_queue().get_stats().alerts
        assert (alert.alert, alert.severity) == ("drill", "critical")
        assert clear_alert("drill").cleared
        assert not clear_alert("drill").cleared
    assert get_work_queue().get_stats().alerts == []
    log = box.logs / "coordination.log"
    wait_until(lambda: log.read_text().count("ALERT_CLEARED alert=drill") == 2)
    assert log.read_text().count("ALERT_RAISED alert=drill") == 2


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: get_work_queue().get_job("none"), Refused, "no job"),
        (lambda: get_work_queue().release_job("none"), Refused, "none"),
        (lambda: get_work_queue().add_job(kind="selfpaly"), InvalidInput, "did you mean 'selfplay'"),
        (lambda: get_work_queue().get_stuck_jobs(threshold_seconds=-1), InvalidInput, "threshold_seconds"),
        (lambda: get_daemon_manager().restart_daemon("reaper"), Refused, "there are: .*job_reaper"),
        (lambda: emit_alert("drill", severity="panic"), InvalidInput, "info, warning, critical"),
    ],
    ids=["unknown-job", "release-unknown", "unknown-kind", "negative", "unknown-daemon", "unknown-severity"],
)
def test_a_wrong_call_says_what_is_wrong(
    box: NodeProcess, call: Callable[[], Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: get_work_queue().get_stats(),
        lambda: get_queue_populator().populate_all_queues(force=True),
        lambda: get_daemon_manager().restart_daemon(DaemonType.JOB_REAPER),
        lambda: JobReaperLoop.get_instance().is_running,
        lambda: emit_alert("drill"),
    ],
    ids=["queue", "populator", "daemons", "loop", "alert"],
)
def test_when_nothing_answers_the_error_says_what_was_tried_and_how_to_start_a_node(
    call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("P2P_URL", url)
    with pytest.raises(NodeUnreachable, match=r"python scripts/p2p_orchestrator\.py .*P2P_URL") as caught:
        call()
    assert url in str(caught.value)


# -- stuck is not old -------------------------------------------------------------------------------------------------


def test_only_a_silent_job_is_stuck_however_old_the_others_are(box: NodeProcess) -> None:
    q, threshold = get_work_queue(), 2.5
    loop = "import os, time\nfolder = os.environ['P2P_JOB_DIR']\nwhile True:\n    time.sleep(0.5)\n    "
    healthy = {  # each shows one sign of life and, by sleeping in between, next to nothing of the others
        "computes": ["sh", "-c", "while :; do :; done"],
        "prints": ["python", "-c", loop + "print('alive')"],
        "reports": ["python", "-c", loop + "open(folder + '/progress.json', 'w').write(str(time.time()))"],
    }
    small = {"cpus": 0.1}
    ids = {name: q.add_job(command=command, requires=small, grace_seconds=0) for name, command in healthy.items()}
    silent = q.add_job(command=["sleep", "600"], requires=small, grace_seconds=0)
    for job in (*ids.values(), silent):
        box.wait_for(job, "running")
    seen: list[list[str]] = []

    def stuck() -> bool:
        seen.append([job.id for job in q.get_stuck_jobs(threshold_seconds=threshold)])
        return bool(seen[-1])

    wait_until(stuck)
    until = time.monotonic() + 1.5  # all of them are older than the threshold now
    while time.monotonic() < until:
        stuck()
        time.sleep(0.05)
    assert {job for found in seen for job in found} == {silent}
    (job,) = q.get_stuck_jobs(threshold_seconds=threshold)
    assert job.reason.startswith("no output, progress, CPU or GPU use for")
    assert (job.worker, job.kind, job.attempt) == ("n1", "command", 1)
    assert job.seconds_in_progress >= threshold
    assert abs(job.claimed_at - time.time()) < 60
    assert q.get_stuck_jobs(threshold_seconds=3600) == q.get_stuck_jobs() == []
    q.clear_all(include_running=True)


def test_a_vanished_workers_job_is_stuck_because_its_lease_lapsed(
    start_node: Callable[..., NodeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = QUICK | {"queue": {"lease_seconds": 1.1}}
    node = start_node("--no-worker", "--no-populate", **settings)
    monkeypatch.setenv("P2P_URL", node.url)
    q = get_work_queue()
    job = q.add_job(command=["true"])
    room = {"worker": "ghost", "resources": {"cpus": 1}}
    status, told = node.request("POST", "/worker/claim", room)
    assert (status, [claimed["id"] for claimed in told["jobs"]]) == (200, [job])
    assert q.get_stuck_jobs(threshold_seconds=0) == []
    (found,) = wait_until(lambda: q.get_stuck_jobs(threshold_seconds=0))
    assert found.reason.startswith("lease lapsed: worker ghost silent")
    assert q.get_stuck_jobs() == [], "not in progress for the threshold yet"
    assert q.release_stuck_jobs(threshold_seconds=0) == 1
    assert q.get_job(job).state == "pending"
    assert node.request("POST", "/worker/complete", {"id": job, "attempt": 1, "worker": "ghost"})[0] == 409


def test_a_job_past_its_own_timeout_is_stuck(
    start_node: Callable[..., NodeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start_node("--no-worker", "--no-populate", **QUICK)
    monkeypatch.setenv("P2P_URL", node.url)
    q = get_work_queue()
    job = q.add_job(command=["true"], timeout_seconds=0.2, grace_seconds=0)
    node.request("POST", "/worker/claim", {"worker": "careless", "resources": {"cpus": 1}})

    def beat() -> list[Any]:
        node.request("POST", "/worker/heartbeat", {"worker": "careless", "jobs": [{"id": job, "attempt": 1}]})
        return q.get_stuck_jobs(threshold_seconds=0.1)

    (found,) = wait_until(beat)
    assert found.reason.startswith("timeout of 0 s passed")
    assert found.cause == "timeout"


def test_a_worker_not_yet_heard_of_after_a_restart_keeps_its_jobs(
    start_node: Callable[..., NodeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start_node("--no-worker", "--no-populate", **QUICK)
    monkeypatch.setenv("P2P_URL", node.url)
    q = get_work_queue()
    job = q.add_job(command=["true"])
    node.request("POST", "/worker/claim", {"worker": "elsewhere", "resources": {"cpus": 1}})
    assert q.get_job(job).state == "claimed"
    node.kill(signal.SIGTERM)
    node.start()
    assert q.clear_inactive_workers(threshold_seconds=300) == 0
    assert q.get_job(job).state == "claimed"
    assert q.clear_inactive_workers(threshold_seconds=0) == 1
    assert q.get_job(job).state == "pending"


# -- inside a node ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    """A node in this very process and event loop, on a free port."""
    monkeypatch.setenv("P2P_URL", "http://127.0.0.1:1")  # who asks over HTTP fails at once
    settings = build(
        {
            "node_id": "inside",
            "host": "127.0.0.1",
            "port": 0,
            "data_dir": tmp_path / "data",
            "log_dir": tmp_path / "logs",
            "jobs_file": ROOT / "config/jobs.yaml",
            "worker": False,
            "populator": {"enabled": False},
        }
    )
    node = Node(settings)
    try:
        await node.start()
        yield node
    finally:
        await node.stop()
    assert not live.is_live()


async def test_inside_a_node_the_same_names_answer_from_its_own_event_loop(inside: Node) -> None:
    """Every one of these blocks the very loop that a careless implementation would wait for."""
    q = get_work_queue()
    assert q.get_stats().pending == 0
    job = q.add_job(command=["true"])
    assert q.get_pending_count() == 1
    assert q.get_job(job).state == "pending"
    assert await q.get_job(job) == q.get_job(job)
    assert q.get_stuck_jobs(threshold_seconds=0) == q.get_recent_failures() == q.get_active_workers() == []
    assert q.health_check().is_healthy
    assert get_queue_populator().populate_all_queues(force=True) == 12
    assert await get_queue_populator().populate_all_queues(force=True) == 0
    assert get_queue_populator().health_check().details["items_added_hour"] == 12
    assert q.clear_all() == 13
    assert q.purge_failed_jobs() == q.clear_inactive_workers() == q.release_stuck_jobs() == 0
    assert emit_alert("drill").raised
    assert clear_alert("drill").cleared
    assert q.retry_job(job).state == "pending"
    assert q.cancel_job(job)["state"] == "cancelled"
    with pytest.raises(Refused):
        q.get_job("none")


async def test_inside_a_node_a_daemon_is_restarted_by_who_blocks_its_loop(inside: Node) -> None:
    reaper = JobReaperLoop.get_instance()
    assert reaper is inside.loops["JobReaperLoop"]
    assert isinstance(reaper, JobReaperLoop)
    while not reaper.runs:
        await asyncio.sleep(0.01)
    before = inside.supervisor.daemons[DaemonType.JOB_REAPER].task
    assert get_daemon_manager().restart_daemon(DaemonType.JOB_REAPER).daemon == "job_reaper"
    await get_daemon_manager().restart_daemon("job_reaper")

    def state() -> Any:
        return get_daemon_manager().status()["job_reaper"]

    async with asyncio.timeout(10):
        while state().restarts < 2 or not reaper.is_running:
            await asyncio.sleep(0.01)
    assert state().state == "running"
    assert inside.supervisor.daemons[DaemonType.JOB_REAPER].task is not before
    get_daemon_manager().stop_daemon("job_reaper")
    async with asyncio.timeout(10):
        while reaper.is_running:
            await asyncio.sleep(0.01)


async def test_inside_a_node_other_threads_may_ask_too(inside: Node) -> None:
    q = get_work_queue()
    ids = await asyncio.gather(*(asyncio.to_thread(q.add_job, command=["true"]) for _ in range(8)))
    assert len(set(ids)) == 8
    assert await asyncio.to_thread(q.get_pending_count) == 8
    assert os.environ["P2P_URL"] == "http://127.0.0.1:1"
