"""The journal thread: what shares an fsync, what never does, and a disk that is full for a while."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from p2p import writer as module
from p2p.effects import Entry, HardState, Persist
from p2p.ids import Index, NodeId, Term, VoterId
from p2p.storage import DiskFull
from p2p.storage.memory import MemoryLog
from p2p.writer import Writer
from tests.unit.p2p.driving import SECONDS, Gate


class Store(MemoryLog):
    """Writes down each append: (indexes, hard state's term, floor, truncate)."""

    def __init__(self) -> None:
        super().__init__(NodeId("n1"))
        self.gate = Gate()
        self.appends: list[tuple[list[int], int | None, int, int | None]] = []
        self.full = threading.Event()
        self.refused = threading.Semaphore(0)
        self.broken: Exception | None = None
        self.closed = False
        self.left = [0]

    def append(
        self,
        entries: Sequence[Entry],
        hard_state: HardState | None,
        acked_floor: Index,
        truncate: Index | None = None,
    ) -> None:
        self.gate.passing()
        if self.broken is not None:
            raise self.broken
        if self.full.is_set():
            self.refused.release()
            raise DiskFull("no space left on device")
        self.appends.append(
            ([entry.index for entry in entries], hard_state.term if hard_state else None, acked_floor, truncate)
        )

    def compact(self, upto: Index) -> int:
        return self.left.pop(0)

    def close(self) -> None:
        self.closed = True


class Rig:
    def __init__(self) -> None:
        self.store = Store()
        self.written: list[int] = []
        self.compacted: list[int] = []
        self.fatal: list[str] = []
        self.died = threading.Event()
        self.writer = Writer(self.store, written=self.written.append, compacted=self.compacted.append, fatal=self._died)

    def _died(self, why: str) -> None:
        self.fatal.append(why)
        self.died.set()

    def all_done(self) -> None:
        """Everything asked for before this has been done."""
        done = threading.Event()
        self.writer.do(lambda store: done.set())
        assert done.wait(SECONDS)

    def held_back(self, *writes: Persist) -> None:
        """All of these wait while another is being written."""
        self.store.gate.shut()
        self.writer.persist(persist(1, 1))
        self.store.gate.arrived()
        for write in writes:
            self.writer.persist(write)
        self.store.gate.open()
        self.all_done()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    rig.writer.start()
    yield rig
    rig.store.full.clear()
    rig.store.gate.open()
    rig.writer.stop()


def persist(seq: int, *indexes: int, term: int | None = None, floor: int = 0, truncate: int | None = None) -> Persist:
    hard = HardState(Term(term), VoterId("n1@d")) if term is not None else None
    entries = tuple(Entry(Index(index), Term(1), b"x") for index in indexes)
    return Persist(seq, entries, hard, Index(floor), Index(truncate) if truncate is not None else None)


def test_writes_that_wait_share_one_fsync_and_are_told_once(rig: Rig) -> None:
    rig.held_back(persist(2, 2), persist(3, 3, 4, term=7), persist(4, floor=3), persist(5, 5))
    assert rig.store.appends == [([1], None, 0, None), ([2, 3, 4, 5], 7, 3, None)]
    assert rig.written == [1, 5]
    assert rig.writer.floor == 3


def test_the_newest_term_and_the_highest_floor_of_a_group_count(rig: Rig) -> None:
    rig.held_back(persist(2, term=7, floor=5), persist(3, term=8, floor=4))
    assert rig.store.appends[1:] == [([], 8, 5, None)]


def test_a_write_that_cuts_off_begins_a_group_and_joins_none(rig: Rig) -> None:
    rig.held_back(persist(2, 2), persist(3, 2, truncate=2), persist(4, 3))
    assert rig.store.appends[1:] == [([2], None, 0, None), ([2, 3], None, 0, 2)]
    assert rig.written == [1, 2, 4]


def test_a_job_is_done_between_the_writes_around_it(rig: Rig) -> None:
    seen: list[int] = []
    rig.store.gate.shut()
    rig.writer.persist(persist(1, 1))
    rig.store.gate.arrived()
    rig.writer.persist(persist(2, 2))
    rig.writer.do(lambda store: seen.append(len(rig.store.appends)))
    rig.writer.persist(persist(3, 3))
    rig.store.gate.open()
    rig.all_done()
    assert seen == [2]
    assert [indexes for indexes, *_ in rig.store.appends] == [[1], [2], [3]]


@pytest.mark.parametrize(("name", "limit"), [("MERGED_ENTRIES", 2), ("MERGED_BYTES", 2)])
def test_a_group_has_a_limit(rig: Rig, monkeypatch: pytest.MonkeyPatch, name: str, limit: int) -> None:
    monkeypatch.setattr(module, name, limit)
    rig.held_back(*(persist(n, n) for n in range(2, 6)))
    assert [indexes for indexes, *_ in rig.store.appends] == [[1], [2, 3], [4, 5]]


def test_what_changes_nothing_is_not_written_but_told(rig: Rig) -> None:
    rig.writer.persist(persist(1))
    rig.writer.persist(persist(0, floor=0))
    rig.all_done()
    assert (rig.store.appends, rig.written) == ([], [1])


def test_compaction_goes_in_slices_behind_writes(rig: Rig) -> None:
    rig.store.left = [20, 10, 0]
    rig.writer.compact(Index(50))
    rig.writer.compact(Index(40))  # less than was asked for already
    rig.all_done()
    while len(rig.compacted) < 3:
        rig.all_done()
    assert rig.compacted == [30, 40, 50]


def test_a_full_disk_acknowledges_nothing_and_goes_on_when_there_is_room(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "FULL_SECONDS", 0.001)
    rig.store.full.set()
    with caplog.at_level(logging.WARNING, "p2p.writer"):
        rig.writer.persist(persist(1, 1))
        for _ in range(3):
            assert rig.store.refused.acquire(timeout=SECONDS)
        assert (rig.writer.trouble, rig.written) == ("its disk is full", [])
        rig.store.full.clear()
        rig.all_done()
    assert (rig.writer.trouble, rig.written) == (None, [1])
    assert [record.levelname for record in caplog.records] == ["CRITICAL", "WARNING"]  # told once each


def test_a_stop_on_a_full_disk_ends_and_writes_nothing_behind_the_gap(rig: Rig) -> None:
    """Room that comes in that moment must not take the second write without the first."""
    rig.store.full.set()
    rig.writer.persist(persist(1, 1))
    assert rig.store.refused.acquire(timeout=SECONDS)
    rig.writer.do(lambda store: rig.store.full.clear())
    rig.writer.persist(persist(2, 2))
    rig.writer.stop()
    assert (rig.store.appends, rig.written, rig.fatal) == ([], [], [])
    assert rig.store.closed


def test_a_stop_does_what_was_asked_for_and_closes(rig: Rig) -> None:
    rig.held_back(persist(2, 2))
    rig.writer.persist(persist(3, 3))
    rig.writer.stop()
    assert rig.written[-1] == 3
    assert rig.store.closed


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), AssertionError("hole")])
def test_any_other_failure_is_fatal_and_nothing_more_is_written(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig()
    rig.writer.start()
    rig.store.broken = error
    with caplog.at_level(logging.CRITICAL + 1, "p2p.writer"):
        rig.writer.persist(persist(1, 1))
        assert rig.died.wait(SECONDS)
    rig.store.broken = None
    rig.writer.persist(persist(2, 2))
    rig.writer.stop()
    assert (rig.written, rig.store.appends) == ([], [])
    assert rig.fatal[0].startswith("journal: ")


def test_a_job_that_fails_is_fatal(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.writer.start()

    def fails(store: Any) -> None:
        raise OSError("gone")

    with caplog.at_level(logging.CRITICAL + 1, "p2p.writer"):
        rig.writer.do(fails)
        assert rig.died.wait(SECONDS)
    rig.writer.stop()
