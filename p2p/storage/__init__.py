"""Where the journal's entries and the voter's hard state are kept. Decides what is damaged, not what is true.

Twins: `disk.DiskLog` (SQLite, fsync) and `memory.MemoryLog` (a disk that can be crashed, torn and flipped under test).
Both pass tests/conformance. The rule for damage is PROTOCOL §2.20: a bad *last* entry that was never acknowledged is a
torn write and is cut off; anything else is refused, never truncated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from zlib import crc32

from p2p.effects import Entry, HardState
from p2p.ids import ClusterId, DiskId, Index, NodeId

CHAIN_BYTES = 16
COMPACT_SLICE = 2_000  # entries forgotten between two batches
NOTHING_CHANGED = (
    "Nothing was changed. Restore this data directory from a backup, or move it aside to start an empty node"
)


class StorageError(Exception):
    """Base of what can be wrong with a store; the message says what and what to do."""


class CorruptLog(StorageError):
    """An entry that may have been acknowledged does not match its checksum. Nothing was changed."""


class WrongStore(StorageError):
    """The store belongs to another node or is of another format."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose store this is."""

    cluster: ClusterId
    node: NodeId
    disk: DiskId


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a store holds. `torn` counts the never-acknowledged entries that were cut off its end."""

    identity: Identity
    hard_state: HardState
    first: Index  # first entry still kept; last + 1 if none
    last: Index
    acked_floor: Index
    torn: int


class LogStore(Protocol):
    """One thread owns a store."""

    def load(self, *, applied: Index) -> Loaded:
        """Verifies everything kept. `applied` is what the state machine has applied: it was committed, so it counts
        as acknowledged. Raises CorruptLog."""

    def append(self, entries: Sequence[Entry], hard_state: HardState | None, acked_floor: Index) -> None:
        """Durable when it returns. Any I/O error is fatal to the caller: after a failed fsync nobody knows what the
        disk holds (Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020)."""

    def read(self, first: Index, last: Index) -> list[Entry]:
        """Entries first..last, both included."""

    def compact(self, upto: Index) -> int:
        """Forgets a bounded slice of the entries up to `upto`; answers how many are left to forget."""

    def close(self) -> None: ...


def checksum(entry: Entry) -> int:
    """CRC-32 of the entry with its index and term."""
    return crc32(entry.body, crc32(b"%d:%d" % (entry.index, entry.term)))


def chain(previous: bytes, entry: Entry) -> bytes:
    """The running hash of the log up to this entry: equal chains mean equal logs (PROTOCOL §3, I3)."""
    return hashlib.sha256(previous + b"%d:%d:" % (entry.index, entry.term) + entry.body).digest()[:CHAIN_BYTES]


def judge(bad: int, last: int, floor: int) -> None:
    """Raises CorruptLog unless the bad entry is a torn write by PROTOCOL §2.20's rule."""
    if bad == last and bad > floor:
        return
    raise CorruptLog(
        f"journal entry {bad} (of 1..{last}, acknowledged up to {floor}) does not match its checksum: the disk has "
        f"lost acknowledged data. {NOTHING_CHANGED}"
    )
