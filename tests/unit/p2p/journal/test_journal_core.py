"""The pointers of one voter's log under everything that may move them."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2p.effects import Config, Entry
from p2p.ids import Index, Term, VoterId
from p2p.journal.core import Accepted, Conflict, JournalCore
from p2p.journal.log import LogStart

A, B, C, D, E = (VoterId(name) for name in ("a@1", "b@1", "c@1", "d@1", "e@1"))


def journal(*terms: int, commit: int = 0, applied: int = 0, stable: int | None = None) -> JournalCore:
    """A log of entries with these terms, all on disk unless `stable` says less."""
    core = JournalCore(A, LogStart(), applied=Index(0))
    core.log.append([Entry(Index(at), Term(term), _body(at, term)) for at, term in enumerate(terms, 1)])
    core.stable_index = Index(len(terms) if stable is None else stable)
    core.commit_index, core.applied_index = Index(commit), Index(applied)
    return core


def _body(index: int, term: int) -> bytes:
    return f"{index}.{term}".encode()


def sent(prev: int, *terms: int) -> list[tuple[int, int, bytes]]:
    """What a leader sends behind `prev`."""
    return [(term, 0, _body(at, term)) for at, term in enumerate(terms, prev + 1)]


def terms(core: JournalCore) -> list[int]:
    return [core.log.term_at(Index(at)) or 0 for at in range(core.log.base + 1, core.last_index + 1)]


# -- taking what a leader sends (Raft §5.3) ----------------------------------------------------------------------------

ACCEPTED = {
    # log, commit, (prev, its term), entries -> cut off from, written, equal up to, log then
    "the first entry": ((), 0, (0, 0), (1,), None, [1], 1, [1]),
    "behind the end": ((1, 1), 0, (2, 1), (2, 2), None, [3, 4], 4, [1, 1, 2, 2]),
    "a heartbeat": ((1, 1), 0, (1, 1), (), None, [], 1, [1, 1]),
    "known already": ((1, 1, 2), 0, (1, 1), (1, 2), None, [], 3, [1, 1, 2]),
    "known, and more is here": ((1, 1, 2), 0, (0, 0), (1,), None, [], 1, [1, 1, 2]),
    "partly known": ((1, 1), 0, (1, 1), (1, 2), None, [3], 3, [1, 1, 2]),
    "another entry there": ((1, 1, 1), 0, (1, 1), (2,), 2, [2], 2, [1, 2]),
    "another entry behind known ones": ((1, 1, 1, 1), 0, (1, 1), (1, 3, 3), 3, [3, 4], 4, [1, 1, 3, 3]),
    "wholly committed": ((1, 1, 1), 3, (0, 0), (1, 1), None, [], 2, [1, 1, 1]),
    "committed, so it is not even compared": ((1, 1, 1), 2, (0, 0), (7, 7), None, [], 2, [1, 1, 1]),
    "committed, and more": ((1, 1, 1), 2, (0, 0), (1, 1, 2), 3, [3], 3, [1, 1, 2]),
    "behind what is committed, of a term that nobody knows": ((1, 1), 2, (2, 99), (2,), None, [3], 3, [1, 1, 2]),
}


@pytest.mark.parametrize(
    ("log", "commit", "prev", "new", "cut", "written", "verified", "then"), ACCEPTED.values(), ids=ACCEPTED
)
def test_entries_are_taken(
    log: tuple[int, ...],
    commit: int,
    prev: tuple[int, int],
    new: tuple[int, ...],
    cut: int | None,
    written: list[int],
    verified: int,
    then: list[int],
) -> None:
    core = journal(*log, commit=commit)
    outcome = core.accept(Index(prev[0]), Term(prev[1]), sent(prev[0], *new))
    assert isinstance(outcome, Accepted)
    assert (outcome.truncate, [e.index for e in outcome.entries]) == (cut, written)
    assert (outcome.verified, core.verified) == (verified, verified)
    assert terms(core) == then
    core.check_invariants()


REFUSED = {
    # log, commit, (prev, its term) -> term there, where to look next
    "beyond the end": ((1, 1), 0, (5, 1), 0, 3),
    "of another term": ((1, 2, 2, 2), 0, (4, 3), 2, 2),
    "of another term, all of it": ((2, 2), 0, (2, 3), 2, 1),
    "of another term, which is partly committed": ((1, 2, 2, 2), 3, (4, 3), 2, 4),
    "in a blank log": ((), 0, (1, 1), 0, 1),
}


@pytest.mark.parametrize(("log", "commit", "prev", "term", "first"), REFUSED.values(), ids=REFUSED)
def test_entries_that_do_not_follow_are_refused_and_change_nothing(
    log: tuple[int, ...], commit: int, prev: tuple[int, int], term: int, first: int
) -> None:
    core = journal(*log, commit=commit)
    outcome = core.accept(Index(prev[0]), Term(prev[1]), sent(prev[0], 9))
    assert outcome == Conflict(Term(term), Index(first))
    assert terms(core) == list(log)
    assert core.verified == 0


@given(st.data())
def test_taking_is_what_a_list_would_do(data: st.DataObject) -> None:
    """Any window of a leader's log, against any follower that agrees with it on what is committed."""
    leader = sorted(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=10)))
    agreed = data.draw(st.integers(0, len(leader)))
    commit = data.draw(st.integers(0, agreed))
    own = data.draw(st.lists(st.integers(0, 2), max_size=5))
    follower = leader[:agreed]
    for by in own:  # a tail of terms that the leader does not have there
        follower.append(max([5, *follower[agreed:]]) + by)
    prev = data.draw(st.integers(0, len(leader)))
    window = leader[prev : data.draw(st.integers(prev, len(leader)))]
    core = journal(*follower, commit=commit)
    outcome = core.accept(Index(prev), Term(leader[prev - 1] if prev else 0), sent(prev, *window))

    end = prev + len(window)
    if prev > agreed:
        assert isinstance(outcome, Conflict)
        assert commit < outcome.first <= prev
        assert terms(core) == follower
        return
    assert isinstance(outcome, Accepted)
    expected = leader[:end] if end > agreed else follower
    assert terms(core) == expected
    assert outcome.verified == end
    assert (outcome.truncate is not None) == (end > agreed and len(follower) > agreed)
    core.check_invariants()


