"""Reading what a request carries: JSON from people, msgpack from programs, both with limits and named errors.

A batch of ten thousand jobs is parsed job by job with turns of the event loop in between: parsing it whole would hold
every other answer of the node for a tenth of a second.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, TypeVar

import msgpack
from aiohttp import web
from pydantic import BaseModel, ValidationError

from coordination.errors import InvalidInput
from coordination.validation import MAX_DEPTH, first_problem, nested_deeper
from p2p.api.errors import Problem

MAX_REQUEST_BYTES = 16 << 20
SMALL_BYTES = 64 << 10
SLICE = 50
JSON_TYPE = "application/json"
MSGPACK_TYPES = ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack")
_BATCH_HEAD = re.compile(r'\s*\{\s*"jobs"\s*:\s*\[\s*')
_COMMA = re.compile(r"\s*,\s*")
_CLOSE = re.compile(r"\s*\]\s*")
_END = re.compile(r"\s*\}\s*$")
_NUMBER = re.compile(r"[0-9]{1,20}(\.[0-9]{1,20})?(e\+?[0-9]{1,2})?")

Model = TypeVar("Model", bound=BaseModel)


def is_msgpack(request: web.Request) -> bool:
    return request.content_type in MSGPACK_TYPES


def check_content_type(request: web.Request) -> None:
    """Writes need JSON or msgpack: a form of another site's page cannot send either."""
    if request.content_type != JSON_TYPE and not is_msgpack(request):
        raise Problem(
            415,
            f"writes need Content-Type: {JSON_TYPE} (or msgpack); with curl add -H 'Content-Type: {JSON_TYPE}'",
            field="Content-Type",
        )


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _decode_text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Problem(400, f"is not UTF-8: {error.reason} at byte {error.start}", field="(body)") from None


def _bad_json(error: Exception) -> Problem:
    detail = "is nested too deeply" if isinstance(error, RecursionError) else f"is not JSON: {error}"
    return Problem(400, detail, field="(body)")


def decode(raw: bytes, *, packed: bool) -> Any:
    """The value of a whole body; an empty one is ``{}``. Raises Problem (400)."""
    if not raw.strip():
        return {}
    if packed:
        try:
            value = msgpack.unpackb(raw, strict_map_key=True, max_ext_len=0)
        except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
            raise Problem(400, f"is not msgpack: {type(error).__name__}", field="(body)") from None
    else:
        try:
            value = _DECODER.decode(_decode_text(raw).strip())
        except (ValueError, RecursionError) as error:
            raise _bad_json(error) from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raises Problem (400) for what is nested beyond MAX_DEPTH."""
    if nested_deeper(value, MAX_DEPTH):
        raise Problem(400, f"is nested more than {MAX_DEPTH} levels deep", field="(body)")


async def read_raw(request: web.Request) -> bytes:
    """The body's bytes. Raises Problem 413 or 400."""
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise Problem(413, f"a request is at most {MAX_REQUEST_BYTES} bytes", field="(body)") from None
    except (web.RequestPayloadError, web.PayloadAccessError, ValueError) as error:
        raise Problem(400, f"cannot be read: {' '.join(str(error).split())}", field="(body)") from None


async def read_value(request: web.Request) -> Any:
    """The body as a value; a large one is parsed off the event loop."""
    raw = await read_raw(request)
    if len(raw) <= SMALL_BYTES:
        return decode(raw, packed=is_msgpack(request))
    return await asyncio.to_thread(decode, raw, packed=is_msgpack(request))


async def read_object(request: web.Request) -> dict[str, Any]:
    value = await read_value(request)
    if not isinstance(value, dict):
        raise Problem(400, f"must be an object, not {_kind(value)}", field="(body)")
    return value


async def read_model(request: web.Request, model: type[Model]) -> Model:
    """The body as a model. Raises Problem 400 or InvalidInput naming the field."""
    return validate(model, await read_object(request))


def validate(model: type[Model], value: Mapping[str, Any]) -> Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise InvalidInput(*first_problem(error, model)) from None


async def digest_of(raw: bytes) -> str:
    """Names a request's body: the same idempotency key with another body is a mistake worth telling."""
    if len(raw) > SMALL_BYTES:
        return (await asyncio.to_thread(hashlib.sha256, raw)).hexdigest()[:32]
    return hashlib.sha256(raw).hexdigest()[:32]


def is_batch_text(text: str) -> bool:
    return _BATCH_HEAD.match(text) is not None


async def each_job(text: str) -> AsyncIterator[Any]:
    """The jobs of ``{"jobs": [ … ]}``, one by one. Raises Problem (400) where the text stops being that."""
    head = _BATCH_HEAD.match(text)
    assert head is not None
    at, n = head.end(), 0
    closed = _CLOSE.match(text, at)
    while closed is None:
        try:
            job, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _bad_json(error) from None
        check_depth(job)
        yield job
        n += 1
        if n % SLICE == 0:
            await asyncio.sleep(0)
        comma = _COMMA.match(text, at)
        if comma is not None:
            at = comma.end()
            continue
        closed = _CLOSE.match(text, at)
        if closed is None:
            raise Problem(400, f"is not JSON: expected ',' or ']' at character {at}", field="(body)")
    if n == 0:
        raise InvalidInput("jobs", "is empty")
    if not _END.match(text, closed.end()):
        raise Problem(400, 'a batch has the one field "jobs"', field="(body)")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def query_text(request: web.Request, name: str, allowed: tuple[str, ...] | None = None) -> str | None:
    """A query parameter given at most once. Raises InvalidInput naming it."""
    values = request.query.getall(name, [])
    if len(values) > 1:
        raise InvalidInput(name, "was given more than once")
    if not values:
        return None
    if allowed is not None and values[0] not in allowed:
        raise InvalidInput(name, f"must be one of {', '.join(allowed)}")
    return values[0]


def query_int(request: web.Request, name: str, *, least: int, most: int) -> int | None:
    """A whole number in range, or None if it is absent. Raises InvalidInput naming it."""
    text = query_text(request, name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and least <= int(text) <= most):
        raise InvalidInput(name, f"must be a whole number from {least} to {most}")
    return int(text)


def query_number(request: web.Request, name: str) -> float | None:
    """A finite number, or None if it is absent. Raises InvalidInput naming it."""
    text = query_text(request, name)
    if text is None:
        return None
    if not _NUMBER.fullmatch(text) or float(text) > 1e9:
        raise InvalidInput(name, "must be a number from 0 to 1e9")
    return float(text)


def check_query(request: web.Request, *names: str) -> None:
    """Refuses query parameters this page does not know."""
    for name in request.query:
        if name not in (*names, "consistency", "min_index"):
            known = ", ".join((*names, "consistency", "min_index"))
            raise InvalidInput(name, f"there is no such parameter; there is: {known}")
