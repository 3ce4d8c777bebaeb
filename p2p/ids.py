"""The small names every layer shares. Decides nothing."""

from __future__ import annotations

from typing import NewType

NodeId = NewType("NodeId", str)  # the operator's stable name of a node
DiskId = NewType("DiskId", str)  # 128 random bits made with a store; a voter is (node id, disk id), PROTOCOL §2.8
ClusterId = NewType("ClusterId", str)
Term = NewType("Term", int)
Index = NewType("Index", int)  # 1 is the first entry; 0 = none
