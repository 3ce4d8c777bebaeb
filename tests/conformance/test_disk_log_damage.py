"""The journal's file under power cuts and bad disks: copies of a real ``raft.db`` are cut, torn and flipped.

A power cut may take any part of the write that was under way, and nothing that was synced before. A bad disk may change
any byte. After the first every acknowledged entry is there; after the second it is there or the start is refused.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import apsw
import pytest

from p2p.effects import Entry, HardState
from p2p.ids import Index, NodeId, Term
from p2p.storage import CorruptLog, StorageError
from p2p.storage.disk import DiskLog
from tests.conformance.stores import NODE, append, entries, entry, load

SECTOR = 512
ROUNDS = int(os.environ.get("P2P_CAMPAIGN", "0")) or 300


def copy(source: Path, target: Path) -> Path:
    """What is on the disk now, as a crash would leave it."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    (target / "raft.db-shm").unlink(missing_ok=True)  # memory, not disk
    return target


def wal_of(folder: Path) -> Path:
    return folder / "raft.db-wal"


def acked_log(folder: Path, seed: int = 0) -> tuple[DiskLog, list[Entry]]:
    """A log of several appends of several sizes, still open, and what was acknowledged in it."""
    rng = random.Random(seed)
    folder.mkdir()
    log = DiskLog(folder / "raft.db", NODE)
    load(log)
    acked: list[Entry] = []
    for _ in range(rng.randint(3, 12)):
        batch = tuple(entry(len(acked) + 1 + n, body=rng.randbytes(rng.choice([0, 30, 300, 9_000]))) for n in range(4))
        log.append(batch, HardState(Term(1), NODE), Index(len(acked)))
        acked.extend(batch)
    return log, acked


def opened(folder: Path) -> tuple[DiskLog, list[Entry], int]:
    log = DiskLog(folder / "raft.db", NODE)
    loaded = load(log)
    return log, log.read(loaded.first, loaded.last), loaded.acked_floor


@pytest.mark.parametrize("last_bytes", [10, 3_000, 40_000], ids=["one page", "a few pages", "many pages"])
def test_a_power_cut_at_any_sector_of_the_last_append_loses_only_that_append(tmp_path: Path, last_bytes: int) -> None:
    log, acked = acked_log(tmp_path / "data")
    before = wal_of(tmp_path / "data").stat().st_size
    last = entry(len(acked) + 1, body=b"x" * last_bytes)
    log.append((last,), None, Index(len(acked)))
    whole = wal_of(tmp_path / "data").stat().st_size
    assert whole > before
    cuts = [*range(before, whole, SECTOR), whole]
    found = set()
    for at in cuts:
        folder = copy(tmp_path / "data", tmp_path / "cut")
        os.truncate(wal_of(folder), at)
        again, kept, _ = opened(folder)
        assert kept in (acked, [*acked, last]), f"cut at byte {at} of {whole}"
        found.add(len(kept))
        again.append((entry(len(kept) + 1, 2),), HardState(Term(2), NODE), Index(len(kept)))
        again.close()
        assert opened(folder)[1] == [*kept, entry(len(kept) + 1, 2)], f"cut at byte {at} of {whole}"
    assert found == {len(acked), len(acked) + 1}


def test_a_power_cut_that_lost_any_of_the_last_appends_sectors_loses_only_that_append(tmp_path: Path) -> None:
    """Disks write in the order they like: any subset of the unsynced sectors may be what they held before."""
    log, acked = acked_log(tmp_path / "data")
    before = wal_of(tmp_path / "data").stat().st_size
    batch = tuple(entry(len(acked) + 1 + n, body=bytes([n]) * 5_000) for n in range(8))
    log.append(batch, None, Index(len(acked)))
    whole = wal_of(tmp_path / "data").read_bytes()
    sectors = list(range(before, len(whole), SECTOR))
    for seed in range(150):
        rng = random.Random(seed)
        torn = bytearray(whole)
        for at in rng.sample(sectors, rng.randint(1, len(sectors))):
            torn[at : at + SECTOR] = bytes(len(torn[at : at + SECTOR]))
        folder = copy(tmp_path / "data", tmp_path / "cut")
        wal_of(folder).write_bytes(torn)
        kept = opened(folder)[1]
        assert kept in (acked, [*acked, *batch]), f"seed {seed}"


