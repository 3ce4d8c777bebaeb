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
import json
import math
import random
import re
import statistics
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from bench.harness import machine, quantile
from coordination.fleet import Fleet
from coordination.placement import WHOLE, GpuOffer, Need, Node, Offer, Scoring
from coordination.scoring import SURVEY_EVERY, RoomScoring

OVERLOAD = 1.3
TYPICAL = 0.95
NODE_COLUMNS = ("cpu_milli", "memory_mib", "gpu", "model")
POD_COLUMNS = ("cpu_milli", "memory_mib", "num_gpu", "gpu_milli")  # and gpu_spec, which some of the lists lack


class BadInput(Exception):
    """A file or flag that cannot be used; the message says which and why."""


class Nowhere:
    """For a fleet that nothing has been chosen from yet."""

    epoch = 0

    def cost(self, need: Need, node: Node, free: Sequence[int]) -> tuple[float, tuple[int, ...]]:
        raise NotImplementedError


class Policy(Protocol):
    """Chooses a node and its GPUs for each need in turn."""

    def choose(self, need: Need) -> tuple[str, tuple[int, ...]] | None: ...


def tightest(node: Node, fitting: Sequence[int], need: Need) -> tuple[int, ...]:
    """The fullest GPUs that fit."""
    return tuple(sorted(fitting, key=lambda index: node.gpus[index].share)[: need.gpus])


class Random:
    """Any node that fits, any of its GPUs."""

    def __init__(self, fleet: Fleet, pods: Sequence[Need], seed: int) -> None:
        self._nodes, self._rng = list(fleet.nodes.values()), random.Random(seed)

    def choose(self, need: Need) -> tuple[str, tuple[int, ...]] | None:
        able = [(node.name, fits) for node in self._nodes if (fits := node.fitting(need)) is not None]
        if not able:
            return None
        name, fits = self._rng.choice(able)
        return name, tuple(self._rng.sample(fits, need.gpus))


class FirstFit:
    """The first node that fits, its fullest GPU."""

    def __init__(self, fleet: Fleet, pods: Sequence[Need], seed: int) -> None:
        self._nodes = list(fleet.nodes.values())

    def choose(self, need: Need) -> tuple[str, tuple[int, ...]] | None:
        for node in self._nodes:
            fits = node.fitting(need)
            if fits is not None:
                return node.name, tightest(node, fits, need)
        return None


class Ranked:
    """The node of least cost, ties to the first: as `Fleet` finds it for the leader."""

    def __init__(self, fleet: Fleet, scoring: Scoring) -> None:
        self._fleet = fleet
        fleet.use(scoring)

    def choose(self, need: Need) -> tuple[str, tuple[int, ...]] | None:
        best = self._fleet.best(need)
        return (best.name, best.gpus) if best is not None else None


class BestFit:
    """The node with least CPU and GPU left, each measured in the largest node's, its fullest GPU."""

    epoch = 0

    def __init__(self, nodes: Iterable[Node]) -> None:
        nodes = list(nodes)
        self._cpu = max(node.cpu_milli for node in nodes)
        self._gpu = max(len(node.gpus) for node in nodes) * 1000

    def cost(self, need: Need, node: Node, free: Sequence[int]) -> tuple[float, tuple[int, ...]]:
        gpu = sum(gpu.share for gpu in node.gpus) - need.gpu_milli
        left = 0.5 * (node.cpu_milli - need.cpu_milli) / self._cpu + 0.5 * gpu / self._gpu
        return -int(100 * (1 - left)), tightest(node, free, need)


class Fgd:
    """Fragmentation Gradient Descent: the node whose expected fragmentation grows least, told the mix beforehand."""

    epoch = 0

    def __init__(self, pods: Sequence[Need]) -> None:
        counts: dict[Need, int] = {}
        for pod in pods:
            counts[pod] = counts.get(pod, 0) + 1
        kept: list[tuple[Need, int]] = []
        total = 0
        for need, count in sorted(counts.items(), key=lambda item: -item[1]):
            if total >= TYPICAL * len(pods):
                break
            kept.append((need, count))
            total += count
        # Typical pods that differ in CPU alone share a group: CPU ascending, popularity summed up.
        groups: dict[tuple[re.Pattern[str] | None, int, int], list[tuple[int, float]]] = {}
        for need, count in kept:
            groups.setdefault((need.model, need.gpus, need.share), []).append((need.cpu_milli, count / total))
        self._groups: list[tuple[re.Pattern[str] | None, int, int, list[int], list[float]]] = []
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
            if not gpus or len(shares) - small < gpus or not (models is None or models.search(model)):
                lost += sums[-1] * total
                continue
            able = sums[bisect_right(cpus, cpu)]
            lost += able * sum(shares[:small]) + (sums[-1] - able) * total
        return lost

    def cost(self, need: Need, node: Node, free: Sequence[int]) -> tuple[float, tuple[int, ...]]:
        shares = [gpu.share for gpu in node.gpus]
        model = node.gpus[0].model if node.gpus else ""
        before = self.fragments(node.cpu_milli, model, shares)
        cpu = node.cpu_milli - need.cpu_milli
        best: tuple[float, tuple[int, ...]] | None = None
        tried = set()
        for first in free if need.gpus == 1 else [0]:
            taken = (first,) if need.gpus == 1 else tuple(free[: need.gpus])
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
        assert best is not None
        return best


