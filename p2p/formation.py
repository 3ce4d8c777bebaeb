"""How blank nodes become one cluster, or join one: pure decisions (DESIGN §3, "Starting rules"; PROTOCOL §2.9).

Every blank node asks whoever it was told of, and whoever those were told of, who they are. If anybody belongs to a
cluster, it joins that. If all of them are blank and all can be reached, the one of them that the bully's order puts
first founds the cluster, once every other has confirmed that it sees the very same set. In every other case it waits
and says for whom: a node that founded a cluster while somebody could not be asked might found a second one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from p2p.election.rank import order
from p2p.ids import ClusterId, DiskId, NodeId, voter_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What a node says of itself to whoever asks. `addresses` are those it was told of."""

    node: NodeId
    disk: DiskId
    cluster: ClusterId
    priority: int
    addresses: tuple[str, ...]
    version: str
    protocol: int
    time_ms: int
    dialable: bool = True
    votes: bool = True  # False: it was told never to


class Wait(NamedTuple):
    """Nothing can be decided yet."""

    why: str


class Join(NamedTuple):
    """A cluster exists: join it through these addresses."""

    cluster: ClusterId
    through: tuple[str, ...]


class Found(NamedTuple):
    """This node is to found a cluster, once all of `others` (by address) confirm that they see `members`."""

    members: tuple[tuple[NodeId, DiskId], ...]
    others: tuple[str, ...]


class Refuse(NamedTuple):
    """The addresses lead to what cannot become one cluster; a person must decide."""

    why: str


Decision = Wait | Join | Found | Refuse
MAX_CLOSURE = 128


def members_seen(me: Hello, asked: Mapping[str, Hello | str]) -> tuple[tuple[NodeId, DiskId], ...]:
    """Everybody that this node has reached, itself included, in one order for all."""
    found = {(me.node, me.disk)} | {(h.node, h.disk) for h in asked.values() if isinstance(h, Hello)}
    return tuple(sorted(found))


def to_ask(me: Hello, asked: Mapping[str, Hello | str]) -> set[str]:
    """The addresses that are to be asked: those this node was told of, and those they were told of."""
    wanted = set(me.addresses)
    for hello in asked.values():
        if isinstance(hello, Hello):
            wanted |= set(hello.addresses)
    return wanted


def too_many(me: Hello, asked: Mapping[str, Hello | str]) -> bool:
    """Whether there is no end of addresses: nobody is asked any more, and nothing can be founded."""
    return len(to_ask(me, asked)) > MAX_CLOSURE


def decide(me: Hello, asked: Mapping[str, Hello | str]) -> Decision:
    """`asked` gives by address what each said, or in a sentence why it could not be asked."""
    hellos = {address: hello for address, hello in asked.items() if isinstance(hello, Hello)}
    others = {address: hello for address, hello in hellos.items() if hello.disk != me.disk}
    clusters = sorted({hello.cluster for hello in others.values() if hello.cluster})
    if len(clusters) > 1:
        return Refuse(
            f"the peers belong to {len(clusters)} clusters ({', '.join(clusters)}), which never merge: "
            "name the members of one in --peers"
        )
    if clusters:
        return Join(clusters[0], tuple(sorted(a for a, hello in others.items() if hello.cluster)))
    twins = next((hello for hello in others.values() if hello.node == me.node), None)
    if twins is not None:
        return Refuse(f"another node calls itself {me.node} too: give one of them another --node-id")
    if too_many(me, asked):
        return Refuse(f"the peers name more than {MAX_CLOSURE} addresses: name the same few in --peers everywhere")
    unasked = to_ask(me, asked) - set(hellos)
    if unasked:
        address = sorted(unasked)[0]
        why = asked.get(address, "not asked yet")
        more = f" and {len(unasked) - 1} more" if len(unasked) > 1 else ""
        return Wait(f"no peer belongs to a cluster yet, and {address}{more} cannot be reached ({why})")
    if not me.dialable and not others:
        return Wait("nobody else is there yet, and this node cannot be dialled")
    candidates = [hello for hello in (me, *others.values()) if hello.dialable and hello.votes]
    if not candidates:
        return Wait("none of the nodes that are there may vote and can be dialled: start one without --no-voter")
    founder = max(candidates, key=lambda hello: order(hello.priority, voter_id(hello.node, hello.disk)))
    if founder.disk != me.disk:
        return Wait(f"{founder.node} is to found the cluster")
    return Found(members_seen(me, asked), tuple(sorted(others)))


def confirms(me: Hello, asked: Mapping[str, Hello | str], members: tuple[tuple[NodeId, DiskId], ...]) -> str:
    """Why this node does not agree that somebody founds a cluster of these members; empty if it does."""
    if me.cluster:
        return f"{me.node} belongs to cluster {me.cluster}"
    if (me.node, me.disk) not in members:
        return f"{me.node} is not among the members"
    mine = members_seen(me, asked)
    if mine != members:
        return f"{me.node} sees {', '.join(node for node, _ in mine)}"
    if too_many(me, asked):
        return f"{me.node} is told of more than {MAX_CLOSURE} addresses"
    unasked = to_ask(me, asked) - {a for a, hello in asked.items() if isinstance(hello, Hello)}
    return f"{me.node} cannot reach {sorted(unasked)[0]}" if unasked else ""
