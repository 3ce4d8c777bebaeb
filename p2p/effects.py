"""What a core asks its driver to do, and the nouns it needs for that. Cores return these; only `p2p.driver` carries
them out (the four duties of etcd-io/raft's ``doc.go``: persist, send, apply, answer).

Persist-before-send needs no care there: a core holds a message that depends on the disk back until it is told that the
write it depends on is durable, so a `Send` may always go out at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from p2p.ids import Index, Term, VoterId
from p2p.messages import Message

COMMAND = 0  # the body is the state machine's; empty is a leader's no-op
CONFIG = 1  # the body is a Config


@dataclass(frozen=True, slots=True)
class HardState:
    """What a voter must never forget: fsynced before any answer that depends on it (Raft §5.1)."""

    term: Term
    voted_for: VoterId | None


class Entry(NamedTuple):
    """One journal entry. `body` is opaque here; empty is a leader's no-op."""

    index: Index  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    term: Term
    body: bytes
    kind: int = COMMAND


class Config(NamedTuple):
    """Who votes, and who is being brought up to date to vote later. Both sorted; nobody is in both."""

    voters: tuple[VoterId, ...] = ()
    learners: tuple[VoterId, ...] = ()

    def encode(self) -> bytes:
        """The body of a CONFIG entry: ``a@1,b@2;c@3``."""
        return f"{','.join(self.voters)};{','.join(self.learners)}".encode()

    @staticmethod
    def decode(body: bytes) -> Config:
        """Raises ValueError for what `encode` does not make."""
        voters, semicolon, learners = body.decode().partition(";")
        if not semicolon:
            raise ValueError("not a configuration")
        config = Config(
            tuple(VoterId(name) for name in voters.split(",") if name),
            tuple(VoterId(name) for name in learners.split(",") if name),
        )
        if config.encode() != body or len(set(config.everyone)) != len(config.everyone):
            raise ValueError("not a configuration")
        return config

    @property
    def everyone(self) -> tuple[VoterId, ...]:
        return (*self.voters, *self.learners)


@dataclass(frozen=True, slots=True)
class Persist:
    """Write these durably, in one fsync, in the order of `seq`: first forget every entry from `truncate` on, if given,
    then append. `acked_floor` is the highest index known to be committed. Answered by `Persisted(seq)`."""

    seq: int
    entries: tuple[Entry, ...]
    hard_state: HardState | None
    acked_floor: Index
    truncate: Index | None = None


@dataclass(frozen=True, slots=True)
class Send:
    """Hand this to the transport; it may be lost, late, doubled or reordered."""

    to: VoterId
    message: Message


@dataclass(frozen=True, slots=True)
class Apply:
    """Everything up to `upto` is committed: apply it in order and answer those who proposed it."""

    upto: Index


@dataclass(frozen=True, slots=True)
class Fetch:
    """Read entries `first`.. from the store (at most `most` entries or `most_bytes` bytes, at least one) for the
    follower `to`. Answered by `Fetched`."""

    to: VoterId
    first: Index
    most: int
    most_bytes: int


class Mark(NamedTuple):
    """A digest of what the entries up to `index` did to the state machine, from the mark before it on. Voters' are
    equal, or one of them has gone wrong; unless they were made by other rules, which the digest's upper half names."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    digest: int

    @property
    def rules(self) -> int:
        return self.digest >> 32


NO_MARK = Mark(0, 0)


@dataclass(frozen=True, slots=True)
class OfferSnapshot:
    """The follower `to` is behind the log: offer it the newest snapshot, making one if there is none newer than the
    log's beginning. Answered by `SnapshotOffered` or, if it cannot be done now, by nothing: it is asked again."""

    to: VoterId


@dataclass(frozen=True, slots=True)
class Install:
    """Fetch the offered snapshot from `source`, verify it and put it in place of the state and the log. Answered by
    `Installed`, or by `InstallFailed`."""

    source: VoterId
    snapshot: SnapshotMeta


class SnapshotMeta(NamedTuple):
    """A snapshot as it is offered: the state after entry `index`, which was of `term`, under `config`. `chain` is the
    log's running hash there."""

    index: Index  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    term: Term
    config: Config
    chain: bytes
    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ReadReady:
    """A linearizable read that was asked for may be answered once everything up to `index` is applied."""

    context: int
    index: Index


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """This node does not lead (any more): the read must be asked of another."""

    context: int


@dataclass(frozen=True, slots=True)
class RoleChanged:
    """The role, the known leader or the term changed, or a leader's first entry became committed (`established`): only
    then does it know everything that was ever acknowledged, and may answer clients."""

    role: str  # follower | candidate | leader
    term: Term
    leader: VoterId | None
    established: bool
    why: str


Effect = Persist | Send | Apply | Fetch | OfferSnapshot | Install | ReadReady | ReadFailed | RoleChanged
