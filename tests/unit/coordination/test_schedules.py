"""Recurring jobs: when they are due, that each due time makes one job whoever leads, and what jobs.yaml has to say."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from coordination import commands as c
from coordination.errors import InvalidInput, Refused
from coordination.kinds import Kind, Kinds
from coordination.scheduler import FILE, Scheduler
from coordination.schedules import Schedule
from p2p.loops.queue_loops import SchedulerLoop
from tests.unit.coordination.drive import T0
from tests.unit.coordination.test_new_leader import Desk

HOUR = 3_600_000
HOURLY = {"cron": "0 * * * *", "job": {"command": ["true"]}}
FIRST = T0 - T0 % HOUR + HOUR  # the first full hour


def ms(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(str(tmp_path / "state.db"))
    desk.desk.kinds = Kinds({"play": Kind(command=["play"])}, {})
    await desk.desk.begin_term()
    yield desk
    desk.reader.close()
    desk.state.close()


@pytest.fixture
def scheduler(desk: Desk) -> Scheduler:
    return Scheduler(desk.desk)


def jobs(desk: Desk) -> list[tuple[str, str]]:
    rows = desk.state._db.execute("SELECT state, coalesce(unique_key, '') FROM jobs ORDER BY seq")
    return [(str(state), str(key)) for state, key in rows]


def finish_all(desk: Desk) -> None:
    for (seq,) in desk.state._db.execute("SELECT seq FROM jobs WHERE state = 'pending' ORDER BY seq").fetchall():
        (claimed,) = desk.apply(c.Claim(desk.clock.now, "w", (c.Pick(int(str(seq)), None),)))
        done = c.AttemptDone(claimed.id, claimed.attempt, "w", True, None, None, 0, True, 0, "exit")
        desk.apply(c.Finish(desk.clock.now, (done,)))


# -- times -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cron", "zone", "after", "due"),
    [
        ("*/15 * * * *", "UTC", "2026-01-31T08:07:30+00:00", "2026-01-31T08:15:00+00:00"),
        ("*/15 * * * *", "UTC", "2026-01-31T08:15:00+00:00", "2026-01-31T08:30:00+00:00"),
        ("0 3 * * MON", "UTC", "2026-01-31T08:00:00+00:00", "2026-02-02T03:00:00+00:00"),
        ("0 3 * * *", "Europe/Berlin", "2026-01-31T08:00:00+00:00", "2026-02-01T02:00:00+00:00"),
        ("0 3 * * *", "Asia/Kolkata", "2026-01-31T08:00:00+00:00", "2026-01-31T21:30:00+00:00"),
        # 02:30 does not exist on the 29th of March 2026 in Berlin, and exists twice on the 25th of October.
        ("30 2 * * *", "Europe/Berlin", "2026-03-28T02:00:00+00:00", "2026-03-29T01:00:00+00:00"),
        ("30 2 * * *", "Europe/Berlin", "2026-03-29T01:00:00+00:00", "2026-03-30T00:30:00+00:00"),
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T22:00:00+00:00", "2026-10-25T00:30:00+00:00"),
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T00:30:00+00:00", "2026-10-26T01:30:00+00:00"),
        ("0 0 29 2 *", "UTC", "2026-01-01T00:00:00+00:00", "2028-02-29T00:00:00+00:00"),
    ],
)
def test_next_due_time_is_debians(cron: str, zone: str, after: str, due: str) -> None:
    schedule = Schedule.model_validate({**HOURLY, "cron": cron, "timezone": zone})
    assert schedule.due_after(ms(after)) == ms(due)


def test_schedule_that_is_switched_off_is_never_due() -> None:
    assert Schedule.model_validate({**HOURLY, "enabled": False}).due_after(T0) == 0


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"cron": "0 * * *"}, "cron", "five fields"),
        ({"cron": "0 0 * * * *"}, "cron", "five fields"),
        ({"cron": "61 * * * *"}, "cron", "is not a cron expression: bad minute"),
        ({"cron": "0 0 30 2 *"}, "cron", "bad day-of-month"),
        ({"cron": 5}, "cron", ""),
        ({"timezone": "Berlin"}, "timezone", "there is no time zone 'Berlin'"),
        ({"timezone": "../../etc/passwd"}, "timezone", "there is no time zone"),
        ({"job": {"command": "true"}}, "job.command", "list of arguments"),
        ({"job": {"comand": ["true"]}}, "job.comand", "did you mean 'command'"),
        ({"job": {"kind": "pley"}}, "job.kind", "did you mean 'play'"),
        ({"job": {"kind": "play", "params": {"x": 1}}}, "job.params.x", "no such param"),
        ({"job": {"command": ["x"], "not_before": 5}}, "job", "not_before cannot be given"),
        ({"job": {"command": ["x"], "depends_on": ["a"]}}, "job", "depends_on cannot be given"),
        ({"overlap": True, "job": {"command": ["x"], "unique_key": "u"}}, "overlap", "exclude each other"),
        ({"overlap": "yes"}, "overlap", ""),
        ({"crom": "x"}, "crom", "did you mean 'cron'"),
    ],
)
async def test_bad_schedule_is_refused_by_field(
    scheduler: Scheduler, body: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        await scheduler.put("s", {**HOURLY, **body})
    assert refused.value.field in (field, "(body)")
    assert words in refused.value.detail or words in str(refused.value)
    assert await scheduler.rows() == []


# -- runs ------------------------------------------------------------------------------------------------------------


async def test_job_is_made_when_it_is_due_and_not_before(desk: Desk, scheduler: Scheduler) -> None:
    told = await scheduler.put("s", HOURLY)
    assert (told["next_due_at"], told["runs"], told["origin"]) == (FIRST / 1000, 0, "api")
    desk.clock.now = FIRST - 1
    assert await scheduler.run_due() == 0
    desk.clock.now = FIRST + 300
    assert await scheduler.run_due() == 1
    assert await scheduler.run_due() == 0
    assert jobs(desk) == [("pending", "schedule:s")]
    told = await scheduler.row("s")
    assert (told["next_due_at"], told["runs"], told["last_due_at"]) == ((FIRST + HOUR) / 1000, 1, FIRST / 1000)
    assert desk.reader.job(told["last_job"])


async def test_runs_do_not_overlap_unless_they_may(desk: Desk, scheduler: Scheduler) -> None:
    await scheduler.put("alone", HOURLY)
    await scheduler.put("many", {**HOURLY, "overlap": True})
    for n in range(3):
        desk.clock.now = FIRST + n * HOUR
        await scheduler.run_due()
    assert sorted(jobs(desk)) == [("pending", "")] * 3 + [("pending", "schedule:alone")]
    told = await scheduler.row("alone")
    assert (told["runs"], told["skipped"]) == (1, 2)
    assert told["note"] == f"{told['last_job']} is unfinished, and runs may not overlap"
    finish_all(desk)
    desk.clock.now += HOUR
    await scheduler.run_due()
    told = await scheduler.row("alone")
    assert (told["runs"], told["note"]) == (2, None)


async def test_jobs_own_unique_key_is_kept(desk: Desk, scheduler: Scheduler) -> None:
    await scheduler.put("s", {**HOURLY, "job": {"command": ["x"], "unique_key": "mine"}})
    desk.clock.now = FIRST
    await scheduler.run_due()
    assert jobs(desk) == [("pending", "mine")]


async def test_array_may_recur_and_does_not_overlap_either(desk: Desk, scheduler: Scheduler) -> None:
    await scheduler.put("s", {**HOURLY, "job": {"command": ["x", "{array_index}"], "array": "1-3"}})
    for n in range(2):
        desk.clock.now = FIRST + n * HOUR
        await scheduler.run_due()
    told = await scheduler.row("s")
    assert (told["runs"], told["skipped"], len(jobs(desk))) == (1, 1, 3)
    summary = desk.reader.array(told["last_job"])
    assert summary is not None and summary["unique_key"] == "schedule:s"


async def test_runs_missed_in_an_outage_are_made_up_for_by_one(desk: Desk, scheduler: Scheduler) -> None:
    await scheduler.put("catches", HOURLY)
    await scheduler.put("skips", {**HOURLY, "catch_up": False})
    desk.desk.end_term()
    desk.clock.now = FIRST + 5 * HOUR + 120_000
    await desk.desk.begin_term()
    assert await scheduler.run_due() == 1
    assert jobs(desk) == [("pending", "schedule:catches")]
    told = await scheduler.row("skips")
    assert (told["runs"], told["skipped"], told["next_due_at"]) == (0, 1, (FIRST + 6 * HOUR) / 1000)
    assert told["note"].startswith("missed by 18120 s and not made up for")
    desk.clock.now = FIRST + 6 * HOUR + 59_000
    finish_all(desk)
    assert await scheduler.run_due() == 2, "late by less than a minute is not missed"


async def test_due_time_makes_one_job_though_two_leaders_run_it(desk: Desk, scheduler: Scheduler) -> None:
    """The one before proposed it, and the new one had read that it was due before that was applied."""
    await scheduler.put("s", {**HOURLY, "overlap": True})
    desk.clock.now = FIRST
    due = desk.reader.due_schedules(FIRST)
    await scheduler.run_due()
    (name, due_ms, body) = due[0]
    assert await Scheduler(desk.desk)._run(name, due_ms, body, FIRST) == 0
    assert len(jobs(desk)) == 1


async def test_schedule_whose_kind_has_gone_says_so_and_goes_on_being_due(desk: Desk, scheduler: Scheduler) -> None:
    await scheduler.put("s", {"cron": "0 * * * *", "job": {"kind": "play"}})
    desk.desk.kinds = Kinds({}, {})
    desk.clock.now = FIRST
    assert await scheduler.run_due() == 0
    told = await scheduler.row("s")
    assert "cannot be submitted: kind: there is no kind 'play'" in told["note"]
    desk.desk.kinds = Kinds({"play": Kind(command=["play"])}, {})
    desk.clock.now = FIRST + HOUR
    assert await scheduler.run_due() == 1


# -- changing them ---------------------------------------------------------------------------------------------------


async def test_other_job_under_the_same_times_keeps_its_next_due_time(desk: Desk, scheduler: Scheduler) -> None:
    """Else whoever puts an hourly schedule every 50 minutes would never see it run."""
    await scheduler.put("s", HOURLY)
    desk.clock.now = FIRST + 5_000
    told = await scheduler.put("s", {**HOURLY, "job": {"command": ["other"]}})
    assert told["next_due_at"] == FIRST / 1000
    assert await scheduler.run_due() == 1
    told = await scheduler.put("s", {**HOURLY, "cron": "30 * * * *"})
    assert told["next_due_at"] == (FIRST + HOUR / 2) / 1000


async def test_schedule_can_be_switched_off_and_on_and_dropped(desk: Desk, scheduler: Scheduler) -> None:
    await scheduler.put("s", {**HOURLY, "enabled": False})
    desk.clock.now = FIRST + 2 * HOUR
    assert await scheduler.run_due() == 0
    told = await scheduler.put("s", HOURLY)
    assert told["next_due_at"] == (FIRST + 3 * HOUR) / 1000
    await scheduler.drop("s")
    desk.clock.now += 9 * HOUR
    assert await scheduler.run_due() == 0
    with pytest.raises(Refused) as refused:
        await scheduler.drop("s")
    assert (refused.value.status, refused.value.field) == (404, "name")


async def test_there_is_an_end_to_the_number_of_schedules(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordination.commands.MAX_SCHEDULES", 2)
    for name in ("a", "b", "a"):
        await scheduler.put(name, HOURLY)
    with pytest.raises(Refused) as refused:
        await scheduler.put("c", HOURLY)
    assert refused.value.status == 409


# -- jobs.yaml -------------------------------------------------------------------------------------------------------


def from_file(**bodies: Any) -> dict[str, Schedule]:
    return {name: Schedule.model_validate(body) for name, body in bodies.items()}


async def test_new_term_takes_up_what_jobs_yaml_says(desk: Desk, scheduler: Scheduler) -> None:
    await scheduler.put("by-hand", HOURLY)
    await scheduler.take_up(from_file(a=HOURLY, b=HOURLY))
    assert {row["name"]: row["origin"] for row in await scheduler.rows()} == {"a": FILE, "b": FILE, "by-hand": "api"}
    index = desk.state.applied_index
    await scheduler.take_up(from_file(a=HOURLY, b=HOURLY))
    assert desk.state.applied_index == index, "what is as it should be costs no entry"
    desk.clock.now = FIRST + 5_000
    await scheduler.take_up(from_file(a={**HOURLY, "overlap": True}))
    assert [row["name"] for row in await scheduler.rows()] == ["a", "by-hand"]
    assert await scheduler.run_due() == 2, "it was due while the leader changed, and still is"


async def test_schedule_of_jobs_yaml_is_changed_there(scheduler: Scheduler) -> None:
    await scheduler.take_up(from_file(a=HOURLY))
    for order in (scheduler.put("a", HOURLY), scheduler.drop("a")):
        with pytest.raises(Refused, match=r"one of jobs\.yaml") as refused:
            await order
        assert refused.value.status == 409


async def test_jobs_yaml_takes_over_a_name_that_was_put_by_hand(scheduler: Scheduler) -> None:
    await scheduler.put("a", {**HOURLY, "cron": "5 5 * * *"})
    await scheduler.take_up(from_file(a=HOURLY))
    row = await scheduler.row("a")
    assert (row["origin"], row["schedule"]["cron"], row["next_due_at"]) == (FILE, "0 * * * *", FIRST / 1000)


async def test_a_schedule_of_jobs_yaml_that_cannot_be_taken_stops_no_other(
    desk: Desk, scheduler: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    bad = {"cron": "0 * * * *", "job": {"kind": "nowhere"}}
    loop = SchedulerLoop(scheduler, from_file(a=bad, b=HOURLY))
    await loop.run_once()
    desk.clock.now = FIRST
    await loop.run_once()
    assert (loop.errors, loop.stats) == (0, {"jobs_submitted": 1})
    assert "schedule a of jobs.yaml is left out" in caplog.text


def test_jobs_yaml_has_a_section_for_them(tmp_path: Path) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text("kinds: {}\nschedules:\n  nightly:\n    cron: '0 3 * * *'\n    job: {command: [x]}\n")
    assert Kinds.load(path, {}).schedules["nightly"].cron == "0 3 * * *"
    path.write_text("kinds: {}\nschedules:\n  nightly:\n    cron: '0 3 * *'\n    job: {command: [x]}\n")
    with pytest.raises(InvalidInput, match=r"schedules\.nightly\.cron: must have five fields"):
        Kinds.load(path, {})


# -- the loop --------------------------------------------------------------------------------------------------------


async def test_loop_takes_the_file_up_once_a_term_and_runs_what_is_due(desk: Desk, scheduler: Scheduler) -> None:
    loop = SchedulerLoop(scheduler, from_file(a=HOURLY))
    await loop.run_once()
    assert [row["name"] for row in await scheduler.rows()] == ["a"]
    desk.clock.now = FIRST
    await loop.run_once()
    assert loop.stats == {"jobs_submitted": 1}
    desk.desk.end_term()
    await loop.run_once()
    assert loop.errors == 0, "who does not lead does nothing"
    await desk.desk.begin_term()
    desk.apply(c.DropSchedule(desk.clock.now, "a", FILE))
    await loop.run_once()
    assert [row["name"] for row in await scheduler.rows()] == ["a"], "a new term reads the file again"


def test_body_is_kept_as_its_author_wrote_it() -> None:
    schedule = Schedule.model_validate({**HOURLY, "cron": "0  *   * * *"})
    assert json.loads(json.dumps(schedule.model_dump(mode="json", exclude_unset=True))) == HOURLY
