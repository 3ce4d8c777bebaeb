"""In which order voters stand for election, and the timers that make it so. All seconds.

One fixed timeout plus a step a rank instead of random timeouts: two voters hardly ever stand at the same time, and the
one that should win stands first. A stale rank costs one step, never safety (PROTOCOL §2.2, §2.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from p2p.ids import VoterId, node_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Timers:
    """Defaults for machines within 60 ms of each other (PROTOCOL §1, Timers); `WAN` for those further apart."""

    heartbeat: float = 0.1
    election: float = 0.6  # E: six lost heartbeats
    longest_election: float = 5.0  # E grows where answers are slow (`slow_factor` times their p99), but no further
    slow_factor: float = 3.0
    guard: float = 0.03  # a candidate waits a little longer than E, so that the others' leases have run out
    jitter: float = 0.05
    rank_delay: float = 0.15
    round_timeout: float = 0.3
    backoff: float = 1.5
    longest_backoff: float = 3.0
    disk_stall: float = 1.0  # an fsync that takes longer makes a leader step down
    excuse: float = 0.05  # a timer that fires this late was this node's own fault (Lifeguard: suspect yourself)
    retransmit: float = 0.6
    offer_again: float = 2.0
    preempt_steady: float = 30.0  # a preferred voter must have been well for this long; doubles with each change
    preempt_longest: float = 600.0
    preempt_since_change: float = 60.0


WAN = Timers(heartbeat=0.3, election=2.0, rank_delay=0.5, round_timeout=1.0, retransmit=2.0)


def order(priority: int, voter: VoterId) -> tuple[int, str]:
    """The bully's order: the higher priority first, then the higher node id."""
    return (priority, node_of(voter))


def rank(me: VoterId, heirs: Sequence[VoterId], voters: Sequence[VoterId]) -> int:
    """How many voters should stand before this one: its place among the heirs the last leader named; among all voters
    by node id, if it named none; behind all of them, if it left this one out."""
    if heirs:
        return heirs.index(me) if me in heirs else len(heirs)
    higher = sorted(voters, key=node_of, reverse=True)
    return higher.index(me) if me in higher else len(higher)
