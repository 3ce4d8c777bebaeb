"""What every handler needs: the node's parts, the shape of answers, and how fresh a read is."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
from aiohttp import web

from config.settings import Settings
from coordination.dispatcher import Dispatcher
from coordination.errors import InvalidInput, Refused
from coordination.events import EventBus
from coordination.operations import Operations
from p2p.api.bodies import is_msgpack, query_int, query_text
from p2p.api.errors import Problem
from p2p.cluster import Cluster
from p2p.driver import View
from p2p.leadership import Leadership
from p2p.peers import Peers

MIN_INDEX_SECONDS = 2.0
PAGE_SECONDS = 0.7  # how long a page for people waits for a majority to confirm that this node leads
MAX_KEY = 200


@dataclass(slots=True, kw_only=True)
class Context:
    """The parts of a running node that the API speaks to."""

    settings: Settings
    operations: Operations
    dispatcher: Dispatcher
    bus: EventBus
    node_status: Callable[[], dict[str, Any]]
    nodes: Callable[[], dict[str, Any]]
    metrics: Callable[[], bytes]
    attempt_folder: Callable[[str, int], Path]
    attempt_runs: Callable[[str, int], bool | None]  # on this node, now; None: not known yet
    shut_down: Callable[[], None]
    leadership: Leadership
    peers: Peers
    cluster: Cluster
    read_index: Callable[[], Awaitable[int]]
    view: Callable[[], View]
    applied_index: Callable[[], int]
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    def alone(self) -> bool:
        """Leads a cluster of one voter: there is nobody else to ask."""
        return self.dispatcher.leads and len(self.view().config.voters) == 1

    def has_copy(self) -> bool:
        """Whether the queue is replicated to this node."""
        return self.cluster.has_copy()

    def as_of(self, consistency: str = "linearizable") -> dict[str, Any]:
        """How fresh this node's answers are. A leader is never behind itself; a copy is as old as its last word from
        the leader."""
        view = self.view()
        age = 0.0 if self.dispatcher.leads else self.cluster.copy_age()
        return {
            "term": view.term,
            "index": self.applied_index(),
            "age_seconds": round(age, 3) if math.isfinite(age) else None,
            "consistency": consistency if self.dispatcher.leads else "stale",
        }

    async def read_point(self, request: web.Request, *, page: bool = False) -> dict[str, Any]:
        """Honours ``?consistency=`` and ``?min_index=``; answers `as_of`. Raises Problem 503 if the index is not
        reached in time."""
        consistency = query_text(request, "consistency", ("linearizable", "stale")) or "linearizable"
        wanted = query_int(request, "min_index", least=0, most=1 << 60)
        if wanted is not None:
            deadline = time.monotonic() + MIN_INDEX_SECONDS
            while self.applied_index() < wanted:
                if time.monotonic() > deadline:
                    raise Problem(503, f"this node has not applied entry {wanted} yet", field="min_index")
                await asyncio.sleep(0.02)
        elif consistency == "linearizable" and self.dispatcher.leads and not self.alone():
            try:
                async with asyncio.timeout(PAGE_SECONDS if page else None):
                    await self.read_index()
            except (Refused, TimeoutError):
                if not page:
                    raise
                consistency = "stale"  # a page for people is told from the copy here, and says so
        return self.as_of(consistency)


# Of the request that this task answers: the one that was made for it, if it came without one. Not an item of the
# request: newer versions of aiohttp warn of plain names there, older ones know no others.
MADE_KEY: ContextVar[str | None] = ContextVar("idempotency_key", default=None)
CONTEXT: web.AppKey[Context] = web.AppKey("context", Context)


def context(request: web.Request) -> Context:
    return request.app[CONTEXT]


def answer(
    request: web.Request,
    body: Any,
    *,
    status: int = 200,
    as_of: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
) -> web.Response:
    """JSON for people, msgpack for who sent msgpack; freshness always in headers too."""
    told = dict(headers or {})
    if as_of is not None:
        told["X-P2P-Term"] = str(as_of["term"])
        told["X-P2P-Index"] = str(as_of["index"])
        if as_of["age_seconds"] is not None:  # a node without a copy has no age to tell
            told["X-P2P-Age-Seconds"] = str(as_of["age_seconds"])
        told["X-P2P-Consistency"] = as_of["consistency"]
    if is_msgpack(request):
        packed = msgpack.packb(body, default=_as_float, unicode_errors="replace")
        return web.Response(body=packed, status=status, content_type="application/msgpack", headers=told)
    # ASCII on the wire: a lone surrogate in somebody's text must not become an encoding error.
    text = json.dumps(body, separators=(",", ":")) + "\n"  # a person's prompt begins on a line of its own
    return web.Response(body=text.encode("ascii"), status=status, content_type="application/json", headers=told)


def _as_float(value: Any) -> Any:
    """A result may hold whole numbers beyond the 64 bits that msgpack has; they lose digits there, not in JSON."""
    try:
        return float(value)
    except OverflowError:
        return str(value)


def idempotency_key(request: web.Request) -> str:
    """The caller's ``Idempotency-Key``, or a new one. Raises InvalidInput."""
    keys = request.headers.getall("Idempotency-Key", [])
    if not keys:
        return MADE_KEY.get() or secrets.token_hex(12)
    if len(keys) > 1:
        raise InvalidInput("Idempotency-Key", "was given more than once")
    key = keys[0]
    if not key or len(key) > MAX_KEY or not key.isprintable() or not key.isascii():
        raise InvalidInput("Idempotency-Key", f"must be 1 to {MAX_KEY} printable ASCII characters")
    return key
