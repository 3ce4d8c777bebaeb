"""What every store of the journal must do, asked of the one on a disk and of its twin in memory.

The rule for damage is PROTOCOL §2.20: a bad last entry above the acknowledged floor is a torn write and is cut off;
anything else is refused, and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from p2p.effects import HardState
from p2p.ids import Index, Term
from p2p.storage import COMPACT_SLICE, CorruptLog, WrongStore
from tests.conformance.stores import BENCHES, NODE, Bench, append, entries, entry, load


@pytest.fixture(params=BENCHES)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    yield BENCHES[request.param](tmp_path)


def test_an_empty_store_has_no_entries_no_term_and_a_random_identity(bench: Bench, tmp_path: Path) -> None:
    loaded = load(bench.open())
    assert (loaded.first, loaded.last, loaded.acked_floor, loaded.torn) == (1, 0, 0, 0)
    assert loaded.hard_state == HardState(Term(0), None)
    assert loaded.identity.node == NODE
    (tmp_path / "other").mkdir()
    other = load(BENCHES["disk"](tmp_path / "other").open())
    assert (loaded.identity.disk, loaded.identity.cluster) != (other.identity.disk, other.identity.cluster)


def test_what_was_appended_is_there_after_a_restart(bench: Bench) -> None:
    store = bench.open()
    identity = load(store).identity
    append(store, 1, 3)
    append(store, 4, 4, term=2, floor=3)
    store.close()
    store = bench.open()
    loaded = load(store)
    assert loaded.identity == identity
    assert (loaded.first, loaded.last, loaded.acked_floor, loaded.torn) == (1, 4, 3, 0)
    assert loaded.hard_state == HardState(Term(2), NODE)
    assert store.read(Index(1), Index(4)) == [*entries(1, 3), entry(4, 2)]
    assert store.read(Index(2), Index(3)) == [*entries(2, 3)]


def test_appending_goes_on_after_a_reload(bench: Bench) -> None:
    store = bench.open()
    load(store)
    for n in range(1, 6):
        append(store, n, n, floor=n - 1)
        store.close()
        store = bench.open()
        assert load(store).last == n
    assert store.read(Index(1), Index(5)) == [*entries(1, 5)]


@pytest.mark.parametrize("body", [b"", b"\0", b"\xff" * 70_000], ids=["empty", "nul", "70 kB"])
def test_bodies_are_kept_byte_for_byte(bench: Bench, body: bytes) -> None:
    store = bench.open()
    load(store)
    store.append((entry(1, body=body), entry(2)), None, Index(0))
    store.close()
    store = bench.open()
    assert load(store).last == 2
    assert store.read(Index(1), Index(1)) == [entry(1, body=body)]


def test_a_vote_alone_is_kept(bench: Bench) -> None:
    store = bench.open()
    load(store)
    store.append((), HardState(Term(7), NODE), Index(0))
    store.close()
    assert load(bench.open()).hard_state == HardState(Term(7), NODE)


def test_the_floor_alone_is_kept_and_never_goes_back(bench: Bench) -> None:
    store = bench.open()
    load(store)
    append(store, 1, 5, floor=0)
    store.append((), None, Index(5))
    store.append((entry(6),), None, Index(2))
    store.close()
    assert load(bench.open()).acked_floor == 5


def test_an_append_without_a_hard_state_keeps_the_old_one(bench: Bench) -> None:
    store = bench.open()
    load(store)
    append(store, 1, 1, term=3)
    store.append((entry(2, 3),), None, Index(1))
    store.close()
    assert load(bench.open()).hard_state == HardState(Term(3), NODE)


def test_another_nodes_store_is_refused_with_its_name(bench: Bench) -> None:
    store = bench.open()
    load(store)
    store.close()
    with pytest.raises(WrongStore, match=r"'n1'.*'n2'"):
        bench.open("n2")


# -- damage ----------------------------------------------------------------------------------------------------------


def test_a_torn_last_entry_is_cut_off_and_nothing_else(bench: Bench) -> None:
    store = bench.open()
    load(store)
    append(store, 1, 5, floor=0)
    append(store, 6, 6, floor=5)
    store.close()
    bench.damage(6)
    store = bench.open()
    loaded = load(store)
    assert (loaded.last, loaded.torn, loaded.acked_floor) == (5, 1, 5)
    append(store, 6, 7, term=2)
    store.close()
    store = bench.open()
    assert (load(store).last, load(store).torn) == (7, 0)
    assert store.read(Index(1), Index(9)) == [*entries(1, 5), *entries(6, 7, 2)]


REFUSED = {
    "the last entry, at the floor": (6, 6, 0),
    "the last entry, below the floor": (6, 7, 0),
    "the last entry, applied by the queue": (6, 0, 6),
    "an entry in the middle": (3, 0, 0),
    "an entry in the middle, below the floor": (3, 5, 0),
    "the entry before the last": (5, 0, 0),
    "the first entry": (1, 0, 0),
}


@pytest.mark.parametrize(("bad", "floor", "applied"), REFUSED.values(), ids=REFUSED)
def test_damage_that_may_have_been_acknowledged_is_refused(bench: Bench, bad: int, floor: int, applied: int) -> None:
    store = bench.open()
    load(store)
    append(store, 1, 6, floor=floor)
    store.close()
    bench.damage(bad)
    before = bench.content()
    for _ in range(2):  # a second start is told the same
        store = bench.open()
        with pytest.raises(CorruptLog, match=r"Nothing was changed"):
            load(store, applied)
        store.close()
        assert bench.content() == before


MISSING = {
    "the last, at the floor": ([6], 6, 0),
    "the last two, one below the floor": ([5, 6], 5, 0),
    "the last, applied by the queue": ([6], 0, 6),
    "one in the middle": ([3], 0, 0),
    "the first": ([1], 0, 0),
    "all": ([1, 2, 3, 4, 5, 6], 1, 0),
}


@pytest.mark.parametrize(("lost", "floor", "applied"), MISSING.values(), ids=MISSING)
def test_missing_entries_that_may_have_been_acknowledged_are_refused(
    bench: Bench, lost: list[int], floor: int, applied: int
) -> None:
    store = bench.open()
    load(store)
    append(store, 1, 6, floor=floor)
    store.close()
    for index in lost:
        bench.lose(index)
    before = bench.content()
    store = bench.open()
    with pytest.raises(CorruptLog):
        load(store, applied)
    store.close()
    assert bench.content() == before


# -- compaction ------------------------------------------------------------------------------------------------------


def test_compaction_forgets_what_it_was_told_to_and_keeps_the_chain(bench: Bench) -> None:
    store = bench.open()
    load(store)
    append(store, 1, 10, floor=10)
    assert store.compact(Index(4)) == 0
    append(store, 11, 12, floor=10)
    store.close()
    store = bench.open()
    loaded = load(store)
    assert (loaded.first, loaded.last) == (5, 12)
    assert store.read(Index(1), Index(12)) == [*entries(5, 12)]


def test_damage_is_found_behind_a_compaction_too(bench: Bench) -> None:
    store = bench.open()
    load(store)
    append(store, 1, 10, floor=10)
    store.compact(Index(4))
    store.close()
    bench.damage(5)
    with pytest.raises(CorruptLog, match="entry 5 "):
        load(bench.open())


def test_a_wholly_compacted_log_goes_on_where_it_ended(bench: Bench) -> None:
    store = bench.open()
    load(store)
    append(store, 1, 3, floor=3)
    store.compact(Index(3))
    store.close()
    store = bench.open()
    assert (load(store).first, load(store).last) == (4, 3)
    append(store, 4, 5)
    store.close()
    store = bench.open()
    assert (load(store).first, load(store).last) == (4, 5)


def test_compaction_goes_in_slices_and_says_what_is_left(bench: Bench) -> None:
    store = bench.open()
    load(store)
    total = 2 * COMPACT_SLICE + 5
    append(store, 1, total + 1, floor=total)
    left = [store.compact(Index(total)) for _ in range(3)]
    assert left == [COMPACT_SLICE + 5, 5, 0]
    assert store.compact(Index(total)) == 0
    assert store.compact(Index(1)) <= 0
    assert (load(store).first, load(store).last) == (total + 1, total + 1)
