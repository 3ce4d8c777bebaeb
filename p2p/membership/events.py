"""What happens to a core, and what it asks its shell to do. Nouns only; `core` decides, `p2p.transport.gossip` acts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from p2p.ids import ClusterId, NodeId
from p2p.membership.hint import LeaderHint
from p2p.membership.member import Member, Scalar
from p2p.membership.message import Message

# --- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """A deadline may have come: see `next_deadline`."""


@dataclass(frozen=True, slots=True)
class Requested:
    """A peer asks. Exactly one `Reply` with this ticket follows, at once or later. `unix_ms` is this node's clock."""

    ticket: int
    message: Message
    unix_ms: int


@dataclass(frozen=True, slots=True)
class Answered:
    """The reply to the `Send` with this id."""

    id: int
    message: Message


@dataclass(frozen=True, slots=True)
class Failed:
    """The `Send` with this id got no answer: refused, timed out, or the answer was none. A hint, never proof."""

    id: int
    why: str


@dataclass(frozen=True, slots=True)
class Garbled:
    """Something arrived that could not be decoded. Counted; changes nothing else."""

    why: str


@dataclass(frozen=True, slots=True)
class JoinThrough:
    """Ask these addresses to let this node in. `unix_ms` is this node's clock."""

    addresses: tuple[str, ...]
    unix_ms: int


@dataclass(frozen=True, slots=True)
class Leave:
    """Say farewell: this node stops on purpose. It takes no further part."""


@dataclass(frozen=True, slots=True)
class SetMeta:
    """Announce this instead, with the next incarnation; the same meta again announces nothing."""

    meta: Mapping[str, Scalar]


@dataclass(frozen=True, slots=True)
class SetCluster:
    """This node now belongs to a cluster, for good. Illegal if it belongs to another."""

    cluster: ClusterId


@dataclass(frozen=True, slots=True)
class LoopLag:
    """The shell's event loop ran this many seconds late."""

    seconds: float


Event = (
    Tick | Requested | Answered | Failed | Garbled | JoinThrough | Leave | SetMeta | SetCluster | LeaderHint | LoopLag
)

# --- effects --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Post this; feed the reply back as `Answered`, or `Failed` after `timeout_seconds`.

    `expects_reply`: a decision hangs on it. Otherwise the reply is fed back only for what rides on it.
    """

    id: int
    to_address: str
    to_node: NodeId | None
    message: Message
    expects_reply: bool
    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer the request with this ticket."""

    ticket: int
    message: Message


@dataclass(frozen=True, slots=True)
class Changed:
    """A member's state changed, or another process took its name. `old` is None for one never heard of."""

    member: Member
    old: Member | None


@dataclass(frozen=True, slots=True)
class Updated:
    """A member announced something else (meta, address, anchors, cluster) or refuted a rumour; it was and is alive."""

    member: Member
    old: Member


@dataclass(frozen=True, slots=True)
class Hinted:
    """A newer term or leader became known."""

    hint: LeaderHint


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two living processes go by one node id. `holder` keeps it, `claimant` (the newer) has been told.

    `ours`: this node is the claimant; it no longer defends its name and should stop.
    """

    holder: Member
    claimant: Member
    ours: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """A peer is not to be talked with, or will not talk: `detail` and `fix` are sentences for a person.

    `by_us`: this node refused; otherwise the peer did. `node` is None where nobody told its name. Codes: cluster,
    clock, version, conflict, full, blank, self.
    """

    code: str
    detail: str
    fix: str
    by_us: bool
    node: NodeId | None
    address: str | None
    joining: bool  # it answers a join of ours, through `address`


@dataclass(frozen=True, slots=True)
class Joined:
    """The member at `address` let this node in. `cluster` is "" if that one is blank too.

    A blank node then decides whether to belong to `cluster`, remembers it durably, and says `SetCluster`.
    """

    cluster: ClusterId
    node: NodeId
    address: str


@dataclass(frozen=True, slots=True)
class JoinFailed:
    """Nobody answered at `address`."""

    address: str
    why: str


@dataclass(frozen=True, slots=True)
class Met:
    """This blank node heard from a member of a cluster; it may want to join it. Told once a cluster."""

    cluster: ClusterId
    node: NodeId
    address: str | None


Effect = Send | Reply | Changed | Updated | Hinted | Conflict | Refused | Joined | JoinFailed | Met
