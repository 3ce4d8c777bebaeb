"""Every error as ``application/problem+json`` (RFC 9457), made in one place.

No request, however malformed, gets a 500 or a traceback: what is not an error of ours is logged with its traceback and
answered as 503 "nothing is known to have been done", because that is the truth the caller can act on.
"""

from __future__ import annotations

import http
import json
import logging
from typing import Any

from aiohttp import web

from coordination.errors import CoordinationError, InvalidInput, OutcomeUnknown, Refused
from p2p.driver import Overloaded, Stopped

log = logging.getLogger(__name__)

CONTENT_TYPE = "application/problem+json"
MAX_DETAIL = 2_000


class Problem(Exception):
    """An answer that is an error. `field` names what is wrong in the request."""

    def __init__(
        self, status: int, detail: str, *, field: str | None = None, headers: dict[str, str] | None = None, **extra: Any
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.field = status, detail, field
        self.headers, self.extra = headers or {}, extra

    def response(self) -> web.Response:
        """``{"type", "title", "status", "detail", "field"}``."""
        title = http.HTTPStatus(self.status).phrase
        body = {
            "type": f"urn:p2p:problem:{title.lower().replace(' ', '-')}",
            "title": title,
            "status": self.status,
            "detail": self.detail[:MAX_DETAIL],
            "field": self.field[:200] if self.field else self.field,
            **self.extra,
        }
        headers = dict(self.headers)
        if self.status in (429, 503):
            headers.setdefault("Retry-After", "1")
        return web.Response(
            body=json.dumps(body).encode("ascii"), status=self.status, content_type=CONTENT_TYPE, headers=headers
        )


def problem_of(error: Exception, key: str | None = None) -> Problem:
    """The problem an exception of the layers below is told as."""
    extra: dict[str, Any] = {"idempotency_key": key} if key else {}
    match error:
        case Problem():
            return error
        case InvalidInput(field=field, detail=detail):
            return Problem(422, detail, field=field or "(body)", **extra)
        case Refused(status=status, detail=detail, field=field):
            return Problem(status, detail, field=field or None, **extra)
        case OutcomeUnknown():
            return Problem(504, str(error), **extra)
        case Overloaded():
            return Problem(429, str(error), **extra)
        case Stopped():
            return Problem(503, str(error), **extra)
        case CoordinationError():
            return Problem(422, str(error), **extra)
        case web.HTTPException():
            return _of_http(error)
    log.exception("unexpected error while answering a request")
    return Problem(503, "the node could not answer; its log has the cause", **extra)


def _of_http(error: web.HTTPException) -> Problem:
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    sentences = {
        404: "there is no such page; GET / lists what there is",
        405: f"this method is not allowed here; allowed: {headers.get('Allow', '')}",
        413: "the request is larger than 16 MiB",
    }
    return Problem(error.status, sentences.get(error.status, error.reason), headers=headers)
