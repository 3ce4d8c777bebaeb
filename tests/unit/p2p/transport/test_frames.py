"""Several payloads in one message."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.transport.frames import BadFrame, pack, unpack


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=20))
def test_what_is_packed_is_unpacked(payloads: list[bytes]) -> None:
    assert unpack(pack(payloads)) == payloads


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=5), st.data())
def test_a_cut_message_is_refused_or_ends_at_a_payloads_end(payloads: list[bytes], data: st.DataObject) -> None:
    frame = pack(payloads)
    cut = data.draw(st.integers(0, len(frame) - 1))
    try:
        found = unpack(frame[:cut])
    except BadFrame:
        return
    assert found == payloads[: len(found)]


@pytest.mark.parametrize("frame", [b"\0", b"\0\0\0\1", b"\0\0\0\2x", b"\xff\xff\xff\xffx"])
def test_a_message_that_does_not_add_up_is_refused(frame: bytes) -> None:
    with pytest.raises(BadFrame):
        unpack(frame)


def test_an_empty_message_has_no_payloads() -> None:
    assert unpack(b"") == []
