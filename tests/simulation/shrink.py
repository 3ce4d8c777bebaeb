"""Makes a failing schedule short and readable: leaves out whatever it fails without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tests.simulation.profile import Profile
from tests.simulation.schedule import Outcome, run_seed

STORY_LINES = 400


def shrink(seed: int, profile: Profile, kind: str) -> tuple[Profile, Outcome]:
    """The least profile found under which the seed still fails in this way, and its outcome with the story."""
    shorter = True
    while shorter:
        shorter = False
        for less in _smaller(profile):
            if run_seed(seed, less).kind == kind:
                profile, shorter = less, True
                break
    return profile, run_seed(seed, profile, story=True)


def _smaller(profile: Profile) -> Iterator[Profile]:
    for fault in profile.faults:
        yield profile.without(fault)
    if profile.exam:
        yield replace(profile, exam="")
    if profile.spares:
        yield replace(profile, spares=profile.spares - 1)
    if profile.workers:
        yield replace(profile, workers=profile.workers - 1)
    if profile.clients > 1:
        yield replace(profile, clients=profile.clients - 1)
    if profile.voters > 3:
        yield replace(profile, voters=profile.voters - 2)
    for fault, intensity in profile.faults.items():
        if intensity > 0.5:
            yield replace(profile, faults={**profile.faults, fault: intensity / 2})
    for share in (0.5, 0.8):
        if profile.chaos * share >= 0.5:
            yield replace(profile, chaos=round(profile.chaos * share, 2))


def transcript(outcome: Outcome, lines: int = STORY_LINES) -> str:
    """The end of the story, which is where it goes wrong."""
    left_out = max(len(outcome.story) - lines, 0)
    head = [f"... {left_out} lines before this"] if left_out else []
    return "\n".join([*head, *outcome.story[-lines:]])
