"""The order of standing."""

from __future__ import annotations

import pytest

from p2p.election.rank import WAN, Timers, order, rank
from p2p.ids import VoterId

A, B, C, D = (VoterId(name) for name in ("a@9", "b@1", "c@5", "d@3"))

RANKS = {
    "the first heir stands first": (B, (B, A), 0),
    "the second heir second": (A, (B, A), 1),
    "who is no heir stands behind all heirs": (D, (B, A), 2),
    "without heirs the highest node id stands first": (C, (), 0),
    "without heirs the lowest node id stands last": (A, (), 2),
    "who does not vote stands behind all voters": (D, (), 3),
}


@pytest.mark.parametrize(("me", "heirs", "turn"), RANKS.values(), ids=RANKS)
def test_a_rank_is_how_many_stand_before(me: VoterId, heirs: tuple[VoterId, ...], turn: int) -> None:
    assert rank(me, heirs, (A, B, C)) == turn


def test_priority_comes_before_the_node_id_and_the_disk_counts_for_nothing() -> None:
    assert order(1, A) > order(0, D)
    assert order(0, D) > order(0, A)
    assert order(0, VoterId("a@1")) == order(0, VoterId("a@2"))


@pytest.mark.parametrize("timers", [Timers(), WAN], ids=["lan", "wan"])
def test_the_timers_fit_together(timers: Timers) -> None:
    """A lease must outlast several heartbeats; a candidate must wait longer than a lease; two ranks must not meet."""
    assert timers.election >= 5 * timers.heartbeat
    assert timers.guard > 0
    assert timers.jitter < timers.rank_delay
    assert timers.disk_stall >= timers.election / 2
    assert timers.round_timeout <= timers.longest_backoff
    assert timers.preempt_steady < timers.preempt_longest