# -- what is on disk ---------------------------------------------------------------------------------------------------


class Disk(RuleBasedStateMachine):
    """A follower's log and the disk behind it, which does its writes one by one, later. What the core takes for durable
    must be there, and must be the entry that the log has now (etcd's ABA race)."""

    @initialize()
    def begin(self) -> None:
        self.core = journal()
        self.term = 1
        self.writes: deque[tuple[int, int | None, tuple[Entry, ...]]] = deque()
        self.disk: list[Entry] = []

    @rule(size=st.integers(1, 4))
    def append(self, size: int) -> None:
        entries = self.core.append(Term(self.term), [b"x"] * size)
        self.writes.append((self.core.write(0.0), None, entries))

    @rule()
    def write_a_term_alone(self) -> None:
        self.writes.append((self.core.write(0.0), None, ()))

    @precondition(lambda self: self.core.last_index > self.core.commit_index)
    @rule(data=st.data(), size=st.integers(1, 3))
    def another_leader(self, data: st.DataObject, size: int) -> None:
        self.term += 1
        prev = data.draw(st.integers(self.core.commit_index, self.core.last_index))
        outcome = self.core.accept(
            Index(prev), self.core.log.term_at(Index(prev)) or Term(0), sent(prev, *[self.term] * size)
        )
        assert isinstance(outcome, Accepted)
        self.writes.append((self.core.write(0.0), outcome.truncate, outcome.entries))

    @precondition(lambda self: self.writes)
    @rule(count=st.integers(1, 3))
    def disk_does(self, count: int) -> None:
        seq = 0
        for _ in range(min(count, len(self.writes))):
            seq, truncate, entries = self.writes.popleft()
            if truncate is not None:
                del self.disk[truncate - 1 :]
            self.disk += entries
        self.core.written(seq)

    @precondition(lambda self: self.core.stable_index > self.core.commit_index)
    @rule()
    def commit(self) -> None:
        self.core.verified = self.core.stable_index
        assert self.core.commit_upto(self.core.stable_index)

    @rule()
    def install(self) -> None:
        """A snapshot ahead of the whole log; writes that are under way still come in, and mean nothing."""
        at = Index(self.core.last_index + 3)
        self.core.log.reset(at, Term(self.term), Config())
        self.core.forget_writes()
        self.core.stable_index = self.core.commit_index = self.core.applied_index = at
        for n, (seq, _, _) in enumerate(self.writes):
            self.writes[n] = (seq, None, ())
        self.disk = [Entry(Index(n), Term(self.term), b"snapshot") for n in range(1, at + 1)]

    @invariant()
    def what_is_stable_is_on_the_disk(self) -> None:
        if not hasattr(self, "core"):
            return
        core = self.core
        core.check_invariants()
        assert len(self.disk) >= core.stable_index
        for at in range(core.log.base + 1, core.stable_index + 1):
            assert self.disk[at - 1].term == core.log.term_at(Index(at))
        if not self.writes:
            assert core.stable_index == core.last_index
        assert (core.write_began is None) == (not self.writes)


TestDisk = Disk.TestCase
TestDisk.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_the_oldest_write_tells_how_long_the_disk_hangs() -> None:
    """PROTOCOL §2.7."""
    core = journal()
    for at in (1.0, 2.0):
        core.write(at)
    assert core.write_began == 1.0
    core.written(1)
    assert core.write_began == 2.0
    core.written(2)
    assert core.write_began is None


