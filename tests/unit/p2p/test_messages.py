"""What goes over the wire, and what must never come in."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.ids import Index, Term, VoterId
from p2p.messages import (
    LARGEST,
    WIRE_VERSION,
    Append,
    AppendReply,
    BadMessage,
    Message,
    PreVote,
    PreVoteReply,
    SnapshotOffer,
    TimeoutNow,
    Vote,
    VoteReply,
    decode,
    encode,
)

numbers = st.integers(0, LARGEST)
priorities = st.integers(-LARGEST, LARGEST)
texts = st.text(max_size=8)
blobs = st.binary(max_size=20)


@st.composite
def appends(draw: st.DrawFn) -> Append:
    """Terms rise from the one before, and end with the leader's."""
    terms = sorted(draw(st.lists(st.integers(1, 50), min_size=2, max_size=7)))
    entries = tuple((term, draw(st.integers(0, 1)), draw(blobs)) for term in terms[1:-1])
    heirs = tuple(map(VoterId, draw(st.lists(texts, max_size=3))))
    index, commit, round, timeout = draw(st.tuples(numbers, numbers, numbers, numbers))
    return Append(Term(terms[-1]), Index(index), Term(terms[0]), entries, Index(commit), round, heirs, timeout)


messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(PreVote, numbers, numbers, numbers, numbers, priorities),
    st.builds(PreVoteReply, numbers, numbers, st.booleans(), texts),
    st.builds(Vote, numbers, numbers, numbers, st.booleans()),
    st.builds(VoteReply, numbers, st.booleans(), texts),
    appends(),
    st.builds(
        AppendReply,
        numbers,
        st.booleans(),
        numbers,
        numbers,
        numbers,
        numbers,
        numbers,
        priorities,
        st.booleans(),
        numbers,
        numbers,
    ),
    st.builds(SnapshotOffer, numbers, numbers, numbers, blobs, blobs, texts, numbers, texts, numbers),
    st.builds(TimeoutNow, numbers, numbers),
)


@given(messages)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    arrived = decode(encode(message))
    assert arrived == message
    assert type(arrived) is type(message)


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_no_message_and_nothing_worse(raw: bytes) -> None:
    try:
        decode(raw)
    except BadMessage:
        pass


@given(messages, st.data())
def test_a_message_with_one_field_of_anything_is_a_message_or_bad(message: Message, data: st.DataObject) -> None:
    nonsense = st.recursive(
        st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | texts | blobs,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2),
        max_leaves=4,
    )
    fields: list[Any] = list(message)
    fields[data.draw(st.integers(0, len(fields) - 1))] = data.draw(nonsense)
    raw = msgpack.packb((WIRE_VERSION, type(message).__name__, *fields))
    try:
        arrived = decode(raw)
    except BadMessage:
        return
    assert encode(arrived) == encode(type(message)(*arrived))


@given(messages, st.data())
def test_a_cut_message_is_bad(message: Message, data: st.DataObject) -> None:
    raw = encode(message)
    with pytest.raises(BadMessage):
        decode(raw[: data.draw(st.integers(0, len(raw) - 1))])


def packed(*parts: object) -> bytes:
    return bytes(msgpack.packb(parts))


APPEND = (3, 5, 2, [(2, 0, b"x"), (3, 0, b"")], 4, 9, ["a@1"], 2_000)


def append(**changed: object) -> bytes:
    fields = dict(zip(Append._fields, APPEND, strict=True)) | changed
    return packed(WIRE_VERSION, "Append", *fields.values())


def test_the_message_that_the_bad_ones_differ_from_is_good() -> None:
    assert isinstance(decode(append()), Append)


BAD = {
    "nothing": (b"", "0 bytes"),
    "no array": (packed(), "no message"),
    "another version": (packed(WIRE_VERSION + 1, "TimeoutNow", 1, 1), "version 2"),
    "a version that only looks like ours": (packed(True, "TimeoutNow", 1, 1), "version True"),
    "an unknown name": (packed(WIRE_VERSION, "Coup", 1), "no message"),
    "a name that is none": (packed(WIRE_VERSION, ["x"], 1), "no message"),
    "a field too few": (packed(WIRE_VERSION, "TimeoutNow", 1), "no message"),
    "a field too many": (packed(WIRE_VERSION, "TimeoutNow", 1, 2, 3), "no message"),
    "something behind it": (packed(WIRE_VERSION, "TimeoutNow", 1, 1) + b"\x00", "no message"),
    "a negative term": (packed(WIRE_VERSION, "TimeoutNow", -1, 1), "TimeoutNow.term is out of range"),
    "a term too large for a disk": (packed(WIRE_VERSION, "TimeoutNow", LARGEST + 1, 1), "out of range"),
    "a term that is true": (packed(WIRE_VERSION, "TimeoutNow", True, 1), "TimeoutNow.term is bool"),
    "a term with a fraction": (packed(WIRE_VERSION, "TimeoutNow", 1.0, 1), "TimeoutNow.term is float"),
    "a word for a flag": (packed(WIRE_VERSION, "VoteReply", 1, "yes", ""), "granted is str"),
    "a number for a flag": (packed(WIRE_VERSION, "VoteReply", 1, 1, ""), "granted is int"),
    "bytes for a word": (packed(WIRE_VERSION, "VoteReply", 1, True, b""), "reason is bytes"),
    "entries that are none": (append(entries=b"xx"), "entries is bytes"),
    "an entry that is none": (append(entries=[7]), "no entry"),
    "an entry of two": (append(entries=[(2, 0)]), "no entry"),
    "an entry with a word for a body": (append(entries=[(2, 0, "x")]), "no entry"),
    "an entry with a flag for a term": (append(prev_term=1, entries=[(True, 0, b"")]), "no entry"),
    "an entry with a negative kind": (append(entries=[(2, -1, b"")]), "no entry"),
    "an entry with a kind too large": (append(entries=[(2, LARGEST + 1, b"")]), "no entry"),
    "an entry of no term": (append(prev_term=0, entries=[(0, 0, b"")]), "entry of term 0"),
    "an entry of a term before the one it follows": (append(entries=[(1, 0, b"")]), "entry of term 1 behind"),
    "entries whose terms fall": (append(entries=[(3, 0, b""), (2, 0, b"")]), "entry of term 2 behind"),
    "an entry of a term after its leader's": (append(entries=[(4, 0, b"")]), "entry of term 4"),
    "an heir that is none": (append(heirs=[7]), "no voter"),
}


@pytest.mark.parametrize(("raw", "why"), BAD.values(), ids=BAD)
def test_what_is_no_message_says_why(raw: bytes, why: str) -> None:
    with pytest.raises(BadMessage, match=why):
        decode(raw)


def test_every_message_has_its_place_in_the_wire_form() -> None:
    """The order of the fields is the wire form: it may not change without a new version."""
    assert msgpack.unpackb(encode(TimeoutNow(Term(3), Index(7)))) == [1, "TimeoutNow", 3, 7]
    assert msgpack.unpackb(encode(Vote(Term(3), Index(7), Term(2), True))) == [1, "Vote", 3, 7, 2, True]
    assert msgpack.unpackb(encode(decode(append()))) == [
        1,
        "Append",
        3,
        5,
        2,
        [[2, 0, b"x"], [3, 0, b""]],
        4,
        9,
        ["a@1"],
        2_000,
    ]
