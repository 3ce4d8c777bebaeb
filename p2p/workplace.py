"""What runs on this node, what that leaves free, and what a job's process sees. Plain bookkeeping; no sockets.

Decides the environment and the folder of an attempt (DESIGN §5); whether it runs at all is the leader's decision, how
it is run is the runner's.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from config.settings import WorkerSettings
from coordination.placement import Offer, Shape, take, with_defaults
from coordination.validation import MAX_DEPTH, nested_deeper
from p2p.gpu_jobs import Claim, CpuWork, ownership
from p2p.gpus import Gpu, Reading, free_mb, unnamed_mb
from p2p.runner.client import StartSpec

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
# The cluster secret and the node's own settings are not a job's business (DESIGN §4).
_HIDDEN = re.compile(r"^(RINGRIFT_CLUSTER_AUTH_TOKEN|P2P_)")
MAX_RESULT_BYTES = 1 << 20
MAX_PROGRESS_BYTES = 64 << 10
MAX_CHECKPOINT_BYTES = 64 << 10
CHECKPOINT_FILE = "checkpoint.json"
YOUNGEST_SECONDS = 60.0  # a younger folder may be of a job that is just being started
Key = tuple[str, int]


@dataclass(slots=True, kw_only=True)
class LocalJob:
    """One attempt on this node. `description` is what the claim said."""

    id: str
    attempt: int
    description: dict[str, Any]
    folder: Path
    started_ms: int | None = None
    pid: int | None = None  # of its first process
    told_start: bool = False
    ended: bool = False
    told_memory: bool = False
    progress_mtime_ms: int = 0
    cpu_work: CpuWork | None = None  # of a job with GPUs
    gpu_unnamed_mb: dict[str, int] = field(default_factory=dict)  # nobody's that we see, when it was taken on
    progress_bad_mtime_ms: int = 0  # of one that could not be read

    @property
    def key(self) -> Key:
        return (self.id, self.attempt)

    @property
    def gpus(self) -> tuple[str, ...]:
        return tuple(self.description.get("gpus", ()))

    @property
    def shape(self) -> Shape:
        return with_defaults(self.description.get("requires", {}))


class Workplace:
    """The attempts of this node by (job, attempt)."""

    def __init__(
        self,
        node: str,
        total: Offer,
        folder: Path,
        url: str,
        max_jobs: int,
        gpus: Callable[[], Reading | None] = lambda: None,
    ) -> None:
        """`gpus` gives the newest look at them; without one they are what `total` says, and nobody else's."""
        self.node, self._total, self.folder, self.url, self.max_jobs = node, total, folder, url, max_jobs
        self.look_at_gpus = gpus
        self.jobs: dict[Key, LocalJob] = {}
        self.disk_free_mb = total.disk_mb  # as last measured; jobs write
        self._environment = _job_environment(os.environ)

    @property
    def total(self) -> Offer:
        """All that there is, with nothing running; a GPU that is not healthy counts for nothing."""
        reading = self.look_at_gpus()
        return self._total if reading is None else replace(self._total, gpus=reading.offers())

    def free(self) -> Offer:
        """The total less what runs here, and less what strangers hold of the GPUs."""
        left = self.total
        for job in self.jobs.values():
            if not job.ended:
                left = take(left, job.shape, job.description.get("gpus", ()))
        left = replace(left, disk_mb=min(left.disk_mb, self.disk_free_mb))
        reading = self.look_at_gpus()
        if reading is None:
            return left
        free = self.gpu_free_mb(reading)
        measured = (
            replace(gpu, memory_free_mb=free.get(gpu.uuid, 0), share_free=max(gpu.share_free, 0.0)) for gpu in left.gpus
        )
        return replace(left, gpus=tuple(measured))

    def gpu_claims(self) -> list[Claim]:
        """What each running attempt has of the GPUs."""
        return [
            Claim(job.key, job.gpus, job.shape["gpu_memory_mb"], job.shape["gpu_share"], job.pid, job.folder)
            for job in list(self.jobs.values())
            if job.gpus and not job.ended
        ]

    def gpu_free_mb(self, reading: Reading) -> dict[str, int]:
        """MiB that another job could get of each healthy GPU, by uuid."""
        claims = self.gpu_claims()
        owner = ownership(claims)

        def free(gpu: Gpu) -> int:
            here = {c.key: c.memory_mb for c in claims if gpu.uuid in c.gpus}
            before = min((self.jobs[key].gpu_unnamed_mb.get(gpu.uuid, 0) for key in here), default=0)
            return free_mb(gpu, here, owner, before=before)

        return {gpu.uuid: free(gpu) for gpu in reading.gpus if gpu.healthy}

    def measure_disk(self) -> int:
        """MiB free under the job folders now. Blocks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.folder).free >> 20

    def places(self) -> int:
        """How many more jobs may run, whatever they ask for."""
        return max(self.max_jobs - sum(not job.ended for job in self.jobs.values()), 0)

    def attempt_folder(self, job: str, attempt: int) -> Path:
        return attempt_folder(self.folder, job, attempt)

    def add(self, description: dict[str, Any]) -> LocalJob:
        """Takes on a claimed job."""
        job_id, attempt = description["id"], description["attempt"]
        job = LocalJob(id=job_id, attempt=attempt, description=description, folder=self.attempt_folder(job_id, attempt))
        reading = self.look_at_gpus() if job.gpus else None
        if reading is not None:
            job.gpu_unnamed_mb = {gpu.uuid: unnamed_mb(gpu) for gpu in reading.gpus if gpu.uuid in job.gpus}
        self.jobs[job.key] = job
        return job

    def adopt(self, job_id: str, attempt: int, description: dict[str, Any] | None) -> LocalJob:
        """Takes up an attempt that the runner has from before this start, as the queue describes it. One the queue
        does not know (any more) takes no room; its end is reported all the same, and refused."""
        for member in description.get("members", ()) if description is not None else ():
            if member["worker"] == self.node:  # of a gang each member has its own
                description = {**(description or {}), "gpus": member["gpus"]}
        known = self.jobs.get((job_id, attempt))
        if known is not None:
            return known
        job = self.add(description or {"id": job_id, "attempt": attempt, "requires": {"cpus": 0}})
        job.gpu_unnamed_mb = {}  # what nobody is seen to hold may be its own by now
        return job

    def start_spec(self, job: LocalJob, settings: WorkerSettings) -> StartSpec:
        """What the runner is to start; it makes the attempt's folder."""
        told = job.description
        gpus = told.get("gpus", ())
        array = told.get("array") or {}
        return StartSpec(
            job=job.id,
            attempt=job.attempt,
            argv=told["command"],
            env={
                **self._environment,
                **told.get("env", {}),
                "CUDA_VISIBLE_DEVICES": ",".join(gpus),
                "P2P_JOB_ID": job.id,
                "P2P_ATTEMPT": str(job.attempt),
                "P2P_FENCE_TOKEN": str(told.get("token", 0)),
                "P2P_NODE_ID": self.node,
                "P2P_JOB_DIR": str(job.folder),
                "P2P_URL": self.url,
                **_gang_environment(told),
                **{f"P2P_ARRAY_{name.upper()}": str(value) for name, value in array.items()},  # ID, INDEX, SIZE
            },
            directory=str(job.folder),
            cwd=told.get("cwd"),
            timeout_seconds=told.get("timeout_seconds"),
            grace_seconds=told.get("grace_seconds", 30.0),
            log_cap_bytes=settings.log_cap_mb << 20,
            memory_limit_mb=memory_limit_mb(job.shape, settings),
            memory_kill=settings.memory_policy == "kill",
            memory_group=settings.memory_cgroup,
        )

    def smallest_gpu_mb(self, job: LocalJob) -> int:
        """The memory of the smallest GPU that this job was given; 0 if it had none."""
        mine = set(job.description.get("gpus", ()))
        return min((gpu.memory_mb for gpu in self.total.gpus if gpu.uuid in mine), default=0)

    def prune(self, keep: int, hours: float) -> int:
        """Deletes the folders of ended attempts that are too old or too many; how many. Touches the disk a lot."""
        busy = {job.folder.name for job in list(self.jobs.values())}
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            try:
                at = path.stat().st_mtime
            except FileNotFoundError:
                continue  # somebody else tidies too
            if path.name not in busy and at < time.time() - YOUNGEST_SECONDS:
                found.append((at, path))
        found.sort(reverse=True)
        cutoff = time.time() - hours * 3600
        doomed = [path for n, (at, path) in enumerate(found) if n >= keep or at < cutoff]
        for path in doomed:
            shutil.rmtree(path, ignore_errors=True)
        return len(doomed)


