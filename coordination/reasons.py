"""Why a need is not served, in words and numbers: per requirement on how many nodes it fails, and the nearest miss.
Pure. What is said here is what `Node.admits` and `Node.fitting` decide by, in the same order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from coordination.placement import WHOLE, Need, Node


class Miss(NamedTuple):
    """One requirement that a node does not meet. `near` orders the misses of one requirement, the nearest last."""

    wants: str
    near: float
    has: str  # what comes closest; "" if there is no more or less about it


def misses(need: Need, node: Node, *, idle: bool) -> dict[str, Miss]:
    """The requirements that this node does not meet: even when `idle`, or as it is now."""
    found: dict[str, Miss] = {}
    amounts = (
        ("cpus", need.cpu_milli, node.cpu_milli, node.total_cpu_milli, "cores", WHOLE),
        ("memory", need.memory_mb, node.memory_mb, node.total_memory_mb, "MB of memory", 1),
        ("disk", need.disk_mb, node.disk_mb, node.total_disk_mb, "MB of disk", 1),
    )
    most = "largest node has" if idle else "most free is"
    for name, wanted, free, total, unit, scale in amounts:
        there = total if idle else min(free, total)  # measured apart, so more may be free than there is
        if wanted > there:
            have = max(there, 0) / scale
            found[name] = Miss(f"needs {wanted / scale:g} {unit}", there, f"the {most} {have:g} on {node.name}")
    if need.node is not None and need.node != node.name:
        found["node"] = Miss(f"asks for node {need.node}", 0, "")
    for label, value in need.labels:
        if node.labels.get(label) != value:
            there_is = node.labels.get(label)
            has = f"{node.name} has {label}={there_is or '(none)'}"
            found[f"label {label}"] = Miss(f"needs label {label}={value}", float(there_is is not None), has)
    for label, value in need.not_labels:
        if node.labels.get(label) == value:
            found[f"not {label}"] = Miss(f"must not have label {label}={value}", 0, "")
    if node.name in need.avoid:
        found["avoid"] = Miss("keeps away from nodes where it failed", 0, "")
    if not idle and need.anti_affinity is not None and node.tags.get(need.anti_affinity):
        found["anti_affinity"] = Miss(f"shares no node with another job of anti_affinity {need.anti_affinity}", 0, "")
    if need.gpus:
        found |= _gpu_misses(need, node, idle=idle)
    return found


def _gpu_misses(need: Need, node: Node, *, idle: bool) -> dict[str, Miss]:
    count = f"{need.gpus} GPU{'s' if need.gpus > 1 else ''}"
    right = [
        gpu
        for gpu in node.gpus
        if (need.model is None or need.model.search(gpu.model)) and gpu.capability >= need.capability
    ]
    if len(right) < need.gpus:
        kind = f" of model {need.shape.get('gpu_model')}" if need.model is not None else ""
        least = f" of compute capability {need.shape.get('min_compute_capability')}" if need.capability else ""
        return {"gpus": Miss(f"needs {count}{kind}{least}", len(right), f"the most on one node is {len(right)}")}
    each = "one GPU" if need.gpus == 1 else f"each of {count}"
    wanted = max(need.gpu_memory_mb, need.gpu_memory_above_mb + 1 if need.gpu_memory_above_mb else 0)
    large = [gpu for gpu in right if gpu.total_mb >= wanted]
    if len(large) < need.gpus:
        near, most = _nearest_memory([gpu.total_mb for gpu in right], len(large), need.gpus)
        told = f"the largest GPU has {most} MB on {node.name}" if need.gpus == 1 else f"the most on one node is {most}"
        return {"gpu memory": Miss(f"needs {wanted} MB on {each}", near, told)}
    if idle:
        return {}
    free = [gpu for gpu in large if gpu.share >= need.share]
    if len(free) < need.gpus:
        wants = f"needs {count}, whole" if need.share == WHOLE else f"needs {need.share / WHOLE:g} of a GPU"
        top = max(large, key=lambda gpu: gpu.share)
        has = f"the most free on one node is {len(free)}"
        if need.gpus == 1:
            has = f"the most free of one is {max(top.share, 0) / WHOLE:g} on {node.name}"
        return {"gpu share": Miss(wants, len(free) + top.share / 1e6, has)}
    enough = sum(gpu.memory_mb >= need.gpu_memory_mb for gpu in free)
    if enough < need.gpus:
        near, most = _nearest_memory([gpu.memory_mb for gpu in free], enough, need.gpus)
        one, many = f"the largest free is {most} MB on {node.name}", f"the most free on one node is {most}"
        told = one if need.gpus == 1 else many
        return {"gpu memory": Miss(f"needs {need.gpu_memory_mb} MB on {each}", near, told)}
    return {}


def _nearest_memory(memories: Iterable[int], enough: int, wanted: int) -> tuple[float, int]:
    """(how near it comes, what to say): of one GPU the largest memory; of several, how many have `enough`, for that
    the largest has plenty would explain nothing."""
    top = max(memories)
    return (top, top) if wanted == 1 else (enough + top / 1e9, enough)


def tally(need: Need, nodes: Iterable[Node], *, idle: bool) -> tuple[str, int, int]:
    """(the reasons in one sentence, on how many nodes it fails, of how many)."""
    failing: dict[str, list[Miss]] = {}
    failed = total = 0
    for node in nodes:
        total += 1
        found = misses(need, node, idle=idle)
        failed += bool(found)
        for name, miss in found.items():
            failing.setdefault(name, []).append(miss)
    sentences = []
    for missed in failing.values():
        nearest = max(missed, key=lambda miss: miss.near)
        has = f"; {nearest.has}" if nearest.has else ""
        times = f" (fails on {len(missed)} of {total} nodes)" if total > 1 else ""
        sentences.append(f"{nearest.wants}{has}{times}")
    return "; ".join(sentences), failed, total
