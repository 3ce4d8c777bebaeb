"""What this node has: CPUs and memory as cgroups allow, disk, labels, and who is asked about its GPUs; or what a file
says.

Decides nothing about who gets it, and looks at no GPU: that may block for as long as a sick driver likes, and is
`p2p.gpu_sampler`'s, which is given what `detect` found as `look`. What is absent from the file (``--resources``, DESIGN
§3) is detected; its GPUs, or a recording of some, stand for the machine's in tests and on shared boxes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import psutil
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from coordination.placement import Offer
from p2p import cgroups
from p2p.gpus import Gpu, Holder, Reading, Who
from p2p.nvml import Library, NvmlReader, Recorded

MIB = 1 << 20


class ResourcesError(Exception):
    """The resources file is wrong; the message names the field."""


class _GpuFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str
    memory_mb: int = Field(gt=0)
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d+$")] = "0.0"
    uuid: str | None = None
    memory_used_mb: int = Field(0, ge=0, description="held by strangers")
    numa_node: int = Field(-1, ge=-1)
    nvlink: str | None = Field(None, description="GPUs of one group are each other's NVLink peers")
    utilization: float | None = Field(None, ge=0, le=100, description="per cent; absent: it cannot be measured")


class _File(BaseModel):
    """``--resources``: what is absent is detected."""

    model_config = ConfigDict(extra="forbid")
    cpus: float | None = Field(None, gt=0)
    memory_mb: int | None = Field(None, gt=0)
    disk_mb: int | None = Field(None, gt=0)
    gpus: list[_GpuFile] | None = None
    fixture: Path | None = Field(None, description="a recording of NVML, replayed in its place; beside this file")
    labels: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _gpus_once(self) -> _File:
        if self.gpus is not None and self.fixture is not None:
            raise ValueError("fixture: says what GPUs there are, and so does gpus; leave one of them out")
        uuids = [gpu.uuid or f"GPU-{n}" for n, gpu in enumerate(self.gpus or ())]
        twice = next((uuid for uuid in uuids if uuids.count(uuid) > 1), None)
        if twice is not None:
            raise ValueError(f"gpus: two of them have the uuid {twice}")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """The whole of a node, but for its GPUs, at which `look` looks once; it may block. `close` ends the looking."""

    cpus: float
    memory_mb: int
    disk_mb: int
    labels: dict[str, str] = field(default_factory=dict)
    look: Callable[[], Reading] = Reading
    close: Callable[[], None] = lambda: None

    def offer(self, node: str, gpus: Reading) -> Offer:
        """All of it, as an offer with nothing running."""
        return Offer(
            node=node,
            cpus=self.cpus,
            memory_mb=self.memory_mb,
            disk_mb=self.disk_mb,
            gpus=gpus.offers(),
            labels=self.labels,
        )

    def as_json(self, gpus: Reading) -> dict[str, Any]:
        """What seldom changes: other nodes fetch this when the hash of it changes."""
        return {
            "cpus": self.cpus,
            "memory_mb": self.memory_mb,
            "disk_mb": self.disk_mb,
            "gpus": gpus.described(),
            "labels": self.labels,
            "gpu_error": gpus.error,
            "gpu_driver": gpus.driver,
            "cuda": gpus.cuda,
        }


def detect(data_dir: Path, override: Path | None) -> Resources:
    """Looks at the machine, then lets the file override. Blocks for moments; raises ResourcesError for a bad file."""
    told = _read(override) if override is not None else _File.model_validate({})
    limits = cgroups.limits()
    found = Resources(
        cpus=told.cpus or _cpus(limits),
        memory_mb=told.memory_mb or _memory_mb(limits),
        disk_mb=told.disk_mb or shutil.disk_usage(data_dir).free // MIB,
        labels=told.labels,
    )
    if told.gpus is not None:
        reading = Reading(gpus=tuple(_gpu(n, gpu, told.gpus) for n, gpu in enumerate(told.gpus)))
        return replace(found, look=lambda: reading)
    if told.fixture is not None:
        assert override is not None
        reader = NvmlReader(Recorded(override.resolve().parent / told.fixture))
    else:
        reader = NvmlReader(Library())
    return replace(found, look=reader.read, close=reader.close)


def _uuid(n: int, gpu: _GpuFile) -> str:
    return gpu.uuid or f"GPU-{n}"


def _gpu(n: int, gpu: _GpuFile, all_of_them: list[_GpuFile]) -> Gpu:
    peers = [(m, other) for m, other in enumerate(all_of_them) if m != n and gpu.nvlink and other.nvlink == gpu.nvlink]
    stranger = Holder(0, gpu.memory_used_mb, None, Who(0, 0, "a stranger"))
    return Gpu(
        uuid=_uuid(n, gpu),
        model=gpu.model,
        memory_mb=gpu.memory_mb,
        used_mb=gpu.memory_used_mb,
        compute_capability=gpu.compute_capability,
        numa_node=gpu.numa_node,
        links=tuple(_uuid(m, other) for m, other in peers),
        utilization=gpu.utilization,
        holders=(stranger,) if gpu.memory_used_mb else (),
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
        where = ".".join(map(str, first["loc"]))
        raise ResourcesError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from None


def _cpus(limits: cgroups.Limits) -> float:
    """The cores this process may use: its affinity, and the quota of its cgroups if that is less."""
    count = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    return count if limits.cpus is None else min(count, limits.cpus)


def _memory_mb(limits: cgroups.Limits) -> int:
    total = psutil.virtual_memory().total
    return int(total if limits.memory_bytes is None else min(total, limits.memory_bytes)) // MIB
