"""Recurring jobs: what a schedule is, and when it is due next. Pure but for the time zone database.

Decides whether a schedule is well formed and what time comes next; `scheduler` runs what is due, on the leader, and
`queue_state` keeps each schedule's next due time, so that a new leader neither repeats a run nor forgets one.

Cron expressions are read by `cronsim` (written for and used by Healthchecks): five fields as Debian's cron has them,
with its ways around the change of summer time: a fixed hour that a change skips runs at the change, one that comes
twice runs once; ``*`` hours follow the clock.
"""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from functools import lru_cache
from typing import Annotated
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, Field, model_validator

from coordination.job import Closed, JobSpec

_REFERENCE = datetime(2024, 1, 1, tzinfo=UTC)


@lru_cache(maxsize=64)
def _zone(name: str) -> tzinfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"there is no time zone {name[:40]!r}; write it as in 'Europe/Berlin' or 'UTC'") from None


def _timezone(name: str) -> str:
    _zone(name)
    return name


def _cron(text: str) -> str:
    if len(text.split()) != 5:
        raise ValueError("must have five fields: minute, hour, day of month, month, day of week, such as '30 3 * * *'")
    try:
        next(CronSim(text, _REFERENCE))
    except CronSimError as error:
        raise ValueError(f"is not a cron expression: {str(error)[:1].lower()}{str(error)[1:]}") from None
    except StopIteration:
        raise ValueError("never comes true in fifty years") from None
    return " ".join(text.split())


class Schedule(Closed):
    """A job that is submitted again and again, as its author writes it: in jobs.yaml or to ``/schedules``."""

    cron: Annotated[str, Field(max_length=200), AfterValidator(_cron)] = Field(
        description="minute, hour, day of month, month, day of week"
    )
    timezone: Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_timezone)] = "UTC"
    job: JobSpec = Field(description="as for POST /jobs")
    overlap: bool = Field(False, description="whether a run may begin while the one before is unfinished")
    catch_up: bool = Field(True, description="runs that were missed while nobody led are made up for by one run")
    enabled: bool = True

    @model_validator(mode="after")
    def _job_has_no_time_of_its_own(self) -> Schedule:
        for name in ("not_before", "depends_on"):
            if name in self.job.model_fields_set:
                raise ValueError(f"job: {name} cannot be given: when its runs begin is what the schedule says")
        if self.overlap and self.job.unique_key is not None:
            raise ValueError("overlap: true and a unique_key of the job's own exclude each other")
        return self

    def due_after(self, now_ms: int) -> int:
        """The first due time after `now_ms`, unix milliseconds; 0 = never."""
        if not self.enabled:
            return 0
        now = datetime.fromtimestamp(now_ms // 1000, _zone(self.timezone))
        try:
            return round(next(CronSim(self.cron, now)).timestamp() * 1000)
        except StopIteration:
            return 0
