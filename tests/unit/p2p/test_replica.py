"""One voter's decisions: the journal's pointers and the term, under any legal sequence of events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2p.effects import Apply, HardState, Persist
from p2p.ids import Index, NodeId, Term
from p2p.journal.core import JournalCore
from p2p.replica import Applied, Campaign, NotLeader, Persisted, Propose, Replica

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


def replica(term: int = 0, last: int = 0, applied: int = 0) -> Replica:
    return Replica(A, HardState(Term(term), None), last=Index(last), applied=Index(applied))


# -- the term -------------------------------------------------------------------------------------------------------


def test_a_campaign_persists_its_vote_in_a_new_term_with_a_no_op() -> None:
    voter = replica(term=4, last=9, applied=9)
    (effect,) = voter.step(Campaign())
    assert isinstance(effect, Persist)
    assert effect.hard_state == HardState(Term(5), A)
    assert [(e.index, e.term, e.body) for e in effect.entries] == [(10, 5, b"")]


def test_nothing_is_appended_before_the_no_op_is_on_disk() -> None:
    voter = replica()
    voter.step(Campaign())
    with pytest.raises(NotLeader):
        voter.step(Propose((b"x",)))
    assert voter.journal.last_index == 1
    voter.step(Persisted(Index(1)))
    assert voter.leader == A
    assert voter.step(Propose((b"x",)))


def test_a_voter_that_never_campaigned_appends_nothing() -> None:
    with pytest.raises(NotLeader):
        replica(last=5, applied=5).step(Propose((b"x",)))


def test_the_no_op_commits_what_earlier_terms_left() -> None:
    """Raft §5.4.2: entries of earlier terms are never committed by counting, but along with one of this term."""
    voter = replica(term=2, last=8, applied=5)
    assert voter.journal.commit_index == 5
    voter.step(Campaign())
    assert voter.step(Persisted(Index(8))) == []
    assert voter.step(Persisted(Index(9))) == [Apply(Index(9))]


def test_a_proposal_is_applied_only_after_it_is_persisted() -> None:
    voter = replica()
    voter.step(Campaign())
    voter.step(Persisted(Index(1)))
    (effect,) = voter.step(Propose((b"x", b"y")))
    assert isinstance(effect, Persist)
    assert voter.journal.commit_index == 1
    assert voter.step(Persisted(Index(3))) == [Apply(Index(3))]


def test_each_persist_carries_the_floor_of_what_is_committed() -> None:
    voter = replica()
    voter.step(Campaign())
    voter.step(Persisted(Index(1)))
    (first,) = voter.step(Propose((b"x",)))
    voter.step(Persisted(Index(2)))
    (second,) = voter.step(Propose((b"y",)))
    assert isinstance(first, Persist)
    assert isinstance(second, Persist)
    assert (first.acked_floor, second.acked_floor) == (1, 2)


# -- pointers under any sequence --------------------------------------------------------------------------------------


class Voters(RuleBasedStateMachine):
    """The leader's journal among three voters: appends, disks that report in any order, applies."""

    @initialize(last=st.integers(0, 5), applied=st.integers(0, 5))
    def begin(self, last: int, applied: int) -> None:
        last = max(last, applied)
        self.core = JournalCore(A, (A, B, C), last=Index(last), applied=Index(applied))
        self.core.append(Term(1), (b"",))
        self.no_op = last + 1
        self.disks = {A: last, B: 0, C: 0}
        self.told = applied

    @rule(n=st.integers(1, 4))
    def append(self, n: int) -> None:
        before = self.core.last_index
        entries = self.core.append(Term(1), [b"x"] * n)
        assert [e.index for e in entries] == list(range(before + 1, before + n + 1))

    @rule(voter=st.sampled_from([A, B, C]), share=st.floats(0, 1))
    def persisted(self, voter: NodeId, share: float) -> None:
        upto = Index(round(self.core.last_index * share))
        self.disks[voter] = max(self.disks[voter], upto)
        before = self.core.commit_index
        effect = self.core.persisted(voter, upto)
        by_two = sorted(self.disks.values())[1]
        assert self.core.commit_index == (max(by_two, before) if by_two >= self.no_op else before)
        if effect is not None:
            assert effect.upto == self.core.commit_index > before

    @precondition(lambda self: self.core.commit_index > self.core.applied_index)
    @rule(share=st.floats(0, 1))
    def applied(self, share: float) -> None:
        gap = self.core.commit_index - self.core.applied_index
        self.core.applied(Index(self.core.applied_index + round(gap * share)))

    @invariant()
    def pointers_agree_and_never_go_back(self) -> None:
        core = self.core
        core.check_invariants()
        assert core.commit_index >= self.told
        self.told = core.commit_index


