"""GPUs as this node sees them: the nouns, which of them are fit to be offered, and how much of each is free.

A `Reading` is one look at all GPUs; `Health` compares looks and says which GPUs are not to be offered, and why;
`free_mb` says what a job could still get. All of it is plain computing: who looks is `p2p.nvml`, when and on which
thread is `p2p.gpu_sampler`, whose process is whose is `p2p.gpu_jobs`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from coordination.placement import GpuOffer

K = TypeVar("K", bound=Hashable)

# Errors after which a GPU must be reset, or its machine restarted or repaired, before it is trusted with work (NVIDIA,
# "Xid Errors", https://docs.nvidia.com/deploy/xid-errors/, catalogue and "Recommended actions"; the memory ones also
# "GPU Memory Error Management", https://docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt/). 94 is contained: only the job
# that met it fails, but a row waits for its remapping until the next reset, so nothing new is put there.
# Not here: 63 (a row was remapped as it should be) and what NVIDIA's own device plugin takes for the application's
# fault (13, 31, 43, 45, 68, 109): a job with a wild pointer must not take the GPU away from the others.
FATAL_XIDS: Mapping[int, str] = {
    46: "the GPU stopped processing",
    48: "an uncorrectable (double bit) ECC error",
    62: "its internal micro-controller halted",
    64: "a broken memory row could not be remapped",
    74: "an NVLink error",
    79: "it has fallen off the bus",
    94: "a contained memory error; it needs a reset",
    95: "an uncontained memory error",
    119: "its system processor (GSP) does not answer",
    120: "its system processor (GSP) failed",
    136: "link training failed",
    140: "an unrecovered ECC error",
    143: "it could not be initialised",
}
GONE = "NVML does not list it any more: lost off the bus"
MAX_HOLDERS = 16  # named on a page
IDLE_BELOW = 5.0  # per cent; a GPU below it does no work to speak of


class Who(NamedTuple):
    """A process as the kernel tells of it, with the mark of the job that started it if it has one."""

    start: int  # clock ticks after boot: with the pid, an identity
    session: int
    name: str = ""
    job: str | None = None
    attempt: int = 0
    directory: str = ""


class Holder(NamedTuple):
    """A process that holds memory of a GPU. None: NVML does not say. `who` is None for one that cannot be seen from
    here: it has gone, or lives in another PID namespace."""

    pid: int
    memory_mb: int | None
    utilization: float | None = None
    who: Who | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU, or one MIG instance, at one look. Memory in MiB; `reserved_mb` is the driver's own. What is None was
    not told. `uncorrected` counts ECC errors since the last reset, `xids` are those new in this look."""

    uuid: str
    model: str = ""
    memory_mb: int = 0
    reserved_mb: int = 0
    used_mb: int = 0
    compute_capability: str = "0.0"
    numa_node: int = -1
    links: tuple[str, ...] = ()  # uuids of its NVLink peers
    parent: str | None = None  # of a MIG instance: the GPU it is a part of
    utilization: float | None = None  # per cent
    temperature: int | None = None  # degrees Celsius
    uncorrected: int | None = None
    remap_failed: bool = False
    xids: tuple[int, ...] = ()
    holders: tuple[Holder, ...] = ()
    fault: str | None = None  # why it cannot be used, by NVML's word of this moment
    why: str | None = None  # why it is not offered; None: it is healthy

    @property
    def healthy(self) -> bool:
        return self.why is None

    @property
    def processes(self) -> int:
        """How many processes hold some of its memory."""
        return sum(holder.memory_mb != 0 for holder in self.holders)

    @property
    def uses_by_process(self) -> bool:
        """Whether NVML told which process uses it."""
        return any(holder.utilization is not None for holder in self.holders)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One look at the node's GPUs. `error` says why there is none, or why it cannot be trusted."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: str | None = None
    error: str | None = None
    sampled: bool = True  # False: nobody has looked yet

    def by_uuid(self, uuid: str) -> Gpu | None:
        return next((gpu for gpu in self.gpus if gpu.uuid == uuid), None)

    def in_doubt(self, why: str) -> Reading:
        """The same GPUs, none of them to be offered."""
        return replace(self, error=why, gpus=tuple(replace(gpu, why=gpu.why or why) for gpu in self.gpus))

    def offers(self) -> tuple[GpuOffer, ...]:
        """Each GPU with nothing of ours running on it; one that is not healthy with nothing free."""
        return tuple(
            GpuOffer(
                uuid=gpu.uuid,
                model=gpu.model,
                memory_mb=gpu.memory_mb,
                memory_free_mb=gpu.memory_mb - gpu.reserved_mb if gpu.healthy else 0,
                share_free=1.0 if gpu.healthy else 0.0,
                compute_capability=gpu.compute_capability,
                healthy=gpu.healthy,
                numa_node=gpu.numa_node,
                links=gpu.links,
                utilization=gpu.utilization,
            )
            for gpu in self.gpus
        )

    def described(self) -> list[dict[str, Any]]:
        """What seldom changes, as JSON: this is what other nodes are told, by the hash of it."""
        return [
            {
                "uuid": gpu.uuid,
                "model": gpu.model,
                "memory_mb": gpu.memory_mb,
                "compute_capability": gpu.compute_capability,
                "numa_node": gpu.numa_node,
                "links": list(gpu.links),
                "parent": gpu.parent,
                "healthy": gpu.healthy,
                "why": gpu.why,
            }
            for gpu in self.gpus
        ]


