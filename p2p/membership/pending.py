"""What an answer is waited for: one small record for every question under way. Nouns only; `core` decides."""

from __future__ import annotations

from dataclasses import dataclass, field

from p2p.ids import NodeId
from p2p.membership.member import Member
from p2p.membership.message import Join, Message


@dataclass(slots=True)
class OwnProbe:
    """This node's probe of the interval, directly and then through others. There is one at a time."""

    target: Member
    deadline: float
    acked: bool = False
    asked_others: bool = False
    nacks_expected: int = 0
    nacks: int = 0
    anchors: tuple[NodeId, ...] = ()  # of an outbound-only target: all of them must report it gone
    gone: set[NodeId] = field(default_factory=set)  # anchors that have


@dataclass(frozen=True, slots=True)
class Direct:
    """A ping of the probe's target."""

    probe: OwnProbe


@dataclass(frozen=True, slots=True)
class Indirect:
    """A request to a helper, or to an anchor of an outbound-only target."""

    probe: OwnProbe
    helper: NodeId


@dataclass(frozen=True, slots=True)
class Relay:
    """A ping made for somebody else, who waits for our reply."""

    ticket: int
    asker: Message
    target: NodeId


@dataclass(frozen=True, slots=True)
class Claim:
    """A joiner waits while the older process under its name is asked for a sign of life."""

    ticket: int
    asker: Message
    join: Join
    holder: Member


@dataclass(frozen=True, slots=True)
class AnchorPing:
    """An outbound-only node keeps in touch."""

    anchor: NodeId


@dataclass(frozen=True, slots=True)
class Sync:
    """A digest, whose answer may be a full state."""


@dataclass(frozen=True, slots=True)
class JoinTry:
    """A request to be let in."""

    address: str


@dataclass(frozen=True, slots=True)
class Told:
    """A full state on its way; nothing hangs on the answer."""


Pending = Direct | Indirect | Relay | Claim | AnchorPing | Sync | JoinTry | Told
