"""The names of the daemons a node supervises."""

from __future__ import annotations

from enum import StrEnum


class DaemonType(StrEnum):
    """A background loop by name; the value is what ``/daemons/{type}`` and the logs use."""

    QUEUE_POPULATOR = "queue_populator"
    JOB_REAPER = "job_reaper"
    WORKER_PULL = "worker_pull"
    QUEUE_MAINTENANCE = "queue_maintenance"
    SCHEDULER = "scheduler"
    HEALTH_MONITOR = "health_monitor"
    GPU_WATCH = "gpu_watch"


class DaemonState(StrEnum):
    """stopped -> running <-> backoff -> failed; any of them -> stopped or running by hand."""

    STOPPED = "stopped"
    RUNNING = "running"
    BACKOFF = "backoff"
    FAILED = "failed"
