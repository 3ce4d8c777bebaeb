"""What only the store in memory can do: stage writes, lose them, and tear the last."""

from __future__ import annotations

import pytest

from p2p.effects import HardState
from p2p.ids import DiskId, Index, Term
from p2p.storage import CorruptLog, DiskFull
from p2p.storage.memory import MemoryLog, PowerCut
from tests.conformance.stores import NODE, VOTER, append, config_entry, entries, entry, load, voters


def staged() -> MemoryLog:
    """Three durable entries of term 1, and on their way: 4 and 5, a vote, 4 to 6 anew, the floor."""
    log = MemoryLog(NODE, new_disk=lambda: DiskId("d1"))
    load(log)
    append(log, 1, 3, floor=2)
    log.stage(entries(4, 5), None, Index(2))
    log.stage((), HardState(Term(2), VOTER), Index(3))
    log.stage(entries(4, 6, 2), None, Index(3), Index(4))
    log.stage((entry(7, 2),), HardState(Term(3), None), Index(6))
    return log


AFTER = {
    0: ([*entries(1, 3)], HardState(Term(1), VOTER), 2),
    1: ([*entries(1, 5)], HardState(Term(1), VOTER), 2),
    2: ([*entries(1, 5)], HardState(Term(2), VOTER), 3),
    3: ([*entries(1, 3), *entries(4, 6, 2)], HardState(Term(2), VOTER), 3),
    4: ([*entries(1, 3), *entries(4, 7, 2)], HardState(Term(3), None), 6),
}


@pytest.mark.parametrize("keep", [0, 1, 2, 3, 4, None])
def test_a_crash_keeps_the_first_staged_writes_and_nothing_of_the_others(keep: int | None) -> None:
    log = staged()
    assert log.read(Index(1), Index(9)) == AFTER[4][0], "what is staged is read"
    log.crash(keep)
    loaded = load(log)
    want, state, floor = AFTER[4 if keep is None else keep]
    assert (log.read(Index(1), Index(9)), loaded.hard_state, loaded.acked_floor) == (want, state, floor)
    assert (loaded.last, loaded.torn) == (len(want), 0)


def test_what_is_synced_survives_a_crash_that_keeps_nothing() -> None:
    log = staged()
    log.sync()
    log.crash(0)
    assert load(log).last == 7


@pytest.mark.parametrize(("keep", "last", "term", "floor"), [(0, 3, 1, 2), (1, 4, 1, 2), (2, 5, 1, 2), (3, 5, 2, 3)])
def test_the_last_write_of_a_crash_may_be_torn(keep: int, last: int, term: int, floor: int) -> None:
    log = staged()
    log.crash(keep, torn=True)
    loaded = load(log)
    assert (loaded.last, loaded.hard_state.term, loaded.acked_floor) == (last, term, floor)
    assert loaded.torn == (keep in (1, 3))


def test_a_torn_truncation_has_forgotten_the_old_entries_and_not_raised_the_floor() -> None:
    log = MemoryLog(NODE)
    load(log)
    append(log, 1, 5, floor=1)
    log.stage(entries(3, 4, 2), HardState(Term(2), None), Index(4), Index(3))
    log.crash(torn=True)
    loaded = load(log)
    assert (loaded.last, loaded.acked_floor, loaded.torn, loaded.hard_state.term) == (3, 1, 1, 2)
    assert loaded.runs == ((1, 1), (3, 2))


@pytest.mark.parametrize("tear", [False, True])
def test_the_power_may_go_in_the_middle_of_an_append(tear: bool) -> None:
    for reached in range(4):
        log = MemoryLog(NODE)
        load(log)
        append(log, 1, 5, floor=2)
        log.cut_next_append, log.tear = reached, tear
        with pytest.raises(PowerCut):
            log.append(entries(4, 6, 2), HardState(Term(2), None), Index(3), Index(4))
        loaded = load(log)
        assert (loaded.last, loaded.acked_floor) == (3 + max(reached - tear, 0), 2)
        append(log, loaded.last + 1, 9, term=3)
        assert load(log).last == 9


def test_a_failing_disk_fails_until_it_is_mended_and_writes_nothing() -> None:
    log = staged()
    log.fail_next_append = OSError(5, "Input/output error")
    for write in (log.append, log.stage):
        with pytest.raises(OSError, match="Input/output"):
            write((entry(8, 3),), None, Index(7))
    log.fail_next_append, log.full = None, True
    for write in (log.append, log.stage):
        with pytest.raises(DiskFull):
            write((entry(8, 3),), None, Index(7))
    with pytest.raises(DiskFull):
        log.compact(Index(2))
    log.full = False
    log.append((entry(8, 3),), None, Index(7))
    log.crash(0)
    assert (load(log).last, load(log).acked_floor) == (8, 7)


def test_a_compaction_comes_after_what_was_staged_before_it() -> None:
    log = staged()
    log.compact(Index(5))
    log.crash(0)
    loaded = load(log)
    assert (loaded.base, loaded.base_term, loaded.last) == (5, 2, 7)


def test_a_start_comes_after_a_crash() -> None:
    with pytest.raises(AssertionError, match="crash"):
        load(staged())


def test_a_copy_goes_its_own_way() -> None:
    disks = iter(["d1", "d2"])
    log = MemoryLog(NODE, new_disk=lambda: DiskId(next(disks)))
    load(log)
    log.append((entry(1), config_entry(2, voters("n1@d1"))), HardState(Term(1), VOTER), Index(1))
    twin = log.copy().reopened(NODE, adopt=True)
    assert load(twin).identity.disk == "d2"
    append(twin, 3, 4)
    append(log, 3, 3, term=2)
    assert (load(log).last, load(log).identity.disk, load(log).configs) == (3, "d1", load(twin).configs)
    log.flip(Index(1))
    with pytest.raises(CorruptLog):
        load(log)
    assert load(twin).last == 4
