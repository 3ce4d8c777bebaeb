"""Which voters a cluster keeps: the rules one by one, and whole histories of members that die, come and come back."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.autopilot import Change, Follower, Member, Policy, decide
from p2p.effects import Config
from p2p.ids import NodeId, VoterId, node_of, voter_id
from p2p.quorum import majority

POLICY = Policy()
LONG = 10_000.0


def v(name: str) -> VoterId:
    """``a`` is node a on its first disk, ``a2`` on its second."""
    return voter_id(NodeId(name[0]), name)  # type: ignore[arg-type]


def vs(names: str) -> tuple[VoterId, ...]:
    return tuple(v(name) for name in names.split())


def alive(name: str, seconds: float = LONG, **more: object) -> Member:
    told = {"dialable": True, "wish": None, "priority": 0, "zone": ""} | more
    return Member(v(name), seconds, 0.0, **told)  # type: ignore[arg-type]


def dead(name: str, seconds: float = LONG, **more: object) -> Member:
    return alive(name, **more)._replace(alive_for=0.0, dead_for=seconds)


def well(name: str, **more: object) -> Follower:
    return Follower(v(name), 0, 0.05, 0.01, False)._replace(**more)  # type: ignore[arg-type]


def silent(name: str, seconds: float = LONG, **more: object) -> Follower:
    return well(name, contact_age=seconds, **more)


def decided(
    voters: str, learners: str, members: list[Member], followers: list[Follower], policy: Policy = POLICY
) -> tuple[str, str] | None:
    """(voters, learners) by their disks; `a` leads."""
    change = decide(v("a"), Config(vs(voters), vs(learners)), [alive("a"), *members], followers, policy)
    if change is None:
        return None
    name = [" ".join(voter.partition("@")[2] for voter in part) for part in change.config]
    return name[0], name[1]


TABLE = [
    pytest.param("a", "", [], [], None, id="alone"),
    pytest.param("a", "", [alive("b", 4.9)], [], None, id="not steady yet"),
    pytest.param("a", "", [alive("b", 5.0)], [], ("a", "b"), id="young: steady after five seconds"),
    pytest.param("a b c", "", [alive("b"), alive("c"), alive("d")], [well("b"), well("c")], None, id="enough"),
    pytest.param("a", "b", [alive("b")], [well("b")], None, id="two boxes: one voter and a copy"),
    pytest.param(
        "a", "b", [alive("b"), alive("c")], [well("b")], ("a", "b c"), id="a third is brought up to date first"
    ),
    pytest.param(
        "a", "b c", [alive("b"), alive("c")], [well("b"), well("c", gap=65)], None, id="the next is not ready"
    ),
    pytest.param(
        "a", "b c", [alive("b"), alive("c")], [well("b"), well("c", round_seconds=0.6)], None, id="the next is too slow"
    ),
    pytest.param("a", "b c", [alive("b"), alive("c")], [well("b"), well("c")], ("a b", "c"), id="two stand ready"),
    pytest.param("a b", "c", [alive("b"), alive("c")], [well("b"), well("c")], ("a b c", ""), id="to an odd number"),
    pytest.param(
        "a b c",
        "d e",
        [alive(name) for name in "bcde"],
        [well(name) for name in "bcde"],
        None,
        id="copies that stand ready stay copies",
    ),
    pytest.param("a", "b", [alive("b", wish=True)], [well("b")], ("a b", ""), id="an even number that was asked for"),
    pytest.param("a", "b", [dead("b")], [silent("b")], ("a", ""), id="a learner died"),
    pytest.param("a", "b", [dead("b")], [well("b")], None, id="a learner that only gossip misses"),
    pytest.param("a", "b", [], [silent("b")], ("a", ""), id="a learner that nobody knows any more"),
    pytest.param("a", "b", [alive("b", wish=False)], [well("b")], ("a", ""), id="a learner told never to vote"),
    pytest.param("a", "b", [alive("b2")], [silent("b")], ("a", ""), id="a learner on another disk"),
    pytest.param(
        "a", "b c", [alive("b"), alive("c")], [well("b", regressed=True), well("c")], None, id="amnesia: wait"
    ),
    pytest.param("a b c", "", [alive("b"), dead("c", 599)], [well("b"), silent("c")], None, id="dead, not for long"),
    pytest.param(
        "a b c", "", [alive("b"), dead("c"), alive("d")], [well("b"), silent("c", 599)], None, id="spoke lately"
    ),
    pytest.param(
        "a b c", "", [alive("b"), dead("c")], [well("b"), silent("c")], None, id="dead, and nobody to replace it"
    ),
    pytest.param(
        "a b c", "", [alive("b"), dead("c"), alive("d")], [well("b"), silent("c")], ("a b", ""), id="dead for long"
    ),
    pytest.param(
        "a b c", "", [alive("b"), alive("d")], [well("b"), silent("c")], ("a b", ""), id="long dead and forgotten"
    ),
    pytest.param("a b c", "", [alive("b"), dead("c"), alive("d", 20)], [well("b"), silent("c")], None, id="not steady"),
    pytest.param(
        "a b c", "", [dead("b"), dead("c"), alive("d")], [silent("b"), silent("c")], None, id="no majority to spare"
    ),
    pytest.param("a b c", "", [alive("b"), alive("c2")], [well("b"), silent("c")], ("a b", ""), id="an emptied disk"),
    pytest.param(
        "a b c", "", [alive("b"), dead("c2")], [well("b"), silent("c")], None, id="an emptied disk, not there"
    ),
    pytest.param(
        "a b c", "", [alive("b"), alive("c")], [well("b"), well("c", regressed=True)], ("a b", ""), id="lost entries"
    ),
    pytest.param(
        "a b c", "", [alive("b"), alive("c", wish=False)], [well("b"), well("c")], ("a b", ""), id="told never to vote"
    ),
    pytest.param(
        "a b", "", [alive("b"), alive("c", dialable=False)], [well("b")], None, id="nobody dials it, and it did not ask"
    ),
    pytest.param(
        "a b", "", [alive("b"), alive("c", dialable=False, wish=True)], [well("b")], ("a b", "c"), id="it asked"
    ),
    pytest.param(
        "a b",
        "",
        [alive("b", dialable=False), alive("c", dialable=False, wish=True)],
        [well("b")],
        None,
        id="two that cannot dial each other",
    ),
    pytest.param(
        "a",
        "",
        [alive("b", priority=1), alive("c", wish=True), alive("d", zone="z")],
        [],
        ("a", "c"),
        id="first who asks",
    ),
    pytest.param("a", "", [alive("b", priority=1), alive("d", zone="z")], [], ("a", "d"), id="then another zone"),
    pytest.param("a", "", [alive("b", priority=1), alive("c", 2 * LONG)], [], ("a", "b"), id="then priority"),
    pytest.param("a", "", [alive("b"), alive("c", 2 * LONG)], [], ("a", "c"), id="then the steadiest"),
    pytest.param("a", "", [alive("b", wish=False)], [], None, id="nobody who wants to"),
]


@pytest.mark.parametrize(("voters", "learners", "members", "followers", "expected"), TABLE)
def test_what_is_due(
    voters: str, learners: str, members: list[Member], followers: list[Follower], expected: tuple[str, str] | None
) -> None:
    assert decided(voters, learners, members, followers) == expected


def test_more_voters_than_the_target_only_if_they_ask() -> None:
    asking = [alive(name, wish=True) for name in "bcde"]
    followers = [well("b"), well("c")]
    assert decided("a b c", "", asking, followers) is None  # four ask, and four voters are no better than three
    change = decide(v("a"), Config(vs("a b c")), [alive("a", wish=True), *asking], followers, POLICY)  # five ask
    assert change is not None
    assert len(change.config.learners) == 1


def test_a_leader_that_is_not_to_vote_goes_last_and_only_from_a_majority() -> None:
    me, others = alive("a", wish=False), [alive("b"), alive("c")]

    def left(followers: list[Follower]) -> Change | None:
        return decide(v("a"), Config(vs("a b c")), [me, *others], followers, POLICY)

    change = left([well("b"), well("c")])
    assert change is not None
    assert change.config.voters == vs("b c")
    assert left([well("b"), silent("c")]) is None
    broken = left([well("b"), well("c", regressed=True)])
    assert broken is not None
    assert broken.config.voters == vs("a b")


def test_the_only_voter_stays_one_whatever_it_was_told() -> None:
    assert decide(v("a"), Config(vs("a")), [alive("a", wish=False)], [], POLICY) is None


# -- histories -------------------------------------------------------------------------------------------------------


@dataclass
class Box:
    """A machine. Disk ids grow, so a disk that was emptied is a new voter id."""

    name: str
    up: bool = True
    disk: int = 1
    since: float = 0.0  # when it came up or went down
    joined: float = 0.0

    @property
    def voter(self) -> VoterId:
        return voter_id(NodeId(self.name), str(self.disk))  # type: ignore[arg-type]


@dataclass
class World:
    """Runs `decide` once a second, as the leader does, and carries out what it says; checks every change."""

    boxes: dict[str, Box]
    target: int
    now: float = 1_000.0
    config: Config = field(default_factory=Config)
    last_up: dict[VoterId, float] = field(default_factory=dict)
    changes: int = 0

    def living(self, voters: tuple[VoterId, ...]) -> int:
        here = {box.voter for box in self.boxes.values() if box.up}
        return sum(voter in here for voter in voters)

    def leader(self) -> VoterId | None:
        """Any living voter, while a majority lives."""
        if self.living(self.config.voters) < majority(len(self.config.voters)):
            return None
        here = {box.voter for box in self.boxes.values() if box.up}
        return next(voter for voter in self.config.voters if voter in here)

    def second(self) -> Change | None:
        self.now += 1
        for box in self.boxes.values():
            if box.up:
                self.last_up[box.voter] = self.now
        leader = self.leader()
        if leader is None:
            return None
        members = [
            Member(
                box.voter,
                self.now - box.since if box.up else 0.0,
                0.0 if box.up else self.now - box.since,
                True,
                None,
                0,
                "",
            )
            for box in self.boxes.values()
        ]
        followers = [
            Follower(voter, 0, self.now - self.last_up.get(voter, 0.0), 0.01, False)
            for voter in self.config.everyone
            if voter != leader
        ]
        change = decide(leader, self.config, members, followers, Policy(target=self.target))
        if change is not None:
            self.check(change.config)
            self.config = change.config
            self.changes += 1
        return change

    def check(self, new: Config) -> None:
        old = self.config
        assert len(set(old.voters) ^ set(new.voters)) <= 1, "one voter at a time"
        assert new.voters, "a cluster has a voter"
        assert not set(new.voters) & set(new.learners)
        assert set(new.voters) <= set(old.everyone), "a voter was a learner first"
        assert self.living(new.voters) >= majority(len(new.voters)), f"{old} to {new} costs the majority"
        spare_before = self.living(old.voters) - majority(len(old.voters))
        spare = self.living(new.voters) - majority(len(new.voters))
        gone = set(old.voters) - set(new.voters)
        here = {box.voter for box in self.boxes.values() if box.up}
        assert not gone & here, "a voter that is well is never taken away"
        # Only growing passes through an even number, which one more failure may stop; replacing loses nothing.
        assert spare >= spare_before or len(new.voters) == len(old.voters) + 1

    def settle(self) -> None:
        """Until it has decided nothing for longer than it waits for the dead."""
        quiet = 0
        for _ in range(20_000):
            quiet = quiet + 1 if self.second() is None else 0
            if quiet > 900:
                return
        raise AssertionError(f"it never stops changing: {self.config}")


NAMES = "abcdefg"
ACTS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(["down", "up", "wipe"]), st.sampled_from([1, 7, 60, 700])),
    max_size=12,
)


@given(boxes=st.integers(1, 7), target=st.sampled_from([1, 3, 5]), acts=ACTS)
@settings(max_examples=60, deadline=None)
def test_voters_stay_a_live_majority_and_come_to_rest(
    boxes: int, target: int, acts: list[tuple[str, str, int]]
) -> None:
    """Whatever dies, comes back or is emptied, as long as the cluster itself survives it: no change costs a majority,
    and once everybody is well there are as many voters as there should be, all of them living, and it stays so."""
    world = World({name: Box(name, since=990.0) for name in NAMES[:boxes]}, target)
    world.config = Config((world.boxes["a"].voter,))
    world.settle()
    for name, act, seconds in acts:
        box = world.boxes.get(name)
        if box is None:
            continue
        others = tuple(voter for voter in world.config.voters if voter != box.voter)
        costs = box.voter in world.config.voters and world.living(others) < majority(len(world.config.voters))
        if act == "up" and not box.up:
            box.up, box.since = True, world.now
        elif act == "down" and box.up and not costs:
            box.up, box.since = False, world.now
        elif act == "wipe" and box.up and not costs:
            box.disk, box.since = box.disk + 1, world.now
        for _ in range(seconds):
            world.second()
        assert world.leader() is not None
    for box in world.boxes.values():
        if not box.up:
            box.up, box.since = True, world.now
    world.settle()
    here = {box.voter for box in world.boxes.values()}
    assert set(world.config.everyone) <= here, "nothing that is gone is left"
    wanted = min(target, boxes)
    wanted -= wanted % 2 == 0 and wanted != target
    assert len(world.config.voters) >= wanted
    # More only if that was so before: voters that are well are never taken away, and so an even number may stay.
    assert len(world.config.voters) <= max(target, boxes)


@pytest.mark.parametrize(("boxes", "voters", "learners"), [(1, 1, 0), (2, 1, 1), (3, 3, 0), (4, 3, 0), (7, 3, 0)])
def test_boxes_started_together_have_their_voters_within_twenty_seconds(boxes: int, voters: int, learners: int) -> None:
    world = World({name: Box(name, since=1_000.0) for name in NAMES[:boxes]}, 3)
    world.config = Config((world.boxes["a"].voter,))
    for _ in range(20):
        world.second()
    assert (len(world.config.voters), len(world.config.learners)) == (voters, learners)
    world.settle()
    assert (len(world.config.voters), len(world.config.learners)) == (voters, learners)


def test_a_voter_that_died_is_replaced_after_ten_minutes_and_not_before() -> None:
    world = World({name: Box(name, since=900.0) for name in "abcd"}, 3)
    world.config = Config((world.boxes["a"].voter,))
    world.settle()
    died = next(voter for voter in world.config.voters if node_of(voter) != "a")
    box = world.boxes[node_of(died)]
    box.up, box.since = False, world.now
    for _ in range(598):
        assert world.second() is None
    for _ in range(10):
        world.second()
    assert died not in world.config.everyone
    assert len(world.config.voters) == 3
