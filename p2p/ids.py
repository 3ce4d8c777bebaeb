"""The small names every layer shares. Decides nothing."""

from __future__ import annotations

from typing import NewType

NodeId = NewType("NodeId", str)  # the operator's stable name of a node
DiskId = NewType("DiskId", str)  # 128 random bits made with a store
VoterId = NewType("VoterId", str)  # "<node id>@<disk id>": an emptied disk never votes as its old self, PROTOCOL §2.8
ClusterId = NewType("ClusterId", str)  # empty: belongs to no cluster yet
Term = NewType("Term", int)
Index = NewType("Index", int)  # 1 is the first entry; 0 = none


def voter_id(node: NodeId, disk: DiskId) -> VoterId:
    """The identity under which a store votes. A node id has no ``@``."""
    return VoterId(f"{node}@{disk}")


def node_of(voter: VoterId) -> NodeId:
    return NodeId(voter.partition("@")[0])


def disk_of(voter: VoterId) -> DiskId:
    return DiskId(voter.partition("@")[2])
