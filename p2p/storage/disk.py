"""``raft.db``: the journal on a real disk, in SQLite with one fsync a batch (PROTOCOL §2.21, §2.22).

Exactly one connection, one thread, autocheckpoint off, checkpoints on that same connection, no mmap. A write torn by
a power cut is first of all SQLite's to detect (its write-ahead log has checksums of its own and drops the torn tail);
our checksums and chain detect what it cannot: a flipped bit, a lost write, a file put together from two backups; and
`wal` tells a write-ahead log that was torn from one that was damaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import apsw

from p2p.effects import Entry, HardState
from p2p.ids import ClusterId, DiskId, Index, NodeId, Term
from p2p.storage import (
    CHAIN_BYTES,
    COMPACT_SLICE,
    NOTHING_CHANGED,
    CorruptLog,
    Identity,
    Loaded,
    StorageError,
    WrongStore,
    chain,
    checksum,
    judge,
    wal,
)
from p2p.storage.identity import new_cluster_id, new_disk_id

FORMAT = 1
CHECKPOINT_PAGES = 4_000  # 16 MiB of write-ahead log
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE log (idx INTEGER PRIMARY KEY, term INTEGER NOT NULL, crc INTEGER NOT NULL, chain BLOB NOT NULL,
                  body BLOB NOT NULL);
"""


