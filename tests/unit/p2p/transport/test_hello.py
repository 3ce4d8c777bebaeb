"""With whom we speak."""

from __future__ import annotations

import msgpack
import pytest

from p2p.ids import VoterId
from p2p.transport.hello import MAX_REASON_BYTES, Hello, Refused, check, close_reason, decode, encode, refusal

OURS = Hello(1, "c1", VoterId("a@1"), "", "boot-a", 0)


def theirs(**changes: object) -> Hello:
    return Hello(1, "c1", VoterId("b@1"), "a@1", "boot-b", 0)._replace(**changes)  # type: ignore[arg-type]


def test_a_hello_survives_the_wire_and_a_newer_versions_fields_are_left_alone() -> None:
    hello = theirs(time_ms=1_700_000_000_000)
    assert decode(encode(hello)) == hello
    assert decode(msgpack.packb(msgpack.unpackb(encode(hello)) | {"new": 1})) == hello


@pytest.mark.parametrize("to", ["a@1", "a"], ids=["voter", "node"])
@pytest.mark.parametrize("ours_to", ["", "b", "b@1"])
def test_whoever_means_us_is_let_in(to: str, ours_to: str) -> None:
    check(theirs(to=to), OURS._replace(to=ours_to))


def test_a_newer_version_is_let_in() -> None:
    check(theirs(version=99), OURS)


REFUSED = {
    "another cluster": (theirs(cluster="c2"), OURS, "cluster", "this is cluster c1, not c2"),
    "we have no cluster": (theirs(cluster=""), OURS._replace(cluster=""), "cluster", "no cluster yet"),
    "an emptied disk": (theirs(to="a@0"), OURS, "disk", "a@1"),
    "another node at our address": (theirs(to="x@1"), OURS, "node", "this is node a, not x"),
    "another node, by its name": (theirs(to="x"), OURS, "node", "this is node a, not x"),
    "an old version": (theirs(version=0), OURS, "version", "version 0, the oldest here is 1"),
    "whoever answers has another disk": (theirs(), OURS._replace(to="b@0"), "disk", "you are b@1, not b@0"),
    "whoever answers is another node": (theirs(), OURS._replace(to="x"), "node", "you are b@1, not x"),
    "ourselves": (theirs(sender=VoterId("a@1"), boot="boot-a"), OURS, "self", "yourself"),
}


@pytest.mark.parametrize(("hello", "ours", "kind", "text"), REFUSED.values(), ids=REFUSED)
def test_others_are_refused_with_the_reason(hello: Hello, ours: Hello, kind: str, text: str) -> None:
    with pytest.raises(Refused, match=text) as refused:
        check(hello, ours)
    assert refused.value.kind == kind
    told = refusal(close_reason(refused.value).decode())
    assert (told.kind, str(told)) == (kind, str(refused.value))


NOT_HELLOS = {
    "nothing": b"",
    "not msgpack": b"\xc1",
    "an array": msgpack.packb([1, 2]),
    "a field missing": msgpack.packb({"v": 1}),
    "a version in words": encode(theirs(version="1")),
    "a boolean version": encode(theirs(version=True)),
    "a cluster of bytes": encode(theirs(cluster=b"c1")),
    "an endless name": encode(theirs(sender="b" * 1000)),
    "no node": encode(theirs(sender="@1")),
    "two": encode(theirs()) * 2,
}


@pytest.mark.parametrize("frame", NOT_HELLOS.values(), ids=NOT_HELLOS)
def test_what_is_no_hello_is_refused(frame: bytes) -> None:
    with pytest.raises(Refused) as refused:
        decode(frame)
    assert refused.value.kind == "hello"


def test_a_reason_fits_a_close_frame() -> None:
    assert len(close_reason(Refused("node", "ü" * 200))) <= MAX_REASON_BYTES
