"""``/schedules``: recurring jobs. Those of jobs.yaml are shown here and changed there."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from coordination.errors import InvalidInput
from p2p.api.bodies import check_query, read_model, read_object
from p2p.api.context import answer, context
from p2p.api.queue import Nothing

routes = web.RouteTableDef()


@routes.get("/schedules")
async def listing(request: web.Request) -> web.Response:
    """Every schedule by name, with its next and its last run."""
    check_query(request)
    as_of = await context(request).read_point(request)
    return answer(request, {**await context(request).operations.schedules(), "as_of": as_of}, as_of=as_of)


@routes.get("/schedules/{name}")
async def one(request: web.Request) -> web.Response:
    """One schedule."""
    check_query(request)
    as_of = await context(request).read_point(request)
    told = await context(request).operations.schedule(request.match_info["name"])
    return answer(request, {**told, "as_of": as_of}, as_of=as_of)


@routes.post("/schedules")
async def put(request: web.Request) -> web.Response:
    """A `coordination.schedules.Schedule` with its ``name``; it takes the place of the one of that name."""
    check_query(request)
    body: dict[str, Any] = await read_object(request)
    if "name" not in body:
        raise InvalidInput("name", "is required")
    name = body.pop("name")
    told = await context(request).operations.put_schedule(name, **{str(key): value for key, value in body.items()})
    return answer(request, told, as_of=context(request).as_of())


@routes.delete("/schedules/{name}")
async def drop(request: web.Request) -> web.Response:
    """Its runs so far stay; there are no more. 404 unknown; 409 one of jobs.yaml."""
    check_query(request)
    await read_model(request, Nothing)
    return answer(request, await context(request).operations.drop_schedule(request.match_info["name"]))
