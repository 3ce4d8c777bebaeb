"""A voter's disk: a queue of writes, fsyncs that take time, and crashes that keep what they like of the rest.

Knows no time of its own: `node.py` says when the write under way is done. What `durable` holds survives everything but
`wipe`; the checkers look at it and nowhere else.
"""

from __future__ import annotations

import random
from collections import deque
from typing import NamedTuple

from p2p.effects import CONFIG, Config, Entry, HardState, Persist, SnapshotMeta
from p2p.ids import DiskId, Index, Term, VoterId
from p2p.journal.log import LogStart


class Reset(NamedTuple):
    """The log is to begin behind an installed snapshot."""

    source: VoterId
    meta: SnapshotMeta


class Disk:
    """`queue` holds what was asked for and is not durable, oldest first; `writing` of them are in the fsync under
    way. `number` tells a completion whether its write is still that one."""

    def __init__(self, disk: DiskId, config: Config) -> None:
        self.id = disk
        self.hard_state = HardState(Term(0), None)
        self.base, self.base_term, self.base_config = Index(0), Term(0), config
        self.entries: list[Entry] = []
        self.floor = Index(0)
        self.queue: deque[Persist | Reset] = deque()
        self.writing = 0
        self.number = 0
        self.full = False
        self.hung_until = 0.0
        self.slow = 1.0

    # -- what is durable -----------------------------------------------------------------------------------------

    @property
    def last(self) -> int:
        return self.base + len(self.entries)

    def term_at(self, index: int) -> int | None:
        if index == self.base:
            return self.base_term
        at = index - self.base - 1
        return self.entries[at].term if 0 <= at < len(self.entries) else None

    def holds(self, index: int, term: int) -> bool:
        """Whether this entry, or a snapshot that covers it, is on the disk."""
        return index <= self.base or self.term_at(index) == term

    def read(self, first: int, last: int, most_bytes: int = 1 << 62) -> list[Entry]:
        if first <= self.base:
            return []
        found, size = [], 0
        for entry in self.entries[first - self.base - 1 : max(last - self.base, 0)]:
            if found and size + len(entry.body) > most_bytes:
                break
            size += len(entry.body)
            found.append(entry)
        return found

    def start(self) -> LogStart:
        """What a start finds."""
        runs: list[tuple[Index, Term]] = []
        configs: list[tuple[Index, Config]] = []
        for entry in self.entries:
            if not runs or runs[-1][1] != entry.term:
                runs.append((entry.index, entry.term))
            if entry.kind == CONFIG:
                configs.append((entry.index, Config.decode(entry.body)))
        return LogStart(
            base=self.base,
            base_term=self.base_term,
            base_config=self.base_config,
            last=Index(self.last),
            runs=tuple(runs),
            configs=tuple(configs),
        )

    # -- writing -------------------------------------------------------------------------------------------------

    def next_batch(self, most: int) -> int:
        """How many of the queue go into the next fsync: writes share one, but not with what cuts something off."""
        n = 0
        for item in self.queue:
            if n and (n >= most or isinstance(item, Reset) or item.truncate is not None):
                break
            n += 1
            if isinstance(item, Reset):
                break
        return n

    def done(self) -> list[Persist | Reset]:
        """The fsync under way is over: what it wrote is durable now."""
        finished = [self.queue.popleft() for _ in range(self.writing)]
        self.writing = 0
        for item in finished:
            self._write(item)
        return finished

    def _write(self, item: Persist | Reset) -> None:
        if isinstance(item, Reset):
            self.reset(item.meta)
            return
        if item.truncate is not None:
            assert item.truncate > self.floor, f"cut off at {item.truncate}; up to {self.floor} was acknowledged"
            del self.entries[item.truncate - self.base - 1 :]
        for entry in item.entries:
            assert entry.index == self.last + 1, f"entry {entry.index} written behind {self.last}"
            self.entries.append(entry)
        self.hard_state = item.hard_state or self.hard_state
        self.floor = max(self.floor, item.acked_floor)

    def reset(self, meta: SnapshotMeta) -> None:
        assert meta.index >= self.floor, f"a snapshot of {meta.index}; up to {self.floor} was acknowledged"
        self.base, self.base_term, self.base_config = meta.index, meta.term, meta.config
        self.entries.clear()
        self.floor = max(self.floor, meta.index)

    def compact(self, upto: int) -> None:
        upto = min(upto, self.last)
        if upto <= self.base:
            return
        for entry in self.entries[: upto - self.base]:
            if entry.kind == CONFIG:
                self.base_config = Config.decode(entry.body)
        self.base_term = Term(self.term_at(upto) or 0)
        del self.entries[: upto - self.base]
        self.base = Index(upto)

    # -- dying ---------------------------------------------------------------------------------------------------

    def crash(self, keep: int, tear: random.Random | None) -> None:
        """Of the writes that were not durable the first `keep` are; of the next one perhaps a part: its term and vote,
        and the entries before the torn one."""
        pending = list(self.queue)
        self.queue.clear()
        self.writing = 0
        self.number += 1
        for item in pending[:keep]:
            self._write(item)
        if keep < len(pending) and tear is not None and isinstance(item := pending[keep], Persist) and item.entries:
            whole = tear.randrange(len(item.entries))
            floor = Index(min(item.acked_floor, item.entries[0].index - 1 + whole))
            self._write(Persist(item.seq, item.entries[:whole], item.hard_state, floor, item.truncate))

    def copy(self) -> Disk:
        """A backup of what is durable."""
        twin = Disk(self.id, self.base_config)
        twin.hard_state, twin.base, twin.base_term = self.hard_state, self.base, self.base_term
        twin.entries, twin.floor = list(self.entries), self.floor
        return twin
