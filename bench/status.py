"""How long does ``/status`` take on a node that knows 1,000 members?

A real node; a second, scripted member joins it over real HTTP gossip and brings the other 998 with it in its state,
each with a description of what it has. Answers are timed until the node finds out that nobody lives at those addresses.

Usage: python -m bench.status [--members N] [--requests N]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
import urllib.request
from typing import Any

from aiohttp import web

from bench.harness import node, report
from p2p.ids import ClusterId, DiskId, NodeId
from p2p.membership.member import first_record
from p2p.transport.gossip import Gossip

GPU = {"model": "H100", "memory_mb": 81_559, "compute_capability": "9.0"}
CAPABILITIES = {
    "cpus": 64.0,
    "memory_mb": 512_000,
    "disk_mb": 2_000_000,
    "labels": {"zone": "a"},
    "gpu_error": None,
    "gpus": [{"uuid": f"GPU-{n}", **GPU} for n in range(8)],
}


def status(url: str) -> Any:
    with urllib.request.urlopen(f"{url}/status", timeout=10) as answer:
        return json.load(answer)


async def crowd(url: str, members: int, requests: int) -> list[float]:
    """Seconds of each answer once the node knows everybody."""
    cluster = ClusterId((await asyncio.to_thread(status, url))["cluster_id"])
    app = web.Application()
    server = web.AppRunner(app)

    async def gossiped(request: web.Request) -> web.Response:
        return web.Response(body=await gossip.handle(await request.read()), content_type="application/msgpack")

    async def capabilities(_: web.Request) -> web.Response:
        return web.json_response(CAPABILITIES)

    app.router.add_post("/peer/gossip", gossiped)
    app.router.add_get("/peer/capabilities", capabilities)
    await server.setup()
    site = web.TCPSite(server, "127.0.0.1", 0)
    await site.start()
    address = f"127.0.0.1:{server.addresses[0][1]}"
    gossip = Gossip(NodeId("crowd"), DiskId("d" * 32), address=address, cluster=cluster)
    await gossip.start()
    core = gossip._core
    assert core is not None
    meta: dict[str, Any] = {"version": "0.1.0", "priority": 0, "running_jobs": 3, "caps": "c"}
    for n in range(members - 2):
        name, disk, boot = NodeId(f"m{n:04}"), DiskId(f"{n:032x}"), f"{n:016x}"
        record = first_record(name, disk, boot, started_ms=1, address=address, cluster=cluster, meta=meta)
        core._roster.put(record, asyncio.get_running_loop().time())
    await gossip.join([url.removeprefix("http://")])
    while (await asyncio.to_thread(status, url))["total_peers"] < members:
        await asyncio.sleep(0.1)
    taken = []
    for _ in range(requests):
        began = time.perf_counter()
        await asyncio.to_thread(status, url)
        taken.append(time.perf_counter() - began)
        await asyncio.sleep(random.uniform(0.0, 0.02))
    await gossip.stop(leave=False)
    await server.cleanup()
    return taken


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("--members", type=int, default=1_000)
    flags.add_argument("--requests", type=int, default=200)
    told = flags.parse_args()
    with node() as running:
        taken = sorted(asyncio.run(crowd(running.url, told.members, told.requests)))
    figures = {
        "members": told.members,
        "status_median_ms": round(statistics.median(taken) * 1000, 1),
        "status_p99_ms": round(taken[int(len(taken) * 0.99)] * 1000, 1),
    }
    report("status", [(name, str(value)) for name, value in figures.items()], figures)


if __name__ == "__main__":
    main()
