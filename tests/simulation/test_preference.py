"""L3: the preferred voter gets its seat back, once it has been well for long enough, and not more often than that."""

from __future__ import annotations

from itertools import pairwise

import pytest

from p2p.election.rank import Timers
from tests.simulation.profile import Profile
from tests.simulation.schedule import Schedule

# A tenth of the real ones, so that a test sees what takes hours.
QUICK = Timers(preempt_steady=3.0, preempt_longest=60.0, preempt_since_change=6.0)


def _cluster(seed: int) -> Schedule:
    schedule = Schedule(seed, Profile(voters=3, ranks=False, clients=1, workers=0, think=0.2))
    for priority, node in enumerate(schedule.world.nodes.values()):
        node.priority, node.timers = priority, QUICK
        node.boot()
    schedule.world.run(3.0)
    return schedule


def _leader(schedule: Schedule) -> str:
    return next(n.name for n in schedule.world.nodes.values() if n.up and n.replica.established)


@pytest.mark.parametrize("seed", range(8))
def test_preferred_voter_regains_its_seat(seed: int) -> None:
    schedule = _cluster(seed)
    world, best = schedule.world, list(schedule.world.nodes.values())[-1]
    world.run(world.now + 30.0)
    assert _leader(schedule) == best.name
    best.crash(power=False)
    world.run(world.now + 3.0)
    assert _leader(schedule) != best.name
    best.boot()
    back, changes = world.now, len(schedule.watch.changes.at)
    hold_down = best.timers.preempt_steady * 2 ** (changes - 1)
    while _leader(schedule) != best.name:
        world.run(world.now + 0.5)
        assert world.now - back <= max(hold_down, QUICK.preempt_since_change) + 5.0
    world.run(world.now + 30.0)
    assert len(schedule.watch.changes.at) == changes + 1  # the seat changed once more, and then no more


@pytest.mark.parametrize("seed", range(4))
def test_flapping_favourite_forces_fewer_and_fewer_changes(seed: int) -> None:
    schedule = _cluster(seed)
    world, best = schedule.world, list(schedule.world.nodes.values())[-1]
    regained: list[float] = []
    until = world.now + 240.0
    while world.now < until:
        world.run(world.now + 0.5)
        if _leader(schedule) == best.name:
            regained.append(world.now)
            best.crash(power=False)
            world.run(world.now + 2.0)
            best.boot()
    waits = [b - a for a, b in pairwise(regained)]
    assert len(regained) < 10
    assert all(later > 0.9 * earlier for earlier, later in pairwise(waits))
