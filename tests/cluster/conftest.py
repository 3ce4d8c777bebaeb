"""Nodes that many tests of the HTTP API share: one start serves a whole file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.nodes import NodeProcess, node_offering


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node that takes jobs and runs none, so that what is queued stays where a test put it."""
    node = NodeProcess(tmp_path_factory.mktemp("desk"), ["--no-populate", "--no-worker"])
    try:
        node.start()
        yield node
    finally:
        node.destroy()


@pytest.fixture(scope="module")
def running_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node with room for many jobs and no GPU, whatever this machine has."""
    folder = tmp_path_factory.mktemp("node")
    with node_offering(folder, {"cpus": 16, "memory_mb": 8000, "gpus": [], "labels": {"zone": "eu"}}) as node:
        yield node
