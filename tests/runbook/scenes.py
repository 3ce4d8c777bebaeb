"""For every section of the runbook: the trouble it is about, and what must be true after each of its blocks.

A scene is a generator. It sets the trouble up, yields once for each block of its section, in order, and is sent how
that block went; the exit status has been checked by then.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.nodes import wait_until
from tests.runbook.deployment import NODE_ID, TOKEN, Deployment, Outcome

Steps = Generator[None, Outcome, None]
Scene = Callable[[Deployment], Steps]

HOUR, DAY = 3_600, 86_400
SILENT = ("sleep", "600")
SCENES: dict[str, Scene] = {}
SETTINGS: dict[str, dict[str, Any]] = {}


def scene(section: str, **settings: Any) -> Callable[[Scene], Scene]:
    """Registers the scene of a section; `settings` are merged into the node's cluster.yaml."""

    def register(function: Scene) -> Scene:
        assert section not in SCENES, section
        SCENES[section], SETTINGS[section] = function, settings
        return function

    return register


# -- troubles ---------------------------------------------------------------------------------------------------------


def run_jobs(d: Deployment, n: int, *command: str, **fields: Any) -> list[str]:
    jobs = [d.submit(*command, **fields) for _ in range(n)]
    for job in jobs:
        d.wait_for(job, "running")
    return jobs


@contextmanager
def leap(d: Deployment, left: float = 0.0, *, watchers: tuple[str, ...] = ("health_monitor",)) -> Iterator[None]:
    """Time passes. In that moment nobody has beaten yet, so who looks for the silent looks when the body is through."""
    for name in watchers:
        d.order(f"/daemons/{name}/stop")
    d.pass_time(left)
    yield
    for name in watchers:
        d.order(f"/daemons/{name}/start")


def stick(d: Deployment, n: int = 2, *, ago: float = 2 * HOUR, left: float = 0.0) -> list[str]:
    """Jobs that have run for two hours without a sign of life, beside one that computes. Starts the node if need be."""
    if not d.ready():
        d.start(ago=ago)
    before = {job["id"] for job in d.ask("/jobs?state=running")["jobs"]}
    healthy = run_jobs(d, 1, "sh", "-c", "while :; do echo alive; sleep 0.05; done", requires={"cpus": 0.1})
    jobs = run_jobs(d, n, *SILENT, requires={"cpus": 0.1})
    wait_until(
        lambda: all(d.job(job).get("last_sign_of_life_seconds", 0) > 0.2 for job in jobs)
    )  # a sleeper's start is one

    def told() -> bool:
        reasons = {job["id"]: job["reason"] for job in d.ask("/work_queue/stuck?threshold_seconds=3600")["jobs"]}
        return set(jobs) <= set(reasons) <= before | set(jobs) and all("no output" in why for why in reasons.values())

    with leap(d, left):
        wait_until(told)
    assert d.job(healthy[0])["state"] == "running"
    return jobs


def fail(d: Deployment, n: int, error: str = "CUDA error: out of memory") -> list[str]:
    jobs = [d.submit("sh", "-c", f'echo "{error}" >&2; exit 1', max_attempts=1) for _ in range(n)]
    for job in jobs:
        d.wait_for(job, "failed")
    return jobs


def vanish(d: Deployment, worker: str, n: int = 1) -> list[str]:
    """A worker from elsewhere that claims jobs and is never heard of again."""
    jobs = [d.submit(*SILENT, requires={"cpus": 1, "labels": {"zone": worker}}) for _ in range(n)]
    room = {"cpus": 64, "memory_mb": 64_000, "disk_mb": 64_000, "labels": {"zone": worker}}
    claimed: set[str] = set()

    def all_claimed() -> bool:
        told = d.order("/worker/claim", worker=worker, resources=room, max_jobs=n, wait_seconds=0)
        claimed.update(job["id"] for job in told["jobs"])
        return claimed == set(jobs)

    wait_until(all_claimed)
    return jobs


def unsuitable(d: Deployment, n: int) -> list[str]:
    """Jobs that no node here can run."""
    return [d.submit(*SILENT, requires={"labels": {"zone": "moon"}}) for _ in range(n)]


def assert_released(d: Deployment, jobs: list[str], reason: str) -> None:
    """Back in the queue with no attempt spent, then taken again; the abandoned attempt is fenced off."""
    for job in jobs:
        steps = d.wait_for(job, "running", "pending")["history"]
        back = [step for step in steps if step["state"] == "pending"][-1]
        assert back["reason"] == f"released: {reason}", steps
        record = d.wait_for(job, "running")
        assert (record["attempt"], record["failed_attempts"]) == (2, 0)
        late = {"id": job, "attempt": 1, "worker": NODE_ID, "result": 1}
        assert d.request("POST", "/worker/complete", late)[0] == 409


