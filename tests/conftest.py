"""What every test may use: a real node in a real process, on a free port and a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.nodes import NodeProcess


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[Callable[..., NodeProcess]]:
    """A function that starts a node and waits until it is ready; every node and its runner end with the test."""
    started: list[NodeProcess] = []

    def start(*flags: str, name: str = "n1", **settings: object) -> NodeProcess:
        node = NodeProcess(tmp_path / name, flags, settings)
        started.append(node)
        node.start()
        return node

    yield start
    for node in started:
        node.destroy()


@pytest.fixture
def node(start_node: Callable[..., NodeProcess]) -> NodeProcess:
    """A ready node that does not fill its queue by itself."""
    return start_node("--no-populate")
