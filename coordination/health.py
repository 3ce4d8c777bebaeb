"""Is the queue healthy? Pure: numbers in, verdict out (DESIGN §6). Who is told is `coordination.alerts`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from config.settings import HealthSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueFigures:
    """What health is judged by. Ages are seconds; None = never."""

    pending: int
    stuck: int
    completed_hour: int
    failed_hour: int
    since_completion: float | None
    since_pending: float | None  # for how long there has been pending work without a break
    depth_over_for: float  # for how long the depth has been over its limit


@dataclass(frozen=True, slots=True)
class Verdict:
    """`breaches` maps the name of each alert that should stand to its sentence."""

    breaches: dict[str, str] = field(default_factory=dict)

    @property
    def is_healthy(self) -> bool:
        return not self.breaches

    @property
    def message(self) -> str:
        return "; ".join(self.breaches.values()) or "healthy"

    def as_json(self, figures: QueueFigures) -> dict[str, Any]:
        """``{"is_healthy", "message", "details"}``."""
        finished = figures.completed_hour + figures.failed_hour
        return {
            "is_healthy": self.is_healthy,
            "message": self.message,
            "details": {
                "queue_depth": figures.pending,
                "stuck_jobs": figures.stuck,
                "failure_rate": round(figures.failed_hour / finished, 4) if finished else 0.0,
                "time_since_completion": figures.since_completion,
                "breaches": dict(self.breaches),
            },
        }


def judge(figures: QueueFigures, limits: HealthSettings) -> Verdict:
    """Every threshold of DESIGN §6 that is crossed."""
    breaches: dict[str, str] = {}
    if figures.pending > limits.queue_depth and figures.depth_over_for >= limits.queue_depth_seconds:
        breaches["queue_depth"] = (
            f"{figures.pending} jobs pending, over {limits.queue_depth} for {figures.depth_over_for / 60:.0f} min"
        )
    if figures.stuck > limits.stuck_jobs:
        breaches["stuck_jobs"] = f"{figures.stuck} jobs without a sign of life, more than {limits.stuck_jobs}"
    finished = figures.completed_hour + figures.failed_hour
    if finished >= limits.failure_rate_least and figures.failed_hour / finished > limits.failure_rate:
        breaches["failure_rate"] = f"{figures.failed_hour} of {finished} jobs failed in the last hour"
    quiet = [age for age in (figures.since_completion, figures.since_pending) if age is not None]
    if figures.pending and figures.since_pending is not None and min(quiet) > limits.idle_seconds:
        breaches["time_since_completion"] = f"work is pending and nothing completed for {min(quiet) / 60:.0f} min"
    return Verdict(breaches)
