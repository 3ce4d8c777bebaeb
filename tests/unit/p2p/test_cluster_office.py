"""What a node makes of its replica's and gossip's words: the office it takes and leaves, whom it believes to lead, and
operators' orders beside the autopilot. `p2p.cluster` itself; the replica, gossip and peers are twins."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from config.settings import build
from coordination.clock import SystemClock
from coordination.errors import OutcomeUnknown, Refused
from coordination.events import EventBus
from p2p import cluster as module
from p2p.cluster import Callbacks, Cluster
from p2p.effects import Config, RoleChanged
from p2p.ids import ClusterId, DiskId, NodeId, Term, VoterId, voter_id
from p2p.leadership import Leader, Leadership
from p2p.membership.hint import LeaderHint
from p2p.membership.member import MembershipError, State
from p2p.replica import ConfigRefused, NotLeader


def v(name: str) -> VoterId:
    return voter_id(NodeId(name), DiskId(name))


A, B, C, D = map(v, "abcd")


class FakeDriver:
    """A replica of which a test says how it is; configurations are committed at once, but for those refused."""

    def __init__(self, config: Config) -> None:
        self.view = SimpleNamespace(
            config=config, term=Term(1), followers=(), last_index=0, commit_index=0, leader=None
        )
        self.refusals: list[Exception] = []
        self.configs: list[Config] = []
        self.transfers: list[VoterId] = []
        self.farewells: list[VoterId] = []
        self.stood = 0
        self.on_config: Callable[[Config], None] = lambda config: None

    def reconfigure(self, config: Config) -> Future[None]:
        future: Future[None] = Future()
        if self.refusals:
            future.set_exception(self.refusals.pop(0))
            return future
        old = self.view.config
        new = set(config.voters) - set(old.voters)
        if new - set(old.learners):
            future.set_exception(ConfigRefused("it must be a learner first"))
            return future
        self.view.config = config
        self.configs.append(config)
        self.on_config(config)
        future.set_result(None)
        return future

    def transfer(self, to: VoterId) -> Future[None]:
        self.transfers.append(to)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def bid_farewell(self, voter: VoterId) -> None:
        self.farewells.append(voter)

    def stand(self) -> None:
        self.stood += 1


class FakeGossip:
    def __init__(self, names: str) -> None:
        self.records = {name: self._record(name) for name in names}
        self.leader_hint = LeaderHint(0, None, None)
        self.metas: list[Any] = []
        self.trouble: Exception | None = None
        self.me = self._record("a")
        self.seen_age: float | None = 0.1

    def last_seen_age(self, node: NodeId) -> float | None:
        return self.seen_age

    @staticmethod
    def _record(name: str) -> Any:
        return SimpleNamespace(
            node=NodeId(name), disk=DiskId(name), address=f"{name}:1", state=State.ALIVE, meta={}, via=()
        )

    def members(self) -> dict[str, Any]:
        return self.records

    def member(self, node: NodeId) -> Any:
        return self.records.get(node)

    def set_meta(self, meta: Any) -> None:
        if self.trouble is not None:
            raise self.trouble
        self.metas.append(meta)

    def set_leader(self, *_: Any) -> None: ...


class Here(Cluster):
    """Node a. `offices` is what its office was asked to do."""

    def __init__(self, voters: str = "a b c", learners: str = "", members: str = "abcd") -> None:
        self.settings = build({"node_id": "a", "host": "127.0.0.1", "data_dir": "d"})
        self.me, self.cluster, self.address = A, ClusterId("C"), "a:1"
        self.leadership, self._bus, self._clock = Leadership(), EventBus(), SystemClock()
        config = Config(tuple(map(v, voters.split())), tuple(map(v, learners.split())))
        self.driver: Any = FakeDriver(config)
        self.gossip: Any = FakeGossip(members)
        self.peers: Any = SimpleNamespace(call=self._told)
        self._book: Any = SimpleNamespace(addresses={}, knows=lambda here: True)
        self.links: Any = SimpleNamespace(hold=lambda *_, **__: None)
        self._version, self._wish = "1", None
        self._tasks, self._office, self._in_office = set(), None, False
        self._since: dict[Any, Any] = {}
        self._agreed_at = self._ordered_at = float("-inf")
        self._leaderless, self._founding = 0, False
        self.autopilot_says = ""
        self.offices: list[bool] = []
        self.alerts: list[tuple[str, ...]] = []
        self._said_diverged = ""
        self.wishes: list[tuple[str, bool]] = []
        self.on_office: Callable[[bool], Any] = self._noted
        self._callbacks = Callbacks(
            lambda on: self.on_office(on),
            dict,
            lambda: None,
            lambda *alert: self.alerts.append(alert),
            lambda why: None,
        )

    async def _noted(self, on: bool) -> None:
        self.offices.append(on)

    async def _told(self, method: str, address: str, path: str, body: Any = None, *, seconds: float) -> Any:
        assert path == "/peer/wish"
        self.wishes.append((address[0], body["voter"]))
        return {}

    def remember_wish(self, wish: bool) -> None:
        self._wish = wish
        self.wishes.append(("a", wish))

    def role(self, role: str, term: int, leader: VoterId | None, *, established: bool = False) -> None:
        self.driver.view.term = Term(term)
        self._on_role(RoleChanged(role, Term(term), leader, established, "why"))

    async def settled(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    def heard(self, name: str, *, ready: bool = True, wish: bool | None = None) -> Any:
        follower = SimpleNamespace(
            voter=v(name),
            ready=ready,
            match=0,
            priority=0,
            contact_age=0.0,
            round_seconds=0.0,
            regressed=False,
            agrees=None,
        )
        self.driver.view.followers = (*self.driver.view.followers, follower)
        if wish is not None:
            self.gossip.records[name].meta = {"voter": wish}
        return follower

    async def end(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


# -- the office ------------------------------------------------------------------------------------------------------


async def test_the_office_is_taken_once_the_term_is_established_and_left_when_it_ends() -> None:
    here = Here()
    here.role("leader", 2, A)
    await here.settled()
    assert (here.offices, here.leadership.leader.node) == ([], None)  # it may not answer anybody yet
    here.role("leader", 2, A, established=True)
    await here.settled()
    assert (here.offices, here.leadership.leader) == ([True], Leader(Term(2), NodeId("a"), "a:1"))
    here.role("follower", 2, None)
    await here.settled()
    assert (here.offices, here.leadership.leader) == ([True, False], Leader(Term(2), None, None))


async def test_an_office_that_is_being_taken_is_cut_short_and_then_left() -> None:
    here = Here()
    cut: list[str] = []

    async def slow(on: bool) -> None:
        if on:
            try:
                await asyncio.Event().wait()
            finally:
                cut.append("cut")
        here.offices.append(on)

    here.on_office = slow
    here.role("leader", 2, A, established=True)
    await here.settled()
    here.role("follower", 3, B)
    await here.settled()
    assert (cut, here.offices) == (["cut"], [False])


async def test_offices_that_come_and_go_at_once_end_as_the_last_word_says() -> None:
    here = Here()
    for term in (2, 4, 6):
        here.role("leader", term, A, established=True)
        here.role("follower", term + 1, B)
    here.role("leader", 8, A, established=True)
    await here.settled()
    assert here.offices[-1] is True
    here.role("follower", 8, None)
    here.role("leader", 9, A, established=True)
    here.role("follower", 9, None)
    await here.settled()
    assert here.offices[-1] is False


async def test_an_office_that_cannot_be_taken_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A leader whose desk stays shut serves nobody, and keeps everybody else from leading."""
    monkeypatch.setattr(module, "OFFICE_RETRY_SECONDS", 0.001)
    here = Here()
    taken = asyncio.Event()
    troubles = [OSError("busy"), RuntimeError("busy")]

    async def troubled(on: bool) -> None:
        if troubles:
            raise troubles.pop()
        here.offices.append(on)
        taken.set()

    here.on_office = troubled
    with caplog.at_level(logging.CRITICAL + 1, "p2p.cluster"):
        here.role("leader", 2, A, established=True)
        async with asyncio.timeout(10):
            await taken.wait()
    assert here.offices == [True]


