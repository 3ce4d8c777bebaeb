"""For every section of CLUSTER_GPU_STUCK.md: the trouble it is about, and what must be true after each of its blocks.

The GPUs are two of a recording, which a scene changes under the node's eyes; everything else is real.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.nodes import ROOT, wait_until
from tests.runbook.deployment import NODE_ID, Deployment
from tests.runbook.scenes import Scene, Steps, leap, run_jobs

SCENES: dict[str, Scene] = {}
FIRST, SECOND = (f"GPU-11111111-2222-3333-4444-55555555550{n}" for n in (1, 2))
MIB = 1 << 20
SETTINGS: dict[str, Any] = {
    "resources": "config/resources.yaml",
    "work": {"gpu_sample_seconds": 0.1, "gpu_deadline_seconds": 1},
}
HOLD = "import time; print('up', flush=True); time.sleep(600)"


def scene(section: str) -> Callable[[Scene], Scene]:
    def register(function: Scene) -> Scene:
        assert section not in SCENES, section
        SCENES[section] = function
        return function

    return register


# -- troubles ---------------------------------------------------------------------------------------------------------


def begin(d: Deployment, *, ago: float = 0.0) -> None:
    """A node with the GPUs of the recording, all of them idle and nobody's."""
    config = d.project / "config"
    shutil.copy(ROOT / "tests/data/nvml/two_h100.json", config / "gpus.json")
    (config / "resources.yaml").write_text(yaml.safe_dump({"cpus": 16, "memory_mb": 16_000, "fixture": "gpus.json"}))
    for gpu in (0, 1):
        hold(d, gpu)
    d.start(ago=ago)


def change(d: Deployment, how: Callable[[dict[str, Any]], object]) -> None:
    path = d.project / "config/gpus.json"
    body = json.loads(path.read_text())
    how(body)
    staged = path.with_suffix(".new")
    staged.write_text(json.dumps(body))
    staged.replace(path)


def hold(d: Deployment, gpu: int, *held: tuple[int, int], use: int = 0) -> None:
    def apply(body: dict[str, Any]) -> None:
        device = body["devices"][gpu]
        used = sum(memory for _, memory in held) * MIB
        memory = device["nvmlDeviceGetMemoryInfo_v2"]
        memory.update(used=used, free=memory["total"] - memory["reserved"] - used)
        device["nvmlDeviceGetComputeRunningProcesses"] = [{"pid": pid, "usedGpuMemory": mb * MIB} for pid, mb in held]
        device["nvmlDeviceGetUtilizationRates"] = {"gpu": use, "memory": 0}
        device["nvmlDeviceGetProcessUtilization"] = {"error": 6}

    change(d, apply)


def gpus(d: Deployment) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = d.ask("/nodes")["nodes"][NODE_ID]["resources"]["gpus"]
    return found


def log(d: Deployment) -> str:
    return (d.project / "logs/coordination.log").read_text()


@contextlib.contextmanager
def process(d: Deployment, **marks: str) -> Iterator[subprocess.Popen[bytes]]:
    """One that lives on the machine, and would hold a GPU."""
    environment = {"PATH": os.environ["PATH"], **marks}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE, start_new_session=True
    ) as made:
        assert made.stdout is not None
        made.stdout.readline()
        try:
            yield made
        finally:
            made.kill()


def idle_job(d: Deployment) -> str:
    """Twenty minutes ago it began to wait for its GPU, spinning, and has said nothing since; another job works."""
    begin(d, ago=1_200)
    job = run_jobs(d, 1, "sh", "-c", "echo started; echo 'waiting for rank 3' >&2; while :; do :; done",
                   requires={"gpus": 1, "cpus": 1})[0]  # fmt: skip
    run_jobs(d, 1, "sh", "-c", "while :; do echo alive; sleep 0.05; done", requires={"cpus": 1})
    wait_until(lambda: d.job(job).get("last_sign_of_life_seconds", 0) > 0.5)

    def told() -> bool:
        return {row["id"] for row in d.ask("/work_queue/stuck?threshold_seconds=600")["jobs"]} == {job}

    with leap(d):
        wait_until(told)
    return job


