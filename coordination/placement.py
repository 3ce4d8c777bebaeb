"""What a job needs, what a node has free, and whether the one fits the other. Pure; the words for why it does not.

Quantities are whole numbers in here (thousandths of a core, thousandths of a GPU's time, MiB), so that what is taken
and given back a million times adds up to exactly what it was, on every machine. Demands are rounded up, offers down.

Which of the nodes that fit is best is `coordination.scoring`; finding it without looking at every node each time is
`coordination.fleet`; whose turn it is, what is kept free for whom, and who must make way is `coordination.planner`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

WHOLE = 1000  # thousandths of one GPU, and of one core
MAX_KNOWN_NEEDS = 32_768
MAX_ADMITTED = 4_096  # needs that a node remembers whether it could ever serve


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
    numa_node: int = -1  # -1: not known
    links: tuple[str, ...] = ()  # uuids of the GPUs of this node that NVLink joins it to
    utilization: float | None = None  # 0..100 as measured; None: not measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one node has free now. CPUs are cores, memory and disk MiB."""

    node: str
    cpus: float = 0.0
    memory_mb: int = 0
    disk_mb: int = 0
    gpus: tuple[GpuOffer, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)


Shape = dict[str, Any]
_DEFAULTS: Shape = {"cpus": 1.0, "memory_mb": 0, "disk_mb": 0, "gpus": 0, "gpu_memory_mb": 0, "gpu_share": 1.0}


def read_shape(requires: str) -> Shape:
    """The requirements of a shape from their canonical JSON, with the defaults of `Requires` for what is absent."""
    return with_defaults(json.loads(requires))