# -- whom it believes ------------------------------------------------------------------------------------------------


async def test_a_node_that_no_longer_votes_goes_by_gossip() -> None:
    """Its replica is told nothing any more and gives its leader up; the leader is there all the same, in a term that
    gossip has no more news of. It could neither forward nor claim until the next election."""
    here = Here(voters="b c d")
    here.leadership.learn(Leader(Term(5), NodeId("b"), "b:1"))
    here.role("follower", 5, None)
    assert here.leadership.leader.node == "b"
    voter = Here()
    voter.leadership.learn(Leader(Term(5), NodeId("b"), "b:1"))
    voter.role("follower", 5, None)
    assert voter.leadership.leader.node is None


async def test_a_leader_that_was_removed_does_not_take_itself_for_one() -> None:
    here = Here(voters="b c d")
    here.leadership.learn(Leader(Term(5), NodeId("a"), "a:1"))
    here._in_office = True
    here.role("follower", 5, None)
    assert here.leadership.leader.node is None


async def test_a_voter_that_has_been_replaced_while_it_was_away_believes_gossip_in_the_end() -> None:
    here = Here()
    here.leadership.learn(Leader(Term(5), NodeId("b"), "b:1"))
    here.gossip.leader_hint = LeaderHint(5, NodeId("b"), "b:1")
    here.role("follower", 5, None)
    for _ in range(module.HEARSAY_TURNS):
        here._listen_to_gossip()
        assert here.leadership.leader.node is None  # an election takes no longer
    here.gossip.seen_age = None
    here._listen_to_gossip()
    assert here.leadership.leader.node is None  # nor is one believed that is frozen: it has not spoken since
    here.gossip.seen_age = 0.1
    here._listen_to_gossip()
    assert here.leadership.leader == Leader(Term(5), NodeId("b"), "b:1")