def loops(d: Deployment) -> dict[str, Any]:
    found: dict[str, Any] = d.ask("/status")["loops"]
    return found


class Restart:
    """What was before a restart, and must be true after it."""

    def __init__(self, d: Deployment) -> None:
        self.d = d
        self.pid_file = d.home / "pid"
        self.job = run_jobs(d, 1, "sh", "-c", f'echo $$ > "{self.pid_file}"; exec sleep 600')[0]
        self.pid = int(wait_until(lambda: self.pid_file.exists() and self.pid_file.read_text().strip()))
        self.node = d.node_pid

    def check(self) -> None:
        """Another node process, and the same process of the job, in its first attempt, under the new node."""
        assert self.d.ready()
        assert self.d.node_pid != self.node
        assert not Path(f"/proc/{self.node}").exists() or "State:\tZ" in Path(f"/proc/{self.node}/status").read_text()
        assert b"sleep" in Path(f"/proc/{self.pid}/cmdline").read_bytes()
        assert int(self.pid_file.read_text()) == self.pid

        def taken_up() -> bool:
            record = self.d.job(self.job)
            assert (record["state"], record["attempt"]) == ("running", 1), record
            running = self.d.ask("/status")["peers"][NODE_ID]["running_jobs"]
            return bool(running) and record.get("last_sign_of_life_seconds") is not None

        wait_until(taken_up)
        self.node = self.d.node_pid


# -- before you begin, overview, detection ----------------------------------------------------------------------------


@scene("Before you begin")
def before_you_begin(d: Deployment) -> Steps:
    d.start()
    done = yield
    assert '{"status":"ok"}' in done.output


@scene("On a cluster with a token")
def with_a_token(d: Deployment) -> Steps:
    file = d.home / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    d.environment["RINGRIFT_CLUSTER_AUTH_TOKEN_FILE"] = str(file)
    d.start()
    assert d.request("POST", "/work_queue/purge_failed", {})[0] == 401
    d.token = TOKEN
    done = yield
    assert '{"purged":0}' in done.output
    assert (d.home / ".p2p/.curlrc").stat().st_mode & 0o077 == 0


@scene("Stall or slow queue?")
def stall_or_slow(d: Deployment) -> Steps:
    d.start()
    d.order("/jobs", jobs=[{"command": ["sleep", "0.1"], "max_attempts": 1}] * 60)
    done = yield
    label, _, number = done.output.strip().rpartition(" ")
    assert label == "completed meanwhile:"
    assert int(number) > 0


@scene("From the shell")
def from_the_shell(d: Deployment) -> Steps:
    stick(d, 11)
    unsuitable(d, 3)
    wait_until(lambda: d.queue()["alerts"])
    done = yield
    lines = [" ".join(line.split()) for line in done.output.splitlines()]
    assert {"pending 3", "in_progress 12", "active_workers 1", "stalled 11"} <= set(lines), done.output
    assert "alert stuck_jobs 11 jobs without a sign of life, more than 10" in lines
    done = yield
    assert f"{NODE_ID} leader leader: {NODE_ID} alive: 1" in done.output
    assert set(loops(d)) <= set(done.output.split())
    assert "NOT RUNNING" not in done.output
    done = yield
    assert '"assigned": 12' in done.output


@scene("From Python")
def from_python(d: Deployment) -> Steps:
    stuck = stick(d)
    failed = fail(d, 2)
    waiting = unsuitable(d, 1)
    done = yield
    assert "pending: 1 in progress: 3" in done.output
    for job in (*stuck, *failed):
        assert job in done.output
    assert not any(job in done.output for job in waiting)
    assert "CUDA error: out of memory" in done.output
    assert "True healthy" in done.output


