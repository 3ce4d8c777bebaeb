"""For each need the best node that could take it now, without a look at every node each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordination.fleet import Candidate, Fleet
from coordination.placement import Need, Node
from coordination.scoring import RoomScoring
from tests.unit.coordination.placing import gpu, need, needs, node, nodes


class Costs:
    """Costs by node, as a test says; counts how often it is asked."""

    def __init__(self, **by_name: float) -> None:
        self.by_name, self.epoch, self.asked = by_name, 0, list[str]()

    def cost(self, need: Need, node: Node, free: Sequence[int]) -> tuple[float, tuple[int, ...]]:
        self.asked.append(node.name)
        return self.by_name[node.name], tuple(free[: need.gpus])


def fleet_of(scoring: Any, *nodes: Node) -> Fleet:
    """All of them open."""
    fleet = Fleet(scoring)
    for each in nodes:
        fleet.put(each)
        fleet.set_open(each.name, True)
    return fleet


def best(fleet: Fleet, wanted: Need) -> str | None:
    found = fleet.best(wanted)
    return found.name if found is not None else None


PLAIN = need()


def test_the_least_cost_is_best_and_equals_are_settled_by_name() -> None:
    costs = Costs(a=2, b=1, c=1)
    assert best(fleet_of(costs, node("c"), node("b"), node("a")), PLAIN) == "b"


def test_only_a_node_that_has_changed_is_scored_again() -> None:
    costs = Costs(a=1, b=2, c=3)
    fleet = fleet_of(costs, node("a", cpus=1), node("b"), node("c"))
    assert best(fleet, PLAIN) == "a"
    costs.asked.clear()
    fleet.take(PLAIN, "a", ())
    assert best(fleet, PLAIN) == "b"
    assert best(fleet, PLAIN) == "b"
    fleet.give(PLAIN, "a", ())
    assert best(fleet, PLAIN) == "a"
    assert costs.asked == ["a"]


def test_once_opinions_have_changed_the_best_is_scored_anew_until_it_stays_the_best() -> None:
    costs = Costs(a=1, b=2, c=3, d=9)
    fleet = fleet_of(costs, *map(node, "abcd"))
    assert best(fleet, PLAIN) == "a"
    costs.by_name.update(a=5, b=6)
    assert best(fleet, PLAIN) == "a", "nobody has said so"
    costs.epoch += 1
    costs.asked.clear()
    assert best(fleet, PLAIN) == "c"
    assert costs.asked == ["a", "b", "c"], "not the one that was far behind"
    assert best(fleet, PLAIN) == "c"
    assert costs.asked == ["a", "b", "c"]


@pytest.mark.parametrize("change", ["taken", "closed", "removed", "filled by others"])
def test_an_old_opinion_never_brings_back_a_node_that_no_longer_fits(change: str) -> None:
    costs = Costs(a=1, b=2)
    fleet = fleet_of(costs, node("a", cpus=1), node("b"))
    assert best(fleet, PLAIN) == "a"
    match change:
        case "taken":
            fleet.take(PLAIN, "a", ())
        case "closed":
            fleet.set_open("a", False)
        case "removed":
            fleet.remove("a")
        case _:
            full = node("a", cpus=1)
            full.cpu_milli = 0
            fleet.put(full)
    costs.epoch += 1
    assert best(fleet, PLAIN) == "b"
    fleet.set_open("b", False)
    assert fleet.best(PLAIN) is None


def test_a_node_that_still_has_room_or_has_it_again_is_looked_at_again() -> None:
    fleet = fleet_of(Costs(a=1, b=2), node("a", cpus=2), node("b"))
    assert best(fleet, PLAIN) == "a"
    fleet.take(PLAIN, "a", ())
    assert best(fleet, PLAIN) == "a"
    fleet.take(PLAIN, "a", ())
    assert best(fleet, PLAIN) == "b"
    fleet.put(node("a", cpus=2))  # others have gone
    assert best(fleet, PLAIN) == "a"


def test_a_node_that_opens_again_is_looked_at_again() -> None:
    fleet = fleet_of(Costs(a=1), node("a"))
    assert best(fleet, PLAIN) == "a"
    fleet.set_open("a", False)
    assert best(fleet, PLAIN) is None
    fleet.set_open("a", True)
    assert best(fleet, PLAIN) == "a"


def test_work_without_gpus_keeps_off_gpu_nodes_while_others_can_take_it_or_as_it_prefers() -> None:
    fleet = fleet_of(Costs(a=1, b=9, c=5), node("a", "A100"), node("b", memory_mb=1_000), node("c", memory_mb=2_000))
    assert best(fleet, PLAIN) == "c"
    assert best(fleet, need(prefer="gpus")) == "a"
    assert best(fleet, need(prefer="memory")) == "c"
    assert best(fleet, need(gpus=1)) == "a"
    for name in "bc":
        fleet.take(need(cpus=32), name, ())
    assert best(fleet, PLAIN) == "a"


def test_candidates_come_best_first_and_are_all_there_the_next_time() -> None:
    fleet = fleet_of(Costs(a=3, b=1, c=2, d=0), *map(node, "abcd"))
    fleet.set_open("d", False)
    for _ in range(2):
        assert [candidate.name for candidate in fleet.candidates(PLAIN)] == ["b", "c", "a"]
    walk = fleet.candidates(PLAIN)
    assert next(walk).name == "b"
    walk.close()
    assert best(fleet, PLAIN) == "b"


def test_what_is_remembered_of_a_need_does_not_grow_with_the_changes() -> None:
    fleet = fleet_of(Costs(a=1, b=2), node("a"), node("b"))
    for _ in range(1_000):
        fleet.best(PLAIN)
        fleet.take(PLAIN, "b", ())
        fleet.give(PLAIN, "b", ())
    assert len(fleet._ranks[PLAIN].heap) < 100
    assert best(fleet, PLAIN) == "a"


# -- against a look at every node -----------------------------------------------------------------------------------

NAMES = ("n1", "n2", "n3", "n4")


def key(wanted: Need, box: Node, scoring: RoomScoring, free: Sequence[int]) -> tuple[int, float, str, tuple[int, ...]]:
    """What the nodes that fit are ordered by, and the GPUs."""
    cost, gpus = scoring.cost(wanted, box, free)
    if wanted.prefer == "memory":
        cost = -box.total_memory_mb
    detour = not wanted.gpus and bool(box.gpus) != (wanted.prefer == "gpus")
    return int(detour), cost, box.name, gpus


def every(fleet: Fleet, wanted: Need, scoring: RoomScoring) -> list[tuple[int, float, str, tuple[int, ...]]]:
    fits = [(fleet.nodes[name], fleet.nodes[name].fitting(wanted)) for name in fleet.open]
    return sorted(key(wanted, box, scoring, free) for box, free in fits if free is not None)


class Story:
    """A fleet, and whatever may happen to it."""

    def __init__(self, data: st.DataObject) -> None:
        self.data, self.scoring = data, RoomScoring()
        self.fleet = fleet_of(self.scoring, *(data.draw(nodes(name)) for name in NAMES))
        plain = data.draw(st.lists(needs(hints=False), min_size=1, max_size=4))
        self.needs = [*plain, need(prefer="gpus"), need(prefer="memory", cpus=0.5)]
        self.running: list[tuple[Need, str, tuple[int, ...]]] = []

    def turn(self) -> None:
        draw, fleet = self.data.draw, self.fleet
        name = draw(st.sampled_from(NAMES))
        match draw(st.sampled_from(["take"] * 4 + ["give"] * 2 + ["open", "close", "put", "arrived"])):
            case "take":
                found = fleet.best(draw(st.sampled_from(self.needs)))
                if found is not None:
                    wanted = draw(st.sampled_from(self.needs))
                    free = fleet.nodes[found.name].fitting(wanted)
                    if free is not None:
                        gpus = tuple(free[: wanted.gpus])
                        fleet.take(wanted, found.name, gpus)
                        self.running.append((wanted, found.name, gpus))
            case "give" if self.running:
                fleet.give(*self.running.pop(draw(st.integers(0, len(self.running) - 1))))
            case "open":
                fleet.set_open(name, True)
            case "close":
                fleet.set_open(name, False)
            case "put":
                self.running = [each for each in self.running if each[1] != name]
                now = draw(nodes(name)) if draw(st.booleans()) else fleet.nodes[name].copy()
                now.cpu_milli = draw(st.integers(0, now.total_cpu_milli))
                fleet.put(now)
            case "arrived":
                self.scoring.arrived(draw(st.sampled_from(self.needs)), draw(st.integers(1, 50)))

    def check(self, wanted: Need) -> Candidate | None:
        """The best, which must fit."""
        found = self.fleet.best(wanted)
        fits = every(self.fleet, wanted, self.scoring)
        if found is None:
            assert fits == []
            return None
        assert found.name in self.fleet.open
        free = self.fleet.nodes[found.name].fitting(wanted)
        assert free is not None
        assert set(found.gpus) <= set(free)
        assert len(set(found.gpus)) == wanted.gpus
        assert (found.detour, found.cost, found.name, found.gpus) in fits, "by the opinion of now"
        return found


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_best_always_fits_whatever_has_happened(data: st.DataObject) -> None:
    story = Story(data)
    for _ in range(data.draw(st.integers(1, 12))):
        story.turn()
        if data.draw(st.integers(0, 3)) == 0:
            story.scoring.renew(story.fleet.nodes.values())
        for wanted in story.needs:
            story.check(wanted)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_while_opinions_stay_the_best_is_the_best_of_all(data: st.DataObject) -> None:
    story = Story(data)
    for wanted in story.needs:
        story.scoring.arrived(wanted, data.draw(st.integers(1, 50)))
    story.scoring.renew(story.fleet.nodes.values())
    for _ in range(data.draw(st.integers(1, 12))):
        story.turn()
        for wanted in story.needs:
            found = story.check(wanted)
            fits = every(story.fleet, wanted, story.scoring)
            if found is not None:
                assert (found.detour, found.cost, found.name, found.gpus) == fits[0]
            assert [candidate.name for candidate in story.fleet.candidates(wanted)] == [name for _, _, name, _ in fits]


def test_hints_of_failed_attempts_hold_only_while_some_node_could_follow_them() -> None:
    fleet = fleet_of(Costs(a=1, b=2), node("a", gpu("g1")), node("b", gpu("g2")))
    elsewhere = need(gpus=1, avoid=["a"])
    assert best(fleet, elsewhere) == "b"
    fleet.take(need(gpus=1), "b", (0,))
    assert best(fleet, elsewhere) is None, "b could, once it is free"
    fleet.remove("b")
    assert best(fleet, elsewhere) == "a"
