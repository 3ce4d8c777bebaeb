"""How much of a cluster's GPUs do placement policies fill, on the Alibaba GPU trace of 2023?

The protocol is that of the simulator of "Beware of Fragmentation" (USENIX ATC 2023): copies of randomly drawn pods are
added until the trace asks for 1.3 times the GPUs there are; they are shuffled and offered one by one; none departs, and
one that fits nowhere is dropped. The score is the share of GPU allocated when arrivals have asked for 100 % and 130 %.
Random, best-fit and FGD are rebuilt from the paper, so that its published means check this replay: with scores cut to
whole percents and ties to the first node, as there.

`ours` sees arrivals only, never the file; `ours-known` is told the file's mix beforehand, as FGD is.

Usage: python -m bench.placement_trace --nodes N.csv --pods P.csv [--seeds 42-51] [--policy NAME] [--json]
"""

from __future__ import annotations

import argparse
import csv
import heapq
import json
import math
import random
import re
import statistics
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from bench.harness import machine, quantile
from coordination.scoring import Demand, Tables, least_cost, matches, survey

OVERLOAD = 1.3
SURVEY_EVERY = 100
TYPICAL = 0.95
NODE_COLUMNS = ("cpu_milli", "memory_mib", "gpu", "model")
POD_COLUMNS = ("cpu_milli", "memory_mib", "num_gpu", "gpu_milli", "gpu_spec")


class BadInput(Exception):
    """A file or flag that cannot be used; the message says which and why."""


class TraceNeed(NamedTuple):
    """What a pod asks for. The trace has no GPU memory."""

    cpu_milli: int
    memory_mb: int
    gpus: int
    share: int
    models: str | None
    gpu_memory_mb: int = 0

    @property
    def milli(self) -> int:
        return self.gpus * self.share


@dataclass(slots=True)
class TraceGpu:
    model: str
    share: int = 1000
    memory_mb: int = 0


@dataclass(slots=True)
class TraceNode:
    """A node's free resources; `version` counts its changes."""

    cpu_milli: int
    memory_mb: int
    gpus: list[TraceGpu]
    version: int = 0

    def fitting(self, need: TraceNeed) -> list[int] | None:
        """The GPUs that could serve the need, or None if the node cannot."""
        if need.cpu_milli > self.cpu_milli or need.memory_mb > self.memory_mb:
            return None
        if not need.gpus:
            return []
        share, models = need.share, need.models
        found = [i for i, gpu in enumerate(self.gpus) if gpu.share >= share and matches(models, gpu.model)]
        return found if len(found) >= need.gpus else None

    def take(self, need: TraceNeed, taken: Sequence[int]) -> None:
        self.cpu_milli -= need.cpu_milli
        self.memory_mb -= need.memory_mb
        for index in taken:
            self.gpus[index].share -= need.share
        self.version += 1


Place = tuple[int, tuple[int, ...]]


class Policy(Protocol):
    """Chooses a node and its GPUs for each need in turn; `placed` tells it that the choice was carried out."""

    def choose(self, need: TraceNeed) -> Place | None: ...
    def placed(self, index: int) -> None: ...


def tightest(node: TraceNode, fitting: Sequence[int], need: TraceNeed) -> tuple[int, ...]:
    """The fullest GPUs that fit."""
    return tuple(sorted(fitting, key=lambda index: node.gpus[index].share)[: need.gpus])


class Random:
    """Any node that fits, any of its GPUs."""

    def __init__(self, nodes: list[TraceNode], pods: Sequence[TraceNeed], seed: int) -> None:
        self._nodes, self._rng = nodes, random.Random(seed)

    def choose(self, need: TraceNeed) -> Place | None:
        able = [(i, fits) for i, node in enumerate(self._nodes) if (fits := node.fitting(need)) is not None]
        if not able:
            return None
        index, fits = self._rng.choice(able)
        return index, tuple(self._rng.sample(fits, need.gpus))

    def placed(self, index: int) -> None:
        pass


