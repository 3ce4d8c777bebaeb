"""Which of a GPU's processes are whose: what each job uses of its GPUs, what it uses too much, and what ended jobs left
behind. Plain computing over a `Reading`; only `identify` looks at anything (`/proc`), and may block for a moment.

A process is a job's if its environment names the job, its attempt and its folder, or if it is in the session of the
attempt's first process: the same two signs by which the runner knows them (`p2p.runner.processes`). Everything else is
a stranger's and is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from p2p.gpus import IDLE_BELOW, Gpu, Holder, Reading, Who
from p2p.runner import processes

Key = tuple[str, int]

SPINNING_CORES = 1.1  # that a job burns for each of its GPUs while it only waits
LATE_SECONDS = 0.1


class Claim(NamedTuple):
    """What a running attempt was given: the GPUs, and on each of them MiB (0: it declared none) and a share."""

    key: Key
    gpus: tuple[str, ...]
    memory_mb: int
    share: float
    pid: int | None  # of its first process, whose session all of it is in
    folder: Path


class Excess(NamedTuple):
    """An attempt that uses more of a GPU's memory than it was granted."""

    key: Key
    gpu: str
    used_mb: int
    granted_mb: int

    def __str__(self) -> str:
        return (
            f"it used {self.used_mb} MB of GPU {self.gpu}, and was granted {self.granted_mb} MB "
            "(requires.gpu_memory_mb) on a GPU that is shared"
        )


class Leftover(NamedTuple):
    """A process of an attempt that has ended, which still holds memory of a GPU."""

    pid: int
    start: int
    name: str
    job: str
    attempt: int
    gpu: str
    memory_mb: int | None

    def __str__(self) -> str:
        held = f"{self.memory_mb} MB" if self.memory_mb is not None else "some memory"
        return f"process {self.pid} ({self.name}) of {self.job}, attempt {self.attempt}, holds {held} of GPU {self.gpu}"


def identify(pid: int) -> Who | None:
    """None for a process that cannot be seen here."""
    stat = processes.read_stat(pid)
    if stat is None or not stat.alive:
        return None
    mark = processes.mark_of(pid)
    if mark is None:
        return Who(stat.start, stat.session, processes.name_of(pid))
    return Who(stat.start, stat.session, processes.name_of(pid), mark.job, mark.attempt, mark.directory)


def ownership(claims: Iterable[Claim]) -> Callable[[Holder], Key | None]:
    """A function that says which of these attempts a process is of."""
    marks = {(claim.key, str(claim.folder)): claim.key for claim in claims}
    sessions = {claim.pid: claim.key for claim in claims if claim.pid is not None}

    def owner(holder: Holder) -> Key | None:
        who = holder.who
        if who is None:
            return None
        marked = marks.get(((who.job or "", who.attempt), who.directory))
        return marked if marked is not None else sessions.get(who.session)

    return owner


def utilization(claim: Claim, reading: Reading, owner: Callable[[Holder], Key | None]) -> float | None:
    """Per cent of the busiest of its GPUs that this attempt uses; None if that cannot be told of one of them.

    By process where NVML samples that; else, and where it names processes that cannot be seen from here, of the whole
    GPU. A GPU that is lost does nothing, whoever waits for it.
    """
    if reading.error is not None or not reading.sampled:
        return None
    found: list[float] = []
    for uuid in claim.gpus:
        gpu = reading.by_uuid(uuid)
        use = _use_of(claim.key, gpu, owner) if gpu is not None else None
        if use is None:
            return None
        found.append(use)
    return max(found, default=None)


def _use_of(key: Key, gpu: Gpu, owner: Callable[[Holder], Key | None]) -> float | None:
    if gpu.fault is not None:
        return 0.0
    if gpu.uses_by_process:
        own = sum(holder.utilization or 0.0 for holder in gpu.holders if owner(holder) == key)
        hidden = any(holder.utilization and holder.who is None for holder in gpu.holders)
        if own >= IDLE_BELOW or not hidden:
            return own
    return gpu.utilization


def excesses(claims: Collection[Claim], reading: Reading) -> list[Excess]:
    """Who uses more than was granted, where that is somebody else's: on a GPU of which a job has a share only, or
    which it has beside another. Alone on a GPU a job may have all of it."""
    if reading.error is not None:
        return []
    owner = ownership(claims)
    found = []
    for claim in claims:
        for uuid in claim.gpus:
            gpu = reading.by_uuid(uuid)
            shared = claim.share < 1 or any(uuid in other.gpus for other in claims if other.key != claim.key)
            if gpu is None or not claim.memory_mb or not shared:
                continue
            used = sum(holder.memory_mb or 0 for holder in gpu.holders if owner(holder) == claim.key)
            if used > claim.memory_mb:
                found.append(Excess(claim.key, uuid, used, claim.memory_mb))
    return found


def leftovers(claims: Collection[Claim], known: Collection[Key], reading: Reading, folder: Path) -> list[Leftover]:
    """Processes marked as an attempt's of this node (its folder is under `folder`) that `known`, all attempts that have
    not ended, does not have. One in the session of a running attempt is that one's, whatever its environment says."""
    owner = ownership(claims)
    found = {}
    for gpu in reading.gpus:
        for holder in gpu.holders:
            who = holder.who
            if who is None or who.job is None or holder.memory_mb == 0:
                continue
            if (who.job, who.attempt) in known or owner(holder) is not None:
                continue
            if Path(who.directory).parent == folder:
                found[holder.pid] = Leftover(
                    holder.pid, who.start, who.name, who.job, who.attempt, gpu.uuid, holder.memory_mb
                )
    return list(found.values())


@dataclass(slots=True)
class CpuWork:
    """The CPU time of a GPU job that counts as a sign of life while its GPUs idle, in seconds, ever growing.

    A process that waits for its GPU spins: CUDA's default synchronisation and NCCL's watch of a collective each burn
    up to a core for as long as they wait, also for ever. So a core a GPU (and a little, for what is measured a moment
    sooner or later than asked) is waiting, and only what goes beyond it is work: loading data, preparing batches,
    compiling.
    """

    gpus: int
    counted: float = 0.0
    _seconds: float = field(default=-1.0)
    _at: float = 0.0

    def add(self, cpu_seconds: float, now: float) -> float:
        """`cpu_seconds` is what the attempt has used by `now` (monotonic seconds). Answers what counts so far."""
        if self._seconds >= 0:
            spun = self.gpus * SPINNING_CORES * (now - self._at) + LATE_SECONDS
            self.counted += max(cpu_seconds - self._seconds - spun, 0.0)
        self._seconds, self._at = cpu_seconds, now
        return self.counted
