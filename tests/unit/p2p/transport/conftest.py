"""Every asynchronous test here ends with as many tasks and sockets as it began with."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.unit.p2p.transport.endpoints import OverSockets, nothing_leaks


@pytest.fixture
async def network() -> AsyncIterator[OverSockets]:
    async with nothing_leaks():
        network = OverSockets()
        yield network
        await network.close()