@scene("From the logs", reaper={"stuck_job_threshold_seconds": HOUR})
def from_the_logs(d: Deployment) -> Steps:
    stuck = stick(d)
    fail(d, 3)
    timed_out = d.submit(*SILENT, timeout_seconds=0.2, max_attempts=1, requires={"cpus": 0.1})
    d.wait_for(timed_out, "failed")
    events = d.project / "logs/coordination.log"
    wait_until(lambda: all(word in events.read_text() for word in ("WORK_STALLED", "WORK_TIMEOUT")))
    done = yield
    assert done.output.count("WORK_STALLED") == len(stuck)
    assert f"job={timed_out}" in done.output
    done = yield
    *errors, number = done.output.splitlines()
    assert errors[0].split()[0] == "3", "the commonest error comes first"
    assert "CUDA error: out of memory" in errors[0]
    assert int(number) >= len(stuck) + 1
    ordinary = [line for line in (d.project / "logs/work_queue.log").read_text().splitlines() if "CUDA" in line]
    assert not any(word in line.lower() for line in ordinary for word in ("stall", "stuck", "timeout"))
    for job in stuck:
        d.order(f"/jobs/{job}/cancel")
    done = yield
    assert "alive" in done.output


# -- the four patterns ------------------------------------------------------------------------------------------------


@scene("Pattern 1: no worker claims", queue={"lease_seconds": 1.5})
def no_worker_claims(d: Deployment) -> Steps:
    d.start()
    wait_until(lambda: d.queue()["active_workers"] == 1)
    impossible = unsuitable(d, 1)[0]
    wait_until(lambda: "fits on none of 1 node, even when idle" in d.job(impossible)["why_pending"])
    d.order("/daemons/worker_pull/stop")
    jobs = [d.submit("true") for _ in range(2)]
    wait_until(lambda: d.queue()["active_workers"] == 0)
    done = yield
    for job in jobs:
        assert f"{job} command - all 1 known workers have been silent" in done.output
    assert '"state": "stopped"' in done.output
    done = yield
    assert "[]" in done.output
    assert "stopped" in done.output
    yield
    for job in jobs:
        d.wait_for(job, "completed")
    assert "fits on none of 1 node" in d.job(impossible)["why_pending"]


@scene("Pattern 2: jobs stuck in progress", reaper={"stuck_job_threshold_seconds": HOUR})
def stuck_in_progress(d: Deployment) -> Steps:
    jobs = stick(d)
    assert d.queue()["stalled"] == len(jobs), d.ask("/work_queue/stuck")
    wait_until(lambda: (d.project / "logs/coordination.log").read_text().count("WORK_STALLED") == len(jobs))
    done = yield
    assert done.output.count("no output, progress, CPU or GPU use for") == len(jobs)
    done = yield
    assert all(f"{job} {NODE_ID} no output" in done.output for job in jobs)
    assert done.output.splitlines()[-1] == str(len(jobs))
    yield
    assert_released(d, jobs, "stuck_timeout")
    assert d.queue()["stalled"] == 0


@scene("Pattern 3: every job fails")
def every_job_fails(d: Deployment) -> Steps:
    d.start()
    cause = d.home / "cause"
    jobs = [
        d.submit("sh", "-c", f'test -e "{cause}" || {{ echo "no space left" >&2; exit 1; }}', max_attempts=1)
        for _ in range(10)
    ]
    for job in jobs:
        d.wait_for(job, "failed")
    assert "10 of 10 jobs failed in the last hour" in d.queue()["health"]["message"]
    done = yield
    assert "('command', 10)" in done.output
    assert f"('{NODE_ID}', 10)" in done.output
    done = yield
    assert done.output.split()[0] == "10"
    assert done.output.splitlines()[-1] == "no space left"
    cause.touch()
    yield
    for job in jobs:
        d.wait_for(job, "completed")


@scene("Pattern 4: the populator does not run", populator={"enabled": True, "interval_seconds": 0.2})
def populator_does_not_run(d: Deployment) -> Steps:
    d.start()
    wait_until(lambda: d.ask("/populator")["is_healthy"])
    d.order("/daemons/queue_populator/stop")
    d.order("/work_queue/clear", include_running=True)
    wait_until(lambda: not d.queue()["pending"] and not d.queue()["in_progress"])
    done = yield
    assert done.output.startswith("False its daemon is not running (stopped)")
    done = yield
    assert '"daemon": "stopped"' in done.output
    assert d.queue()["pending"] == 0, "nothing filled the queue meanwhile"
    before = submitted(d)
    yield
    wait_until(lambda: submitted(d) > before)
    assert d.ask("/populator")["is_healthy"]
    assert loops(d)["QueuePopulatorLoop"]["running"]


def submitted(d: Deployment) -> int:
    return sum(kind.get("submitted", 0) for kind in d.queue()["totals"].values())


# -- the five recoveries ----------------------------------------------------------------------------------------------


