"""A node that eats the queue is cordoned by the leader, once and with its reason; bad jobs and bad days cordon none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coordination import commands as c
from tests.unit.coordination.drive import T0
from tests.unit.coordination.office import Office

WHY = "5 different jobs in a row failed on it, and not on others"


@pytest.fixture
async def office(tmp_path: Path) -> AsyncIterator[Office]:
    """Six workers; on one of them two jobs have gone well."""
    office = Office(str(tmp_path / "state.db"))
    await office.desk.begin_term()
    office.hire("bad", "good", "n3", "n4", "n5", "n6")
    await office.run("good", "g1", "g2", ok=True)
    yield office
    office.close()


async def test_a_node_on_which_five_jobs_failed_is_cordoned_once_and_told_of(office: Office) -> None:
    await office.run("bad", *"abcd", ok=False)
    assert (office.desk.marks, office.told) == ({}, [])
    await office.run("bad", "e", ok=False)
    mark = office.desk.marks["bad"]
    assert (mark.cordoned, mark.draining, mark.reason) == (1, 0, f"by itself: {WHY}")
    assert office.desk.matching.barred == {"bad": "cordoned"}
    await office.run("bad", *"fghijk", ok=False)  # what it had still got
    await office.turn()
    assert office.told == [("bad", WHY)]
    assert [mark.since_ms for mark in office.reader.nodes()] == [mark.since_ms]


async def test_one_job_that_fails_five_times_is_its_own_fault(office: Office) -> None:
    await office.run("bad", *"aaaaaaaa", ok=False)
    assert office.desk.marks == {}


async def test_jobs_that_fail_everywhere_are_the_jobs_fault(office: Office) -> None:
    await office.run("n3", "x1", "x2", "x3", ok=False)
    await office.run("bad", *"abcde", ok=False)
    assert office.desk.marks == {}


async def test_a_success_in_between_begins_anew(office: Office) -> None:
    await office.run("bad", *"abcd", ok=False)
    await office.run("bad", "fine", ok=True)
    await office.run("bad", *"efgh", ok=False)
    assert office.desk.marks == {}
    await office.run("bad", "i", ok=False)
    assert set(office.desk.marks) == {"bad"}


async def test_never_more_than_a_third_of_the_nodes(office: Office) -> None:
    await office.run("good", *(f"g{n}" for n in range(3, 40)), ok=True)
    for node in ("n3", "n4", "n5"):
        for n in range(5):
            office.give(f"{node}-{n}", node)
            office.end(f"{node}-{n}", node, ok=False)
    await office.turn()
    assert set(office.desk.marks) == {"n3", "n4"}
    await office.run("n5", "n5-9", ok=False)
    assert set(office.desk.marks) == {"n3", "n4"}
    await office.desk.mark_node("n3", cordoned=False, reason="mended")
    await office.run("n5", "n5-10", ok=False)
    assert set(office.desk.marks) == {"n4", "n5"}


async def test_of_two_nodes_neither_is_cordoned(tmp_path: Path) -> None:
    office = Office(str(tmp_path / "state.db"))
    await office.desk.begin_term()
    office.hire("bad", "good")
    await office.run("good", "g1", "g2", ok=True)
    await office.run("bad", *"abcdefgh", ok=False)
    assert office.desk.marks == {}
    office.close()


async def test_who_uncordons_it_gives_it_another_chance(office: Office) -> None:
    await office.run("bad", *"abcde", ok=False)
    await office.desk.mark_node("bad", cordoned=False, reason="mended")
    assert office.told == [("bad", WHY), ("bad", "")], "the alert is over"
    await office.run("bad", *"fghi", ok=False)
    assert office.desk.marks == {}
    await office.run("bad", "j", ok=False)
    assert office.reason("bad") == f"by itself: {WHY}"
    assert office.told == [("bad", WHY), ("bad", ""), ("bad", WHY)]


async def test_what_an_operator_has_said_of_a_node_stays(office: Office) -> None:
    await office.desk.mark_node("bad", draining=True, reason="maintenance")
    await office.run("bad", *"abcdef", ok=False)
    mark = office.desk.marks["bad"]
    assert (mark.cordoned, mark.draining, mark.reason, office.told) == (0, 1, "maintenance", [])


@pytest.mark.parametrize(
    ("cause", "counts"),
    [
        ("exit", True),
        ("spawn_failed", True),
        ("timeout", False),
        ("preempted", False),
        ("drained", False),
        ("cuda_oom", False),  # its GPUs are small, which is no fault
        ("memory_limit", False),
    ],
)
async def test_only_ends_that_may_be_the_nodes_fault_count(office: Office, cause: str, counts: bool) -> None:
    await office.run("bad", *"abcdefg", ok=False, cause=cause)
    assert set(office.desk.marks) == ({"bad"} if counts else set())


async def test_jobs_that_were_cancelled_or_given_up_do_not_count(office: Office) -> None:
    for n in range(6):
        office.give(f"c{n}", "bad")
        office.apply(c.Cancel(T0, (f"c{n}",), "by hand"))
        office.give(f"l{n}", "bad")
        office.apply(c.Expire(T0, (c.Lapse(f"l{n}", 1, "lease_lapsed"),)))
        office.give(f"r{n}", "bad")
        office.apply(c.Release(T0, (f"r{n}",), "by hand", ""))
    await office.turn()
    assert office.desk.marks == {}


async def test_of_a_gang_the_node_of_the_member_that_failed_is_to_blame(office: Office) -> None:
    for n in range(5):
        office.submit(f"gang{n}", requires='{"cpus":1.0,"nodes":2}')
        office.give(f"gang{n}", "n3", "bad")
        office.end(f"gang{n}", "bad", ok=False)
        await office.turn()
    assert set(office.desk.marks) == {"bad"}
    record = office.reader.job("gang0")
    assert record is not None
    assert record["placement_hints"]["avoid"] == ["bad"], "and the next attempt keeps away from it"


async def test_a_new_leader_tells_of_it_too_and_the_old_one_no_longer(office: Office) -> None:
    await office.run("bad", *"abcde", ok=False)
    successor = office.successor()
    told: list[tuple[str, str]] = []
    successor.on_trouble = lambda node, why: told.append((node, why))
    office.desk.end_term()
    await successor.begin_term()
    assert told == [("bad", WHY)]
    assert office.told == [("bad", WHY), ("bad", "")]
    successor.end_term()


async def test_what_was_seen_in_an_earlier_term_does_not_count(office: Office) -> None:
    """Jobs may have gone well there meanwhile, under another leader."""
    for job in "abcde":
        office.give(job, "bad")
        office.end(job, "bad", ok=False)
    await asyncio.sleep(0)  # the fifth is heard of, and nothing is done about it yet
    office.desk.end_term()
    await office.desk.begin_term()
    office.hire("bad", "good", "n3")
    await office.run("good", "g3", ok=True)
    await office.run("bad", "f", ok=False)
    assert office.desk.marks == {}
