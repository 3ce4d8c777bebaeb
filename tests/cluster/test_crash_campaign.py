"""kill -9 of the orchestrator at any moment, under load: nothing acknowledged is lost, nothing runs twice.

Clients submit, cancel and release without pause, and repeat what they did not hear the outcome of. Jobs are processes
that sign a ledger when they start. The orchestrator is killed again and again, between 0 and 400 ms after it was ready
(and sometimes before), and started again. In the end the ledger, the clients' memory and the queue must agree.

The short run is part of the tests. The long one, with its figures printed::

    P2P_CRASH_ROUNDS=200 python -m pytest -s tests/cluster/test_crash_campaign.py
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable

import pytest
import yaml

from tests.cluster.crashes import Campaign, check
from tests.nodes import NodeProcess, wait_until

ROUNDS = int(os.environ.get("P2P_CRASH_ROUNDS", "12"))
SEED = int(os.environ.get("P2P_CRASH_SEED", "1"))


def test_kill_9_at_any_moment_loses_nothing_and_runs_nothing_twice(
    start_node: Callable[..., NodeProcess], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("campaign")
    resources = folder / "resources.yaml"
    resources.write_text(yaml.safe_dump({"cpus": 64, "memory_mb": 64_000, "gpus": []}))
    node = start_node("--no-populate", "--resources", str(resources))
    rng = random.Random(SEED)
    campaign = Campaign(node, SEED, folder / "ledger")
    began = time.monotonic()
    campaign.start()
    restarts: list[float] = []
    for _ in range(ROUNDS):
        time.sleep(rng.random() * 0.4)  # the moment of the kill is the test
        node.kill()
        at = time.monotonic()
        if rng.random() < 0.15:  # killed again before it was ready
            node.start(wait=False)
            time.sleep(rng.random() * 0.8)
            node.kill()
        node.start()
        restarts.append(time.monotonic() - at)
    campaign.stop()
    busy = ("waiting", "pending", "claimed", "running")
    wait_until(lambda: not any(node.request("GET", "/work_queue_status")[1]["by_state"][s] for s in busy), seconds=60)
    figures = {"kills": ROUNDS, "seed": SEED, **check(campaign)}
    figures |= {"seconds": round(time.monotonic() - began), "slowest restart ms": round(max(restarts) * 1000)}
    print(json.dumps(figures))
    assert not campaign.problems, "\n".join([f"seed {SEED}", *campaign.problems[:20]])
    assert figures["jobs acknowledged"] > ROUNDS
