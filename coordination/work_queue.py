"""The operators' handle on the queue (DESIGN §6): works in any Python shell beside a running node.

``from coordination.work_queue import get_work_queue``. Every method blocks briefly and may be called inside a running
event loop. What each decides is documented where it is decided: `coordination.operations`.
"""

from __future__ import annotations

from typing import Any

from coordination import live
from coordination.answers import Answer, Count


class WorkQueue:
    """A handle; it holds no connection and no state, so it never goes stale."""

    def _call(self, operation: str, **arguments: Any) -> Answer:
        return live.backend().call(operation, **arguments)

    def get_stats(self) -> Answer:
        """``pending, in_progress, completed_hour, failed_hour, oldest_item_age_seconds, by_kind, by_state, …``."""
        return self._call("queue_status")

    def get_pending_count(self) -> int:
        """Jobs that could start now."""
        return int(self.get_stats()["pending"])

    def get_in_progress_count(self) -> int:
        """Jobs claimed or running."""
        return int(self.get_stats()["in_progress"])

    def get_active_workers(self) -> list[Answer]:
        """``[{node, last_heartbeat (unix seconds), assigned, completed, failed}]`` heard of within a lease."""
        return list(self.get_stats()["workers"])

    def get_stuck_jobs(self, threshold_seconds: float = 3600) -> list[Answer]:
        """In progress for at least the threshold *and* with a reason; never merely old.

        ``[{id, kind, worker, attempt, claimed_at, started_at, seconds_in_progress, reason}]``.
        """
        return list(self._call("stuck", threshold_seconds=threshold_seconds)["jobs"])

    def release_job(self, id: str, reason: str = "operator") -> Answer:
        """Back to pending; the old attempt is fenced off and its process killed. No attempt is spent."""
        return self._call("release", id=id, reason=reason)

    def get_recent_failures(self, limit: int = 20) -> list[Answer]:
        """``[{id, kind, worker, attempt, error, exit_code, failed_at}]``, newest first."""
        return list(self._call("failures", limit=limit)["jobs"])

    def clear_inactive_workers(self, threshold_seconds: float = 300) -> Count:
        """Forgets workers silent for that long and gives back what they held; how many."""
        return Count(self._call("clear_inactive_workers", threshold_seconds=threshold_seconds)["cleared"])

    def purge_failed_jobs(self, max_age_hours: float = 24) -> Count:
        """Forgets jobs that failed longer ago; how many."""
        return Count(self._call("purge_failed", max_age_hours=max_age_hours)["purged"])

    def retry_failed_jobs(
        self,
        kind: str | None = None,
        group: str | None = None,
        array: str | None = None,
        max_age_hours: float | None = None,
        limit: int | None = None,
    ) -> Count:
        """Failed jobs start over with all their attempts, the newest first; how many."""
        asked = {"kind": kind, "group": group, "array": array, "max_age_hours": max_age_hours, "limit": limit}
        given = {name: value for name, value in asked.items() if value is not None}
        return Count(self._call("retry_failed", **given)["retried"])

    def clear_all(self, include_running: bool = False) -> Count:
        """Cancels everything that has not started, and with `include_running` the rest too; how many."""
        return Count(self._call("clear", include_running=include_running)["cleared"])

    def release_stuck_jobs(self, threshold_seconds: float = 3600) -> Count:
        """Releases what `get_stuck_jobs` lists; how many."""
        return Count(self._call("release_stuck", threshold_seconds=threshold_seconds)["released"])

    def health_check(self) -> Answer:
        """``.is_healthy .message .details``."""
        health: Answer = self.get_stats()["health"]
        return health

    def add_job(self, **job: Any) -> str:
        """Submits one job, with the fields of DESIGN §5 as keywords; its id."""
        return str(self._call("submit", body=job)["id"])

    def get_job(self, id: str) -> Answer:
        """The whole record. Raises Refused (status 404) if there is none."""
        return self._call("job", id=id)

    def cancel_job(self, id: str, reason: str = "operator") -> Answer:
        """Cancels an unfinished job; the job's record."""
        return self._call("cancel", id=id, reason=reason)

    def retry_job(self, id: str) -> Answer:
        """Starts a failed or cancelled job over; the job's record."""
        return self._call("retry", id=id)


_queue = WorkQueue()


def get_work_queue() -> WorkQueue:
    """The queue of the node beside (or around) this process."""
    return _queue
