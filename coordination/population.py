"""How many jobs of each kind the populator should add now. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordination.kinds import Kinds, Populate

MAX_ADDED_AT_ONCE = 1_000
PAUSE_AFTER_FAILURES = 10  # of the last hour, with no completion: more of the same would only burn the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class KindCounts:
    """What the queue says of one kind: unfinished now, submitted ever, ends of the last hour."""

    unfinished: int = 0
    submitted_ever: int = 0
    completed_hour: int = 0
    failed_hour: int = 0
    since_added: float = float("inf")  # seconds since the populator last added some


@dataclass(frozen=True, slots=True)
class Wanted:
    """Jobs to add: bodies of ``POST /jobs``, and a word for the populator's page."""

    kind: str
    jobs: list[dict[str, Any]]
    why: str


def wanted(
    kinds: Kinds, counts: dict[str, KindCounts], *, force: bool, totals: Mapping[str, int] | None = None
) -> list[Wanted]:
    """What each populated kind lacks. `force` overrides the pauses of a kind, never its total. `totals` takes the
    place of the kinds' own."""
    plan = []
    for name, kind in sorted(kinds.by_name.items()):
        if kind.populate is None:
            continue
        have = counts.get(name, KindCounts())
        lacking = max(kind.populate.pending - have.unfinished, 0)
        why = f"{have.unfinished} of {kind.populate.pending} in the queue"
        total = (totals or {}).get(name, kind.populate.total)
        if total is not None:
            why += f", {have.submitted_ever} of {total} ever"
            lacking = min(lacking, max(total - have.submitted_ever, 0))
        if have.since_added < kind.populate.every_seconds and not force:
            lacking, why = 0, f"{why}, next in {kind.populate.every_seconds - have.since_added:.0f} s"
        if have.failed_hour >= PAUSE_AFTER_FAILURES and have.completed_hour == 0 and not force:
            lacking, why = 0, f"paused: all {have.failed_hour} of the last hour failed"
        lacking = min(lacking, MAX_ADDED_AT_ONCE)
        jobs = [_job(name, kind.populate, have.submitted_ever + n) for n in range(lacking)]
        plan.append(Wanted(name, jobs, why))
    return plan


def _job(kind: str, rule: Populate, number: int) -> dict[str, Any]:
    """Job number `number` of its kind: each varied param takes its next value, like the digits of a counter."""
    params: dict[str, Any] = {}
    rest = number
    for name, values in sorted(rule.vary.items()):
        params[name] = values[rest % len(values)]
        rest //= len(values)
    if rule.seed_param is not None:
        params[rule.seed_param] = number + 1
    return {"kind": kind, "params": params, "group": "populator"}
