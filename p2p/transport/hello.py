"""The first frame each way on a link: who speaks, for which cluster, to whom. Decides with whom we do not speak.

Addresses are reused and disks are emptied: without the proof of both names at every connection an answer could count
for a voter that is no more (PROTOCOL §2.8, §2.11). What is checked here needs nothing but the two hellos; whether a
voter is there twice needs the links that stand, see `links`.
"""

from __future__ import annotations

from typing import NamedTuple

import msgpack

from p2p.ids import NodeId, VoterId, node_of
from p2p.transport import TransportError

WIRE_VERSION = 1
OLDEST_WIRE_VERSION = 1  # a newer peer is let in: whether it still speaks our version is its own decision
MAX_REASON_BYTES = 123  # a close frame has no more room (RFC 6455 §5.5)
MAX_NAME = 512
REFUSED = 4001  # close codes; 4000 to 4999 are the application's
UNPROVEN = 4002
DONE = 1000
STOPPING = 1001


class Hello(NamedTuple):
    """`to` is a voter id, or a node id of whoever does not know the disk yet. `boot` is new with every start."""

    version: int
    cluster: str
    sender: VoterId
    to: str
    boot: str
    time_ms: int

    @property
    def node(self) -> NodeId:
        return node_of(self.sender)


class Refused(TransportError):
    """One side will not speak to the other. `kind` is one of ``hello version cluster node disk clone channel self``."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def encode(hello: Hello) -> bytes:
    """The frame: a msgpack map."""
    frame: bytes = msgpack.packb(
        {
            "v": hello.version,
            "cluster": hello.cluster,
            "from": hello.sender,
            "to": hello.to,
            "boot": hello.boot,
            "time_ms": hello.time_ms,
        }
    )
    return frame


def decode(frame: bytes) -> Hello:
    """Fields it does not know are a newer version's and are left alone. Raises Refused."""
    try:
        said = msgpack.unpackb(frame)
        hello = Hello(said["v"], said["cluster"], said["from"], said["to"], said["boot"], said["time_ms"])
    except (ValueError, TypeError, KeyError, msgpack.exceptions.UnpackException) as error:
        raise Refused("hello", f"this is not a hello: {type(error).__name__}") from error
    names = (hello.cluster, hello.sender, hello.to, hello.boot)
    if type(hello.version) is not int or type(hello.time_ms) is not int:
        raise Refused("hello", "this is not a hello: v and time_ms are integers")
    if not all(isinstance(name, str) and len(name) <= MAX_NAME for name in names) or not node_of(hello.sender):
        raise Refused("hello", f"this is not a hello: names are strings of at most {MAX_NAME} characters")
    return hello


def check(hello: Hello, ours: Hello) -> None:
    """Whether `ours` may speak with who said `hello`. Raises Refused."""
    if hello.version < OLDEST_WIRE_VERSION:
        raise Refused("version", f"you speak version {hello.version}, the oldest here is {OLDEST_WIRE_VERSION}")
    if not ours.cluster:
        raise Refused("cluster", "this node belongs to no cluster yet")
    if hello.cluster != ours.cluster:
        raise Refused("cluster", f"this is cluster {ours.cluster}, not {hello.cluster}")
    if hello.to not in (ours.sender, ours.node):
        if node_of(VoterId(hello.to)) != ours.node:
            raise Refused("node", f"this is node {ours.node}, not {node_of(VoterId(hello.to))}")
        raise Refused("disk", f"this is {ours.sender}, another disk than you mean")
    if ours.to and ours.to not in (hello.sender, hello.node):
        kind = "disk" if node_of(VoterId(ours.to)) == hello.node else "node"
        raise Refused(kind, f"you are {hello.sender}, not {ours.to}")
    if hello.sender == ours.sender and hello.boot == ours.boot:
        raise Refused("self", "you have dialled yourself")


def close_reason(refused: Refused) -> bytes:
    """Why, for a close frame."""
    return f"{refused.kind}: {refused}".encode()[:MAX_REASON_BYTES]


def refusal(reason: str) -> Refused:
    """The other side's reason, from its close frame."""
    kind, _, text = reason.partition(": ")
    return Refused(kind, text or reason or "no reason given")
