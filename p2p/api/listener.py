"""Listening: aiohttp's server, with the errors it finds by itself told as all others are.

What never becomes a request (a bad request line, a chunk without a length) does not reach `app.guard`. aiohttp answers
it in plain text and logs a traceback for each, so that anybody who can connect can fill the log.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from p2p.api.errors import Problem

log = logging.getLogger(__name__)

BACKLOG = 1024
KEEPALIVE_SECONDS = 75.0
SHUTDOWN_SECONDS = 1.0
MAX_SAID = 200


async def listen(app: web.Application, listener: socket.socket) -> Callable[[], Awaitable[None]]:
    """Serves `app` on a listening socket; the answer stops it."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
    await runner.setup()
    served = runner.server
    assert served is not None
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(served, loop=loop), sock=listener, backlog=BACKLOG)

    async def stop() -> None:
        server.close()
        await runner.cleanup()

    return stop


REFUSALS_TOLD_SECONDS = 10.0
_refusals = {"told_at": float("-inf"), "untold": 0.0}


def _tell_refusal(what: str) -> None:
    """One line in ten seconds: whoever can connect must not be able to fill a log that nobody rotates."""
    now = time.monotonic()
    if now - _refusals["told_at"] < REFUSALS_TOLD_SECONDS:
        _refusals["untold"] += 1
        return
    more = f" (and {_refusals['untold']:.0f} more before it)" if _refusals["untold"] else ""
    _refusals.update(told_at=now, untold=0.0)
    log.info("%s%s", what, more)


class _Connection(web.RequestHandler):
    """One connection."""

    def __init__(self, served: web.Server, *, loop: asyncio.AbstractEventLoop) -> None:
        # None is how aiohttp spells "no access log"; its annotation has no such case.
        no_log: Any = None
        super().__init__(served, loop=loop, access_log=no_log, keepalive_timeout=KEEPALIVE_SECONDS)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is not HTTP is the asker's fault and one line in the log; anything else is ours, with its traceback."""
        if isinstance(exc, ConnectionError) or request.writer.output_size > 0:
            raise ConnectionError("the connection is gone, or its answer has begun")
        if 400 <= status < 500:
            said = " ".join((message or "this is not HTTP").split())[:MAX_SAID]
            _tell_refusal(f"refused a request from {request.remote}: {said!a}")
            problem = Problem(status, said, field="(request)")
        else:
            log.error("unexpected error while answering a request", exc_info=exc)
            problem = Problem(503, "the node could not answer; its log has the cause")
        response = problem.response()
        response.force_close()
        return response

    def log_exception(self, *said: Any, **more: Any) -> None:
        """A body that breaks off or does not decode has been answered; aiohttp meets it again as it skips the rest."""
        if not isinstance(more.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*said, **more)