# -- the sections -----------------------------------------------------------------------------------------------------


@scene("Before you begin")
def before_you_begin(d: Deployment) -> Steps:
    begin(d)
    done = yield
    assert '{"status":"ok"}' in done.output


@scene("From the shell")
def from_the_shell(d: Deployment) -> Steps:
    begin(d)
    hold(d, 1, (os.getpid(), 5_000), use=40)
    change(d, lambda body: body["devices"][0].update(xids=[79]))
    wait_until(lambda: gpus(d)[1]["free_mb"] == 76_008 and not gpus(d)[0]["healthy"])
    done = yield
    lines = [line.strip() for line in done.output.splitlines()]
    assert lines[0].startswith(f"{NODE_ID} alive free: ")
    assert lines[1] == (
        f"{FIRST} NVIDIA H100 80GB HBM3 81559 MB free_mb 0 utilization 0.0 temperature 44 processes 0 "
        "Xid 79: it has fallen off the bus"
    )
    assert "free_mb 76008 utilization 40.0 temperature 45 processes 1 healthy" in lines[2]
    assert lines[3].startswith(f"pid {os.getpid()} ")
    assert lines[3].endswith(" 5000 MB job None")


@scene("From Python")
def from_python(d: Deployment) -> Steps:
    job = idle_job(d)
    done = yield
    assert f"{FIRST} 81008 MB free, 0.0 % used, healthy" in done.output
    assert f"{job} {NODE_ID} no output, progress, CPU or GPU use for" in done.output


@scene("From the logs")
def from_the_logs(d: Deployment) -> Steps:
    idle_job(d)
    change(d, lambda body: body["devices"][1].update(xids=[95]))
    wait_until(lambda: "WORK_STALLED" in log(d) and "alert=gpu_unhealthy" in log(d))
    done = yield
    assert f"ALERT_RAISED alert=gpu_unhealthy_{SECOND}" in done.output
    assert "its GPUs idle below 5 %" in done.output


@scene("A job holds a GPU and does nothing")
def a_job_does_nothing(d: Deployment) -> Steps:
    job = idle_job(d)
    wait_until(lambda: d.queue()["stalled"] == 1)
    done = yield
    assert f"{job} {NODE_ID} its GPUs idle below 5 %, and no output, progress or work, for" in done.output
    assert "started" in done.output
    assert "waiting for rank 3" in done.output
    yield
    record = d.wait_for(job, "running")
    wait_until(lambda: d.job(job)["attempt"] == 2)
    record = d.job(job)
    assert record["failed_attempts"] == 0
    assert "released: gpu_idle" in [step["reason"] for step in record["history"]]
    assert d.queue()["stalled"] == 0


@scene("Memory held by nobody's job")
def nobodys_memory(d: Deployment) -> Steps:
    begin(d)
    waits = d.submit("true", requires={"gpus": 2, "gpu_memory_mb": 70_000})
    d.wait_for(waits, "completed")
    with process(d) as stranger:
        hold(d, 1, (stranger.pid, 20_000), (2_000_000_001, 4_000))
        wait_until(lambda: gpus(d)[1]["free_mb"] == 57_008)
        waits = d.submit("true", requires={"gpus": 2, "gpu_memory_mb": 70_000})
        done = yield
        assert f"{stranger.pid} " in done.output
        assert "time.sleep(600)" in done.output, "what it runs"
        assert "2000000001: not to be seen here" in done.output
        assert stranger.poll() is None
        assert d.job(waits)["state"] == "pending"
    hold(d, 1)
    d.wait_for(waits, "completed")


@scene("Left by a job that has ended")
def left_behind(d: Deployment) -> Steps:
    begin(d)
    folder = (d.project / "data" / NODE_ID / "jobs").resolve() / "gone.1"
    with process(d, P2P_JOB_ID="gone", P2P_ATTEMPT="1", P2P_JOB_DIR=str(folder)) as left:
        hold(d, 0, (left.pid, 30_000))
        wait_until(lambda: "which has ended: sending it" in (d.project / "logs/p2p.log").read_text(), seconds=30)
        wait_until(lambda: "alert=gpu_leftovers" in log(d))
        done = yield
        assert f"process {left.pid} (" in done.output
        assert "sending it SIGTERM" in done.output
        assert left.wait(30) == -signal.SIGTERM
        hold(d, 0)
        done = yield
        assert done.output.splitlines()[-1] == "last: ALERT_CLEARED"
    wait_until(lambda: gpus(d)[0]["free_mb"] == 81_008)


