"""How blank nodes become one cluster. The decisions one by one, then the real exchange (`p2p.cluster`'s own code, over
a network that delays, loses and cuts) among nodes that come up in any order and die in the middle.

What holds, with nodes whose --peers and disks stay as they are:

- safety: nodes that found clusters have no member in common in what they agreed upon; so if everybody is told of the
  same addresses, at most one cluster is founded, whatever is lost, delayed, cut in one direction or killed;
- liveness: once all are up and reach each other, every group of nodes that are told of each other, and of nobody
  else, founds one cluster, and whoever's addresses lead to exactly one such group joins it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.settings import Settings, build
from p2p import cluster as cluster_module
from p2p import formation
from p2p.cluster import PROTOCOL, Cluster
from p2p.effects import Config
from p2p.formation import MAX_CLOSURE, Hello, Join, Refuse, Wait, confirms, decide
from p2p.ids import ClusterId, DiskId, NodeId, voter_id
from p2p.peers import PeerUnreachable


def hello(name: str, addresses: str = "", *, cluster: str = "", disk: str = "", **more: Any) -> Hello:
    """Node `name`; addresses are the names of nodes."""
    told: dict[str, Any] = {"priority": 0, "version": "1", "protocol": 1, "time_ms": 0} | more
    return Hello(
        node=NodeId(name),
        disk=DiskId(disk or name),
        cluster=ClusterId(cluster),
        addresses=tuple(addresses.split()),
        **told,
    )


def kind(decision: formation.Decision) -> str:
    return type(decision).__name__


DECISIONS = [
    pytest.param(hello("a", "a"), {"a": hello("a", "a")}, "Found", id="only itself was named"),
    pytest.param(hello("a", "b"), {"b": "refused"}, "Wait", id="nobody answers"),
    pytest.param(hello("a", "b"), {}, "Wait", id="nobody was asked"),
    pytest.param(hello("a", "b"), {"b": hello("b", "a"), "a": hello("a", "b")}, "Wait", id="the other is higher"),
    pytest.param(hello("b", "a"), {"a": hello("a", "b"), "b": hello("b", "a")}, "Found", id="this one is higher"),
    pytest.param(
        hello("a", "a b", priority=1), {"b": hello("b", "a b"), "a": hello("a")}, "Found", id="priority before name"
    ),
    pytest.param(hello("b", "a"), {"a": hello("a", "b c"), "b": hello("b")}, "Wait", id="somebody named is not asked"),
    pytest.param(
        hello("b", "a"), {"a": hello("a", "b c"), "b": hello("b"), "c": "gone"}, "Wait", id="somebody named is down"
    ),
    pytest.param(hello("a", "b c"), {"b": hello("b", cluster="C"), "c": "down"}, "Join", id="a cluster, others down"),
    pytest.param(
        hello("a", "b c"), {"b": hello("b", cluster="C"), "c": hello("c", cluster="D")}, "Refuse", id="two clusters"
    ),
    pytest.param(hello("a", "x"), {"x": hello("a", disk="other")}, "Refuse", id="another node of this name"),
    pytest.param(
        hello("a", "x"), {"x": hello("a", disk="other", cluster="C")}, "Join", id="this name was a member's once"
    ),
    pytest.param(hello("b", "a", dialable=False), {"a": hello("a", "a")}, "Wait", id="nobody could dial this one"),
    pytest.param(hello("a", "a", dialable=False), {"a": hello("a", "a")}, "Wait", id="alone and not dialled"),
    pytest.param(hello("a", "b a"), {"b": hello("b", "a", dialable=False), "a": hello("a")}, "Found", id="the other"),
    pytest.param(
        hello("b", "a b"), {"a": hello("a"), "b": hello("b", votes=False)}, "Found", id="the higher never votes"
    ),
]


@pytest.mark.parametrize(("me", "asked", "expected"), DECISIONS)
def test_what_a_blank_node_does(me: Hello, asked: dict[str, Hello | str], expected: str) -> None:
    assert kind(decide(me, asked)) == expected


def test_a_node_that_waits_says_for_whom_and_why() -> None:
    decision = decide(hello("a", "b c"), {"b": "no route to host", "c": "no route to host"})
    assert isinstance(decision, Wait)
    assert decision.why == "no peer belongs to a cluster yet, and b and 1 more cannot be reached (no route to host)"


def test_two_clusters_are_both_named() -> None:
    decision = decide(hello("a", "b c"), {"b": hello("b", cluster="C1"), "c": hello("c", cluster="C2")})
    assert isinstance(decision, Refuse)
    assert "C1, C2" in decision.why


def test_whoever_joins_goes_through_members_only() -> None:
    asked: dict[str, Hello | str] = {"b": hello("b", cluster="C"), "c": hello("c"), "d": "down"}
    assert decide(hello("a", "b c d"), asked) == Join(ClusterId("C"), ("b",))


def test_addresses_without_end_found_nothing() -> None:
    many = " ".join(f"h{n}" for n in range(MAX_CLOSURE + 1))
    asked: dict[str, Hello | str] = {"b": hello("b", many)}
    assert isinstance(decide(hello("a", "b"), asked), Refuse)
    assert "more than" in confirms(hello("b", many), {}, ((NodeId("b"), DiskId("b")),))
    assert isinstance(decide(hello("a", "b"), {"b": hello("b", cluster="C")}), Join)


A, B = (NodeId("a"), DiskId("a")), (NodeId("b"), DiskId("b"))


@pytest.mark.parametrize(
    ("me", "asked", "members", "words"),
    [
        pytest.param(hello("a", "b"), {"b": hello("b")}, (A, B), "", id="the same"),
        pytest.param(hello("a", "b", cluster="C"), {"b": hello("b")}, (A, B), "belongs to cluster C", id="a member"),
        pytest.param(hello("a", "b"), {"b": hello("b")}, (B,), "not among the members", id="left out"),
        pytest.param(hello("a"), {}, (A, B), "a sees a", id="sees fewer"),
        pytest.param(hello("a", "b c"), {"b": hello("b"), "c": "x"}, (A, B), "a cannot reach c", id="cannot reach one"),
        pytest.param(
            hello("a", "b"), {"b": hello("b", disk="new")}, (A, B), "a sees a, b", id="another disk of that name"
        ),
    ],
)
def test_who_agrees_to_a_founding(me: Hello, asked: dict[str, Hello | str], members: Any, words: str) -> None:
    why = confirms(me, asked, members)
    assert (why == "") if not words else words in why


# -- the exchange ----------------------------------------------------------------------------------------------------


class Disk:
    """What survives a crash; also the driver, which is asked for nothing else here."""

    def __init__(self) -> None:
        self.cluster = ""
        self.founded = False

    def found(self, cluster: ClusterId, config: Config) -> Future[None]:
        self.cluster, self.founded = cluster, True
        return _done()

    def join(self, cluster: ClusterId) -> Future[None]:
        self.cluster = cluster
        return _done()


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


class Clock:
    def now_ms(self) -> int:
        return 1_700_000_000_000


class Node(Cluster):
    """The formation of a cluster and nothing else of it."""

    def __init__(self, net: Net, name: str, addresses: Iterable[str], disk: Disk) -> None:
        self.name, self.disk = name, disk
        self.settings = _settings(name, addresses)
        self.me = voter_id(NodeId(name), DiskId(name))
        self.cluster = ClusterId(disk.cluster)
        self.address = address(name)
        self.driver = disk  # type: ignore[assignment]
        self.peers = Wire(net, name)  # type: ignore[assignment]
        self.waiting_for: str | None = ""
        self._clock, self._version, self._wish = Clock(), "1", None  # type: ignore[assignment]
        self._agreed_at, self._founding = float("-inf"), False

    def _belong(self, cluster: ClusterId) -> None:
        self.cluster = cluster

    async def live(self) -> None:
        while not self.cluster:
            self.waiting_for = await self._try_to_form()
            await asyncio.sleep(0)
        self.waiting_for = None


def address(name: str) -> str:
    return f"{name}:1"


def _settings(name: str, addresses: Iterable[str]) -> Settings:
    return build(
        {"node_id": name, "host": "127.0.0.1", "data_dir": "d", "peers": [address(other) for other in addresses]}
    )


class Net:
    """Who is up and who reaches whom. Every message takes a few turns of the event loop, drawn by `draw`."""

    def __init__(self, lists: dict[str, list[str]], draw: random.Random) -> None:
        self.draw = draw
        self.lists = lists
        self.cut: set[tuple[str, str]] = set()  # (from, to)
        self.loss = 0.0
        self.disks = {name: Disk() for name in lists}
        self.up: dict[str, Node] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.agreed: dict[str, frozenset[str]] = {}  # by founder

    def start(self, name: str) -> None:
        if name not in self.up:
            node = self.up[name] = Node(self, name, self.lists[name], self.disks[name])
            self.tasks[name] = asyncio.create_task(node.live())

    async def kill(self, name: str) -> None:
        if name in self.up:
            del self.up[name]
            task = self.tasks.pop(name)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def carry(self, source: str, to: str) -> Node:
        for _ in range(self.draw.randrange(4)):
            await asyncio.sleep(0)
        if to not in self.up or (source, to) in self.cut or self.draw.random() < self.loss:
            raise PeerUnreachable(address(to), "down", sent=False)
        return self.up[to]

    async def turns(self, n: int) -> None:
        for _ in range(n):
            await asyncio.sleep(0)

    async def until(self, what: Callable[[], bool], turns: int = 5_000) -> None:
        for _ in range(turns):
            if what():
                return
            await asyncio.sleep(0)
        waiting = {name: node.waiting_for for name, node in self.up.items()}
        raise AssertionError(f"it never came to be: {waiting}")

    async def stop(self) -> None:
        for name in list(self.up):
            await self.kill(name)

    @property
    def founders(self) -> set[str]:
        return {name for name, disk in self.disks.items() if disk.founded}


class Wire:
    """`Peers` of one node. A request may be carried out and its answer be lost."""

    def __init__(self, net: Net, name: str) -> None:
        self._net, self._name = net, name

    async def call(self, method: str, to: str, path: str, body: Any = None, *, seconds: float) -> Any:
        name = to.partition(":")[0]
        there = await self._net.carry(self._name, name)
        if path == "/peer/hello":
            told: Any = there.hello()
        else:
            assert path == "/peer/genesis"
            self._net.agreed[self._name] = frozenset(node for node, _ in body["members"])
            told = {"why": await there.confirms([(node, disk) for node, disk in body["members"]])}
        await self._net.carry(self._name, name)
        return told


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a promise to run out: here time is turns of the loop."""
    monkeypatch.setattr(cluster_module, "AGREED_SECONDS", 0.0)


