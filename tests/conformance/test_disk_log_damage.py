"""The journal's file under power cuts and bad disks: copies of a real ``raft.db`` are cut, torn and flipped.

A power cut may take any part of the write that was under way, and nothing that was synced before. A bad disk may change
any byte. After the first every acknowledged entry is there; after the second it is there or the start is refused.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from p2p.effects import Entry, HardState
from p2p.ids import Index, NodeId, Term
from p2p.storage import CorruptLog, DiskFull, StorageError, disk
from p2p.storage.disk import DiskLog
from tests.conformance.stores import NODE, VOTER, append, entries, entry, load, voters

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


def acked_log(folder: Path, seed: int = 0, floor: int | None = None) -> tuple[DiskLog, list[Entry]]:
    """A log of several appends of several sizes, still open, and what was acknowledged in it."""
    rng = random.Random(seed)
    folder.mkdir()
    log = DiskLog(folder / "raft.db", NODE)
    load(log)
    acked: list[Entry] = []
    for _ in range(rng.randint(3, 12)):
        batch = tuple(entry(len(acked) + 1 + n, body=rng.randbytes(rng.choice([0, 30, 300, 9_000]))) for n in range(4))
        log.append(batch, HardState(Term(1), VOTER), Index(len(acked) if floor is None else floor))
        acked.extend(batch)
    return log, acked


def opened(folder: Path) -> tuple[DiskLog, list[Entry], int]:
    log = DiskLog(folder / "raft.db", NODE, check_copy=False)
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
        again.append((entry(len(kept) + 1, 2),), HardState(Term(2), VOTER), Index(len(kept)))
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


@pytest.mark.parametrize("truncate", [3, 6])
def test_a_power_cut_at_any_sector_of_a_truncation_leaves_the_old_log_or_the_new_one(
    tmp_path: Path, truncate: int
) -> None:
    log, acked = acked_log(tmp_path / "data", floor=2)
    before = wal_of(tmp_path / "data").stat().st_size
    batch = tuple(entry(truncate + n, 2, bytes([n]) * 5_000) for n in range(4))
    log.append(batch, HardState(Term(2), None), Index(2), Index(truncate))
    whole = wal_of(tmp_path / "data").stat().st_size
    found = set()
    for at in [*range(before, whole, SECTOR), whole]:
        folder = copy(tmp_path / "data", tmp_path / "cut")
        os.truncate(wal_of(folder), at)
        again, kept, floor = opened(folder)
        new = kept == [*acked[: truncate - 1], *batch]
        assert new or kept == acked, f"cut at byte {at} of {whole}"
        assert (again._state["term"], floor) == (2 if new else 1, 2)
        again.close()
        found.add(new)
    assert found == {True, False}


def test_a_power_cut_at_any_sector_of_a_reset_leaves_the_old_log_or_the_new_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, acked = acked_log(tmp_path / "data")
    before = wal_of(tmp_path / "data").stat().st_size
    monkeypatch.setattr(log, "_checkpoint", lambda: False)
    log.reset(Index(1_000), Term(7), b"c" * 16, voters("n1@d1"))
    whole = wal_of(tmp_path / "data").stat().st_size
    found = set()
    for at in [*range(before, whole, SECTOR), whole]:
        folder = copy(tmp_path / "data", tmp_path / "cut")
        os.truncate(wal_of(folder), at)
        again, kept, floor = opened(folder)
        new = floor == 1_000
        assert kept == ([] if new else acked), f"cut at byte {at} of {whole}"
        assert again.chain_at(Index(1_000)) == (b"c" * 16 if new else None)
        again.close()
        found.add(new)
    assert found == {True, False}


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
            log = DiskLog(folder / "raft.db", NODE, check_copy=False)
            try:
                loaded = log.load(applied=Index(0))
                assert loaded.hard_state == HardState(Term(1), VOTER), f"seed {seed}, {where}"
                kept = log.read(loaded.first, loaded.last)
                assert kept == acked, f"seed {seed}, {where}: {len(kept)} of {len(acked)} entries"
            finally:
                log.close()
        except StorageError as error:  # a bit of the header makes the file one that may only be read
            assert ("Nothing was changed" if isinstance(error, CorruptLog) else "cannot be used") in str(error)
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
        "UPDATE meta SET value = 2 WHERE key = 'base_term'",
        "UPDATE meta SET value = 'a@b;' WHERE key = 'base_config'",
        "UPDATE meta SET value = 'c2' WHERE key = 'cluster'",
        "UPDATE meta SET value = '7' WHERE key = 'inode'",
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
        log.append((*entries(3, 3), *entries(2, 2)), HardState(Term(9), None), Index(2))
    log.append(entries(3, 3), None, Index(2))
    assert load(log).hard_state == HardState(Term(1), VOTER)
    assert opened(copy(tmp_path, tmp_path.parent / "copy"))[1] == [*entries(1, 3)]


# -- no room ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a failed test may have left it open


def fill(folder: Path, leave: int) -> Path:
    """A file that takes all the room but `leave` bytes."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        file.truncate(file.tell() - leave)
    return ballast