def test_leftovers_of_two_crashes_are_not_taken_for_damage(tmp_path: Path) -> None:
    log, acked = acked_log(tmp_path / "data")
    folder = tmp_path / "data"
    for crash in range(4):
        size = wal_of(folder).stat().st_size
        batch = tuple(entry(len(acked) + 1 + n, 1, bytes([n]) * 6_000) for n in range(12 - 3 * crash))
        log.append(batch, None, Index(len(acked)))
        torn = bytearray(wal_of(folder).read_bytes())
        torn[size + 100] ^= 0xFF  # the first frame of the write is lost, the rest of it is there
        folder = copy(folder, tmp_path / f"crash{crash}")
        wal_of(folder).write_bytes(torn)
        log, kept, _ = opened(folder)
        assert kept == acked
        more = entry(len(acked) + 1, 1, b"after crash %d" % crash)
        log.append((more,), None, Index(len(acked)))
        acked.append(more)


def flipped(folder: Path, name: str, rng: random.Random) -> str:
    path = folder / name
    body = bytearray(path.read_bytes())
    at, bit = rng.randrange(len(body)), rng.randrange(8)
    body[at] ^= 1 << bit
    path.write_bytes(body)
    return f"{name} byte {at} bit {bit}"


def check_flips(original: Path, acked: list[Entry], name: str, scratch: Path) -> tuple[int, int]:
    """(loads that gave everything, refusals); anything else fails."""
    whole = refused = 0
    for seed in range(ROUNDS):
        folder = copy(original, scratch)
        where = flipped(folder, name, random.Random(seed))
        sides = {path.name: path.read_bytes() for path in folder.iterdir()}
        try:
            log = DiskLog(folder / "raft.db", NODE)
            try:
                loaded = log.load(applied=Index(0))
                assert loaded.hard_state == HardState(Term(1), NODE), f"seed {seed}, {where}"
                kept = log.read(loaded.first, loaded.last)
                assert kept == acked, f"seed {seed}, {where}: {len(kept)} of {len(acked)} entries"
            finally:
                log.close()
        except CorruptLog as error:
            assert "Nothing was changed" in str(error)
            for path, content in sides.items():
                assert (folder / path).read_bytes() == content, f"seed {seed}, {where}: {path} was changed"
            refused += 1
        else:
            whole += 1
    return whole, refused


def test_a_flipped_bit_in_the_write_ahead_log_is_harmless_or_refused(tmp_path: Path) -> None:
    """At rest the newest transaction is the floor's own, so that no entry is in the one that could pass for torn."""
    log, acked = acked_log(tmp_path / "data")
    log.append((), None, Index(len(acked)))
    _, refused = check_flips(tmp_path / "data", acked, "raft.db-wal", tmp_path / "flip")
    assert refused > ROUNDS // 2


def test_a_flipped_bit_in_the_main_file_is_harmless_or_refused(tmp_path: Path) -> None:
    log, acked = acked_log(tmp_path / "data", seed=1)
    log.append((), None, Index(len(acked)))
    log.close()
    whole, refused = check_flips(tmp_path / "data", acked, "raft.db", tmp_path / "flip")
    assert whole and refused


def test_a_page_that_forgot_its_last_row_is_refused(tmp_path: Path) -> None:
    """The rows that are left would all be sound, and the newest entries of all are above the floor."""
    log, acked = acked_log(tmp_path / "data")
    log.close()
    body = (tmp_path / "data/raft.db").read_bytes()
    refused = 0
    for at in range(4096, len(body), 4096):
        if body[at] not in (0x02, 0x05, 0x0A, 0x0D) or (rows := int.from_bytes(body[at + 3 : at + 5], "big")) == 0:
            continue
        folder = copy(tmp_path / "data", tmp_path / "flip")
        (folder / "raft.db").write_bytes(body[: at + 3] + (rows - 1).to_bytes(2, "big") + body[at + 5 :])
        try:
            assert opened(folder)[1] == acked, f"the page at {at}"
        except CorruptLog:
            refused += 1
    assert refused


