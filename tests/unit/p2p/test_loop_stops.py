"""Every loop can be stopped at any moment, the worst one included: the moment its wait ends."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import pytest

from p2p.loops.base import Loop
from tests.nodes import ROOT


class Counting(Loop):
    name = "Counting"

    def __init__(self) -> None:
        super().__init__(3_600)

    async def turn(self) -> None:
        self.stats["turns"] += 1


async def test_a_loop_cancelled_together_with_its_poke_stops() -> None:
    loop = Counting()
    task = asyncio.create_task(loop.run())
    while loop.runs < 1:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    loop.poke()
    await asyncio.sleep(0)  # the wait has its answer now, and the loop has not been told yet
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=5)
    assert done, "the cancellation was lost"
    assert task.cancelled()
    assert not loop.is_running


@pytest.mark.parametrize("steps", range(8))
async def test_a_loop_cancelled_anywhere_around_its_poke_stops(steps: int) -> None:
    loop = Counting()
    task = asyncio.create_task(loop.run())
    while loop.runs < 1:
        await asyncio.sleep(0)
    loop.poke()
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    assert (await asyncio.wait([task], timeout=5))[0]


def test_nothing_waits_with_wait_for() -> None:
    """In Python 3.11 ``asyncio.wait_for`` answers with the result and drops a cancellation that came at the same time:
    a node that was told to stop went on for ever. ``asyncio.timeout`` does not."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("p2p", "coordination", "config")
        for path in sorted(Path(ROOT, folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "wait_for"
    ]
    assert found == []
