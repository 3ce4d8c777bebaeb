"""The command behind scripts/simulate."""

from __future__ import annotations

import argparse
import json
import os
import sys

from tests.simulation import campaign
from tests.simulation.bugs import BUGS, planted
from tests.simulation.schedule import run_seed
from tests.simulation.shrink import shrink, transcript


def main() -> int:
    asked = _arguments()
    if asked.bugs:
        return _measure_bugs(asked)
    if asked.show is not None:
        with planted(asked.bug):
            outcome = run_seed(asked.show, campaign.profile_for(asked.bug, asked.show), story=True)
        print(transcript(outcome, 1 << 30))
        return 1 if outcome.violation else 0
    tally = campaign.run_campaign(
        asked.start,
        asked.seeds,
        minutes=asked.minutes,
        jobs=asked.jobs,
        bug=asked.bug,
        stop_at_first=not asked.keep_going,
        progress=_progress if sys.stderr.isatty() else None,
    )
    print(tally.table())
    for seed, kind, violation in tally.failures[:20]:
        print(f"seed {seed}: {violation}  [{kind}]")
    if tally.failures:
        _explain(tally.failures[0], asked)
    print(json.dumps({"bench": "simulation", "bug": asked.bug, **tally.summary()}))
    return 1 if bool(tally.failures) != bool(asked.bug) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/simulate", description="Runs simulated clusters, a seed each.")
    parser.add_argument("--seeds", type=int, default=1_000, help="how many (1000)")
    parser.add_argument("--start", type=int, default=0, help="the first one (0)")
    parser.add_argument("--minutes", type=float, default=0.0, help="run for so long instead")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (one a core)")
    parser.add_argument("--bug", default="", choices=["", *BUGS], metavar="NAME", help="plant this bug")
    parser.add_argument("--bugs", action="store_true", help="measure how many seeds each planted bug takes")
    parser.add_argument("--store", action="store_true", help="with --bugs: keep the seeds in tests/seeds/bugs.json")
    parser.add_argument("--ranges", type=int, default=5, help="with --bugs: disjoint ranges of seeds (5)")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first violation")
    parser.add_argument("--show", type=int, metavar="SEED", help="tell the story of one seed")
    return parser.parse_args()


def _progress(tally: campaign.Tally) -> None:
    print(f"\r{tally.schedules} schedules, {len(tally.failures)} violations", end="", file=sys.stderr, flush=True)


def _explain(failure: tuple[int, str, str], asked: argparse.Namespace) -> None:
    """Shrinks the first failing seed, tells its story and, unless the bug was planted, keeps it for ever."""
    seed, kind, _ = failure
    with planted(asked.bug):
        profile, outcome = shrink(seed, campaign.profile_for(asked.bug, seed), kind)
    print(f"\nseed {seed}, shrunk to {profile}\n{transcript(outcome)}\n")
    if not asked.bug:
        print(f"kept as {campaign.store_failure(outcome, profile)}")


def _measure_bugs(asked: argparse.Namespace) -> int:
    missed = 0
    for bug in [asked.bug] if asked.bug else [bug for bug in BUGS if not BUGS[bug].rare]:
        found = campaign.measure(bug, asked.ranges)
        missed += found.seed < 0
        print(f"{bug:<38} median {found.median:>6.0f}  {found.tries}  {found.violation[:90]}", flush=True)
        if asked.store and found.seed >= 0:
            campaign.store_bug(found)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
