"""`LogStore` without a disk, for tests: it can lose what was not synced, tear the last write and flip bits.

It keeps the same bytes and applies the same rule for damage as `disk.DiskLog`; tests/conformance holds both to it.
"""

from __future__ import annotations

from collections.abc import Sequence

from p2p.effects import Entry, HardState
from p2p.ids import Index, NodeId, Term
from p2p.storage import CHAIN_BYTES, COMPACT_SLICE, Identity, Loaded, WrongStore, chain, checksum, judge
from p2p.storage.identity import new_cluster_id, new_disk_id

Record = tuple[Entry, int, bytes]  # entry, checksum, chain


class PowerCut(Exception):
    """The machine went dark in the middle of an append."""


class MemoryLog:
    """A disk in memory. `fail_next_append` makes the next fsync fail, as a dying disk does. `cut_next_append` is the
    number of entries of the next append that reach the disk before the power goes, the last of them torn if `tear`."""

    def __init__(self, node: NodeId) -> None:
        self.identity = Identity(new_cluster_id(), node, new_disk_id())
        self.records: list[Record] = []
        self.hard_state = HardState(Term(0), None)
        self.acked_floor = Index(0)
        self.base = Index(0)
        self.base_chain = bytes(CHAIN_BYTES)
        self.fail_next_append: OSError | None = None
        self.cut_next_append: int | None = None
        self.tear = False
        self.appends = 0

    def reopened(self, node: NodeId) -> MemoryLog:
        """What a start after a stop or a crash finds. Raises WrongStore."""
        if node != self.identity.node:
            raise WrongStore(f"this store belongs to node {self.identity.node!r}, not to {node!r}")
        return self

    def load(self, *, applied: Index) -> Loaded:
        """See `p2p.storage.LogStore.load`."""
        floor = max(self.acked_floor, applied)
        running, expected, torn = self.base_chain, self.base + 1, 0
        end = self.records[-1][0].index if self.records else self.base
        for entry, crc, link in self.records:
            link_now = chain(running, entry)
            if entry.index != expected or checksum(entry) != crc or link_now != link:
                judge(expected, end, floor)
                torn = 1
                break
            running, expected = link_now, expected + 1
        last = expected - 1
        if floor > last:
            judge(last + 1, floor, floor)
        del self.records[last - self.base :]
        return Loaded(self.identity, self.hard_state, Index(self.base + 1), Index(last), Index(floor), torn)

    def append(self, entries: Sequence[Entry], hard_state: HardState | None, acked_floor: Index) -> None:
        """See `p2p.storage.LogStore.append`."""
        if self.fail_next_append is not None:
            raise self.fail_next_append
        self.appends += 1
        cut, self.cut_next_append = self.cut_next_append, None
        for entry in entries[:cut]:
            running = self.records[-1][2] if self.records else self.base_chain
            self.records.append((entry, checksum(entry), chain(running, entry)))
        if cut is not None:
            if self.tear and entries[:cut]:
                self.flip(self.records[-1][0].index)
            raise PowerCut
        self.hard_state = hard_state or self.hard_state
        self.acked_floor = max(self.acked_floor, acked_floor)

    def read(self, first: Index, last: Index) -> list[Entry]:
        """See `p2p.storage.LogStore.read`."""
        return [entry for entry, _, _ in self.records if first <= entry.index <= last]

    def compact(self, upto: Index) -> int:
        """See `p2p.storage.LogStore.compact`."""
        end = min(self.base + COMPACT_SLICE, upto)
        while self.records and self.base < end:
            entry, _, link = self.records.pop(0)
            self.base, self.base_chain = entry.index, link
        return max(upto - self.base, 0)

    def close(self) -> None: ...

    def flip(self, index: Index) -> None:
        """Damages the body of one stored entry."""
        at = index - self.base - 1
        entry, crc, link = self.records[at]
        self.records[at] = (Entry(entry.index, entry.term, entry.body + b"!"), crc, link)