def memory_limit_mb(shape: Shape, settings: WorkerSettings) -> int:
    """What a job of this shape may use; 0: no limit. One that asked for nothing was promised nothing."""
    if settings.memory_policy == "off":
        return 0
    return math.ceil(int(shape["memory_mb"]) * settings.memory_headroom)


def attempt_folder(root: Path, job: str, attempt: int) -> Path:
    """``<root>/<job>.<attempt>``: one folder an attempt, and no more, for making an inode is what a short job's files
    cost most."""
    return root / f"{job}.{attempt}"


def _gang_environment(told: Mapping[str, Any]) -> dict[str, str]:
    """What the members of a gang find each other by, in the names that torchrun and its like read (DESIGN §5). One
    process a node: its rank is its node's."""
    gang = told.get("gang")
    if gang is None:
        return {}
    rank = str(gang["rank"])
    return {
        "MASTER_ADDR": str(gang["master_addr"]),
        "MASTER_PORT": str(gang["master_port"]),
        "RANK": rank,
        "NODE_RANK": rank,
        "WORLD_SIZE": str(len(gang["members"])),
    }


def leave_checkpoints(jobs: list[LocalJob]) -> None:
    """Puts what an earlier attempt of each of these jobs left into its folder, before its process is started. One that
    cannot be written is left out: the runner, which writes there next, says why. Blocks."""
    for job in jobs:
        try:
            job.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path, written = job.folder / CHECKPOINT_FILE, job.folder / f"{CHECKPOINT_FILE}.new"
            if path.exists():
                continue  # this attempt was begun before: it may have written one of its own since
            written.write_text(json.dumps(job.description["checkpoint"]), encoding="utf-8")
            written.rename(path)
        except OSError as error:
            log.warning("the checkpoint of %s could not be put into its folder: %s", job.id, error)


