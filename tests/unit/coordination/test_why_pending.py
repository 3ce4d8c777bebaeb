"""Why a job waits, as its nodes come, fall silent and are marked. The words for requirements are in `test_reasons`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.coordination.office import Office
from tests.unit.coordination.test_new_leader import LEASE


@pytest.fixture
async def office(tmp_path: Path) -> AsyncIterator[Office]:
    """A job that waits, and nobody to run it."""
    office = Office(str(tmp_path / "state.db"))
    await office.desk.begin_term()
    office.submit("a")
    yield office
    office.close()


def why(office: Office, job: str = "a") -> str:
    record = office.reader.job(job, history=False)
    assert record is not None
    return office.desk.why_pending(record, ahead=0)


async def looked_round(office: Office) -> None:
    """Until every worker's room has been taken up."""
    await office.turn()
    async with asyncio.timeout(5):
        while set(office.desk.matching.planner.fleet.nodes) != set(office.desk.rooms) - set(office.desk.marks):
            await asyncio.sleep(0)


async def test_nobody_is_called_silent_who_has_just_come(office: Office) -> None:
    assert why(office) == "no worker has asked for work yet"
    office.hire("w")
    assert why(office) == "no worker has asked for work yet", "it has room, which nobody has looked at"
    await looked_round(office)
    assert why(office).startswith("fits now; what goes first is placed first; first in line")


async def test_who_was_not_heard_of_for_a_lease_is_silent(office: Office) -> None:
    office.hire("w", "v")
    await looked_round(office)
    await office.turn(LEASE)
    assert why(office).startswith("fits now")
    await office.turn(1)
    assert why(office) == "all 2 known workers have been silent for longer than a lease: restart them"
    office.hire("w")
    assert "silent" not in why(office)


async def test_nodes_that_get_nothing_new_are_told_of(office: Office) -> None:
    office.hire("v", "w", cpus=0.5)
    await office.desk.mark_node("w", cordoned=True, reason="x")
    await looked_round(office)
    assert why(office) == (
        "fits on none of 1 node, even when idle: needs 1 cores; the largest node has 0.5 on v; "
        "1 node is cordoned or draining"
    )
    await office.desk.mark_node("v", draining=True, reason="x")
    await looked_round(office)
    assert why(office) == "every node that asks for work is cordoned or draining: v, w"


async def test_who_does_not_lead_does_not_know(office: Office) -> None:
    office.desk.end_term()
    assert why(office) == "placement is the leader's business; nobody is known to lead now"
