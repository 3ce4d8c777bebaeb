"""Every number of the gossip protocol, with its unit and reason; and every limit of a buffer. Decides nothing.

The defaults are memberlist's LAN figures as PROTOCOL §4 gives them. A simulation or a test makes its own `Figures`.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_ID_CHARS = 128  # of a node, disk, boot or cluster id
MAX_ADDRESS_CHARS = 262  # a DNS name of 253, a colon, a port, and brackets round an IPv6 address
MAX_META_BYTES = 400  # packed; a member must fit into one message together with others
MAX_META_KEYS = 24
MAX_VIA = 5  # anchors an outbound-only member may name
MAX_UPDATES = 256  # members in one message's piggyback; 1400 bytes hold fewer
MAX_MEMBERS = 10_000  # living members; one more is refused at join
MAX_TOMBSTONES = 10_000  # dead and left members; the oldest are forgotten first
MAX_MESSAGE_BYTES = 16 << 20  # a full state of MAX_MEMBERS fits
MAX_SEEDS = 16  # addresses one join tries
MAX_RELAYS = 64  # probes this node makes for others at once; beyond that it answers nack at once
MAX_CLAIMS = 16  # joins held back while the older owner of the name is probed
MAX_RIVALS = 8  # other processes under this node's name that it remembers
MAX_DETAIL_CHARS = 500  # of a refusal's sentences
MAX_TERM = 1 << 62
MAX_INCARNATION = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """PROTOCOL §4's defaults. Times are in seconds."""

    probe_interval_seconds: float = 1.0  # one member is probed in each; times (health + 1)
    probe_timeout_seconds: float = 0.5  # then helpers are asked; times (health + 1)
    helpers: int = 3  # members asked to probe in our place
    nack_share: float = 0.8  # of the asker's patience, after which a helper says that it heard nothing either

    suspicion_mult: float = 4.0  # the least suspicion is this x log10(n) x probe interval
    suspicion_max_mult: float = 6.0  # the longest, without a confirmation, is this x the least
    gossip_interval_seconds: float = 0.2  # a round is sent only while something is queued
    gossip_fanout: int = 3
    retransmit_mult: int = 4  # an update is sent this x ceil(log10(n + 1)) times by each member
    message_bytes: int = 1_400  # a message with its piggyback stays within one Ethernet frame
    leave_fanout: int = 8  # members told directly by one who leaves: it will not be there for a second round

    push_pull_seconds: float = 30.0  # full comparison with one member; grows with log2(n / 32)
    push_pull_scale_from: int = 32
    reconnect_seconds: float = 30.0  # one dead member is dialled again: how two halves of a partition meet
    tombstone_seconds: float = 86_400.0  # how long the dead and the left are remembered

    health_max: int = 8
    health_silent: int = 4  # at this local health and above a node suspects nobody
    lag_seconds: float = 0.1  # an event loop later than this is a reason to doubt oneself
    lifeguard: bool = True  # off = plain SWIM with suspicion, for comparison only

    anchors: int = 3  # members an outbound-only node keeps in touch with
    anchor_fresh_seconds: float = 3.0  # an anchor vouches for whom it heard within this
    anchor_retry_seconds: float = 60.0  # an anchor that did not answer is not chosen again for this long

    clock_skew_seconds: float = 30.0  # wall clocks further apart than this are refused at join
    request_timeout_seconds: float = 5.0  # for exchanges that are not probes: full states, joins
    hint_gap_seconds: float = 0.05  # at most one round at once for a new leader in each
    story_entries: int = 2_048  # transitions remembered for people

    def __post_init__(self) -> None:
        assert 0 < self.probe_timeout_seconds < self.probe_interval_seconds
        assert 0 < self.nack_share < 1
        assert self.gossip_fanout > 0 and self.helpers >= 0 and self.anchors > 0
