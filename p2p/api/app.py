"""Puts the API together: one middleware for who may ask and how errors are told, then one file of routes per noun."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from p2p.api import admin, jobs, logs, node, peer, queue, schedules, worker
from p2p.api.bodies import MAX_REQUEST_BYTES, check_content_type
from p2p.api.context import CONTEXT, Context
from p2p.api.errors import Problem, problem_of
from p2p.api.forward import Forwarder
from p2p.api.security import SAFE_METHODS, Gate, host_names

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build(context: Context) -> web.Application:
    """The application of one node."""
    settings = context.settings
    token = settings.auth_token.get_secret_value() if settings.auth_token else None
    forwarder = Forwarder(context)
    gate = Gate(token, host_names(settings.advertise) | {settings.host})

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if request.version < (1, 0):
                raise Problem(400, "a request line ends with HTTP/1.1", field="(request)")
            await gate.check(request)
            if request.method not in SAFE_METHODS:
                check_content_type(request)
            return await forwarder.answer(request, handler)
        except ConnectionResetError:
            raise  # the asker has hung up: there is nobody to tell
        except Exception as error:
            return problem_of(error).response()

    app = web.Application(middlewares=[guard], client_max_size=MAX_REQUEST_BYTES)
    app[CONTEXT] = context
    node.prepare(app)

    async def stop(app: web.Application) -> None:
        context.stopping.set()
        context.dispatcher.wake_parked()

    app.on_shutdown.insert(0, stop)
    for part in (node, jobs, logs, worker, queue, schedules, admin, peer):
        app.add_routes(_told_our_way(route) for route in part.routes)
    return app


def _told_our_way(route: web.AbstractRouteDef) -> web.AbstractRouteDef:
    """The route, with what it answers to an ``Expect`` it cannot meet, which aiohttp asks about before the guard."""
    assert isinstance(route, web.RouteDef)
    return web.RouteDef(route.method, route.path, route.handler, {**route.kwargs, "expect_handler": _expected})


async def _expected(request: web.Request) -> web.StreamResponse | None:
    """``100-continue`` is met; nothing else is."""
    wanted = request.headers["Expect"]
    if wanted.lower() != "100-continue":
        return Problem(417, "the only expectation this node meets is 100-continue", field="Expect").response()
    if request.version >= (1, 1):
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # else an error of the real answer would be taken for its second half
    return None
