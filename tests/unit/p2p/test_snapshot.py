"""Copies of the queue: consistent while it is written, checked before use, two kept, and the log let go behind them."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from coordination import commands as c
from coordination.queue_state import QueueState
from p2p.driver import Driver
from p2p.ids import Index
from p2p.journal import snapshot
from p2p.replica import Replica
from p2p.storage.memory import MemoryLog
from tests.nodes import wait_until
from tests.simulation.workload import Workload, dump, dump_file, new_job, replayed
from tests.unit.p2p.driving import NODE, SECONDS

Entries = list[tuple[int, int, bytes]]


def filled(path: Path, upto: int, seed: int = 0) -> tuple[QueueState, Entries, Workload]:
    """A queue file with so many random entries applied."""
    state, work, entries = QueueState(str(path)), Workload(random.Random(seed)), []
    while state.applied_index < upto:
        entries.append((state.applied_index + 1, 1, c.encode(work.next(state))))
        state.apply_batch(entries[-1:])
    return state, entries, work


# -- take and restore -------------------------------------------------------------------------------------------------


def test_a_snapshot_holds_the_state_at_its_index(tmp_path: Path) -> None:
    state, entries, _ = filled(tmp_path / "state.db", 60)
    made = snapshot.take(tmp_path / "state.db", tmp_path / "snapshots")
    assert (made.at_index, made.term, made.path.name) == (60, 1, "state-60-1.db")
    state.apply_batch([(61, 1, c.encode(c.Submit(2_000_000_000_000, (new_job("late"),), "", "")))])
    state.close()
    assert snapshot.restore(tmp_path / "snapshots", tmp_path / "other.db") == made
    restored = QueueState(str(tmp_path / "other.db"))
    assert restored.applied_index == 60
    assert dump(restored._db) == replayed(entries)
    restored.close()


def test_a_snapshot_is_consistent_while_the_queue_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "PAGES_A_STEP", 1)
    state, entries, work = filled(tmp_path / "state.db", 100)
    made: list[snapshot.Snapshot] = []

    def take() -> None:
        for _ in range(5):
            made.append(snapshot.take(tmp_path / "state.db", tmp_path / "snapshots"))

    thread = threading.Thread(target=take)
    thread.start()
    while thread.is_alive():
        entries.append((state.applied_index + 1, 1, c.encode(work.next(state))))
        state.apply_batch(entries[-1:])
        if state.applied_index % 50 == 0:
            state.checkpoint()
    thread.join()
    state.close()
    assert made[-1].at_index > 100
    for kept in snapshot.listed(tmp_path / "snapshots"):
        assert dump_file(kept.path) == replayed(entries[: kept.at_index])


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    state, _, work = filled(tmp_path / "state.db", 5)
    for upto in (5, 6, 7, 8):
        while state.applied_index < upto:
            state.apply_batch([(state.applied_index + 1, 1, c.encode(work.next(state)))])
        snapshot.take(tmp_path / "state.db", tmp_path / "snapshots")
    state.close()
    assert [kept.at_index for kept in snapshot.listed(tmp_path / "snapshots")] == [8, 7]
    assert len(list((tmp_path / "snapshots").iterdir())) == 4


def two_snapshots(tmp_path: Path) -> tuple[snapshot.Snapshot, snapshot.Snapshot]:
    state, _, work = filled(tmp_path / "state.db", 20)
    older = snapshot.take(tmp_path / "state.db", tmp_path / "snapshots")
    for index in range(21, 31):
        state.apply_batch([(index, 1, c.encode(work.next(state)))])
    newer = snapshot.take(tmp_path / "state.db", tmp_path / "snapshots")
    state.close()
    return older, newer


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5_000])


def flip(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 4
    path.write_bytes(body)


def spoil_hash(path: Path) -> None:
    path.with_suffix(".sha256").write_bytes(b"\xff\xfe nonsense")


def lose_hash(path: Path) -> None:
    path.with_suffix(".sha256").unlink()


@pytest.mark.parametrize("damage", [truncate, flip, spoil_hash, lose_hash, Path.unlink])
def test_a_damaged_newest_snapshot_falls_back_to_the_older(tmp_path: Path, damage: Any) -> None:
    older, newer = two_snapshots(tmp_path)
    damage(newer.path)
    assert snapshot.restore(tmp_path / "snapshots", tmp_path / "state.db") == older
    restored = QueueState(str(tmp_path / "state.db"))
    assert restored.applied_index == older.at_index
    restored.close()


def test_two_damaged_snapshots_restore_nothing_and_touch_nothing(tmp_path: Path) -> None:
    for made in two_snapshots(tmp_path):
        flip(made.path)
    before = (tmp_path / "state.db").read_bytes()
    assert snapshot.restore(tmp_path / "snapshots", tmp_path / "state.db") is None
    assert (tmp_path / "state.db").read_bytes() == before


def test_a_damaged_database_with_a_good_hash_is_not_restored(tmp_path: Path) -> None:
    older, newer = two_snapshots(tmp_path)
    body = bytearray(newer.path.read_bytes())
    body[4096:8192] = b"\xaa" * 4096
    newer.path.write_bytes(body)
    newer.path.with_suffix(".sha256").write_text(snapshot._sha256(newer.path))
    assert snapshot.restore(tmp_path / "snapshots", tmp_path / "state.db") == older


def test_a_restore_leaves_no_write_ahead_log_of_the_old_state(tmp_path: Path) -> None:
    two_snapshots(tmp_path)
    state, _, _ = filled(tmp_path / "broken.db", 10, seed=5)
    state._db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    state._db.close(True)
    assert (tmp_path / "broken.db-wal").stat().st_size
    snapshot.restore(tmp_path / "snapshots", tmp_path / "broken.db")
    restored = QueueState(str(tmp_path / "broken.db"))
    assert restored.applied_index == 30
    restored.close()


def test_no_snapshots_restore_nothing(tmp_path: Path) -> None:
    assert snapshot.listed(tmp_path / "none") == []
    assert snapshot.restore(tmp_path / "none", tmp_path / "state.db") is None


def test_leftovers_of_a_snapshot_cut_short_do_no_harm(tmp_path: Path) -> None:
    state, entries, _ = filled(tmp_path / "state.db", 12)
    folder = tmp_path / "snapshots"
    folder.mkdir()
    for side in ("", "-journal", "-wal", "-shm"):
        (folder / f"unfinished.db{side}").write_bytes(b"half a page" * 400)
    (folder / "state-99-1.db").write_bytes(b"no hash beside it")
    made = snapshot.take(tmp_path / "state.db", folder)
    state.close()
    assert [s.path for s in snapshot.listed(folder)] == [made.path]
    assert dump_file(made.path) == replayed(entries)


def test_a_snapshot_gives_up_when_told_to(tmp_path: Path) -> None:
    state, _, _ = filled(tmp_path / "state.db", 10)
    with pytest.raises(snapshot.GivenUp):
        snapshot.take(tmp_path / "state.db", tmp_path / "snapshots", give_up=lambda: True)
    state.close()
    assert snapshot.listed(tmp_path / "snapshots") == []


# -- the driver's part ----------------------------------------------------------------------------------------------


class Journal:
    """A driver over a real queue file, with small thresholds."""

    def __init__(self, folder: Path, log: MemoryLog | None = None) -> None:
        self.path, self.snapshots = folder / "state.db", folder / "snapshots"
        self.state = QueueState(str(self.path))
        self.log = log or MemoryLog(NODE)
        self.fatal: list[str] = []
        loaded = self.log.load(applied=Index(self.state.applied_index))
        replica = Replica(NODE, loaded.hard_state, last=loaded.last, applied=Index(self.state.applied_index))
        self.driver = Driver(
            replica,
            self.log,
            self.state,
            on_events=lambda events: None,
            state_path=self.path,
            snapshots=self.snapshots,
            snapshot_entries=20,
            snapshot_bytes=1 << 30,
            on_fatal=self.fatal.append,
        )
        self.driver.start().result(SECONDS)

    def submit(self, first: int, last: int) -> None:
        for n in range(first, last + 1):
            body = c.encode(c.Submit(1_700_000_000_000 + n, (new_job(f"job{n}"),), f"key{n}", ""))
            self.driver.propose(body).result(SECONDS)

    def listed(self) -> list[int]:
        return [made.at_index for made in snapshot.listed(self.snapshots)]


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    monkeypatch.setattr("p2p.driver.TRAILING_ENTRIES", 5)
    monkeypatch.setattr("p2p.driver.SNAPSHOT_RETRY_SECONDS", 0.0)
    made = Journal(tmp_path)
    yield made
    made.driver.stop()
    assert not made.fatal


def test_a_grown_log_is_snapshotted_and_compacted_but_never_beyond_the_older_snapshot(journal: Journal) -> None:
    journal.submit(1, 25)
    wait_until(lambda: len(journal.listed()) == 1)
    assert journal.log.base == 0, "one snapshot alone may turn out to be damaged"
    journal.submit(26, 60)
    wait_until(lambda: len(journal.listed()) == 2 and journal.log.base > 0)
    numbers = itertools.count(61)

    def compacted_further() -> bool:
        # Whether the log has grown enough is looked at with each entry, and not while a snapshot is being made.
        n = next(numbers)
        journal.submit(n, n)
        return journal.log.base > 40

    wait_until(compacted_further)
    for _ in range(20):
        newest, older = journal.listed()[:2]
        assert journal.log.base <= older < newest


def test_the_state_can_be_rebuilt_from_either_snapshot_and_the_log(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.submit(1, 120)
    wait_until(lambda: len(journal.listed()) == 2 and journal.log.base > 0)
    journal.submit(121, 125)
    journal.driver.stop()
    whole = dump_file(journal.path)
    del whole["meta"]
    for made in snapshot.listed(journal.snapshots):
        folder = tmp_path / made.path.stem
        folder.mkdir()
        (folder / "state.db").write_bytes(made.path.read_bytes())
        again = Journal(folder, journal.log)
        again.driver.stop()
        rebuilt = dump_file(folder / "state.db")
        del rebuilt["meta"]  # one term more
        assert rebuilt == whole


def test_a_failed_snapshot_is_tried_again_and_the_log_is_kept_meanwhile(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []
    real = snapshot.take

    def failing(*arguments: Any, **more: Any) -> snapshot.Snapshot:
        tries.append(journal.log.base)
        if len(tries) < 4:
            raise OSError(28, "No space left on device")
        return real(*arguments, **more)

    monkeypatch.setattr(snapshot, "take", failing)
    n = 0
    while len(tries) < 4:
        n += 1
        journal.submit(n, n)
        assert n < 2_000
    wait_until(lambda: len(journal.listed()) == 1)
    assert tries == [0, 0, 0, 0]
    assert "snapshot failed" in caplog.text


def test_a_stop_does_not_wait_for_a_long_snapshot(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()
    real = snapshot.take

    def slow(*arguments: Any, give_up: Any) -> snapshot.Snapshot:
        begun.set()
        wait_until(give_up)
        return real(*arguments, give_up=give_up)

    monkeypatch.setattr(snapshot, "take", slow)
    journal.submit(1, 25)
    assert begun.wait(SECONDS)
    journal.driver.stop()
    assert journal.listed() == []


def test_a_reader_that_holds_on_delays_a_checkpoint_and_nothing_else(journal: Journal) -> None:
    """A checkpoint cannot pass an open read: a snapshot of a large queue once ended the process here."""
    journal.submit(1, 3)
    reader = apsw.Connection(str(journal.path), flags=apsw.SQLITE_OPEN_READONLY)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM jobs").fetchall()
    durable = journal.driver.query(journal.state.checkpoint).result(SECONDS)
    journal.submit(4, 6)
    assert journal.driver.query(journal.state.checkpoint).result(SECONDS) == durable < journal.state.applied_index
    journal.driver.stop()
    reader.close()
    assert not journal.fatal
