"""Where the journal's entries and the voter's hard state are kept. Decides what is damaged, not what is true.

Twins: `disk.DiskLog` (SQLite, fsync) and `memory.MemoryLog` (a disk that can be crashed, torn and flipped under test).
Both pass tests/conformance. The rule for damage is PROTOCOL §2.20: a bad *last* entry that was never acknowledged is a
torn write and is cut off; anything else is refused, never truncated. `walk` applies it. `identity` tells a store from
a copy of it, `lock` keeps a data directory to one process, `glance` looks at a store without opening it for use.

A log has a beginning that moves: what lies at and before `base` is in a snapshot of the state, and only the term, the
chain and the configuration there are remembered. Compaction moves it forward entry by entry, an installed snapshot
(`LogStore.reset`) at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol
from zlib import crc32

from p2p.effects import COMMAND, Config, Entry, HardState
from p2p.ids import ClusterId, DiskId, Index, NodeId, Term, VoterId, node_of, voter_id
from p2p.journal.log import LogStart

CHAIN_BYTES = 16
COMPACT_SLICE = 2_000  # entries forgotten between two batches
ALL_BYTES = 1 << 62
NOTHING_CHANGED = (
    "Nothing was changed. Restore this data directory from a backup, or move it aside to start an empty node"
)


class StorageError(Exception):
    """Base of what can be wrong with a store; the message says what and what to do."""


class CorruptLog(StorageError):
    """An entry that may have been acknowledged does not match its checksum. Nothing was changed."""


class WrongStore(StorageError):
    """The store belongs to another node or cluster, or is of another format."""


class CopiedStore(WrongStore):
    """The file is a copy of a store, from a backup or a cloned image. Start with --adopt to give it an identity of its
    own. `alone`: its cluster has no other voter, so that nobody can hold the copy against the original."""

    def __init__(self, message: str, *, alone: bool) -> None:
        super().__init__(message)
        self.alone = alone


class DiskFull(StorageError):
    """There is no room for this write. Nothing of it was written, and the store can be used on."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose store this is. `cluster` is empty until the store is founded or joins one."""

    cluster: ClusterId
    node: NodeId
    disk: DiskId

    @property
    def voter(self) -> VoterId:
        return voter_id(self.node, self.disk)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a store holds. `torn` counts the never-acknowledged entries that were cut off its end."""

    identity: Identity
    hard_state: HardState
    first: Index  # first entry still kept; last + 1 if none
    last: Index
    acked_floor: Index
    torn: int
    base: Index  # the log begins behind this entry
    base_term: Term  # 0 behind entry 0, and where a compacted log of format 1 did not tell it
    base_config: Config
    runs: tuple[tuple[Index, Term], ...]  # the first index of each run of equal terms, ascending, of what is kept
    configs: tuple[tuple[Index, Config], ...]  # the CONFIG entries that are kept, ascending
    moved: bool = False  # another machine than the one this identity was made on: a new container, or a clone of it

    @property
    def start(self) -> LogStart:
        """The log as a replica begins with it."""
        return LogStart(
            base=self.base,
            base_term=self.base_term,
            base_config=self.base_config,
            last=self.last,
            runs=self.runs,
            configs=self.configs,
        )


class LogStore(Protocol):
    """One thread owns a store. Each method that writes is one transaction with one fsync, and raises DiskFull if there
    is no room for it. Any other I/O error is fatal to the caller: after a failed fsync nobody knows what the disk holds
    (Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020)."""

    def load(self, *, applied: Index) -> Loaded:
        """Verifies everything kept, then makes the changes that opening asked for (a torn end, an older format, an
        adopted copy). `applied` is what the state machine has applied: it was committed, so it counts as acknowledged.
        Comes first of all; only `reset` may come before it, for a state that was installed and a log that is still
        the old one. Raises CorruptLog."""

    def append(
        self,
        entries: Sequence[Entry],
        hard_state: HardState | None,
        acked_floor: Index,
        truncate: Index | None = None,
    ) -> None:
        """Forgets every entry from `truncate` on, if given, then appends. Durable when it returns, all of it or none.
        To truncate what was acknowledged is our own bug and an AssertionError."""

    def read(self, first: Index, last: Index, most_bytes: int = ALL_BYTES) -> list[Entry]:
        """Entries first..last, both included, as far as they are kept and their bodies fit into `most_bytes`; at
        least one."""

    def compact(self, upto: Index) -> int:
        """Forgets a bounded slice of the entries up to `upto`; answers how many are left to forget."""

    def chain_at(self, index: Index) -> bytes | None:
        """The log's running hash up to an entry that is kept, or at the base; None if it is not known."""

    def term_at(self, index: Index) -> Term | None:
        """The term of an entry that is kept, or of the base; None if it is not known."""

    def reset(self, index: Index, term: Term, chain: bytes, config: Config) -> None:
        """A snapshot was installed: forgets the whole log, which now begins behind `index`, with everything up to
        there acknowledged. Term and vote stay. Doing it again changes nothing."""

    def found(self, cluster: ClusterId, config: Config) -> None:
        """A blank store becomes one of a new cluster's, with `config` before its first entry (PROTOCOL §2.9). Raises
        WrongStore if it belongs to a cluster already."""

    def join(self, cluster: ClusterId) -> None:
        """A blank store becomes one of an existing cluster's. Raises WrongStore if it belongs to another one."""

    def recover(self, cluster: ClusterId, config: Config) -> None:
        """The majority is lost for good, and a person has decided: this store goes on, alone, as a new cluster's.
        Appends `config`, of this node only, as the entry of a new term in which it has voted for itself, with every
        entry up to there acknowledged. What the log held is kept, committed or not: of what lies beyond the last known
        commit nobody is left who could say. Raises WrongStore for a store that has nothing to go on with."""

    def close(self) -> None: ...


