"""One end of a request on a tunnel, without a tunnel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from p2p.transport.streams import (
    CHUNK,
    CREDIT,
    DATA,
    END,
    FRAME_COST,
    RESET,
    WINDOW,
    Stream,
    TunnelBusy,
    TunnelFailed,
    TunnelLost,
    TunnelMisused,
    reset_error,
)
from tests.unit.p2p.transport.endpoints import turns


class End:
    """A stream whose frames are kept."""

    def __init__(self) -> None:
        self.frames: list[list[Any]] = []
        self.done = 0
        self.stream = Stream(1, self.frames.append, self._count)

    def _count(self, _: Stream) -> None:
        self.done += 1

    @property
    def kinds(self) -> list[int]:
        return [frame[0] for frame in self.frames]


async def test_large_data_is_cut_and_stops_at_the_window() -> None:
    end = End()
    sending = asyncio.create_task(end.stream.send(bytes(2 * WINDOW)))
    await turns()
    assert not sending.done()
    assert {len(frame[2]) for frame in end.frames} == {CHUNK}
    assert sum(len(frame[2]) for frame in end.frames) <= WINDOW
    end.stream.on_credit(WINDOW)
    end.stream.on_credit(WINDOW)  # more than a window is no more than a window
    await turns()
    assert sum(len(frame[2]) for frame in end.frames) <= 2 * WINDOW
    end.stream.on_credit(WINDOW)
    await sending


async def test_tiny_pieces_stop_at_the_window_too() -> None:
    end = End()

    async def drip() -> None:
        for _ in range(WINDOW):
            await end.stream.send(b"x")

    dripping = asyncio.create_task(drip())
    await turns()
    assert len(end.frames) == WINDOW // (FRAME_COST + 1)
    end.stream.fail(TunnelLost("the end"))
    with pytest.raises(TunnelLost):
        await dripping


async def test_what_was_read_is_given_back_and_what_was_not_is_not() -> None:
    end = End()
    pieces = WINDOW // CHUNK - 1
    for _ in range(pieces):
        end.stream.on_data(bytes(CHUNK))
    assert end.stream.buffered == pieces * CHUNK
    chunks = end.stream.chunks()
    for _ in range(pieces):
        await anext(chunks)
    credit = sum(frame[2] for frame in end.frames if frame[0] == CREDIT)
    assert WINDOW // 2 <= credit <= pieces * (CHUNK + FRAME_COST)
    with pytest.raises(TunnelMisused):
        for _ in range(2 * WINDOW // CHUNK):
            end.stream.on_data(bytes(CHUNK))


async def test_a_reader_that_leaves_resets_the_stream_once() -> None:
    end = End()
    end.stream.on_data(b"one")
    chunks = cast(AsyncGenerator[bytes, None], end.stream.chunks())
    assert await anext(chunks) == b"one"
    await chunks.aclose()
    end.stream.close("cancelled", "again")
    assert (end.kinds, end.done) == ([RESET], 1)


async def test_a_reader_that_reads_to_the_end_says_nothing() -> None:
    end = End()
    end.stream.on_data(b"one")
    end.stream.on_end()
    assert [chunk async for chunk in end.stream.chunks()] == [b"one"]
    assert (end.kinds, end.done) == ([], 1)


async def test_what_came_before_a_failure_is_read_first() -> None:
    end = End()
    end.stream.on_data(b"one")
    end.stream.fail(TunnelFailed("broke off"))
    chunks = end.stream.chunks()
    assert await anext(chunks) == b"one"
    with pytest.raises(TunnelFailed, match="broke off"):
        await anext(chunks)
    assert end.done == 1


async def test_an_answer_ends_once_and_nothing_follows() -> None:
    end = End()
    await end.stream.send(b"all")
    end.stream.end()
    end.stream.end()
    end.stream.close("failed", "late")
    with pytest.raises(TunnelLost):
        await end.stream.send(b"more")
    assert (end.kinds, end.done) == ([DATA, END], 1)


@pytest.mark.parametrize("cost", [-1, "1", None, 1.5])
def test_credit_that_is_none_is_misuse(cost: Any) -> None:
    with pytest.raises(TunnelMisused):
        End().stream.on_credit(cost)


def test_data_that_is_no_bytes_is_misuse() -> None:
    with pytest.raises(TunnelMisused):
        End().stream.on_data(cast(bytes, "text"))


def test_reasons_become_errors() -> None:
    assert isinstance(reset_error("busy", "later"), TunnelBusy)
    assert isinstance(reset_error("a newer version's", b"?"), TunnelFailed)