def sinks(lists: dict[str, list[str]]) -> list[frozenset[str]]:
    """The groups that are told of each other and of nobody else."""
    reach = {name: _closure(lists, name) for name in lists}
    groups = {frozenset(reach[name]) for name in lists if all(name in reach[other] for other in reach[name])}
    return [group for group in groups if all(reach[name] == group for name in group)]


def _closure(lists: dict[str, list[str]], name: str) -> set[str]:
    found, fresh = {name}, {name}
    while fresh:
        fresh = {other for one in fresh for other in lists[one]} - found
        found |= fresh
    return found


NAMES = "abcde"
SEEDS = st.integers(0, 1 << 32)
LISTS = st.integers(1, 5).flatmap(
    lambda n: st.fixed_dictionaries(
        {name: st.lists(st.sampled_from(NAMES[:n]), min_size=1, max_size=n, unique=True) for name in NAMES[:n]}
    )
)
FULL = st.integers(1, 5).map(lambda n: {name: list(NAMES[:n]) for name in NAMES[:n]})
PAIRS = st.sets(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), max_size=6)
ACTS = st.lists(
    st.tuples(st.sampled_from(["start", "kill", "cut", "mend"]), st.sampled_from(NAMES), st.sampled_from(NAMES)),
    max_size=25,
)


