"""Whether a voter that says hello is the only one of its name, or one of two with the same disk (PROTOCOL §2.10).

A voter with a new boot, met while links of its old one stand, has either been restarted or copied. The old links tell:
a ping that is answered *now*, after the hello, comes from a second living process. Silence, or a closed socket, is what
a restart leaves behind, and the old links give way. What had been sent before the hello proves nothing, neither of the
old start nor of the new: after a stall of our own both may lie in our buffers and both senders be dead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from p2p.transport.hello import Hello, Refused
from p2p.transport.link import Link


async def be_the_only(
    peer: Hello,
    *,
    rivals: Callable[[], list[Link]],
    lives: Callable[[], Awaitable[bool]],
    displace: Callable[[Link], None],
    proof_seconds: float,
) -> None:
    """Returns when no other start of the peer is left; `rivals` are their links now, `displace` takes one away, `lives`
    asks the newcomer. Nothing is awaited after the last look. Raises Refused (another one lives), ConnectionResetError
    (it is the newcomer that has gone)."""
    while standing := rivals():
        proofs = await asyncio.gather(*(rival.alive(proof_seconds) for rival in standing))
        if any(proofs):
            if not await lives():
                raise ConnectionResetError("it was gone before it could be let in")
            raise Refused("clone", f"{peer.sender} is here already and lives: one is a copy")
        for rival in standing:
            displace(rival)
