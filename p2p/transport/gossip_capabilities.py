"""What each member has (its big resource description), fetched when its record names a new version.

Records carry only a version (``meta["caps"]``): a description in every gossip message would be most of the traffic.
Decides when to ask and whom; what a description says is nobody's business here. An outbound-only member's is asked of
its anchors, who can reach it over the connection it keeps open.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgpack

from p2p.ids import NodeId
from p2p.membership.figures import MAX_MEMBERS
from p2p.membership.member import Member
from p2p.membership.rota import Draw
from p2p.transport.gossip_http import ExchangeFailed, Poster

log = logging.getLogger(__name__)

PATH = "/peer/capabilities"
META_KEY = "caps"
MAX_BYTES = 256 << 10  # of one description
FETCH_SECONDS = 5.0
GAP_SECONDS = 0.05  # between two fetches: at most 20 a second
JITTER_SECONDS = 0.5  # before the first of a burst: a change is heard by everybody at once
RETRY_SECONDS = 5.0
MAX_TRIES = 5

Find = Callable[[NodeId], Member | None]


class Capabilities:
    """`known` holds the newest description of each member, at most MAX_MEMBERS of them."""

    def __init__(self, poster: Poster, find: Find, draw: Draw) -> None:
        self.known: dict[NodeId, dict[str, Any]] = {}
        self.on_fetched: Callable[[NodeId, dict[str, Any]], None] = lambda _node, _capabilities: None
        self._poster = poster
        self._find = find
        self._draw = draw
        self._versions: dict[NodeId, object] = {}  # of what is known
        self._wanted: dict[NodeId, int] = {}  # and how often it was tried
        self._news = asyncio.Event()

    def noticed(self, member: Member) -> None:
        """A member's record changed."""
        version = member.meta.get(META_KEY)
        if not member.state.here:
            self.forget(member.node)
        elif version is not None and self._versions.get(member.node) != version and len(self._wanted) < MAX_MEMBERS:
            self._wanted[member.node] = 0
            self._news.set()

    def forget(self, node: NodeId) -> None:
        for table in (self.known, self._versions, self._wanted):
            table.pop(node, None)

    async def run(self) -> None:
        """Fetches what is wanted, one after the other, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._news.wait()
            self._news.clear()
            await asyncio.sleep(self._draw.random() * JITTER_SECONDS)
            for node in list(self._wanted):
                if not await self._try(node):
                    loop.call_later(RETRY_SECONDS, self._news.set)
                await asyncio.sleep(GAP_SECONDS)

    async def _try(self, node: NodeId) -> bool:
        """False: it is still wanted."""
        try:
            await self.fetch(node)
        except ExchangeFailed as error:
            tries = self._wanted.get(node, MAX_TRIES) + 1
            if tries < MAX_TRIES and self._find(node) is not None:
                self._wanted[node] = tries
                return False
            log.info("no capabilities of %s until it announces others: %s", node, error)
            self._wanted.pop(node, None)
        return True

    async def fetch(self, node: NodeId) -> dict[str, Any]:
        """Asks now; raises ExchangeFailed."""
        member = self._find(node)
        if member is None:
            raise ExchangeFailed(f"there is no member {node}")
        version = member.meta.get(META_KEY)
        description = await self._ask(member)
        self._wanted.pop(node, None)
        if len(self.known) < MAX_MEMBERS or node in self.known:
            self.known[node] = description
            self._versions[node] = version
        self.on_fetched(node, description)
        return description

    async def _ask(self, member: Member) -> dict[str, Any]:
        if member.address is not None:
            return _read(await self._poster.get(member.address, PATH, {}, FETCH_SECONDS))
        error = ExchangeFailed(f"{member.node} has no anchors to ask")
        for anchor in member.via:
            known = self._find(anchor)
            if known is None or known.address is None:
                continue
            try:
                return _read(await self._poster.get(known.address, PATH, {"node": member.node}, FETCH_SECONDS))
            except ExchangeFailed as failure:
                error = failure
        raise error


def _read(body: bytes) -> dict[str, Any]:
    if len(body) > MAX_BYTES:
        raise ExchangeFailed(f"a description of {len(body)} bytes; at most {MAX_BYTES} are kept")
    try:
        description = msgpack.unpackb(body)
    except Exception as error:  # msgpack raises many kinds, ValueError and its own among them
        raise ExchangeFailed(f"a description cannot be unpacked: {type(error).__name__}") from None
    if not isinstance(description, dict):
        raise ExchangeFailed("a description is a map")
    return description
