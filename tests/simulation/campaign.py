"""Many seeds on all cores: how many, how fast, what was met, what was found. Also how soon a planted bug is found."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tests.simulation import profile as profiles
from tests.simulation.bugs import BUGS, planted
from tests.simulation.profile import Profile
from tests.simulation.schedule import Outcome, run_seed

SEEDS = Path(__file__).parent.parent / "seeds"
CHUNK = 10
MOST_SEEDS_FOR_A_BUG = 2_000


def profile_for(bug: str, seed: int) -> Profile:
    """The profile of a seed, leaning towards what a bug shows under."""
    drawn = profiles.draw(seed)
    if not bug:
        return drawn
    wanted = BUGS[bug]
    drawn = replace(drawn, voters=max(drawn.voters, 3), real_queue=False)
    faults = {**drawn.faults, **{kind: max(drawn.faults.get(kind, 0.0), 4.0) for kind in wanted.faults}}
    return replace(drawn, **{**(wanted.profile or {}), "faults": dict(sorted(faults.items()))})


@dataclass
class Tally:
    """What a campaign has seen."""

    schedules: int = 0
    events: int = 0
    virtual: float = 0.0
    seconds: float = 0.0
    coverage: Counter[tuple[str, str]] = field(default_factory=Counter)
    figures: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    exams: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str, str]] = field(default_factory=list)  # seed, kind, violation

    def add(self, outcome: Outcome) -> None:
        self.schedules += 1
        self.events += outcome.events
        self.virtual += outcome.virtual
        self.coverage.update(outcome.coverage)
        self.exams[outcome.exam] += 1
        for name, value in outcome.figures.items():
            self.figures[name].append(value)
        if outcome.violation:
            self.failures.append((outcome.seed, outcome.kind, outcome.violation))

    def merge(self, other: Tally) -> None:
        self.schedules += other.schedules
        self.events += other.events
        self.virtual += other.virtual
        self.coverage.update(other.coverage)
        self.exams.update(other.exams)
        for name, values in other.figures.items():
            self.figures[name].extend(values)
        self.failures.extend(other.failures)

    def summary(self) -> dict[str, Any]:
        """One line for docs/benchmarks.md."""
        return {
            "schedules": self.schedules,
            "violations": len(self.failures),
            "virtual_hours": round(self.virtual / 3600, 2),
            "events": self.events,
            "seconds": round(self.seconds, 1),
            "schedules_per_second": round(self.schedules / max(self.seconds, 1e-9), 1),
            "faults": sum(self.coverage.values()),
            "p99": {name: round(_percentile(values, 0.99), 2) for name, values in sorted(self.figures.items())},
            "worst": {name: round(max(values), 2) for name, values in sorted(self.figures.items())},
        }

    def table(self) -> str:
        """Fault x role: how often each was met."""
        roles = sorted({role for _, role in self.coverage})
        lines = [f"{'':<20}" + "".join(f"{role:>11}" for role in roles)]
        for fault in sorted({fault for fault, _ in self.coverage}):
            lines.append(f"{fault:<20}" + "".join(f"{self.coverage[(fault, role)]:>11}" for role in roles))
        return "\n".join(lines)


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


class _Chunk(NamedTuple):
    start: int
    count: int
    bug: str


def _run_chunk(chunk: _Chunk) -> Tally:
    tally = Tally()
    with planted(chunk.bug):
        for seed in range(chunk.start, chunk.start + chunk.count):
            tally.add(run_seed(seed, profile_for(chunk.bug, seed)))
    return tally


def run_campaign(
    start: int,
    count: int,
    *,
    minutes: float = 0.0,
    jobs: int = 1,
    bug: str = "",
    stop_at_first: bool = True,
    progress: Callable[[Tally], None] | None = None,
) -> Tally:
    """Seeds start.. (as many as fit into `minutes`, if that is given)."""
    began = time.monotonic()
    total = Tally()

    def chunks() -> Iterator[_Chunk]:
        at = start
        while (at < start + count) if not minutes else (time.monotonic() - began < minutes * 60):
            yield _Chunk(at, CHUNK if minutes else min(CHUNK, start + count - at), bug)
            at += CHUNK

    with multiprocessing.Pool(jobs) as pool:
        waiting = []
        source = chunks()
        for chunk in source:
            waiting.append(pool.apply_async(_run_chunk, (chunk,)))
            if len(waiting) < 2 * jobs:
                continue
            total.merge(waiting.pop(0).get())
            total.seconds = time.monotonic() - began
            if progress is not None:
                progress(total)
            if total.failures and stop_at_first:
                break
        for result in waiting:
            total.merge(result.get())
    total.seconds = time.monotonic() - began
    total.failures.sort()
    return total


def first_catch(bug: str, start: int, most: int = MOST_SEEDS_FOR_A_BUG) -> Outcome | None:
    """The first seed from `start` on that finds a planted bug; None within `most`."""
    with planted(bug):
        for seed in range(start, start + most):
            outcome = run_seed(seed, profile_for(bug, seed))
            if outcome.violation:
                return outcome
    return None


class Found(NamedTuple):
    bug: str
    tries: list[int]  # seeds it took, by range; more than MOST_SEEDS_FOR_A_BUG: not found
    seed: int
    violation: str

    @property
    def median(self) -> float:
        return float(median(self.tries))


def measure(bug: str, ranges: int = 5) -> Found:
    """How many seeds it takes to find a bug, from several disjoint starts."""
    tries: list[int] = []
    best: Outcome | None = None
    for n in range(ranges):
        start = n * 100_000
        outcome = first_catch(bug, start)
        tries.append(outcome.seed - start + 1 if outcome is not None else MOST_SEEDS_FOR_A_BUG + 1)
        if outcome is not None and (best is None or outcome.events < best.events):
            best = outcome
    return Found(bug, tries, best.seed if best else -1, best.violation if best else "")


def stored_bugs() -> dict[str, Any]:
    """What tests/seeds/bugs.json knows: bug -> the seed that catches it, and the median it took."""
    path = SEEDS / "bugs.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def store_bug(found: Found) -> None:
    known = stored_bugs()
    known[found.bug] = {"seed": found.seed, "median": found.median, "tries": found.tries, "violation": found.violation}
    (SEEDS / "bugs.json").write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def store_failure(outcome: Outcome, profile: Profile, note: str = "", bug: str = "") -> Path:
    """Keeps a failing seed for ever: tests/seeds/*.json are replayed by the tests. `bug` is what made it fail, as it
    can be planted again, to see that the seed still would."""
    SEEDS.mkdir(exist_ok=True)
    path = SEEDS / f"{outcome.kind.replace(' ', '-')}-{outcome.seed}.json"
    kept = {"seed": outcome.seed, "was": outcome.violation, "note": note, "bug": bug, "profile": profile.to_json()}
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    return path
