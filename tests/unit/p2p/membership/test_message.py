"""What travels: every message survives the wire, and nothing else gets through."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from p2p.ids import ClusterId, NodeId
from p2p.membership.hint import NO_LEADER, LeaderHint
from p2p.membership.member import MalformedMessage, State
from p2p.membership.message import (
    Ack,
    Body,
    Digest,
    FullState,
    Join,
    Message,
    Nack,
    News,
    Ping,
    Probe,
    Refuse,
    Welcome,
    WrongVersion,
    decode,
    encode,
)
from tests.unit.p2p.membership.driving import record

STATE = FullState((record("a"), record("b", state=State.DEAD, by=NodeId("a"))), {NodeId("b"): 60})
BODIES: list[Body] = [
    *(Ping(), Probe(NodeId("x"), 500), News(), Digest(b"0" * 16), STATE, Join(record("a"), 1_700_000_000_000)),
    *(Welcome(STATE), Ack(), Nack(), Refuse("clock", "two clocks", "set them")),
]


def message(body: Body) -> Message:
    hint = LeaderHint(3, NodeId("n9"), "n9:1")
    return Message(NodeId("a"), "boot", ClusterId(""), NodeId("b"), hint, (record("c"),), body)


@pytest.mark.parametrize("body", BODIES, ids=[type(body).__name__ for body in BODIES])
def test_every_message_survives_the_wire(body: Body) -> None:
    assert decode(encode(message(body))) == message(body)


def test_another_version_is_told_apart_from_nonsense() -> None:
    with pytest.raises(WrongVersion, match="version 2, this node speaks 1"):
        decode(msgpack.packb({"v": 2, "anything": "else"}))


@given(st.binary(max_size=200))
@example(b"\xc1")
@example(b"\x81" * 2_000)
def test_no_bytes_do_worse_than_being_malformed(packed: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(packed)


anything = (
    st.none() | st.integers() | st.text(max_size=5) | st.binary(max_size=20) | st.lists(st.integers(), max_size=3)
)


@given(st.sampled_from(BODIES), st.sampled_from("kfbctThud"), anything)
def test_one_wrong_field_is_malformed_or_harmless_but_never_another_error(body: Body, key: str, value: Any) -> None:
    wire = msgpack.unpackb(encode(message(body)))
    wire[key] = value
    try:
        packed = msgpack.packb(wire)
    except OverflowError:
        return
    try:
        decode(packed)
    except MalformedMessage:
        pass


@given(st.data())
def test_a_message_with_flipped_bytes_is_malformed_or_harmless(data: st.DataObject) -> None:
    packed = bytearray(encode(message(data.draw(st.sampled_from(BODIES)))))
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        decode(bytes(packed))
    except MalformedMessage:
        pass


@pytest.mark.parametrize(
    ("new", "old", "beats"),
    [
        ((2, None, None), (1, "a", "a:1"), True),
        ((1, "a", None), (1, None, None), True),
        ((1, "a", "a:1"), (1, "a", None), True),
        ((1, None, None), (1, "a", None), False),
        ((1, "b", "b:1"), (1, "a", "a:1"), False),
        ((0, "a", "a:1"), (1, None, None), False),
    ],
    ids=["higher term", "leader known", "address known", "leader forgotten", "another leader", "older term"],
)
def test_which_leader_hint_wins(new: Any, old: Any, beats: bool) -> None:
    assert LeaderHint(*new).beats(LeaderHint(*old)) is beats
    assert not NO_LEADER.beats(NO_LEADER)
