"""What is made of NVML's answers: from recordings, from the library where there is one, and from pynvml's own code over
a library that is made here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2p.gpus import Gpu, Health, Holder, Reading
from p2p.nvml import Library, NvmlAbsent, NvmlReader, Recorded, Recorder, main, record
from tests.gpus import HAS_GPU
from tests.nodes import ROOT, wait_until

DATA = ROOT / "tests/data/nvml"
FIRST, SECOND = (f"GPU-11111111-2222-3333-4444-55555555550{n}" for n in (1, 2))
READINGS = sorted(path.name for path in DATA.glob("*.json"))

Change = Callable[[Callable[[dict[str, Any]], object]], None]


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "recording.json"
    shutil.copy(DATA / "two_h100.json", path)
    return path


@pytest.fixture
def change(recording: Path) -> Change:
    def apply(how: Callable[[dict[str, Any]], object]) -> None:
        body = json.loads(recording.read_text())
        how(body)
        staged = recording.with_suffix(".new")
        staged.write_text(json.dumps(body))
        staged.replace(recording)

    return apply


def read(name: str) -> dict[str, Gpu]:
    reading = NvmlReader(Recorded(DATA / name)).read()
    assert reading.error is None
    return {gpu.uuid: gpu for gpu in reading.gpus}


def test_two_gpus_with_all_that_nvml_tells() -> None:
    reading = NvmlReader(Recorded(DATA / "two_h100.json")).read()
    assert (reading.driver, reading.cuda) == ("550.54.15", "12.4")
    idle, busy = reading.gpus
    assert idle == Gpu(
        uuid=FIRST, model="NVIDIA H100 80GB HBM3", memory_mb=81_559, reserved_mb=551, compute_capability="9.0",
        numa_node=0, links=(SECOND,), utilization=0.0, temperature=44, uncorrected=0,
    )  # fmt: skip
    assert (busy.used_mb, busy.utilization, busy.processes) == (20_000, 97.0, 1)
    assert busy.holders == (Holder(2_000_000_001, 20_000, 96.0),)
    assert (busy.numa_node, busy.links) == (1, (FIRST,))


def test_mig_instances_are_offered_in_place_of_their_gpu() -> None:
    gpus = list(read("a100_mig.json").values())
    assert [gpu.uuid[:4] for gpu in gpus] == ["MIG-", "MIG-"]
    assert {gpu.model for gpu in gpus} == {"NVIDIA A100-SXM4-40GB MIG 3g.20gb"}
    assert {(gpu.memory_mb, gpu.compute_capability, gpu.temperature, gpu.uncorrected) for gpu in gpus} == {
        (19_968, "8.0", 31, 0)
    }
    assert {gpu.parent for gpu in gpus} == {"GPU-aaaaaaaa-0000-0000-0000-000000000001"}
    assert gpus[1].holders == (Holder(2_000_000_002, None),), "a MIG instance does not say how much each process has"
    assert gpus[1].used_mb == 5_013
    assert gpus[0].utilization is None


def test_a_driver_that_knows_little_is_asked_in_its_own_words() -> None:
    (gpu,) = read("rtx_4090_old_driver.json").values()
    assert (gpu.memory_mb, gpu.reserved_mb, gpu.used_mb, gpu.utilization) == (24_564, 0, 1_400, 3.0)
    assert (gpu.uncorrected, gpu.links, gpu.numa_node) == (None, (), -1)
    assert gpu.holders == (Holder(2_000_000_003, 900),)


def test_gpus_behind_an_nvswitch_are_all_peers(recording: Path, change: Change) -> None:
    def rewire(body: dict[str, Any]) -> None:
        for device in body["devices"]:
            device["nvmlDeviceGetNvLinkRemoteDeviceType(0)"] = 2
            device["nvmlDeviceGetNvLinkRemotePciInfo(0)"] = {"busId": "00000000:C1:00.0"}

    change(rewire)
    assert [gpu.links for gpu in NvmlReader(Recorded(recording)).read().gpus] == [(SECOND,), (FIRST,)]


def test_an_xid_is_told_once_and_of_the_instances_of_a_divided_gpu(recording: Path, change: Change) -> None:
    reader = NvmlReader(Recorded(recording))
    assert [gpu.xids for gpu in reader.read().gpus] == [(), ()]
    change(lambda body: body["devices"][1].update(xids=[79]))
    assert [gpu.xids for gpu in reader.read().gpus] == [(), (79,)]
    assert [gpu.xids for gpu in reader.read().gpus] == [(), ()]
    shutil.copy(DATA / "a100_mig.json", recording)
    change(lambda body: body["devices"][0].update(xids=[95]))
    assert [gpu.xids for gpu in NvmlReader(Recorded(recording)).read().gpus] == [(95,), (95,)]


@pytest.mark.parametrize("question", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID", "nvmlDeviceGetMemoryInfo_v2"])
def test_a_lost_gpu_keeps_its_name_and_does_not_hide_the_others(recording: Path, change: Change, question: str) -> None:
    reader = NvmlReader(Recorded(recording))
    reader.read()
    change(lambda body: body["devices"][0].update({question: {"error": 15, "text": "GPU is lost"}}))
    lost, other = reader.read().gpus
    assert (lost.uuid, lost.fault, lost.model) == (FIRST, "NVML: GPU is lost", "NVIDIA H100 80GB HBM3")
    assert other.fault is None


def test_a_gpu_that_was_lost_before_anybody_looked_is_there_too(recording: Path, change: Change) -> None:
    change(lambda body: body["devices"][0].update({"nvmlDeviceGetHandleByIndex": {"error": 15}}))
    lost, _ = Health().judge(NvmlReader(Recorded(recording)).read()).gpus
    assert (lost.uuid, lost.healthy) == ("GPU-at-index-0", False)


def test_nvml_that_fails_as_a_whole_is_opened_anew(recording: Path, change: Change) -> None:
    reader = NvmlReader(Recorded(recording))
    reader.read()
    change(lambda body: body.update({"nvmlDeviceGetCount": {"error": 18, "text": "Driver/library version mismatch"}}))
    assert reader.read() == Reading(error="NVML: Driver/library version mismatch")
    change(lambda body: body.pop("nvmlDeviceGetCount"))
    assert len(reader.read().gpus) == 2


def test_a_recording_that_hangs_answers_when_it_no_longer_does(recording: Path, change: Change) -> None:
    change(lambda body: body.update(hangs=True))
    found: list[Reading] = []
    reader = NvmlReader(Recorded(recording))
    thread = threading.Thread(target=lambda: found.append(reader.read()))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    change(lambda body: body.update(hangs=False))
    thread.join(10)
    assert len(found[0].gpus) == 2


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_recording_that_is_none_says_so(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "none.json"
    if text is not None:
        path.write_text(text)
    reading = NvmlReader(Recorded(path)).read()
    assert reading.gpus == ()
    assert reading.error is not None
    assert str(path) in reading.error


@pytest.mark.parametrize("name", READINGS)
def test_a_recording_of_a_recording_reads_the_same(name: str, tmp_path: Path) -> None:
    again = tmp_path / "again.json"
    again.write_text(json.dumps(record(Recorded(DATA / name))))
    before, after = (NvmlReader(Recorded(path)).read() for path in (DATA / name, again))
    assert before == after


# -- pynvml itself ----------------------------------------------------------------------------------------------------

LOOKS = """
import dataclasses, json, sys
from p2p.nvml import Library, NvmlReader
from p2p.gpus import Health
reader, health = NvmlReader(Library()), Health()
for _ in range(2):
    print(json.dumps(dataclasses.asdict(health.judge(reader.read()))))
