"""What this voter's log holds: terms by index, configurations, and the newest entries. No disk: the driver persists
what the core appends, and reads from the store what is no longer kept here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from p2p.effects import CONFIG, Config, Entry
from p2p.ids import Index, Term

KEPT_ENTRIES = 4_096
KEPT_BYTES = 32 << 20
NOTHING, NO_TERM, NOBODY = Index(0), Term(0), Config()


@dataclass(frozen=True, slots=True, kw_only=True)
class LogStart:
    """A log as a store gives it at a start; the default is a blank one. `base` is what it begins behind; `runs` are the
    (first index, term) of each run of equal terms; `configs` the configurations in it by index."""

    base: Index = NOTHING
    base_term: Term = NO_TERM  # 0 when the log was compacted by a version that did not write it down
    base_config: Config = NOBODY
    last: Index = NOTHING
    runs: tuple[tuple[Index, Term], ...] = ()
    configs: tuple[tuple[Index, Config], ...] = ()


class Log:
    """`base` < kept entries <= `last`. Index `base` itself is known by its term only."""

    def __init__(self, start: LogStart) -> None:
        self.base, self.base_term, self.base_config = start.base, start.base_term, start.base_config
        self.last = start.last
        self._starts = [int(index) for index, _ in start.runs]
        self._terms = [term for _, term in start.runs]
        self.configs = list(start.configs)
        self._tail: list[Entry] = []  # the newest entries, ending at `last`
        self._tail_bytes = 0

    @property
    def last_term(self) -> Term:
        return self._terms[-1] if self._terms else self.base_term

    @property
    def tail_first(self) -> Index:
        """The first entry kept in memory; last + 1 if none is."""
        return Index(self.last - len(self._tail) + 1)

    @property
    def config(self) -> Config:
        """The newest configuration in the log, committed or not: it counts from the moment it is appended."""
        return self.configs[-1][1] if self.configs else self.base_config

    @property
    def config_index(self) -> Index:
        return self.configs[-1][0] if self.configs else self.base

    def config_at(self, index: Index) -> Config:
        """The configuration in force at `index`."""
        found = self.base_config
        for at, config in self.configs:
            if at > index:
                break
            found = config
        return found

    def term_at(self, index: Index) -> Term | None:
        """None for an index that is not in the log, or of which the term is no longer known."""
        if index > self.last or index < self.base:
            return None
        if index == self.base:
            return self.base_term if self.base_term or not index else None
        return self._terms[bisect_right(self._starts, index) - 1]

    def run_start(self, index: Index) -> Index:
        """The first entry of the run of equal terms that `index` is in."""
        return Index(self._starts[bisect_right(self._starts, index) - 1])

    def last_of(self, term: Term) -> Index | None:
        """The last entry of `term`; None if there is none."""
        for n in range(len(self._terms) - 1, -1, -1):
            if self._terms[n] == term:
                return Index(self._starts[n + 1] - 1) if n + 1 < len(self._starts) else self.last
            if self._terms[n] < term:
                return None
        return None

    def append(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            assert entry.index == self.last + 1, f"entry {entry.index} appended behind {self.last}"
            if entry.term != self.last_term or not self._terms:
                assert entry.term >= self.last_term, f"term {entry.term} behind {self.last_term}"
                self._starts.append(entry.index)
                self._terms.append(entry.term)
            if entry.kind == CONFIG:
                self.configs.append((entry.index, Config.decode(entry.body)))
            self.last = entry.index
            self._tail.append(entry)
            self._tail_bytes += len(entry.body)
        self._trim()

    def _trim(self) -> None:
        if len(self._tail) <= KEPT_ENTRIES and self._tail_bytes <= KEPT_BYTES:
            return
        drop = max(len(self._tail) - KEPT_ENTRIES // 2, 0)
        left = self._tail_bytes - sum(len(entry.body) for entry in self._tail[:drop])
        while left > KEPT_BYTES // 2 and drop < len(self._tail) - 1:
            left -= len(self._tail[drop].body)
            drop += 1
        del self._tail[:drop]
        self._tail_bytes = left

    def truncate(self, first: Index) -> None:
        """Forgets `first` and everything behind it."""
        assert first > self.base, f"truncation at {first}, which is not in the log behind {self.base}"
        keep = max(first - self.tail_first, 0)
        self._tail_bytes -= sum(len(entry.body) for entry in self._tail[keep:])
        del self._tail[keep:]
        self.last = Index(first - 1)
        while self._starts and self._starts[-1] >= first:
            self._starts.pop()
            self._terms.pop()
        while self.configs and self.configs[-1][0] >= first:
            self.configs.pop()

    def slice(self, first: Index, last: Index) -> list[Entry] | None:
        """Entries first..last if all of them are kept in memory."""
        at = first - self.tail_first
        return self._tail[at : at + last - first + 1] if at >= 0 else None

    def compact(self, upto: Index) -> None:
        """Forgets the entries up to `upto`, which a snapshot covers."""
        if upto <= self.base:
            return
        assert upto <= self.last
        term = self.term_at(upto)
        assert term is not None
        self.base_config = self.config_at(upto)
        self.configs = [(at, config) for at, config in self.configs if at > upto]
        drop = bisect_right(self._starts, upto + 1) - 1  # the run that goes on behind it, if there is anything
        del self._starts[:drop], self._terms[:drop]
        if upto == self.last:
            self._starts.clear()
            self._terms.clear()
        else:
            self._starts[0] = upto + 1
        gone = max(upto - self.tail_first + 1, 0)
        self._tail_bytes -= sum(len(entry.body) for entry in self._tail[:gone])
        del self._tail[:gone]
        self.base, self.base_term = upto, term

    def found(self, config: Config) -> None:
        """A blank log gets its first configuration."""
        assert not self.last and not self.config.everyone, "a cluster is founded in a blank log"
        self.base_config = config

    def reset(self, base: Index, term: Term, config: Config) -> None:
        """A snapshot took the place of the whole log."""
        self.__init__(LogStart(base=base, base_term=term, base_config=config, last=base))  # type: ignore[misc]
