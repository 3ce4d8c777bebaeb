"""Passing a request on to the node that can answer it, and its answer back as it comes: logs that lie on another node.

A node that can be dialled is asked directly. One that cannot holds a tunnel to a few members, its anchors: one of them
is asked to pass the request on through it. Decides nothing about what is asked.
"""

from __future__ import annotations

import asyncio

import aiohttp
from aiohttp import web

from coordination.errors import Refused
from p2p.api.context import context
from p2p.api.errors import Problem
from p2p.ids import NodeId
from p2p.transport.streams import NoTunnel, TunnelError

DIRECT = "X-P2P-Direct"  # set by a node that has looked up where the answer is
BEGIN_SECONDS = 5.0
CONNECT_SECONDS = 1.0
_KEPT = ("Content-Type", "X-Content-Type-Options", "X-P2P-Attempt", "Retry-After")


async def relay(request: web.Request, node: str, path: str, *, hidden: bool = False) -> web.StreamResponse:
    """Asks `node` for `path` (with its query) and streams what it answers. `hidden`: through the tunnel it holds to
    this node, and no other way. Raises Problem (502, 503) or Refused (404)."""
    here = context(request)
    target = f"{path}?{request.query_string}" if hidden and request.query_string else path
    address, anchors = here.cluster.way_to(NodeId(node))
    if hidden or (address is None and here.settings.node_id in here.cluster.anchors_of(node)):
        return await _through_tunnel(request, node, target)
    ways = [address] if address is not None else [*anchors]
    prefix = "" if address is not None else f"/peer/tunnel/{node}"
    why = "it is not known how to reach it"
    for way in ways:
        try:
            return await _over_http(request, f"http://{way}{prefix}{target}")
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            why = str(error) or type(error).__name__
    raise Problem(503, f"node {node[:80]} cannot be asked now: {why}", field="node")


async def _over_http(request: web.Request, url: str) -> web.StreamResponse:
    async with asyncio.timeout(BEGIN_SECONDS):
        answer = await context(request).peers.session.request(
            request.method,
            url,
            headers={DIRECT: "1"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
        )
    async with answer:
        response = _begin(answer.status, dict(answer.headers))
        await response.prepare(request)
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
    return response


async def _through_tunnel(request: web.Request, node: str, target: str) -> web.StreamResponse:
    tunnel = context(request).cluster.tunnel
    try:
        opened = await tunnel.open(NodeId(node), request.method, target, headers=[(DIRECT, "1")], timeout=BEGIN_SECONDS)
    except NoTunnel:
        raise Refused(503, f"node {node[:80]} holds no tunnel to this one now") from None
    except TunnelError as error:
        raise Refused(503, f"node {node[:80]} cannot be asked now: {error}") from None
    async with opened as answer:
        response = _begin(answer.status, dict(answer.headers))
        await response.prepare(request)
        async for chunk in answer.chunks:
            await response.write(chunk)
        await response.write_eof()
    return response


def _begin(status: int, headers: dict[str, str]) -> web.StreamResponse:
    low = {name.lower(): value for name, value in headers.items()}
    return web.StreamResponse(status=status, headers={n: low[n.lower()] for n in _KEPT if n.lower() in low})