class FirstFit:
    """The first node that fits, its fullest GPU."""

    def __init__(self, nodes: list[TraceNode], pods: Sequence[TraceNeed], seed: int) -> None:
        self._nodes = nodes

    def choose(self, need: TraceNeed) -> Place | None:
        for index, node in enumerate(self._nodes):
            fits = node.fitting(need)
            if fits is not None:
                return index, tightest(node, fits, need)
        return None

    def placed(self, index: int) -> None:
        pass


Cost = tuple[float, tuple[int, ...]]


class Ranked:
    """The node of least cost, ties to the first. Each need keeps a heap; only changed nodes are scored anew."""

    def __init__(self, nodes: list[TraceNode]) -> None:
        self._nodes = nodes
        self._log: list[int] = []
        self._heaps: dict[TraceNeed, list[tuple[float, int, int, int, tuple[int, ...]]]] = {}
        self._read: dict[TraceNeed, int] = {}
        self.epoch = 0

    def cost(self, need: TraceNeed, node: TraceNode) -> Cost | None:
        raise NotImplementedError

    def choose(self, need: TraceNeed) -> Place | None:
        heap = self._heaps.get(need)
        if heap is None:
            heap = self._heaps[need] = []
            changed: set[int] | range = range(len(self._nodes))
        else:
            changed = set(self._log[self._read[need] :])
        self._read[need] = len(self._log)
        for index in changed:
            self._score(need, index, heap)
        while heap:
            _, index, version, epoch, taken = heap[0]
            if version == self._nodes[index].version and epoch == self.epoch:
                return index, taken
            # Costs of an older epoch only rank the candidates: the best of them is scored anew until it stays best.
            heapq.heappop(heap)
            if version == self._nodes[index].version:
                self._score(need, index, heap)
        return None

    def _score(self, need: TraceNeed, index: int, heap: list[tuple[float, int, int, int, tuple[int, ...]]]) -> None:
        node = self._nodes[index]
        scored = self.cost(need, node)
        if scored is not None:
            heapq.heappush(heap, (scored[0], index, node.version, self.epoch, scored[1]))

    def placed(self, index: int) -> None:
        self._log.append(index)


class BestFit(Ranked):
    """The node with least CPU and GPU left, each measured in the largest node's, its fullest GPU."""

    def __init__(self, nodes: list[TraceNode], pods: Sequence[TraceNeed], seed: int) -> None:
        super().__init__(nodes)
        self._cpu = max(node.cpu_milli for node in nodes)
        self._gpu = max(len(node.gpus) for node in nodes) * 1000

    def cost(self, need: TraceNeed, node: TraceNode) -> Cost | None:
        fits = node.fitting(need)
        if fits is None:
            return None
        gpu = sum(gpu.share for gpu in node.gpus) - need.milli
        left = 0.5 * (node.cpu_milli - need.cpu_milli) / self._cpu + 0.5 * gpu / self._gpu
        return -int(100 * (1 - left)), tightest(node, fits, need)