@scene("Recovery 1: clear stuck jobs")
def clear_stuck_jobs(d: Deployment) -> Steps:
    jobs = stick(d, ago=6 * HOUR, left=3 * HOUR)
    yield
    assert_released(d, jobs, "stuck_timeout")
    for job in jobs:
        d.order(f"/jobs/{job}/cancel")
    jobs = stick(d)
    done = yield
    assert f'"released":{len(jobs)}' in done.output
    assert_released(d, jobs, "stuck")


@scene("Forget silent workers", queue={"lease_seconds": 1000})
def forget_silent_workers(d: Deployment) -> Steps:
    d.start(ago=1_200)
    mine = run_jobs(d, 1, *SILENT)[0]
    for worker, left in (("ghost", 600), ("phantom", 0)):
        jobs = vanish(d, worker, 2)
        d.pass_time(left)
        wait_until(lambda: d.job(mine).get("last_sign_of_life_seconds") is not None and fresh(d))
        assert worker in d.ask("/work_assignment_status")
        done = yield
        assert "1" in done.output.split() or '{"cleared":1}' in done.output, done.output
        assert set(d.ask("/work_assignment_status")) == {NODE_ID}
        for job in jobs:
            record = d.job(job)
            assert (record["state"], record["failed_attempts"]) == ("pending", 0)
            assert d.request("POST", "/worker/complete", {"id": job, "attempt": 1, "worker": NODE_ID})[0] == 409
    assert d.job(mine)["attempt"] == 1, "a worker that is heard of keeps its jobs"


def fresh(d: Deployment) -> bool:
    """The node's own worker has been heard of since the time passed."""
    heard = {worker["node"]: worker["last_heartbeat"] for worker in d.queue()["workers"]}
    oldest = min((at for node, at in heard.items() if node != NODE_ID), default=0)
    return heard.get(NODE_ID, 0) - oldest > 300


@scene("Restart a node")
def restart_a_node(d: Deployment) -> Steps:
    d.start()
    restart = Restart(d)
    done = yield
    assert "none was running" not in done.output
    restart.check()
    done = yield
    restart.check()
    assert '{"ready":true}' in done.output


@scene("Recovery 3: purge failed jobs")
def purge_failed_jobs(d: Deployment) -> Steps:
    d.start(ago=3 * DAY)
    unfinished = unsuitable(d, 1)[0]
    for left in (1.5 * DAY, 0.0):
        old = fail(d, 2)
        d.pass_time(left)
        recent = fail(d, 1)
        done = yield
        assert "2 forgotten" in done.output or '{"purged":2}' in done.output, done.output
        assert [d.request("GET", f"/jobs/{job}")[0] for job in old] == [404, 404]
        assert d.job(recent[0])["state"] == "failed"
        d.order("/work_queue/purge_failed", max_age_hours=0)
    assert d.job(unfinished)["state"] == "pending"


@scene("Recovery 4: repopulate")
def repopulate(d: Deployment) -> Steps:
    d.start()
    wanted = 12  # config/jobs.yaml: 2 evaluations, 2 tournaments, 8 selfplay
    done = yield
    assert done.output.split() == [str(wanted), "added"]
    assert submitted(d) == wanted
    d.order("/work_queue/clear", include_running=True)
    wait_until(lambda: not d.queue()["pending"] and not d.queue()["in_progress"])
    done = yield
    assert f'{{"added":{wanted}}}' in done.output
    assert submitted(d) == 2 * wanted


@scene("Recovery 5: full reset")
def full_reset(d: Deployment) -> Steps:
    d.start()
    restart = Restart(d)
    junk = unsuitable(d, 5)
    done = yield
    assert done.output.split() == ["5", "dropped"]
    assert (d.queue()["pending"], d.queue()["in_progress"]) == (0, 1)
    assert {d.job(job)["state"] for job in junk} == {"cancelled"}
    yield
    restart.check()
    assert d.queue()["pending"] == 0
    done = yield
    assert done.output.startswith("12 added")
    wait_until(lambda: d.queue()["completed_hour"] > 0)


# -- the loops behind it ----------------------------------------------------------------------------------------------