class DiskLog:
    """One voter's log and hard state in the file at `path`; created on first use for `node`."""

    def __init__(self, path: Path, node: NodeId) -> None:
        """Raises WrongStore if the file belongs to another node, CorruptLog if it is damaged."""
        self._path = path
        self._pages, self._checkpoint_at = 0, CHECKPOINT_PAGES
        self._chain = bytes(CHAIN_BYTES)
        fresh = not path.exists()
        with _translated(path):
            self._db = apsw.Connection(str(path))
            self._run = self._db.execute
            # What is refused must stay as it is: SQLite would fold the write-ahead log in when the connection ends.
            self._db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            try:
                self._open(node)
                self._db.set_wal_hook(self._count_pages)
            except BaseException:
                self._db.close(True)
                raise
        if fresh:
            _sync_directory(path.parent)

    def _open(self, node: NodeId) -> None:
        self._db.set_busy_timeout(1_000)
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "wal_autocheckpoint=0",
            "mmap_size=0",
            "cache_size=-4000",
        ):
            self._run(f"PRAGMA {pragma}").fetchall()
        empty = not self._run("SELECT 1 FROM sqlite_master").fetchone()
        accepted, _ = self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
        why = wal.damaged(Path(f"{self._path}-wal"), max(accepted, 0))
        if why is None and self._run("PRAGMA quick_check(1)").fetchone() != ("ok",):
            why = "SQLite's own check of it fails"
        if why is not None:
            raise CorruptLog(f"{self._path}: {why}. {NOTHING_CHANGED}")
        if empty:
            self._create(node)
        self._state = {str(key): value for key, value in self._run("SELECT key, value FROM meta")}
        if self._state.pop("seal", None) != _seal(self._state):
            raise CorruptLog(f"{self._path}: its term and vote do not match their checksum. {NOTHING_CHANGED}")
        if self._state["format"] != FORMAT:
            raise WrongStore(f"{self._path} has journal format {self._state['format']}; this build reads {FORMAT}")
        theirs = self._state["node"]
        if theirs != node:
            raise WrongStore(
                f"{self._path} belongs to node {theirs!r}, not to {node!r}: one data directory holds one identity. "
                f"Start with --node-id {theirs} or another --data-dir"
            )

    def _create(self, node: NodeId) -> None:
        """The identity goes into the main file at once, so that it does not share the fate of the newest entries."""
        first = {
            "format": FORMAT, "cluster": new_cluster_id(), "node": node, "disk": new_disk_id(), "term": 0,
            "voted_for": None, "acked_floor": 0, "base": 0, "base_chain": bytes(CHAIN_BYTES),
        }  # fmt: skip
        with self._db:
            self._run(_SCHEMA)
            for item in (*first.items(), ("seal", _seal(first))):
                self._run("INSERT INTO meta VALUES (?, ?)", item)
        self._checkpoint()

    def _count_pages(self, _db: apsw.Connection, _name: str, pages: int) -> int:
        self._pages = pages
        return apsw.SQLITE_OK

    def _note(self, **changes: Any) -> None:
        """Within a transaction: changes the term, the vote, the floor or the base, sealed by a checksum."""
        self._state.update(changes)
        for key, value in (*changes.items(), ("seal", _seal(self._state))):
            self._run("UPDATE meta SET value = ? WHERE key = ?", (value, key))

    def load(self, *, applied: Index) -> Loaded:
        """See `p2p.storage.LogStore.load`."""
        with _translated(self._path):
            return self._load(applied)

    def _load(self, applied: Index) -> Loaded:
        meta = self._state
        base = int(meta["base"])
        floor = max(int(meta["acked_floor"]), applied)
        last_row = cast(Any, self._run("SELECT max(idx) FROM log").fetchone())[0]
        end = last_row if last_row is not None else base
        running, expected, torn = bytes(meta["base_chain"]), base + 1, 0
        for index, term, crc, link, body in self._run("SELECT idx, term, crc, chain, body FROM log ORDER BY idx"):
            entry = Entry(Index(expected), Term(_whole(term)), body if isinstance(body, bytes) else b"")
            link_now = chain(running, entry)
            sound = index == expected and entry.term == term and entry.body == body
            if not sound or checksum(entry) != crc or link_now != link:
                judge(expected, _whole(end), floor)
                torn = 1
                break
            running, expected = link_now, expected + 1
        last = expected - 1
        if floor > last:
            judge(last + 1, floor, floor)
        if torn:
            with self._db:
                self._run("DELETE FROM log WHERE idx > ?", (last,))
        self._chain = running
        self._checkpoint()  # what a crash left behind the last transaction must not be there at the next one
        voted = meta["voted_for"]
        return Loaded(
            identity=Identity(ClusterId(str(meta["cluster"])), NodeId(str(meta["node"])), DiskId(str(meta["disk"]))),
            hard_state=HardState(Term(int(meta["term"])), NodeId(str(voted)) if voted is not None else None),
            first=Index(base + 1),
            last=Index(last),
            acked_floor=Index(floor),
            torn=torn,
        )

    def append(self, entries: Sequence[Entry], hard_state: HardState | None, acked_floor: Index) -> None:
        """See `p2p.storage.LogStore.append`: one transaction, one fsync."""
        running = self._chain
        rows = []
        for entry in entries:
            running = chain(running, entry)
            rows.append((entry.index, entry.term, checksum(entry), running, entry.body))
        changes: dict[str, Any] = {}
        if hard_state is not None:
            changes |= {"term": hard_state.term, "voted_for": hard_state.voted_for}
        if acked_floor > self._state["acked_floor"]:
            changes["acked_floor"] = acked_floor
        run = self._run
        run("BEGIN IMMEDIATE")
        try:
            self._db.executemany("INSERT INTO log VALUES (?, ?, ?, ?, ?)", rows)
            if changes:
                self._note(**changes)
            run("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                run("ROLLBACK")
            raise
        self._chain = running
        if self._pages >= self._checkpoint_at:
            self._checkpoint()

    def read(self, first: Index, last: Index) -> list[Entry]:
        """See `p2p.storage.LogStore.read`."""
        rows = self._run("SELECT idx, term, body FROM log WHERE idx BETWEEN ? AND ? ORDER BY idx", (first, last))
        return [Entry(Index(cast(int, i)), Term(cast(int, t)), bytes(cast(bytes, b))) for i, t, b in rows]

    def compact(self, upto: Index) -> int:
        """See `p2p.storage.LogStore.compact`."""
        base = int(self._state["base"])
        end = min(base + COMPACT_SLICE, upto)
        if end <= base:
            return 0
        link = self._run("SELECT chain FROM log WHERE idx = ?", (end,)).fetchone()
        assert link is not None, f"compaction up to {end}, which is not in the log"
        with self._db:
            self._run("DELETE FROM log WHERE idx <= ?", (end,))
            self._note(base=end, base_chain=link[0])
        return upto - end

    def _checkpoint(self) -> None:
        try:
            self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except apsw.BusyError:  # somebody looks at the file with a tool of theirs: later, then
            self._checkpoint_at = self._pages + CHECKPOINT_PAGES
            return
        self._pages, self._checkpoint_at = 0, CHECKPOINT_PAGES

    def close(self) -> None:
        self._checkpoint()
        self._db.close()


# What says that the file cannot be used now, rather than that it is damaged.
_UNUSABLE = (
    apsw.BusyError,
    apsw.CantOpenError,
    apsw.FullError,
    apsw.IOError,
    apsw.LockedError,
    apsw.NoMemError,
    apsw.PermissionsError,
    apsw.ReadOnlyError,
)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """SQLite's complaints at a start as sentences for the person who starts."""
    try:
        yield
    except _UNUSABLE as error:
        raise StorageError(f"{path} cannot be used: {error}") from error
    except apsw.Error as error:
        raise CorruptLog(f"{path} is damaged: {error}. {NOTHING_CHANGED}") from error


def _whole(value: object) -> int:
    """The number in a column of numbers; damage can make it anything."""
    return value if isinstance(value, int) else 0


def _seal(meta: dict[str, Any]) -> int:
    return crc32(repr(sorted(meta.items())).encode())


def _sync_directory(path: Path) -> None:
    """A new file's name is durable only once its directory is."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