TestVoters = Voters.TestCase


@given(st.integers(0, 20), st.integers(0, 20))
def test_applying_outside_the_committed_log_is_our_own_bug_and_stops_us(committed: int, upto: int) -> None:
    core = JournalCore(A, (A,), last=Index(committed), applied=Index(0))
    core.commit_index = Index(committed)
    if upto <= committed:
        core.applied(Index(upto))
    else:
        with pytest.raises(AssertionError):
            core.applied(Index(upto))


def test_a_disk_that_claims_what_was_never_written_stops_us() -> None:
    with pytest.raises(AssertionError, match="beyond the last entry"):
        JournalCore(A, (A,), last=Index(3), applied=Index(3)).persisted(A, Index(4))


BROKEN = {
    "committed beyond what a majority holds": ("commit_index", 5),
    "applied beyond committed": ("applied_index", 4),
    "last below committed": ("last_index", 2),
}


@pytest.mark.parametrize(("pointer", "value"), BROKEN.values(), ids=BROKEN)
def test_the_invariants_notice_broken_pointers(pointer: str, value: int) -> None:
    core = JournalCore(A, (A, B, C), last=Index(6), applied=Index(3))
    core.check_invariants()
    setattr(core, pointer, Index(value))
    with pytest.raises(AssertionError):
        core.check_invariants()


class OneVoter(RuleBasedStateMachine):
    """A voter that appends, syncs, applies and restarts with what its disk holds."""

    @initialize()
    def begin(self) -> None:
        self.hard = HardState(Term(0), None)
        self.disk_last = self.applied = self.acked = 0
        self.restart()

    @rule()
    def restart(self) -> None:
        self.voter = Replica(A, self.hard, last=Index(self.disk_last), applied=Index(self.applied))
        assert self.voter.term == self.hard.term
        (effect,) = self.voter.step(Campaign())
        self.pending = [effect]

    @precondition(lambda self: not self.pending and self.voter.leader == A)
    @rule(n=st.integers(1, 3))
    def propose(self, n: int) -> None:
        self.pending = self.voter.step(Propose((b"x",) * n))

    @precondition(lambda self: self.pending)
    @rule()
    def sync(self) -> None:
        (effect,) = self.pending
        assert isinstance(effect, Persist)
        self.pending = []
        assert effect.acked_floor <= self.disk_last
        if effect.hard_state is not None:
            assert effect.hard_state.term > self.hard.term
            self.hard = effect.hard_state
        assert effect.entries[0].index == self.disk_last + 1
        assert {e.term for e in effect.entries} == {self.hard.term}
        self.disk_last = effect.entries[-1].index
        for outcome in self.voter.step(Persisted(Index(self.disk_last))):
            assert isinstance(outcome, Apply)
            assert outcome.upto <= self.disk_last
            self.acked = outcome.upto

    @precondition(lambda self: self.acked > self.applied)
    @rule()
    def apply(self) -> None:
        if self.voter.journal.commit_index >= self.acked:
            self.applied = self.acked
            self.voter.step(Applied(Index(self.applied)))

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "voter"):
            self.voter.check_invariants()
            assert self.voter.journal.commit_index <= self.disk_last


TestOneVoter = OneVoter.TestCase
