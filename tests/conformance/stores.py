"""Both stores behind one small bench, so that every test is written once and asked of each."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import apsw

from p2p.effects import CONFIG, Config, Entry, HardState
from p2p.ids import Index, NodeId, Term, VoterId
from p2p.storage import Loaded, LogStore
from p2p.storage.disk import DiskLog
from p2p.storage.memory import MemoryLog

NODE = NodeId("n1")
VOTER = VoterId("n2@d2")  # somebody to vote for


def entry(index: int, term: int = 1, body: bytes | None = None) -> Entry:
    return Entry(Index(index), Term(term), body if body is not None else b"body %d" % index)


def entries(first: int, last: int, term: int = 1) -> tuple[Entry, ...]:
    return tuple(entry(n, term) for n in range(first, last + 1))


def voters(*names: str) -> Config:
    return Config(tuple(VoterId(name) for name in names))


def config_entry(index: int, config: Config, term: int = 1) -> Entry:
    return Entry(Index(index), Term(term), config.encode(), CONFIG)


def append(
    store: LogStore, first: int, last: int, *, term: int = 1, floor: int = 0, truncate: int | None = None
) -> None:
    state = HardState(Term(term), VOTER)
    store.append(entries(first, last, term), state, Index(floor), Index(truncate) if truncate is not None else None)


def load(store: LogStore, applied: int = 0) -> Loaded:
    return store.load(applied=Index(applied))


class Bench(Protocol):
    """A store's place: open it, open it again, damage what lies there."""

    def open(self, node: str = NODE, *, adopt: bool = False, check_copy: bool = True) -> LogStore: ...
    def damage(self, index: int) -> None:
        """Changes the body of one stored entry behind the store's back; the store is closed."""

    def lose(self, index: int) -> None:
        """Removes one stored entry behind the store's back; the store is closed."""

    def content(self) -> object:
        """Everything stored, for a comparison; the store is closed."""

    def power_cut(self, store: LogStore) -> None:
        """Everything that was not durable is gone, with the process."""

    def copied(self) -> None:
        """From now on the place holds a copy of what it held; the store is closed."""

    def fill(self, store: LogStore) -> Callable[[], None]:
        """The disk is full; the answer makes room."""


class MemoryBench:
    def __init__(self) -> None:
        self._log: MemoryLog | None = None

    def open(self, node: str = NODE, *, adopt: bool = False, check_copy: bool = True) -> LogStore:
        if self._log is None:
            self._log = MemoryLog(NodeId(node))
        return self._log.reopened(NodeId(node), adopt=adopt, check_copy=check_copy)

    def damage(self, index: int) -> None:
        assert self._log is not None
        self._log.flip(Index(index))

    def lose(self, index: int) -> None:
        assert self._log is not None
        self._log.records = [record for record in self._log.records if record[0].index != index]

    def content(self) -> object:
        log = self._log
        assert log is not None
        base = (log.base, log.base_term, log.base_chain, log.base_config)
        return (log.identity, list(log.records), log.hard_state, log.acked_floor, base)

    def power_cut(self, store: LogStore) -> None:
        assert self._log is not None
        self._log.crash(0)

    def copied(self) -> None:
        assert self._log is not None
        self._log = self._log.copy()

    def fill(self, store: LogStore) -> Callable[[], None]:
        assert isinstance(store, MemoryLog)
        store.full = True
        return lambda: setattr(store, "full", False)


class DiskBench:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "raft.db"

    def open(self, node: str = NODE, *, adopt: bool = False, check_copy: bool = True) -> LogStore:
        return DiskLog(self.path, NodeId(node), adopt=adopt, check_copy=check_copy)

    def _sql(self, text: str, *values: object) -> list[tuple[object, ...]]:
        connection = apsw.Connection(str(self.path))
        try:
            return list(connection.execute(text, values))  # type: ignore[arg-type]
        finally:
            connection.close()

    def damage(self, index: int) -> None:
        self._sql("UPDATE log SET body = body || x'21' WHERE idx = ?", index)

    def lose(self, index: int) -> None:
        self._sql("DELETE FROM log WHERE idx = ?", index)

    def content(self) -> object:
        return (self._sql("SELECT * FROM log ORDER BY idx"), self._sql("SELECT * FROM meta ORDER BY key"))

    def power_cut(self, store: LogStore) -> None:
        assert isinstance(store, DiskLog)
        disk = {side: Path(f"{self.path}{side}").read_bytes() for side in ("", "-wal")}
        store._db.close(True)
        Path(f"{self.path}-shm").unlink(missing_ok=True)  # memory, not disk
        for side, body in disk.items():
            Path(f"{self.path}{side}").write_bytes(body)  # into the same file: no copy

    def copied(self) -> None:
        copy = self.path.with_suffix(".copy")
        shutil.copyfile(self.path, copy)
        copy.replace(self.path)

    def fill(self, store: LogStore) -> Callable[[], None]:
        assert isinstance(store, DiskLog)
        pages = store._run("PRAGMA page_count").fetchone()
        assert pages is not None
        most = store._run("PRAGMA max_page_count").fetchone()
        store._run(f"PRAGMA max_page_count = {pages[0]}").fetchall()

        def make_room() -> None:
            assert most is not None
            store._run(f"PRAGMA max_page_count = {most[0]}").fetchall()

        return make_room


BENCHES: dict[str, Callable[[Path], Bench]] = {"memory": lambda _: MemoryBench(), "disk": DiskBench}
