"""The node's figures in Prometheus text. Names and units follow the exposition format's conventions; labels are
bounded: states, kinds and loops, never ids."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector

from coordination.queue_reads import QueueReader
from p2p.driver import View


class Ask(Protocol):
    def __call__(self, question: Callable[[QueueReader], Any]) -> Future[Any]: ...


class Collector:
    """Reads the queue's sums at each scrape; keeps no figure of its own."""

    def __init__(self, read: Ask, view: Callable[[], View], loops: Callable[[], dict[str, Any]]) -> None:
        self._read, self._view, self._loops = read, view, loops

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client, in a thread."""
        counts, totals, oldest = self._read(lambda r: (r.counts(), r.totals(), r.oldest_pending_ms())).result(10)
        jobs = GaugeMetricFamily("p2p_jobs", "Jobs in the queue", labels=("state", "kind"))
        sums: dict[tuple[str, str], int] = {}
        for state, kind, _group, n in counts:
            sums[(state, kind)] = sums.get((state, kind), 0) + n
        for key, n in sorted(sums.items()):
            jobs.add_metric(key, n)
        yield jobs
        ends = CounterMetricFamily("p2p_jobs_ends", "Jobs submitted, ended or retried", labels=("kind", "what"))
        for key, n in sorted(totals.items()):
            ends.add_metric(key, n)
        yield ends
        age = max(time.time() - oldest / 1000, 0.0) if oldest is not None else 0.0
        yield GaugeMetricFamily("p2p_oldest_pending_seconds", "Age of the oldest pending job", value=age)
        view = self._view()
        yield GaugeMetricFamily("p2p_journal_term", "Term of this node", value=view.term)
        yield GaugeMetricFamily("p2p_journal_commit_index", "Last committed entry", value=view.commit_index)
        yield GaugeMetricFamily("p2p_journal_applied_index", "Last applied entry", value=view.applied_index)
        runs = CounterMetricFamily("p2p_loop_runs", "Turns of a background loop", labels=("loop",))
        errors = CounterMetricFamily("p2p_loop_errors", "Failed turns of a background loop", labels=("loop",))
        for name, loop in self._loops().items():
            runs.add_metric((name,), loop["runs"])
            errors.add_metric((name,), loop["errors"])
        yield runs
        yield errors


def exposition(read: Ask, view: Callable[[], View], loops: Callable[[], dict[str, Any]]) -> Callable[[], bytes]:
    """A function that answers the whole page; it blocks, so it runs in a thread."""
    registry = CollectorRegistry()
    registry.register(Collector(read, view, loops))
    ProcessCollector(registry=registry)
    return lambda: generate_latest(registry)
