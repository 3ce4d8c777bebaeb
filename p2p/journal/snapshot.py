"""Copies of the applied state: made beside the running queue, verified before use, two kept, handed to followers.

A snapshot is a backup (SQLite's backup API) of ``state.db`` at one applied index, taken through a read-only connection
inside one read transaction, so it is consistent while the queue moves on. It is fsynced, renamed into place and its
directory fsynced before the log behind it may be compacted (PROTOCOL §1, "Snapshot"). File name:
``state-<index>-<term>.db``; beside it ``.sha256`` holds the hash that a transfer or a restore checks, and ``.meta``
what a follower must know to go on behind it: without that a snapshot can be restored here, but is offered to nobody.

A follower that is behind the log fetches one (`Incoming`), which then is a snapshot of its own like any other, and puts
it in place of its state and its log (`install`). Two files cannot change at once, so a marker says that it is being
done, and a start that finds one does it again: `resume_install`, then the log (`p2p.storage.LogStore.reset`), then
`installed`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import apsw

from p2p.effects import Config, SnapshotMeta
from p2p.ids import Index, Term

KEEP = 2
PAGES_A_STEP = 2_000
CHUNK_BYTES = 1 << 20  # the most that is read for a follower at a time
META_FORMAT = 1
_NAME = re.compile(r"state-([0-9]{1,19})-([0-9]{1,19})\.db")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MARKER = "installing.json"


class SnapshotError(Exception):
    """Base of what can be wrong with a snapshot from or for somebody else."""


class BadSnapshot(SnapshotError):
    """What was fetched is not what was offered, or is no sound state. It is not used."""


class NoSuchSnapshot(SnapshotError):
    """There is no snapshot of that name here, or not any more: ask for the newest."""


class GivenUp(Exception):
    """The snapshot was abandoned because the node stops."""


class Snapshot(NamedTuple):
    """A finished snapshot file: the state after applying `at_index` of `term`."""

    path: Path
    at_index: int
    term: int


def listed(directory: Path) -> list[Snapshot]:
    """The finished snapshots in a directory, newest first."""
    found = []
    for path in directory.glob("state-*.db") if directory.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.with_suffix(".sha256").exists():
            found.append(Snapshot(path, int(match[1]), int(match[2])))
    return sorted(found, key=lambda snapshot: snapshot.at_index, reverse=True)


# -- making and restoring ---------------------------------------------------------------------------------------------


def _unknown(_index: int) -> tuple[bytes, Config] | None:
    return None


def take(
    state: Path,
    directory: Path,
    *,
    give_up: Callable[[], bool] = lambda: False,
    describe: Callable[[int], tuple[bytes, Config] | None] = _unknown,
) -> Snapshot:
    """Copies the state database; blocks, so it runs in a thread of its own. Keeps the newest two. `describe` is asked
    for the log's chain and the configuration at the copy's index. Raises GivenUp soon after `give_up` answers true."""
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
    known = describe(meta["applied"])
    offer = None
    if known is not None:
        chain, config = known
        index, term, size = Index(meta["applied"]), Term(meta["term"]), unfinished.stat().st_size
        offer = SnapshotMeta(index, term, config, chain, final.name, size, digest)
    _finish(unfinished, final, digest, offer)
    return Snapshot(final, meta["applied"], meta["term"])


def _finish(unfinished: Path, final: Path, digest: str, offer: SnapshotMeta | None) -> None:
    """Durable with all that stands beside it, before its name says that it is a snapshot."""
    _write_durably(final.with_suffix(".sha256"), digest)
    if offer is not None:
        _write_durably(final.with_suffix(".meta"), _pack(offer))
    else:
        final.with_suffix(".meta").unlink(missing_ok=True)
    _sync(unfinished)
    unfinished.replace(final)
    _sync(final.parent)
    for old in listed(final.parent)[KEEP:]:
        if old.path == final:
            continue  # fetched, and behind what is here: whoever fetched it wants it
        old.path.unlink()
        old.path.with_suffix(".meta").unlink(missing_ok=True)
        old.path.with_suffix(".sha256").unlink(missing_ok=True)


def restore(directory: Path, state: Path) -> Snapshot | None:
    """Puts the newest snapshot that passes its hash and SQLite's integrity check in place of `state`."""
    for snapshot in listed(directory):
        if _sha256(snapshot.path).encode() != snapshot.path.with_suffix(".sha256").read_bytes().strip():
            continue
        incoming = state.with_suffix(".incoming")
        shutil.copyfile(snapshot.path, incoming)
        if not _is_sound(incoming):
            incoming.unlink()
            continue
        _put_in_place(incoming, state)
        return snapshot
    return None


