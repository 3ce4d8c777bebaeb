"""GPUs as a user meets them on a real node: NVML is a recording that changes under its eyes, all else is real."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.gpus import HAS_GPU
from tests.nodes import ROOT, NodeProcess, wait_until

MIB = 1 << 20
FIRST, SECOND = (f"GPU-11111111-2222-3333-4444-55555555550{n}" for n in (1, 2))
QUICK = {"gpu_sample_seconds": 0.1, "gpu_deadline_seconds": 1}
HANGS = "exec sleep 600"
MILD = "import time; print('up', flush=True); time.sleep(600)"


class Rig:
    """A node over a recording of two H100s, of which the second is held by a stranger to 20,000 MB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recording = folder / "recording.json"
        shutil.copy(ROOT / "tests/data/nvml/two_h100.json", self.recording)
        self.nodes: list[NodeProcess] = []

    def start(self, **settings: Any) -> NodeProcess:
        resources = self.folder / "resources.yaml"
        resources.write_text(yaml.safe_dump({"cpus": 16, "memory_mb": 16_000, "fixture": self.recording.name}))
        work = {**QUICK, **settings.pop("work", {})}
        quick = {"work": work, "queue": {"lease_seconds": 5, "heartbeat_seconds": 0.2}, **settings}
        node = NodeProcess(self.folder, ["--no-populate", "--resources", str(resources)], quick)
        self.nodes.append(node)
        node.start()
        return node

    def change(self, how: Callable[[dict[str, Any]], object]) -> None:
        body = json.loads(self.recording.read_text())
        how(body)
        staged = self.recording.with_suffix(".new")
        staged.write_text(json.dumps(body))
        staged.replace(self.recording)

    def hold(self, gpu: int, *held: tuple[int, int], use: int = 0) -> None:
        """These processes hold so many MB of that GPU, and nobody else."""

        def apply(body: dict[str, Any]) -> None:
            device = body["devices"][gpu]
            used = sum(memory for _, memory in held) * MIB
            memory = device["nvmlDeviceGetMemoryInfo_v2"]
            memory.update(used=used, free=memory["total"] - memory["reserved"] - used)
            device["nvmlDeviceGetComputeRunningProcesses"] = [
                {"pid": pid, "usedGpuMemory": mb * MIB} for pid, mb in held
            ]
            device["nvmlDeviceGetUtilizationRates"] = {"gpu": use, "memory": 0}
            device["nvmlDeviceGetProcessUtilization"] = {"error": 6}

        self.change(apply)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    for node in made.nodes:
        node.destroy()


def gpus(node: NodeProcess) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = me(node)["resources"]["gpus"]
    return found


def me(node: NodeProcess) -> dict[str, Any]:
    status, told = node.request("GET", "/nodes")
    assert status == 200, told
    return dict(told["nodes"][node.node_id])


def threads_of(node: NodeProcess) -> int:
    assert node.process is not None
    return len(list(Path(f"/proc/{node.process.pid}/task").iterdir()))


def log(node: NodeProcess) -> str:
    return (node.logs / "coordination.log").read_text()


