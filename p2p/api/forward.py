"""Any peer answers: what only the leader can do travels to it, with the caller's deadline and an idempotency key.

Decides where a request is answered. Writes and linearizable reads of the queue go to the leader; a read that says
``?consistency=stale`` (or ``?min_index=N`` on a node that holds a copy) is answered here; pages for people ask the
leader and, if there is none, answer from the copy here and say so. At most two hops: a node that is asked by a peer and
does not lead passes the request on once, to the leader it knows, and no further.

During an election a request is tried again until its deadline, but only if it was definitely not done, or if it
carries a key by which the queue recognises it: a submit is never doubled (PROTOCOL §2.26).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable

import aiohttp
from aiohttp import web
from tenacity import AsyncRetrying, retry_if_exception_type, stop_before_delay, wait_random_exponential

from coordination.errors import OutcomeUnknown, Refused
from p2p.api.bodies import read_raw
from p2p.api.context import MADE_KEY, Context
from p2p.api.errors import Problem
from p2p.leadership import Leader

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HOPS, DEADLINE, FORWARDED_BY = "X-P2P-Hops", "X-P2P-Deadline-Ms", "X-P2P-Forwarded-By"
NOT_LEADER = "X-P2P-Not-Leader"
MAX_HOPS = 2
WRITE_SECONDS, READ_SECONDS, PAGE_SECONDS = 10.0, 2.0, 1.0
LONGEST_SECONDS = 600.0
CONNECT_SECONDS = 1.0
MAX_ASKED = 3

LEADER, PAGE, LOCAL = "leader", "page", "local"
_LOCAL_PREFIXES = (
    "/peer/",
    "/admin/shutdown",
    "/admin/election",
    "/daemons",
    "/nodes",
    "/events",
    "/metrics",
    "/health",
    "/ready",
    "/status",
)
_PAGES = frozenset({"/work_queue_status", "/work_assignment_status"})
_KEYED = ("/jobs",)  # writes that the queue recognises by their key
# Headers of one connection, not of the request.
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "content-length", "expect",
     "proxy-authorization", "authorization", "origin", "sec-fetch-site", "accept-encoding"}
)  # fmt: skip

_NOT_PASSED_BACK = _HOP_BY_HOP | {"content-encoding", "date", "server"}


class NotNow(Exception):
    """Definitely not done, for a reason that passes: nobody leads, or the leader has just gone."""


def where(request: web.Request) -> str:
    """LEADER, PAGE or LOCAL."""
    path = request.path
    if path == "/" or path.startswith(_LOCAL_PREFIXES) or path.endswith("/logs"):
        return LOCAL
    if path in _PAGES:
        return PAGE
    return LEADER


def seconds_left(request: web.Request) -> float:
    """Until the caller's deadline, or until this kind of request is usually given up. Raises Problem (400)."""
    usual = WRITE_SECONDS if request.method not in ("GET", "HEAD") else READ_SECONDS
    told = request.headers.get(DEADLINE)
    if told is None:
        return usual
    if not (told.isascii() and told.isdigit() and len(told) <= 9):
        raise Problem(400, "must be the milliseconds that are left to answer", field=DEADLINE)
    return min(int(told) / 1000, LONGEST_SECONDS)


