"""Health thresholds, each at its boundary, and alerts that are raised once and cleared once."""

from __future__ import annotations

from typing import Any

import pytest

from config.settings import HealthSettings
from coordination.alerts import AlertBook
from coordination.events import Event, EventBus
from coordination.events import EventType as E
from coordination.health import QueueFigures, judge

CALM: dict[str, Any] = {
    "pending": 0, "stuck": 0, "completed_hour": 0, "failed_hour": 0,
    "since_completion": None, "since_pending": None, "depth_over_for": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("figures", "breach"),
    [
        ({"pending": 1000, "depth_over_for": 9999.0}, None),
        ({"pending": 1001, "depth_over_for": 3599.9}, None),
        ({"pending": 1001, "depth_over_for": 3600.0}, "queue_depth"),
        ({"stuck": 10}, None),
        ({"stuck": 11}, "stuck_jobs"),
        ({"completed_hour": 0, "failed_hour": 9}, None),
        ({"completed_hour": 0, "failed_hour": 10}, "failure_rate"),
        ({"completed_hour": 5, "failed_hour": 5}, None),
        ({"completed_hour": 5, "failed_hour": 6}, "failure_rate"),
        ({"pending": 1, "since_completion": 1800.0, "since_pending": 9999.0}, None),
        ({"pending": 1, "since_completion": 1800.1, "since_pending": 9999.0}, "time_since_completion"),
        ({"pending": 1, "since_completion": 9999.0, "since_pending": 1800.0}, None),
        ({"pending": 1, "since_completion": None, "since_pending": 1800.1}, "time_since_completion"),
        ({"pending": 0, "since_completion": 99_999.0}, None),
    ],
)
def test_threshold(figures: dict[str, Any], breach: str | None) -> None:
    verdict = judge(QueueFigures(**{**CALM, **figures}), HealthSettings())
    assert list(verdict.breaches) == ([breach] if breach else [])
    assert verdict.is_healthy is (breach is None)
    assert verdict.message == (verdict.breaches[breach] if breach else "healthy")


def test_verdict_as_the_api_gives_it() -> None:
    figures = QueueFigures(**{**CALM, "completed_hour": 1, "failed_hour": 2, "stuck": 11, "pending": 3})
    body = judge(figures, HealthSettings()).as_json(figures)
    assert body["is_healthy"] is False
    assert body["message"] == "11 jobs without a sign of life, more than 10"
    details = body["details"]
    assert (details["queue_depth"], details["stuck_jobs"], details["failure_rate"]) == (3, 11, 0.6667)


@pytest.fixture
def told() -> list[Event]:
    return []


@pytest.fixture
def book(told: list[Event]) -> AlertBook:
    bus = EventBus()
    bus.subscribe(lambda batch: told.extend(event for _, event in batch))
    return AlertBook(bus)


def test_breach_that_lasts_is_one_alert_and_its_end_is_told_once(book: AlertBook, told: list[Event]) -> None:
    for minute in range(5):
        book.reconcile("queue", {"stuck_jobs": f"{11 + minute} jobs"}, minute)
    assert [(event.type, event.fields["alert"]) for event in told] == [(E.ALERT_RAISED, "stuck_jobs")]
    (standing,) = book.standing()
    assert (standing["message"], standing["since"]) == ("15 jobs", 0.0)
    for minute in range(5, 8):
        book.reconcile("queue", {}, minute)
    assert [event.type for event in told] == [E.ALERT_RAISED, E.ALERT_CLEARED]
    assert told[-1].at_ms == 5
    book.reconcile("queue", {"stuck_jobs": "again"}, 9)
    assert told[-1].type is E.ALERT_RAISED


def test_sources_do_not_clear_each_others_alerts(book: AlertBook) -> None:
    book.reconcile("queue", {"a": "…"}, 1)
    book.reconcile("disk", {}, 2)
    book.raise_alert("by hand", "…", 3)
    book.reconcile("queue", {}, 4)
    assert [alert["alert"] for alert in book.standing()] == ["by hand"]


def test_alert_raised_by_hand_is_new_once(book: AlertBook, told: list[Event]) -> None:
    assert book.raise_alert("a", "one", 1, severity="critical")
    assert not book.raise_alert("a", "two", 2)
    assert book.clear_alert("a", 3)
    assert not book.clear_alert("a", 4)
    assert [event.type for event in told] == [E.ALERT_RAISED, E.ALERT_CLEARED]
    assert told[0].fields["severity"] == "critical"


def test_alerts_are_bounded_and_the_one_that_gives_way_is_told(book: AlertBook, told: list[Event]) -> None:
    for n in range(AlertBook.MAX_STANDING + 1):
        book.raise_alert(f"a{n}", "…", n)
    assert len(book.standing()) == AlertBook.MAX_STANDING
    assert [event.fields["alert"] for event in told if event.type is E.ALERT_CLEARED] == ["a0"]
