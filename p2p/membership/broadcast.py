"""What is still to be told: updates that ride on messages, each sent a bounded number of times (SWIM §4.1).

`Broadcasts` is the queue that everybody's messages draw from, those sent least first. `Feed` is for outbound-only
members, who are never called: their anchors remember how far each has been told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from itertools import islice
from math import ceil, log10

from p2p.ids import NodeId
from p2p.membership.member import Member

FEED_ENTRIES = 1_024  # newest changes an anchor can replay; who missed more compares the full state


def retransmit_limit(members: int, mult: int) -> int:
    """mult x ceil(log10(n + 1)): enough for an update to reach everybody with high probability (SWIM §4.1)."""
    return mult * ceil(log10(members + 1)) if members > 0 else mult


class Broadcasts:
    """At most one update a node: a newer one takes the place of the older. Hence bounded by the number of members."""

    def __init__(self) -> None:
        self._tiers: list[dict[NodeId, Member]] = []  # index = how often sent; each a stack, the newest on top
        self._tier_of: dict[NodeId, int] = {}

    def __len__(self) -> int:
        return len(self._tier_of)

    def __contains__(self, node: NodeId) -> bool:
        return node in self._tier_of

    def put(self, member: Member) -> None:
        self.drop(member.node)
        self._push(member, 0)

    def drop(self, node: NodeId) -> None:
        tier = self._tier_of.pop(node, None)
        if tier is not None:
            del self._tiers[tier][node]

    def clear(self) -> None:
        self._tiers.clear()
        self._tier_of.clear()

    def take(
        self, budget: int, limit: int, *, but: Collection[NodeId] = (), uncounted: NodeId | None = None
    ) -> list[Member]:
        """What fits into `budget` bytes, those sent least first, newest first among equals; none about `but`.

        An update sent `limit` times is forgotten; one about `uncounted` does not count as sent by this.
        """
        taken: list[tuple[int, Member]] = []
        aside: list[tuple[int, Member]] = []
        for sent, tier in enumerate(self._tiers):
            while tier and budget > 0:
                node, member = tier.popitem()
                del self._tier_of[node]
                if node in but:
                    aside.append((sent, member))
                elif (size := member.size()) > budget:
                    aside.append((sent, member))
                    budget = 0
                else:
                    budget -= size
                    taken.append((sent, member))
            if budget <= 0:
                break
        for sent, member in reversed(aside):
            self._push(member, sent)
        for sent, member in reversed(taken):
            if member.node == uncounted:
                self._push(member, sent)
            elif sent + 1 < limit:
                self._push(member, sent + 1)
        return [member for _, member in taken]

    def _push(self, member: Member, sent: int) -> None:
        while len(self._tiers) <= sent:
            self._tiers.append({})
        self._tiers[sent][member.node] = member
        self._tier_of[member.node] = sent

    def check_invariants(self) -> None:
        assert sum(map(len, self._tiers)) == len(self._tier_of)
        assert all(node in self._tiers[tier] for node, tier in self._tier_of.items())


class Feed:
    """The newest changes in order, and for each outbound-only member how far it has been told."""

    def __init__(self) -> None:
        self._changes: deque[tuple[int, NodeId]] = deque(maxlen=FEED_ENTRIES)
        self._newest: dict[NodeId, int] = {}  # node -> its newest change; older ones of it are skipped
        self._told: dict[NodeId, int] = {}
        self._count = 0

    def changed(self, node: NodeId) -> None:
        if not self._told:
            return  # nobody here is outbound-only
        self._count += 1
        if len(self._changes) == FEED_ENTRIES:
            number, oldest = self._changes[0]
            if self._newest.get(oldest) == number:
                del self._newest[oldest]
        self._changes.append((self._count, node))
        self._newest[node] = self._count

    def listener(self, node: NodeId) -> None:
        """Begins to remember for `node`, from now on."""
        self._told.setdefault(node, self._count)

    def forget(self, node: NodeId) -> None:
        self._told.pop(node, None)

    def unheard(self, listener: NodeId, most: int) -> list[tuple[int, NodeId]]:
        """Up to `most` (number, node) that `listener` has not been told, oldest first; then say `told`."""
        behind = self._count - self._told.get(listener, self._count)
        found: list[tuple[int, NodeId]] = []
        for change in islice(reversed(self._changes), behind):
            if self._newest.get(change[1]) == change[0]:
                found.append(change)
        return found[::-1][:most]

    def told(self, listener: NodeId, number: int) -> None:
        self._told[listener] = number