class Forwarder:
    """Wraps every handler of a node's API. Belongs to the event loop."""

    def __init__(self, here: Context) -> None:
        self._here = here

    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The handler's answer or the leader's. Raises what the handler raises, and Problem."""
        kind = where(request)
        if kind == LOCAL:
            return await handler(request)
        here = self._here
        stale = request.query.get("consistency") == "stale" or "min_index" in request.query
        hops = self._hops(request)
        if request.method in ("GET", "HEAD") and stale:
            return await handler(request) if here.has_copy() else await self._page(request, handler, hops)
        if kind == PAGE:
            return await self._page(request, handler, hops)
        deadline = time.monotonic() + seconds_left(request)
        key = request.headers.get("Idempotency-Key")
        if key is None and request.method == "POST" and request.path.startswith(_KEYED):
            key = secrets.token_hex(12)
            request[MADE_KEY] = key
        body = await read_raw(request) if request.method not in ("GET", "HEAD") and not here.alone() else b""
        return await self._until_answered(request, handler, body, key, hops, deadline)

    async def _until_answered(
        self, request: web.Request, handler: Handler, body: bytes, key: str | None, hops: int, deadline: float
    ) -> web.StreamResponse:
        """Here if this node leads, else at the leader; again and again while nothing was done and there is time."""
        if self._here.alone():
            return await handler(request)
        left = max(deadline - time.monotonic(), 0.05)
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(NotNow),
                wait=wait_random_exponential(multiplier=0.02, max=0.25),
                stop=stop_before_delay(left),
                reraise=True,
            ):
                with attempt:
                    return await self._once(request, handler, body, key, hops, deadline)
        except NotNow as error:
            extra = {"idempotency_key": key} if key else {}
            raise Problem(503, f"{error}; nothing was done", headers={NOT_LEADER: "1"}, **extra) from None
        raise AssertionError("tenacity answers or raises")

    async def _once(
        self, request: web.Request, handler: Handler, body: bytes, key: str | None, hops: int, deadline: float
    ) -> web.StreamResponse:
        here = self._here
        if here.dispatcher.leads:
            try:
                return await handler(request)
            except Refused as error:
                if error.status == 503 and not here.dispatcher.leads:
                    raise NotNow("the leader has changed") from None
                raise
            except (OutcomeUnknown, Problem) as error:
                status = error.status if isinstance(error, Problem) else 504
                if here.dispatcher.leads or status not in (503, 504) or (status == 504 and key is None):
                    raise
                raise NotNow("the leader has changed") from None
        leader = here.leadership.leader
        if leader.node is None or leader.node == here.settings.node_id:
            await here.leadership.change(max(min(deadline - time.monotonic(), 0.25), 0.0))
            raise NotNow("there is no leader now")
        if hops >= MAX_HOPS:
            raise Problem(
                503, "this node was asked as the leader, and does not lead; nothing was done", headers={NOT_LEADER: "1"}
            )
        return await self._pass_on(request, leader, body, key, hops, deadline)

    async def _pass_on(
        self, request: web.Request, leader: Leader, body: bytes, key: str | None, hops: int, deadline: float
    ) -> web.StreamResponse:
        """The leader's whole answer. Raises NotNow if it was certainly not done, Problem 504 if nobody knows."""
        left = deadline - time.monotonic()
        if leader.address is None or left <= 0:
            raise NotNow(f"the leader {leader.node} cannot be reached")
        headers = {n: v for n, v in request.headers.items() if n.lower() not in _HOP_BY_HOP}
        headers |= {HOPS: str(hops + 1), DEADLINE: str(int(left * 1000)), FORWARDED_BY: self._here.settings.node_id}
        if key is not None:
            headers["Idempotency-Key"] = key
        try:
            async with asyncio.timeout(left + 1.0):
                answer = await self._here.peers.session.request(
                    request.method,
                    f"http://{leader.address}{request.raw_path}",
                    data=body if body or request.method == "POST" else None,
                    headers=headers,
                    skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                )
                async with answer:
                    told = await answer.read()
        except aiohttp.ClientConnectorError as error:
            raise NotNow(f"the leader {leader.node} cannot be reached: {error.os_error or error}") from None
        except (TimeoutError, aiohttp.ClientError, OSError):
            if (key is not None or request.method in ("GET", "HEAD")) and deadline - time.monotonic() > 0:
                raise NotNow(f"the leader {leader.node} went away") from None
            raise Problem(
                504, f"the leader {leader.node} gave no answer: it may have been done", idempotency_key=key
            ) from None
        if answer.status == 503 and (answer.headers.get(NOT_LEADER) or key is not None):
            raise NotNow(f"{leader.node} does not lead any more, or is stopping")
        if answer.status == 504 and key is not None and deadline - time.monotonic() > 0.1:
            raise NotNow(f"the leader {leader.node} was deposed")
        kept = {n: v for n, v in answer.headers.items() if n.lower() not in _NOT_PASSED_BACK}
        return web.Response(body=told, status=answer.status, headers=kept)

    async def _page(self, request: web.Request, handler: Handler, hops: int) -> web.StreamResponse:
        """A page for people: the leader's if it answers soon, else from the copy here; it never goes dark."""
        here = self._here
        if here.dispatcher.leads or here.alone() or hops:
            return await handler(request)
        leader = here.leadership.leader
        ways = [leader] if leader.node not in (None, here.settings.node_id) else []
        if not here.has_copy():  # a node that does not vote shows what one that does has
            ways += [Leader(leader.term, node, address) for node, address in here.cluster.copies()[:MAX_ASKED]]
        for way in ways:
            try:
                page = await self._pass_on(request, way, b"", None, hops, time.monotonic() + PAGE_SECONDS)
            except (NotNow, Problem):
                continue
            if page.status != 503:
                return page
        if not here.has_copy():
            raise Problem(503, "this node has no copy of the queue, and no node that has one can be reached")
        return await handler(request)

    @staticmethod
    def _hops(request: web.Request) -> int:
        told = request.headers.get(HOPS, "0")
        if not (told.isascii() and told.isdigit() and len(told) <= 2):
            raise Problem(400, "must be a small number", field=HOPS)
        return int(told)
