"""What voters say to each other about elections and the journal (PROTOCOL §1, Messages), and its wire form.

Sender, receiver and cluster are the connection's business (`p2p.transport` proves them at its handshake and drops what
is for another disk); every message carries its term. A message is a msgpack array ``[version, name, field, …]``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgpack

from p2p.ids import Index, Term, VoterId

WIRE_VERSION = 1


class PreVote(NamedTuple):
    """Would you vote for me in `next_term`? Changes nothing at the receiver (Ongaro 2014, §9.6)."""

    term: Term  # the sender's own, not the one it asks about
    next_term: Term
    last_index: Index
    last_term: Term
    priority: int


class PreVoteReply(NamedTuple):
    """`reason` of a refusal: ``lease`` (a leader lives), ``log``, ``higher`` (the bully's answer), ``term``."""

    term: Term
    next_term: Term
    granted: bool
    reason: str


class Vote(NamedTuple):
    """RequestVote. `transfer`: the leader asked for this election, so its lease does not count (Ongaro §4.2.3)."""

    term: Term
    last_index: Index
    last_term: Term
    transfer: bool


class VoteReply(NamedTuple):
    term: Term
    granted: bool
    reason: str  # voted | log | lease | term


class Append(NamedTuple):
    """AppendEntries; without entries a heartbeat. `entries` are (term, kind, body) of prev_index + 1 and on. `round`
    is echoed: an acknowledgement counts for the leader's lease from the moment that round was sent. `heirs` are the
    voters in the order in which they should stand if this leader dies (PROTOCOL §2.2)."""

    term: Term
    prev_index: Index
    prev_term: Term
    entries: tuple[tuple[int, int, bytes], ...]
    commit: Index
    round: int
    heirs: tuple[VoterId, ...]
    timeout_ms: int = 0  # the election timeout this leader asks for, where the network is slow; 0: the usual one


class AppendReply(NamedTuple):
    """`match`: the sender holds the leader's log up to there, durably. On a refusal `conflict_first` is where the
    leader should look next: the first entry of the conflicting term, or just behind the sender's end; `last_index` is
    that end. `ready`: it could lead (its disk answers, nothing is wrong with it). `mark_index`, `digest`: its newest
    `p2p.effects.Mark`."""

    term: Term
    ok: bool
    match: Index
    conflict_term: Term
    conflict_first: Index
    last_index: Index
    round: int
    priority: int
    ready: bool
    mark_index: int = 0
    digest: int = 0


class SnapshotOffer(NamedTuple):
    """The receiver is behind the log: it should fetch this state from the sender. See `p2p.effects.SnapshotMeta`."""

    term: Term
    index: Index  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    last_term: Term
    config: bytes
    chain: bytes
    name: str
    size: int
    sha256: str
    round: int


class TimeoutNow(NamedTuple):
    """Stand for election at once: the leader hands its seat over (Ongaro §3.10)."""

    term: Term
    last_index: Index


Message = PreVote | PreVoteReply | Vote | VoteReply | Append | AppendReply | SnapshotOffer | TimeoutNow
_TYPES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (PreVote, PreVoteReply, Vote, VoteReply, Append, AppendReply, SnapshotOffer, TimeoutNow)
}


class BadMessage(Exception):
    """A peer sent what is no message of this version. Counted and dropped; nothing changes."""


def encode(message: Message) -> bytes:
    """The bytes of one message."""
    return bytes(msgpack.packb((WIRE_VERSION, type(message).__name__, *message)))


def decode(raw: bytes) -> Message:
    """Raises BadMessage for anything that `encode` does not make."""
    try:
        version, name, *values = msgpack.unpackb(raw, use_list=False)
        kind = _TYPES[name]
        if version != WIRE_VERSION or isinstance(version, bool):
            raise BadMessage(f"message {name!r} has version {version}; this build speaks {WIRE_VERSION}")
        message: Message = kind(*values)
    except BadMessage:
        raise
    except Exception as error:
        raise BadMessage(f"{len(raw)} bytes are no message: {type(error).__name__}") from None
    _check(message)
    return message


_FIELD_TYPES: dict[str, type] = {
    "term": int, "next_term": int, "last_index": int, "last_term": int, "priority": int, "granted": bool,
    "reason": str, "transfer": bool, "prev_index": int, "prev_term": int, "entries": tuple, "commit": int,
    "round": int, "heirs": tuple, "timeout_ms": int, "ok": bool, "match": int, "conflict_term": int,
    "conflict_first": int, "ready": bool, "index": int, "config": bytes, "chain": bytes, "name": str, "size": int,
    "sha256": str, "mark_index": int, "digest": int,
}  # fmt: skip
_MAY_BE_NEGATIVE = frozenset({"priority"})
LARGEST = 1 << 62  # the stores keep numbers in 64 bits with a sign
_EXACT = {kind: tuple(_FIELD_TYPES[name] for name in kind._fields) for kind in _TYPES.values()}
_NUMBERS = {
    kind: tuple(
        (at, -LARGEST if name in _MAY_BE_NEGATIVE else 0)
        for at, name in enumerate(kind._fields)
        if _FIELD_TYPES[name] is int
    )
    for kind in _TYPES.values()
}


def _check(message: Message) -> None:
    """Types and signs: a peer's nonsense must not get as far as arithmetic."""
    kind = type(message)
    if tuple(map(type, message)) != _EXACT[kind]:
        wrong = next(n for n, value in enumerate(message) if type(value) is not _EXACT[kind][n])
        raise BadMessage(f"{kind.__name__}.{message._fields[wrong]} is {type(message[wrong]).__name__}")
    values: tuple[Any, ...] = message
    for at, least in _NUMBERS[kind]:
        if not least <= values[at] <= LARGEST:
            raise BadMessage(f"{kind.__name__}.{message._fields[at]} is out of range")
    if isinstance(message, Append):
        _check_entries(message)
        if not all(isinstance(heir, str) for heir in message.heirs):
            raise BadMessage("Append.heirs holds something that is no voter")


def _check_entries(message: Append) -> None:
    """A log's terms never fall, and none is later than its leader's (Raft §5.3)."""
    term: int = max(message.prev_term, 1)
    for item in message.entries:
        if not (
            isinstance(item, tuple)
            and len(item) == 3
            and type(item[0]) is int
            and type(item[1]) is int
            and 0 <= item[1] <= LARGEST
            and isinstance(item[2], bytes)
        ):
            raise BadMessage("Append.entries holds something that is no entry")
        if not term <= item[0] <= message.term:
            raise BadMessage(f"Append.entries has an entry of term {item[0]} behind one of term {term}")
        term = item[0]