class Fgd(Ranked):
    """Fragmentation Gradient Descent: the node whose expected fragmentation grows least, told the mix beforehand."""

    def __init__(self, nodes: list[TraceNode], pods: Sequence[TraceNeed], seed: int) -> None:
        super().__init__(nodes)
        counts: dict[TraceNeed, int] = {}
        for pod in pods:
            counts[pod] = counts.get(pod, 0) + 1
        kept: list[tuple[TraceNeed, int]] = []
        total = 0
        for need, count in sorted(counts.items(), key=lambda item: -item[1]):
            if total >= TYPICAL * len(pods):
                break
            kept.append((need, count))
            total += count
        # Typical pods that differ in CPU alone share a group: CPU ascending, popularity summed up.
        groups: dict[tuple[str | None, int, int], list[tuple[int, float]]] = {}
        for need, count in kept:
            groups.setdefault((need.models, need.gpus, need.share), []).append((need.cpu_milli, count / total))
        self._groups: list[tuple[str | None, int, int, list[int], list[float]]] = []
        for (models, gpus, share), members in groups.items():
            members.sort()
            sums = [0.0]
            for _, popularity in members:
                sums.append(sums[-1] + popularity)
            self._groups.append((models, gpus, share, [cpu for cpu, _ in members], sums))
        self._memo: dict[tuple[int, str, tuple[int, ...]], float] = {}

    def fragments(self, cpu: int, model: str, shares: list[int]) -> float:
        """The GPU thousandths that a typical pod cannot use here, expected over the mix."""
        shares = sorted(shares)
        key = (cpu, model, tuple(shares))
        known = self._memo.get(key)
        if known is None:
            known = self._memo[key] = self._fragments(cpu, model, shares)
        return known

    def _fragments(self, cpu: int, model: str, shares: list[int]) -> float:
        total = sum(shares)
        lost = 0.0
        for models, gpus, share, cpus, sums in self._groups:
            small = bisect_right(shares, share - 1)
            if not gpus or len(shares) - small < gpus or not matches(models, model):
                lost += sums[-1] * total
                continue
            able = sums[bisect_right(cpus, cpu)]
            lost += able * sum(shares[:small]) + (sums[-1] - able) * total
        return lost

    def cost(self, need: TraceNeed, node: TraceNode) -> Cost | None:
        fits = node.fitting(need)
        if fits is None:
            return None
        shares = [gpu.share for gpu in node.gpus]
        model = node.gpus[0].model if node.gpus else ""
        before = self.fragments(node.cpu_milli, model, shares)
        cpu = node.cpu_milli - need.cpu_milli
        best: Cost | None = None
        tried = set()
        for first in fits if need.gpus == 1 else [0]:
            taken = (first,) if need.gpus == 1 else tuple(fits[: need.gpus])
            if need.gpus == 1 and shares[first] in tried:
                continue
            left = list(shares)
            for index in taken:
                left[index] -= need.share
            if need.gpus == 1:
                tried.add(shares[first])
            grown = self.fragments(cpu, model, left) - before
            cost = -int(100 / (1 + math.exp(grown / 1000)))
            if best is None or cost < best[0]:
                best = cost, taken
        return best


class Ours(Ranked):
    """The policy of `coordination.scoring`, its demand learnt from arrivals so far, or known beforehand."""

    def __init__(self, nodes: list[TraceNode], pods: Sequence[TraceNeed], seed: int, *, known: bool = False) -> None:
        super().__init__(nodes)
        self._demand, self._tables, self._known, self._since = Demand(), Tables(), known, SURVEY_EVERY
        if known:
            for pod in pods:
                self._demand.record(pod)

    def choose(self, need: TraceNeed) -> Place | None:
        # Little is known at first, so the first surveys follow each other faster.
        if self._since >= SURVEY_EVERY or self._since > self._demand.total // 4:
            self._tables, self._since = survey(self._demand, self._nodes), 0
            self.epoch += 1
        self._since += 1
        if not self._known:
            self._demand.record(need)
        return super().choose(need)

    def cost(self, need: TraceNeed, node: TraceNode) -> Cost | None:
        return least_cost(need, node, self._tables)


POLICIES: dict[str, Callable[[list[TraceNode], Sequence[TraceNeed], int], Policy]] = {
    "random": Random,
    "first-fit": FirstFit,
    "best-fit": BestFit,
    "fgd": Fgd,
    "ours": Ours,
    "ours-known": partial(Ours, known=True),
}


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise BadInput(f"{path}: column {missing[0]} is missing")
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not rows:
        raise BadInput(f"{path}: has no rows")
    return rows


