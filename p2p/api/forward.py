"""Any peer answers: what only the leader can do travels to it, with the caller's deadline and an idempotency key.

Decides where a request is answered. Writes and linearizable reads of the queue go to the leader; a read that says
``?consistency=stale`` (or ``?min_index=N`` on a node that holds a copy) is answered here; pages for people ask the
leader and, if there is none, answer from the copy here and say so. At most two hops: a node that is asked by a peer and
does not lead passes the request on once, to the leader it knows, and no further.

During an election a request is tried again until its deadline, but only if it was definitely not done, or if it
carries a key by which the queue recognises it: a submit is never doubled (PROTOCOL §2.26). Once an attempt may have
been done, nothing but the queue's own word ends in anything but 504.
"""

from __future__ import annotations

import asyncio
import io
import secrets
import string
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy
from tenacity import AsyncRetrying, retry_if_exception_type, stop_before_delay, wait_random_exponential
from yarl import URL

from coordination.errors import CoordinationError
from p2p.api.bodies import read_raw
from p2p.api.context import MADE_KEY, Context
from p2p.api.errors import Problem, problem_of
from p2p.driver import Overloaded, Stopped
from p2p.leadership import AskerGone, Deposed, Leader
from p2p.transport.headers import HOP_BY_HOP, without

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HOPS, DEADLINE, FORWARDED_BY = "X-P2P-Hops", "X-P2P-Deadline-Ms", "X-P2P-Forwarded-By"
NOT_LEADER = "X-P2P-Not-Leader"
MAX_HOPS = 2
WRITE_SECONDS, READ_SECONDS, PAGE_SECONDS = 10.0, 2.0, 0.8
LONGEST_SECONDS = 600.0
# What the answer itself may take beyond that: a claim is held open, a new voter catches up.
LONG_ANSWERS = {"/worker/claim": 60.0, "/admin/voters/add": 70.0, "/admin/voters/remove": 70.0}
LATE_SECONDS = 1.0  # how much later than the deadline the leader's own word on a write may come
LOOK_SECONDS = 0.25
CONNECT_SECONDS = 1.0
MAX_ASKED = 3

LEADER, PAGE, LOCAL = "leader", "page", "local"
_LOCAL_PREFIXES = (
    "/peer/",
    "/admin/shutdown",
    "/admin/election",
    "/daemons",
    "/events",
    "/metrics",
    "/health",
    "/ready",
    "/status",
)
_PAGES = frozenset({"/work_queue_status", "/work_assignment_status", "/nodes"})
# Headers of one connection, not of the request; what this node alone may say; and what its own check of who asks has
# used up: the leader is asked by this node, with the cluster's token.
_NOT_PASSED_ON = HOP_BY_HOP | {
    "host", "content-length", "expect", "authorization", "origin", "sec-fetch-site", "accept-encoding",
    "content-encoding",
}  # fmt: skip
_OURS = "x-p2p-"
_NOT_PASSED_BACK = _NOT_PASSED_ON | {"date", "server"}
_READING = ("GET", "HEAD")
_NO_WORD = (429, 503, 507)  # true of this attempt, and no word on the one before it


class NotNow(Exception):
    """Not answered, for a reason that passes: nobody leads, or the leader has just gone. Definitely not done, unless
    `Asked.unknown` says otherwise."""


