"""Runs what is due, on the leader. Which schedules there are and when each is due next is in the queue; that a run
happens once is `queue_state`'s doing: a run names the due time it is for, and only the newest one counts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from coordination import commands as c
from coordination.dispatcher import Dispatcher
from coordination.errors import InvalidInput, Refused
from coordination.schedules import Schedule
from coordination.submission import Submission
from coordination.validation import first_problem, join

log = logging.getLogger(__name__)

FILE, API = "file", "api"
LATE_MS = 60_000  # a run that is this late was missed, not merely slow in coming


class Scheduler:
    """Belongs to the event loop."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._desk = dispatcher

    @property
    def leads(self) -> bool:
        return self._desk.leads

    async def rows(self) -> list[dict[str, Any]]:
        """Every schedule with its next and its last run."""
        return await self._desk.ask(lambda reader: reader.schedules())

    async def row(self, name: str) -> dict[str, Any]:
        """Raises Refused (404)."""
        found = next((row for row in await self.rows() if row["name"] == name), None)
        if found is None:
            raise Refused(404, f"there is no schedule {name[:80]!r}", field="name")
        return found

    async def put(self, name: str, body: Any, *, origin: str = API, field: str = "") -> dict[str, Any]:
        """Adds a schedule, or puts it in place of the one of this name. Raises InvalidInput or Refused."""
        schedule = self._read(body, field)
        now = self._desk.now_ms()
        text = json.dumps(schedule.model_dump(mode="json", exclude_unset=True), sort_keys=True)
        await self._desk.propose(c.PutSchedule(now, name, text, origin, schedule.due_after(now)))
        return await self.row(name)

    async def drop(self, name: str, *, origin: str = API) -> None:
        """Raises Refused: 404 unknown, 409 of jobs.yaml."""
        await self._desk.propose(c.DropSchedule(self._desk.now_ms(), name, origin))

    def _read(self, body: Any, field: str = "") -> Schedule:
        try:
            schedule = Schedule.model_validate(body)
        except ValidationError as error:
            raise InvalidInput(*first_problem(error, Schedule, prefix=field)) from None
        try:
            self._job("(check)", schedule)
        except InvalidInput as error:
            raise InvalidInput(join(field, "job", error.field), error.detail) from None
        return schedule

    def _job(self, name: str, schedule: Schedule) -> c.NewJob:
        submission = Submission(self._desk.kinds, self._desk.now_ms(), batch=False)
        submission.add(schedule.job.model_dump(exclude_unset=True))
        (job,) = submission.finish()
        if job.unique_key is None and not schedule.overlap:
            job = job._replace(unique_key=f"schedule:{name}")
        return job

    async def take_up(self, from_file: Mapping[str, Schedule]) -> None:
        """Makes the queue's schedules of origin `FILE` those of this node's jobs.yaml. One whose times stay the same
        keeps its next due time."""
        there = {row["name"]: row for row in await self.rows()}
        for name, schedule in from_file.items():
            body = schedule.model_dump(mode="json", exclude_unset=True)
            known = there.get(name)
            if known is None or known["origin"] != FILE or known["schedule"] != body:
                try:
                    await self.put(name, body, origin=FILE)
                except (InvalidInput, Refused) as error:
                    if isinstance(error, Refused) and error.status >= 500:
                        raise  # nobody could take it now; the next turn tries again
                    log.error("schedule %s of jobs.yaml is left out: %s", name, error)  # and stops no other
        for name, row in there.items():
            if row["origin"] == FILE and name not in from_file:
                await self.drop(name, origin=FILE)

    async def run_due(self) -> int:
        """Submits what is due; how many jobs that made."""
        now = self._desk.now_ms()
        due = await self._desk.ask(lambda reader: reader.due_schedules(now))
        n = 0
        for name, due_ms, body in due:
            n += await self._run(name, due_ms, body, now)
        return n

    async def _run(self, name: str, due_ms: int, body: str, now: int) -> int:
        jobs: tuple[c.NewJob, ...] = ()
        note, next_ms = "", 0
        try:
            schedule = Schedule.model_validate_json(body)
            next_ms = schedule.due_after(now)
            if now - due_ms >= LATE_MS and not schedule.catch_up:
                note = f"missed by {(now - due_ms) / 1000:.0f} s and not made up for (catch_up: false)"
            else:
                jobs = (self._job(name, schedule),)
        except (InvalidInput, ValidationError) as error:
            # Its kind has gone or changed since. It goes on being due, so that it runs again once that is mended.
            note = f"cannot be submitted: {error}"
            next_ms = next_ms or now + LATE_MS
            log.error("schedule %s %s", name, note)
        told = await self._desk.propose(c.RunSchedule(now, name, due_ms, next_ms, jobs, note))
        return int(told)
