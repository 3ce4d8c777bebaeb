"""A seed is a story that can be told again, in this process and in another one with other hashes; stored seeds pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.bugs import BUGS, planted
from tests.simulation.campaign import SEEDS
from tests.simulation.profile import FAULTS, Profile, draw
from tests.simulation.schedule import run_seed
from tests.simulation.shrink import shrink, transcript

STORED = sorted(path for path in SEEDS.glob("*.json") if path.name != "bugs.json")


@pytest.mark.parametrize("seed", [3, 24, 57, 91])
def test_a_seed_gives_the_same_events_twice(seed: int) -> None:
    first, second = run_seed(seed), run_seed(seed, story=True)
    assert first._replace(story=[]) == second._replace(story=[])


def test_a_seed_gives_the_same_events_under_other_hashes() -> None:
    program = "from tests.simulation.schedule import run_seed; print(*(run_seed(s).trace for s in (5, 24, 33)))"
    traces = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hashes, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hashes in ("1", "2", "random")
    }
    assert len(traces) == 1


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_seed_that_once_failed_passes(path: Path) -> None:
    kept = json.loads(path.read_text())
    outcome = run_seed(kept["seed"], Profile.from_json(kept["profile"]))
    assert not outcome.violation, outcome.violation


def test_profiles_are_swarms() -> None:
    drawn = [draw(seed) for seed in range(400)]
    assert {profile.voters for profile in drawn} == {1, 2, 3, 4, 5, 7}
    assert {kind for profile in drawn for kind in profile.faults} == set(FAULTS)
    assert any(not profile.faults for profile in drawn)
    assert all(Profile.from_json(json.loads(json.dumps(p.to_json()))) == p for p in drawn)


def test_a_failing_seed_is_shrunk_to_a_story() -> None:
    with planted("ack before fsync"):
        full = draw(0)
        less, outcome = shrink(0, full, "durability")
    assert len(less.faults) <= len(full.faults)
    assert "VIOLATION durability" in transcript(outcome)


def test_a_bug_that_cannot_be_planted_any_more_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    bug = BUGS["no pre-vote"]
    monkeypatch.setitem(BUGS, "gone", bug._replace(slips=(bug.slips[0]._replace(right="no such code"),)))
    with pytest.raises(LookupError, match="any more"), planted("gone"):
        pass
