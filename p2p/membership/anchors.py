"""Which members an outbound-only node keeps in touch with: rendezvous hashing (Thaler and Ravishankar 1998).

Every (node, anchor) pair has a fixed weight and the heaviest win: the load spreads evenly, and a member that comes or
goes moves only the nodes that had it.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from heapq import nlargest

from p2p.ids import NodeId


def weight(node: NodeId, anchor: NodeId) -> bytes:
    return blake2b(f"{node}\x00{anchor}".encode(), digest_size=8).digest()


def choose(node: NodeId, candidates: Iterable[NodeId], count: int) -> tuple[NodeId, ...]:
    """The `count` heaviest of `candidates` for `node`, heaviest first."""
    return tuple(nlargest(count, candidates, key=lambda anchor: (weight(node, anchor), anchor)))
