"""What a placement costs the cluster. Pure: (need, node, tables) -> (cost, GPUs); the caller takes the least cost.

The least cost is not the tightest fit. A placement is dear if it leaves room that nobody asks for, which is the idea of
Fragmentation Gradient Descent (Weng et al., "Beware of Fragmentation", USENIX ATC 2023). FGD asks which typical jobs
could start on what is left; that misses three ways in which room is lost, and each has its term here, in GPUs:

* **Waste**: the rest of a shared GPU. After a share of 0.81 the other 0.19 waits for a job that may never come. Filling
  the rest at random with the demand's own sizes until none fits leaves an expected remainder; a small dynamic program
  over 0..1000 thousandths gives it (`_waste`). A rest for which hardly anybody asks counts as lost.
* **Stranding**: GPUs whose node has no CPU or memory left to feed them. How many depends on who comes, so the demand is
  cut into eight diets of equal GPU weight, from frugal to hungry, and each says how many free GPUs the node's free CPU
  and memory could feed. A job without GPUs thus goes where CPU is in surplus, and a hungry job away from lean nodes.
* **Scarcity**: room that somebody cannot do without: a model, or several whole GPUs in one node. Jobs are classed by
  (models, GPU count). The room of a class is how many GPUs it could still get, over all nodes; a GPU of that room is
  priced at demand / room^2. A class with plenty of room is free of charge, and a model that a class needs grows dearer
  as it runs out, so others keep off it in time. (A barrier function, as in interior-point methods.)

    cost = waste(after) - waste(before)  +  stranded(after) - stranded(before)  +  SCARCITY * price of the room lost

Demand is learnt from arrivals (`Demand`), not given. `survey` turns it and the nodes into `Tables`; they change slowly,
so a caller may keep costs and renew only those of nodes that changed and of the best candidate. Whether a job may run
at all, and which job is next, is decided elsewhere (`placement`).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol

WHOLE = 1000
DIETS = 8
# Chances a rest of a GPU gets to meet a job that fits it. From 20 to 100 the results differ by less than 0.1 %.
CHANCES = 50
# One GPU of scarce room against one wasted: small, because most room lost to one class is used by another. From 0.1 to
# 0.5 it hardly matters on average; 0 loses the models that some jobs must have.
SCARCITY = 0.15
# Arrivals after which old ones count half, so that demand follows the times.
MEMORY = 20_000
MEMO = 50_000


class Gpu(Protocol):
    """One GPU's free part: thousandths of its time and MiB of its memory."""

    @property
    def model(self) -> str: ...
    @property
    def share(self) -> int: ...
    @property
    def memory_mb(self) -> int: ...


class Node(Protocol):
    """What a node has free now, in whole units so that no rounding adds up."""

    @property
    def cpu_milli(self) -> int: ...
    @property
    def memory_mb(self) -> int: ...
    @property
    def gpus(self) -> Sequence[Gpu]: ...


class Need(Hashable, Protocol):
    """What a job asks for: `share` thousandths (1..1000) and `gpu_memory_mb` of each of `gpus` GPUs.

    `models` is a regular expression that the model's name must contain; None is any.
    """

    @property
    def cpu_milli(self) -> int: ...
    @property
    def memory_mb(self) -> int: ...
    @property
    def gpus(self) -> int: ...
    @property
    def share(self) -> int: ...
    @property
    def gpu_memory_mb(self) -> int: ...
    @property
    def models(self) -> str | None: ...


