"""The operators' Python API inside a node that does not lead: it reaches the leader, or says that nobody leads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from config.settings import build
from coordination import live
from coordination.answers import Answer
from coordination.errors import Refused
from coordination.unified_queue_populator import get_queue_populator
from coordination.work_queue import get_work_queue
from p2p.ids import NodeId, Term
from p2p.leadership import Leader
from p2p.node import Node
from tests.unit.p2p.boxes import TOKEN, Box, Boxes, boxes

TOKENED = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
async def led(tmp_path: Path) -> AsyncIterator[Boxes]:
    async with boxes(tmp_path, token=TOKEN) as made:
        await made.elect(made.a)
        yield made


def inside(box: Box, *, alone: bool = False) -> live.LiveBackend:
    """The live backend of the node that `box` is: the node's own rule for where a call goes."""
    node: Any = SimpleNamespace(
        desk=box.desk,
        leadership=box.leadership,
        settings=build({"node_id": box.name, "host": "127.0.0.1", "data_dir": "d", "auth_token": TOKEN}),
        cluster=SimpleNamespace(needs_nobody=lambda: alone),
        _loop=asyncio.get_running_loop(),
    )
    return live.LiveBackend(box.operations, elsewhere=lambda operation: Node._elsewhere(node, operation))


@pytest.fixture
def around(led: Boxes) -> Any:
    """Makes this process the node that a box is."""

    def be(box: Box, **how: Any) -> None:
        live.set_live(inside(box, **how))

    yield be
    live.set_live(None)


async def off_the_loop(call: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(call)


async def test_orders_inside_a_follower_reach_the_leader(led: Boxes, around: Any) -> None:
    around(led.b)
    queue = get_work_queue()
    job = await off_the_loop(lambda: queue.add_job(command=["true"]))
    assert led.jobs() == [job]
    assert (await off_the_loop(lambda: queue.get_job(job))).state == "pending"
    assert (await off_the_loop(lambda: queue.cancel_job(job))).state == "cancelled"
    assert await off_the_loop(queue.get_stuck_jobs) == []
    assert await off_the_loop(lambda: get_queue_populator().populate_all_queues(force=True)) == 0
    assert {path.partition("?")[0] for _, path in led.a.asked} >= {"/jobs", "/work_queue/stuck", "/populator/populate"}
    assert led.b.asked == []  # its own event loop is not waited for


async def test_what_only_the_leader_knows_is_not_told_wrongly_by_a_follower(led: Boxes, around: Any) -> None:
    """A follower has no leases: nothing was ever stuck there, and no worker active."""
    around(led.b)
    await led.a.desk.heartbeat("w", [], first=False)
    assert led.b.desk.leases.seen_at == {}
    workers = await off_the_loop(get_work_queue().get_active_workers)
    assert [worker["node"] for worker in workers] == ["w"]


@pytest.mark.parametrize("operation", sorted(set(live.ROUTES) - live.OF_ONE_NODE))
async def test_nobody_leads_and_nothing_is_done_or_made_up(led: Boxes, operation: str) -> None:
    backend = inside(led.b)
    for leader in (
        Leader(Term(9), None, None),
        Leader(Term(9), NodeId("b"), "b:1"),
        Leader(Term(9), NodeId("h"), None),
    ):
        led.b.leadership.leader = leader
        with pytest.raises(Refused) as error:
            backend.call(operation)
        assert error.value.status == 503


@pytest.mark.parametrize("operation", sorted(live.OF_ONE_NODE))
async def test_what_is_about_this_node_stays_here(led: Boxes, operation: str) -> None:
    assert Node._elsewhere(SimpleNamespace(), operation) is None  # type: ignore[arg-type]


async def test_the_leader_itself_carries_it_out(led: Boxes, around: Any) -> None:
    around(led.a)
    job = await off_the_loop(lambda: get_work_queue().add_job(command=["true"]))
    assert led.jobs() == [job]
    assert led.a.asked == []


async def test_a_write_from_the_leaders_own_loop_is_refused_not_waited_for(led: Boxes) -> None:
    """It would hold up the very loop on which the other voters are spoken to: nothing would commit, and the leader be
    deposed for its silence."""
    backend = inside(led.a)
    with pytest.raises(Refused, match="from a thread") as error:
        backend.call("submit", body={"command": ["true"]})
    assert (error.value.status, led.jobs()) == (503, [])
    assert isinstance(backend.call("stuck"), Answer)  # reading needs nobody


async def test_a_cluster_of_one_may_write_from_its_own_loop(led: Boxes) -> None:
    inside(led.a, alone=True).call("submit", body={"command": ["true"]})
    assert len(led.jobs()) == 1
