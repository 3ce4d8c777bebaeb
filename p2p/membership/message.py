"""What members say to each other, and its form on the wire (a msgpack map). Every message is one request or its reply.

All of them carry who speaks (node, boot), for which cluster, to whom, the leader hint, and as many queued updates as
fit: a reused address cannot answer for its former owner, and news rides on what is sent anyway (PROTOCOL §2.11, §4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

from p2p.ids import ClusterId, NodeId
from p2p.membership.figures import (
    MAX_DETAIL_CHARS,
    MAX_INCARNATION,
    MAX_MEMBERS,
    MAX_MESSAGE_BYTES,
    MAX_TOMBSTONES,
    MAX_UPDATES,
)
from p2p.membership.hint import LeaderHint
from p2p.membership.member import MalformedMessage, Member, identifier, number

VERSION = 1
MAX_PATIENCE_MS = 60_000


class WrongVersion(MalformedMessage):
    """The peer speaks another version of the gossip protocol."""

    def __init__(self, theirs: object) -> None:
        super().__init__(f"the peer speaks gossip version {theirs!r:.20}, this node speaks {VERSION}")


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there? -> Ack, or Nack if the one who answers is somebody else."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask `target` in my place -> Ack if it answered, Nack if not within 80 % of my patience."""

    target: NodeId
    patience_ms: int


@dataclass(frozen=True, slots=True)
class News:
    """Nothing but what rides along -> Ack."""


@dataclass(frozen=True, slots=True)
class Digest:
    """A hash of everything I believe -> Ack if you believe the same, else your FullState."""

    digest: bytes


@dataclass(frozen=True, slots=True)
class FullState:
    """Everything I believe, or what of it you lack. `ages`: for how many seconds the dead and the left have been so."""

    members: tuple[Member, ...]
    ages: Mapping[NodeId, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Join:
    """Let me in -> Welcome or Refuse. `unix_ms` is the joiner's clock."""

    member: Member
    unix_ms: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """You are in; this is everybody."""

    state: FullState


@dataclass(frozen=True, slots=True)
class Ack:
    """Yes."""


@dataclass(frozen=True, slots=True)
class Nack:
    """No: it did not answer me either, or I am not whom you called."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """No, and why, in words for a person. Codes: cluster, clock, version, conflict, full, blank, self."""

    code: str
    detail: str
    fix: str


Request = Ping | Probe | News | Digest | FullState | Join
Answer = Ack | Nack | FullState | Welcome | Refuse
Body = Request | Answer


@dataclass(frozen=True, slots=True)
class Message:
    """One request or reply with what rides on it."""

    sender: NodeId
    boot: str
    cluster: ClusterId  # "" = the sender is blank
    to: NodeId | None  # None = whoever answers there: a join through an address
    hint: LeaderHint
    updates: tuple[Member, ...]
    body: Body


def encode(message: Message) -> bytes:
    """The message on the wire."""
    kind, fields = _body_to_wire(message.body)
    packed: bytes = msgpack.packb(
        {
            "v": VERSION,
            "k": kind,
            "f": message.sender,
            "b": message.boot,
            "c": message.cluster,
            "t": message.to,
            "h": message.hint.to_wire(),
            "u": [member.to_wire() for member in message.updates],
            "d": fields,
        }
    )
    return packed


def decode(packed: bytes) -> Message:
    """Raises MalformedMessage (WrongVersion among them); whatever the bytes are, nothing else."""
    if len(packed) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"the message has {len(packed)} bytes; at most {MAX_MESSAGE_BYTES} are read")
    try:
        wire = msgpack.unpackb(packed)
    except Exception as error:  # msgpack raises many kinds, ValueError and its own among them
        raise MalformedMessage(f"the message cannot be unpacked: {type(error).__name__}") from None
    if not isinstance(wire, dict):
        raise MalformedMessage("a message is a map")
    if wire.get("v") != VERSION:
        raise WrongVersion(wire.get("v"))
    updates = wire.get("u")
    if not isinstance(updates, list) or len(updates) > MAX_UPDATES:
        raise MalformedMessage(f"updates are a list of at most {MAX_UPDATES} members")
    to = wire.get("t")
    return Message(
        sender=NodeId(identifier(wire.get("f"), "sender")),
        boot=identifier(wire.get("b"), "boot id"),
        cluster=ClusterId(identifier(wire.get("c"), "cluster id", blank=True)),
        to=None if to is None else NodeId(identifier(to, "addressee")),
        hint=LeaderHint.from_wire(wire.get("h")),
        updates=tuple(Member.from_wire(member) for member in updates),
        body=_body_from_wire(wire.get("k"), wire.get("d")),
    )


def _body_to_wire(body: Body) -> tuple[str, list[Any]]:
    match body:
        case Ping():
            return "ping", []
        case Probe(target, patience_ms):
            return "probe", [target, patience_ms]
        case News():
            return "news", []
        case Digest(digest):
            return "digest", [digest]
        case FullState():
            return "state", _state_to_wire(body)
        case Join(member, unix_ms):
            return "join", [member.to_wire(), unix_ms]
        case Welcome(state):
            return "welcome", _state_to_wire(state)
        case Ack():
            return "ack", []
        case Nack():
            return "nack", []
        case Refuse(code, detail, fix):
            return "refuse", [code, detail, fix]


def _body_from_wire(kind: Any, fields: Any) -> Body:
    match kind, fields:
        case "ping", []:
            return Ping()
        case "probe", [target, patience_ms]:
            return Probe(NodeId(identifier(target, "target")), number(patience_ms, "patience", MAX_PATIENCE_MS))
        case "news", []:
            return News()
        case "digest", [bytes(digest)] if len(digest) == 16:
            return Digest(digest)
        case "state", [members, ages]:
            return _state_from_wire(members, ages)
        case "join", [member, unix_ms]:
            return Join(Member.from_wire(member), number(unix_ms, "clock", MAX_INCARNATION))
        case "welcome", [members, ages]:
            return Welcome(_state_from_wire(members, ages))
        case "ack", []:
            return Ack()
        case "nack", []:
            return Nack()
        case "refuse", [code, detail, fix]:
            return Refuse(
                identifier(code, "code"),
                identifier(detail, "detail", limit=MAX_DETAIL_CHARS, blank=True),
                identifier(fix, "fix", limit=MAX_DETAIL_CHARS, blank=True),
            )
    raise MalformedMessage(f"there is no message {kind!r:.40} with these fields")


def _state_to_wire(state: FullState) -> list[Any]:
    return [[member.to_wire() for member in state.members], dict(state.ages)]


def _state_from_wire(members: Any, ages: Any) -> FullState:
    if not isinstance(members, list) or len(members) > MAX_MEMBERS + MAX_TOMBSTONES:
        raise MalformedMessage("a state is a list of members")
    if not isinstance(ages, dict) or len(ages) > len(members):
        raise MalformedMessage("ages are a map of node ids to seconds")
    return FullState(
        tuple(Member.from_wire(member) for member in members),
        {NodeId(identifier(node, "node id")): number(age, "age", MAX_INCARNATION) for node, age in ages.items()},
    )
