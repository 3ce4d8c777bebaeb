"""Placeholder."""

from __future__ import annotations

from collections.abc import Sequence

from coordination.placement import Need, Node, Scoring, closest


class BestFit:
    def cost(self, need: Need, node: Node, free: Sequence[int]) -> tuple[float, tuple[int, ...]]:
        gpus = node.gpus
        if need.gpus == 1:
            best = min(free, key=lambda n: (gpus[n].share, gpus[n].memory_mb, n))
            chosen: tuple[int, ...] = (best,)
        else:
            chosen = closest(node, free, need.gpus)
        left = sum(gpu.share for gpu in gpus) + node.cpu_milli / 100
        return float(left), chosen


def default_scoring() -> Scoring:
    return BestFit()