def _number(path: Path, line: int, row: dict[str, str], column: str, most: int | None = None) -> int:
    text = row[column]
    try:
        value = int(text)
    except (TypeError, ValueError):
        raise BadInput(f"{path}, line {line}: {column} is {text!r}, not a whole number") from None
    if value < 0 or (most is not None and value > most):
        raise BadInput(
            f"{path}, line {line}: {column} is {value}, not {'0 or more' if most is None else f'0 to {most}'}"
        )
    return value


def read_nodes(path: Path) -> list[tuple[int, int, int, str]]:
    """(CPU thousandths, memory in MiB, GPUs, model) of each node."""
    nodes = []
    for line, row in enumerate(_rows(path, NODE_COLUMNS), start=2):
        cpu, memory, gpus = (_number(path, line, row, column) for column in NODE_COLUMNS[:3])
        nodes.append((cpu, memory, gpus, row["model"] or ""))
    if not any(gpus for _, _, gpus, _ in nodes):
        raise BadInput(f"{path}: no node has a GPU")
    return nodes


def read_pods(path: Path) -> list[TraceNeed]:
    """The needs of the trace's pods; ``A|B`` of `gpu_spec` is exactly one of these models."""
    pods = []
    for line, row in enumerate(_rows(path, POD_COLUMNS), start=2):
        cpu, memory, gpus = (_number(path, line, row, column) for column in POD_COLUMNS[:3])
        share = _number(path, line, row, "gpu_milli", 1000) if gpus else 0
        if gpus and not share:
            raise BadInput(f"{path}, line {line}: gpu_milli is 0, but num_gpu is {gpus}")
        names = sorted({re.escape(name) for name in (row["gpu_spec"] or "").split("|") if name})
        pods.append(TraceNeed(cpu, memory, gpus, share, f"^(?:{'|'.join(names)})$" if gpus and names else None))
    if not any(pod.gpus for pod in pods):
        raise BadInput(f"{path}: no pod asks for a GPU")
    return pods


def arrivals(pods: Sequence[TraceNeed], capacity: int, seed: int) -> list[TraceNeed]:
    """The pods and drawn copies of them, up to 1.3 times the capacity, shuffled."""
    rng = random.Random(seed)
    offered = list(pods)
    asked = sum(pod.milli for pod in pods)
    while asked < OVERLOAD * capacity:
        pod = rng.choice(pods)
        offered.append(pod)
        asked += pod.milli
    rng.shuffle(offered)
    return offered


@dataclass(frozen=True, slots=True)
class Run:
    """One seed: percent of GPU allocated at 100 % and 130 % of arrivals, pods dropped, seconds a decision."""

    at_100: float
    at_130: float
    failures: int
    seconds: list[float]


def replay(name: str, seed: int, shapes: Sequence[tuple[int, int, int, str]], pods: Sequence[TraceNeed]) -> Run:
    """Offers the pods of one seed to one policy."""
    nodes = [TraceNode(cpu, memory, [TraceGpu(model) for _ in range(gpus)]) for cpu, memory, gpus, model in shapes]
    capacity = 1000 * sum(gpus for _, _, gpus, _ in shapes)
    policy = POLICIES[name](nodes, pods, seed)
    asked = allocated = failures = 0
    marks: dict[float, float] = {}
    seconds = []
    for need in arrivals(pods, capacity, seed):
        began = time.perf_counter()
        place = policy.choose(need)
        if place is not None:
            nodes[place[0]].take(need, place[1])
            policy.placed(place[0])
        seconds.append(time.perf_counter() - began)
        if place is None:
            failures += 1
        else:
            allocated += need.milli
        asked += need.milli
        for mark in (1.0, OVERLOAD):
            if mark not in marks and asked >= mark * capacity:
                marks[mark] = 100 * allocated / capacity
    return Run(marks[1.0], marks[OVERLOAD], failures, seconds)