def with_defaults(requires: Mapping[str, Any]) -> Shape:
    """Requirements of which some were left out, with the defaults of `Requires` for those."""
    return {**_DEFAULTS, **requires}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Need:
    """The requirements of one shape, compiled. Two are equal if they are the same object: `need_of` makes one a text.

    `avoid` and `gpu_memory_above_mb` come from failed attempts, not from the author: they hold only while some node
    could satisfy them at all (`Fleet`). `prefer` moves a kind of node to the front, and keeps none away.
    """

    cpu_milli: int = WHOLE
    memory_mb: int = 0
    disk_mb: int = 0
    gpus: int = 0
    share: int = WHOLE  # of each GPU, in thousandths
    gpu_memory_mb: int = 0  # of each GPU
    model: re.Pattern[str] | None = None
    capability: tuple[int, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    not_labels: tuple[tuple[str, str], ...] = ()
    node: str | None = None
    anti_affinity: str | None = None  # at most one running job with this word on a node
    nodes: int = 1  # a gang: this much of each of so many nodes
    prefer: str | None = None  # "gpus" or "memory"
    avoid: frozenset[str] = frozenset()
    gpu_memory_above_mb: int = 0
    shape: Shape = field(default_factory=dict)  # as it was written, for words

    @property
    def gpu_milli(self) -> int:
        """GPU time it takes of one node, in thousandths of a GPU."""
        return self.gpus * self.share


def compile_need(shape: Mapping[str, Any]) -> Need:
    """A need from requirements with `with_defaults` in place."""
    model, least = shape.get("gpu_model"), shape.get("min_compute_capability")
    return Need(
        cpu_milli=_up(shape["cpus"]),
        memory_mb=shape["memory_mb"],
        disk_mb=shape["disk_mb"],
        gpus=shape["gpus"],
        share=max(_up(shape["gpu_share"]), 1) if shape["gpus"] else WHOLE,
        gpu_memory_mb=shape["gpu_memory_mb"],
        model=re.compile(model) if model is not None else None,
        capability=_version(least) if least is not None else (),
        labels=tuple(sorted(shape.get("labels", {}).items())),
        not_labels=tuple(sorted(shape.get("not_labels", {}).items())),
        node=shape.get("node"),
        anti_affinity=shape.get("anti_affinity"),
        nodes=shape.get("nodes", 1),
        prefer=shape.get("prefer"),
        avoid=frozenset(shape.get("avoid", ())),
        gpu_memory_above_mb=shape.get("gpu_memory_above_mb", 0),
        shape=dict(shape),
    )


@lru_cache(maxsize=MAX_KNOWN_NEEDS)
def need_of(requires: str) -> Need:
    """The need of a shape's canonical JSON; the same object for the same text while it is remembered."""
    return compile_need(read_shape(requires))


@lru_cache(maxsize=MAX_KNOWN_NEEDS)
def without_hints(need: Need) -> tuple[Need, ...]:
    """The need, then with fewer and fewer of the hints of failed attempts, for when no node could satisfy them."""
    if not need.avoid and not need.gpu_memory_above_mb:
        return (need,)
    larger, elsewhere = replace(need, avoid=frozenset()), replace(need, gpu_memory_above_mb=0)
    return (need, larger, elsewhere, replace(larger, gpu_memory_above_mb=0))


def _up(value: float) -> int:
    return math.ceil(value * WHOLE - 1e-6)


def _down(value: float) -> int:
    return math.floor(value * WHOLE + 1e-6)


@lru_cache(maxsize=1024)
def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


@dataclass(slots=True)
class Gpu:
    """One GPU as placement counts it; `share` and `memory_mb` are what is free of it."""

    uuid: str
    model: str
    capability: tuple[int, ...]
    total_mb: int
    share: int
    memory_mb: int
    numa_node: int = -1
    links: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class Node:
    """What one node has, and how much of it is free. Mutable: `take` and `give` move the free part.

    `tags` counts the running jobs with an anti-affinity word.
    """

    name: str
    cpu_milli: int
    memory_mb: int
    disk_mb: int
    gpus: list[Gpu]
    labels: dict[str, str]
    total_cpu_milli: int
    total_memory_mb: int
    total_disk_mb: int
    tags: dict[str, int] = field(default_factory=dict)
    version: int = 0  # one more whenever what is free changes: see `Fleet`
    _admitted: dict[Need, tuple[int, ...] | None] = field(default_factory=dict)
    _number: dict[str, int] = field(default_factory=dict)  # of each GPU, by uuid

    @classmethod
    def of(cls, free: Offer, total: Offer | None = None) -> Node:
        """A node with this much free of `total` (of itself, if that is not known)."""
        total = total or free
        free_gpus = {gpu.uuid: gpu for gpu in free.gpus}
        gpus = []
        for gpu in sorted(total.gpus, key=lambda gpu: gpu.uuid):
            now = free_gpus.get(gpu.uuid)
            usable = now is not None and now.healthy and gpu.healthy
            gpus.append(
                Gpu(
                    uuid=gpu.uuid,
                    model=gpu.model,
                    capability=_version(gpu.compute_capability),
                    total_mb=gpu.memory_mb,
                    share=min(_down(now.share_free), WHOLE) if now is not None and usable else 0,
                    memory_mb=now.memory_free_mb if now is not None and usable else 0,
                    numa_node=gpu.numa_node,
                    links=gpu.links,
                )
            )
        return cls(
            name=free.node,
            cpu_milli=_down(free.cpus),
            memory_mb=free.memory_mb,
            disk_mb=free.disk_mb,
            gpus=gpus,
            labels=dict(free.labels),
            total_cpu_milli=_down(total.cpus),
            total_memory_mb=total.memory_mb,
            total_disk_mb=total.disk_mb,
            _number={gpu.uuid: n for n, gpu in enumerate(gpus)},
        )

    def same_kind(self, other: Node) -> bool:
        """Whether the two differ in nothing but what is free."""
        return (
            self.labels == other.labels
            and self.total_cpu_milli == other.total_cpu_milli
            and self.total_memory_mb == other.total_memory_mb
            and len(self.gpus) == len(other.gpus)
            and all(
                (a.uuid, a.model, a.capability, a.total_mb, a.numa_node, a.links)
                == (b.uuid, b.model, b.capability, b.total_mb, b.numa_node, b.links)
                for a, b in zip(self.gpus, other.gpus, strict=True)
            )
        )

    def become(self, other: Node) -> None:
        """Takes over what is free of another of the same kind."""
        self.cpu_milli, self.memory_mb, self.disk_mb = other.cpu_milli, other.memory_mb, other.disk_mb
        self.total_disk_mb, self.tags = other.total_disk_mb, other.tags
        for mine, its in zip(self.gpus, other.gpus, strict=True):
            mine.share, mine.memory_mb = its.share, its.memory_mb
        self.version += 1

    def copy(self) -> Node:
        """A copy whose free part moves by itself."""
        return Node(
            self.name,
            self.cpu_milli,
            self.memory_mb,
            self.disk_mb,
            [
                Gpu(g.uuid, g.model, g.capability, g.total_mb, g.share, g.memory_mb, g.numa_node, g.links)
                for g in self.gpus
            ],
            self.labels,
            self.total_cpu_milli,
            self.total_memory_mb,
            self.total_disk_mb,
            dict(self.tags),
            self.version,
            self._admitted,
            self._number,
        )

    # -- does it fit ------------------------------------------------------------------------------------------------

    def admits(self, need: Need) -> tuple[int, ...] | None:
        """Which of its GPUs may ever serve this need (numbers), or None if the node never can, even when idle."""
        if need.disk_mb > self.total_disk_mb:
            return None  # not remembered: others fill and free a disk all the time
        try:
            return self._admitted[need]
        except KeyError:
            if len(self._admitted) >= MAX_ADMITTED:
                self._admitted.clear()
            found = self._admitted[need] = self._admit(need)
            return found

    def _admit(self, need: Need) -> tuple[int, ...] | None:
        if need.cpu_milli > self.total_cpu_milli or need.memory_mb > self.total_memory_mb:
            return None
        if need.node is not None and need.node != self.name:
            return None
        labels = self.labels
        if self.name in need.avoid or any(labels.get(name) != value for name, value in need.labels):
            return None
        if any(labels.get(name) == value for name, value in need.not_labels):
            return None
        if not need.gpus:
            return ()
        good = tuple(n for n, gpu in enumerate(self.gpus) if _may_serve(need, gpu))
        return good if len(good) >= need.gpus else None

    def fitting(self, need: Need) -> list[int] | None:
        """The numbers of the GPUs that could serve this need now (empty if it asks for none), or None if the node
        does not fit now."""
        if need.cpu_milli > self.cpu_milli or need.memory_mb > self.memory_mb or need.disk_mb > self.disk_mb:
            return None
        admitted = self.admits(need)
        if admitted is None or (need.anti_affinity is not None and self.tags.get(need.anti_affinity)):
            return None
        wanted = need.gpus
        if not wanted:
            return []
        share, memory, gpus = need.share, need.gpu_memory_mb, self.gpus
        free = [n for n in admitted if gpus[n].share >= share and gpus[n].memory_mb >= memory]
        return free if len(free) >= wanted else None

    # -- what moves ---------------------------------------------------------------------------------------------------

    def take(self, need: Need, gpus: Iterable[int]) -> None:
        """The need is served by these of its GPUs from now on."""
        self._move(need, gpus, -1)

    def give(self, need: Need, gpus: Iterable[int]) -> None:
        """The reverse of `take`."""
        self._move(need, gpus, 1)

    def _move(self, need: Need, gpus: Iterable[int], sign: int) -> None:
        self.cpu_milli += sign * need.cpu_milli
        self.memory_mb += sign * need.memory_mb
        self.disk_mb += sign * need.disk_mb
        for n in gpus:
            gpu = self.gpus[n]
            gpu.share += sign * need.share
            gpu.memory_mb += sign * need.gpu_memory_mb
        if need.anti_affinity is not None:
            self.tags[need.anti_affinity] = self.tags.get(need.anti_affinity, 0) - sign
        self.version += 1

    def uuids(self, gpus: Iterable[int]) -> tuple[str, ...]:
        return tuple([self.gpus[n].uuid for n in gpus])

    def numbers(self, uuids: Iterable[str]) -> list[int]:
        """The numbers of these GPUs; those it does not have (any more) are left out."""
        number = self._number
        return [number[uuid] for uuid in uuids if uuid in number]


def _may_serve(need: Need, gpu: Gpu) -> bool:
    return (
        gpu.total_mb >= need.gpu_memory_mb
        and (not need.gpu_memory_above_mb or gpu.total_mb > need.gpu_memory_above_mb)
        and (need.model is None or need.model.search(gpu.model) is not None)
        and gpu.capability >= need.capability
    )


class Scoring(Protocol):
    """Which of the nodes that fit is best: the least cost. Costs of different epochs are of different opinions."""

    @property
    def epoch(self) -> int: ...

    def cost(self, need: Need, node: Node, free: Sequence[int]) -> tuple[float, tuple[int, ...]]:
        """The cost of serving `need` on `node`, and by which of its GPUs. `free`: the numbers of those that fit now."""
        ...


def closest(node: Node, free: Sequence[int], wanted: int) -> tuple[int, ...]:
    """So many of the free GPUs that are near each other: joined by NVLink, else on one NUMA node; of the groups that
    are large enough the smallest, so that large groups stay whole. Jobs that cross a slow link run at its speed, which
    is why Slurm and Kubernetes' topology manager choose so too."""
    gpus = node.gpus
    if wanted >= len(free) or wanted <= 1 or not any(gpus[n].links or gpus[n].numa_node >= 0 for n in free):
        return tuple(free[:wanted])
    by_uuid = {gpus[n].uuid: n for n in free}
    links = {n: {by_uuid[uuid] for uuid in gpus[n].links if uuid in by_uuid} - {n} for n in free}
    # Not every machine joins all with all: who is taken first is the one that the others of its group are joined to.
    joined = [[n, *sorted(links[n])] for n in free]
    order = sorted(free, key=lambda n: (-len(links[n]), gpus[n].numa_node, n))  # else the largest groups come first
    beside = [[m for m in order if gpus[m].numa_node == gpus[n].numa_node] for n in free if gpus[n].numa_node >= 0]
    for groups in (joined, beside, [order]):
        enough = [group for group in groups if len(group) >= wanted]
        if enough:
            return tuple(sorted(min(enough, key=lambda group: (len(group), group))[:wanted]))
    raise AssertionError("the free ones are enough")


# -- offers, as a worker counts them ---------------------------------------------------------------------------------


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