async def disturbed(net: Net, acts: list[tuple[str, str, str]]) -> None:
    """Starts, kills and cuts as told, at any moment of the exchange."""
    for act, one, other in acts:
        if act == "start" and one in net.lists:
            net.start(one)
        elif act == "kill":
            await net.kill(one)
        elif act == "cut":
            net.cut.add((one, other))
        elif act == "mend":
            net.cut.discard((one, other))
        await net.turns(net.draw.randrange(30))


@given(lists=LISTS | FULL, seed=SEEDS, acts=ACTS, cuts=PAIRS, loss=st.sampled_from([0.0, 0.1, 0.4]))
@settings(max_examples=120, deadline=None)
async def test_never_two_clusters_of_nodes_that_are_told_of_each_other(
    lists: dict[str, list[str]], seed: int, acts: list[tuple[str, str, str]], cuts: set[tuple[str, str]], loss: float
) -> None:
    net = Net(lists, random.Random(seed))
    net.cut, net.loss = set(cuts), loss
    try:
        await disturbed(net, [("start", name, name) for name in lists] + acts)
        await net.turns(200)
    finally:
        await net.stop()
    groups = sinks(lists)
    for founder in net.founders:
        (group,) = (group for group in groups if founder in group)  # only there do all agree
        assert len(net.founders & group) == 1, f"{net.founders} each founded a cluster among {group}"
        assert net.agreed.get(founder, frozenset({founder})) == group