class Ours(Ranked):
    """The leader's own policy, its demand learnt from arrivals so far, or known beforehand."""

    def __init__(self, fleet: Fleet, pods: Sequence[Need], *, known: bool = False) -> None:
        self._scoring, self._known = RoomScoring(), known
        super().__init__(fleet, self._scoring)
        if known:
            for pod in pods:
                self._scoring.arrived(pod)
        self._since = 0

    def choose(self, need: Need) -> tuple[str, tuple[int, ...]] | None:
        self._since += 1
        if self._scoring.due() or (self._known and self._since >= SURVEY_EVERY):
            self._scoring.renew(self._fleet.nodes.values())
            self._since = 0
        if not self._known:
            self._scoring.arrived(need)
        return super().choose(need)


POLICIES: dict[str, Callable[[Fleet, Sequence[Need], int], Policy]] = {
    "random": Random,
    "first-fit": FirstFit,
    "best-fit": lambda fleet, pods, seed: Ranked(fleet, BestFit(fleet.nodes.values())),
    "fgd": lambda fleet, pods, seed: Ranked(fleet, Fgd(pods)),
    "ours": lambda fleet, pods, seed: Ours(fleet, pods),
    "ours-known": lambda fleet, pods, seed: Ours(fleet, pods, known=True),
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


def read_pods(path: Path) -> list[Need]:
    """The needs of the trace's pods; ``A|B`` of `gpu_spec` is exactly one of these models."""
    known: dict[tuple[int, int, int, int, str | None], Need] = {}
    pods = []
    for line, row in enumerate(_rows(path, POD_COLUMNS), start=2):
        cpu, memory, gpus = (_number(path, line, row, column) for column in POD_COLUMNS[:3])
        share = _number(path, line, row, "gpu_milli", 1000) if gpus else 0
        if gpus and not share:
            raise BadInput(f"{path}, line {line}: gpu_milli is 0, but num_gpu is {gpus}")
        names = sorted({re.escape(name) for name in (row.get("gpu_spec") or "").split("|") if name})
        models = f"^(?:{'|'.join(names)})$" if gpus and names else None
        key = (cpu, memory, gpus, share, models)
        if key not in known:  # equal pods are one need, as equal jobs are
            known[key] = Need(
                cpu_milli=cpu,
                memory_mb=memory,
                gpus=gpus,
                share=share or WHOLE,
                model=re.compile(models) if models is not None else None,
            )
        pods.append(known[key])
    if not any(pod.gpus for pod in pods):
        raise BadInput(f"{path}: no pod asks for a GPU")
    return pods


def arrivals(pods: Sequence[Need], capacity: int, seed: int) -> list[Need]:
    """The pods and drawn copies of them, up to 1.3 times the capacity, shuffled."""
    rng = random.Random(seed)
    offered = list(pods)
    asked = sum(pod.gpu_milli for pod in pods)
    while asked < OVERLOAD * capacity:
        pod = rng.choice(pods)
        offered.append(pod)
        asked += pod.gpu_milli
    rng.shuffle(offered)
    return offered


@dataclass(frozen=True, slots=True)
class Run:
    """One seed: percent of GPU allocated at 100 % and 130 % of arrivals, pods dropped, seconds a decision."""

    at_100: float
    at_130: float
    failures: int
    seconds: list[float]


def replay(name: str, seed: int, shapes: Sequence[tuple[int, int, int, str]], pods: Sequence[Need]) -> Run:
    """Offers the pods of one seed to one policy."""
    fleet = Fleet(Nowhere())
    for number, (cpu, memory, gpus, model) in enumerate(shapes):
        node = f"{number:06d}"  # ties go to the first by name: the first in the file
        offered = tuple(GpuOffer(uuid=f"{node}-{n:03d}", model=model) for n in range(gpus))
        fleet.put(Node.of(Offer(node=node, cpus=cpu / WHOLE, memory_mb=memory, gpus=offered)))
        fleet.set_open(node, True)
    capacity = 1000 * sum(gpus for _, _, gpus, _ in shapes)
    policy = POLICIES[name](fleet, pods, seed)
    asked = allocated = failures = 0
    marks: dict[float, float] = {}
    seconds = []
    for need in arrivals(pods, capacity, seed):
        began = time.perf_counter()
        place = policy.choose(need)
        if place is not None:
            fleet.take(need, *place)
        seconds.append(time.perf_counter() - began)
        if place is None:
            failures += 1
        else:
            allocated += need.gpu_milli
        asked += need.gpu_milli
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
