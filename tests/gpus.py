"""Whether this machine has a GPU that tests may use; most have none, and run recordings instead."""

from __future__ import annotations

from p2p.gpu_sampler import GpuSampler
from p2p.nvml import Library, NvmlReader


def _has_gpu() -> bool:
    """A driver that hangs is none, and must not hang the tests."""
    sampler = GpuSampler(NvmlReader(Library()).read, deadline_seconds=20)
    sampler.start()
    sampler.stop()
    return any(gpu.healthy for gpu in sampler.reading.gpus)


HAS_GPU = _has_gpu()