def test_a_write_ahead_log_damaged_before_its_last_transaction_is_refused(tmp_path: Path) -> None:
    """SQLite alone would drop the synced transactions behind the damage without a word."""
    _, acked = acked_log(tmp_path / "data")
    folder = copy(tmp_path / "data", tmp_path / "flip")
    body = bytearray(wal_of(folder).read_bytes())
    body[32 + 24 + 100] ^= 1
    wal_of(folder).write_bytes(body)
    with pytest.raises(CorruptLog, match="damaged before its last transaction"):
        DiskLog(folder / "raft.db", NODE)
    plain = apsw.Connection(str(folder / "raft.db"))
    assert plain.execute("SELECT count(*) FROM log").fetchone() != (len(acked),)
    plain.close()


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE meta SET value = 0 WHERE key = 'term'",
        "UPDATE meta SET value = NULL WHERE key = 'voted_for'",
        "UPDATE meta SET value = 1 WHERE key = 'acked_floor'",
        "UPDATE meta SET value = 2 WHERE key = 'base'",
        "DELETE FROM meta WHERE key = 'voted_for'",
        "DROP TABLE log",
        "DROP TABLE meta",
        "UPDATE log SET body = NULL WHERE idx = 1",
    ],
)
def test_a_changed_term_vote_floor_base_or_table_is_refused(tmp_path: Path, sql: str) -> None:
    log, _ = acked_log(tmp_path / "data")
    log.close()
    connection = apsw.Connection(str(tmp_path / "data/raft.db"))
    if sql.startswith("UPDATE log"):
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET sql = replace(sql, 'NOT NULL', '') WHERE name = 'log'")
        connection.close()
        connection = apsw.Connection(str(tmp_path / "data/raft.db"))
    connection.execute(sql)
    connection.close()
    with pytest.raises(CorruptLog):
        load(DiskLog(tmp_path / "data/raft.db", NODE))


@pytest.mark.parametrize("body", [b"not a database at all, but long enough" * 20, b"SQLite format 3\0" + bytes(4_080)])
def test_a_file_that_is_no_journal_is_refused_with_a_sentence(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "raft.db").write_bytes(body)
    with pytest.raises(StorageError, match=r"raft\.db"):
        load(DiskLog(tmp_path / "raft.db", NODE))
    assert (tmp_path / "raft.db").read_bytes() == body


def test_an_unreadable_place_is_refused_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "raft.db").mkdir()
    with pytest.raises(StorageError, match="cannot be used"):
        DiskLog(tmp_path / "raft.db", NODE)


def test_somebody_reading_the_file_does_not_stop_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, acked = acked_log(tmp_path / "data")
    reader = apsw.Connection(str(tmp_path / "data/raft.db"), flags=apsw.SQLITE_OPEN_READONLY)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM log").fetchall()
    monkeypatch.setattr(log, "_checkpoint_at", 1)
    append(log, len(acked) + 1, len(acked) + 1)
    log.close()
    reader.close()
    assert opened(tmp_path / "data")[1] == [*acked, entry(len(acked) + 1)]


def test_checkpoints_keep_the_write_ahead_log_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2p.storage.disk.CHECKPOINT_PAGES", 50)
    log = DiskLog(tmp_path / "raft.db", NODE)
    load(log)
    largest = 0
    for n in range(0, 400, 4):
        log.append(tuple(entry(n + k, body=b"y" * 1_000) for k in range(1, 5)), None, Index(n))
        largest = max(largest, wal_of(tmp_path).stat().st_size)
    assert largest < 100 * 4_200
    assert opened(copy(tmp_path, tmp_path.parent / "copy"))[1] == log.read(Index(1), Index(400))


def test_an_append_that_fails_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    log = DiskLog(tmp_path / "raft.db", NodeId("n1"))
    load(log)
    append(log, 1, 2)
    with pytest.raises(apsw.ConstraintError):
        log.append((*entries(3, 3), *entries(2, 2)), None, Index(0))
    log.append(entries(3, 3), None, Index(2))
    assert opened(copy(tmp_path, tmp_path.parent / "copy"))[1] == [*entries(1, 3)]