def pid_of(node: NodeProcess, job: str) -> int:
    """Of the job's first process."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if f"P2P_JOB_ID={job}\0".encode() in environment and f"{node.data}/".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"{job} has no process")


def test_pages_show_each_gpu_as_it_is_now(rig: Rig) -> None:
    node = rig.start()
    first, second = gpus(node)
    assert first["uuid"] == FIRST
    assert (first["free_mb"], first["utilization"], first["temperature"], first["processes"]) == (81_008, 0.0, 44, 0)
    assert (second["free_mb"], second["utilization"], second["processes"], second["healthy"]) == (61_008, 97.0, 1, True)
    assert second["holders"] == [{"pid": 2_000_000_001, "name": None, "memory_mb": 20_000, "job": None}]
    assert me(node)["gpu_free_gb"] == (81_008 + 61_008) // 1024
    rig.hold(0, (2_000_000_009, 1_000), use=33)
    wait_until(lambda: gpus(node)[0]["free_mb"] == 80_008)
    assert gpus(node)[0]["utilization"] == 33.0
    assert node.status()["peers"]["n1"]["resources"]["gpus"] == gpus(node)
    told = json.dumps(node.request("GET", "/peer/capabilities"))
    assert FIRST in told
    assert "utilization" not in told, "that would go to every node every few seconds"


def test_other_nodes_know_the_gpus_and_about_how_much_of_them_is_free(rig: Rig, tmp_path: Path) -> None:
    has_gpus = rig.start()
    other = NodeProcess(tmp_path / "other", ["--no-populate", "--no-worker", "--peers", has_gpus.address], node_id="n2")
    rig.nodes.append(other)
    other.start()

    def seen() -> dict[str, Any]:
        told = other.request("GET", "/nodes")[1]["nodes"].get("n1") or {}
        return told if told.get("resources") else {}

    wait_until(lambda: seen().get("gpu_free_gb") == (81_008 + 61_008) // 1024)
    assert seen()["gpu_use"] == 50
    assert [(gpu["uuid"], gpu["healthy"]) for gpu in seen()["resources"]["gpus"]] == [(FIRST, True), (SECOND, True)]
    rig.change(lambda body: body["devices"][1].update(xids=[95]))
    wait_until(lambda: [gpu["healthy"] for gpu in seen()["resources"]["gpus"]] == [True, False], seconds=30)


def test_what_strangers_hold_is_not_given_away(rig: Rig) -> None:
    node = rig.start()
    jobs = [
        node.submit(command=["sleep", "600"], requires={"gpus": 1, "gpu_memory_mb": 70_000, "cpus": 1})
        for _ in range(2)
    ]
    node.wait_for(jobs[0], "running")
    wait_until(lambda: "the largest free is 61008 MB" in node.job(jobs[1]).get("why_pending", ""))
    rig.hold(1)
    record = node.wait_for(jobs[1], "running")
    assert record["attempt"] == 1


def test_a_job_that_uses_what_it_was_granted_leaves_the_rest(rig: Rig) -> None:
    node = rig.start()
    first = node.submit(command=["sleep", "600"], requires={"gpus": 1, "gpu_memory_mb": 30_000, "gpu_share": 0.5})
    node.wait_for(first, "running")
    place = next(gpu for gpu in (0, 1) if gpus(node)[gpu]["free_mb"] in (51_008, 31_008))
    rig.hold(place, (pid_of(node, first), 25_000))
    wait_until(lambda: gpus(node)[place]["used_mb"] == 25_000)
    assert gpus(node)[place]["free_mb"] == 51_008
    (held,) = gpus(node)[place]["holders"]
    assert (held["name"], held["job"]) == ("sleep", first)


def test_a_hung_nvml_makes_gpus_unhealthy_and_nothing_slow_and_they_come_back(rig: Rig) -> None:
    node = rig.start()
    threads = threads_of(node)
    rig.change(lambda body: body.update(hangs=True))
    wait_until(lambda: "ALERT_RAISED alert=gpu_error" in log(node))
    assert [(gpu["healthy"], gpu["free_mb"]) for gpu in gpus(node)] == [(False, 0), (False, 0)]
    wants_one = node.submit(command=["true"], requires={"gpus": 1})
    for _ in range(20):
        began = time.monotonic()
        done = node.submit(command=["true"])
        node.wait_for(done, "completed")
        assert time.monotonic() - began < 5
    assert node.job(wants_one)["state"] == "pending"
    assert threads_of(node) <= threads + 4, "threads pile up"
    rig.change(lambda body: body.update(hangs=False))
    node.wait_for(wants_one, "completed")
    wait_until(lambda: "ALERT_CLEARED alert=gpu_error" in log(node))


def test_a_node_starts_and_stops_while_nvml_hangs(rig: Rig) -> None:
    rig.change(lambda body: body.update(hangs=True))
    node = rig.start()
    assert (gpus(node), me(node)["resources"]["gpu_error"]) == ([], "NVML has not answered for over 1 s")
    node.wait_for(node.submit(command=["true"]), "completed")
    rig.change(lambda body: body.update(hangs=False))
    node.wait_for(node.submit(command=["true"], requires={"gpus": 2}), "completed")
    rig.change(lambda body: body.update(hangs=True))
    wait_until(lambda: me(node)["resources"]["gpu_error"])
    assert node.kill(signal.SIGTERM) == 0


def test_a_gpu_with_a_fatal_xid_gets_no_job_and_says_why(rig: Rig) -> None:
    node = rig.start()
    rig.change(lambda body: body["devices"][0].update(xids=[79]))
    wait_until(lambda: not gpus(node)[0]["healthy"])
    assert gpus(node)[0]["why"] == "Xid 79: it has fallen off the bus"
    job = node.submit(command=["sh", "-c", "echo $CUDA_VISIBLE_DEVICES > gpu"], requires={"gpus": 1})
    node.wait_for(job, "completed")
    assert (node.data / f"jobs/{job}.1/gpu").read_text().strip() == SECOND
    wait_until(lambda: f"ALERT_RAISED alert=gpu_unhealthy_{FIRST}" in log(node))


def test_a_job_whose_gpu_idles_is_told_as_stalled_once_and_one_that_works_is_not(rig: Rig) -> None:
    """It spins, as a process does that waits for its GPU."""
    node = rig.start(reaper={"gpu_idle_seconds": 2}, health={"interval_seconds": 0.2})
    idle = node.submit(command=["sh", "-c", "while :; do :; done"], requires={"gpus": 1, "cpus": 1})
    wait_until(lambda: node.job(idle)["state"] == "running")
    rig.hold(0, use=0)
    rig.hold(1, use=0)
    wait_until(lambda: "WORK_STALLED" in log(node))
    told = node.request("GET", "/work_queue_status")[1]
    assert told["stalled"] == 1
    (row,) = node.request("GET", "/work_queue/stuck")[1]["jobs"]
    assert row["id"] == idle
    assert row["reason"].startswith("its GPUs idle below 5 %, and no output, progress or work, for")
    rig.hold(0, use=80)
    rig.hold(1, use=80)
    wait_until(lambda: node.request("GET", "/work_queue_status")[1]["stalled"] == 0)
    sleeper = node.submit(command=["sleep", "600"], requires={"gpus": 1, "cpus": 1})
    node.wait_for(sleeper, "running")
    time.sleep(3)
    assert node.request("GET", "/work_queue_status")[1]["stalled"] == 0, "its GPU works, it need not"
    assert log(node).count("WORK_STALLED") == 1


@pytest.mark.parametrize("policy", ["warn", "kill"])
def test_a_job_that_takes_more_of_a_shared_gpu_than_it_asked_for(rig: Rig, policy: str) -> None:
    node = rig.start(work={"gpu_memory_policy": policy})
    greedy = node.submit(
        command=["sleep", "600"], requires={"gpus": 1, "gpu_memory_mb": 10_000, "gpu_share": 0.5}, max_attempts=1
    )
    node.wait_for(greedy, "running")
    wait_until(lambda: any(gpu["free_mb"] in (71_008, 51_008) for gpu in gpus(node)))
    place = next(n for n, gpu in enumerate(gpus(node)) if gpu["free_mb"] in (71_008, 51_008))
    rig.hold(place, (pid_of(node, greedy), 12_000))
    wait_until(lambda: f"ALERT_RAISED alert=gpu_memory_{greedy}.1" in log(node))
    if policy == "warn":
        assert node.job(greedy)["state"] == "running"
        return
    record = node.wait_for(greedy, "failed")
    assert "it used 12000 MB of GPU" in record["error"]
    assert "was granted 10000 MB" in record["error"]


def test_what_an_ended_job_left_on_a_gpu_is_ended_and_strangers_are_not(rig: Rig, tmp_path: Path) -> None:
    """The runner ends what it sees; this is what it did not see, say because it was killed."""
    node = rig.start()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("P2P_")}

    def start(**marks: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", MILD], env={**environment, **marks}, start_new_session=True)

    def marks(folder: Path) -> dict[str, str]:
        return {"P2P_JOB_ID": "gone", "P2P_ATTEMPT": "1", "P2P_JOB_DIR": str(folder / "gone.1")}

    left = start(**marks((node.data / "jobs").resolve()))
    others = [start(**marks(tmp_path / "another-node/jobs")), start()]
    try:
        rig.hold(0, (left.pid, 9_000), *((other.pid, 1_000) for other in others))
        assert left.wait(40) == -signal.SIGTERM
        assert "ALERT_RAISED alert=gpu_leftovers" in log(node)
        assert f"process {left.pid} (" in node.log_text
        rig.hold(0, *((other.pid, 1_000) for other in others))
        wait_until(lambda: "ALERT_CLEARED alert=gpu_leftovers" in log(node))
        assert [other.poll() for other in others] == [None, None]
    finally:
        for process in (left, *others):
            process.kill()
            process.wait()


# -- on a machine that has one ----------------------------------------------------------------------------------------

WORK = """
import ctypes, os, pathlib, time
pathlib.Path("gpu").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
cuda = ctypes.CDLL("libcuda.so.1")
device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
for code in (
    cuda.cuInit(0), cuda.cuDeviceGet(ctypes.byref(device), 0), cuda.cuCtxCreate_v2(ctypes.byref(context), 0, device),
    cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(2 << 30)),
):
    assert code == 0, code
