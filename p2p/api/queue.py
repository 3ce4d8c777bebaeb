"""The queue's pages and the runbook's recoveries; the populator, the daemons, alerts."""

from __future__ import annotations

from typing import Literal

from aiohttp import web
from pydantic import Field

from coordination.job import Closed, Number, ShortWord, Text, Whole
from coordination.operations import DEFAULT_STUCK_SECONDS
from p2p.api.bodies import check_query, query_int, query_number, read_model
from p2p.api.context import answer, context

routes = web.RouteTableDef()


class ClearBody(Closed):
    include_running: bool = False


class PurgeBody(Closed):
    max_age_hours: Number = Field(24.0, ge=0, le=1e6)


class RetryBody(Closed):
    kind: ShortWord | None = None
    group: ShortWord | None = None
    array: Text | None = Field(None, min_length=1, max_length=64)
    max_age_hours: Number | None = Field(None, ge=0, le=1e6)
    limit: Whole | None = Field(None, ge=1, le=1_000_000)


class InactiveBody(Closed):
    threshold_seconds: Number = Field(300.0, ge=0, le=1e9)


class StuckBody(Closed):
    threshold_seconds: Number = Field(DEFAULT_STUCK_SECONDS, ge=0, le=1e9)


class PopulateBody(Closed):
    force: bool = False


class AlertBody(Closed):
    name: Text = Field(min_length=1, max_length=100)
    message: Text = Field("", max_length=2_000)
    severity: Literal["info", "warning", "critical"] = "warning"


class AlertName(Closed):
    name: Text = Field(min_length=1, max_length=100)


class Nothing(Closed):
    """A body with no fields."""


@routes.get("/work_queue_status")
async def work_queue_status(request: web.Request) -> web.Response:
    """The queue at a glance: sums by state and kind, workers, health, alerts."""
    check_query(request)
    as_of = await context(request).read_point(request, page=True)
    status = await context(request).operations.queue_status()
    return answer(request, {**status, "as_of": as_of}, as_of=as_of)


@routes.get("/work_assignment_status")
async def work_assignment_status(request: web.Request) -> web.Response:
    """``{worker: {"assigned", "completed", "failed", "last_heartbeat"}}`` and nothing else at the top level."""
    check_query(request)
    as_of = await context(request).read_point(request, page=True)
    return answer(request, await context(request).operations.assignment_status(), as_of=as_of)


@routes.get("/work_queue/stuck")
async def stuck(request: web.Request) -> web.Response:
    """In progress for at least ?threshold_seconds= and with a reason; without it, those that ``stalled`` counts."""
    check_query(request, "threshold_seconds")
    as_of = await context(request).read_point(request)
    told = await context(request).operations.stuck(query_number(request, "threshold_seconds"))
    return answer(request, {**told, "as_of": as_of}, as_of=as_of)


@routes.get("/work_queue/failures")
async def failures(request: web.Request) -> web.Response:
    """The newest ?limit= failed jobs with their errors."""
    check_query(request, "limit")
    as_of = await context(request).read_point(request)
    limit = query_int(request, "limit", least=1, most=1000) or 20
    return answer(request, {**await context(request).operations.failures(limit), "as_of": as_of}, as_of=as_of)


@routes.post("/work_queue/clear")
async def clear(request: web.Request) -> web.Response:
    """Cancels what has not started; with include_running everything."""
    check_query(request)
    body = await read_model(request, ClearBody)
    return answer(request, await context(request).operations.clear(body.include_running))


@routes.post("/work_queue/purge_failed")
async def purge_failed(request: web.Request) -> web.Response:
    """Forgets jobs that failed more than max_age_hours ago."""
    check_query(request)
    body = await read_model(request, PurgeBody)
    return answer(request, await context(request).operations.purge_failed(body.max_age_hours))


@routes.post("/work_queue/retry_failed")
async def retry_failed(request: web.Request) -> web.Response:
    """Failed jobs (of a kind, group or array; so young; so many) start over, the newest first: ``{"retried"}``."""
    check_query(request)
    body = await read_model(request, RetryBody)
    told = await context(request).operations.retry_failed(**body.model_dump(exclude_none=True))
    return answer(request, told)


@routes.post("/work_queue/clear_inactive_workers")
async def clear_inactive_workers(request: web.Request) -> web.Response:
    """Forgets workers silent for threshold_seconds; their jobs go back."""
    check_query(request)
    body = await read_model(request, InactiveBody)
    return answer(request, await context(request).operations.clear_inactive_workers(body.threshold_seconds))


@routes.post("/work_queue/release_stuck")
async def release_stuck(request: web.Request) -> web.Response:
    """Gives back what is stuck; no attempt is spent."""
    check_query(request)
    body = await read_model(request, StuckBody)
    return answer(request, await context(request).operations.release_stuck(body.threshold_seconds))


@routes.get("/populator")
async def populator(request: web.Request) -> web.Response:
    """The populator's health."""
    check_query(request)
    return answer(request, await context(request).operations.populator(), as_of=context(request).as_of())


@routes.post("/populator/populate")
async def populate(request: web.Request) -> web.Response:
    """Fills the queue now."""
    check_query(request)
    body = await read_model(request, PopulateBody)
    return answer(request, await context(request).operations.populate(body.force))


@routes.get("/daemons")
async def daemons(request: web.Request) -> web.Response:
    """The background loops and their states."""
    check_query(request)
    return answer(request, await context(request).operations.daemons(), as_of=context(request).as_of())


@routes.post("/daemons/{type}/{verb:restart|start|stop}")
async def daemon(request: web.Request) -> web.Response:
    """Restarts, starts or stops a background loop."""
    check_query(request)
    await read_model(request, Nothing)
    operations = context(request).operations
    act = {
        "restart": operations.daemon_restart,
        "start": operations.daemon_start,
        "stop": operations.daemon_stop,
    }[request.match_info["verb"]]
    return answer(request, await act(request.match_info["type"]))


@routes.post("/alerts")
async def raise_alert(request: web.Request) -> web.Response:
    """``{"name", "message", "severity"}`` -> ``{"alert", "raised"}``."""
    check_query(request)
    body = await read_model(request, AlertBody)
    return answer(request, await context(request).operations.raise_alert(body.name, body.message, body.severity))


@routes.post("/alerts/clear")
async def clear_alert(request: web.Request) -> web.Response:
    """``{"name"}`` -> ``{"alert", "cleared"}``."""
    check_query(request)
    body = await read_model(request, AlertName)
    return answer(request, await context(request).operations.clear_alert(body.name))