@pytest.mark.parametrize(
    "hint", [LeaderHint(4, NodeId("b"), "b:1"), LeaderHint(5, None, None), LeaderHint(5, NodeId("a"), "a:1")]
)
async def test_gossip_that_is_older_or_about_this_node_is_not_believed(hint: LeaderHint) -> None:
    here = Here()
    here.leadership.learn(Leader(Term(5), None, None))
    here.gossip.leader_hint = hint
    for _ in range(5):
        here._listen_to_gossip()
    assert here.leadership.leader.node is None


async def test_the_address_of_the_leader_is_what_it_announces() -> None:
    here = Here()
    here.role("follower", 2, B)
    assert here.leadership.leader.address == "b:1"
    here.gossip.records["b"].address = "b:2"
    here._member_updated(here.gossip.records["b"], None)
    assert here.leadership.leader.address == "b:2"


# -- orders and the autopilot ----------------------------------------------------------------------------------------


async def test_a_voter_is_added_over_all_that_comes_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another change is being committed; the autopilot of a moment ago takes the learner away again."""
    here = Here()
    here.driver.refusals = [ConfigRefused("another change of voters is not committed yet")]
    once = [D]

    def meddle(config: Config) -> None:
        if once and D in config.learners:
            once.pop()
            here.driver.view.config = Config(config.voters)

    here.driver.on_config = meddle
    monkeypatch.setattr(asyncio, "sleep", _no_sleep(asyncio.sleep))
    await here.add_voter("d")
    assert here.driver.view.config == Config((A, B, C, D))
    assert here.wishes == [("d", True)]


def _no_sleep(sleep: Any) -> Any:
    async def quick(seconds: float) -> None:
        await sleep(0)

    return quick


@pytest.mark.parametrize(
    ("node", "error", "status"),
    [
        ("x", None, 404),
        ("d", NotLeader("this node does not lead"), 503),
    ],
)
async def test_a_voter_that_cannot_be_added_is_told_why(node: str, error: Exception | None, status: int) -> None:
    here = Here()
    here.driver.refusals = [error] if error else []
    with pytest.raises(Refused) as refused:
        await here.add_voter(node)
    assert refused.value.status == status
    assert here.driver.configs == []


async def test_a_voter_that_is_dead_is_not_added() -> None:
    here = Here()
    here.gossip.records["d"].state = State.DEAD
    with pytest.raises(Refused) as refused:
        await here.add_voter("d")
    assert refused.value.status == 409


async def test_a_removed_voter_is_told_first_so_that_nobody_takes_it_back() -> None:
    here = Here()
    here.driver.on_config = lambda config: here.wishes.append(("committed", C in config.voters))
    await here.remove_voter("c")
    assert here.wishes == [("c", False), ("committed", False)]
    assert here.driver.view.config == Config((A, B))


@pytest.mark.parametrize(("voters", "node", "status"), [("a b c", "d", 404), ("a", "a", 409)])
async def test_who_cannot_be_removed(voters: str, node: str, status: int) -> None:
    here = Here(voters=voters)
    with pytest.raises(Refused) as refused:
        await here.remove_voter(node)
    assert refused.value.status == status


async def test_the_autopilot_keeps_still_while_an_operators_order_spreads() -> None:
    """The removed voter's wish takes a moment to be heard of; until then it looks like any other candidate."""
    here = Here(members="abc")
    here._in_office = True
    here.heard("b")
    here.heard("c", wish=False)  # due: it is not to vote any more
    here._ordered_at = time.monotonic()
    await here._look_after()
    assert here.driver.configs == []
    here._ordered_at -= module.OPERATOR_SECONDS
    await here._look_after()
    assert here.driver.configs == [Config((A, B))]


