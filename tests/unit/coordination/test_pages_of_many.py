"""What a page of jobs costs, and what nobody may read on one."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from config.settings import HealthSettings
from coordination import commands as c
from coordination import dispatcher
from coordination.alerts import AlertBook
from coordination.clock import SystemClock
from coordination.daemon_manager import Supervisor
from coordination.dispatcher import Room
from coordination.errors import InvalidInput
from coordination.live import ROUTES, HttpBackend
from coordination.operations import Operations
from coordination.placement import Offer
from coordination.scheduler import Scheduler
from coordination.unified_queue_populator import Populator
from tests.unit.coordination.drive import T0, new_job
from tests.unit.coordination.test_new_leader import Desk


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(str(tmp_path / "state.db"))
    await desk.desk.begin_term()
    yield desk
    desk.reader.close()
    desk.state.close()


@pytest.fixture
def operations(desk: Desk) -> Operations:
    async def status() -> dict[str, Any]:
        return {}

    return Operations(
        desk.desk,
        Populator(desk.desk, enabled=False, totals={}),
        Supervisor(SystemClock(), desk.bus),
        AlertBook(desk.bus),
        HealthSettings(),
        status,
        Scheduler(desk.desk),
    )


async def test_a_page_of_equal_jobs_looks_at_the_nodes_once(
    desk: Desk, operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand jobs times a thousand nodes held up every other answer of the leader for seconds."""
    jobs = [new_job(f"j{n}", requires='{"cpus":8.0}') for n in range(50)] + [new_job("other", requires='{"cpus":9.0}')]
    desk.apply(c.Submit(T0, tuple(jobs), "", ""))
    small = Offer(node="w", cpus=1)
    desk.desk.make_room(Room(small, small, 1))
    await desk.desk.claim("w", wait_seconds=0)
    looks = []
    tally = dispatcher.tally

    def count(*args: Any, **more: Any) -> Any:
        looks.append(args)
        return tally(*args, **more)

    monkeypatch.setattr(dispatcher, "tally", count)
    page = await operations.jobs(filters={}, limit=100, before=None)
    assert len(page["jobs"]) == 51
    assert all("even when idle" in job["why_pending"] for job in page["jobs"])
    assert len(looks) == 4  # idle and as they are now, for each of two kinds of job


async def test_why_a_job_waits_leaves_no_trace_in_what_nodes_remember(desk: Desk, operations: Operations) -> None:
    desk.apply(c.Submit(T0, (new_job("j", requires='{"cpus":8.0}'),), "", ""))
    small = Offer(node="w", cpus=1)
    desk.desk.make_room(Room(small, small, 1))
    await desk.desk.claim("w", wait_seconds=0)
    await operations.job("j")
    node = desk.desk.matching.planner.fleet.nodes["w"]
    known = len(node._admitted)
    for _ in range(20):
        await operations.job("j")
    assert len(node._admitted) == known


async def test_the_credentials_of_a_recurring_job_are_not_shown(desk: Desk, operations: Operations) -> None:
    job = {"command": ["true"], "env": {"API_KEY": "hunter2", "MODE": "fast"}}
    told = [
        await operations.put_schedule(name="s", cron="* * * * *", job=job),
        await operations.schedule("s"),
        (await operations.schedules())["schedules"][0],
    ]
    assert [row["schedule"]["job"]["env"] for row in told] == [{"API_KEY": "***", "MODE": "fast"}] * 3


async def test_a_schedule_may_not_be_given_what_python_calls_self(operations: Operations) -> None:
    with pytest.raises(InvalidInput) as error:
        await operations.put_schedule(**{"name": "s", "cron": "* * * * *", "job": {"command": ["true"]}, "self": 1})
    assert error.value.field == "self"


def test_every_name_in_a_path_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def exchange(self: Any, method: str, path: str, body: Any, headers: Any) -> tuple[int, Any]:
        asked.append((method, path))
        return 200, {}

    monkeypatch.setattr(HttpBackend, "_exchange", exchange)
    for operation, (_, path) in ROUTES.items():
        names = re.findall(r"\{(\w+)\}", path)
        HttpBackend("http://localhost:1", None).call(operation, **dict.fromkeys(names, "a/b"))
    assert not [path for _, path in asked if "{" in path or "?" in path]
