"""The runner's durable records: a small SQLite file that is also the node's outbox of exit codes.

An attempt's row is there before its process is, and an ended attempt's row stays until the orchestrator has
acknowledged it.  Intents are written without waiting for the disk: a power cut that loses them kills the processes too.
Ends wait for the disk (``synchronous=FULL``), because once told they are never asked for again.  One transaction takes
whatever has gathered, so a slow disk makes larger groups, not a longer queue.

Decides: what is on disk, when it is synced.  Does not decide: what the rows mean (``orphans.py``, ``supervisor.py``).
Every method blocks; the daemon calls them on one thread of their own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apsw

from p2p.runner.attempts import EXITED, RECORD_COLUMNS
from p2p.runner.protocol import MAX_FORGOTTEN, Key

FILE_NAME = "runner.db"
_WAL_BYTES = 4 * 1024 * 1024

_SCHEMA = """
CREATE TABLE IF NOT EXISTS attempts (
    job TEXT NOT NULL, attempt INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('starting', 'running', 'exited')),
    directory TEXT NOT NULL, grace_seconds REAL NOT NULL, log_cap_bytes INTEGER NOT NULL, command TEXT NOT NULL,
    pid INTEGER, pid_start INTEGER, boot_id TEXT NOT NULL,
    started_ms INTEGER, ended_ms INTEGER, exit_code INTEGER, signal INTEGER, reason TEXT NOT NULL, error TEXT,
    user_seconds REAL, system_seconds REAL, max_rss_mb REAL,
    PRIMARY KEY (job, attempt)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS forgotten (
    number INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, attempt INTEGER NOT NULL, UNIQUE (job, attempt)
);
"""
_COLUMNS = ", ".join(RECORD_COLUMNS)
_PUT = f"INSERT OR REPLACE INTO attempts ({_COLUMNS}) VALUES ({', '.join('?' * len(RECORD_COLUMNS))})"  # noqa: S608
_STATE = RECORD_COLUMNS.index("state")

Row = Sequence[Any]

StoreError = apsw.Error
StoreCorrupt = (apsw.CorruptError, apsw.NotADBError)


class Store:
    """Opens the file, or moves a broken one aside and begins afresh; ``lost_records`` then says so."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME
        self.lost_records: str | None = None
        self._open_or_replace()

    def load(self) -> list[Row]:
        return list(self._db.execute(f"SELECT {_COLUMNS} FROM attempts"))  # noqa: S608

    def commit(self, *, intents: Sequence[Row], changes: Sequence[Row], acks: Sequence[Key]) -> set[Key]:
        """One transaction.  Returns the intents that were refused, for they ended long ago and were acknowledged."""
        ends = any(row[_STATE] == EXITED for row in changes)
        self._db.execute("PRAGMA synchronous=FULL" if ends else "PRAGMA synchronous=NORMAL")
        with self._db:
            self._forget(acks)
            refused = {key for row in intents if self._is_forgotten(key := (row[0], row[1]))}
            self._db.executemany(_PUT, [row for row in intents if (row[0], row[1]) not in refused])
            self._db.executemany(_PUT, changes)
        return refused

    def replace(self) -> None:
        """The file turned out to be broken while in use: begin afresh."""
        self._db.close(True)
        self._set_aside()
        self._open()

    def close(self) -> None:
        self._db.close()

    def _forget(self, acks: Sequence[Key]) -> None:
        if not acks:
            return
        self._db.executemany("DELETE FROM attempts WHERE job = ? AND attempt = ?", acks)
        self._db.executemany("INSERT OR REPLACE INTO forgotten (job, attempt) VALUES (?, ?)", acks)
        newest = self._db.last_insert_rowid()
        self._db.execute("DELETE FROM forgotten WHERE number <= ?", (newest - MAX_FORGOTTEN,))

    def _is_forgotten(self, key: Key) -> bool:
        found = self._db.execute("SELECT 1 FROM forgotten WHERE job = ? AND attempt = ?", key)
        return found.fetchone() is not None

    def _open_or_replace(self) -> None:
        try:
            self._open()
        except StoreCorrupt as error:
            self._set_aside()
            self._open()
            self.lost_records = f"{self._path.name} was broken ({error}) and was moved aside"

    def _open(self) -> None:
        self._db = db = apsw.Connection(os.fspath(self._path))
        try:
            db.set_busy_timeout(5_000)
            db.execute("PRAGMA journal_mode=WAL").fetchall()
            db.execute(f"PRAGMA journal_size_limit={_WAL_BYTES}").fetchall()
            db.execute("PRAGMA cache_size=-1024")  # KiB
            verdict = db.execute("PRAGMA quick_check(1)").fetchall()
            if verdict != [("ok",)]:
                raise apsw.CorruptError(str(verdict[0][0]))
            db.execute(_SCHEMA)
            db.execute(f"SELECT {_COLUMNS} FROM attempts LIMIT 0")  # noqa: S608
        except BaseException:
            db.close(True)
            raise

    def _set_aside(self) -> None:
        """Keeps the latest broken file for a person to look at, and no more than that one."""
        for suffix in ("", "-wal", "-shm"):
            path = self._path.with_name(self._path.name + suffix)
            if path.exists():
                path.replace(path.with_name(f"{FILE_NAME}.broken{suffix}"))
