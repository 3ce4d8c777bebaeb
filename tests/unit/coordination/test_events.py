"""The event bus: numbered, in order, bounded, and no listener can stop another."""

from __future__ import annotations

import logging
import threading

import pytest

from coordination.events import Event, EventBus
from coordination.events import EventType as E

Numbered = list[tuple[int, Event]]


def event(n: int) -> Event:
    return Event(E.WORK_QUEUED, n, {"job": f"j{n}"})


def test_events_are_numbered_from_one_without_gaps() -> None:
    bus = EventBus()
    got: Numbered = []
    bus.subscribe(got.extend)
    bus.publish([event(1), event(2)])
    bus.publish([])
    bus.publish([event(3)])
    assert [(n, e.at_ms) for n, e in got] == [(1, 1), (2, 2), (3, 3)]


def test_tail_answers_what_came_after() -> None:
    bus = EventBus()
    bus.publish(event(n) for n in range(1, 6))
    assert [n for n, _ in bus.tail(3)] == [4, 5]
    assert bus.tail(5) == []


def test_tail_is_bounded_and_keeps_the_newest() -> None:
    bus = EventBus()
    bus.publish(event(n) for n in range(EventBus.TAIL + 10))
    bus.publish([event(0)])
    numbers = [n for n, _ in bus.tail()]
    assert numbers == list(range(12, EventBus.TAIL + 12))


def test_unsubscribed_listener_hears_nothing_more() -> None:
    bus = EventBus()
    first: Numbered = []
    second: Numbered = []
    leave = bus.subscribe(first.extend)
    bus.subscribe(second.extend)
    bus.publish([event(1)])
    leave()
    leave()
    bus.publish([event(2)])
    assert ([n for n, _ in first], [n for n, _ in second]) == ([1], [1, 2])


def test_what_a_listener_publishes_comes_after_for_everybody() -> None:
    bus = EventBus()
    orders: list[list[int]] = [[], []]

    def first(batch: Numbered) -> None:
        orders[0] += [n for n, _ in batch]
        if batch[0][0] == 1:
            bus.publish([event(2)])

    bus.subscribe(first)
    bus.subscribe(lambda batch: orders[1].extend(n for n, _ in batch))
    bus.publish([event(1)])
    assert orders == [[1, 2], [1, 2]]


def test_every_listener_sees_one_order_whoever_publishes() -> None:
    bus = EventBus()
    got: list[int] = []
    hold, go = threading.Event(), threading.Event()

    def listener(batch: Numbered) -> None:
        if batch[0][0] == 1:
            hold.set()
            assert go.wait(10)
        got.extend(n for n, _ in batch)

    bus.subscribe(listener)
    first = threading.Thread(target=bus.publish, args=([event(1)],))
    first.start()
    assert hold.wait(10)
    second = threading.Thread(target=bus.publish, args=([event(2)],))
    second.start()
    second.join(0.05)  # it cannot end before the first: that is the point
    go.set()
    first.join()
    second.join()
    assert got == [1, 2]


def test_listener_that_raises_is_logged_and_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    bus = EventBus()
    got: Numbered = []

    def broken(batch: Numbered) -> None:
        raise RuntimeError("full")

    bus.subscribe(broken)
    bus.subscribe(got.extend)
    with caplog.at_level(logging.ERROR):
        bus.publish([event(1)])
        bus.publish([event(2)])
    assert [n for n, _ in got] == [1, 2]
    assert "events 1 to 1" in caplog.text


def test_event_as_json() -> None:
    assert Event(E.NODE_DEAD, 1_500, {"node": "n2"}).as_json() == {"event": "NODE_DEAD", "at": 1.5, "node": "n2"}


def test_released_names_are_those_of_the_design() -> None:
    names = (
        "WORK_QUEUED WORK_CLAIMED WORK_STARTED WORK_COMPLETED WORK_FAILED WORK_RETRIED WORK_TIMEOUT WORK_RELEASED "
        "WORK_CANCELLED WORK_STALLED NODE_JOINED NODE_SUSPECT NODE_DEAD NODE_LEFT LEADER_ELECTED LEADER_LOST "
        "VOTER_ADDED VOTER_REMOVED DAEMON_RESTARTED DAEMON_FAILED ALERT_RAISED ALERT_CLEARED"
    )
    assert set(names.split()) <= {str(name) for name in E}
    assert all(name.value == name.name for name in E)
