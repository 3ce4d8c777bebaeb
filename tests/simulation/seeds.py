"""What the tests run by default, in shares, so that pytest's workers can take one each. P2P_CAMPAIGN=N runs N seeds."""

from __future__ import annotations

import os

from tests.simulation.bugs import BUGS, planted
from tests.simulation.campaign import profile_for, stored_bugs
from tests.simulation.schedule import run_seed

SEEDS = int(os.environ.get("P2P_CAMPAIGN", "0")) or 300
SHARES = 2
TRIES = 60  # beyond the stored seed: the cores' timing may have moved since it was stored


def run_share(share: int) -> None:
    """Every SHARES-th seed; a failing one is told with the command that tells its story."""
    for seed in range(share, SEEDS, SHARES):
        outcome = run_seed(seed)
        assert not outcome.violation, f"{outcome.violation}\n  scripts/simulate --show {seed}"


def bugs_of(share: int) -> list[str]:
    return sorted(bug for bug in BUGS if not BUGS[bug].rare)[share::SHARES]


def catch(bug: str) -> None:
    """The bug is found by its stored seed or soon after, and it is the bug: without it that seed passes."""
    stored = stored_bugs().get(bug, {}).get("seed", 0)
    for seed in (stored, *range(TRIES)):
        profile = profile_for(bug, seed)
        with planted(bug):
            caught = run_seed(seed, profile)
        if caught.violation:
            break
    else:
        raise AssertionError(
            f"{bug}: not found by seed {stored} nor by the first {TRIES}; scripts/simulate --bugs --store"
        )
    clean = run_seed(seed, profile)
    assert not clean.violation, f"seed {seed} fails without the bug too: {clean.violation}"
