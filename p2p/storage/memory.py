"""`LogStore` without a disk, for tests: it can lose what was not synced, tear the last write and flip bits.

It keeps the same bytes and applies the same rule for damage as `disk.DiskLog`; tests/conformance holds both to it. A
write is *staged* (it can be read, as from a disk's cache) until it is synced; a crash keeps the first so many of the
staged ones. Nothing is copied: a staged write remembers how to take itself back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from p2p.effects import CONFIG, Config, Entry, HardState
from p2p.ids import ClusterId, DiskId, Index, NodeId, Term
from p2p.storage import (
    ALL_BYTES,
    CHAIN_BYTES,
    COMPACT_SLICE,
    CopiedStore,
    DiskFull,
    Identity,
    Loaded,
    WrongStore,
    adopted_config,
    check_blank,
    check_recovery,
    check_reset,
    check_truncation,
    sums,
)
from p2p.storage.identity import new_disk_id
from p2p.storage.walk import walk

Record = tuple[Entry, int, bytes]  # entry, checksum, chain


class PowerCut(Exception):
    """The machine went dark in the middle of an append."""


class Staged(NamedTuple):
    """A write that is not synced, and what was there before it."""

    entries: Sequence[Entry]
    end: int  # the last entry that the write left in place
    forgotten: list[Record]
    hard_state: HardState
    acked_floor: Index
    new_hard_state: HardState | None


class MemoryLog:
    """A disk in memory. `fail_next_append` makes the next fsync fail, as a dying disk does. `full` makes every write
    raise DiskFull. `cut_next_append` is the number of entries of the next append that reach the disk before the power
    goes, the last of them torn if `tear`. `new_disk` names disks; a simulator gives its own, to be repeatable."""

    def __init__(self, node: NodeId, *, new_disk: Callable[[], DiskId] = new_disk_id) -> None:
        self.new_disk = new_disk
        self.identity = Identity(ClusterId(""), node, new_disk())
        self.records: list[Record] = []
        self.hard_state = HardState(Term(0), None)
        self.acked_floor = Index(0)
        self.base, self.base_term = Index(0), Term(0)
        self.base_chain = bytes(CHAIN_BYTES)
        self.base_config = Config()
        self.copied = False
        self.staged: list[Staged] = []
        self.fail_next_append: OSError | None = None
        self.full = False
        self.cut_next_append: int | None = None
        self.tear = False
        self.appends = 0
        self._applied = 0
        self._adopt = False

    # -- opening -----------------------------------------------------------------------------------------------------

    def reopened(self, node: NodeId, *, adopt: bool = False, check_copy: bool = True) -> MemoryLog:
        """What a start after a stop or a crash finds. Raises WrongStore and CopiedStore."""
        if node != self.identity.node:
            raise WrongStore(f"this store belongs to node {self.identity.node!r}, not to {node!r}")
        if self.copied and check_copy and not adopt:
            configs = [entry.body for entry, _, _ in self.records if entry.kind == CONFIG]
            newest = Config.decode(configs[-1]) if configs else self.base_config
            raise CopiedStore(
                "this store is a copy. Nothing was changed. Start with --adopt to give it an identity of its own",
                alone=newest.voters == (self.identity.voter,),
            )
        self._adopt = adopt
        return self

    def copy(self) -> MemoryLog:
        """A backup, or the store of a cloned machine: what is synced, in another place."""
        assert not self.staged, "a copy of a disk holds what is on the disk"
        twin = MemoryLog(self.identity.node, new_disk=lambda: self.identity.disk)
        twin.new_disk, twin.copied = self.new_disk, True
        twin.identity, twin.records, twin.hard_state = self.identity, list(self.records), self.hard_state
        twin.acked_floor, twin.base, twin.base_term = self.acked_floor, self.base, self.base_term
        twin.base_chain, twin.base_config = self.base_chain, self.base_config
        return twin

    def load(self, *, applied: Index) -> Loaded:
        """See `p2p.storage.LogStore.load`."""
        assert not self.staged, "a start finds what a crash left: say crash() or sync() first"
        floor = max(self.acked_floor, applied)
        rows = ((e.index, e.term, crc, link, e.body, e.kind) for e, crc, link in self.records)
        end = self.records[-1][0].index if self.records else self.base
        found = walk(rows, self.base, self.base_chain, end, floor)
        del self.records[found.last - self.base :]
        self._applied = applied
        if self._adopt:
            old = self.identity
            self.identity = Identity(old.cluster, old.node, self.new_disk())
            if not found.configs:
                self.base_config = adopted_config(self.base_config, old.voter, self.identity.voter)
        self._adopt = self.copied = False
        return Loaded(
            self.identity,
            self.hard_state,
            Index(self.base + 1),
            found.last,
            Index(floor),
            found.torn,
            self.base,
            self.base_term,
            self.base_config,
            found.runs,
            found.configs,
        )

    # -- writing -----------------------------------------------------------------------------------------------------

    def append(
        self,
        entries: Sequence[Entry],
        hard_state: HardState | None,
        acked_floor: Index,
        truncate: Index | None = None,
    ) -> None:
        """See `p2p.storage.LogStore.append`. What was staged before is synced with it."""
        self.stage(entries, hard_state, acked_floor, truncate)
        cut, self.cut_next_append = self.cut_next_append, None
        if cut is not None:
            self._arrive_in_part(self.staged.pop(), cut, torn=self.tear)
            self.sync()
            raise PowerCut
        self.sync()

    def stage(
        self,
        entries: Sequence[Entry],
        hard_state: HardState | None,
        acked_floor: Index,
        truncate: Index | None = None,
    ) -> None:
        """An append that is on its way: it can be read, and is durable after the next `sync`. The arguments are those
        of a Persist without its number. Raises what `append` does; then nothing was staged."""
        self._can_write()
        end = self.base + len(self.records)
        if truncate is not None:
            check_truncation(truncate, max(self.acked_floor, self._applied, self.base))
            end = min(end, truncate - 1)
        assert not entries or entries[0].index == end + 1, f"entry {entries[0].index} would follow entry {end}"
        forgotten = self.records[end - self.base :]
        self.staged.append(Staged(entries, end, forgotten, self.hard_state, self.acked_floor, hard_state))
        self.appends += 1
        self._write(end, entries)
        self.hard_state = hard_state or self.hard_state
        self.acked_floor = max(self.acked_floor, acked_floor)

    def sync(self) -> None:
        """Everything staged is durable."""
        self.staged.clear()

    def crash(self, keep: int | None = None, *, torn: bool = False) -> None:
        """The power goes: of the staged writes the first `keep` reached the disk (all, if it is not said), the last of
        those with its last entry torn. A write without entries is too small to be torn: it then did not reach it."""
        keep = len(self.staged) if keep is None else keep
        while len(self.staged) > keep:
            self._take_back(self.staged.pop())
        if torn and self.staged:
            last = self.staged.pop()
            if last.entries:
                self._arrive_in_part(last, len(last.entries), torn=True)
            else:
                self._take_back(last)
        self.sync()

    def _can_write(self) -> None:
        if self.fail_next_append is not None:
            raise self.fail_next_append
        if self.full:
            raise DiskFull("no room for this write")

    def _write(self, end: int, entries: Sequence[Entry]) -> None:
        del self.records[end - self.base :]
        running = self.records[-1][2] if self.records else self.base_chain
        for entry in entries:
            crc, running = sums(running, entry)
            self.records.append((entry, crc, running))

    def _take_back(self, write: Staged) -> None:
        del self.records[write.end - self.base :]
        self.records += write.forgotten
        self.hard_state, self.acked_floor = write.hard_state, write.acked_floor

    def _arrive_in_part(self, write: Staged, reached: int, *, torn: bool) -> None:
        """A write comes in the order: term and vote, forget, append, floor. (SQLite's comes whole or not at all; the
        rule for damage must stand this worse disk too.)"""
        self._take_back(write)
        self.hard_state = write.new_hard_state or self.hard_state
        self._write(write.end, write.entries[:reached])
        if torn and write.entries[:reached]:
            self.flip(self.records[-1][0].index)

    def compact(self, upto: Index) -> int:
        """See `p2p.storage.LogStore.compact`. Like every other change than an append, it syncs what is staged: one
        thread does one after the other."""
        end = min(self.base + COMPACT_SLICE, upto)
        if end <= self.base:
            return 0
        self._can_write()
        self.sync()
        gone = self.records[: end - self.base]
        assert len(gone) == end - self.base, f"compaction up to {end}, which is not in the log"
        del self.records[: len(gone)]
        entry, _, self.base_chain = gone[-1]
        self.base, self.base_term = entry.index, entry.term
        for entry, _, _ in gone:
            if entry.kind == CONFIG:
                self.base_config = Config.decode(entry.body)
        return upto - end

    def reset(self, index: Index, term: Term, chain: bytes, config: Config) -> None:
        """See `p2p.storage.LogStore.reset`."""
        check_reset(index, max(self.acked_floor, self._applied))
        self._can_write()
        self.sync()
        self.records.clear()
        self.base, self.base_term, self.base_chain, self.base_config = index, term, chain, config
        self.acked_floor = index

    def found(self, cluster: ClusterId, config: Config) -> None:
        """See `p2p.storage.LogStore.found`."""
        check_blank(self.identity.cluster, cluster)
        assert not self.records, "a store that belongs to no cluster has no entries"
        self._can_write()
        self.sync()
        self.identity = Identity(cluster, self.identity.node, self.identity.disk)
        self.base_config = config

    def join(self, cluster: ClusterId) -> None:
        """See `p2p.storage.LogStore.join`."""
        if self.identity.cluster == cluster:
            return
        check_blank(self.identity.cluster, cluster)
        self._can_write()
        self.sync()
        self.identity = Identity(cluster, self.identity.node, self.identity.disk)

    def recover(self, cluster: ClusterId, config: Config) -> None:
        """See `p2p.storage.LogStore.recover`."""
        last = Index(self.base + len(self.records))
        check_recovery(self.identity.cluster, cluster, self.identity.node, config, last)
        self._can_write()
        self.sync()
        term = Term(max(self.hard_state.term, self.term_at(last) or 0) + 1)
        entry = Entry(Index(last + 1), term, config.encode(), CONFIG)
        self._write(last, (entry,))
        self.identity = Identity(cluster, self.identity.node, self.identity.disk)
        self.hard_state, self.acked_floor = HardState(term, config.voters[0]), entry.index

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, first: Index, last: Index, most_bytes: int = ALL_BYTES) -> list[Entry]:
        """See `p2p.storage.LogStore.read`."""
        found: list[Entry] = []
        for at in range(max(first - self.base - 1, 0), min(last - self.base, len(self.records))):
            entry = self.records[at][0]
            most_bytes -= len(entry.body)
            if most_bytes < 0 and found:
                break
            found.append(entry)
        return found

    def chain_at(self, index: Index) -> bytes | None:
        """See `p2p.storage.LogStore.chain_at`."""
        if index == self.base:
            return self.base_chain
        kept = self.base < index <= self.base + len(self.records)
        return self.records[index - self.base - 1][2] if kept else None

    def term_at(self, index: Index) -> Term | None:
        """See `p2p.storage.LogStore.term_at`."""
        if index == self.base:
            return self.base_term if self.base_term or index == 0 else None
        kept = self.base < index <= self.base + len(self.records)
        return self.records[index - self.base - 1][0].term if kept else None

    def close(self) -> None: ...

    def flip(self, index: Index) -> None:
        """Damages the body of one stored entry."""
        at = index - self.base - 1
        entry, crc, link = self.records[at]
        self.records[at] = (entry._replace(body=entry.body + b"!"), crc, link)