# -- offering to a follower -------------------------------------------------------------------------------------------


def offerable(directory: Path) -> SnapshotMeta | None:
    """The newest snapshot that a follower can go on behind."""
    for snapshot in listed(directory):
        try:
            offer = _unpack(snapshot.path.with_suffix(".meta").read_bytes())
            if offer.name == snapshot.path.name and offer.size == snapshot.path.stat().st_size:
                return offer
        except (OSError, BadSnapshot):
            continue  # made without, or damaged: the older one then
    return None


def read_chunk(directory: Path, name: str, offset: int, length: int) -> bytes:
    """At most `length` bytes of a finished snapshot (and never more than CHUNK_BYTES), none behind its end. Both come
    from a peer. Raises NoSuchSnapshot."""
    path = directory / name if _NAME.fullmatch(name) else None
    if path is None or offset < 0 or length < 0 or not path.with_suffix(".sha256").exists():
        raise NoSuchSnapshot(f"there is no snapshot {name[:60]!r} here")
    try:
        if offset >= path.stat().st_size:
            return b""
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(min(length, CHUNK_BYTES))
    except FileNotFoundError:
        raise NoSuchSnapshot(f"the snapshot {name} is not here any more") from None


# -- fetching one -----------------------------------------------------------------------------------------------------


class Incoming:
    """A snapshot that is being fetched. What has come is kept over a restart, so that fetching goes on at `offset`;
    what is left of other fetches is removed."""

    def __init__(self, directory: Path, meta: SnapshotMeta) -> None:
        """Raises BadSnapshot for an offer that cannot be one."""
        named = f"state-{meta.index}-{meta.term}.db"
        if meta.name != named or not _NAME.fullmatch(named) or not _SHA256.fullmatch(meta.sha256) or meta.size <= 0:
            raise BadSnapshot(f"no snapshot was offered: {meta.name[:60]!r}, {meta.size} bytes")
        directory.mkdir(parents=True, exist_ok=True)
        self.meta, self._directory = meta, directory
        self._partial = directory / f"incoming-{meta.index}-{meta.term}-{meta.sha256[:16]}.partial"
        for other in directory.glob("incoming-*.partial*"):
            if other != self._partial:
                other.unlink()
        if self.offset > meta.size:
            self._partial.unlink()

    @property
    def offset(self) -> int:
        """How many bytes have come: where to go on."""
        return self._partial.stat().st_size if self._partial.exists() else 0

    def write(self, chunk: bytes) -> None:
        """The next bytes. Raises BadSnapshot for more than was offered."""
        if self.offset + len(chunk) > self.meta.size:
            self._refuse("more bytes came than were offered")
        with self._partial.open("ab") as file:
            file.write(chunk)

    def finish(self) -> Path:
        """Verifies what has come and makes it a snapshot of this directory, durably. Raises BadSnapshot; then nothing
        of it is left, and fetching begins anew."""
        meta = self.meta
        if self.offset != meta.size:
            self._refuse(f"{self.offset} bytes came of {meta.size}")
        if _sha256(self._partial) != meta.sha256:
            self._refuse("its hash is another one than was offered")
        if not _is_sound(self._partial):
            self._refuse("SQLite's own check of it fails")
        if _applied(self._partial) != (meta.index, meta.term):
            self._refuse(f"it is the state at another index than {meta.index} of term {meta.term}")
        final = self._directory / meta.name
        _finish(self._partial, final, meta.sha256, meta)
        return final

    def _refuse(self, why: str) -> None:
        self._partial.unlink(missing_ok=True)
        raise BadSnapshot(f"the fetched snapshot {self.meta.name} is not used: {why}")


# -- putting one in place ---------------------------------------------------------------------------------------------


class Pending(NamedTuple):
    """An install that has begun: the state may be the old or the new one, and so may the log."""

    marker: Path
    incoming: Path
    meta: SnapshotMeta


def marker_in(directory: Path) -> Path:
    """Where an install of a snapshot of this directory says that it is being done."""
    return directory / _MARKER