def summary(name: str, runs: Sequence[Run]) -> dict[str, object]:
    """The figures of one policy: means over the seeds, ranges, and the time a decision takes over all of them."""
    at_100, at_130 = [run.at_100 for run in runs], [run.at_130 for run in runs]
    times = [1000 * second for run in runs for second in run.seconds]
    return {
        "bench": "placement_trace",
        "policy": name,
        "seeds": len(runs),
        "gpu_allocation_100": round(statistics.fmean(at_100), 2),
        "gpu_allocation_100_range": [round(min(at_100), 2), round(max(at_100), 2)],
        "gpu_allocation_130": round(statistics.fmean(at_130), 2),
        "gpu_allocation_130_range": [round(min(at_130), 2), round(max(at_130), 2)],
        "failures": round(statistics.fmean(run.failures for run in runs), 1),
        "decision_ms_median": round(statistics.median(times), 3),
        "decision_ms_p99": round(quantile(times, 0.99), 3),
    }


def read_seeds(text: str) -> list[int]:
    """``42-51`` or ``42,43``."""
    found = re.fullmatch(r"(\d+)-(\d+)", text)
    if found and int(found[1]) <= int(found[2]):
        return list(range(int(found[1]), int(found[2]) + 1))
    if re.fullmatch(r"\d+(,\d+)*", text):
        return [int(seed) for seed in text.split(",")]
    raise BadInput(f"--seeds: {text!r} is neither a range like 42-51 nor a list like 42,43")


def _table(lines: Sequence[dict[str, object]]) -> None:
    print(f"\nGPU allocated, percent: mean (least to most over the seeds)\n{machine()}\n")
    print(f"  {'policy':<12}{'at 100 %':<24}{'at 130 %':<24}{'dropped':>8}{'median ms':>11}{'p99 ms':>9}")
    for line in lines:
        cells = []
        for mark in ("100", "130"):
            spread = line[f"gpu_allocation_{mark}_range"]
            assert isinstance(spread, list)
            cells.append(f"{line[f'gpu_allocation_{mark}']:.2f} ({spread[0]:.2f} to {spread[1]:.2f})")
        print(
            f"  {line['policy']:<12}{cells[0]:<24}{cells[1]:<24}{line['failures']:>8}"
            f"{line['decision_ms_median']:>11}{line['decision_ms_p99']:>9}"
        )


def run(options: argparse.Namespace) -> list[dict[str, object]]:
    """The summaries of the policies asked for."""
    if options.policy != "all" and options.policy not in POLICIES:
        raise BadInput(f"--policy: there is no {options.policy!r}; there are {', '.join(POLICIES)} and all")
    if options.processes < 1:
        raise BadInput(f"--processes: {options.processes} is less than 1")
    seeds = read_seeds(options.seeds)
    nodes, pods = read_nodes(options.nodes), read_pods(options.pods)
    lines = []
    for name in POLICIES if options.policy == "all" else [options.policy]:
        one = partial(replay, name, shapes=nodes, pods=pods)
        if options.processes > 1:
            with ProcessPoolExecutor(options.processes) as pool:
                runs = list(pool.map(one, seeds))
        else:
            runs = [one(seed) for seed in seeds]
        lines.append(summary(name, runs))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=Path, required=True, help="the trace's node list (CSV)")
    parser.add_argument("--pods", type=Path, required=True, help="the trace's pod list (CSV)")
    parser.add_argument("--seeds", default="42-51", help="a range or a list (default 42-51)")
    parser.add_argument("--policy", default="all", help=f"all, or one of {', '.join(POLICIES)}")
    parser.add_argument("--processes", type=int, default=1, help="seeds measured side by side (times suffer)")
    parser.add_argument("--json", action="store_true", help="print the JSON lines only, one a policy")
    options = parser.parse_args()
    try:
        lines = run(options)
    except BadInput as error:
        print(f"placement_trace: {error}", file=sys.stderr)
        return 2
    if not options.json:
        _table(lines)
        print()
    for line in lines:
        print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
