"""Majority arithmetic, apart from everything that uses it (the idea is etcd-io/raft's ``quorum/``)."""

from __future__ import annotations

from collections.abc import Collection


def majority(voters: int) -> int:
    """The least number of voters that is more than half; 1 of 1, 2 of 2 and 3, 3 of 4 and 5."""
    if voters < 1:
        raise ValueError("a cluster has at least one voter")
    return voters // 2 + 1


def committed(match_indexes: Collection[int]) -> int:
    """The highest index that a majority of voters hold on disk, given each voter's match index (Raft §5.3)."""
    return sorted(match_indexes, reverse=True)[majority(len(match_indexes)) - 1]
