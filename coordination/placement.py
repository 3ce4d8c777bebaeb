"""Which pending jobs go to a worker that offers room. Pure: (shapes, heads, offer) -> picks, and words for refusals.

Equal requirements are one *shape*, so the cost of a decision depends on shapes and on what fits, never on how many
jobs wait. A shape that does not fit is skipped whole, so a large job at the head does not block the small ones behind
it on this worker. Reservation, fair share and packing across nodes belong here too when there is more than one node
to choose from; today the order is priority, then first come first served.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuOffer:
    """The free part of one GPU: memory in MiB, `share_free` 0..1 of its time."""

    uuid: str
    model: str = ""
    memory_mb: int = 0
    memory_free_mb: int = 0
    share_free: float = 1.0
    compute_capability: str = "0.0"
    healthy: bool = True
    numa_node: int = -1
    links: tuple[str, ...] = ()  # uuids of its NVLink peers
    utilization: float | None = None  # per cent, as last measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one node has free now. CPUs are cores, memory and disk MiB."""

    node: str
    cpus: float = 0.0
    memory_mb: int = 0
    disk_mb: int = 0
    gpus: tuple[GpuOffer, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)


class PendingJob(Protocol):
    """What placement reads of a pending job: `seq` orders it among equals of its `priority`."""

    @property
    def seq(self) -> int: ...
    @property
    def priority(self) -> int: ...


class Placed(NamedTuple):
    """A decision: job number `seq` on these GPUs (uuids) of the offering node."""

    seq: int
    gpus: tuple[str, ...]


Shape = dict[str, Any]


def read_shape(requires: str) -> Shape:
    """The requirements of a shape from their canonical JSON, with the defaults of `Requires` for what is absent."""
    return with_defaults(json.loads(requires))


def with_defaults(requires: Mapping[str, Any]) -> Shape:
    """Requirements of which some were left out, with the defaults of `Requires` for those."""
    return {
        "cpus": 1.0,
        "memory_mb": 0,
        "disk_mb": 0,
        "gpus": 0,
        "gpu_memory_mb": 0,
        "gpu_share": 1.0,
        **requires,
    }


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _gpu_fits(shape: Shape, gpu: GpuOffer) -> bool:
    model = shape.get("gpu_model")
    least = shape.get("min_compute_capability")
    return (
        gpu.share_free + 1e-9 >= shape["gpu_share"]
        and gpu.memory_free_mb >= shape["gpu_memory_mb"]
        and (model is None or re.search(model, gpu.model) is not None)
        and (least is None or _version(gpu.compute_capability) >= _version(least))
    )


def choose_gpus(shape: Shape, offer: Offer) -> tuple[str, ...] | None:
    """The GPUs this shape would get, or None. Shares go to the fullest GPU that still fits, whole demands to the
    smallest that fit, so that large whole GPUs stay whole."""
    wanted = shape["gpus"]
    if not wanted:
        return ()
    fitting = [gpu for gpu in offer.gpus if _gpu_fits(shape, gpu)]
    if len(fitting) < wanted:
        return None
    fitting.sort(key=lambda gpu: (gpu.share_free, gpu.memory_free_mb, gpu.uuid))
    return tuple(gpu.uuid for gpu in fitting[:wanted])


def misfits(shape: Shape, offer: Offer) -> list[str]:
    """Why this shape does not fit the offer, one sentence a requirement; empty if it fits."""
    why: list[str] = []
    for name, unit in (("cpus", "cores"), ("memory_mb", "MB of memory"), ("disk_mb", "MB of disk")):
        free = getattr(offer, name)
        if shape[name] > free + 1e-9:
            why.append(f"needs {shape[name]:g} {unit}; {free:g} free on {offer.node}")
    node = shape.get("node")
    if node is not None and node != offer.node:
        why.append(f"asks for node {node}; this is {offer.node}")
    for name, value in shape.get("labels", {}).items():
        if offer.labels.get(name) != value:
            why.append(f"needs label {name}={value}; {offer.node} has {name}={offer.labels.get(name, '(none)')}")
    if shape.get("nodes", 1) > 1:
        why.append(f"needs {shape['nodes']} nodes at once; gangs are not placed yet")
    if choose_gpus(shape, offer) is None:
        why.append(_gpu_misfit(shape, offer))
    return why


def _gpu_misfit(shape: Shape, offer: Offer) -> str:
    if not offer.gpus:
        return f"needs {shape['gpus']} GPU(s); {offer.node} has none free"
    largest = max(offer.gpus, key=lambda gpu: gpu.memory_free_mb)
    fitting = sum(_gpu_fits(shape, gpu) for gpu in offer.gpus)
    wants = f"{shape['gpu_memory_mb']} MB free each" if shape["gpu_memory_mb"] else "any"
    model = f" of model {shape['gpu_model']}" if shape.get("gpu_model") else ""
    return (
        f"needs {shape['gpus']} GPU(s){model} ({wants}); {fitting} of {len(offer.gpus)} on {offer.node} fit, "
        f"the largest free is {largest.memory_free_mb} MB"
    )


def take(offer: Offer, shape: Shape, gpus: Sequence[str]) -> Offer:
    """What is left of the offer once this shape is placed on these GPUs."""
    taken = set(gpus)
    left = tuple(
        replace(
            gpu,
            share_free=gpu.share_free - shape["gpu_share"],
            memory_free_mb=gpu.memory_free_mb - shape["gpu_memory_mb"],
        )
        if gpu.uuid in taken
        else gpu
        for gpu in offer.gpus
    )
    return replace(
        offer,
        cpus=offer.cpus - shape["cpus"],
        memory_mb=offer.memory_mb - shape["memory_mb"],
        disk_mb=offer.disk_mb - shape["disk_mb"],
        gpus=left,
    )


def choose(
    shapes: Iterable[tuple[int, Shape]],
    heads: Callable[[int], Iterator[PendingJob]],
    offer: Offer,
    max_jobs: int,
) -> list[Placed]:
    """The jobs this worker gets, best first.

    `shapes` are those with pending jobs; ``heads(shape)`` yields a shape's pending jobs in order and is asked only for
    shapes that fit. A merge by (priority, seq) over the fitting shapes takes one job at a time; a shape that has
    stopped fitting leaves the merge.
    """
    known = dict(shapes)
    streams: dict[int, Iterator[PendingJob]] = {}
    heap: list[tuple[int, int, int]] = []

    def push(number: int) -> None:
        job = next(streams[number], None)
        if job is not None:
            heapq.heappush(heap, (-job.priority, job.seq, number))

    for number, shape in known.items():
        if not misfits(shape, offer):
            streams[number] = heads(number)
            push(number)
    picks: list[Placed] = []
    while heap and len(picks) < max_jobs:
        _, seq, number = heapq.heappop(heap)
        shape = known[number]
        gpus = None if misfits(shape, offer) else choose_gpus(shape, offer)
        if gpus is None:
            continue
        picks.append(Placed(seq, gpus))
        offer = take(offer, shape, gpus)
        push(number)
    return picks