@given(lists=LISTS | FULL, seed=SEEDS, acts=ACTS)
@settings(max_examples=120, deadline=None)
async def test_all_that_reach_each_other_become_the_clusters_they_were_told_to_be(
    lists: dict[str, list[str]], seed: int, acts: list[tuple[str, str, str]]
) -> None:
    net = Net(lists, random.Random(seed))
    groups = sinks(lists)
    homes = {name: [group for group in groups if group & _closure(lists, name)] for name in lists}
    try:
        await disturbed(net, acts)
        net.cut.clear()
        for name in lists:
            net.start(name)
        settled = [name for name in lists if len(homes[name]) == 1]
        await net.until(lambda: all(net.disks[name].cluster for name in settled))
        for group in groups:
            members = {name for name in settled if homes[name] == [group]}
            assert len({net.disks[name].cluster for name in members}) == 1
            assert len(net.founders & group) == 1
        for name in set(lists) - set(settled):  # told of two: it says so, unless it was in time to know of one only
            await net.until(
                lambda name=name: net.disks[name].cluster or "never merge" in str(net.up[name].waiting_for)  # type: ignore[misc]
            )
    finally:
        await net.stop()


async def test_a_founder_that_dies_between_agreement_and_founding_founds_when_it_returns() -> None:
    lists = {"a": ["a", "b"], "b": ["a", "b"]}
    net = Net(lists, random.Random(1))
    agreed = asyncio.Event()
    for name in lists:
        net.start(name)
    founder = net.up["b"]

    async def dies() -> None:
        agreed.set()
        await asyncio.Event().wait()

    founder._found = dies  # type: ignore[method-assign]
    async with asyncio.timeout(10):
        await agreed.wait()
    await net.kill("b")
    await net.turns(100)
    assert net.founders == set()
    assert "b:1 cannot be reached" in str(net.up["a"].waiting_for)
    net.start("b")
    await net.until(lambda: net.disks["a"].cluster == net.disks["b"].cluster != "")
    assert net.founders == {"b"}
    await net.stop()


async def test_a_node_that_agreed_founds_nothing_itself_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "AGREED_SECONDS", 3_600.0)
    net = Net({"a": ["a"], "b": ["a", "b"]}, random.Random(1))
    net.up["b"] = Node(net, "b", ["a", "b"], net.disks["b"])
    net.up["a"] = Node(net, "a", ["a", "b"], net.disks["a"])
    assert await net.up["a"].confirms([("a", "a"), ("b", "b")]) == ""
    net.up["a"] = restarted = net.up["a"]
    restarted.settings = _settings("a", ["a"])  # told of nobody else any more: it could found alone now
    assert "going to found" in await restarted._try_to_form()
    assert net.founders == set()


async def test_a_node_that_is_founding_agrees_to_nothing_else() -> None:
    net = Net({"a": ["a", "b"], "b": ["a", "b"]}, random.Random(1))
    for name in "ab":
        net.up[name] = Node(net, name, net.lists[name], net.disks[name])
    net.up["b"]._founding = True
    assert "found a cluster itself" in await net.up["b"].confirms([("a", "a"), ("b", "b")])


async def test_a_member_agrees_to_nothing_and_asks_nobody() -> None:
    net = Net({"a": ["a", "b"]}, random.Random(1))
    net.disks["a"].cluster = "C"
    node = Node(net, "a", ["a", "b"], net.disks["a"])
    node.peers = None  # type: ignore[assignment]
    assert await node.confirms([("a", "a")]) == "a belongs to cluster C"


async def test_a_node_behind_a_nat_need_not_dial_its_own_address() -> None:
    net = Net({"a": ["a", "b"], "b": ["a", "b"]}, random.Random(1))
    net.cut = {("a", "a"), ("b", "b")}
    for name in "ab":
        net.start(name)
    await net.until(lambda: net.disks["a"].cluster == net.disks["b"].cluster != "")
    await net.stop()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        pytest.param(None, "no node of this version", id="nothing"),
        pytest.param({"node": "b"}, "no node of this version", id="too little"),
        pytest.param({"time_ms": "now"}, "no node of this version", id="a time that is none"),
        pytest.param({"addresses": [1]}, "no node of this version", id="an address that is none"),
        pytest.param({"addresses": None}, "no node of this version", id="no addresses"),
        pytest.param({"protocol": PROTOCOL + 1}, "run the same version on both", id="another protocol"),
        pytest.param({"time_ms": Clock().now_ms() - 31_000}, "31 s off", id="a clock that is wrong"),
    ],
)
async def test_a_strange_hello_is_told_in_a_sentence(told: dict[str, Any] | None, words: str) -> None:
    net = Net({"a": ["b"], "b": ["a"]}, random.Random(1))
    for name in "ab":
        net.up[name] = Node(net, name, net.lists[name], net.disks[name])
    right = net.up["b"].hello()
    wrong = told if told is None or told == {"node": "b"} else right | told
    net.up["b"].hello = lambda: wrong  # type: ignore[method-assign, assignment, return-value]
    assert words in str(await net.up["a"]._ask("b:1"))
    assert words in await net.up["a"]._try_to_form()
