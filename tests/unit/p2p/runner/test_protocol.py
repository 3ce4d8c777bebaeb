"""Frames, and what becomes of a client that sends illegal ones."""

from __future__ import annotations

import asyncio

import msgpack
import pytest

from p2p.runner.address import SocketAddress
from p2p.runner.protocol import (
    MAX_FRAME_BYTES,
    PROTOCOL,
    ActivitySample,
    FrameReader,
    ProtocolError,
    StartSpec,
    pack,
)

SPEC = {"job": "j", "attempt": 1, "argv": ["true"], "env": {}, "directory": "/tmp/x"}
WHOLE = StartSpec(**SPEC).to_wire()


def frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


def test_messages_survive_being_cut_anywhere():
    stream = pack("a", value=1) + pack("b", value="caf\udce9") + pack("c")
    for size in range(1, len(stream) + 1):
        reader = FrameReader()
        messages = [m for start in range(0, len(stream), size) for m in reader.feed(stream[start : start + size])]
        assert messages == [{"kind": "a", "value": 1}, {"kind": "b", "value": "caf\udce9"}, {"kind": "c"}]


def test_frame_over_the_limit_is_refused_by_its_length_alone():
    with pytest.raises(ProtocolError, match="over the limit"):
        list(FrameReader().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "big")))
    with pytest.raises(ProtocolError, match="over the limit"):
        pack("big", value="x" * MAX_FRAME_BYTES)


def test_spec_survives_the_wire():
    spec = StartSpec(**SPEC, timeout_seconds=1.5, cwd="/")
    assert StartSpec.from_wire(msgpack.unpackb(msgpack.packb(spec.to_wire()))) == spec


@pytest.mark.parametrize(
    "change",
    [
        {"job": ""},
        {"job": 7},
        {"job": "x" * 1000},
        {"job": "caf\udce9"},
        {"job": "a\nb"},
        {"attempt": -1},
        {"attempt": "1"},
        {"attempt": True},
        {"attempt": 2**60},
        {"argv": []},
        {"argv": "true"},
        {"argv": [1]},
        {"env": []},
        {"env": {"A": 1}},
        {"env": {1: "a"}},
        {"directory": None},
        {"cwd": 1},
        {"timeout_seconds": -1},
        {"timeout_seconds": float("nan")},
        {"timeout_seconds": "1"},
        {"grace_seconds": None},
        {"grace_seconds": float("inf")},
        {"log_cap_bytes": 1.5},
        {"log_cap_bytes": -1},
        {"log_cap_bytes": 2**63},
        {"memory_limit_mb": -1},
        {"memory_limit_mb": "1"},
        {"memory_limit_mb": True},
        {"memory_limit_mb": 2**50},
        {"memory_kill": 1},
        {"memory_group": None},
    ],
    ids=str,
)
def test_illegal_spec_is_refused(change):
    with pytest.raises(ProtocolError):
        StartSpec.from_wire({**WHOLE, **change})


def test_a_pair_of_different_versions_understand_each_other():
    """What one side does not know yet it leaves away or passes over."""
    sample = ActivitySample(
        job="j", attempt=1, cpu_seconds=1.0, rss_mb=1.0, stdout_bytes=0, stderr_bytes=0, progress_mtime_ms=0
    )
    old = {name: value for name, value in sample.to_wire().items() if name != "over_memory_mb"}
    assert ActivitySample.from_wire(old) == sample
    assert ActivitySample.from_wire({**sample.to_wire(), "of_the_future": 1}) == sample
    assert StartSpec.from_wire({**WHOLE, "of_the_future": 1}) == StartSpec.from_wire(WHOLE)


HELLO = pack("hello", protocol=PROTOCOL)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (frame(b"\xc1"), "not msgpack"),
        (frame(b""), "not msgpack"),
        (frame(b"\x91" * 5000), "not msgpack"),
        (frame(msgpack.packb([1])), "map with a kind"),
        (b"GET / HTTP/1.1\r\n\r\n", "over the limit"),
        (pack("start", specs=[WHOLE]), "first message is hello"),
        (pack("hello", protocol=99), "speaks protocol"),
        (HELLO + pack("dance"), "unknown kind"),
        (HELLO + pack("start"), "specs"),
        (HELLO + pack("start", specs=[1]), "a start is a map"),
        (HELLO + pack("start", specs=[{}]), "job"),
        (HELLO + pack("stop", key=["j"]), "job, attempt"),
        (HELLO + pack("stop", key=["j", 1]), "a reason"),
        (HELLO + pack("ack", items=5), "items"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_illegal_message_closes_the_connection_and_nothing_else(running, sent, words):
    reader, writer = await asyncio.open_unix_connection(sock=SocketAddress(running.directory).connect())
    writer.write(sent)
    async with asyncio.timeout(10):
        *_, last = FrameReader().feed(await reader.read())
    writer.close()
    await writer.wait_closed()
    assert last["kind"] == "error" and words in last["message"]
    await running.client.connect(spawn=False)
    assert (await running.run("job", "true")).exit_code == 0


async def test_unknown_protocol_is_told_to_our_client(running, monkeypatch):
    monkeypatch.setattr("p2p.runner.client.PROTOCOL", 99)
    with pytest.raises(ProtocolError, match="speaks protocol 1"):
        await running.new_client().connect()


async def test_half_a_frame_and_silence_hold_nobody_up(running):
    _, writer = await asyncio.open_unix_connection(sock=SocketAddress(running.directory).connect())
    writer.write(b"\0\0")
    await writer.drain()
    assert (await running.run("job", "true")).exit_code == 0
    writer.close()
    await writer.wait_closed()
