"""The identity of a lane: what placement must know of a job, as one canonical text. Pure.

The queue keeps equal texts once (`shapes`) and does not look inside. In it are the requirements as their author gave
them, the hints of failed attempts (`avoid`, `gpu_memory_above_mb`), and under ``lane`` what else makes jobs equal to
placement: their group, their kind, how long one may run, and whether it may be asked to make way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

HINTS = ("avoid", "gpu_memory_above_mb")
_OWN = ("lane", "nodes", "prefer", *HINTS)  # not the author's requirements of one node


class LaneKey(NamedTuple):
    """What of a lane is not a requirement of nodes. `bound_ms`: the longest an attempt may take, 0 if nothing says."""

    group: str = "default"
    kind: str = "command"
    bound_ms: int = 0
    preemptible: bool = True


class Head(NamedTuple):
    """A pending job as placement sees it: its number, its priority and its lane's number."""

    seq: int
    priority: int
    shape: int


def lane_text(requires: Mapping[str, Any], key: LaneKey, *, nodes: int = 1, prefer: str | None = None) -> str:
    """The canonical text of a lane."""
    told: dict[str, Any] = {**requires, "lane": list(key)}
    if nodes > 1:
        told["nodes"] = nodes
    if prefer is not None:
        told["prefer"] = prefer
    return json.dumps(told, sort_keys=True, separators=(",", ":"))


@lru_cache(maxsize=32_768)
def lane_key(text: str) -> LaneKey:
    """What `lane_text` was given; defaults for a text from before there were lanes."""
    return LaneKey(*json.loads(text).get("lane", ()))


def shown_requires(text: str) -> dict[str, Any]:
    """The requirements as people see them."""
    return {name: value for name, value in json.loads(text).items() if name not in _OWN}


def shown_hints(text: str) -> dict[str, Any]:
    """What failed attempts have taught: which workers it keeps away from, how large its GPUs must be."""
    told = json.loads(text)
    return {name: told[name] for name in HINTS if name in told}