reader.close()
"""
MADE_UP = "GPU-00000000-0000-0000-0000-00000000fa4e"


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to make the library with")
    folder = tmp_path_factory.mktemp("nvml")
    library = folder / "libnvidia-ml.so.1"
    source = DATA / "fake_nvml.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", str(library), str(source)], check=True)
    return folder


def look(library: Path, code: str = LOOKS, **environment: str) -> list[dict[str, Any]]:
    env = {**os.environ, "LD_LIBRARY_PATH": str(library), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_pynvml_is_read_as_recordings_are(fake_library: Path) -> None:
    first, second = look(fake_library, FAKE_NVML_PID="77")
    assert (first["driver"], first["cuda"], first["error"]) == ("550.54.15", "12.4", None)
    (gpu,) = first["gpus"]
    assert {name: gpu[name] for name in ("uuid", "model", "memory_mb", "reserved_mb", "used_mb", "why")} == {
        "uuid": MADE_UP, "model": "NVIDIA Made-Up 40GB", "memory_mb": 40_000, "reserved_mb": 400, "used_mb": 9_600,
        "why": None,
    }  # fmt: skip
    assert (gpu["compute_capability"], gpu["temperature"], gpu["uncorrected"]) == ("8.6", 52, 2)
    assert gpu["utilization"] == 61.0
    assert [holder[:3] for holder in gpu["holders"]] == [[77, 9_000, 60.0], [2_000_000_001, None, 0.0]]
    assert second["gpus"][0]["holders"][0][2] is None, "samples are told once"


def test_pynvml_tells_of_an_xid_by_the_handle_of_its_gpu(fake_library: Path) -> None:
    for reading in look(fake_library, FAKE_NVML="xid"):
        assert reading["gpus"][0]["why"] == "Xid 79: it has fallen off the bus"


def test_pynvml_of_a_lost_gpu_and_of_a_driver_that_is_not_loaded(fake_library: Path) -> None:
    first, second = look(fake_library, FAKE_NVML="lost")
    assert first["gpus"][0]["why"] is None
    assert (second["gpus"][0]["uuid"], second["gpus"][0]["why"]) == (MADE_UP, "NVML: GPU is lost")
    assert look(fake_library, FAKE_NVML="unloaded")[0]["error"] == "NVML: Driver Not Loaded"


def test_this_machine_can_be_recorded(fake_library: Path, tmp_path: Path) -> None:
    (body,) = look(fake_library, "import p2p.nvml, json; print(json.dumps(p2p.nvml.record(p2p.nvml.Library())))")
    path = tmp_path / "recording.json"
    path.write_text(json.dumps(body))
    (gpu,) = NvmlReader(Recorded(path)).read().gpus
    assert (gpu.uuid, gpu.used_mb, gpu.holders[0].utilization) == (MADE_UP, 9_600, 60.0)


# -- this machine -----------------------------------------------------------------------------------------------------


real = pytest.mark.skipif(not HAS_GPU, reason="NVML finds no GPU on this machine")


@pytest.mark.skipif(HAS_GPU, reason="NVML finds a GPU on this machine")
def test_a_machine_without_a_driver_is_a_machine_without_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    library = Library()
    try:
        library.open()
    except NvmlAbsent:
        assert NvmlReader(Library()).read() == Reading()
        assert main() == 1
        assert "no NVIDIA driver" in capsys.readouterr().err
    else:
        library.close()
        pytest.skip("there is a driver without a GPU")


@real
def test_the_gpus_of_this_machine() -> None:
    reader = NvmlReader(Library())
    reading = Health().judge(reader.read())
    reader.close()
    assert reading.error is None
    assert reading.driver and reading.cuda
    for gpu in reading.gpus:
        assert gpu.uuid.startswith(("GPU-", "MIG-"))
        assert gpu.memory_mb > 1_000
        assert 0 <= gpu.used_mb + gpu.reserved_mb <= gpu.memory_mb
        assert float(gpu.compute_capability) >= 3
        assert gpu.healthy, gpu.why
        assert gpu.temperature is None or 10 <= gpu.temperature <= 110


@real
def test_a_recording_of_this_machine_reads_as_it_does(tmp_path: Path) -> None:
    path = tmp_path / "recording.json"
    path.write_text(json.dumps(record(Library())))
    before, after = (NvmlReader(nvml).read() for nvml in (Library(), Recorded(path)))
    fixed = ("uuid", "model", "memory_mb", "reserved_mb", "compute_capability", "numa_node", "links", "parent")
    assert [[getattr(gpu, name) for name in fixed] for gpu in before.gpus] == [
        [getattr(gpu, name) for name in fixed] for gpu in after.gpus
    ]


# Holds a gibibyte of the first GPU, and works for a while whenever it is told to.
HOLD = """
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
for code in (
    cuda.cuInit(0), cuda.cuDeviceGet(ctypes.byref(device), 0), cuda.cuCtxCreate_v2(ctypes.byref(context), 0, device),
    cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(1 << 30)),
):
    assert code == 0, code
