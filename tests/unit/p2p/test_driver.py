"""The driver's promises: persist, then apply, then answer; many in one fsync; nothing half done when it ends."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from p2p.driver import MAX_BATCH_ENTRIES, MAX_UNAPPLIED_BATCHES, NotLeader, Overloaded, Stopped
from p2p.effects import Config
from p2p.ids import Index, Term, VoterId
from p2p.messages import Append, AppendReply, Message
from p2p.replica import Received
from tests.nodes import wait_until
from tests.unit.p2p.driving import SECONDS, Rig, WatchedMachine, in_thread


@pytest.fixture
def make() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def build(*arguments: Any, **settings: Any) -> Rig:
        rigs.append(Rig(*arguments, **settings))
        return rigs[-1]

    yield build
    for rig in rigs:
        if hasattr(rig, "elected"):
            rig.stop()


@pytest.fixture
def rig(make: Callable[..., Rig]) -> Rig:
    return make().start()


# -- persist, apply, answer -----------------------------------------------------------------------------------------


def test_nothing_is_answered_before_it_is_on_disk_and_applied(rig: Rig) -> None:
    threads = [in_thread(lambda: rig.proposed(*(b"%d" % n for n in range(50)))) for _ in range(4)]
    for thread in threads:
        thread.join(SECONDS)
    position = {step: n for n, step in enumerate(rig.story)}
    answered = [index for step, index in rig.story if step == "answered"]
    assert len(answered) == 200
    for index in answered:
        assert position["persisted", index] < position["applied", index] < position["answered", index]


def test_answers_come_in_the_order_of_the_journal(rig: Rig) -> None:
    rig.proposed(*(b"%d" % n for n in range(300)))
    answered = [index for step, index in rig.story if step == "answered"]
    assert answered == sorted(answered)
    assert rig.machine.bodies == [b"%d" % n for n in range(300)]


def test_each_proposal_gets_its_own_answer(rig: Rig) -> None:
    answers = rig.proposed(b"a", b"b", b"c")
    assert [body for _, body in answers] == [b"a", b"b", b"c"]
    assert [rig.log.read(Index(i), Index(i))[0].body for i, _ in answers] == [b"a", b"b", b"c"]


def test_while_the_disk_is_busy_nothing_is_applied_or_answered(rig: Rig) -> None:
    rig.log.gate.shut()
    future = rig.propose(b"slow")
    rig.log.gate.arrived()
    assert not future.done()
    assert rig.machine.bodies == []
    rig.log.gate.open()
    assert future.result(SECONDS)[1] == b"slow"


def test_while_the_machine_is_busy_nothing_is_answered(rig: Rig) -> None:
    rig.machine.gate.shut()
    future = rig.propose(b"slow")
    rig.machine.gate.arrived()
    assert ("persisted", 2) in rig.story
    assert not future.done()


def test_events_are_told_before_the_proposals_that_caused_them_are_answered(rig: Rig) -> None:
    rig.proposed(*(b"%d" % n for n in range(2, 40)))
    position = {step: n for n, step in enumerate(rig.story)}
    assert all(position["told", n] < position["answered", n] for n in range(2, 40))


# -- group commit ----------------------------------------------------------------------------------------------------


def test_what_is_proposed_during_one_fsync_shares_the_next(rig: Rig) -> None:
    rig.log.gate.shut()
    first = rig.propose(b"first")
    rig.log.gate.arrived()
    rest = [rig.propose(b"%d" % n) for n in range(500)]
    rig.log.gate.open()
    for future in (first, *rest):
        future.result(SECONDS)
    assert rig.log.batches == [1, 1, 500]


def test_a_group_has_a_limit(rig: Rig) -> None:
    rig.log.gate.shut()
    rig.propose(b"first")
    rig.log.gate.arrived()
    rest = [rig.propose(b"x") for _ in range(MAX_BATCH_ENTRIES + 10)]
    rig.log.gate.open()
    rest[-1].result(SECONDS)
    assert rig.log.batches == [1, 1, MAX_BATCH_ENTRIES, 10]


def test_a_group_has_a_limit_in_bytes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2p.driver.MAX_BATCH_BYTES", 100)
    rig.log.gate.shut()
    rig.propose(b"first")
    rig.log.gate.arrived()
    rest = [rig.propose(b"y" * 40) for _ in range(6)]
    rig.log.gate.open()
    rest[-1].result(SECONDS)
    assert rig.log.batches == [1, 1, 3, 3]


# -- definitely not done ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "value"), [("MAX_WAITING_ENTRIES", 3), ("MAX_WAITING_BYTES", 3)])
def test_too_much_waiting_is_refused_and_definitely_not_done(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(f"p2p.driver.{limit}", value)
    rig.log.gate.shut()
    rig.propose(b"0")
    rig.log.gate.arrived()
    accepted = [rig.propose(b"%d" % n) for n in (1, 2, 3)]
    with pytest.raises(Overloaded):
        rig.propose(b"4")
    rig.log.gate.open()
    for future in accepted:
        future.result(SECONDS)
    assert rig.proposed(b"5")[0][1] == b"5"
    assert rig.machine.bodies == [b"0", b"1", b"2", b"3", b"5"]


def test_a_slow_machine_holds_the_journal_back(rig: Rig) -> None:
    rig.machine.gate.shut()
    rig.propose(b"x")
    rig.machine.gate.arrived()
    futures = []
    for _ in range(MAX_UNAPPLIED_BATCHES + 5):
        before = len(rig.log.batches)
        futures.append(rig.propose(b"x"))
        if len(futures) < MAX_UNAPPLIED_BATCHES:
            wait_until(lambda before=before: len(rig.log.batches) > before)
    wait_until(lambda: rig.driver._batches == MAX_UNAPPLIED_BATCHES)
    assert len(rig.log.batches) - 1 <= MAX_UNAPPLIED_BATCHES + 1
    rig.machine.gate.open()
    for future in futures:
        future.result(SECONDS)


def test_a_proposal_cancelled_in_time_is_definitely_not_done(rig: Rig) -> None:
    rig.log.gate.shut()
    rig.propose(b"first")
    rig.log.gate.arrived()
    taken_back, kept = rig.driver.propose(b"taken back"), rig.propose(b"kept")
    assert taken_back.cancel()
    rig.log.gate.open()
    kept.result(SECONDS)
    assert rig.machine.bodies == [b"first", b"kept"]
    assert all(entry.body != b"taken back" for entry, _, _ in rig.log.records)


def test_a_proposal_that_is_being_written_cannot_be_taken_back(rig: Rig) -> None:
    rig.log.gate.shut()
    future = rig.propose(b"x")
    rig.log.gate.arrived()
    assert not future.cancel()
    rig.log.gate.open()
    assert future.result(SECONDS)[1] == b"x"


def test_after_a_stop_proposals_and_queries_are_refused(make: Callable[..., Rig]) -> None:
    rig = make().start()
    rig.stop()
    with pytest.raises(Stopped):
        rig.driver.propose(b"late")
    with pytest.raises(Stopped):
        rig.driver.query(lambda: None)
    assert rig.machine.bodies == []


# -- stopping ---------------------------------------------------------------------------------------------------------


def test_a_stop_finishes_what_was_accepted_and_closes_both(make: Callable[..., Rig]) -> None:
    rig = make().start()
    rig.log.gate.shut()
    first = rig.propose(b"first")
    rig.log.gate.arrived()
    rest = [rig.propose(b"%d" % n) for n in range(20)]
    stopping = in_thread(rig.driver.stop)
    wait_until(lambda: rig.driver._stopping)
    assert not first.done()
    rig.log.gate.open()
    stopping.join(SECONDS)
    assert not stopping.is_alive()
    assert all(future.done() and future.exception() is None for future in (first, *rest))
    assert len(rig.machine.bodies) == 21
    assert rig.log.closed
    assert rig.machine.closed
    assert rig.log.acked_floor == rig.log.records[-1][0].index
    assert not rig.fatal


def test_two_stops_are_one(make: Callable[..., Rig]) -> None:
    rig = make().start()
    rig.stop()
    rig.stop()
    assert not rig.fatal


# -- failing ----------------------------------------------------------------------------------------------------------


def test_a_failed_fsync_is_fatal_and_nothing_is_answered(rig: Rig) -> None:
    rig.log.gate.shut()
    first = rig.propose(b"first")
    rig.log.gate.arrived()
    rig.log.fail_next_append = OSError(5, "Input/output error")
    second = rig.propose(b"second")
    rig.log.gate.open()
    assert rig.died.wait(SECONDS)
    assert rig.fatal == ["journal: [Errno 5] Input/output error"]
    assert not first.done()
    assert not second.done()
    assert rig.machine.bodies == []
    assert len(rig.log.records) == 1  # the no-op


def test_an_exception_while_applying_is_fatal_and_nothing_of_that_batch_is_answered(rig: Rig) -> None:
    rig.machine.poison = b"poison"
    rig.log.gate.shut()
    first = rig.propose(b"first")
    rig.log.gate.arrived()
    batch = [rig.propose(body) for body in (b"good", b"poison", b"good too")]
    rig.log.gate.open()
    assert first.result(SECONDS)
    assert rig.died.wait(SECONDS)
    assert rig.fatal == ["apply: database disk image is malformed"]
    assert not any(future.done() for future in batch)


def test_a_listener_that_raises_is_fatal_not_ignored(make: Callable[..., Rig]) -> None:
    rig = make().start()

    def broken(events: list[Any]) -> None:
        raise RuntimeError("listener")

    rig.driver._on_events = broken
    future = rig.propose(b"x")
    assert rig.died.wait(SECONDS)
    assert not future.done()


# -- queries ----------------------------------------------------------------------------------------------------------


def test_queries_run_between_batches(rig: Rig) -> None:
    rig.machine.gate.shut()
    rig.propose(b"x")
    rig.machine.gate.arrived()
    asked = rig.driver.query(lambda: (rig.machine.applied_index, threading.current_thread().name))
    assert not asked.done()
    rig.machine.gate.open()
    assert asked.result(SECONDS) == (2, "apply")


def test_a_query_sees_whatever_was_answered_before_it(rig: Rig) -> None:
    for n in range(20):
        ((index, _),) = rig.proposed(b"%d" % n)
        assert rig.driver.query(lambda: rig.machine.applied_index).result(SECONDS) >= index


def test_a_query_that_raises_hurts_only_who_asked(rig: Rig) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rig.driver.query(broken).result(SECONDS)
    assert rig.proposed(b"x")
    assert not rig.fatal


def test_a_cancelled_query_is_not_asked(rig: Rig) -> None:
    asked: list[int] = []
    rig.machine.gate.shut()
    rig.propose(b"x")
    rig.machine.gate.arrived()
    query: Future[None] = rig.driver.query(lambda: asked.append(1))
    assert query.cancel()
    rig.machine.gate.open()
    rig.driver.query(lambda: None).result(SECONDS)
    assert asked == []


# -- starting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unapplied", [0, 1, 7, 2 * MAX_BATCH_ENTRIES + 3])
def test_a_restart_replays_what_the_machine_had_not_applied(make: Callable[..., Rig], unapplied: int) -> None:
    first = make().start()
    total = unapplied + 2
    first.proposed(*(b"%d" % n for n in range(total)))
    first.stop()
    kept = 1 + total - unapplied  # the no-op and what was applied
    second = make(first.log, WatchedMachine(first.story, applied=kept)).start()
    assert second.machine.bodies == [b"%d" % n for n in range(total - unapplied, total)]
    assert second.machine.applied_index == total + 2
    assert second.replica.term == first.replica.term + 1


def test_a_driver_leads_only_when_everything_old_is_applied(make: Callable[..., Rig]) -> None:
    """Until then it does not know what an earlier run acknowledged, and must not answer for it."""
    first = make().start()
    first.proposed(b"a", b"b")
    first.stop()
    second = make(first.log, WatchedMachine(first.story))
    second.machine.gate.shut()
    second.elected = second.driver.start()
    second.machine.gate.arrived()
    assert not second.elected.done()
    second.machine.gate.open()
    second.elected.result(SECONDS)
    assert second.machine.bodies == [b"a", b"b"]


def test_proposals_made_before_the_term_began_are_definitely_not_done(make: Callable[..., Rig]) -> None:
    rig = make()
    early = rig.propose(b"early")
    rig.start()
    with pytest.raises(NotLeader):
        early.result(SECONDS)
    assert rig.proposed(b"later")[0] == (2, b"later")


class CountingCondition(threading.Condition):
    """Counts what the thread that made it wakes."""

    def __init__(self) -> None:
        super().__init__()
        self._maker, self.notified = threading.get_ident(), 0

    def notify(self, n: int = 1) -> None:
        self.notified += threading.get_ident() == self._maker
        super().notify(n)


def calm_leader(make: Callable[..., Rig], wake: CountingCondition) -> tuple[Rig, Append, list[tuple[int, bool]]]:
    """Of one voter, with a learner that has everything; it says no heartbeat by itself. Its newest heartbeat, and for
    each batch of entries it sent: how many, and whether it was calm when it did."""
    beats: queue.SimpleQueue[Append] = queue.SimpleQueue()
    batches: list[tuple[int, bool]] = []

    def send(messages: Sequence[tuple[VoterId, Message]]) -> None:
        for _, message in messages:
            assert isinstance(message, Append)
            if message.entries:
                batches.append((len(message.entries), rig.driver._calm))
            beats.put(message)

    rig = make(send=send)
    rig.replica.timers = replace(rig.replica.timers, heartbeat=3600.0)
    rig.driver._wake = wake
    rig.start()
    rig.driver.reconfigure(Config((rig.replica.me,), (LEARNER,))).result(SECONDS)
    while not rig.driver._calm:
        beat = beats.get(timeout=SECONDS)
        rig.driver.receive(LEARNER, answer_to(beat))
        wait_until(lambda: rig.driver._calm or not beats.empty())
    return rig, beat, batches


LEARNER = VoterId("n2@d")


def answer_to(beat: Append, *, ok: bool = True) -> AppendReply:
    match = Index(beat.prev_index + len(beat.entries))
    return AppendReply(beat.term, ok, match, Term(0), Index(0), match, beat.round, 0, True)


def test_answers_to_heartbeats_wake_nobody_while_all_have_everything(make: Callable[..., Rig]) -> None:
    """But a refusal does. None is lost, and none looks slow for having waited."""
    wake = CountingCondition()
    rig, beat, _ = calm_leader(make, wake)
    p = rig.replica.progress[LEARNER]
    known = len(p.answers)
    with wake:  # the replica's thread takes nothing meanwhile
        before = wake.notified
        for _ in range(5):
            rig.driver.receive(LEARNER, answer_to(beat))
        assert wake.notified == before
        lain = list(rig.driver._inbox)[-5:]
        assert all(isinstance(event, Received) and event.came is not None for event in lain)
        rig.driver.receive(LEARNER, answer_to(beat, ok=False))
        assert wake.notified == before + 1
    wait_until(lambda: len(p.answers) == known + 6)


def test_a_leader_is_not_calm_when_it_sends_what_must_be_answered(make: Callable[..., Rig]) -> None:
    """The answer may be here before the turn in which it was sent is over."""
    rig, _, batches = calm_leader(make, CountingCondition())
    batches.clear()
    rig.propose(b"x").result(SECONDS)
    wait_until(lambda: batches)
    assert batches == [(1, False)]


def test_a_mark_of_the_machine_is_told_to_the_replica(rig: Rig) -> None:
    rig.machine.mark = (1024, 7)
    rig.proposed(b"x")
    wait_until(lambda: rig.replica.marks[-1] == (1024, 7))


def test_the_floor_is_written_when_the_journal_falls_idle(rig: Rig) -> None:
    """So that damage to what was answered is never taken for a torn write."""
    ((index, _),) = rig.proposed(b"x")
    wait_until(lambda: rig.log.acked_floor >= index)


def test_the_floor_travels_with_the_next_entries(rig: Rig) -> None:
    rig.log.gate.shut()
    first = rig.propose(b"0")
    rig.log.gate.arrived()
    second = rig.propose(b"1")
    rig.log.gate.open()
    index = first.result(SECONDS)[0]
    second.result(SECONDS)
    assert rig.log.acked_floor >= index


def test_progress_is_never_ahead_of_the_truth(rig: Rig) -> None:
    seen = []
    for n in range(30):
        future = rig.propose(b"%d" % n)
        seen.append(rig.driver.view)
        future.result(SECONDS)
    last, _ = rig.proposed(b"last")[0]
    wait_until(lambda: rig.driver.view.applied_index == last)
    final = rig.driver.view
    for earlier, later in zip(seen, [*seen[1:], final], strict=True):
        assert earlier.commit_index <= later.commit_index
        assert earlier.applied_index <= later.applied_index
    assert final.commit_index == final.applied_index == rig.log.records[-1][0].index