def checksum(entry: Entry) -> int:
    """CRC-32 of the entry with its index and term, and its kind if that is not COMMAND."""
    return sums(b"", entry)[0]


def chain(previous: bytes, entry: Entry) -> bytes:
    """The running hash of the log up to this entry: equal chains mean equal logs (PROTOCOL §3, I3)."""
    return sums(previous, entry)[1]


def sums(previous: bytes, entry: Entry) -> tuple[int, bytes]:
    """Both of the above. For a command they are what they were in format 1, which knew nothing else; no command's body
    can make it look like another kind, whose slash comes before the first colon."""
    index, term, body, kind = entry
    head = b"%d:%d" % (index, term) if kind == COMMAND else b"%d/%d:%d" % (kind, index, term)
    return crc32(body, crc32(head)), sha256(b"%b%b:%b" % (previous, head, body)).digest()[:CHAIN_BYTES]


def judge(bad: int, last: int, floor: int) -> None:
    """Raises CorruptLog unless the bad entry is a torn write by PROTOCOL §2.20's rule."""
    if bad == last and bad > floor:
        return
    raise CorruptLog(
        f"journal entry {bad} (of 1..{last}, acknowledged up to {floor}) does not match its checksum: the disk has "
        f"lost acknowledged data. {NOTHING_CHANGED}"
    )


def check_truncation(truncate: Index, floor: int) -> None:
    """AssertionError if entries that were acknowledged would be forgotten."""
    assert truncate > floor, f"truncation from {truncate}, but everything up to {floor} was acknowledged"


def check_reset(index: Index, floor: int) -> None:
    """AssertionError if an installed snapshot would take back what was acknowledged."""
    assert index >= floor, f"a snapshot of {index}, but everything up to {floor} was acknowledged"


def check_blank(mine: ClusterId, wanted: ClusterId) -> None:
    """Raises WrongStore if the store belongs to a cluster."""
    assert wanted, "a cluster has a name"
    if mine:
        raise WrongStore(
            f"this store belongs to cluster {mine}, not to {wanted}: one data directory holds one identity. "
            f"Start with another --data-dir, or move this one aside"
        )


def check_recovery(mine: ClusterId, wanted: ClusterId, node: NodeId, config: Config, last: Index) -> None:
    """Raises WrongStore if there is nothing to recover; AssertionError for our own bugs."""
    assert wanted and wanted != mine, "what is recovered is a cluster of another name"
    assert len(config.everyone) == 1 and [node_of(voter) for voter in config.voters] == [node], "of this node only"
    if not mine or not last:
        raise WrongStore("this store holds no entry of any cluster: there is nothing to recover")


def adopted_config(config: Config, old: VoterId, new: VoterId) -> Config:
    """The configuration of an adopted copy: a cluster's only voter stays that, under its new name; of any other cluster
    the copy is no voter until it is added (PROTOCOL §2.10)."""
    return config._replace(voters=(new,)) if config.voters == (old,) else config
