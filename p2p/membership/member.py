"""One member as others see it, and which of two records of it wins. Sans-IO; knows nothing of time.

SWIM §4.2 orders records by incarnation, then alive < suspect < dead. Here that order is made total, so that merging is
"the greater of two": commutative, associative and idempotent, hence every member that has seen the same records holds
the same one, in whatever order they came. Only the member itself raises its incarnation. A process starts with its
start time as incarnation, so a restarted node overrides the records of its earlier life by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from hashlib import blake2b
from typing import Any

import msgpack

from p2p.ids import ClusterId, DiskId, NodeId
from p2p.membership.figures import (
    MAX_ADDRESS_CHARS,
    MAX_ID_CHARS,
    MAX_INCARNATION,
    MAX_META_BYTES,
    MAX_META_KEYS,
    MAX_VIA,
)

Scalar = str | int | float | bool | None
Meta = Mapping[str, Scalar]


class MembershipError(Exception):
    """Something about membership is not as it must be."""


class MalformedMessage(MembershipError):
    """A peer sent something that is not a gossip message. Nothing was changed."""


class InvalidMeta(MembershipError):
    """Meta must be a flat map of few, small scalars."""


class State(IntEnum):
    """What is believed of a member; at equal incarnations the greater wins (SWIM §4.2; `left` is told by itself)."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3

    def __str__(self) -> str:
        return self.name.lower()

    @property
    def here(self) -> bool:
        """Alive, or suspect and not yet given up."""
        return self <= State.SUSPECT


@dataclass(frozen=True, slots=True)
class Member:
    """`meta` is what others need for a first glance; big descriptions travel by reference (``caps``)."""

    node: NodeId
    disk: DiskId  # 128 random bits of its store: a voter is (node, disk), PROTOCOL §2.8
    boot: str  # random, new with every process
    cluster: ClusterId  # "" = blank: it belongs to none yet
    address: str | None  # "host:port" that peers dial; None = outbound-only: it dials, nobody dials it
    incarnation: int  # raised by the member alone
    started_ms: int  # unix milliseconds at which its process started; the older of two claimants keeps a name
    state: State = State.ALIVE
    via: tuple[NodeId, ...] = ()  # an outbound-only member's anchors: they vouch for it
    meta: Meta = field(default_factory=dict)
    by: NodeId | None = field(default=None, compare=False)  # who suspects it or found it dead; counts confirmations
    _packed: bytes = field(default=b"", init=False, repr=False, compare=False)
    _print: int = field(default=0, init=False, repr=False, compare=False)

    def overrides(self, other: Member) -> bool:
        """True if this record is to replace `other`, a record of the same node."""
        if self is other:
            return False
        if self.incarnation != other.incarnation:
            return self.incarnation > other.incarnation
        if self.state is not other.state:
            return self.state > other.state
        if self == other:
            return False
        # Two processes under one name, or a bug: any order will do as long as all members take the same.
        return self._tie() > other._tie()

    def _tie(self) -> tuple[int, str, bytes]:
        return (self.started_ms, self.boot, self.packed())

    def same_process(self, other: Member) -> bool:
        return self.boot == other.boot

    def same_machine(self, other: Member) -> bool:
        """The same store at the same address: a restart, since one process at a time holds the store and the port."""
        return self.disk == other.disk and self.address == other.address

    def as_(self, state: State, by: NodeId | None = None) -> Member:
        return replace(self, state=state, by=by)

    def packed(self) -> bytes:
        """The record on the wire without `by`; equal records pack equally."""
        if not self._packed:
            meta = {name: self.meta[name] for name in sorted(self.meta)}
            fields = (
                *(self.node, self.disk, self.boot, self.cluster, self.address, self.incarnation, self.started_ms),
                *(int(self.state), self.via, meta),
            )
            object.__setattr__(self, "_packed", msgpack.packb(fields))
        return self._packed

    def size(self) -> int:
        """Bytes the record takes in a message."""
        return len(self.packed()) + len(self.by or "") + 8

    def fingerprint(self) -> int:
        """128 bits of the record, for the digest of a whole state."""
        if not self._print:
            digest = blake2b(self.packed(), digest_size=16).digest()
            object.__setattr__(self, "_print", int.from_bytes(digest, "big"))
        return self._print

    def to_wire(self) -> list[Any]:
        return [self.packed(), self.by]

    @classmethod
    def from_wire(cls, wire: Any) -> Member:
        """Raises MalformedMessage. Fields that a newer version appends are ignored."""
        match wire:
            case [bytes(packed), (str() | None) as by]:
                fields = _unpack(packed)
            case _:
                raise MalformedMessage("a member is [bytes, who says so]")
        if not isinstance(fields, list) or len(fields) < 10:
            raise MalformedMessage("a member has ten fields")
        node, disk, boot, cluster, address, incarnation, started_ms, state, via, meta = fields[:10]
        if not isinstance(via, list) or len(via) > MAX_VIA:
            raise MalformedMessage(f"via is a list of at most {MAX_VIA} node ids")
        return cls(
            node=NodeId(identifier(node, "node id")),
            disk=DiskId(identifier(disk, "disk id", blank=True)),
            boot=identifier(boot, "boot id"),
            cluster=ClusterId(identifier(cluster, "cluster id", blank=True)),
            address=None if address is None else identifier(address, "address", limit=MAX_ADDRESS_CHARS),
            incarnation=number(incarnation, "incarnation", MAX_INCARNATION),
            started_ms=number(started_ms, "start time", MAX_INCARNATION),
            state=_state(state),
            via=tuple(NodeId(identifier(anchor, "anchor")) for anchor in via),
            meta=_meta_from_wire(meta),
            by=None if by is None else NodeId(identifier(by, "accuser")),
        )


