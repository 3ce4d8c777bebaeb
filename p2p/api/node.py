"""The node's own pages: health, readiness, status, nodes, events, metrics, shutdown."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Annotated, Any

from aiohttp import web
from pydantic import Field

from coordination.errors import InvalidInput
from coordination.events import Event
from coordination.job import Closed, Number, Text
from p2p.api.bodies import check_query, query_int, read_model
from p2p.api.context import answer, context
from p2p.api.errors import Problem
from p2p.api.queue import Nothing

routes = web.RouteTableDef()

SSE_QUEUE = 1_000
SSE_PING_SECONDS = 15.0
MAX_LISTENERS = 100


class _Feed:
    """The bounded queue between the bus and one listener: a slow one loses the oldest, and is told how many."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[int, Event]] = []
        self._wake = asyncio.Event()
        self.lost = 0
        self.idle = False

    def on_events(self, batch: list[tuple[int, Event]]) -> None:
        self._loop.call_soon_threadsafe(self._take, batch)

    def _take(self, batch: list[tuple[int, Event]]) -> None:
        self._waiting.extend(batch)
        over = len(self._waiting) - SSE_QUEUE
        if over > 0:
            del self._waiting[:over]
            self.lost += over
        self._wake.set()

    async def next(self) -> list[tuple[int, Event]]:
        try:
            async with asyncio.timeout(SSE_PING_SECONDS):
                await self._wake.wait()
            self.idle = False
        except TimeoutError:
            self.idle = True
        self._wake.clear()
        batch, self._waiting = self._waiting, []
        return batch

    def stop(self) -> None:
        """Ends the wait; the listener then sees that the node is stopping."""
        self._wake.set()


_listeners = web.AppKey("listeners", set[_Feed])


@routes.get("/")
async def index(request: web.Request) -> web.Response:
    """What there is: every path with its method and purpose."""
    pages = []
    for route in request.app.router.routes():
        if route.method != "HEAD" and route.resource is not None:
            purpose = (route.handler.__doc__ or "").strip().partition("\n")[0]
            pages += [{"method": route.method, "path": path, "about": purpose} for path in _paths(route.resource)]
    return answer(request, {"node_id": context(request).settings.node_id, "pages": pages})


def _paths(resource: web.AbstractResource) -> list[str]:
    """As a person would ask for them: ``/jobs/{id}/cancel``, ``/jobs/{id}/release``, …"""
    pattern = resource.get_info().get("pattern")
    verbs = re.search(r"\(\?P<verb>([^)]+)\)", pattern.pattern) if pattern is not None else None
    return (
        [resource.canonical.replace("{verb}", verb) for verb in verbs[1].split("|")] if verbs else [resource.canonical]
    )


@routes.get("/health")
async def health(request: web.Request) -> web.Response:
    """The process answers."""
    return answer(request, {"status": "ok"})


@routes.get("/ready")
async def ready(request: web.Request) -> web.Response:
    """200 when this node can take work, else 503 with the reason."""
    status = context(request).node_status()
    if status["not_ready"] is not None:
        raise Problem(503, status["not_ready"], ready=False, reason=status["not_ready"])
    return answer(request, {"ready": True})


@routes.get("/status")
async def status(request: web.Request) -> web.Response:
    """Everything about this node and its queue."""
    check_query(request)
    here = context(request)
    as_of = await here.read_point(request, page=True)
    return answer(request, {**await here.operations.status(), "as_of": as_of}, as_of=as_of)


@routes.get("/nodes")
async def nodes(request: web.Request) -> web.Response:
    """Every node by id: state, role, resources, running jobs."""
    check_query(request)
    here = context(request)
    as_of = await here.read_point(request, page=True)
    members = here.nodes()
    known = here.dispatcher.leads or here.has_copy()
    marks = await here.operations.node_marks(members) if known else {}
    shown = {name: {**member, **marks.get(name, {})} for name, member in members.items()}
    return answer(request, {"nodes": shown, "as_of": as_of}, as_of=as_of)


