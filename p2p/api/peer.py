"""``/peer/*``: what nodes ask of each other. msgpack bodies; the cluster's token like everything else."""

from __future__ import annotations

import asyncio

from aiohttp import web

from p2p.api.bodies import check_query, query_int, read_object, read_raw
from p2p.api.context import answer, context
from p2p.api.errors import Problem
from p2p.api.relay import relay
from p2p.journal import snapshot
from p2p.loops import desk
from p2p.membership.member import MalformedMessage, MembershipError
from p2p.peers import PACKED

routes = web.RouteTableDef()

MAX_CHUNK = 4 << 20


@routes.get("/peer/link", allow_head=False)
async def link(request: web.Request) -> web.StreamResponse:
    """The WebSocket on which voters speak to each other."""
    return await context(request).cluster.serve_link(request)


@routes.post("/peer/gossip")
async def gossip(request: web.Request) -> web.Response:
    """One message of the membership protocol; the answer is another."""
    check_query(request)
    try:
        said = await context(request).cluster.gossiped(await read_raw(request))
    except MalformedMessage as error:
        raise Problem(400, str(error), field="(body)") from None
    except MembershipError as error:  # it does not run yet, or not any more, or has too much to do
        raise Problem(503, str(error)) from None
    return web.Response(body=said, content_type=PACKED)


@routes.get("/peer/hello")
async def hello(request: web.Request) -> web.Response:
    """Who this node is: its id, disk, cluster, and whom it was told of."""
    check_query(request)
    return answer(request, context(request).cluster.hello())


@routes.get("/peer/links")
async def links(request: web.Request) -> web.Response:
    """The connections between this voter and others, what was sent and dropped on them, and whom it refused."""
    check_query(request)
    return answer(request, context(request).cluster.links_status())


@routes.post("/peer/genesis")
async def genesis(request: web.Request) -> web.Response:
    """``{"members": [[node, disk]…]}``: does this blank node see the same members? ``{"why": ""}`` if it does."""
    check_query(request)
    body = await read_object(request)
    members = body.get("members")
    if not isinstance(members, list) or not all(
        isinstance(m, list | tuple) and len(m) == 2 and all(isinstance(part, str) for part in m) for m in members
    ):
        raise Problem(400, "must be a list of [node, disk]", field="members")
    return answer(request, {"why": await context(request).cluster.confirms([(m[0], m[1]) for m in members])})


@routes.get("/peer/capabilities")
async def capabilities(request: web.Request) -> web.Response:
    """What this node has, or what it knows of the node named by ?node=."""
    check_query(request, "node")
    here = context(request)
    name = request.query.get("node", here.settings.node_id)
    found = await here.cluster.ask_capabilities(name)
    if found is None:
        raise Problem(404, f"nothing is known of {name[:80]!r}", field="node")
    return answer(request, found)


@routes.post("/peer/wish")
async def wish(request: web.Request) -> web.Response:
    """``{"voter": true|false}``: what an operator decided about this node's vote; it remembers that."""
    check_query(request)
    voter = (await read_object(request)).get("voter")
    if not isinstance(voter, bool):
        raise Problem(400, "must be true or false", field="voter")
    here = context(request)
    await asyncio.to_thread(here.cluster.remember_wish, voter)
    here.cluster.refresh()
    return answer(request, {"voter": voter})


@routes.get("/peer/snapshot/{name}")
async def chunk(request: web.Request) -> web.Response:
    """?length= bytes of a snapshot from ?offset= on."""
    check_query(request, "offset", "length")
    offset = query_int(request, "offset", least=0, most=1 << 50) or 0
    length = query_int(request, "length", least=1, most=MAX_CHUNK) or MAX_CHUNK
    here = context(request)
    try:
        raw = await asyncio.to_thread(
            snapshot.read_chunk, here.cluster.snapshots, request.match_info["name"], offset, length
        )
    except snapshot.SnapshotError as error:
        raise Problem(404, str(error), field="name") from None
    return web.Response(body=raw, content_type="application/octet-stream")


@routes.post("/peer/desk/{call}")
async def at_the_desk(request: web.Request) -> web.Response:
    """A worker's call to the leader, see `p2p.loops.desk`."""
    check_query(request)
    here, transport = context(request), request.transport

    def gone() -> bool:
        return transport is None or transport.is_closing() or here.stopping.is_set()

    body = await read_object(request)
    call = request.match_info["call"]
    try:
        told = await desk.serve(here.dispatcher, call, body, gone)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise Problem(400, f"is no {call[:40]!r} of this version: {type(error).__name__}", field="(body)") from None
    if told is None:
        raise Problem(404, f"there is no call {call[:40]!r}", field="call")
    return answer(request, told)


@routes.route("*", "/peer/tunnel/{node}/{path:.*}")
async def tunnel(request: web.Request) -> web.StreamResponse:
    """A request to a node that cannot be dialled, over the link it keeps open to this one."""
    rest = request.rel_url.raw_path.split("/", 4)[4]  # as it came: unquoted, a slash in a name would be one of the path
    return await relay(request, request.match_info["node"], f"/{rest}", hidden=True)
