"""``/admin/*``: what operators order. Voters, leadership, shutdown."""

from __future__ import annotations

from typing import Annotated, Any

from aiohttp import web
from pydantic import Field

from coordination.job import Closed, Text
from p2p.api.bodies import check_query, read_model
from p2p.api.context import answer, context
from p2p.api.queue import Nothing

routes = web.RouteTableDef()

NodeName = Annotated[Text, Field(min_length=1, max_length=63)]


class NodeBody(Closed):
    node: NodeName


class TransferBody(Closed):
    to: NodeName | None = Field(None, description="a voter; by default the one that would inherit")


@routes.get("/admin/voters")
async def voters(request: web.Request) -> web.Response:
    """``{"voters": [{node, disk, role, match_index, …}], "learners": […], "autopilot": …}`` as the leader sees them."""
    check_query(request)
    here = context(request)
    return answer(request, await here.cluster.voters(), as_of=here.as_of())


@routes.post("/admin/voters/add")
async def add(request: web.Request) -> web.Response:
    """``{"node"}``: makes a member a learner, and a voter as soon as it has caught up."""
    check_query(request)
    body = await read_model(request, NodeBody)
    return answer(request, await context(request).cluster.add_voter(body.node))


@routes.post("/admin/voters/remove")
async def remove(request: web.Request) -> web.Response:
    """``{"node"}``: takes the vote away; it stays a member."""
    check_query(request)
    body = await read_model(request, NodeBody)
    return answer(request, await context(request).cluster.remove_voter(body.node))


@routes.post("/admin/leadership/transfer")
async def transfer(request: web.Request) -> web.Response:
    """``{"to"}``: hands the leadership over; answers when it has happened."""
    check_query(request)
    body = await read_model(request, TransferBody)
    told: dict[str, Any] = await context(request).cluster.transfer(body.to)
    return answer(request, told)


@routes.post("/admin/election/start")
async def election(request: web.Request) -> web.Response:
    """Has the leader hand over to its best heir; with no leader, this voter stands at once."""
    check_query(request)
    await read_model(request, Nothing)
    return answer(request, await context(request).cluster.start_election())