class MarkBody(Closed):
    """What is to be said of a node."""

    reason: Annotated[Text, Field(min_length=1, max_length=300)] = "operator"
    deadline_seconds: Number | None = Field(
        None, ge=0, le=30 * 86_400, description="drain only: what still runs then is asked to end, and goes elsewhere"
    )


@routes.post("/nodes/{id}/{verb:drain|undrain|cordon|uncordon}")
async def mark(request: web.Request) -> web.Response:
    """Cordon: nothing new is placed there. Drain: the same, and it is safe to stop once it is drained."""
    check_query(request)
    body = await read_model(request, MarkBody)
    here, node_id, verb = context(request), request.match_info["id"], request.match_info["verb"]
    if node_id not in here.nodes() and node_id not in here.dispatcher.rooms and node_id not in here.dispatcher.marks:
        raise Problem(404, f"there is no node {node_id[:80]!r}", field="id")
    if body.deadline_seconds is not None and verb != "drain":
        raise InvalidInput("deadline_seconds", f"belongs to drain, not to {verb}")
    told = await here.operations.mark_node(node_id, verb, body.reason, body.deadline_seconds)
    return answer(request, {"node": node_id, **here.nodes().get(node_id, {}), **told})


@routes.get("/metrics")
async def metrics(request: web.Request) -> web.Response:
    """Prometheus text."""
    body = await asyncio.to_thread(context(request).metrics)
    return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


@routes.post("/admin/shutdown")
async def shutdown(request: web.Request) -> web.Response:
    """Ends this node cleanly; its jobs go on under the runner."""
    check_query(request)
    await read_model(request, Nothing)
    context(request).shut_down()
    return answer(request, {"shutting_down": True})


@routes.get("/events", allow_head=False)
async def events(request: web.Request) -> web.StreamResponse:
    """Server-sent events; ``?after=N`` (or Last-Event-ID) replays what is remembered after number N."""
    check_query(request, "after")
    here = context(request)
    listeners = request.app[_listeners]
    if len(listeners) >= MAX_LISTENERS:
        raise Problem(429, f"{MAX_LISTENERS} listeners are connected already")
    after = query_int(request, "after", least=0, most=1 << 60)
    last = request.headers.get("Last-Event-ID", "")
    if after is None and last:
        if not (last.isascii() and last.isdigit() and len(last) < 18):
            raise InvalidInput("Last-Event-ID", "must be the number of an event")
        after = int(last)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(request)
    feed = _Feed()
    listeners.add(feed)
    unsubscribe = here.bus.subscribe(feed.on_events)
    try:
        replay = here.bus.tail(after) if after is not None else []
        for number, event in replay:
            await response.write(_sse(number, event))
        newest = replay[-1][0] if replay else 0
        while not here.stopping.is_set():
            for number, event in await feed.next():
                if number > newest:
                    await response.write(_sse(number, event))
            if feed.lost:
                lost, feed.lost = feed.lost, 0
                await response.write(f'event: LOST\ndata: {{"events": {lost}}}\n\n'.encode())
            if feed.idle:
                await response.write(b": ping\n\n")
    finally:
        unsubscribe()
        listeners.discard(feed)
    return response


def _sse(number: int, event: Event) -> bytes:
    body: dict[str, Any] = event.as_json()
    return f"id: {number}\nevent: {event.type}\ndata: {json.dumps(body)}\n\n".encode()


def prepare(app: web.Application) -> None:
    """Gives the app its set of listeners, and ends them when the node stops."""
    listeners: set[_Feed] = set()
    app[_listeners] = listeners

    async def stop(app: web.Application) -> None:
        feeds: set[_Feed] = app[_listeners]
        for feed in tuple(feeds):
            feed.stop()

    app.on_shutdown.append(stop)
