"""The log in memory against the simplest one there is: a list of entries that forgets nothing."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2p.effects import COMMAND, CONFIG, Config, Entry
from p2p.ids import Index, Term, VoterId
from p2p.journal import log as log_module
from p2p.journal.log import Log, LogStart


def config(number: int) -> Config:
    return Config((VoterId(f"n{number}@d"),))


def entries(*terms: int, first: int = 1) -> list[Entry]:
    return [Entry(Index(at), Term(term), b"x") for at, term in enumerate(terms, first)]


def log_of(*terms: int) -> Log:
    log = Log(LogStart())
    log.append(entries(*terms))
    return log


class LogModel(RuleBasedStateMachine):
    """`all` holds every entry since 1 (index 0 of the list); `base` what is forgotten."""

    @initialize(kept=st.sampled_from([4, 16, 4_096]), bytes_kept=st.sampled_from([8, 64, 1 << 20]))
    def begin(self, kept: int, bytes_kept: int) -> None:
        self.limits = pytest.MonkeyPatch()
        self.limits.setattr(log_module, "KEPT_ENTRIES", kept)
        self.limits.setattr(log_module, "KEPT_BYTES", bytes_kept)
        self.all: list[Entry] = []
        self.base, self.base_known = 0, True
        self.founded = Config()
        self.log = Log(LogStart())

    def teardown(self) -> None:
        if hasattr(self, "limits"):
            self.limits.undo()

    # -- the model ---------------------------------------------------------------------------------------------

    @property
    def last(self) -> int:
        return len(self.all)

    def term(self, index: int) -> int | None:
        if index < self.base or index > self.last:
            return None
        if index == self.base:
            return (self.all[index - 1].term if index else 0) if self.base_known else None
        return self.all[index - 1].term

    def config_at(self, index: int) -> Config:
        found = self.founded
        for entry in self.all[:index]:
            if entry.kind == CONFIG:
                found = Config.decode(entry.body)
        return found

    # -- what can happen ---------------------------------------------------------------------------------------

    @precondition(lambda self: not self.all and not self.founded.voters)
    @rule(number=st.integers(1, 3))
    def found(self, number: int) -> None:
        self.founded = config(number)
        self.log.found(self.founded)

    @rule(risen=st.lists(st.integers(0, 2), min_size=1, max_size=6), size=st.integers(0, 30))
    def append(self, risen: list[int], size: int) -> None:
        term = self.all[-1].term if self.all else 1
        new = []
        for by in risen:
            term = Term(term + by)
            new.append(Entry(Index(self.last + len(new) + 1), term, b"x" * size))
        self.all += new
        self.log.append(new)

    @rule(number=st.integers(1, 5))
    def append_config(self, number: int) -> None:
        term = self.all[-1].term if self.all else Term(1)
        entry = Entry(Index(self.last + 1), term, config(number).encode(), CONFIG)
        self.all.append(entry)
        self.log.append([entry])

    @precondition(lambda self: self.last > self.base)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        first = data.draw(st.integers(self.base + 1, self.last + 1))
        del self.all[first - 1 :]
        self.log.truncate(Index(first))

    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        upto = data.draw(st.integers(0, self.last))
        self.log.compact(Index(upto))
        if upto > self.base:
            self.base, self.base_known = upto, True

    @rule(gap=st.integers(0, 5), number=st.integers(1, 5))
    def reset(self, gap: int, number: int) -> None:
        """What came before is filled with entries that nobody can ask for."""
        self.base, self.base_known = self.last + gap + 1, True
        term = Term(self.all[-1].term + 1 if self.all else 1)
        self.all += [Entry(Index(at), term, b"") for at in range(self.last + 1, self.base)]
        self.all.append(Entry(Index(self.base), term, config(number).encode(), CONFIG))
        self.log.reset(Index(self.base), term, config(number))

    @rule(forgot=st.booleans())
    def restart(self, forgot: bool) -> None:
        """What a store would tell at a start; one of the first format has forgotten the term of its base."""
        self.base_known &= not forgot or not self.base
        kept = self.all[self.base :]
        runs = tuple((next(run).index, term) for term, run in groupby(kept, key=lambda entry: entry.term))
        self.log = Log(
            LogStart(
                base=Index(self.base),
                base_term=Term(self.term(self.base) or 0),
                base_config=self.config_at(self.base),
                last=Index(self.last),
                runs=runs,
                configs=tuple((e.index, Config.decode(e.body)) for e in kept if e.kind == CONFIG),
            )
        )

    # -- what must be so ---------------------------------------------------------------------------------------

    @invariant()
    def the_log_is_the_list(self) -> None:
        if not hasattr(self, "log"):
            return
        log = self.log
        assert (log.base, log.last) == (self.base, self.last)
        assert [log.term_at(Index(at)) for at in range(self.last + 2)] == [self.term(at) for at in range(self.last + 2)]
        assert log.last_term == (self.term(self.last) or 0)
        assert log.config == self.config_at(self.last)
        assert [log.config_at(Index(at)) for at in range(self.base, self.last + 1)] == [
            self.config_at(at) for at in range(self.base, self.last + 1)
        ]
        newest = [e.index for e in self.all[self.base :] if e.kind == CONFIG]
        assert log.config_index == (newest[-1] if newest else self.base)

    @invariant()
    def runs_are_where_the_terms_are(self) -> None:
        if not hasattr(self, "log"):
            return
        for at in range(self.base + 1, self.last + 1):
            same = [n for n in range(self.base + 1, self.last + 1) if self.term(n) == self.term(at)]
            assert self.log.run_start(Index(at)) == same[0]
        kept = self.all[self.base :]
        for term in range(max((e.term for e in self.all), default=0) + 2):
            of_term = [e.index for e in kept if e.term == term]
            assert self.log.last_of(Term(term)) == (of_term[-1] if of_term else None)

    @invariant()
    def what_is_kept_in_memory_is_the_newest_and_bounded(self) -> None:
        if not hasattr(self, "log"):
            return
        log = self.log
        assert log.tail_first > self.base
        assert log._tail == self.all[log.tail_first - 1 :]
        assert log._tail_bytes == sum(len(entry.body) for entry in log._tail)
        assert len(log._tail) <= log_module.KEPT_ENTRIES
        assert log._tail_bytes <= log_module.KEPT_BYTES or len(log._tail) == 1
        for first in range(max(self.base, self.last - 20) + 1, self.last + 1):
            found = log.slice(Index(first), Index(self.last))
            assert found == (self.all[first - 1 :] if first >= log.tail_first else None)


TestLogModel = LogModel.TestCase
TestLogModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# -- our own mistakes stop us ------------------------------------------------------------------------------------------


def test_an_entry_leaves_no_gap() -> None:
    with pytest.raises(AssertionError, match="entry 3 appended behind 1"):
        log_of(1).append(entries(1, first=3))


def test_terms_do_not_fall() -> None:
    with pytest.raises(AssertionError, match="term 1 behind 2"):
        log_of(1, 2).append(entries(1, first=3))


def test_terms_do_not_fall_behind_a_snapshot() -> None:
    log = log_of(1, 2)
    log.compact(Index(2))
    with pytest.raises(AssertionError, match="term 1 behind 2"):
        log.append(entries(1, first=3))


def test_what_is_compacted_is_not_truncated() -> None:
    log = log_of(1, 1, 1)
    log.compact(Index(2))
    with pytest.raises(AssertionError, match="truncation at 2"):
        log.truncate(Index(2))


def test_what_is_not_there_is_not_compacted() -> None:
    with pytest.raises(AssertionError):
        log_of(1, 1).compact(Index(3))


def test_a_cluster_is_founded_once_and_in_a_blank_log() -> None:
    log = Log(LogStart())
    log.found(config(1))
    for taken in (log, log_of(1)):
        with pytest.raises(AssertionError, match="blank"):
            taken.found(config(2))


# -- one case each -----------------------------------------------------------------------------------------------------


def test_entry_zero_has_term_zero_in_every_log() -> None:
    assert Log(LogStart()).term_at(Index(0)) == 0
    assert log_of(1).term_at(Index(0)) == 0


def test_an_unknown_term_at_the_base_is_told_as_unknown() -> None:
    log = Log(LogStart(base=Index(7), last=Index(7)))
    assert log.term_at(Index(7)) is None
    assert log.last_term == 0


def test_one_entry_larger_than_everything_that_may_be_kept_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "KEPT_BYTES", 10)
    log = Log(LogStart())
    log.append([Entry(Index(1), Term(1), b"small"), Entry(Index(2), Term(1), b"x" * 100)])
    assert log.tail_first == 2


def test_half_is_dropped_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a full log does not drop with every entry."""
    monkeypatch.setattr(log_module, "KEPT_ENTRIES", 8)
    log = log_of(*[1] * 9)
    assert log.tail_first == 6


@given(st.lists(st.sampled_from([COMMAND, CONFIG]), max_size=8), st.integers(0, 8))
def test_a_configuration_that_is_cut_off_counts_no_more(kinds: list[int], keep: int) -> None:
    """PROTOCOL §2.24."""
    log = Log(LogStart(base_config=config(0)))
    bodies = [config(n + 1).encode() if kind == CONFIG else b"" for n, kind in enumerate(kinds)]
    made = [Entry(Index(n + 1), Term(1), body, kinds[n]) for n, body in enumerate(bodies)]
    log.append(made)
    if keep < len(kinds):
        log.truncate(Index(keep + 1))
    left = [Config.decode(e.body) for e in made[:keep] if e.kind == CONFIG]
    assert log.config == (left[-1] if left else config(0))
