"""What runs on this node, what that leaves free, and what a job's process sees. Plain bookkeeping; no sockets.

Decides the environment and the folder of an attempt (DESIGN §5); whether it runs at all is the leader's decision, how
it is run is the runner's.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config.settings import WorkerSettings
from coordination.placement import Offer, Shape, take, with_defaults
from coordination.validation import MAX_DEPTH, nested_deeper
from p2p.runner.client import StartSpec

ROOT = Path(__file__).resolve().parent.parent
# The cluster secret and the node's own settings are not a job's business (DESIGN §4).
_HIDDEN = re.compile(r"^(RINGRIFT_CLUSTER_AUTH_TOKEN|P2P_)")
MAX_RESULT_BYTES = 1 << 20
MAX_PROGRESS_BYTES = 64 << 10
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
    told_start: bool = False
    ended: bool = False
    told_memory: bool = False
    progress_mtime_ms: int = 0

    @property
    def key(self) -> Key:
        return (self.id, self.attempt)

    @property
    def shape(self) -> Shape:
        return with_defaults(self.description.get("requires", {}))


class Workplace:
    """The attempts of this node by (job, attempt)."""

    def __init__(self, node: str, total: Offer, folder: Path, url: str, max_jobs: int) -> None:
        self.node, self.total, self.folder, self.url, self.max_jobs = node, total, folder, url, max_jobs
        self.jobs: dict[Key, LocalJob] = {}
        self.disk_free_mb = total.disk_mb  # as last measured; jobs write
        self._environment = _job_environment(os.environ)

    def free(self) -> Offer:
        """The total less what runs here."""
        left = self.total
        for job in self.jobs.values():
            if not job.ended:
                left = take(left, job.shape, job.description.get("gpus", ()))
        return replace(left, disk_mb=min(left.disk_mb, self.disk_free_mb))

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
        self.jobs[job.key] = job
        return job

    def adopt(self, job_id: str, attempt: int, description: dict[str, Any] | None) -> LocalJob:
        """Takes up an attempt that the runner has from before this start, as the queue describes it. One the queue
        does not know (any more) takes no room; its end is reported all the same, and refused."""
        known = self.jobs.get((job_id, attempt))
        return known or self.add(description or {"id": job_id, "attempt": attempt, "requires": {"cpus": 0}})

    def start_spec(self, job: LocalJob, settings: WorkerSettings) -> StartSpec:
        """What the runner is to start; it makes the attempt's folder."""
        told = job.description
        gpus = told.get("gpus", ())
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


def _job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The node's environment without its secrets, in which ``python`` is the node's Python and this project's packages
    can be imported from any folder. Unbuffered, so that a job's output is a sign of life as it happens."""
    env = {name: value for name, value in environment.items() if not _HIDDEN.match(name)}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(ROOT)]))
    env.setdefault("PYTHONUNBUFFERED", "1")
    return env


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
