"""Both stores behind one small bench, so that every test is written once and asked of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import apsw

from p2p.effects import Entry, HardState
from p2p.ids import Index, NodeId, Term
from p2p.storage import Loaded, LogStore
from p2p.storage.disk import DiskLog
from p2p.storage.memory import MemoryLog

NODE = NodeId("n1")


def entry(index: int, term: int = 1, body: bytes | None = None) -> Entry:
    return Entry(Index(index), Term(term), body if body is not None else b"body %d" % index)


def entries(first: int, last: int, term: int = 1) -> tuple[Entry, ...]:
    return tuple(entry(n, term) for n in range(first, last + 1))


def append(store: LogStore, first: int, last: int, *, term: int = 1, floor: int = 0) -> None:
    store.append(entries(first, last, term), HardState(Term(term), NODE), Index(floor))


def load(store: LogStore, applied: int = 0) -> Loaded:
    return store.load(applied=Index(applied))


class Bench(Protocol):
    """A store's place: open it, open it again, damage what lies there."""

    def open(self, node: str = NODE) -> LogStore: ...
    def damage(self, index: int) -> None:
        """Changes the body of one stored entry behind the store's back; the store is closed."""

    def lose(self, index: int) -> None:
        """Removes one stored entry behind the store's back; the store is closed."""

    def content(self) -> object:
        """Everything stored, for a comparison; the store is closed."""


class MemoryBench:
    def __init__(self) -> None:
        self._log: MemoryLog | None = None

    def open(self, node: str = NODE) -> LogStore:
        if self._log is None:
            self._log = MemoryLog(NodeId(node))
        return self._log.reopened(NodeId(node))

    def damage(self, index: int) -> None:
        assert self._log is not None
        self._log.flip(Index(index))

    def lose(self, index: int) -> None:
        assert self._log is not None
        self._log.records = [record for record in self._log.records if record[0].index != index]

    def content(self) -> object:
        log = self._log
        assert log is not None
        return (log.identity, list(log.records), log.hard_state, log.acked_floor, log.base, log.base_chain)


class DiskBench:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "raft.db"

    def open(self, node: str = NODE) -> LogStore:
        return DiskLog(self.path, NodeId(node))

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


BENCHES: dict[str, Callable[[Path], Bench]] = {"memory": lambda _: MemoryBench(), "disk": DiskBench}