def first_record(
    node: NodeId,
    disk: DiskId,
    boot: str,
    *,
    started_ms: int,
    address: str | None,
    cluster: ClusterId | None = None,
    meta: Meta | None = None,
) -> Member:
    """What a new process says of itself. Its incarnation is its start time, so it overrides its earlier lives.

    Raises InvalidMeta, and MalformedMessage for names that no peer would read.
    """
    record = Member(
        *(node, disk, boot, cluster or ClusterId(""), address),
        incarnation=started_ms,
        started_ms=started_ms,
        meta=checked_meta(meta or {}),
    )
    return Member.from_wire(record.to_wire())


def merge(old: Member | None, new: Member) -> Member:
    """The greater of two records of one node; the first one heard of where there is none."""
    return new if old is None or new.overrides(old) else old


def checked_meta(meta: Meta) -> Meta:
    """A copy of `meta` that may be announced; raises InvalidMeta."""
    copy = dict(meta)
    if len(copy) > MAX_META_KEYS:
        raise InvalidMeta(f"meta has {len(copy)} keys; at most {MAX_META_KEYS} are announced")
    for name, value in copy.items():
        if not isinstance(name, str) or not (value is None or isinstance(value, str | int | float)):
            raise InvalidMeta(f"meta[{name!r}] is not a scalar under a string")
    try:
        size = len(msgpack.packb(copy))
    except (ValueError, OverflowError) as error:
        raise InvalidMeta(f"meta cannot be packed: {error}") from None
    if size > MAX_META_BYTES:
        raise InvalidMeta(f"meta takes {size} bytes; at most {MAX_META_BYTES} are announced")
    return copy


def identifier(value: Any, what: str, *, limit: int = MAX_ID_CHARS, blank: bool = False) -> str:
    """A bounded string from a peer; raises MalformedMessage."""
    if not isinstance(value, str) or len(value) > limit or not (value or blank):
        raise MalformedMessage(f"{what} is not a string of 1 to {limit} characters")
    return value


def number(value: Any, what: str, limit: int) -> int:
    """A bounded, non-negative integer from a peer; raises MalformedMessage."""
    if type(value) is not int or not 0 <= value <= limit:
        raise MalformedMessage(f"{what} is not an integer from 0 to {limit}")
    return value


def _state(value: Any) -> State:
    return State(number(value, "state", State.LEFT))


def _meta_from_wire(meta: Any) -> Meta:
    if not isinstance(meta, dict):
        raise MalformedMessage("meta is not a map")
    try:
        return checked_meta(meta)
    except InvalidMeta as error:
        raise MalformedMessage(str(error)) from None


def _unpack(packed: bytes) -> Any:
    try:
        return msgpack.unpackb(packed)
    except Exception as error:  # msgpack raises many kinds, ValueError and its own among them
        raise MalformedMessage(f"a member cannot be unpacked: {type(error).__name__}") from None
