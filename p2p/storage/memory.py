"""`LogStore` without a disk, for tests: it can lose what was not synced, tear the last write and flip bits.

It keeps the same bytes and applies the same rule for damage as `disk.DiskLog`; tests/conformance holds both to it.
"""

from __future__ import annotations

from collections.abc import Sequence

from p2p.effects import Entry, HardState
from p2p.ids import Index, NodeId, Term, new_cluster_id, new_disk_id
from p2p.storage import CHAIN_BYTES, Identity, Loaded, chain, checksum, judge

Record = tuple[Entry, int, bytes]  # entry, checksum, chain


class MemoryLog:
    """A disk in memory. `fail_next_append` makes the next fsync fail, as a dying disk does."""

    def __init__(self, node: NodeId) -> None:
        self.identity = Identity(new_cluster_id(), node, new_disk_id())
        self.records: list[Record] = []
        self.hard_state = HardState(Term(0), None)
        self.acked_floor = Index(0)
        self.base = Index(0)
        self.base_chain = bytes(CHAIN_BYTES)
        self.fail_next_append: OSError | None = None

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
        for entry in entries:
            running = self.records[-1][2] if self.records else self.base_chain
            self.records.append((entry, checksum(entry), chain(running, entry)))
        self.hard_state = hard_state or self.hard_state
        self.acked_floor = max(self.acked_floor, acked_floor)

    def read(self, first: Index, last: Index) -> list[Entry]:
        """See `p2p.storage.LogStore.read`."""
        return [entry for entry, _, _ in self.records if first <= entry.index <= last]

    def compact(self, upto: Index) -> int:
        """See `p2p.storage.LogStore.compact`."""
        while self.records and self.base < upto:
            entry, _, link = self.records.pop(0)
            self.base, self.base_chain = entry.index, link
        return 0

    def close(self) -> None: ...

    def flip(self, index: Index) -> None:
        """Damages the body of one stored entry."""
        at = index - self.base - 1
        entry, crc, link = self.records[at]
        self.records[at] = (Entry(entry.index, entry.term, entry.body + b"!"), crc, link)
