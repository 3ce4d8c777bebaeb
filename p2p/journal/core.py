"""The pointers of the log and when they may move. Sans-IO; the term belongs to `p2p.replica`.

Raft §5.3: a leader appends, counts who holds what on disk, and commits what a majority holds *of its own term*
(§5.4.2); what came before is committed with it. A follower takes what follows an entry that it has, cuts off what
contradicts it, and never cuts off what is committed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from p2p.effects import COMMAND, Entry
from p2p.ids import Index, Term, VoterId
from p2p.journal.log import Log, LogStart
from p2p.quorum import committed


class Accepted(NamedTuple):
    """What a follower makes of an Append: what to cut off, what to write behind it, and up to where its log is then
    known to equal the leader's."""

    truncate: Index | None
    entries: tuple[Entry, ...]
    verified: Index


class Conflict(NamedTuple):
    """The follower has no such entry, or another one there: where the leader should look next."""

    term: Term  # 0: it has none there
    first: Index


class _Writing(NamedTuple):
    """A write on its way to the disk: `last` is the log's end after it."""

    seq: int
    last: Index
    began: float


class JournalCore:
    """One voter's log. `stable_index`: everything up to it is on this voter's disk."""

    def __init__(self, me: VoterId, start: LogStart, *, applied: Index) -> None:
        self.me = me
        self.log = Log(start)
        self.stable_index = start.last
        self.commit_index = max(applied, start.base)
        self.applied_index = applied
        self.term_start = Index(start.last + 1)  # index of this term's no-op: nothing before it commits by count alone
        self.verified = Index(0)  # up to here the log is known to equal that of the leader of this term
        self._writing: deque[_Writing] = deque()
        self._seq = 0

    @property
    def last_index(self) -> Index:
        return self.log.last

    @property
    def last(self) -> tuple[Term, Index]:
        """By this pair logs are compared: the later term wins, then the longer log (§5.4.1)."""
        return (self.log.last_term, self.log.last)

    # -- writing -----------------------------------------------------------------------------------------------

    def append(self, term: Term, bodies: Sequence[bytes], kind: int = COMMAND) -> tuple[Entry, ...]:
        """Gives the bodies the next indexes. They are not durable until `written` says so."""
        first = self.log.last + 1
        entries = tuple(Entry(Index(first + n), term, body, kind) for n, body in enumerate(bodies))
        self.log.append(entries)
        return entries

    def accept(self, prev: Index, prev_term: Term, entries: Sequence[tuple[int, int, bytes]]) -> Accepted | Conflict:
        """A leader's entries behind `prev`; changes the log. What is committed here is equal there (Leader
        Completeness), so it is neither compared nor needed."""
        log = self.log
        skip = max(self.commit_index - prev, 0)
        if skip:
            end = Index(prev + len(entries))
            if skip >= len(entries):
                self.verified = max(self.verified, end)
                return Accepted(None, (), self.verified)
            prev, entries = self.commit_index, entries[skip:]
        elif prev > log.last:
            return Conflict(Term(0), Index(log.last + 1))
        elif prev > self.commit_index and (found := log.term_at(prev)) != prev_term:
            assert found is not None
            return Conflict(found, max(log.run_start(prev), Index(self.commit_index + 1)))
        new = [Entry(Index(prev + 1 + n), Term(t), body, kind) for n, (t, kind, body) in enumerate(entries)]
        known = 0
        while known < len(new) and log.term_at(new[known].index) == new[known].term:
            known += 1
        fresh = tuple(new[known:])
        truncate = None
        if fresh and fresh[0].index <= log.last:
            truncate = fresh[0].index
            assert truncate > self.commit_index, f"a leader contradicts entry {truncate}, which is committed"
            self.stable_index = min(self.stable_index, Index(truncate - 1))
            self._writing = deque(w._replace(last=min(w.last, Index(truncate - 1))) for w in self._writing)
            log.truncate(truncate)
        log.append(fresh)
        self.verified = max(self.verified, Index(prev + len(entries)))
        return Accepted(truncate, fresh, self.verified)

    def write(self, now: float) -> int:
        """The number of the write that makes the log as it is now durable."""
        self._seq += 1
        self._writing.append(_Writing(self._seq, self.log.last, now))
        return self._seq

    def written(self, seq: int) -> None:
        """The disk holds everything up to write number `seq`."""
        while self._writing and self._writing[0].seq <= seq:
            self.stable_index = max(self.stable_index, self._writing.popleft().last)

    def forget_writes(self) -> None:
        """The log was replaced: writes of the old one that are still under way say nothing about the new one."""
        self._writing = deque(w._replace(last=Index(0)) for w in self._writing)

    @property
    def write_began(self) -> float | None:
        """When the oldest write that is under way began; None if none is."""
        return self._writing[0].began if self._writing else None

    # -- committing --------------------------------------------------------------------------------------------

    def commit_by(self, match: Mapping[VoterId, Index], voters: Sequence[VoterId]) -> bool:
        """A leader's count: whether it commits anything new."""
        held = [self.stable_index if voter == self.me else match.get(voter, Index(0)) for voter in voters]
        index = committed(held)
        if index <= self.commit_index or index < self.term_start:
            return False
        self.commit_index = Index(index)
        return True

    def commit_upto(self, leader_commit: Index) -> bool:
        """A follower's: as far as the leader says, but no further than its log is known to equal the leader's."""
        index = min(leader_commit, self.verified)
        if index <= self.commit_index:
            return False
        self.commit_index = index
        return True

    def applied(self, index: Index) -> None:
        """The state machine has applied everything up to `index`."""
        assert self.applied_index <= index <= self.commit_index, f"applied {index} outside the committed log"
        self.applied_index = index

    def check_invariants(self) -> None:
        """Raises AssertionError if the pointers contradict each other; run after every step under test."""
        log = self.log
        assert 0 <= log.base <= log.last
        assert 0 <= self.applied_index <= self.commit_index <= log.last
        assert log.base <= self.commit_index
        assert 0 <= self.stable_index <= log.last
        assert all(w.last <= log.last for w in self._writing)
        assert log.tail_first > log.base or log.tail_first == log.last + 1
        assert all(log.base < at <= log.last for at, _ in log.configs)
