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
  (GPUs that will do, GPU count). The room of a class is how many GPUs it could still get, over all nodes; a GPU of that
  room is priced at demand / room^2. A class with plenty of room is free of charge, and a model that a class needs grows
  dearer as it runs out, so others keep off it in time. (A barrier function, as in interior-point methods.)

    cost = waste(after) - waste(before)  +  stranded(after) - stranded(before)  +  SCARCITY * price of the room lost

Demand is learnt from arrivals (`Demand`), not given. `survey` turns it and the nodes into `Tables`; they change slowly,
so a caller may keep costs and renew only those of nodes that changed and of the best candidate. Whether a job may run
at all, and which job is next, is decided elsewhere (`placement`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from coordination.placement import WHOLE, Need, Node, closest

DIETS = 8
# Chances a rest of a GPU gets to meet a job that fits it. From 20 to 100 the results differ by less than 0.1 %.
CHANCES = 50
# One GPU of scarce room against one wasted: small, because most room lost to one class is used by another. From 0.1 to
# 0.5 it hardly matters on average; 0 loses the models that some jobs must have.
SCARCITY = 0.15
# Arrivals after which old ones count half, so that demand follows the times.
MEMORY = 20_000
MEMO = 50_000
SURVEY_EVERY = 100
MOST_WAITING = 1_000  # of one need: a flood of one kind of job does not drown what else comes
TIGHT = 1e-12  # of cost for a thousandth of a core left: decides between equals only


class GpuKind(NamedTuple):
    """What GPUs are told apart by."""

    model: str
    capability: tuple[int, ...]
    total_mb: int


class Demand:
    """How often each need has arrived, the old ones forgotten by halves."""

    def __init__(self) -> None:
        self.counts: dict[Need, int] = {}
        self.total = 0

    def record(self, need: Need, times: int = 1) -> None:
        """More jobs of this need have arrived, placed or not."""
        self.counts[need] = self.counts.get(need, 0) + times
        self.total += times
        while self.total >= MEMORY:
            self.counts = {need: count // 2 for need, count in self.counts.items() if count > 1}
            self.total = sum(self.counts.values())


class Diet(NamedTuple):
    """An eighth of the demand: its weight, and the CPU and memory it takes beside one whole GPU."""

    weight: float
    cpu_milli: float
    memory_mb: float


class Room(NamedTuple):
    """A class of demand: means of one job's needs, and the price of one GPU of the class's room."""

    kinds: frozenset[GpuKind]  # the GPUs that will do
    gpus: int
    cpu_milli: float
    memory_mb: float
    share: float
    arrivals: int
    price: float = 0.0


# Per kind of GPU in a node: free thousandths over its GPUs, and how many of them are wholly free.
Inventory = tuple[tuple[GpuKind, int, int], ...]


@dataclass(slots=True)
class Tables:
    """What the demand and the nodes say about cost. Empty tables find every placement equally good."""

    waste: list[float] = field(default_factory=lambda: [0.0] * (WHOLE + 1))
    diets: tuple[Diet, ...] = ()
    rooms: tuple[Room, ...] = ()
    _burdens: dict[tuple[int, int, Inventory], float] = field(default_factory=dict)
    _rooms_of: dict[tuple[GpuKind, ...], tuple[Room, ...]] = field(default_factory=dict)

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
        kinds = tuple(entry[0] for entry in inventory)
        rooms = self._rooms_of.get(kinds)
        if rooms is None:
            rooms = self._rooms_of[kinds] = tuple(room for room in self.rooms if not room.kinds.isdisjoint(kinds))
        for room in rooms:
            burden -= room.price * room_for(room, cpu_milli, memory_mb, inventory)
        return burden


@lru_cache(maxsize=4096)
def kind_of(model: str, capability: tuple[int, ...], total_mb: int) -> GpuKind:
    return GpuKind(model, capability, total_mb)


def serves(kind: GpuKind, need: Need) -> bool:
    """Whether a GPU of this kind will do for this need, when it is free."""
    return (
        kind.total_mb >= need.gpu_memory_mb
        and kind.capability >= need.capability
        and (need.model is None or need.model.search(kind.model) is not None)
    )


def inventory_of(node: Node) -> Inventory:
    """The node's free GPUs by kind, in the order of their first appearance."""
    free: dict[GpuKind, tuple[int, int]] = {}
    for gpu in node.gpus:
        share = gpu.share
        kind = kind_of(gpu.model, gpu.capability, gpu.total_mb)
        milli, wholes = free.get(kind, (0, 0))
        free[kind] = (milli + share, wholes + (share == WHOLE))
    return tuple((kind, milli, wholes) for kind, (milli, wholes) in free.items())


def room_for(room: Room, cpu_milli: int, memory_mb: int, inventory: Inventory) -> float:
    """The GPUs this class could get from a node in this state: whole ones if it takes several at once, and no more
    than its CPU and memory feed."""
    kinds, gpus, cpu, memory, share, _, _ = room
    if cpu_milli < cpu or memory_mb < memory:
        return 0.0
    milli = wholes = 0
    for kind, kind_milli, kind_wholes in inventory:
        if kind in kinds:
            milli += kind_milli
            wholes += kind_wholes
    jobs: float = wholes // gpus if gpus > 1 else milli / share
    if cpu * jobs > cpu_milli:
        jobs = cpu_milli / cpu
    if memory * jobs > memory_mb:
        jobs = memory_mb / memory
    return jobs * gpus * share / WHOLE


def least_cost(need: Need, node: Node, free: Sequence[int], tables: Tables) -> tuple[float, tuple[int, ...]]:
    """The least cost of this need on this node, which fits it by the GPUs numbered `free`, and which of them it takes.

    Only the waste depends on which of several alike GPUs is taken, so the best by waste of each (kind, whole or not)
    stand for all. Ties go to the fuller GPU, then to the first.
    """
    cpu_left, memory_left = node.cpu_milli - need.cpu_milli, node.memory_mb - need.memory_mb
    inventory = inventory_of(node)
    before = tables.burden(node.cpu_milli, node.memory_mb, inventory)
    if not need.gpus:
        return tables.burden(cpu_left, memory_left, inventory) - before, ()
    best: tuple[float, tuple[int, ...]] | None = None
    for wasted, taken in _choices(need, node, free, tables.waste):
        left = _without(inventory, node, taken, need.share)
        cost = wasted + tables.burden(cpu_left, memory_left, left) - before
        if best is None or cost < best[0]:
            best = cost, taken
    assert best is not None, "there are as many free GPUs as it needs"
    return best


def _choices(
    need: Need, node: Node, free: Sequence[int], waste: Sequence[float]
) -> list[tuple[float, tuple[int, ...]]]:
    """The GPU choices worth a look: (waste added, numbers)."""
    gpus, wanted = node.gpus, need.share
    if need.gpus > 1:
        taken = closest(node, free, need.gpus)
        return [(sum(waste[gpus[n].share - wanted] - waste[gpus[n].share] for n in taken), taken)]
    kinds: dict[tuple[GpuKind, bool], tuple[float, int, int]] = {}
    for n in free:
        gpu = gpus[n]
        kind = (kind_of(gpu.model, gpu.capability, gpu.total_mb), gpu.share == WHOLE)
        choice = (waste[gpu.share - wanted] - waste[gpu.share], gpu.share, n)
        if kind not in kinds or choice < kinds[kind]:
            kinds[kind] = choice
    return [(wasted, (n,)) for wasted, _, n in sorted(kinds.values())]


def _without(inventory: Inventory, node: Node, taken: Sequence[int], share: int) -> Inventory:
    """The inventory once `share` of each taken GPU is gone."""
    left = []
    for kind, milli, wholes in inventory:
        gone = [
            gpu.share for gpu in map(node.gpus.__getitem__, taken) if (gpu.model, gpu.capability, gpu.total_mb) == kind
        ]
        left.append((kind, milli - share * len(gone), wholes - gone.count(WHOLE)))
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
    kinds = {entry[0] for _, _, inventory in states for entry in inventory}
    groups: dict[tuple[frozenset[GpuKind], int], list[tuple[Need, int]]] = {}
    for need, count in wants:
        able = frozenset(kind for kind in kinds if serves(kind, need))
        groups.setdefault((able, need.gpus), []).append((need, count))
    priced: list[Room] = []
    worth = 0.0
    for (able, gpus), members in groups.items():
        arrivals = sum(count for _, count in members)
        room = Room(
            able,
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


class RoomScoring:
    """The policy as `Fleet` uses it: learns the demand, and renews its tables when told to."""

    def __init__(self) -> None:
        self.demand, self.tables, self.epoch = Demand(), Tables(), 0
        self._news = 0  # arrivals since the tables were made

    def arrived(self, need: Need, times: int = 1) -> None:
        """So many jobs of this need have come in."""
        self.demand.record(need, times)
        self._news += times

    def due(self) -> bool:
        """Whether enough has come in for new tables. The first ones follow each other faster: little is known yet."""
        return self._news >= SURVEY_EVERY or self._news > self.demand.total // 4

    def renew(self, nodes: Iterable[Node], waiting: Iterable[tuple[Need, int]] = ()) -> None:
        """New tables for the demand, with what is `waiting`, and the nodes as they are now. Costs of an older `epoch`
        are out of date."""
        demand = Demand()
        demand.counts = dict(self.demand.counts)
        for need, jobs in waiting:
            demand.counts[need] = demand.counts.get(need, 0) + min(jobs, MOST_WAITING)
        self.tables, self._news = survey(demand, nodes), 0
        self.epoch += 1

    def cost(self, need: Need, node: Node, free: Sequence[int]) -> tuple[float, tuple[int, ...]]:
        """See `least_cost`. Between equals the node with less CPU left, so that large rooms stay large."""
        cost, gpus = least_cost(need, node, free, self.tables)
        return cost + TIGHT * node.cpu_milli, gpus
