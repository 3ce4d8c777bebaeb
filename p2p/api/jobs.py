"""``/jobs``: submit, look, cancel, release, retry."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from pydantic import Field

from coordination.errors import InvalidInput, Refused
from coordination.job import MAX_BATCH_JOBS, Closed, JobState, Text
from coordination.queue_reads import MAX_PAGE
from p2p.api.bodies import (
    SMALL_BYTES,
    check_depth,
    check_query,
    decode,
    digest_of,
    each_job,
    is_batch_text,
    is_msgpack,
    query_int,
    query_text,
    read_model,
    read_raw,
)
from p2p.api.context import answer, context, idempotency_key
from p2p.api.errors import Problem, problem_of

routes = web.RouteTableDef()


class Reason(Closed):
    reason: Text = Field("operator", min_length=1, max_length=500)


@routes.post("/jobs")
async def submit(request: web.Request) -> web.Response:
    """One job or ``{"jobs": […]}``; 201 with the id or ids, 200 if all of them were there already."""
    check_query(request)
    operations = context(request).operations
    raw = await read_raw(request)
    key = idempotency_key(request)
    headers = {"Idempotency-Key": key}
    digest = await digest_of(raw)
    batch, body = _split(raw, packed=is_msgpack(request))
    try:
        told = await operations.submit(body, key=key, digest=digest, batch=batch)
    except Exception as error:
        if isinstance(error, Refused) and batch and error.field.startswith("depends_on"):
            error.field = f"jobs[0].{error.field}"  # the queue does not know a batch of one from a single job
        raise problem_of(error, key) from error
    created = any(told["created"]) if batch else told["created"]
    where = {} if batch else {"Location": f"/jobs/{told['id']}"}
    return answer(
        request,
        told,
        status=201 if created else 200,
        as_of=context(request).as_of(),
        headers={**headers, **where},
    )


def _split(raw: bytes, *, packed: bool) -> tuple[bool, Any]:
    """(is it a batch, the job or the jobs). A large JSON batch becomes a stream of jobs."""
    if not packed and len(raw) > SMALL_BYTES:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Problem(400, f"is not UTF-8: {error.reason} at byte {error.start}", field="(body)") from None
        if is_batch_text(text):
            return True, each_job(text)
    body = decode(raw, packed=packed)
    if isinstance(body, list):
        raise Problem(400, 'must be an object; a batch is {"jobs": […]}', field="(body)")
    if not isinstance(body, dict):
        raise Problem(400, "must be an object: a job", field="(body)")
    if "jobs" not in body:
        return False, body
    if set(body) != {"jobs"}:
        other = next(name for name in body if name != "jobs")
        raise InvalidInput(str(other), 'a batch has the one field "jobs"')
    jobs = body["jobs"]
    if not isinstance(jobs, list):
        raise InvalidInput("jobs", "must be a list of jobs")
    if not jobs:
        raise InvalidInput("jobs", "is empty")
    if len(jobs) > MAX_BATCH_JOBS:
        raise InvalidInput("jobs", f"at most {MAX_BATCH_JOBS} jobs a batch; these are {len(jobs)}")
    check_depth(jobs)
    return True, jobs


@routes.get("/jobs")
async def listing(request: web.Request) -> web.Response:
    """A page of jobs, newest first: ``{"jobs", "cursor", "as_of"}``."""
    check_query(request, "state", "kind", "group", "worker", "array", "limit", "cursor")
    as_of = await context(request).read_point(request)
    columns = {"state": "state", "kind": "kind", "group": "grp", "worker": "worker"}
    filters = {column: value for name, column in columns.items() if (value := query_text(request, name)) is not None}
    if "state" in filters and filters["state"] not in list(JobState):
        raise InvalidInput("state", f"must be one of {', '.join(JobState)}")
    if "kind" in filters:
        filters["kind"] = context(request).dispatcher.kinds.canonical(filters["kind"])
    limit = query_int(request, "limit", least=1, most=MAX_PAGE) or 100
    before = query_int(request, "cursor", least=0, most=1 << 60)
    array = query_text(request, "array")
    page = await context(request).operations.jobs(filters=filters, limit=limit, before=before, array=array)
    return answer(request, {**page, "as_of": as_of}, as_of=as_of)


@routes.get("/jobs/{id}")
async def record(request: web.Request) -> web.Response:
    """One job: its record, history, and why it is pending."""
    check_query(request)
    as_of = await context(request).read_point(request)
    job = await context(request).operations.job(request.match_info["id"])
    return answer(request, {**job, "as_of": as_of}, as_of=as_of)


@routes.post("/jobs/{id}/{verb:cancel|release|retry}")
async def change(request: web.Request) -> web.Response:
    """200 with the job; 404 unknown; 409 not in a state that allows it."""
    check_query(request)
    operations = context(request).operations
    job_id, verb = request.match_info["id"], request.match_info["verb"]
    body = await read_model(request, Reason)
    key = idempotency_key(request)
    try:
        match verb:
            case "cancel":
                job = await operations.cancel(job_id, body.reason, key=key)
            case "release":
                job = await operations.release(job_id, body.reason, key=key)
            case _:
                job = await operations.retry(job_id, key=key)
    except Refused as error:
        raise problem_of(error, key) from error
    return answer(request, job, as_of=context(request).as_of(), headers={"Idempotency-Key": key})
