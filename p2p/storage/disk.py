"""``raft.db``: the journal on a real disk, in SQLite with one fsync a batch (PROTOCOL §2.21, §2.22).

Exactly one connection, one thread, autocheckpoint off, checkpoints on that same connection, no mmap. A write torn by
a power cut is first of all SQLite's to detect (its write-ahead log has checksums of its own and drops the torn tail);
our checksums and chain detect what it cannot: a flipped bit, a lost write, a file put together from two backups; and
`wal` tells a write-ahead log that was torn from one that was damaged.

Opening looks and refuses; nothing is changed before `DiskLog.load` has verified everything. `meta` says what the small
table holds.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import apsw

from p2p.effects import CONFIG, Config, Entry, HardState
from p2p.ids import ClusterId, Index, NodeId, Term
from p2p.storage import (
    ALL_BYTES,
    CHAIN_BYTES,
    COMPACT_SLICE,
    NOTHING_CHANGED,
    CopiedStore,
    CorruptLog,
    DiskFull,
    Loaded,
    StorageError,
    WrongStore,
    check_blank,
    check_recovery,
    check_reset,
    check_truncation,
    meta,
    sums,
    wal,
)
from p2p.storage.identity import place_of
from p2p.storage.walk import walk

CHECKPOINT_PAGES = 4_000  # 16 MiB of write-ahead log


class DiskLog:
    """One voter's log and hard state in the file at `path`; created on first use for `node`, blank.

    A file whose inode or device is not the one it was made with is a copy, which must not vote as the original.
    `adopt` gives the store a new disk id, each time: not a switch to leave on. Its cluster then takes it for a stranger
    until it is added; only where it was the one voter, and no CONFIG entry is left in the log to say so, it stays that.
    Without `check_copy` a copy is taken for the original, which then must never run again, and its place is noted.
    """

    def __init__(self, path: Path, node: NodeId, *, adopt: bool = False, check_copy: bool = True) -> None:
        """Raises WrongStore if the file belongs to another node, CopiedStore if it is a copy, CorruptLog if it is
        damaged."""
        self._path = path
        self._pages, self._checkpoint_at = 0, CHECKPOINT_PAGES
        self._chain = bytes(CHAIN_BYTES)
        self._end = self._floor = 0
        self._configs: list[tuple[int, bytes]] = []
        self._no_room = False
        self._adopt, self._check_copy, self._moved = adopt, check_copy, False
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

    # -- opening -----------------------------------------------------------------------------------------------------

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
        self._state: meta.Meta = {str(key): value for key, value in self._run("SELECT key, value FROM meta")}
        if self._state.pop("seal", None) != meta.seal(self._state):
            raise CorruptLog(f"{self._path}: its term and vote do not match their checksum. {NOTHING_CHANGED}")
        if self._state["format"] not in (1, meta.FORMAT):
            raise WrongStore(f"{self._path} has journal format {self._state['format']}; this build reads {meta.FORMAT}")
        theirs = self._state["node"]
        if theirs != node:
            raise WrongStore(
                f"{self._path} belongs to node {theirs!r}, not to {node!r}: one data directory holds one identity. "
                f"Start with --node-id {theirs} or another --data-dir"
            )
        self._place = place_of(self._path)
        made = meta.made_at(self._state)
        self._moved = made is not None and self._place.on_another_machine(made)
        self._copied = made is not None and self._place.is_copy_of(made)
        if self._copied and self._check_copy and not self._adopt:
            raise CopiedStore(
                f"{self._path} is a copy (a restored backup, or a cloned image) of the store that disk "
                f"{self._state['disk']} votes with: two of them must not vote. Nothing was changed. Start with --adopt "
                f"to give this one an identity of its own, or move it aside to start an empty node",
                alone=self._alone(),
            )

    def _create(self, node: NodeId) -> None:
        """The identity goes into the main file at once, so that it does not share the fate of the newest entries."""
        first = meta.blank(node, place_of(self._path))
        with self._db:
            self._run(meta.SCHEMA)
            for item in (*first.items(), ("seal", meta.seal(first))):
                self._run("INSERT INTO meta VALUES (?, ?)", item)
        self._checkpoint()

    def _alone(self) -> bool:
        newest = self._run("SELECT body FROM log WHERE kind = ? ORDER BY idx DESC LIMIT 1", (CONFIG,)).fetchone()
        try:
            config = Config.decode(cast(bytes, newest[0] if newest else self._state["base_config"]))
        except (ValueError, AttributeError):
            return False
        return config.voters == (meta.identity(self._state).voter,)

    def load(self, *, applied: Index) -> Loaded:
        """See `p2p.storage.LogStore.load`."""
        with _translated(self._path):
            return self._load(applied)

    def _load(self, applied: Index) -> Loaded:
        base = int(self._state["base"])
        floor = max(int(self._state["acked_floor"]), applied)
        kind = "kind" if self._state["format"] == meta.FORMAT else "0"
        last_row = cast(Any, self._run("SELECT max(idx) FROM log").fetchone())[0]
        rows = self._run(f"SELECT idx, term, crc, chain, body, {kind} FROM log ORDER BY idx")  # noqa: S608 - no input
        end = last_row if isinstance(last_row, int) else base
        try:
            found = walk(cast(Any, rows), base, bytes(self._state["base_chain"]), end, floor)
        finally:
            rows.close()
        with self._transaction() as changes:
            self._settle(changes, configs_in_log=bool(found.configs))
            if found.torn:
                self._run("DELETE FROM log WHERE idx > ?", (found.last,))
        self._chain, self._end, self._floor = found.chain, found.last, floor
        self._configs = [(index, config.encode()) for index, config in found.configs]
        self._checkpoint()  # what a crash left behind the last transaction must not be there at the next one
        return Loaded(
            identity=meta.identity(self._state),
            hard_state=meta.hard_state(self._state),
            first=Index(base + 1),
            last=found.last,
            acked_floor=Index(floor),
            torn=found.torn,
            base=Index(base),
            base_term=Term(self._state["base_term"]),
            base_config=Config.decode(self._state["base_config"]),
            runs=found.runs,
            configs=found.configs,
            moved=self._moved,
        )

    def _settle(self, changes: meta.Meta, *, configs_in_log: bool) -> None:
        """Within a transaction: once, what opening found or was asked for."""
        if self._state["format"] != meta.FORMAT:
            self._run(meta.FROM_FORMAT_1)
            changes |= meta.from_format_1(self._state, self._place)
        if self._adopt:
            changes |= meta.adopted(self._state | changes, self._place, configs_in_log=configs_in_log)
            self._moved = False
        elif self._copied:
            changes |= self._place._asdict()
        self._adopt = self._copied = False

    # -- writing -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[meta.Meta]:
        """All or nothing, with one fsync; rows of meta that change are put into the dict."""
        run, changes = self._run, meta.Meta()
        if self._no_room:
            self._make_room()
        try:
            run("BEGIN IMMEDIATE")
            yield changes
            if changes:
                after = self._state | changes
                rows = (*changes.items(), ("seal", meta.seal(after)))
                self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)
            run("COMMIT")
        except BaseException as error:
            full = _is_full(error, self._db.system_errno)
            if self._db.in_transaction:
                run("ROLLBACK")
            if full:
                self._no_room = True
                raise DiskFull(f"{self._path}: no room for this write: {error}") from error
            raise
        if changes:
            self._state = after

    def _make_room(self) -> None:
        """What the failed write left behind the last transaction goes first: the next one would leave some of it
        behind itself, where `wal` would take it for damage."""
        try:
            folded_in = self._checkpoint()
        except apsw.Error as error:
            if _is_full(error, self._db.system_errno):
                raise DiskFull(f"{self._path}: still no room to fold in its write-ahead log: {error}") from error
            raise
        if not folded_in:
            raise DiskFull(f"{self._path}: its write-ahead log cannot be folded in while somebody reads it")
        self._no_room = False

    def append(
        self,
        entries: Sequence[Entry],
        hard_state: HardState | None,
        acked_floor: Index,
        truncate: Index | None = None,
    ) -> None:
        """See `p2p.storage.LogStore.append`."""
        running, end = self._chain, self._end
        if truncate is not None:
            check_truncation(truncate, max(self._floor, int(self._state["base"])))
            if truncate <= end:
                end = truncate - 1
                running = cast(bytes, self.chain_at(Index(end)))
        rows = []
        for entry in entries:
            crc, running = sums(running, entry)
            rows.append((entry.index, entry.term, crc, running, entry.body, entry.kind))
        assert not rows or rows[0][0] == end + 1, f"entry {rows[0][0]} would follow entry {end}"
        with self._transaction() as changes:
            if end < self._end:
                self._run("DELETE FROM log WHERE idx > ?", (end,))
            self._db.executemany("INSERT INTO log VALUES (?, ?, ?, ?, ?, ?)", rows)
            if hard_state is not None:
                changes |= {"term": hard_state.term, "voted_for": hard_state.voted_for}
            if acked_floor > self._state["acked_floor"]:
                changes["acked_floor"] = acked_floor
        if end < self._end:
            self._configs = [config for config in self._configs if config[0] <= end]
        self._configs += [(entry.index, entry.body) for entry in entries if entry.kind == CONFIG]
        self._chain, self._end, self._floor = running, end + len(rows), max(self._floor, acked_floor)
        if self._pages >= self._checkpoint_at:
            self._checkpoint_if_there_is_room()

    def compact(self, upto: Index) -> int:
        """See `p2p.storage.LogStore.compact`."""
        base = int(self._state["base"])
        end = min(base + COMPACT_SLICE, upto)
        if end <= base:
            return 0
        at = self._run("SELECT chain, term FROM log WHERE idx = ?", (end,)).fetchone()
        assert at is not None, f"compaction up to {end}, which is not in the log"
        gone = [body for index, body in self._configs if index <= end]
        with self._transaction() as changes:
            self._run("DELETE FROM log WHERE idx <= ?", (end,))
            changes |= {"base": end, "base_chain": at[0], "base_term": at[1]}
            if gone:
                changes["base_config"] = gone[-1]
        del self._configs[: len(gone)]
        return upto - end

    def reset(self, index: Index, term: Term, chain: bytes, config: Config) -> None:
        """See `p2p.storage.LogStore.reset`."""
        check_reset(index, max(self._floor, int(self._state["acked_floor"])))
        with self._transaction() as changes:
            self._settle(changes, configs_in_log=True)
            self._run("DELETE FROM log")
            changes |= {"base": index, "base_term": term, "base_chain": chain, "base_config": config.encode()}
            changes["acked_floor"] = index
        self._chain, self._end, self._floor, self._configs = chain, index, index, []
        self._checkpoint_if_there_is_room()

    def found(self, cluster: ClusterId, config: Config) -> None:
        """See `p2p.storage.LogStore.found`."""
        check_blank(self._state["cluster"], cluster)
        assert self._end == 0, "a store that belongs to no cluster has no entries"
        with self._transaction() as changes:
            changes |= {"cluster": cluster, "base_config": config.encode()}
        self._checkpoint_if_there_is_room()

    def join(self, cluster: ClusterId) -> None:
        """See `p2p.storage.LogStore.join`."""
        if self._state["cluster"] == cluster:
            return
        check_blank(self._state["cluster"], cluster)
        with self._transaction() as changes:
            changes["cluster"] = cluster
        self._checkpoint_if_there_is_room()

    def recover(self, cluster: ClusterId, config: Config) -> None:
        """See `p2p.storage.LogStore.recover`."""
        state = self._state
        check_recovery(state["cluster"], cluster, NodeId(state["node"]), config, Index(self._end))
        term = Term(max(int(state["term"]), self.term_at(Index(self._end)) or 0) + 1)
        entry = Entry(Index(self._end + 1), term, config.encode(), CONFIG)
        crc, running = sums(self._chain, entry)
        with self._transaction() as changes:
            self._run(
                "INSERT INTO log VALUES (?, ?, ?, ?, ?, ?)",
                (entry.index, entry.term, crc, running, entry.body, entry.kind),
            )
            changes |= {"cluster": cluster, "term": term, "voted_for": config.voters[0], "acked_floor": entry.index}
        self._chain, self._end, self._floor = running, entry.index, entry.index
        self._configs.append((entry.index, entry.body))
        self._checkpoint_if_there_is_room()

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, first: Index, last: Index, most_bytes: int = ALL_BYTES) -> list[Entry]:
        """See `p2p.storage.LogStore.read`."""
        rows = self._run("SELECT idx, term, body, kind FROM log WHERE idx BETWEEN ? AND ? ORDER BY idx", (first, last))
        found: list[Entry] = []
        for index, term, body, kind in cast(Any, rows):
            most_bytes -= len(body)
            if most_bytes < 0 and found:
                rows.close()  # a read that is left open holds checkpoints up
                break
            found.append(Entry(Index(index), Term(term), body, kind))
        return found

    def chain_at(self, index: Index) -> bytes | None:
        """See `p2p.storage.LogStore.chain_at`."""
        if index == self._state["base"]:
            return bytes(self._state["base_chain"])
        found = self._run("SELECT chain FROM log WHERE idx = ?", (index,)).fetchone()
        return cast(bytes, found[0]) if found else None

    def term_at(self, index: Index) -> Term | None:
        """See `p2p.storage.LogStore.term_at`."""
        if index == self._state["base"]:
            known = self._state["base_term"] or index == 0
            return Term(self._state["base_term"]) if known else None
        found = self._run("SELECT term FROM log WHERE idx = ?", (index,)).fetchone()
        return Term(cast(int, found[0])) if found else None

    # -- the write-ahead log -----------------------------------------------------------------------------------------

    def _count_pages(self, _db: apsw.Connection, _name: str, pages: int) -> int:
        self._pages = pages
        return apsw.SQLITE_OK

    def _checkpoint(self) -> bool:
        try:
            self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except apsw.BusyError:  # somebody looks at the file with a tool of theirs: later, then
            self._checkpoint_at = self._pages + CHECKPOINT_PAGES
            return False
        self._pages, self._checkpoint_at = 0, CHECKPOINT_PAGES
        return True

    def _checkpoint_if_there_is_room(self) -> None:
        """What was to be written is durable in the write-ahead log already: that it is not folded in fails nothing."""
        try:
            self._checkpoint()
        except apsw.Error as error:
            if not _is_full(error, self._db.system_errno):
                raise
            self._checkpoint_at = self._pages + CHECKPOINT_PAGES

    def close(self) -> None:
        self._checkpoint_if_there_is_room()
        self._db.close()


_FAILED_SYNC = (apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_IOERR_DIR_FSYNC)
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


def _is_full(error: BaseException, system_errno: int) -> bool:
    """After a failed fsync nobody knows what the disk holds, even if the reason was room: that is no DiskFull."""
    if isinstance(error, apsw.IOError) and getattr(error, "extendedresult", 0) not in _FAILED_SYNC:
        return system_errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, apsw.FullError)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """SQLite's complaints at a start as sentences for the person who starts."""
    try:
        yield
    except apsw.FullError as error:
        raise DiskFull(f"{path} cannot be used: {error}") from error
    except _UNUSABLE as error:
        raise StorageError(f"{path} cannot be used: {error}") from error
    except apsw.Error as error:
        raise CorruptLog(f"{path} is damaged: {error}. {NOTHING_CHANGED}") from error


def _sync_directory(path: Path) -> None:
    """A new file's name is durable only once its directory is."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
