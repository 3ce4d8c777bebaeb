"""``raft.db``: the journal on a real disk, in SQLite with one fsync a batch (PROTOCOL §2.21, §2.22).

Exactly one connection, one thread, autocheckpoint off, checkpoints on that same connection, no mmap. A write torn by
a power cut is first of all SQLite's to detect (its write-ahead log has checksums of its own and drops the torn tail);
our checksum and chain detect what it cannot: a flipped bit, a lost write, a file put together from two backups.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import apsw

from p2p.effects import Entry, HardState
from p2p.ids import ClusterId, DiskId, Index, NodeId, Term, new_cluster_id, new_disk_id
from p2p.storage import CHAIN_BYTES, Identity, Loaded, WrongStore, chain, checksum, judge

FORMAT = 1
CHECKPOINT_PAGES = 4_000  # 16 MiB of write-ahead log
COMPACT_SLICE = 2_000
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE log (idx INTEGER PRIMARY KEY, term INTEGER NOT NULL, crc INTEGER NOT NULL, chain BLOB NOT NULL,
                  body BLOB NOT NULL);
"""


class DiskLog:
    """One voter's log and hard state in the file at `path`; created on first use for `node`."""

    def __init__(self, path: Path, node: NodeId) -> None:
        """Raises WrongStore if the file belongs to another node."""
        self._path = path
        fresh = not path.exists()
        self._db = apsw.Connection(str(path))
        self._db.set_busy_timeout(5_000)
        self._pages = 0
        self._run = self._db.execute
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "wal_autocheckpoint=0",
            "mmap_size=0",
            "cache_size=-4000",
        ):
            self._run(f"PRAGMA {pragma}").fetchall()
        if not self._run("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            with self._db:
                self._run(_SCHEMA)
                first = {
                    "format": FORMAT, "cluster": new_cluster_id(), "node": node, "disk": new_disk_id(), "term": 0,
                    "voted_for": None, "acked_floor": 0, "base": 0, "base_chain": bytes(CHAIN_BYTES),
                }  # fmt: skip
                for item in first.items():
                    self._run("INSERT INTO meta VALUES (?, ?)", item)
        if fresh:
            _sync_directory(path.parent)
        meta = self._meta()
        if meta["format"] != FORMAT:
            raise WrongStore(f"{path} has journal format {meta['format']}; this build reads {FORMAT}")
        if meta["node"] != node:
            raise WrongStore(
                f"{path} belongs to node {meta['node']!r}, not to {node!r}: one data directory holds one identity. "
                f"Start with --node-id {meta['node']} or another --data-dir"
            )
        self._chain = bytes(CHAIN_BYTES)
        self._db.set_wal_hook(self._count_pages)

    def _count_pages(self, _db: apsw.Connection, _name: str, pages: int) -> int:
        self._pages = pages
        return apsw.SQLITE_OK

    def _meta(self) -> dict[str, Any]:
        return {str(key): value for key, value in self._run("SELECT key, value FROM meta")}

    def load(self, *, applied: Index) -> Loaded:
        """See `p2p.storage.LogStore.load`."""
        meta = self._meta()
        base = int(meta["base"])
        floor = max(int(meta["acked_floor"]), applied)
        last_row = cast(Any, self._run("SELECT max(idx) FROM log").fetchone())[0]
        end = last_row if last_row is not None else base
        running, expected, torn = bytes(meta["base_chain"]), base + 1, 0
        for index, term, crc, link, body in self._run("SELECT idx, term, crc, chain, body FROM log ORDER BY idx"):
            entry = Entry(Index(cast(int, index)), Term(cast(int, term)), bytes(cast(bytes, body)))
            link_now = chain(running, entry)
            if index != expected or checksum(entry) != crc or link_now != link:
                judge(expected, int(end), floor)
                torn = 1
                break
            running, expected = link_now, expected + 1
        last = expected - 1
        if torn:
            with self._db:
                self._run("DELETE FROM log WHERE idx > ?", (last,))
        if floor > last:
            judge(last + 1, floor, floor)
        self._chain = running
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
        run = self._run
        run("BEGIN IMMEDIATE")
        try:
            self._db.executemany("INSERT INTO log VALUES (?, ?, ?, ?, ?)", rows)
            if hard_state is not None:
                run("UPDATE meta SET value = ? WHERE key = 'term'", (hard_state.term,))
                run("UPDATE meta SET value = ? WHERE key = 'voted_for'", (hard_state.voted_for,))
            run("UPDATE meta SET value = ? WHERE key = 'acked_floor' AND value < ?", (acked_floor, acked_floor))
            run("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                run("ROLLBACK")
            raise
        self._chain = running
        if self._pages >= CHECKPOINT_PAGES:
            self._checkpoint()

    def read(self, first: Index, last: Index) -> list[Entry]:
        """See `p2p.storage.LogStore.read`."""
        rows = self._run("SELECT idx, term, body FROM log WHERE idx BETWEEN ? AND ? ORDER BY idx", (first, last))
        return [Entry(Index(cast(int, i)), Term(cast(int, t)), bytes(cast(bytes, b))) for i, t, b in rows]

    def compact(self, upto: Index) -> int:
        """See `p2p.storage.LogStore.compact`."""
        base = int(self._meta()["base"])
        end = min(base + COMPACT_SLICE, upto)
        if end <= base:
            return 0
        link = self._run("SELECT chain FROM log WHERE idx = ?", (end,)).fetchone()
        assert link is not None, f"compaction up to {end}, which is not in the log"
        with self._db:
            self._run("DELETE FROM log WHERE idx <= ?", (end,))
            self._run("UPDATE meta SET value = ? WHERE key = 'base'", (end,))
            self._run("UPDATE meta SET value = ? WHERE key = 'base_chain'", (link[0],))
        return upto - end

    def _checkpoint(self) -> None:
        self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        self._pages = 0

    def close(self) -> None:
        self._checkpoint()
        self._db.close()


def _sync_directory(path: Path) -> None:
    """A new file's name is durable only once its directory is."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