class Health:
    """Which GPUs are fit, over many looks. A GPU that had a fatal Xid stays unfit for as long as this node runs: a
    reset needs every user of the GPU gone, this node among them. Not thread-safe."""

    def __init__(self) -> None:
        self._known: dict[str, Gpu] = {}
        self._uncorrected: dict[str, int] = {}  # what was there when it was first seen, or after a reset
        self._xids: dict[str, str] = {}

    def judge(self, reading: Reading) -> Reading:
        """The same look with `why` filled in, and with the GPUs that have gone since an earlier one."""
        if reading.error is not None:
            known = (replace(gpu, holders=(), utilization=None) for gpu in self._known.values())
            return replace(reading, gpus=tuple(known)).in_doubt(reading.error)
        seen = {gpu.uuid for gpu in reading.gpus} | {gpu.parent for gpu in reading.gpus}
        judged = [replace(gpu, why=self._trouble(gpu)) for gpu in reading.gpus]
        # A MIG instance that was taken away goes with a reconfiguration, and is no defect.
        gone = [gpu for uuid, gpu in self._known.items() if uuid not in seen and gpu.parent is None]
        judged += [replace(gpu, holders=(), utilization=None, why=GONE, fault=GONE) for gpu in gone]
        self._known = {gpu.uuid: gpu for gpu in judged}
        return replace(reading, gpus=tuple(judged))

    def _trouble(self, gpu: Gpu) -> str | None:
        for number in gpu.xids:
            if number in FATAL_XIDS:
                self._xids.setdefault(gpu.uuid, f"Xid {number}: {FATAL_XIDS[number]}")
        before = self._uncorrected.get(gpu.uuid)
        count = gpu.uncorrected
        if count is not None and (before is None or count < before):
            before = self._uncorrected[gpu.uuid] = count
        if gpu.fault is not None:
            return gpu.fault
        if gpu.uuid in self._xids:
            return self._xids[gpu.uuid]
        if gpu.remap_failed:
            return "a broken memory row could not be remapped"
        if count is not None and before is not None and count > before:
            return f"{count - before} new uncorrected ECC error{'s' * (count - before > 1)}"
        return None


def unnamed_mb(gpu: Gpu) -> int:
    """MiB that NVML shows as used but gives to no process that can be seen from here: one of another PID namespace, of
    a MIG instance, or under a driver that does not tell."""
    named = sum(holder.memory_mb or 0 for holder in gpu.holders if holder.who is not None)
    return max(gpu.used_mb - named, 0)


def free_mb(gpu: Gpu, grants: Mapping[K, int], owner: Callable[[Holder], K | None], *, before: int = 0) -> int:
    """MiB that a further job could get, of what `grants` (our running jobs on this GPU and what each declared, 0 for
    none) and its processes leave.

    A job takes what it declared or what it uses, whichever is more, so that neither is counted twice. Memory of
    processes that are nobody's job is a stranger's. What is unnamed is taken for our own jobs', as far as it has come
    since they began (`before` is how much there was) and they have not used what they declared; else for a stranger's.
    """
    used = dict.fromkeys(grants, 0)
    strangers = 0
    for holder in gpu.holders:
        if holder.memory_mb is None or holder.who is None:
            continue
        job = owner(holder)
        if job is not None and job in used:
            used[job] += holder.memory_mb
        else:
            strangers += holder.memory_mb
    unnamed = unnamed_mb(gpu)
    unmet = sum(max(granted - used[job], 0) for job, granted in grants.items())
    strangers += unnamed - min(max(unnamed - before, 0), unmet)
    taken = sum(max(granted, used[job]) for job, granted in grants.items()) + strangers
    return max(gpu.memory_mb - gpu.reserved_mb - taken, 0)


def figures(
    gpus: Iterable[Gpu], free: Callable[[Gpu], int], owner: Callable[[Holder], tuple[str, int] | None]
) -> dict[str, dict[str, Any]]:
    """What changes all the time, by uuid: for the node's own pages. Of a holder that is no running job's, `job` is
    null; `name` is, if the process cannot be seen from here."""

    def held(holder: Holder) -> dict[str, Any]:
        job = owner(holder)
        name = holder.who.name if holder.who is not None else None
        return {"pid": holder.pid, "name": name, "memory_mb": holder.memory_mb, "job": job[0] if job else None}

    return {
        gpu.uuid: {
            "free_mb": free(gpu) if gpu.healthy else 0,
            "used_mb": gpu.used_mb,
            "utilization": gpu.utilization,
            "temperature": gpu.temperature,
            "processes": gpu.processes,
            "holders": [held(holder) for holder in gpu.holders if holder.memory_mb != 0][:MAX_HOLDERS],
        }
        for gpu in gpus
    }