class Demand:
    """How often each need has arrived, the old ones forgotten by halves."""

    def __init__(self) -> None:
        self.counts: dict[Need, int] = {}
        self.total = 0

    def record(self, need: Need) -> None:
        """One more job of this need has arrived, placed or not."""
        self.counts[need] = self.counts.get(need, 0) + 1
        self.total += 1
        if self.total >= MEMORY:
            self.counts = {need: count // 2 for need, count in self.counts.items() if count > 1}
            self.total = sum(self.counts.values())


class Diet(NamedTuple):
    """An eighth of the demand: its weight, and the CPU and memory it takes beside one whole GPU."""

    weight: float
    cpu_milli: float
    memory_mb: float


class Room(NamedTuple):
    """A class of demand: means of one job's needs, and the price of one GPU of the class's room."""

    models: str | None
    gpus: int
    cpu_milli: float
    memory_mb: float
    share: float
    arrivals: int
    price: float = 0.0


# Per model in a node: free thousandths over its GPUs, and how many of them are wholly free.
Inventory = tuple[tuple[str, int, int], ...]


@dataclass(slots=True)
class Tables:
    """What the demand and the nodes say about cost. Empty tables find every placement equally good."""

    waste: list[float] = field(default_factory=lambda: [0.0] * (WHOLE + 1))
    diets: tuple[Diet, ...] = ()
    rooms: tuple[Room, ...] = ()
    _burdens: dict[tuple[int, int, Inventory], float] = field(default_factory=dict)
    _rooms_of: dict[tuple[str, ...], tuple[Room, ...]] = field(default_factory=dict)

    def burden(self, cpu_milli: int, memory_mb: int, inventory: Inventory) -> float:
        """Stranded GPUs of a node in this state, less the worth of its room. Remembered: many needs ask the same."""
        key = (cpu_milli, memory_mb, inventory)
        known = self._burdens.get(key)
        if known is None:
            if len(self._burdens) >= MEMO:
                self._burdens.clear()
            known = self._burdens[key] = self._burden(cpu_milli, memory_mb, inventory)
        return known

    def _burden(self, cpu_milli: int, memory_mb: int, inventory: Inventory) -> float:
        free = sum(entry[1] for entry in inventory) / WHOLE
        burden = 0.0
        for weight, cpu, memory in self.diets:
            fed = cpu_milli / cpu
            if memory * fed > memory_mb:
                fed = memory_mb / memory
            if fed < free:
                burden += weight * (free - fed)
        models = tuple(entry[0] for entry in inventory)
        rooms = self._rooms_of.get(models)
        if rooms is None:
            rooms = tuple(room for room in self.rooms if any(matches(room.models, model) for model in models))
            self._rooms_of[models] = rooms
        for room in rooms:
            burden -= room.price * room_for(room, cpu_milli, memory_mb, inventory)
        return burden


@lru_cache(maxsize=4096)
def matches(models: str | None, model: str) -> bool:
    """Whether a GPU of this model will do."""
    return models is None or re.search(models, model) is not None


def inventory_of(node: Node) -> Inventory:
    """The node's free GPUs by model, in the order of their first appearance."""
    free: dict[str, tuple[int, int]] = {}
    for gpu in node.gpus:
        share = gpu.share
        milli, wholes = free.get(gpu.model, (0, 0))
        free[gpu.model] = (milli + share, wholes + (share == WHOLE))
    return tuple((model, milli, wholes) for model, (milli, wholes) in free.items())


def room_for(room: Room, cpu_milli: int, memory_mb: int, inventory: Inventory) -> float:
    """The GPUs this class could get from a node in this state: whole ones if it takes several at once, and no more
    than its CPU and memory feed."""
    _, gpus, cpu, memory, share, _, _ = room
    if cpu_milli < cpu or memory_mb < memory:
        return 0.0
    milli = wholes = 0
    for model, model_milli, model_wholes in inventory:
        if matches(room.models, model):
            milli += model_milli
            wholes += model_wholes
    jobs: float = wholes // gpus if gpus > 1 else milli / share
    if cpu * jobs > cpu_milli:
        jobs = cpu_milli / cpu
    if memory * jobs > memory_mb:
        jobs = memory_mb / memory
    return jobs * gpus * share / WHOLE


def least_cost(need: Need, node: Node, tables: Tables) -> tuple[float, tuple[int, ...]] | None:
    """The least cost of this need on this node and the indexes of the GPUs it takes there; None if it does not fit.

    Only the waste depends on which of several alike GPUs is taken, so the best by waste of each (model, whole or not)
    stand for all. Ties go to the first GPU.
    """
    cpu_left, memory_left = node.cpu_milli - need.cpu_milli, node.memory_mb - need.memory_mb
    if cpu_left < 0 or memory_left < 0:
        return None
    if not need.gpus:
        inventory = inventory_of(node)
        before = tables.burden(node.cpu_milli, node.memory_mb, inventory)
        return tables.burden(cpu_left, memory_left, inventory) - before, ()
    choices = _choices(need, node, tables.waste)
    if not choices:
        return None
    inventory = inventory_of(node)
    before = tables.burden(node.cpu_milli, node.memory_mb, inventory)
    best: tuple[float, tuple[int, ...]] | None = None
    for wasted, taken in choices:
        left = _without(inventory, node, taken, need.share)
        cost = wasted + tables.burden(cpu_left, memory_left, left) - before
        if best is None or cost < best[0]:
            best = cost, taken
    return best


def _choices(need: Need, node: Node, waste: Sequence[float]) -> list[tuple[float, tuple[int, ...]]]:
    """The GPU choices worth a look: (waste added, indexes)."""
    wanted, memory, models = need.share, need.gpu_memory_mb, need.models
    fitting = [
        (waste[gpu.share - wanted] - waste[gpu.share], index)
        for index, gpu in enumerate(node.gpus)
        if gpu.share >= wanted and gpu.memory_mb >= memory and matches(models, gpu.model)
    ]
    if len(fitting) < need.gpus:
        return []
    if need.gpus > 1:
        taken = sorted(fitting)[: need.gpus]
        return [(sum(wasted for wasted, _ in taken), tuple(sorted(index for _, index in taken)))]
    kinds: dict[tuple[str, bool], tuple[float, int]] = {}
    for choice in fitting:
        gpu = node.gpus[choice[1]]
        kind = (gpu.model, gpu.share == WHOLE)
        if kind not in kinds or choice < kinds[kind]:
            kinds[kind] = choice
    return [(wasted, (index,)) for wasted, index in kinds.values()]


def _without(inventory: Inventory, node: Node, taken: Sequence[int], share: int) -> Inventory:
    """The inventory once `share` of each taken GPU is gone."""
    left = []
    for model, milli, wholes in inventory:
        gone = [node.gpus[index].share for index in taken if node.gpus[index].model == model]
        left.append((model, milli - share * len(gone), wholes - gone.count(WHOLE)))
    return tuple(left)


def survey(demand: Demand, nodes: Iterable[Node]) -> Tables:
    """The tables for this demand and these nodes. Some 10 ms at a thousand nodes: renew them every hundred arrivals."""
    wants = [(need, count) for need, count in demand.counts.items() if need.gpus]
    if not wants:
        return Tables()
    states = [(node.cpu_milli, node.memory_mb, inventory_of(node)) for node in nodes]
    return Tables(waste=_waste(wants), diets=_diets(wants), rooms=_rooms(wants, states))


def _waste(wants: Sequence[tuple[Need, int]]) -> list[float]:
    """For each free share of a GPU, how much of it is expected to stay unused, in GPUs.

    waste(g) = q g + (1 - q) E[waste(g - s)] over the sizes s <= g of the demand, and q = (1 - P[s <= g]) ^ CHANCES is
    the chance that none of the next so many arrivals fits.
    """
    sizes: dict[int, int] = {}
    for need, count in wants:
        sizes[need.share] = sizes.get(need.share, 0) + count
    total = sum(sizes.values())
    ranked = sorted(sizes.items())
    waste = [0.0] * (WHOLE + 1)
    fitting, weight, upto = 0, 0, ranked[:0]
    for free in range(WHOLE + 1):
        while fitting < len(ranked) and ranked[fitting][0] <= free:
            weight += ranked[fitting][1]
            fitting += 1
            upto = ranked[:fitting]
        unmet = (1 - weight / total) ** CHANCES
        filled = sum(count * waste[free - size] for size, count in upto) / weight if weight else 0.0
        waste[free] = unmet * free / WHOLE + (1 - unmet) * filled
    return waste


def _diets(wants: Sequence[tuple[Need, int]]) -> tuple[Diet, ...]:
    """The demand from frugal to hungry for CPU per GPU, in parts of about equal GPU weight, each by its means."""
    ranked = sorted(
        (WHOLE * need.cpu_milli / asked, asked * count, WHOLE * need.memory_mb / asked)
        for need, count in wants
        for asked in (need.gpus * need.share,)
    )
    total = sum(weight for _, weight, _ in ranked)
    diets: list[Diet] = []
    part = cpus = memories = 0.0
    passed = 0
    for cpu, weight, memory in ranked:
        passed += weight
        part += weight
        cpus += cpu * weight
        memories += memory * weight
        if passed * DIETS >= total * (int((passed - part) * DIETS / total) + 1):
            diets.append(Diet(part / total, max(1.0, cpus / part), memories / part))
            part = cpus = memories = 0.0
    return tuple(diets)


def _rooms(wants: Sequence[tuple[Need, int]], states: Sequence[tuple[int, int, Inventory]]) -> tuple[Room, ...]:
    """The classes and their prices, arrivals / room^2, so scaled that the room of all is worth SCARCITY a free GPU."""
    groups: dict[tuple[str | None, int], list[tuple[Need, int]]] = {}
    for need, count in wants:
        groups.setdefault((need.models, need.gpus), []).append((need, count))
    priced: list[Room] = []
    worth = 0.0
    for (models, gpus), members in groups.items():
        arrivals = sum(count for _, count in members)
        room = Room(
            models,
            gpus,
            sum(need.cpu_milli * count for need, count in members) / arrivals,
            sum(need.memory_mb * count for need, count in members) / arrivals,
            sum(need.share * count for need, count in members) / arrivals,
            arrivals,
        )
        left = sum(room_for(room, *state) for state in states)
        if left > 0:  # no room: nothing more can be lost
            priced.append(room._replace(price=arrivals / left**2))
            worth += arrivals / left
    free = sum(entry[1] for _, _, inventory in states for entry in inventory) / WHOLE
    return tuple(room._replace(price=room.price * SCARCITY * free / worth) for room in priced)
