"""Which links stand, which one carries what to whom, and what their coming and going says about a node.

Decides by name and age alone; opens and closes nothing. The link we dialled goes first: it is the one we keep open.
Else the newest that the peer has opened: an older one may be what is left of a connection that the peer has given up.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from p2p.ids import NodeId, VoterId


class Standing(Protocol):
    """What the table knows of a link."""

    @property
    def voter(self) -> VoterId: ...
    @property
    def node(self) -> NodeId: ...
    @property
    def boot(self) -> str: ...
    @property
    def channel(self) -> str: ...
    @property
    def dialed(self) -> bool: ...


L = TypeVar("L", bound=Standing)
HINTING = "control"  # only its links are told about: a process that dies loses all of its links at once


class LinkTable(Generic[L]):
    """`best` is read for every message that is sent."""

    def __init__(self) -> None:
        self.best: dict[tuple[VoterId, str], L] = {}
        self._links: list[L] = []  # oldest first; tens, at most a few hundred
        self._told: dict[NodeId, bool] = {}

    @property
    def links(self) -> list[L]:
        """All that stand, oldest first."""
        return list(self._links)

    def __contains__(self, link: L) -> bool:
        return link in self._links

    def __len__(self) -> int:
        return len(self._links)

    def add(self, link: L) -> bool:
        """True: this is news, the node can be reached."""
        self._links.append(link)
        self._choose(link.voter, link.channel)
        return link.channel == HINTING and self._tell(link.node, True)

    def remove(self, link: L, *, broken: bool) -> bool:
        """True: this is news, the last link with the node has broken. One that was closed on purpose is no news."""
        self._links.remove(link)
        self._choose(link.voter, link.channel)
        if link.channel != HINTING or self._stands(link.node):
            return False
        if not broken:
            self._told.pop(link.node, None)
            return False
        return self._tell(link.node, False)

    def refused(self, node: NodeId) -> bool:
        """Nobody listens where the node should be. True: this is news."""
        return not self._stands(node) and self._tell(node, False)

    def rivals(self, voter: VoterId, boot: str) -> list[L]:
        """The links with this voter that another start of it had opened."""
        return [link for link in self._links if link.voter == voter and link.boot != boot]

    def newest(self, node: NodeId, channel: str) -> L | None:
        """The newest link with a node, whatever its disk and whoever dialled."""
        return next((link for link in reversed(self._links) if (link.node, link.channel) == (node, channel)), None)

    def _choose(self, voter: VoterId, channel: str) -> None:
        able = [link for link in self._links if (link.voter, link.channel) == (voter, channel)]
        if able:
            self.best[voter, channel] = next((link for link in reversed(able) if link.dialed), able[-1])
        else:
            self.best.pop((voter, channel), None)

    def _stands(self, node: NodeId) -> bool:
        return any(link.node == node and link.channel == HINTING for link in self._links)

    def _tell(self, node: NodeId, up: bool) -> bool:
        if self._told.get(node) is up:
            return False
        self._told[node] = up
        return True