@dataclass(slots=True, kw_only=True)
class Asked:
    """A request on its way. `key`: the queue recognises it by that, so that it may be asked twice; `unknown`: an
    attempt may have been done."""

    hops: int
    deadline: float
    key: str | None = None
    body: bytes = b""
    longer: float = 0.0
    unknown: bool = False

    def left(self) -> float:
        return self.deadline - time.monotonic()


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
        if request.method in _READING and stale:
            return await handler(request) if here.has_copy() else await self._page(request, handler, hops)
        if kind == PAGE:
            return await self._page(request, handler, hops)
        asked = Asked(
            hops=hops,
            deadline=time.monotonic() + seconds_left(request),
            longer=LONG_ANSWERS.get(request.path, 0.0),
        )
        if request.method == "POST" and _is_keyed(request.path):
            given = request.headers.get("Idempotency-Key")
            asked.key = given if given is not None else secrets.token_hex(12)
            MADE_KEY.set(asked.key)
        if request.method not in _READING and not here.alone():
            asked.body = await read_raw(request)
        return await self._until_answered(request, handler, asked)

    async def _until_answered(self, request: web.Request, handler: Handler, asked: Asked) -> web.StreamResponse:
        """Here if this node leads, else at the leader; again and again while that is safe and there is time."""
        if self._here.alone():
            return await handler(request)
        told: dict[str, Any] = {"idempotency_key": asked.key} if asked.key else {}
        pause: Callable[[float], Awaitable[Any]] = self._here.leadership.change  # over as soon as somebody else leads
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(NotNow),
                wait=wait_random_exponential(multiplier=0.02, max=0.25),
                stop=stop_before_delay(max(asked.left(), 0.05)),
                sleep=pause,
                reraise=True,
            ):
                with attempt:
                    response = await self._once(request, handler, asked)
        except NotNow as error:
            if asked.unknown:
                raise Problem(504, f"{error}; it may have been done", **told) from None
            raise Problem(503, f"{error}; nothing was done", headers={NOT_LEADER: "1"}, **told) from None
        if asked.unknown and response.status in _NO_WORD:
            raise Problem(504, "an earlier attempt gave no answer: it may have been done", **told)
        return response

    async def _once(self, request: web.Request, handler: Handler, asked: Asked) -> web.StreamResponse:
        here, me = self._here, self._here.settings.node_id
        if not here.dispatcher.leads and here.leadership.leader.node in (None, me):
            await here.leadership.change(max(min(asked.left(), LOOK_SECONDS), 0.0))
        if here.dispatcher.leads:
            return await self._at_this_desk(request, handler, asked)
        leader = here.leadership.leader
        if leader.node is None or leader.node == me:
            raise NotNow("there is no leader now")
        if asked.hops >= MAX_HOPS:
            raise Problem(
                503, "this node was asked as the leader, and does not lead; nothing was done", headers={NOT_LEADER: "1"}
            )
        return await self._pass_on(request, leader, asked)

    async def _at_this_desk(self, request: web.Request, handler: Handler, asked: Asked) -> web.StreamResponse:
        """This node leads; if that ends meanwhile, the request may be the next leader's."""
        try:
            return await handler(request)
        except (CoordinationError, Problem, Overloaded, Stopped) as error:
            problem = problem_of(error, asked.key)
            if self._here.dispatcher.leads or problem.status not in (503, 504):
                if asked.unknown and problem.status in _NO_WORD:
                    raise Problem(
                        504, f"{problem.detail}; an earlier attempt may have been done", **problem.extra
                    ) from error
                raise problem from error
            if problem.status == 504 and asked.key is None:
                raise problem from error
            asked.unknown = asked.unknown or problem.status == 504
            raise NotNow("the leader has changed") from None

    async def _pass_on(self, request: web.Request, leader: Leader, asked: Asked) -> web.StreamResponse:
        """The leader's whole answer. Raises NotNow if it may be asked again, Problem 504 if nobody knows."""
        reading = request.method in _READING
        left = asked.left()
        if leader.address is None or left <= 0:
            raise NotNow(f"the leader {leader.node} cannot be reached")
        headers = _passed_on(request.headers)
        headers.update(
            {HOPS: str(asked.hops + 1), DEADLINE: str(int(left * 1000)), FORWARDED_BY: self._here.settings.node_id}
        )
        if asked.key is not None:
            headers.setdefault("Idempotency-Key", asked.key)

        def gone() -> bool:
            return asked.longer > 0 and (request.transport is None or request.transport.is_closing())

        async def exchange() -> tuple[aiohttp.ClientResponse, bytes]:
            async with self._here.peers.session.request(
                request.method,
                URL(f"http://{leader.address}{_target(request)}", encoded=True),
                data=io.BytesIO(asked.body) if asked.body or request.method == "POST" else None,
                headers=headers,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            ) as answer:
                return answer, await answer.read()

        try:
            async with asyncio.timeout(left + asked.longer + (0.0 if reading else LATE_SECONDS)):
                # Whom an order about the leadership deposes answers it all the same, and what must not be asked twice
                # may still be answered by whoever was deposed: not done, it may say.
                admin, again = request.path.startswith("/admin/"), reading or asked.key is not None
                last_word = left if admin else 0.0 if again else LATE_SECONDS
                led = self._here.leadership
                answer, told = await led.unless_deposed(exchange(), gone=gone, last_word=last_word)
        except AskerGone:
            raise ConnectionResetError("whoever asked has hung up") from None
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL, ValueError) as error:
            cause = getattr(error, "os_error", None) or error
            raise NotNow(f"the leader {leader.node} cannot be reached: {cause}") from None
        except (Deposed, TimeoutError, aiohttp.ClientError, OSError):
            if not reading and asked.key is None:
                raise Problem(504, f"the leader {leader.node} gave no answer: it may have been done") from None
            asked.unknown = asked.unknown or not reading
            raise NotNow(f"the leader {leader.node} gave no answer") from None
        if answer.status == 503 and (answer.headers.get(NOT_LEADER) or asked.key is not None):
            raise NotNow(f"{leader.node} does not lead any more, or is stopping")
        if answer.status == 504 and asked.key is not None:
            asked.unknown = True
            raise NotNow(f"the leader {leader.node} was deposed")
        kept = _passed_back(answer.headers, head=request.method == "HEAD")
        return web.Response(body=told, status=answer.status, headers=kept)

    async def _page(self, request: web.Request, handler: Handler, hops: int) -> web.StreamResponse:
        """A page for people: the leader's if it answers soon, else from the copy here; it never goes dark."""
        here = self._here
        if here.dispatcher.leads or here.alone() or hops:
            return await handler(request)
        leader = here.leadership.leader
        ways = [leader] if leader.node not in (None, here.settings.node_id) else []
        page = await self._soonest(request, ways, hops)
        if page is None and not here.has_copy():  # a node that does not vote shows what one that does has
            copies = [way for way in here.cluster.copies() if way[0] != leader.node][:MAX_ASKED]
            page = await self._soonest(request, [Leader(leader.term, *way) for way in copies], hops)
            if page is None and request.path != "/nodes":  # of those every member knows something
                raise Problem(503, "this node has no copy of the queue, and no node that has one can be reached")
        return page if page is not None else await handler(request)

    async def _soonest(self, request: web.Request, ways: Sequence[Leader], hops: int) -> web.StreamResponse | None:
        """The first page of those asked for at once; None if none came in time."""
        deadline = time.monotonic() + PAGE_SECONDS
        asking = [
            asyncio.ensure_future(self._pass_on(request, way, Asked(hops=hops, deadline=deadline))) for way in ways
        ]
        try:
            for answered in asyncio.as_completed(asking):
                try:
                    page = await answered
                except (NotNow, Problem):
                    continue
                if page.status < 500:
                    return page
            return None
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    @staticmethod
    def _hops(request: web.Request) -> int:
        told = request.headers.get(HOPS, "0")
        if not (told.isascii() and told.isdigit() and len(told) <= 2):
            raise Problem(400, "must be a small number", field=HOPS)
        return int(told)


def _is_keyed(path: str) -> bool:
    """Whether the queue recognises this write by its key. A key on any other is somebody's mistake: asked twice, such
    a write is done twice."""
    return path == "/jobs" or path.startswith("/jobs/")


def _target(request: web.Request) -> str:
    """The path and query as they came. A request line may also name a whole URL, or what looks like the end of one:
    only what begins with a slash can be put behind an address. Raises Problem (400)."""
    raw = request.rel_url.raw_path_qs
    if not raw.startswith("/"):
        raise Problem(400, "the target of a request begins with a slash", field="(request)")
    return quote(raw.encode("utf-8", "surrogateescape"), safe=string.punctuation)


def _passed_on(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    kept = without(headers.items(), _NOT_PASSED_ON)
    return CIMultiDict([(name, value) for name, value in kept if not name.lower().startswith(_OURS)])


def _passed_back(headers: CIMultiDictProxy[str], *, head: bool) -> CIMultiDict[str]:
    return CIMultiDict(without(headers.items(), _NOT_PASSED_BACK - ({"content-length"} if head else set())))