@scene("The job reaper", reaper={"interval_seconds": 0.2, "stuck_job_threshold_seconds": HOUR})
def job_reaper(d: Deployment) -> Steps:
    d.start(ago=2 * HOUR)
    healthy = run_jobs(d, 1, "sh", "-c", "while :; do echo alive; sleep 0.05; done")[0]
    silent = run_jobs(d, 1, *SILENT)[0]
    wait_until(lambda: d.job(silent).get("last_sign_of_life_seconds", 0) > 0.2)
    begun, *ghost = vanish(d, "ghost", 3)
    d.order("/worker/heartbeat", worker="ghost", jobs=[{"id": begun, "attempt": 1}])
    with leap(d, watchers=("health_monitor", "job_reaper")):
        wait_until(lambda: d.job(healthy)["last_sign_of_life_seconds"] < 60)
    for job in (silent, begun):
        wait_until(lambda job=job: d.job(job)["failed_attempts"] == 1)  # type: ignore[misc]
    for job in ghost:
        assert d.wait_for(job, "pending")["failed_attempts"] == 0, "it never ran"
    done = yield
    assert "running: True" in done.output
    reaped = loops(d)["JobReaperLoop"]["stats"]
    assert (reaped["jobs_reaped"], reaped["lease_lapsed"], reaped["no_sign_of_life"]) == (4, 3, 1)
    assert "reaped: 4" in done.output
    d.order("/daemons/job_reaper/stop")
    done = yield
    assert done.output.strip() == "True"
    done = yield
    assert "stuck_job_threshold_seconds=3600" in done.output
    assert not loops(d)["JobReaperLoop"]["running"]
    yield
    wait_until(lambda: loops(d)["JobReaperLoop"]["running"])
    assert (d.job(healthy)["state"], d.job(healthy)["attempt"]) == ("running", 1), "old is not stuck"


@scene("The worker's pull loop")
def pull_loop(d: Deployment) -> Steps:
    d.start()
    run_jobs(d, 2, *SILENT, requires={"cpus": 0.1})
    done = yield
    assert "running: True errors: 0" in done.output
    assert "pulled: 2 failures: 0" in done.output


@scene("Work assignment")
def work_assignment(d: Deployment) -> Steps:
    d.start()
    vanish(d, "ghost", 2)
    fail(d, 1)
    done = yield
    assert "ghost assigned 2 completed 0 failed 0 heard" in done.output
    assert f"{NODE_ID} assigned 0 completed 0 failed 1 heard" in done.output


# -- health and prevention --------------------------------------------------------------------------------------------


@scene("Health check")
def health_check(d: Deployment) -> Steps:
    d.start(ago=HOUR)
    unsuitable(d, 1)
    d.queue()
    d.pass_time(10)
    assert "nothing completed for 6" in d.queue()["health"]["message"]
    done = yield
    assert done.output.startswith("False - work is pending and nothing completed")
    assert "queue_depth 1" in done.output
    d.order("/work_queue/clear")
    done = yield
    assert done.output.strip() == "healthy"


@scene("Timeouts")
def timeouts(d: Deployment) -> Steps:
    d.start()
    restart = Restart(d)
    earlier = d.order("/jobs", kind="selfplay", requires={"labels": {"zone": "moon"}})["id"]
    yield
    restart.check()
    later = d.order("/jobs", kind="selfplay", requires={"labels": {"zone": "moon"}})["id"]
    assert (d.job(earlier)["timeout_seconds"], d.job(later)["timeout_seconds"]) == (7200, 5400)


@scene("Monitoring")
def monitoring(d: Deployment) -> Steps:
    """The block writes the script and runs it; the crontab line beside it is then run as cron would."""
    d.start()
    done = yield
    assert done.output == ""
    fail(d, 10)
    page = (Path(__file__).parents[2] / "docs/runbooks/WORK_QUEUE_STALLS.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("*/5 * * * * "))

    def cron() -> subprocess.CompletedProcess[str]:
        command = line.removeprefix("*/5 * * * * ")
        environment = {"HOME": str(d.home), "PATH": "/usr/bin:/bin", "P2P_URL": d.url}
        return subprocess.run(
            ["sh", "-c", command], cwd=d.home, env=environment, capture_output=True, text=True, check=False
        )

    first, second = cron(), cron()
    assert first.returncode == second.returncode == 1
    assert first.stderr.startswith("10 of 10 jobs failed")
    events = d.project / "logs/coordination.log"
    wait_until(lambda: "ALERT_RAISED alert=queue_check" in events.read_text())
    assert events.read_text().count("ALERT_RAISED alert=queue_check") == 1
    d.order("/work_queue/purge_failed", max_age_hours=0)
    for job in [d.submit("true") for _ in range(11)]:
        d.wait_for(job, "completed")
    assert cron().returncode == 0
    wait_until(lambda: "ALERT_CLEARED alert=queue_check" in events.read_text())
    d.order("/admin/shutdown")
    wait_until(lambda: not d.ready())
    assert "no node answers" in cron().stderr


@scene("Retention")
def retention(d: Deployment) -> Steps:
    done = yield
    assert "keep_finished=200000" in done.output
    d.start()
