"""What this node has: CPUs and memory as cgroups allow, disk, GPUs by NVML, labels; or what a file says.

Decides nothing about who gets it. NVML and psutil may block (a sick driver hangs for minutes), so callers run `detect`
in a thread with a deadline; a node whose NVML hangs goes on without GPUs and says why.
"""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import psutil
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coordination.placement import GpuOffer, Offer

NVML_SECONDS = 10.0
MIB = 1 << 20


class ResourcesError(Exception):
    """The resources file is wrong; the message names the field."""


class _GpuFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str
    memory_mb: int = Field(gt=0)
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d+$")] = "0.0"
    uuid: str | None = None


class _File(BaseModel):
    """``--resources``: what is absent is detected."""

    model_config = ConfigDict(extra="forbid")
    cpus: float | None = Field(None, gt=0)
    memory_mb: int | None = Field(None, gt=0)
    disk_mb: int | None = Field(None, gt=0)
    gpus: list[_GpuFile] | None = None
    labels: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """The whole of a node. `gpu_error` says why GPUs are missing, if NVML failed."""

    cpus: float
    memory_mb: int
    disk_mb: int
    gpus: tuple[GpuOffer, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    gpu_error: str | None = None

    def offer(self, node: str) -> Offer:
        """All of it, as an offer with nothing running."""
        return Offer(
            node=node,
            cpus=self.cpus,
            memory_mb=self.memory_mb,
            disk_mb=self.disk_mb,
            gpus=self.gpus,
            labels=self.labels,
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "cpus": self.cpus,
            "memory_mb": self.memory_mb,
            "disk_mb": self.disk_mb,
            "gpus": [
                {
                    "uuid": gpu.uuid,
                    "model": gpu.model,
                    "memory_mb": gpu.memory_mb,
                    "compute_capability": gpu.compute_capability,
                }
                for gpu in self.gpus
            ],
            "labels": self.labels,
            "gpu_error": self.gpu_error,
        }


def detect(data_dir: Path, override: Path | None) -> Resources:
    """Looks at the machine, then lets the file override. Blocks; raises ResourcesError for a bad file."""
    told = _read(override) if override is not None else _File.model_validate({})
    found = Resources(cpus=_cpus(), memory_mb=_memory_mb(), disk_mb=shutil.disk_usage(data_dir).free // MIB)
    if told.gpus is None:
        gpus, error = nvml_gpus()
        found = replace(found, gpus=gpus, gpu_error=error)
    else:
        found = replace(found, gpus=tuple(_gpu(n, gpu) for n, gpu in enumerate(told.gpus)))
    return replace(
        found,
        cpus=told.cpus or found.cpus,
        memory_mb=told.memory_mb or found.memory_mb,
        disk_mb=told.disk_mb or found.disk_mb,
        labels=told.labels,
    )


def _gpu(n: int, gpu: _GpuFile) -> GpuOffer:
    return GpuOffer(
        uuid=gpu.uuid or f"GPU-{n}",
        model=gpu.model,
        memory_mb=gpu.memory_mb,
        memory_free_mb=gpu.memory_mb,
        compute_capability=gpu.compute_capability,
    )


def _read(path: Path) -> _File:
    try:
        return _File.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except OSError as error:
        raise ResourcesError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ResourcesError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ResourcesError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _cpus() -> float:
    """The cores this process may use: its affinity, and the quota of its cgroup (v2) if that is less."""
    count = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            count = min(count, int(quota) / int(period))
    except (OSError, ValueError):
        pass  # no cgroup v2 here, so no quota to honour
    return count


def _memory_mb() -> int:
    total = psutil.virtual_memory().total
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            total = min(total, int(limit))
    except (OSError, ValueError):
        pass  # no cgroup v2 here, so no limit to honour
    return total // MIB


def nvml_gpus() -> tuple[tuple[GpuOffer, ...], str | None]:
    """The GPUs NVML shows, and why there are none if it failed. A hung driver costs NVML_SECONDS, once."""
    found: list[tuple[tuple[GpuOffer, ...], str | None]] = []
    thread = threading.Thread(target=lambda: found.append(_ask_nvml()), name="nvml", daemon=True)
    thread.start()
    thread.join(NVML_SECONDS)
    return found[0] if found else ((), f"NVML did not answer within {NVML_SECONDS:g} s; this node offers no GPUs")


def _ask_nvml() -> tuple[tuple[GpuOffer, ...], str | None]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return (), None  # no NVIDIA driver: a CPU box
    except pynvml.NVMLError as error:
        return (), f"NVML: {error}"
    gpus = []
    try:
        for n in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(n)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            gpus.append(
                GpuOffer(
                    uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
                    model=_text(pynvml.nvmlDeviceGetName(handle)),
                    memory_mb=memory.total // MIB,
                    # All of it: what runs here is subtracted by what it asked for, also after a restart beside
                    # a running job. What strangers hold is not seen yet.
                    memory_free_mb=memory.total // MIB,
                    compute_capability=f"{major}.{minor}",
                )
            )
    except pynvml.NVMLError as error:
        return (), f"NVML: {error}"
    finally:
        pynvml.nvmlShutdown()
    return tuple(gpus), None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