@pytest.mark.parametrize("trouble", [MembershipError("gossip stops"), OSError(28, "No space left on device")])
async def test_a_turn_that_fails_does_not_end_the_autopilot(
    trouble: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = Here()
    here.gossip.trouble = trouble
    turns = 0
    sleep = asyncio.sleep

    async def tick(seconds: float) -> None:
        nonlocal turns
        turns += 1
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", tick)
    keeping = asyncio.create_task(here._keep())
    while turns < 5:
        await sleep(0)
    assert not keeping.done()
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    assert "not done now" in caplog.text


async def test_what_is_remembered_of_members_goes_with_them() -> None:
    here = Here(members="abcd")
    here._in_office = True
    here._change_due()
    assert set(here._since) == {A, B, C, D}
    del here.gossip.records["d"]
    here._change_due()
    assert set(here._since) == {A, B, C}


async def test_a_leader_that_nobody_can_dial_hands_over_as_soon_as_it_can() -> None:
    here = Here()
    here._in_office, here.address = True, None
    await here._look_after()
    assert here.driver.transfers == []  # nobody is ready
    here.heard("b", ready=False)
    here.heard("c")
    giving = asyncio.create_task(here._look_after())
    while not here.driver.transfers:
        await asyncio.sleep(0)
    here.leadership.learn(Leader(Term(2), NodeId("c"), "c:1"))
    await giving
    assert here.driver.transfers == [C]


async def test_a_leader_that_can_be_dialled_stays() -> None:
    here = Here()
    here._in_office = True
    here.heard("c")
    assert not await here._gave_way()


async def test_a_hand_over_that_does_not_come_about_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRANSFER_SECONDS", 0.01)
    here = Here()
    here.heard("b")
    with pytest.raises(OutcomeUnknown, match="has not taken over"):
        await here.transfer("b")
    with pytest.raises(Refused, match="is not a voter"):
        await here.transfer("d")
    assert await here.transfer("a") == {"leader": "a", "term": 1}


async def test_only_a_voter_stands_for_election() -> None:
    here = Here()
    assert await here.start_election() == {"standing": "a"}
    assert here.driver.stood == 1
    stranger = Here(voters="b c d")
    with pytest.raises(Refused) as refused:
        await stranger.start_election()
    assert (refused.value.status, stranger.driver.stood) == (409, 0)


async def test_a_queue_that_differs_from_the_leaders_is_an_alert_while_it_does() -> None:
    here = Here()
    here.role("leader", 2, A, established=True)
    await here.settled()
    b, c = here.heard("b"), here.heard("c")
    here.heard("d").agrees = False  # does not belong
    await here._look_after()
    assert here.alerts == []
    b.agrees, c.agrees = False, True
    await here._look_after()
    await here._look_after()
    told = "the queue of b differs from that of a, c, though the journals are equal: b went wrong"
    assert here.alerts == [("diverged", told)]
    b.agrees = None  # a voter came back with a copy
    await here._look_after()
    assert here.alerts[1:] == [("diverged", "")]


@pytest.mark.parametrize(
    ("copies", "said"),
    [
        ({"b": None, "c": None}, ""),
        ({"b": True}, ""),
        ({"b": False}, "the queue of b differs from that of a, though the journals are equal: it is not known which"),
        ({"b": False, "c": None}, "it is not known which one went wrong; c cannot be compared yet"),
        (
            {"b": False, "c": False},
            "the queue of b, c differs from that of a, though the journals are equal: it is not",
        ),
        (
            {"b": False, "c": True},
            "the queue of b differs from that of a, c, though the journals are equal: b went wrong",
        ),
        ({"b": False, "c": True, "d": None}, "it is not known which one went wrong; d cannot be compared yet"),
        ({"b": False, "c": True, "d": True, "e": None}, "b went wrong"),
    ],
)
def test_nobody_is_called_wrong_but_by_more_than_half_of_the_copies(
    copies: dict[NodeId, bool | None], said: str
) -> None:
    told = module.said_of_queues(NodeId("a"), copies)
    assert said in told
    assert bool(told) == bool(said)


async def test_who_has_a_copy_and_does_not_belong_is_told_by_who_leads() -> None:
    here = Here(voters="a b")
    here.gossip.records["b"].meta = {"copy": True}
    here.gossip.records["c"].meta = {"copy": True}
    here.gossip.records["d"].meta = {}
    await here._look_after()
    assert here.driver.farewells == []  # does not lead
    here.role("leader", 2, A, established=True)
    await here.settled()
    await here._look_after()
    assert here.driver.farewells == [v("c")]
    here.gossip.records["c"].state = State.DEAD
    await here._look_after()
    assert here.driver.farewells == [v("c")]
