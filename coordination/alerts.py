"""Alerts: raised once, cleared once, told as events. `emit_alert` and `clear_alert` are for operators' scripts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from coordination import live
from coordination.answers import Answer
from coordination.errors import InvalidInput
from coordination.events import Event, EventBus
from coordination.events import EventType as E

SEVERITIES = ("info", "warning", "critical")


class AlertBook:
    """Which alerts stand. A condition that persists is one alert, not one a minute."""

    MAX_STANDING = 1_000

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self._standing: dict[str, dict[str, Any]] = {}

    def reconcile(self, source: str, breaches: Mapping[str, str], now_ms: int) -> None:
        """Makes the standing alerts of `source` those of `breaches` (name -> sentence), telling each change."""
        for name, message in breaches.items():
            self.raise_alert(name, message, now_ms, source=source)
        for name in [n for n, alert in self._standing.items() if alert["source"] == source and n not in breaches]:
            del self._standing[name]
            self._bus.publish([Event(E.ALERT_CLEARED, now_ms, {"alert": name, "source": source})])

    def raise_alert(
        self, name: str, message: str, now_ms: int, *, severity: str = "warning", source: str = "operator"
    ) -> bool:
        """Raises an alert unless it stands already; answers whether it is new."""
        standing = self._standing.get(name)
        if standing is not None:
            standing["message"] = message
            return False
        if len(self._standing) >= self.MAX_STANDING:
            self.clear_alert(next(iter(self._standing)), now_ms)
        fields = {"alert": name, "severity": severity, "message": message, "source": source}
        self._standing[name] = {**fields, "since": now_ms / 1000}
        self._bus.publish([Event(E.ALERT_RAISED, now_ms, fields)])
        return True

    def clear_alert(self, name: str, now_ms: int) -> bool:
        """Clears a standing alert; answers whether it stood."""
        standing = self._standing.pop(name, None)
        if standing is not None:
            self._bus.publish([Event(E.ALERT_CLEARED, now_ms, {"alert": name, "source": standing["source"]})])
        return standing is not None

    def standing(self) -> list[dict[str, Any]]:
        """The alerts that stand, oldest first."""
        return list(self._standing.values())


def emit_alert(name: str, message: str = "", *, severity: str = "warning", **details: Any) -> Answer:
    """Raises an alert on the running node: an event, a log line, once while it stands. Shape: ``{"raised": bool}``.

    Details are appended to the message as ``key=value``. Raises NodeUnreachable if no node answers here.
    """
    if severity not in SEVERITIES:
        raise InvalidInput("severity", f"must be one of {', '.join(SEVERITIES)}")
    text = " ".join([message or name, *(f"{key}={value}" for key, value in details.items())])
    return live.backend().call("raise_alert", name=name, message=text, severity=severity)


def clear_alert(name: str) -> Answer:
    """Clears a standing alert, so that the next one of this name is told again. Shape: ``{"cleared": bool}``.

    Raises NodeUnreachable if no node answers here.
    """
    return live.backend().call("clear_alert", name=name)


def now_ms() -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000