@scene("A GPU that is not offered")
def not_offered(d: Deployment) -> Steps:
    begin(d)
    change(d, lambda body: body["devices"][0].update(xids=[94]))
    wait_until(lambda: not gpus(d)[0]["healthy"])
    both = d.submit("true", requires={"gpus": 2})
    one = d.submit("sleep", "2", requires={"gpus": 1})
    d.wait_for(one, "running")
    done = yield
    assert done.output.startswith(f"{FIRST} Xid 94: a contained memory error; it needs a reset holders: []")
    before = d.node_pid
    change(d, lambda body: body["devices"][0].update(xids=[]))  # what the reset would do
    done = yield
    assert "no GPU was named, none is reset" in done.output
    assert '"status":"ok"' in done.output
    assert d.node_pid != before
    assert d.wait_for(one, "completed")["attempt"] == 1, "it was waited for"
    done = yield
    assert done.output.strip() == "['healthy', 'healthy']"
    d.wait_for(both, "completed")


@scene("NVML does not answer")
def nvml_hangs(d: Deployment) -> Steps:
    begin(d)
    change(d, lambda body: body.update(hangs=True))
    wait_until(lambda: "alert=gpu_error" in log(d))
    d.wait_for(d.submit("true"), "completed")
    done = yield
    assert "NVML has not answered for over 1 s" in done.output.splitlines()
    assert "ALERT_RAISED alert=gpu_error" in done.output
    change(d, lambda body: body.update(hangs=False))
    done = yield
    assert done.output.strip() == "NVML: answers"
    d.wait_for(d.submit("true", requires={"gpus": 2}), "completed")


@scene("A job that takes more than it asked for")
def takes_more(d: Deployment) -> Steps:
    begin(d)

    def greedy() -> str:
        job = run_jobs(d, 1, "sh", "-c", "echo $$ > pid; exec sleep 600", max_attempts=1,
                       requires={"gpus": 1, "gpu_memory_mb": 10_000, "gpu_share": 0.5})[0]  # fmt: skip
        file = d.project / "data" / NODE_ID / "jobs" / f"{job}.1/pid"
        pid = int(wait_until(lambda: file.exists() and file.read_text().strip()))
        for gpu in (0, 1):
            hold(d, gpu, *([(pid, 15_000)] if gpu == place(file) else []))
        wait_until(lambda: f"ALERT_RAISED alert=gpu_memory_{job}.1" in log(d))
        return str(job)

    def place(file: Path) -> int:
        visible = Path(f"/proc/{file.read_text().strip()}/environ").read_bytes()
        return 0 if FIRST.encode() in visible else 1

    job = greedy()
    done = yield
    assert f"job {job}: it used 15000 MB of GPU" in done.output
    assert d.job(job)["state"] == "running"
    d.order(f"/jobs/{job}/cancel")
    yield
    os.kill(d.node_pid, signal.SIGTERM)
    wait_until(lambda: not d.ready())
    for gpu in (0, 1):
        hold(d, gpu)
    d.settings["work"] |= SETTINGS["work"]
    d.write_settings()
    d.start()
    record = d.wait_for(greedy(), "failed")
    assert "it used 15000 MB of GPU" in record["error"]
    assert "was granted 10000 MB" in record["error"]


@scene("Jobs wait for GPUs")
def jobs_wait(d: Deployment) -> Steps:
    begin(d)
    job = d.submit("true", requires={"gpus": 1, "gpu_memory_mb": 81_559})
    wait_until(lambda: "81008 MB" in d.job(job)["why_pending"])
    done = yield
    assert done.output.startswith(f"{job} {{")
    assert '"gpu_memory_mb": 81559' in done.output
    assert "81008 MB" in done.output
