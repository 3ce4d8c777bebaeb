"""``/worker/*``: the protocol between a worker and the leader. The node's own worker speaks to the desk directly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import Field

from coordination.commands import AttemptDone
from coordination.dispatcher import Beat, Room
from coordination.errors import InvalidInput, Refused
from coordination.job import Closed, Number, ShortWord, Text, Whole
from coordination.leases import Notice, Signs
from coordination.placement import GpuOffer, Offer
from p2p.api.bodies import check_query, read_model, read_object, validate
from p2p.api.context import answer, context
from p2p.api.errors import Problem
from p2p.workplace import MAX_CHECKPOINT_BYTES, MAX_PROGRESS_BYTES, MAX_RESULT_BYTES

routes = web.RouteTableDef()

MAX_ITEMS = 10_000
JobId = Annotated[Text, Field(min_length=1, max_length=64)]
Attempt = Annotated[Whole, Field(ge=1, le=1 << 31)]


class Gpu(Closed):
    uuid: Annotated[Text, Field(min_length=1, max_length=100)]
    model: Annotated[Text, Field(max_length=200)] = ""
    memory_mb: Whole = Field(0, ge=0, le=10_000_000)
    memory_free_mb: Whole | None = Field(None, ge=0, le=10_000_000)
    share_free: Number = Field(1.0, ge=0, le=1)
    compute_capability: Annotated[str, Field(pattern=r"^\d{1,2}\.\d{1,2}$")] = "0.0"


class RoomBody(Closed):
    cpus: Number = Field(0.0, ge=0, le=100_000)
    memory_mb: Whole = Field(0, ge=0, le=1_000_000_000)
    disk_mb: Whole = Field(0, ge=0, le=1_000_000_000_000)
    gpus: list[Gpu] = Field(default_factory=list, max_length=64)
    labels: dict[ShortWord, Annotated[str, Field(max_length=200)]] = Field(default_factory=dict, max_length=64)

    def offer(self, node: str) -> Offer:
        gpus = tuple(
            GpuOffer(
                uuid=gpu.uuid,
                model=gpu.model,
                memory_mb=gpu.memory_mb,
                memory_free_mb=gpu.memory_mb if gpu.memory_free_mb is None else gpu.memory_free_mb,
                share_free=gpu.share_free,
                compute_capability=gpu.compute_capability,
            )
            for gpu in self.gpus
        )
        return Offer(
            node=node, cpus=self.cpus, memory_mb=self.memory_mb, disk_mb=self.disk_mb, gpus=gpus, labels=self.labels
        )


class ClaimBody(Closed):
    worker: ShortWord
    resources: RoomBody = Field(description="what is free now")
    capacity: RoomBody | None = Field(None, description="what would be free with nothing running")
    max_jobs: Whole = Field(1, ge=0, le=1_000)
    wait_seconds: Number = Field(0.0, ge=0, le=60)


class BeatBody(Closed):
    id: JobId
    attempt: Attempt
    progress: Any = None
    started_at: Number | None = Field(None, ge=0, le=32_503_680_000)
    cpu_seconds: Number | None = Field(None, ge=0)
    output_bytes: Whole | None = Field(None, ge=0, le=1 << 62)


class HeartbeatBody(Closed):
    worker: ShortWord
    jobs: list[BeatBody] = Field(max_length=MAX_ITEMS)
    first: bool = Field(False, description="the worker has just started, and holds these jobs and no others")


class CompleteBody(Closed):
    id: JobId
    attempt: Attempt
    worker: ShortWord
    result: Any = None
    started_at: Number | None = Field(None, ge=0, le=32_503_680_000)
    exit_code: Literal[0] = 0


class FailBody(Closed):
    id: JobId
    attempt: Attempt
    worker: ShortWord
    error: Annotated[str, Field(min_length=1, max_length=20_000)]
    exit_code: Annotated[Whole, Field(ge=-255, le=255)] | None = None
    retryable: bool = True
    started_at: Number | None = Field(None, ge=0, le=32_503_680_000)
    cause: Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")] = "exit"
    gpu_memory_mb: Whole = Field(0, ge=0, le=10_000_000, description="of the smallest GPU it had; 0 = it had none")
    checkpoint: Any = None


class Completions(Closed):
    items: list[CompleteBody] = Field(min_length=1, max_length=MAX_ITEMS)


class Failures(Closed):
    items: list[FailBody] = Field(min_length=1, max_length=MAX_ITEMS)


def _json_bytes(name: str, value: Any, limit: int) -> bytes | None:
    if value is None:
        return None
    try:
        encoded = json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError) as error:
        raise InvalidInput(name, f"is not JSON: {error}") from None
    if len(encoded) > limit:
        raise InvalidInput(name, f"is at most {limit} bytes; this is {len(encoded)}")
    return encoded


def _ms(seconds: float | None) -> int:
    return round(seconds * 1000) if seconds is not None else 0


@routes.post("/worker/claim")
async def claim(request: web.Request) -> web.Response:
    """``{"jobs": […], "cancel": [{"id", "attempt", "reason"}]}``; held open until there is either or the wait ends."""
    check_query(request)
    body = await read_model(request, ClaimBody)
    desk = context(request).dispatcher
    free = body.resources.offer(body.worker)
    total = body.capacity.offer(body.worker) if body.capacity else None
    desk.make_room(Room(free, total, body.max_jobs))
    transport = request.transport

    def gone() -> bool:
        return transport is None or transport.is_closing() or context(request).stopping.is_set()

    jobs, notices = await desk.claim(body.worker, wait_seconds=body.wait_seconds, gone=gone)
    return answer(request, {"jobs": jobs, "cancel": _doomed(notices)})


def _doomed(notices: list[Notice]) -> list[dict[str, Any]]:
    return [{"id": notice.job, "attempt": notice.attempt, "reason": notice.reason} for notice in notices]


@routes.post("/worker/heartbeat")
async def heartbeat(request: web.Request) -> web.Response:
    """``{"cancel": [ids], "stale": [ids]}``: the worker kills both. A claimed job it lists is running now. If there are
    any, ``make_way: [{"id", "attempt", "reason"}]`` are to end by SIGTERM, and then to fail with that cause."""
    check_query(request)
    body = await read_model(request, HeartbeatBody)
    desk = context(request).dispatcher
    beats = []
    for n, job in enumerate(body.jobs):
        progress = _json_bytes(f"jobs[{n}].progress", job.progress, MAX_PROGRESS_BYTES)
        measured = job.cpu_seconds is not None or job.output_bytes is not None
        signs = Signs(
            job.id,
            job.attempt,
            cpu_seconds=job.cpu_seconds if job.cpu_seconds is not None else -1.0,
            output_bytes=job.output_bytes if job.output_bytes is not None else -1,
            busy=not measured,
            progress=progress,
        )
        beats.append(Beat(signs, _ms(job.started_at) or desk.now_ms()))
    stale, cancelled = await desk.heartbeat(body.worker, beats, first=body.first)
    told: dict[str, Any] = {"cancel": cancelled, "stale": stale}
    if orders := desk.leases.orders(body.worker):  # a worker that is full need not claim, and would not hear of these
        told["make_way"] = _doomed(orders)
    return answer(request, told)


@routes.post("/worker/complete")
async def complete(request: web.Request) -> web.Response:
    """One completion, or ``{"items": […]}``. A stale attempt gets 409 and changes nothing."""
    return await _finish(request, CompleteBody, Completions)


@routes.post("/worker/fail")
async def fail(request: web.Request) -> web.Response:
    """One failure, or ``{"items": […]}``. A stale attempt gets 409 and changes nothing."""
    return await _finish(request, FailBody, Failures)


async def _finish(
    request: web.Request,
    one: type[CompleteBody] | type[FailBody],
    many: type[Completions] | type[Failures],
) -> web.Response:
    check_query(request)
    body = await read_object(request)
    batch = "items" in body
    reports: Sequence[CompleteBody | FailBody]
    reports = validate(many, body).items if batch else [validate(one, body)]
    items = tuple(_done(report, f"items[{n}]." if batch else "") for n, report in enumerate(reports))
    answers = await context(request).dispatcher.finish(items)
    if batch:
        told = [_told(item, refused) for item, refused in zip(items, answers, strict=True)]
        return answer(request, {"results": told})
    if answers[0] is not None:
        raise Problem(answers[0].status, answers[0].detail, field=answers[0].field)
    return answer(request, {"id": items[0].id, "attempt": items[0].attempt, "status": 200})


def _done(report: CompleteBody | FailBody, prefix: str) -> AttemptDone:
    if isinstance(report, CompleteBody):
        return AttemptDone(
            id=report.id,
            attempt=report.attempt,
            worker=report.worker,
            ok=True,
            result=_json_bytes(f"{prefix}result", report.result, MAX_RESULT_BYTES),
            error=None,
            exit_code=report.exit_code,
            retryable=True,
            started_ms=_ms(report.started_at),
            cause="exit",
        )
    return AttemptDone(
        id=report.id,
        attempt=report.attempt,
        worker=report.worker,
        ok=False,
        result=None,
        error=report.error,
        exit_code=report.exit_code,
        retryable=report.retryable,
        started_ms=_ms(report.started_at),
        cause=report.cause,
        gpu_memory_mb=report.gpu_memory_mb,
        checkpoint=_json_bytes(f"{prefix}checkpoint", report.checkpoint, MAX_CHECKPOINT_BYTES),
    )


def _told(item: AttemptDone, refused: Refused | None) -> dict[str, Any]:
    told: dict[str, Any] = {"id": item.id, "status": refused.status if refused else 200}
    if refused:
        told["detail"] = refused.detail
    return told