# -- counting ----------------------------------------------------------------------------------------------------------

COUNTED = {
    # log, on own disk, commit, first entry of the term, what the others hold, voters -> commit then
    "alone": ((1,), 1, 0, 1, {}, (A,), 1),
    "alone, and not yet on disk": ((1,), 0, 0, 1, {}, (A,), 0),
    "one of two others": ((1, 1), 2, 0, 1, {B: 2}, (A, B, C), 2),
    "both others and not the own disk": ((1, 1), 0, 0, 1, {B: 2, C: 2}, (A, B, C), 2),
    "the least of the majority": ((1, 1, 1), 3, 0, 1, {B: 2, C: 0}, (A, B, C), 2),
    "of five": ((1, 1, 1), 3, 0, 1, {B: 2, C: 1, D: 0, E: 0}, (A, B, C, D, E), 1),
    "four need three": ((1, 1), 2, 0, 1, {B: 2, C: 0, D: 0}, (A, B, C, D), 0),
    "an entry of an earlier term (§5.4.2, Figure 8)": ((1, 2), 2, 0, 3, {B: 2, C: 2}, (A, B, C), 0),
    "the earlier term's along with this term's": ((1, 2, 3), 3, 0, 3, {B: 3}, (A, B, C), 3),
    "who does not vote": ((1, 1), 2, 0, 1, {D: 2, E: 2}, (A, B, C), 0),
    "a leader that is removed does not count itself": ((1, 1), 2, 0, 1, {B: 2}, (B, C), 0),
    "but the others do": ((1, 1), 0, 0, 1, {B: 2, C: 2}, (B, C), 2),
    "never back": ((1, 1, 1), 3, 3, 1, {B: 1, C: 1}, (A, B, C), 3),
}


@pytest.mark.parametrize(("log", "stable", "commit", "start", "match", "voters", "then"), COUNTED.values(), ids=COUNTED)
def test_a_leader_commits_what_a_majority_holds(
    log: tuple[int, ...],
    stable: int,
    commit: int,
    start: int,
    match: dict[VoterId, Index],
    voters: tuple[VoterId, ...],
    then: int,
) -> None:
    core = journal(*log, stable=stable, commit=commit)
    core.term_start = Index(start)
    assert core.commit_by(match, voters) == (then > commit)
    assert core.commit_index == then


@pytest.mark.parametrize(
    ("told", "verified", "commit", "then"), [(5, 3, 1, 3), (2, 3, 1, 2), (1, 3, 2, 2), (9, 0, 1, 1)]
)
def test_a_follower_commits_no_further_than_its_log_is_the_leaders(
    told: int, verified: int, commit: int, then: int
) -> None:
    core = journal(1, 1, 1, 1, commit=commit)
    core.verified = Index(verified)
    assert core.commit_upto(Index(told)) == (then > commit)
    assert core.commit_index == then


def test_logs_are_compared_by_their_last_term_and_then_their_length() -> None:
    assert journal(1, 3).last > journal(1, 2, 2).last > journal(1, 2).last > journal().last


# -- starting and applying ---------------------------------------------------------------------------------------------


def test_what_was_applied_was_committed() -> None:
    core = JournalCore(A, LogStart(last=Index(5), runs=((Index(1), Term(1)),)), applied=Index(3))
    assert (core.commit_index, core.applied_index, core.stable_index, core.verified) == (3, 3, 5, 0)
    assert core.term_start == 6


def test_what_is_compacted_was_committed() -> None:
    core = JournalCore(A, LogStart(base=Index(4), base_term=Term(1), last=Index(4)), applied=Index(2))
    assert core.commit_index == 4


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_applying_outside_the_committed_log_is_our_own_bug_and_stops_us(commit: int, applied: int, upto: int) -> None:
    core = journal(*[1] * 9, commit=max(commit, applied), applied=applied)
    if applied <= upto <= core.commit_index:
        core.applied(Index(upto))
        assert core.applied_index == upto
    else:
        with pytest.raises(AssertionError):
            core.applied(Index(upto))


BROKEN = {
    "committed beyond the end": ("commit_index", 7),
    "applied beyond committed": ("applied_index", 5),
    "on disk beyond the end": ("stable_index", 7),
    "committed before the beginning": ("commit_index", 1),
}


@pytest.mark.parametrize(("pointer", "value"), BROKEN.values(), ids=BROKEN)
def test_the_invariants_notice_broken_pointers(pointer: str, value: int) -> None:
    core = journal(1, 1, 1, 1, 1, 1, commit=4, applied=3)
    core.log.compact(Index(2))
    core.check_invariants()
    if value < 3:
        core.applied_index = Index(value)
    setattr(core, pointer, Index(value))
    with pytest.raises(AssertionError):
        core.check_invariants()