while not pathlib.Path("idle").exists():
    for n in range(200):
        cuda.cuMemsetD8_v2(memory, n % 256, ctypes.c_size_t(2 << 30))
    cuda.cuCtxSynchronize()
time.sleep(600)
"""


@pytest.mark.skipif(not HAS_GPU, reason="NVML finds no GPU on this machine")
def test_a_job_on_a_gpu_of_this_machine(start_node: Callable[..., NodeProcess]) -> None:
    """Its memory is seen, its work is a sign of life, and its idling is told."""
    node = start_node(
        "--no-populate",
        work={"gpu_sample_seconds": 0.5},
        queue={"lease_seconds": 5, "heartbeat_seconds": 0.2},
        reaper={"gpu_idle_seconds": 5},
        health={"interval_seconds": 0.2},
    )
    idle = {gpu["uuid"]: gpu for gpu in gpus(node)}
    job = node.submit(
        command=[sys.executable, "-c", WORK], requires={"gpus": 1, "gpu_memory_mb": 1_000, "gpu_share": 0.5, "cpus": 1}
    )
    chosen = node.data / f"jobs/{job}.1/gpu"
    before = idle[wait_until(lambda: chosen.exists() and chosen.read_text())]

    def mine() -> dict[str, Any]:
        return next(gpu for gpu in gpus(node) if gpu["uuid"] == before["uuid"])

    wait_until(lambda: mine()["used_mb"] - before["used_mb"] >= 2_000, seconds=60)
    assert before["free_mb"] - mine()["free_mb"] >= 2_000, "it uses more than it declared"
    if mine()["utilization"] is None:
        return  # a MIG instance: its use cannot be told, and is not held against it
    wait_until(lambda: mine()["utilization"] >= 50, seconds=60)
    time.sleep(6)
    assert node.request("GET", "/work_queue_status")[1]["stalled"] == 0
    (node.data / f"jobs/{job}.1/idle").touch()
    wait_until(lambda: node.request("GET", "/work_queue_status")[1]["stalled"] == 1, seconds=60)
    node.request("POST", f"/jobs/{job}/cancel")
    wait_until(lambda: mine()["used_mb"] - before["used_mb"] < 1_000, seconds=60)
