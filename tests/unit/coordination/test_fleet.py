"""The best open node for a need, without a look at every node each time: what a look at all of them would say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coordination.fleet import Fleet
from coordination.placement import Need, Node
from tests.unit.coordination.scheduling import FirstGpus, Packed, box, need


def fleet(*nodes: Any, scoring: Any = None) -> Fleet:
    made = Fleet(scoring or Packed())
    for offer in nodes:
        made.put(Node.of(offer))
        made.set_open(offer.node, True)
    return made


def best(made: Fleet, wanted: Need) -> str | None:
    found = made.best(wanted)
    return found.name if found is not None else None


def test_only_open_nodes_are_candidates() -> None:
    made = fleet(box("a"), box("b"))
    made.set_open("a", False)
    assert best(made, need()) == "b"
    made.set_open("b", False)
    assert best(made, need()) is None
    made.set_open("a", True)
    assert best(made, need()) == "a"


def test_what_is_taken_and_given_moves_the_choice() -> None:
    made, wanted = fleet(box("a", cpus=2), box("b", cpus=3)), need(cpus=2)
    assert best(made, wanted) == "a"
    made.take(wanted, "a", ())
    assert best(made, wanted) == "b"
    made.give(wanted, "a", ())
    assert best(made, wanted) == "a"


def test_candidates_come_best_first_and_are_all_there_again() -> None:
    made, wanted = fleet(*(box(f"n{n}", cpus=n) for n in (5, 3, 9, 1))), need(cpus=2)
    for _ in range(3):
        assert [found.name for found in made.candidates(wanted)] == ["n3", "n5", "n9"]
    assert next(iter(made.candidates(wanted))).name == "n3"
    assert best(made, wanted) == "n3"


def test_node_that_is_gone_is_no_candidate() -> None:
    made = fleet(box("a"), box("b", cpus=9))
    assert best(made, need()) == "a"
    made.remove("a")
    made.remove("never there")
    assert best(made, need()) == "b"
    assert made.open == {"b"}


def test_the_object_that_stands_for_a_node_stays_while_its_kind_does() -> None:
    made = fleet(box("a"))
    node = made.nodes["a"]
    assert made.put(Node.of(box("a"))) is node
    assert made.put(Node.of(box("a", cpus=4))) is not node


def test_new_node_may_serve_what_none_could() -> None:
    made, wanted = fleet(box("a")), need(gpus=1)
    assert made.could(wanted) is None
    made.put(Node.of(box("b", gpus=1)))
    assert made.could(wanted) is wanted


def test_gang_could_start_only_where_there_are_nodes_enough() -> None:
    made = fleet(box("a"), box("b"))
    assert made.could(need(nodes=2)) is not None
    assert made.could(need(nodes=3)) is None


def test_hint_is_followed_as_far_as_any_node_could() -> None:
    made = fleet(box("a"), box("b"))
    wanted = need(avoid=["a"])
    assert made.could(wanted) is wanted
    made.remove("b")
    followed = made.could(wanted)
    assert followed is not None
    assert followed.avoid == frozenset()


def test_disk_that_comes_free_is_seen() -> None:
    made, wanted = fleet(box("a")), need(disk_mb=5_000)
    assert made.could(wanted) is None
    roomy = Node.of(box("a"))
    roomy.disk_mb = roomy.total_disk_mb = 9_000
    made.put(roomy)
    assert made.could(wanted) is wanted
    assert best(made, wanted) == "a"


def test_equal_costs_are_settled_by_name() -> None:
    class Flat:
        epoch = 0

        def cost(self, need: Need, node: Node, free: Sequence[int]) -> tuple[float, tuple[int, ...]]:
            return 0.0, tuple(free[: need.gpus])

    made = fleet(box("b"), box("c"), box("a"), scoring=Flat())
    assert [found.name for found in made.candidates(need())] == ["a", "b", "c"]


def test_scoring_that_changes_its_mind_is_asked_again() -> None:
    class Fickle(FirstGpus):
        epoch, sign = 0, 1

        def cost(self, need: Need, node: Node, free: Sequence[int]) -> tuple[float, tuple[int, ...]]:
            return float(self.sign * node.cpu_milli), ()

    scoring = Fickle()
    made = fleet(box("a", cpus=2), box("b", cpus=4), scoring=scoring)
    assert best(made, need()) == "a"
    scoring.sign, scoring.epoch = -1, 1
    assert best(made, need()) == "b"


def test_only_nodes_that_have_changed_are_scored() -> None:
    class Counting(Packed):
        asked = 0

        def cost(self, need: Need, node: Node, free: Sequence[int]) -> tuple[float, tuple[int, ...]]:
            self.asked += 1
            return super().cost(need, node, free)

    scoring = Counting()
    made, wanted = fleet(*(box(f"n{n:03}") for n in range(100)), scoring=scoring), need()
    made.best(wanted)
    assert scoring.asked == 100
    for n in range(10):
        made.take(wanted, f"n{n:03}", ())
        made.best(wanted)
    assert scoring.asked == 110


NEEDS = [
    need(),
    need(cpus=4),
    need(gpus=1),
    need(gpus=1, gpu_share=0.5),
    need(gpus=2),
    need(prefer="gpus"),
    need(node="n1"),
]
NAMES = st.sampled_from(["n0", "n1", "n2", "n3"])


class FleetAgreesWithALookAtAllNodes(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet(Packed())
        self.taken: list[tuple[Need, str, tuple[int, ...]]] = []

    @rule(name=NAMES, gpus=st.sampled_from([0, 2, 2, 2]), cpus=st.sampled_from([2, 8]), opened=st.booleans())
    def speaks(self, name: str, gpus: int, cpus: int, opened: bool) -> None:
        node = Node.of(box(name, cpus=cpus, gpus=gpus))
        self.taken = [item for item in self.taken if item[1] != name]
        self.fleet.put(node)
        self.fleet.set_open(name, opened)

    @precondition(lambda self: self.fleet.nodes)
    @rule(data=st.data(), opened=st.booleans())
    def opens_or_closes(self, data: st.DataObject, opened: bool) -> None:
        self.fleet.set_open(data.draw(st.sampled_from(sorted(self.fleet.nodes))), opened)

    @rule(name=NAMES)
    def goes(self, name: str) -> None:
        self.fleet.remove(name)
        self.taken = [item for item in self.taken if item[1] != name]

    @rule(wanted=st.sampled_from(NEEDS))
    def takes_the_best(self, wanted: Need) -> None:
        found = self.fleet.best(wanted)
        if found is not None:
            self.fleet.take(wanted, found.name, found.gpus)
            self.taken.append((wanted, found.name, found.gpus))

    @precondition(lambda self: self.taken)
    @rule(number=st.integers(0, 99))
    def gives_back(self, number: int) -> None:
        self.fleet.give(*self.taken.pop(number % len(self.taken)))

    @invariant()
    def candidates_are_all_that_fit_best_first(self) -> None:
        for wanted in NEEDS:
            told = [(found.name, found.gpus) for found in self.fleet.candidates(wanted)]
            expected = []
            for name in sorted(self.fleet.open):
                node = self.fleet.nodes[name]
                free = node.fitting(wanted)
                if free is not None:
                    cost, gpus = Packed().cost(wanted, node, free)
                    detour = not wanted.gpus and bool(node.gpus) != (wanted.prefer == "gpus")
                    expected.append((detour, cost, name, gpus))
            assert told == [(name, gpus) for _, _, name, gpus in sorted(expected)]
            first = self.fleet.best(wanted)
            assert (first.name if first is not None else None) == (told[0][0] if told else None)


TestFleetAgrees = FleetAgreesWithALookAtAllNodes.TestCase
TestFleetAgrees.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_needs_that_nobody_uses_any_more_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordination.fleet.MAX_RANKS", 4)
    made = fleet(box("a"))
    for n in range(1, 20):
        assert best(made, need(cpus=n / 10)) == "a"
    assert len(made._ranks) == 4