def install(incoming: Path, state: Path, marker: Path, meta: SnapshotMeta) -> None:
    """Steps 1 and 2 of four: says durably what is being done, and puts a copy of the finished snapshot in place of the
    state, which nobody has open. The caller then resets the log (3) and says `installed` (4), and uses neither before.
    """
    note = marker.with_suffix(".unfinished")
    _write_durably(note, _pack(meta._replace(name=incoming.name)))
    note.replace(marker)
    _sync(marker.parent)
    _replace_state(incoming, state)


def installed(marker: Path) -> None:
    """Step 4. Durable: a marker that comes back after a power cut would have the log forgotten again."""
    marker.unlink(missing_ok=True)
    _sync(marker.parent)


def pending_install(directory: Path) -> Pending | None:
    """The install that was begun and not ended. Raises BadSnapshot if what it says cannot be read."""
    marker = marker_in(directory)
    if not marker.exists():
        return None
    meta = _unpack(marker.read_bytes())
    return Pending(marker, directory / meta.name, meta)


def resume_install(directory: Path, state: Path) -> SnapshotMeta | None:
    """At a start, before anybody opens the state or loads the log: does step 2 again. Answers what was being installed,
    so that the caller does 3 and 4; None if nothing was. Raises BadSnapshot if the snapshot is gone or damaged."""
    pending = pending_install(directory)
    if pending is None:
        return None
    if not pending.incoming.exists() or _sha256(pending.incoming) != pending.meta.sha256:
        raise BadSnapshot(
            f"the installation of {pending.meta.name} was interrupted and the file is gone or damaged: nothing was "
            f"changed. Move this data directory aside to start an empty node"
        )
    _replace_state(pending.incoming, state)
    return pending.meta


def _replace_state(snapshot: Path, state: Path) -> None:
    incoming = state.with_suffix(".incoming")
    shutil.copyfile(snapshot, incoming)
    _put_in_place(incoming, state)


def _put_in_place(incoming: Path, state: Path) -> None:
    """The old state's write-ahead log goes first, and durably: beside the new state SQLite would take it for its."""
    _sync(incoming)
    for side in ("-wal", "-shm"):
        Path(f"{state}{side}").unlink(missing_ok=True)
        Path(f"{incoming}{side}").unlink(missing_ok=True)
    _sync(state.parent)
    incoming.replace(state)
    _sync(state.parent)


# -- files ------------------------------------------------------------------------------------------------------------


def _pack(meta: SnapshotMeta) -> str:
    return json.dumps(
        {
            "format": META_FORMAT,
            "index": meta.index,
            "term": meta.term,
            "config": meta.config.encode().decode(),
            "chain": meta.chain.hex(),
            "name": meta.name,
            "size": meta.size,
            "sha256": meta.sha256,
        }
    )


def _unpack(raw: bytes) -> SnapshotMeta:
    """Raises BadSnapshot for what `_pack` does not make."""
    try:
        found = json.loads(raw)
        if found["format"] != META_FORMAT or not _NAME.fullmatch(found["name"]):
            raise ValueError("another format, or no snapshot's name")
        config, chain = Config.decode(found["config"].encode()), bytes.fromhex(found["chain"])
        index, term, size = Index(int(found["index"])), Term(int(found["term"])), int(found["size"])
        return SnapshotMeta(index, term, config, chain, found["name"], size, str(found["sha256"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadSnapshot(f"{len(raw)} bytes do not describe a snapshot: {error}") from None


def _is_sound(path: Path) -> bool:
    """SQLite's integrity check of a file that nobody else has open."""
    try:
        check = _opened(path)
        try:
            return check.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",)
        finally:
            check.close()
    except apsw.Error:
        return False


def _applied(path: Path) -> tuple[int, int] | None:
    """(index, term) of the state in a sound database; None if it is no state."""
    check = _opened(path)
    try:
        found = check.execute("SELECT key, value FROM meta WHERE key IN ('applied', 'term')").fetchall()
        meta = {str(key): int(cast(int, value)) for key, value in found}
        return meta["applied"], meta["term"]
    except (apsw.Error, KeyError, TypeError, ValueError):
        return None
    finally:
        check.close()


def _opened(path: Path) -> apsw.Connection:
    """Immutable: SQLite reads the file alone, and puts nothing beside it."""
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    return apsw.Connection(f"{path.resolve().as_uri()}?immutable=1", flags=flags)


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