def _job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The node's environment without its secrets, in which ``python`` is the node's Python and this project's packages
    can be imported from any folder. Unbuffered, so that a job's output is a sign of life as it happens."""
    env = {name: value for name, value in environment.items() if not _HIDDEN.match(name)}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(ROOT)]))
    env.setdefault("PYTHONUNBUFFERED", "1")
    return env


def read_end(path: Path, most: int) -> str:
    """The last bytes of a plain file as text; nothing if there is none to read."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            return ""
        return os.pread(handle, most, max(status.st_size - most, 0)).decode(errors="replace")
    except OSError:
        return ""
    finally:
        os.close(handle)


def read_json(path: Path, limit: int) -> bytes | None:
    """The file's content as compact JSON, None if there is none. Raises ValueError with a sentence if it is not JSON
    or too large."""
    try:
        # Never waits and never follows: a job may leave a pipe or a link of that name.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError(f"{path.name} is not a file")
        raw = b""
        while len(raw) <= limit and (chunk := os.read(handle, limit + 1 - len(raw))):
            raw += chunk
    finally:
        os.close(handle)
    if len(raw) > limit:
        raise ValueError(f"{path.name} is larger than {limit} bytes")
    try:
        # Python's own json writes NaN and Infinity, which JSON has not; null says the same.
        value = json.loads(raw, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if nested_deeper(value, MAX_DEPTH):
        raise ValueError(f"{path.name} is nested more than {MAX_DEPTH} levels deep")
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
