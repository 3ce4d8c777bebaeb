"""What opening ``raft.db`` makes of a file of an older format, and of one that is not where it was made."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any
from zlib import crc32

import apsw
import pytest

from p2p.effects import Config, HardState
from p2p.ids import ClusterId, Index, Term
from p2p.storage import CopiedStore, CorruptLog, WrongStore, identity
from p2p.storage.disk import DiskLog
from p2p.storage.identity import Place, place_of
from tests.conformance.stores import NODE, VOTER, append, config_entry, entries, entry, load, voters

SELF = f"n1@{'d' * 32}"
SCHEMA_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE log (idx INTEGER PRIMARY KEY, term INTEGER NOT NULL, crc INTEGER NOT NULL, chain BLOB NOT NULL,
                  body BLOB NOT NULL);
"""


def format_1(path: Path, last: int = 6, base: int = 0, floor: int = 4, voted: str | None = "n1") -> None:
    """A file as the build before wrote it, sums and all."""
    db = apsw.Connection(str(path))
    db.execute("PRAGMA journal_mode = WAL").fetchall()
    with db:
        db.execute(SCHEMA_1)
        running, base_chain = bytes(16), bytes(16)
        for n in range(1, last + 1):
            term, body = 1 + n // 4, b"body %d" % n
            running = hashlib.sha256(running + b"%d:%d:" % (n, term) + body).digest()[:16]
            if n <= base:
                base_chain = running
                continue
            crc = crc32(body, crc32(b"%d:%d" % (n, term)))
            db.execute("INSERT INTO log VALUES (?, ?, ?, ?, ?)", (n, term, crc, running, body))
        meta: dict[str, Any] = {
            "format": 1, "cluster": "c1", "node": "n1", "disk": "d" * 32, "term": 5, "voted_for": voted,
            "acked_floor": floor, "base": base, "base_chain": base_chain,
        }  # fmt: skip
        for item in (*meta.items(), ("seal", crc32(repr(sorted(meta.items())).encode()))):
            db.execute("INSERT INTO meta VALUES (?, ?)", item)
    db.close()


