"""Passing a request on to the node that can answer it, and its answer back as it comes: logs that lie on another node.

A node that can be dialled is asked directly. One that cannot holds a tunnel to a few members, its anchors: one of them
is asked to pass the request on through it. Decides nothing about what is asked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

from p2p.api.context import Context, context
from p2p.api.errors import Problem
from p2p.ids import NodeId
from p2p.transport.streams import NoTunnel, TunnelError

DIRECT = "X-P2P-Direct"  # set by a node that has looked up where the answer is
LIVE = "live"  # the value of it, if what is asked about is not over yet
NO_TUNNEL = "X-P2P-No-Tunnel"  # answered by an anchor through which nothing can be asked now
BEGIN_SECONDS = 5.0
TUNNEL_SECONDS = 3.0
AGAIN_SECONDS = 0.2
CONNECT_SECONDS = 1.0
LISTEN_SECONDS = 0.5
_KEPT = (
    "Content-Type", "Content-Length", "Content-Range", "Accept-Ranges", "X-Content-Type-Options", "Retry-After",
    "X-P2P-Attempt", "X-P2P-Node", "X-P2P-Log-Offset", "X-P2P-Log-Start", "X-P2P-Log-Size", "X-P2P-Term", "X-P2P-Index",
)  # fmt: skip


async def relay(
    request: web.Request, node: str, path: str, *, direct: str = "1", hidden: bool = False
) -> web.StreamResponse:
    """Asks `node` for `path` (with its query) and streams what it answers. `direct`: what it is told in the header
    `DIRECT`. `hidden`: through the tunnel it holds to this node, and no other way. Raises Problem (502, 503) or
    Refused (404)."""
    here = context(request)
    query = request.rel_url.raw_query_string
    if hidden:
        direct = request.headers.get(DIRECT, direct)
        return await _through_tunnel(request, node, f"{path}?{query}" if query else path, direct)
    until = time.monotonic() + TUNNEL_SECONDS
    while True:
        address, anchors = here.cluster.way_to(NodeId(node))
        response, why = await _by_any(request, node, path, address, anchors, direct)
        if response is not None:
            return response
        # A tunnel that broke, or is held to other anchors from now on, is there again in a moment.
        held = address is None and here.cluster.anchors_of(node)
        if not held or time.monotonic() > until or not listens(here, request):
            raise Problem(503, f"node {node[:80]} cannot be asked now: {why}", field="node")
        await asyncio.sleep(AGAIN_SECONDS)


async def _by_any(
    request: web.Request, node: str, path: str, address: str | None, anchors: tuple[str, ...], direct: str
) -> tuple[web.StreamResponse | None, str]:
    """(the answer, or None if no way led there; why not). Each way is tried once."""
    here, why = context(request), "it is not known how to reach it"
    if address is None and here.settings.node_id in here.cluster.anchors_of(node):
        try:
            return await _through_tunnel(request, node, path, direct), ""
        except Problem as problem:
            if NO_TUNNEL not in problem.headers:
                raise
            why = problem.detail
    prefix = "" if address is not None else f"/peer/tunnel/{node}"
    for way in [address] if address is not None else anchors:
        try:
            answer = await _ask(request, f"http://{way}{prefix}{path}", direct)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            why = str(error) or type(error).__name__
            continue
        async with answer:
            if NO_TUNNEL not in answer.headers:
                passed = await _pass_back(request, answer.status, dict(answer.headers), answer.content.iter_any())
                return passed, ""
            why = f"{way} holds no tunnel to it now"
    return None, why


async def _ask(request: web.Request, url: str, direct: str) -> aiohttp.ClientResponse:
    async with asyncio.timeout(BEGIN_SECONDS):
        return await context(request).peers.session.request(
            request.method,
            url,
            headers=_asking(request, direct),
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
        )


async def _pass_back(
    request: web.Request, status: int, headers: dict[str, str], chunks: AsyncIterator[bytes]
) -> web.StreamResponse:
    """The answer as it comes, until it ends, breaks off or nobody listens any more. What has begun cannot be answered
    otherwise: the asker's connection breaks off too, so that half a log is not taken for a whole one."""
    response = _begin(status, headers)
    await response.prepare(request)
    try:
        while (chunk := await _next(request, chunks)) is not None:
            await response.write(chunk)
    except (aiohttp.ClientError, TunnelError, OSError) as error:
        raise ConnectionResetError(f"the answer broke off: {error}") from None
    await response.write_eof()
    return response


async def _next(request: web.Request, chunks: AsyncIterator[bytes]) -> bytes | None:
    """The next chunk; None at the end. Whoever follows a silent job and hangs up is noticed all the same."""
    waiting = asyncio.ensure_future(anext(chunks, None))
    try:
        while not waiting.done():
            await asyncio.wait([waiting], timeout=LISTEN_SECONDS)
            if not waiting.done() and not listens(context(request), request):
                raise ConnectionResetError("nobody listens any more")
        return waiting.result()
    finally:
        if not waiting.done():
            waiting.cancel()
            await asyncio.wait([waiting])


def listens(here: Context, request: web.Request) -> bool:
    """Whether the asker is still there, and this node too."""
    return not (here.stopping.is_set() or request.transport is None or request.transport.is_closing())


async def _through_tunnel(request: web.Request, node: str, target: str, direct: str) -> web.StreamResponse:
    tunnel = context(request).cluster.tunnel
    headers = _asking(request, direct).items()
    try:
        opened = await tunnel.open(NodeId(node), request.method, target, headers=headers, timeout=BEGIN_SECONDS)
    except TunnelError as error:
        why = "holds no tunnel to this one now" if isinstance(error, NoTunnel) else f"cannot be asked now: {error}"
        raise Problem(503, f"node {node[:80]} {why}", headers={NO_TUNNEL: "1"}, field="node") from None
    async with opened as answer:
        return await _pass_back(request, answer.status, dict(answer.headers), aiter(answer.chunks))


def _asking(request: web.Request, direct: str) -> dict[str, str]:
    wanted = request.headers.get("Range")
    return {DIRECT: direct} if wanted is None else {DIRECT: direct, "Range": wanted}


def _begin(status: int, headers: dict[str, str]) -> web.StreamResponse:
    low = {name.lower(): value for name, value in headers.items()}
    return web.StreamResponse(status=status, headers={n: low[n.lower()] for n in _KEPT if n.lower() in low})
