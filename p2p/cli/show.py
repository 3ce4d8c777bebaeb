"""Plain data as lines for a terminal. Decides how it looks and nothing else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

Told = dict[str, Any]


def voters(told: Told) -> list[str]:
    rows = []
    for kind, key in (("voter", "voters"), ("learner", "learners")):
        for row in told.get(key, ()):
            leads = row.get("leads")
            lag = (
                0 if leads else told["last_index"] - row["match_index"] if row.get("match_index") is not None else None
            )
            rows.append(
                [
                    row["node"],
                    "leader" if leads else kind,
                    _trouble(row),
                    _number(lag),
                    "-" if leads or row.get("contact_age_seconds") is None else _seconds(row["contact_age_seconds"]),
                    row["disk"][:8],
                ]
            )
    count = len(told.get("voters", ()))
    return [
        *table(("NODE", "ROLE", "STATE", "LAG", "HEARD", "DISK"), rows),
        f"{count} voter{'s' * (count != 1)} of {told['voter_target']} wanted; term {told['term']}; "
        f"autopilot: {told['autopilot']}",
        *_warnings(count),
    ]


def _trouble(row: Told) -> str:
    if row.get("lost_entries"):
        return f"{row['state']}, lost entries"
    if row.get("diverged"):
        return f"{row['state']}, another queue"
    return f"{row['state']}, unfit" if row.get("ready") is False else str(row["state"])


def _warnings(voters: int) -> list[str]:
    if voters and voters % 2 == 0:
        return [f"{voters} voters survive no more failures than {voters - 1}: add one, or remove one"]
    return []


def leader(told: Told) -> list[str]:
    since = told.get("since")
    when = f", since {clock(since)} ({_seconds(told['seconds'])})" if since else ""
    return [f"{told['leader']} leads term {told['term']}{when}"]


def transfer(told: Told) -> list[str]:
    return [f"{told['leader']} leads term {told['term']}"]


def status(told: Told) -> list[str]:
    rows = [
        [
            n["node"],
            n["role"],
            n["state"] + (", draining" if n["draining"] else ""),
            _number(n["lag"]),
            _number(n["jobs"]),
            n["address"] or "-",
            n["version"] or "-",
        ]
        for n in told["nodes"]
    ]
    leads = f"{told['leader']} leads term {told['term']}" if told["leader"] else f"no leader (term {told['term']})"
    lines = table(("NODE", "ROLE", "STATE", "LAG", "JOBS", "ADDRESS", "VERSION"), rows)
    lines.append(f"{leads}; cluster {told['cluster'] or '-'}; as {told['asked']} sees it")
    if told["not_ready"]:
        lines.append(f"{told['asked']} is not ready: {told['not_ready']}")
    return lines


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they must be."""
    widths = [max(len(line[at]) for line in (head, *rows)) for at in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *rows)
    ]


def clock(unix: float) -> str:
    """Local time with its zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(unix))


def _number(value: Any) -> str:
    return "-" if value is None else str(value)


def _seconds(value: float) -> str:
    """Two units at most."""
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    if value < 7_200:
        return f"{value / 60:.0f} min"
    return f"{value / 3_600:.0f} h" if value < 172_800 else f"{value / 86_400:.0f} days"


def age(seconds: float) -> str:
    """``3 min ago``."""
    return f"{_seconds(max(seconds, 0.0))} ago"
