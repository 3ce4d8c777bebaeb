"""Copies of the applied state: made beside the running queue, verified before use, two kept.

A snapshot is a backup (SQLite's backup API) of ``state.db`` at one applied index, taken through a read-only connection
inside one read transaction, so it is consistent while the queue moves on. It is fsynced, renamed into place and its
directory fsynced before the log behind it may be compacted (PROTOCOL §1, "Snapshot"). File name:
``state-<index>-<term>.db``; beside it ``.sha256`` holds the hash that a transfer or a restore checks.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import apsw

KEEP = 2
PAGES_A_STEP = 2_000
_NAME = re.compile(r"^state-(\d+)-(\d+)\.db$")


class Snapshot(NamedTuple):
    """A finished snapshot file: the state after applying `at_index` of `term`."""

    path: Path
    at_index: int
    term: int


def listed(directory: Path) -> list[Snapshot]:
    """The finished snapshots in a directory, newest first."""
    found = []
    for path in directory.glob("state-*.db") if directory.is_dir() else ():
        match = _NAME.match(path.name)
        if match and path.with_suffix(".sha256").exists():
            found.append(Snapshot(path, int(match[1]), int(match[2])))
    return sorted(found, key=lambda snapshot: snapshot.at_index, reverse=True)


class GivenUp(Exception):
    """The snapshot was abandoned because the node stops."""


def take(state: Path, directory: Path, *, give_up: Callable[[], bool] = lambda: False) -> Snapshot:
    """Copies the state database; blocks, so it runs in a thread of its own. Keeps the newest two. Raises GivenUp soon
    after `give_up` answers true."""
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = directory / "unfinished.db"
    for side in ("", "-journal", "-wal", "-shm"):
        Path(f"{unfinished}{side}").unlink(missing_ok=True)
    source = apsw.Connection(str(state), flags=apsw.SQLITE_OPEN_READONLY)
    target = apsw.Connection(str(unfinished))
    try:
        source.execute("BEGIN")
        found = source.execute("SELECT key, value FROM meta WHERE key IN ('applied', 'term')").fetchall()
        meta = {str(key): int(cast(int, value)) for key, value in found}
        with target.backup("main", source, "main") as backup:
            while not backup.done:
                if give_up():
                    raise GivenUp
                backup.step(PAGES_A_STEP)
    finally:
        target.close()
        source.close()
    digest = _sha256(unfinished)
    final = directory / f"state-{meta['applied']}-{meta['term']}.db"
    _write_durably(final.with_suffix(".sha256"), digest)
    _sync(unfinished)
    unfinished.replace(final)
    _sync(directory)
    for old in listed(directory)[KEEP:]:
        old.path.unlink()
        old.path.with_suffix(".sha256").unlink(missing_ok=True)
    return Snapshot(final, meta["applied"], meta["term"])


def restore(directory: Path, state: Path) -> Snapshot | None:
    """Puts the newest snapshot that passes its hash and SQLite's integrity check in place of `state`."""
    for snapshot in listed(directory):
        if _sha256(snapshot.path).encode() != snapshot.path.with_suffix(".sha256").read_bytes().strip():
            continue
        incoming = state.with_suffix(".incoming")
        shutil.copyfile(snapshot.path, incoming)
        check = apsw.Connection(str(incoming))
        try:
            healthy = check.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",)
        finally:
            check.close()
        if not healthy:
            incoming.unlink()
            continue
        _sync(incoming)
        for side in ("-wal", "-shm"):
            Path(f"{state}{side}").unlink(missing_ok=True)
            Path(f"{incoming}{side}").unlink(missing_ok=True)
        incoming.replace(state)
        _sync(state.parent)
        return snapshot
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, text: str) -> None:
    path.write_text(text, encoding="ascii")
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