@pytest.mark.parametrize("leave", [0, 4_096, 16_384, 65_536])
def test_a_disk_without_room_takes_all_of_a_batch_or_nothing_and_says_so(small_disk: Path, leave: int) -> None:
    log = DiskLog(small_disk / "raft.db", NODE)
    load(log)
    append(log, 1, 3, floor=3)
    ballast = fill(small_disk, leave)
    acked, refused = [*entries(1, 3)], 0
    for n in range(30):
        batch = [entry(len(acked) + 1 + k, body=bytes([n]) * 3_000) for k in range(n % 4 + 1)]
        try:
            log.append(batch, HardState(Term(1), VOTER), Index(len(acked)))
            acked += batch
        except DiskFull as error:
            assert "no room" in str(error)
            refused += 1
        assert log.read(Index(1), Index(999)) == acked
    assert refused > 5
    folder = small_disk.parent / "crashed"
    again, kept, _ = opened(copy(small_disk, folder))
    assert kept == acked
    again.close()
    ballast.unlink()
    append(log, len(acked) + 1, len(acked) + 5)
    acked += entries(len(acked) + 1, len(acked) + 5)
    assert opened(copy(small_disk, folder))[1] == acked
    log.close()
    assert opened(small_disk)[1] == acked


def test_closing_on_a_full_disk_loses_nothing(small_disk: Path) -> None:
    log = DiskLog(small_disk / "raft.db", NODE)
    load(log)
    append(log, 1, 200, floor=3)
    ballast = fill(small_disk, 0)
    log.close()
    with pytest.raises(DiskFull, match="cannot be used"):
        opened(small_disk)
    ballast.unlink()
    assert opened(small_disk)[1] == [*entries(1, 200)]


def test_a_torn_write_some_time_after_one_without_room_is_not_taken_for_damage(small_disk: Path) -> None:
    """What had been written of that one before the room ended must not lie behind the torn one's."""
    log = DiskLog(small_disk / "raft.db", NODE)
    load(log)
    append(log, 1, 3)
    ballast = fill(small_disk, 200_000)
    with pytest.raises(DiskFull):
        log.append([entry(4, body=b"x" * 400_000)], None, Index(3))
    ballast.unlink()
    append(log, 4, 4)
    at = wal_of(small_disk).stat().st_size if log._pages == 0 else 32 + log._pages * (24 + 4_096)
    log.append([entry(5, body=b"y" * 20_000)], None, Index(4))
    folder = copy(small_disk, small_disk.parent / "crashed")
    torn = bytearray(wal_of(folder).read_bytes())
    torn[at + 100] ^= 0xFF
    wal_of(folder).write_bytes(torn)
    again, kept, _ = opened(folder)
    assert kept == [*entries(1, 4)]
    again.close()
    log.close()


@pytest.mark.parametrize(
    ("code", "system", "full"),
    [
        (apsw.SQLITE_FULL, 0, True),
        (apsw.SQLITE_IOERR_WRITE, errno.EIO, False),
        (apsw.SQLITE_IOERR_WRITE, errno.EDQUOT, True),
        (apsw.SQLITE_IOERR_SHMSIZE, errno.ENOSPC, True),
        (apsw.SQLITE_IOERR_FSYNC, errno.ENOSPC, False),
        (apsw.SQLITE_IOERR_DIR_FSYNC, errno.ENOSPC, False),
        (apsw.SQLITE_CORRUPT, errno.ENOSPC, False),
    ],
)
def test_want_of_room_is_told_from_a_failing_disk_and_a_failed_fsync_is_never_it(
    code: int, system: int, full: bool
) -> None:
    assert disk._is_full(apsw.exception_for(code), system) is full
