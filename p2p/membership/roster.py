"""The table of members and what is derived from it: who to probe, who can be dialled, the digest, the tombstones.

`put` is the only way in; everything derived is kept up to date there at constant cost, so nothing ever scans the
table but a full state, which is made for a member that differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import nsmallest

from p2p.ids import NodeId
from p2p.membership.figures import MAX_TOMBSTONES, Figures
from p2p.membership.member import Member, State
from p2p.membership.message import FullState
from p2p.membership.rota import Draw, Rota


class Roster:
    """`me` is in the table and the digest, and in none of the rotas."""

    def __init__(self, me: Member, draw: Draw, figures: Figures) -> None:
        self._figures = figures
        self._me = me.node
        self.members: dict[NodeId, Member] = {}
        self.ring = Rota(draw)  # peers to probe: alive and suspect
        self.dialable = Rota(draw)  # those of them with an address
        self.lost = Rota(draw)  # dead ones with an address: they may be on the other side of a partition
        self.gone_at: dict[NodeId, float] = {}  # when the dead died and the left left
        self._sum = 0
        self.put(me, 0.0)

    @property
    def size(self) -> int:
        """Members here, this node among them: the n of every formula."""
        return len(self.ring) + 1

    def get(self, node: NodeId) -> Member | None:
        return self.members.get(node)

    def put(self, member: Member, now: float) -> None:
        node = member.node
        old = self.members.get(node)
        if old is not None and old.state.here:
            self._sum ^= old.fingerprint()
        if member.state.here:
            self._sum ^= member.fingerprint()
        self.members[node] = member
        if node == self._me:
            return
        if member.state.here:
            self.gone_at.pop(node, None)
            self.lost.discard(node)
            self.ring.add(node)
            (self.dialable.add if member.address else self.dialable.discard)(node)
        else:
            self.ring.discard(node)
            self.dialable.discard(node)
            self.gone_at.setdefault(node, now)
            (self.lost.add if member.state is State.DEAD and member.address else self.lost.discard)(node)

    def digest(self) -> bytes:
        """16 bytes that are equal where the same members are believed here, in the same records.

        A sum of the records' hashes: order does not matter and a change costs the same at any size. Tombstones are
        left out, or their expiry at slightly different times would make whole states travel.
        """
        return self._sum.to_bytes(16, "big")

    def full(self, now: float) -> FullState:
        """Everything, with the ages of the tombstones, so that they end everywhere at the same time."""
        return self.state_of(self.members.values(), now)

    def state_of(self, members: Iterable[Member], now: float) -> FullState:
        chosen = tuple(members)
        ages = {m.node: int(now - self.gone_at[m.node]) for m in chosen if m.node in self.gone_at}
        return FullState(chosen, ages)

    def difference(self, theirs: FullState) -> Iterator[Member]:
        """What this table has that the other one lacks or has in an older version."""
        known = {member.node: member for member in theirs.members}
        for node, mine in self.members.items():
            other = known.get(node)
            if mine.overrides(other) if other is not None else mine.state.here:
                yield mine

    def forget(self, now: float) -> list[NodeId]:
        """Drops tombstones that are old enough, and the oldest beyond the limit."""
        excess = max(len(self.gone_at) - MAX_TOMBSTONES, 0)
        oldest = set(nsmallest(excess, self.gone_at, key=self.gone_at.__getitem__))
        horizon = now - self._figures.tombstone_seconds
        dropped = [node for node, at in self.gone_at.items() if at <= horizon or node in oldest]
        for node in dropped:
            self.lost.discard(node)
            del self.members[node], self.gone_at[node]
        return dropped

    def remove(self, node: NodeId) -> None:
        """Unlearns a member altogether, without a tombstone."""
        member = self.members.pop(node)
        if member.state.here:
            self._sum ^= member.fingerprint()
        for rota in (self.ring, self.dialable, self.lost):
            rota.discard(node)
        self.gone_at.pop(node, None)

    def check_invariants(self) -> None:
        """Everything derived agrees with the table."""
        here = {node for node, member in self.members.items() if member.state.here} - {self._me}
        assert set(self.ring) == here and len(self.ring) == len(here)
        assert set(self.dialable) == {node for node in here if self.members[node].address}
        assert set(self.gone_at) == {n for n, m in self.members.items() if not m.state.here} - {self._me}
        assert set(self.lost) == {n for n in self.gone_at if self.members[n].state is State.DEAD and self._dialled(n)}
        total = 0
        for member in self.members.values():
            total ^= member.fingerprint() if member.state.here else 0
        assert total == self._sum, "the digest does not match the table"

    def _dialled(self, node: NodeId) -> bool:
        return self.members[node].address is not None