print("held", flush=True)
for _ in sys.stdin:
    for n in range(2_000):
        cuda.cuMemsetD8_v2(memory, n % 256, ctypes.c_size_t(1 << 30))
    cuda.cuCtxSynchronize()
    print("worked", flush=True)
"""


@real
def test_memory_and_use_of_a_process_on_this_machine() -> None:
    """A gibibyte that is held is seen; by process where NVML names processes here (not in every container)."""
    reader = NvmlReader(Library())
    before = reader.read().gpus[0]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": before.uuid},
    )  # fmt: skip
    assert process.stdin and process.stdout
    try:
        assert process.stdout.readline() == "held\n"
        held = reader.read().gpus[0]
        assert held.used_mb - before.used_mb >= 1_000
        assert held.processes >= before.processes

        def busy() -> bool:
            assert process.stdin and process.stdout
            process.stdin.write("work\n")
            process.stdin.flush()
            assert process.stdout.readline() == "worked\n"
            now = reader.read().gpus[0]
            return now.utilization is None or now.utilization >= 5

        wait_until(busy)
    finally:
        process.kill()
        process.communicate()
    wait_until(lambda: reader.read().gpus[0].used_mb - before.used_mb < 1_000)
    reader.close()


def test_the_recorder_passes_errors_on(recording: Path, change: Change) -> None:
    change(lambda body: body["devices"][0].update({"nvmlDeviceGetName": {"error": 15, "text": "GPU is lost"}}))
    recorder = Recorder(Recorded(recording))
    recorder.open()
    assert [gpu.fault for gpu in NvmlReader(recorder).read().gpus] == ["NVML: GPU is lost", None]
