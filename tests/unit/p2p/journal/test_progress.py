"""What a leader may send one follower next, against a follower that answers as followers do."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2p.ids import Index, VoterId
from p2p.journal.progress import ANSWERS, PIPELINE, PROBE, REPLICATE, SNAPSHOT, Progress

F = VoterId("f@1")


def progress(*, state: str = PROBE, match: int = 0, next: int = 10) -> Progress:
    return Progress(voter=F, next=Index(next), contact=0.0, steady_since=0.0, match=Index(match), state=state)


# -- one case each -----------------------------------------------------------------------------------------------------


def test_a_probe_goes_alone() -> None:
    p = progress()
    assert p.may_send()
    p.sent(Index(12), 1.0)
    assert not p.may_send()
    assert p.next == 10


def test_batches_go_one_behind_the_other_up_to_the_limit() -> None:
    p = progress(state=REPLICATE, match=9)
    for batch in range(PIPELINE):
        assert p.may_send()
        p.sent(Index(10 + batch), 1.0)
        assert p.next == 11 + batch
    assert not p.may_send()
    p.matched(Index(11), 2.0, 1)
    assert p.may_send()
    assert list(p.under_way) == [12, 13]


@pytest.mark.parametrize("stopped", ["fetching", "regressed"])
@pytest.mark.parametrize("state", [PROBE, REPLICATE])
def test_nothing_goes_to_who_is_fetched_for_or_has_lost_its_disk(state: str, stopped: str) -> None:
    p = progress(state=state)
    setattr(p, stopped, True)
    assert not p.may_send()


def test_nothing_goes_while_a_snapshot_is_installed() -> None:
    assert not progress(state=SNAPSHOT).may_send()


def test_an_answered_probe_makes_batches_flow() -> None:
    p = progress()
    p.sent(Index(12), 1.0)
    p.matched(Index(12), 2.0, 5)
    assert (p.state, p.match, p.next, list(p.under_way)) == (REPLICATE, 12, 13, [])
    assert p.match_round == 5


def test_a_probe_that_is_partly_on_disk_is_still_under_way() -> None:
    p = progress()
    p.sent(Index(12), 1.0)
    p.matched(Index(11), 2.0, 5)
    assert (p.state, p.match, list(p.under_way)) == (PROBE, 11, [12])


@pytest.mark.parametrize("fetching", [True, False])
def test_a_heartbeats_answer_does_not_end_a_search(fetching: bool) -> None:
    p = progress(next=10)
    p.fetching = fetching
    p.matched(Index(3), 1.0, 1)
    assert (p.state, p.match, p.next) == (PROBE, 3, 10)
    p.matched(Index(9), 1.0, 1)
    assert (p.state, p.match, p.next) == (REPLICATE, 9, 10)


def test_a_match_never_goes_back() -> None:
    p = progress(state=REPLICATE, match=9)
    p.matched(Index(4), 1.0, 7)
    assert (p.match, p.match_round, p.next) == (9, 0, 10)


def test_a_match_beyond_what_was_sent_is_where_to_go_on() -> None:
    p = progress(state=REPLICATE, match=9)
    p.matched(Index(20), 1.0, 1)
    assert p.next == 21


@pytest.mark.parametrize(("match", "state"), [(29, SNAPSHOT), (30, REPLICATE), (31, REPLICATE)])
def test_a_snapshot_is_over_when_it_is_installed(match: int, state: str) -> None:
    p = progress(state=SNAPSHOT, match=5)
    p.offered = Index(30)
    p.matched(Index(match), 1.0, 1)
    assert p.state == state
    assert p.state == SNAPSHOT or p.next == match + 1


def test_a_probe_that_is_lost_is_sent_again_where_it_was() -> None:
    p = progress(next=10)
    p.sent(Index(12), 1.0)
    p.lost()
    assert (p.state, p.next, list(p.under_way)) == (PROBE, 10, [])


def test_batches_that_are_lost_are_looked_for_behind_the_match() -> None:
    p = progress(state=REPLICATE, match=9)
    p.sent(Index(12), 1.0)
    p.sent(Index(14), 1.0)
    p.fetching = True
    p.lost()
    assert (p.state, p.next, list(p.under_way), p.fetching) == (PROBE, 10, [], False)


def test_a_search_never_goes_behind_the_match() -> None:
    p = progress(state=REPLICATE, match=9, next=15)
    p.probe_from(Index(4))
    assert p.next == 10


def test_the_clock_of_what_is_under_way_runs_from_the_oldest_or_the_last_that_arrived() -> None:
    p = progress(state=REPLICATE, match=9)
    p.sent(Index(10), 1.0)
    p.sent(Index(11), 2.0)
    assert p.sent_at == 1.0
    p.matched(Index(10), 3.0, 1)
    assert p.sent_at == 3.0
    p.matched(Index(10), 4.0, 1)
    assert p.sent_at == 3.0
    p.matched(Index(11), 5.0, 1)
    p.sent(Index(12), 9.0)
    assert p.sent_at == 9.0


def test_how_slow_it_is_is_told_by_its_newest_answers() -> None:
    p = progress()
    p.answers.extend([0.5] * (ANSWERS // 4 - 1))
    assert p.slowness() is None
    p.answers.append(0.5)
    assert p.slowness() == 0.5
    p.answers.extend([0.1] * ANSWERS)
    assert p.slowness() == 0.1
    assert len(p.answers) == ANSWERS


def test_one_slow_answer_of_a_hundred_is_no_slowness() -> None:
    p = progress()
    p.answers.extend([0.1] * 99 + [9.0])
    assert p.slowness() == 0.1
    p.answers.extend([9.0] * 5)
    assert p.slowness() == 9.0


# -- against a follower ------------------------------------------------------------------------------------------------


class Following(RuleBasedStateMachine):
    """A leader's log is `length` long; the follower agrees with it up to `agrees`, and holds `length_there` entries.
    Messages (kind, previous index, last index, round) go in order or are lost."""

    @initialize(length=st.integers(1, 30), agrees=st.integers(0, 30), junk=st.integers(0, 5))
    def begin(self, length: int, agrees: int, junk: int) -> None:
        self.length = length
        self.agrees = min(agrees, length)
        self.there = self.agrees + junk
        self.round = 0
        self.to: deque[tuple[int, int, int]] = deque()
        self.back: deque[tuple[bool, int, int]] = deque()
        self.p = progress(next=length)

    def send(self, prev: int, last: int) -> None:
        self.round += 1
        self.to.append((prev, last, self.round))

    @rule(size=st.integers(1, 4))
    def replicate(self, size: int) -> None:
        while self.p.may_send() and self.p.next <= self.length:
            prev, last = self.p.next - 1, min(self.p.next + size - 1, self.length)
            self.p.sent(Index(last), 0.0)
            self.send(prev, last)

    @rule()
    def heartbeat(self) -> None:
        self.send(self.p.match, self.p.match)

    @rule(more=st.integers(1, 5))
    def grow(self, more: int) -> None:
        self.length += more

    @precondition(lambda self: self.to)
    @rule()
    def arrive(self) -> None:
        prev, last, round = self.to.popleft()
        if prev > self.agrees:
            self.back.append((False, min(self.there, prev - 1) + 1 if prev > self.there else self.agrees + 1, round))
            return
        if last > self.agrees:
            self.agrees = self.there = last
        self.back.append((True, last, round))

    @precondition(lambda self: self.back)
    @rule()
    def answer(self) -> None:
        ok, index, round = self.back.popleft()
        if ok:
            self.p.matched(Index(index), 0.0, self.round)
        elif index > self.p.match and round > self.p.refused_round:
            self.p.refused_round = self.round
            self.p.probe_from(Index(min(index, self.length + 1)))

    @precondition(lambda self: self.to)
    @rule()
    def lose(self) -> None:
        self.to.popleft()

    @rule()
    def break_down(self) -> None:
        self.p.lost()

    @invariant()
    def the_match_is_true_and_what_is_sent_follows_it(self) -> None:
        if not hasattr(self, "p"):
            return
        assert self.p.match <= self.agrees
        assert self.p.match < self.p.next <= self.length + 1
        assert len(self.p.under_way) <= PIPELINE
        assert list(self.p.under_way) == sorted(set(self.p.under_way))
        if self.p.state == REPLICATE:
            assert all(self.p.match < last < self.p.next for last in self.p.under_way)

    def teardown(self) -> None:
        """Whatever was lost: once nothing is lost any more, the follower soon holds everything."""
        if not hasattr(self, "p"):
            return
        for _ in range(100):
            self.p.lost()
            self.replicate(3)
            self.heartbeat()
            while self.to:
                self.arrive()
            while self.back:
                self.answer()
            if self.p.match == self.length:
                return
        raise AssertionError(f"never caught up: {self.p}, the follower agrees up to {self.agrees}")


TestFollowing = Following.TestCase
TestFollowing.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
