"""Which of two records wins, and a record's form on the wire."""

from __future__ import annotations

from functools import reduce
from itertools import permutations
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.ids import DiskId, NodeId
from p2p.membership.figures import MAX_META_BYTES
from p2p.membership.member import (
    InvalidMeta,
    MalformedMessage,
    Member,
    State,
    checked_meta,
    first_record,
    merge,
)
from tests.unit.p2p.membership.driving import record

scalars = st.none() | st.booleans() | st.integers(-(2**31), 2**31) | st.text(max_size=8) | st.floats(allow_nan=False)
records = st.builds(
    record,
    st.just("n1"),
    boot=st.sampled_from(["a", "b"]),
    incarnation=st.integers(0, 3),
    started_ms=st.integers(0, 2),
    state=st.sampled_from(State),
    address=st.sampled_from([None, "n1:1", "n1:2"]),
    via=st.sampled_from([(), (NodeId("n2"),)]),
    meta=st.dictionaries(st.text(max_size=4), scalars, max_size=3),
    by=st.sampled_from([None, NodeId("n2"), NodeId("n3")]),
)


@given(records, records)
def test_merge_is_commutative(a: Member, b: Member) -> None:
    assert merge(a, b).packed() == merge(b, a).packed()


@given(records)
def test_merge_is_idempotent(a: Member) -> None:
    assert merge(a, a) is a and not a.overrides(a)


@given(records, records, records)
def test_merge_is_associative(a: Member, b: Member, c: Member) -> None:
    assert merge(merge(a, b), c).packed() == merge(a, merge(b, c)).packed()


@given(st.lists(records, min_size=1, max_size=4))
def test_members_that_saw_the_same_records_believe_the_same_whatever_the_order(seen: list[Member]) -> None:
    outcomes = {reduce(merge, order).packed() for order in permutations(seen)}
    assert len(outcomes) == 1


@given(records)
def test_a_record_survives_the_wire(a: Member) -> None:
    back = Member.from_wire(msgpack.unpackb(msgpack.packb(a.to_wire())))
    assert back == a and back.by == a.by and back.fingerprint() == a.fingerprint()


@pytest.mark.parametrize(
    ("winner", "loser"),
    [
        ((5, State.ALIVE), (4, State.DEAD)),
        ((5, State.SUSPECT), (5, State.ALIVE)),
        ((5, State.DEAD), (5, State.SUSPECT)),
        ((5, State.LEFT), (5, State.DEAD)),
        ((6, State.ALIVE), (5, State.LEFT)),
    ],
    ids=["refuted", "suspected", "found dead", "left is not dead", "came back"],
)
def test_the_higher_incarnation_wins_and_at_equal_ones_the_worse_state(
    winner: tuple[int, State], loser: tuple[int, State]
) -> None:
    a, b = (record("n1", incarnation=incarnation, state=state) for incarnation, state in (winner, loser))
    assert a.overrides(b) and not b.overrides(a)


def test_a_restarted_process_overrides_its_earlier_life_by_its_start_time() -> None:
    earlier = first_record(NodeId("n1"), DiskId("d"), "a", started_ms=1_000, address=None)
    later = first_record(NodeId("n1"), DiskId("d"), "b", started_ms=2_000, address=None)
    assert later.overrides(earlier.as_(State.DEAD)) and later.overrides(earlier)


def test_who_accuses_is_no_part_of_what_is_believed() -> None:
    one, other = (record("n1", state=State.SUSPECT, by=NodeId(by)) for by in ("n2", "n3"))
    assert one == other and not one.overrides(other) and one.fingerprint() == other.fingerprint()


@pytest.mark.parametrize(
    ("meta", "why"),
    [
        ({"a": [1]}, "scalar"),
        ({"a": {"b": 1}}, "scalar"),
        ({1: 2}, "scalar"),
        ({"a": "x" * (MAX_META_BYTES + 1)}, "bytes"),
        ({str(n): n for n in range(25)}, "keys"),
        ({"a": 1 << 70}, "packed"),
    ],
    ids=["list", "map", "key", "too large", "too many", "huge integer"],
)
def test_meta_is_flat_and_small(meta: dict[Any, Any], why: str) -> None:
    with pytest.raises(InvalidMeta, match=why):
        checked_meta(meta)


VALID = ["n1", "d", "b", "c1", "h:1", 1, 1, 0, ["n2"], {"a": 1}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((0, ""), (0, 7), (0, "x" * 129), (2, ""), (4, ""), (4, 5), (5, -1), (5, True), (5, 1 << 63), (6, "1")),
        *((7, 4), (7, -1), (7, None), (8, "n2"), (8, ["n"] * 6), (8, [1]), (9, []), (9, {"a": []})),
    ],
)
def test_a_record_with_a_wrong_field_is_malformed(field: int, value: object) -> None:
    fields: list[Any] = list(VALID)
    assert Member.from_wire([msgpack.packb(fields), None])
    fields[field] = value
    with pytest.raises(MalformedMessage):
        Member.from_wire([msgpack.packb(fields), None])


def test_fields_that_a_newer_version_appends_are_ignored() -> None:
    assert Member.from_wire([msgpack.packb([*VALID, "new"]), None]).node == "n1"


@given(st.recursive(scalars | st.binary(max_size=40), lambda inner: st.lists(inner, max_size=4), max_leaves=8))
def test_whatever_is_no_record_is_malformed_and_nothing_worse(wire: object) -> None:
    with pytest.raises(MalformedMessage):
        Member.from_wire(wire)