def kept(base: int, last: int = 6) -> list[Any]:
    return [entry(n, 1 + n // 4) for n in range(base + 1, last + 1)]


@pytest.mark.parametrize(("base", "voted"), [(0, "n1"), (0, None), (2, "n1"), (5, "n1"), (6, None)])
def test_a_store_of_format_1_goes_on_as_the_only_voter_of_its_cluster(
    tmp_path: Path, base: int, voted: str | None
) -> None:
    format_1(tmp_path / "raft.db", base=base, voted=voted)
    for _ in range(2):
        log = DiskLog(tmp_path / "raft.db", NODE)
        loaded = load(log)
        assert (loaded.identity.cluster, loaded.identity.voter) == ("c1", SELF)
        assert loaded.hard_state == HardState(Term(5), SELF if voted else None)
        assert (loaded.first, loaded.last, loaded.acked_floor, loaded.torn) == (base + 1, 6, 4, 0)
        assert (loaded.base, loaded.base_term, loaded.base_config) == (base, 0, voters(SELF))
        assert log.read(Index(1), Index(9)) == kept(base)
        assert log.term_at(Index(base)) == (0 if base == 0 else None)
        log.close()
    log = DiskLog(tmp_path / "raft.db", NODE)
    load(log)
    log.append((config_entry(7, voters(SELF, "n2@x"), 6), entry(8, 6)), None, Index(6))
    log.close()
    log = DiskLog(tmp_path / "raft.db", NODE)
    assert load(log).configs == ((7, voters(SELF, "n2@x")),)
    assert log.read(Index(1), Index(9)) == [*kept(base), config_entry(7, voters(SELF, "n2@x"), 6), entry(8, 6)]
    log.compact(Index(8))
    assert (load(log).base_term, load(log).base_config) == (6, voters(SELF, "n2@x"))


def test_a_migrated_store_is_looked_for_where_it_was_migrated(tmp_path: Path) -> None:
    format_1(tmp_path / "raft.db")
    log = DiskLog(tmp_path / "raft.db", NODE)
    load(log)
    log.close()
    shutil.copyfile(tmp_path / "raft.db", tmp_path / "copy.db")
    with pytest.raises(CopiedStore):
        DiskLog(tmp_path / "copy.db", NODE)


def test_a_torn_end_of_format_1_is_cut_off_with_the_migration(tmp_path: Path) -> None:
    format_1(tmp_path / "raft.db")
    db = apsw.Connection(str(tmp_path / "raft.db"))
    db.execute("UPDATE log SET body = x'00' WHERE idx = 6")
    db.close()
    log = DiskLog(tmp_path / "raft.db", NODE)
    loaded = load(log)
    assert (loaded.torn, loaded.last) == (1, 5)
    log.close()
    assert load(DiskLog(tmp_path / "raft.db", NODE)).last == 5


def test_a_damaged_store_of_format_1_is_refused_and_stays_of_format_1(tmp_path: Path) -> None:
    format_1(tmp_path / "raft.db")
    db = apsw.Connection(str(tmp_path / "raft.db"))
    db.execute("UPDATE log SET body = x'00' WHERE idx = 3")
    db.close()
    before = (tmp_path / "raft.db").read_bytes()
    log = DiskLog(tmp_path / "raft.db", NODE)
    with pytest.raises(CorruptLog, match="Nothing was changed"):
        load(log)
    log.close()
    assert (tmp_path / "raft.db").read_bytes() == before


def test_a_power_cut_at_any_sector_of_the_migration_leaves_a_store_of_either_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    format_1(tmp_path / "data/raft.db", base=2)
    log = DiskLog(tmp_path / "data/raft.db", NODE)

    def cut() -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(log, "_checkpoint", cut)
    with pytest.raises(KeyboardInterrupt):
        load(log)
    whole = (tmp_path / "data/raft.db-wal").stat().st_size
    formats = set()
    for at in [*range(0, whole, 512), whole]:
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        shutil.copytree(tmp_path / "data", tmp_path / "cut")
        (tmp_path / "cut/raft.db-shm").unlink()
        os.truncate(tmp_path / "cut/raft.db-wal", at)
        again = DiskLog(tmp_path / "cut/raft.db", NODE, check_copy=False)
        formats.add(again._state["format"])
        loaded = load(again)
        assert (loaded.identity.voter, loaded.base_config, loaded.last) == (SELF, voters(SELF), 6)
        assert again.read(Index(1), Index(9)) == kept(2)
        again.close()
    assert formats == {1, 2}


def test_a_store_of_format_1_can_be_reset_before_it_is_loaded(tmp_path: Path) -> None:
    format_1(tmp_path / "raft.db")
    log = DiskLog(tmp_path / "raft.db", NODE)
    log.reset(Index(9), Term(7), b"c" * 16, voters("n2@x"))
    append(log, 10, 11, term=8)
    log.close()
    loaded = load(DiskLog(tmp_path / "raft.db", NODE), applied=9)
    assert (loaded.base, loaded.last, loaded.base_config) == (9, 11, voters("n2@x"))


def test_a_format_of_the_future_is_refused(tmp_path: Path) -> None:
    log = DiskLog(tmp_path / "raft.db", NODE)
    load(log)
    with log._transaction() as changes:
        changes["format"] = 3
    log.close()
    with pytest.raises(WrongStore, match=r"format 3; this build reads 2"):
        DiskLog(tmp_path / "raft.db", NODE)


@pytest.mark.parametrize("column", ["kind = 1", "kind = 'x'", "term = 1.5", "term = 9", "crc = 0", "chain = 'x'"])
def test_a_changed_column_of_an_entry_is_refused(tmp_path: Path, column: str) -> None:
    log = DiskLog(tmp_path / "raft.db", NODE)
    load(log)
    append(log, 1, 3)
    log.close()
    db = apsw.Connection(str(tmp_path / "raft.db"))
    db.execute(f"UPDATE log SET {column} WHERE idx = 2")
    db.close()
    with pytest.raises(CorruptLog):
        load(DiskLog(tmp_path / "raft.db", NODE))


# -- copies ----------------------------------------------------------------------------------------------------------

MADE = Place("m1", "8:1", "77")
PLACES = {
    "the same": (MADE, False, False),
    "another machine id: a container was made anew": (MADE._replace(machine="m2"), False, True),
    "no machine id": (MADE._replace(machine=""), False, False),
    "another inode: a restored backup": (MADE._replace(inode="78"), True, False),
    "another device: a cloned image": (MADE._replace(device="8:2"), True, False),
    "another machine's copy": (Place("m2", "8:2", "78"), True, True),
    "a device that has another number after each mount": (MADE._replace(device="0:51"), False, False),
    "a copy on such a device": (MADE._replace(device="0:51", inode="78"), True, False),
}


@pytest.mark.parametrize(("now", "copied", "moved"), PLACES.values(), ids=PLACES)
def test_a_copy_is_told_by_its_inode_and_device_and_a_move_by_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: Place, copied: bool, moved: bool
) -> None:
    monkeypatch.setattr("p2p.storage.disk.place_of", lambda path: MADE)
    log = DiskLog(tmp_path / "raft.db", NODE)
    first = load(log)
    assert not first.moved
    append(log, 1, 3, floor=3)
    log.close()
    before = (tmp_path / "raft.db").read_bytes()
    monkeypatch.setattr("p2p.storage.disk.place_of", lambda path: now)
    if copied:
        with pytest.raises(CopiedStore, match="--adopt"):
            DiskLog(tmp_path / "raft.db", NODE)
        assert (tmp_path / "raft.db").read_bytes() == before
        return
    for _ in range(2):
        log = DiskLog(tmp_path / "raft.db", NODE)
        loaded = load(log)
        assert (loaded.identity, loaded.moved, loaded.last) == (first.identity, moved, 3)
        log.close()


def test_a_numbers_place_that_does_not_fit_into_sqlites_integers_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2p.storage.disk.place_of", lambda path: MADE._replace(inode=str(2**64 - 1)))
    for _ in range(2):
        log = DiskLog(tmp_path / "raft.db", NODE)
        load(log)
        log.close()


def test_where_a_file_lies_is_read_from_the_file_and_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.touch()
    monkeypatch.setattr(identity, "MACHINE_ID", tmp_path / "machine-id")
    found = path.stat()
    assert place_of(path) == Place("", f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}", str(found.st_ino))
    (tmp_path / "machine-id").write_bytes(b"0123abc\n")
    assert place_of(path).machine == "0123abc"
    (tmp_path / "machine-id").write_bytes(b"\xff")
    assert place_of(path).machine == ""
    path.rename(tmp_path / "renamed")
    assert not place_of(tmp_path / "renamed").is_copy_of(place_of(tmp_path / "renamed"))
    shutil.copyfile(tmp_path / "renamed", path)
    assert place_of(path).is_copy_of(place_of(tmp_path / "renamed"))


def test_an_adopted_identity_is_in_the_main_file_before_it_is_told(tmp_path: Path) -> None:
    """Not in the newest transaction of the write-ahead log: damage there passes for a torn write, and the copy would
    vote as the original again."""
    log = DiskLog(tmp_path / "raft.db", NODE)
    load(log)
    log.found(ClusterId("c1"), Config())
    append(log, 1, 3)
    log.close()
    shutil.copyfile(tmp_path / "raft.db", tmp_path / "copy.db")
    log = DiskLog(tmp_path / "copy.db", NODE, adopt=True)
    adopted = load(log).identity
    assert (tmp_path / "copy.db-wal").stat().st_size == 0
    log._db.close(True)
    Path(tmp_path / "copy.db-wal").unlink(missing_ok=True)
    Path(tmp_path / "copy.db-shm").unlink(missing_ok=True)
    log = DiskLog(tmp_path / "copy.db", NODE)
    loaded = load(log)
    assert loaded.identity == adopted
    assert loaded.identity.cluster == "c1"
    assert log.read(Index(1), Index(3)) == [*entries(1, 3)]


@pytest.mark.parametrize("how", ["found", "join", "reset"])
def test_a_new_cluster_or_base_is_in_the_main_file_before_it_is_told(tmp_path: Path, how: str) -> None:
    log = DiskLog(tmp_path / "raft.db", NODE)
    load(log)
    log.append((), HardState(Term(2), VOTER), Index(0))
    if how == "found":
        log.found(ClusterId("c1"), voters(SELF))
    elif how == "join":
        log.join(ClusterId("c1"))
    else:
        log.reset(Index(5), Term(1), b"c" * 16, voters(SELF))
    assert (tmp_path / "raft.db-wal").stat().st_size == 0
    log.close()
