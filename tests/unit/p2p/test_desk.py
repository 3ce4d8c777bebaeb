"""The leader's desk as a worker elsewhere sees it: the same calls, whoever leads, and what a change of leaders does to
one that is under way."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from coordination import commands as c
from coordination.commands import AttemptDone
from coordination.dispatcher import Beat, Room
from coordination.errors import OutcomeUnknown, Refused
from coordination.leases import Notice, Signs
from coordination.placement import GpuOffer, Offer
from p2p.ids import NodeId, Term
from p2p.leadership import Leader
from p2p.loops.desk import DeskOfTheLeader, pack_room, serve, unpack_room
from p2p.peers import Peers
from tests.unit.p2p.boxes import Boxes, boxes

WORKER = "w"
FREE = Offer(node=WORKER, cpus=4.0, memory_mb=8_000)
ROOM = Room(FREE, FREE, 4)
NONE = Room(FREE, FREE, 0)


@pytest.fixture
async def led(tmp_path: Path) -> AsyncIterator[Boxes]:
    async with boxes(tmp_path) as made:
        await made.elect(made.a)
        yield made


@pytest.fixture
def desk(led: Boxes) -> DeskOfTheLeader:
    """Of a worker on b."""
    return DeskOfTheLeader("b", led.b.desk, led.b.leadership, led.b.peers)


async def submitted(led: Boxes, n: int = 1) -> list[str]:
    assert led.leader is not None
    answer = await led.leader.desk.submit([{"command": ["true"]}] * n, batch=True, key="", digest="")
    ids: list[str] = answer["ids"]
    return ids


def end(job: str, attempt: int = 1) -> AttemptDone:
    return AttemptDone(job, attempt, WORKER, True, b'{"x":1}', None, 0, True, 5, "exit")


@pytest.mark.parametrize("leader", ["a", "b"], ids=["another node leads", "this node leads"])
async def test_a_job_from_claim_to_end(led: Boxes, desk: DeskOfTheLeader, leader: str) -> None:
    await led.elect(getattr(led, leader))
    (job,) = await submitted(led)
    desk.make_room(ROOM)
    assert await desk.heartbeat(WORKER, [], first=True) == ([], [])
    jobs, doomed = await desk.claim(WORKER, wait_seconds=0)
    assert ([told["id"] for told in jobs], doomed) == ([job], [])
    beat = Beat(Signs(job, 1, cpu_seconds=1.5, progress=b"{}"), 5)
    stranger = Beat(Signs("stranger", 3), None)
    assert await desk.heartbeat(WORKER, [beat, stranger], first=False) == (["stranger"], [])
    described = await desk.describe([(job, 1), (job, 2), ("none", 1)])
    assert list(described) == [(job, 1)]
    assert described[(job, 1)]["command"] == ["true"]
    assert await desk.finish((end(job),)) == [None]
    assert await desk.finish((end(job),)) == [None]  # told again, for the answer may have been lost
    (refused,) = await desk.finish((end(job, 2),))
    assert isinstance(refused, Refused)
    assert (refused.status, refused.field) == (409, "attempt")
    assert (await led.a.ask("GET", f"/jobs/{job}?consistency=stale")).body["state"] == "completed"


async def test_what_a_worker_must_kill_reaches_it(led: Boxes, desk: DeskOfTheLeader) -> None:
    (job,) = await submitted(led)
    desk.make_room(ROOM)
    await desk.claim(WORKER, wait_seconds=0)
    desk.make_room(NONE)
    asking = asyncio.create_task(desk.claim(WORKER, wait_seconds=30))
    while not led.a.desk.matching._parked:
        await asyncio.sleep(0.001)
    await led.a.desk.cancel([job], "why", key="")
    assert await asking == ([], [Notice(job, 1, "cancelled")])


async def test_room_that_is_made_while_a_claim_is_parked_reaches_the_leader(led: Boxes, desk: DeskOfTheLeader) -> None:
    (job,) = await submitted(led)
    desk.make_room(NONE)
    asking = asyncio.create_task(desk.claim(WORKER, wait_seconds=30))
    while not led.a.desk.matching._parked:
        await asyncio.sleep(0.001)
    on_its_way, let_go = asyncio.Event(), asyncio.Event()

    async def slowly(request: web.Request) -> None:
        if request.path == "/peer/desk/room":
            on_its_way.set()
            await let_go.wait()

    led.a.before = slowly
    desk.make_room(Room(FREE, FREE, 0))
    await on_its_way.wait()
    for places in (0, 1):  # the last word counts, however many there were
        desk.make_room(Room(FREE, FREE, places))
    let_go.set()
    async with asyncio.timeout(10):
        jobs, _ = await asking
    assert [told["id"] for told in jobs] == [job]
    assert led.a.desk.rooms[WORKER].max_jobs == 1
    await asyncio.sleep(0)
    assert not [task for task in asyncio.all_tasks() if "_tell_room" in repr(task)]


async def test_nobody_leads(led: Boxes, desk: DeskOfTheLeader) -> None:
    desk.make_room(ROOM)
    for leader in (
        Leader(Term(9), None, None),
        Leader(Term(10), NodeId("b"), "b:1"),
        Leader(Term(11), NodeId("h"), None),
    ):
        led.b.leadership.leader = leader
        with pytest.raises(Refused, match="nobody is known to lead") as error:
            await desk.claim(WORKER, wait_seconds=30)
        assert error.value.status == 503


@pytest.mark.parametrize("successor", ["b", "c"], ids=["this node", "another"])
async def test_a_claim_that_is_parked_at_a_deposed_leader_is_made_again_at_once(
    led: Boxes, desk: DeskOfTheLeader, successor: str
) -> None:
    desk.make_room(ROOM)
    asking = asyncio.create_task(desk.claim(WORKER, wait_seconds=30))
    while not led.a.desk.matching._parked:
        await asyncio.sleep(0.001)
    led.leader = None  # a does not know that it is deposed: its claim stays parked
    await led.elect(getattr(led, successor), heard_by="b c")
    with pytest.raises(OutcomeUnknown, match="does not lead any more"):
        await asking
    (job,) = await submitted(led)
    jobs, _ = await desk.claim(WORKER, wait_seconds=30)
    assert [told["id"] for told in jobs] == [job]


async def test_a_leader_that_knows_better_refuses(led: Boxes, desk: DeskOfTheLeader) -> None:
    led.depose()
    with pytest.raises(Refused) as error:
        await desk.heartbeat(WORKER, [], first=False)
    assert error.value.status == 503


async def test_an_unknown_outcome_stays_unknown_on_the_way(led: Boxes, desk: DeskOfTheLeader) -> None:
    (job,) = await submitted(led)
    led.ill(led.a, led.lost_and_deposed)
    with pytest.raises(OutcomeUnknown):
        await desk.finish((end(job),))


class Mute(Peers):
    """Answers what it is given."""

    def __init__(self, told: Any) -> None:
        self._told = told

    async def call(self, *_: Any, **__: Any) -> Any:
        if isinstance(self._told, Exception):
            raise self._told
        return self._told


@pytest.mark.parametrize("told", [None, [], {}, {"jobs": {}}, {"jobs": []}, "x"], ids=repr)
async def test_an_answer_of_another_version_is_no_answer(led: Boxes, told: Any) -> None:
    desk = DeskOfTheLeader("b", led.b.desk, led.b.leadership, Mute(told))
    desk.make_room(ROOM)
    with pytest.raises(OutcomeUnknown, match="cannot read"):
        await desk.claim(WORKER, wait_seconds=0)


async def test_a_claim_that_is_given_up_leaves_the_leader_alone(led: Boxes, desk: DeskOfTheLeader) -> None:
    desk.make_room(ROOM)
    asking = asyncio.create_task(desk.claim(WORKER, wait_seconds=30))
    while not led.a.desk.matching._parked:
        await asyncio.sleep(0.001)
    desk.make_room(NONE)
    asking.cancel()
    assert isinstance((await asyncio.gather(asking, return_exceptions=True))[0], asyncio.CancelledError)
    desk.make_room(ROOM)  # told to nobody: no claim is parked
    assert desk._telling is None
    while led.a.desk.matching._parked:
        await submitted(led)
        await asyncio.sleep(0.001)
    assert led.a.desk.leases.by_job == {}


# -- what a body may be ----------------------------------------------------------------------------------------------

GPUS = st.builds(
    GpuOffer,
    uuid=st.text(min_size=1, max_size=5),
    model=st.text(max_size=5),
    memory_mb=st.integers(0, 1 << 40),
    memory_free_mb=st.integers(0, 1 << 40),
    share_free=st.floats(0, 1),
    compute_capability=st.sampled_from(["8.0", "9.0"]),
)
OFFERS = st.builds(
    Offer,
    node=st.just("w"),
    cpus=st.floats(0, 1e6),
    memory_mb=st.integers(0, 1 << 40),
    disk_mb=st.integers(0, 1 << 40),
    gpus=st.lists(GPUS, max_size=2).map(tuple),
    labels=st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
)


@given(st.builds(Room, OFFERS, OFFERS, st.integers(0, 1 << 31)))
def test_a_room_travels_whole(room: Room) -> None:
    assert unpack_room(pack_room(room)) == room
    assert {field.name for field in dataclasses.fields(Offer)} == set(pack_room(room)[0])


@pytest.mark.parametrize(
    ("call", "body"),
    [
        ("claim", {}),
        ("claim", {"room": [], "worker": "w", "wait_seconds": 0}),
        ("claim", {"room": [1, 2, 3], "worker": "w", "wait_seconds": 0}),
        ("claim", {"room": pack_room(NONE), "worker": "w", "wait_seconds": "x"}),
        ("claim", {"room": pack_room(NONE), "worker": "w", "wait_seconds": float("nan")}),
        ("room", {"room": None}),
        ("heartbeat", {"worker": "w", "first": False, "beats": [[]]}),
        ("heartbeat", {"worker": "w", "first": False, "beats": [1]}),
        ("heartbeat", {"worker": "w"}),
        ("describe", {"keys": [["a"]]}),
        ("describe", {"keys": 3}),
        ("finish", {"items": [[1, 2]]}),
        ("finish", {}),
    ],
)
async def test_a_body_that_is_none_of_ours_is_400(led: Boxes, call: str, body: dict[str, Any]) -> None:
    answer = await led.a.ask("POST", f"/peer/desk/{call}", body)
    assert answer.status == 400, answer
    assert led.queue.commands == []


async def test_a_call_that_there_is_not_is_404(led: Boxes) -> None:
    assert (await led.a.ask("POST", "/peer/desk/dance", {})).status == 404
    assert (await led.b.ask("POST", "/peer/desk/claim", {})).status == 503  # it is asked of the leader or not at all


async def test_no_wait_is_without_end(led: Boxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2p.loops.desk.MAX_WAIT_SECONDS", 0.01)
    body = {"room": pack_room(NONE), "worker": "w", "wait_seconds": float("inf")}
    async with asyncio.timeout(5):
        assert await serve(led.a.desk, "claim", body, lambda: False) == {"jobs": [], "doomed": [], "mark": ""}


async def test_a_worker_whose_claim_went_astray_gets_the_job_back_unspent(led: Boxes, desk: DeskOfTheLeader) -> None:
    """The leader fell after it had journaled the claim: the worker was never told of it, the next leader was."""
    (job,) = await submitted(led)
    desk.make_room(ROOM)
    led.ill(led.a, led.committed_and_deposed)
    with pytest.raises((OutcomeUnknown, Refused)):
        await desk.claim(WORKER, wait_seconds=0)
    await led.elect(led.c)
    held = led.c.desk.leases.by_job[job]
    assert await desk.heartbeat(WORKER, [], first=False, whole=True) == ([], [])
    assert job in led.c.desk.leases.by_job  # it may still be on its way
    held.renewed_at -= led.c.desk.leases.lease_ms // 6
    await desk.heartbeat(WORKER, [], first=False, whole=False)
    assert job in led.c.desk.leases.by_job  # that was not all it has
    await desk.heartbeat(WORKER, [], first=False, whole=True)
    (release,) = (command for command in led.queue.commands if isinstance(command, c.Release))
    assert release.reason == "its worker was never told of it"
    jobs, _ = await desk.claim(WORKER, wait_seconds=5)
    assert [(told["id"], told["attempt"]) for told in jobs] == [(job, 2)]
    record = (await led.c.ask("GET", f"/jobs/{job}")).body
    assert (record["state"], record["attempt"]) == ("claimed", 2)


async def test_a_node_that_led_remembers_what_was_said_of_it_last() -> None:
    """Not what was said before it led: that may have been taken back since."""

    async def nothing(worker: str, *, wait_seconds: float) -> tuple[list[Any], list[Any]]:
        return [], []

    own: Any = SimpleNamespace(leads=True, matching=SimpleNamespace(barred={}), claim=nothing)
    unused: Any = None
    desk = DeskOfTheLeader("n1", own, unused, unused)
    desk._mark = "draining"
    for said in ("", "cordoned"):
        own.leads, own.matching.barred = True, {"n1": said} if said else {}
        await desk.claim("n1", wait_seconds=0)
        own.leads = False
        assert desk.mark == said
