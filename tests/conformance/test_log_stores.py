"""What every store of the journal must do, asked of the one on a disk and of its twin in memory.

The rule for damage is PROTOCOL §2.20: a bad last entry above the acknowledged floor is a torn write and is cut off;
anything else is refused, and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from p2p.effects import CONFIG, Config, Entry, HardState
from p2p.ids import ClusterId, Index, Term
from p2p.storage import (
    COMPACT_SLICE,
    CopiedStore,
    CorruptLog,
    DiskFull,
    LogStore,
    StorageError,
    WrongStore,
    chain,
    checksum,
)
from tests.conformance.stores import (
    BENCHES,
    NODE,
    VOTER,
    Bench,
    append,
    config_entry,
    entries,
    entry,
    load,
    voters,
)

OLD, NEW = voters("n1@d1"), voters("n1@d1", "n2@d2", "n3@d3")


@pytest.fixture(params=BENCHES)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    yield BENCHES[request.param](tmp_path)


def test_a_blank_store_has_no_entries_no_term_no_cluster_and_a_random_disk(bench: Bench, tmp_path: Path) -> None:
    loaded = load(bench.open())
    assert (loaded.first, loaded.last, loaded.acked_floor, loaded.torn) == (1, 0, 0, 0)
    assert loaded.hard_state == HardState(Term(0), None)
    assert loaded.identity.node == NODE
    (tmp_path / "other").mkdir()
    other = load(BENCHES["disk"](tmp_path / "other").open())
    assert loaded.identity.disk != other.identity.disk
    assert loaded.identity.cluster == other.identity.cluster == ""
    assert loaded.identity.voter == f"n1@{loaded.identity.disk}"
    assert (loaded.base, loaded.base_term, loaded.base_config) == (0, 0, Config())
    assert (loaded.runs, loaded.configs, loaded.moved) == ((), (), False)


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
    assert loaded.hard_state == HardState(Term(2), VOTER)
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
    store.append((), HardState(Term(7), VOTER), Index(0))
    store.close()
    assert load(bench.open()).hard_state == HardState(Term(7), VOTER)


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
    assert load(bench.open()).hard_state == HardState(Term(3), VOTER)


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


# -- truncation ------------------------------------------------------------------------------------------------------


def chain_of(*log: Entry) -> bytes:
    running = bytes(16)
    for one in log:
        running = chain(running, one)
    return running


def restarted(bench: Bench, store: LogStore, *, how: str = "closed") -> LogStore:
    if how == "closed":
        store.close()
    else:
        bench.power_cut(store)
    return bench.open()


HOW = pytest.mark.parametrize("how", ["closed", "power cut"])


@HOW
@pytest.mark.parametrize(("truncate", "upto"), [(4, 8), (6, 6), (3, 3), (7, 8), (9, 8)])
def test_a_truncation_forgets_from_there_on_and_the_new_entries_follow(
    bench: Bench, truncate: int, upto: int, how: str
) -> None:
    store = bench.open()
    load(store)
    append(store, 1, 6, floor=2)
    first = min(truncate, 7)
    append(store, first, upto, term=2, floor=2, truncate=truncate)
    want = [*entries(1, first - 1), *entries(first, upto, 2)]
    assert store.read(Index(1), Index(99)) == want
    store = restarted(bench, store, how=how)
    assert load(store).last == upto
    assert store.read(Index(1), Index(99)) == want
    assert store.chain_at(Index(upto)) == chain_of(*want)
    append(store, upto + 1, upto + 1, term=2)
    assert load(restarted(bench, store, how=how)).last == upto + 1


@HOW
def test_a_truncation_without_entries_is_durable_too(bench: Bench, how: str) -> None:
    store = bench.open()
    load(store)
    append(store, 1, 6, floor=2)
    store.append((), None, Index(2), Index(5))
    store = restarted(bench, store, how=how)
    loaded = load(store)
    assert (loaded.last, loaded.acked_floor, loaded.torn) == (4, 2, 0)
    assert loaded.hard_state == HardState(Term(1), VOTER)


ACKED = {
    "at the floor": (3, 0, 0, 3),
    "below the floor": (3, 0, 0, 1),
    "at what the queue has applied": (0, 3, 0, 3),
    "at the beginning of a compacted log": (0, 0, 3, 3),
    "below it": (0, 0, 3, 2),
}


@pytest.mark.parametrize(("floor", "applied", "base", "truncate"), ACKED.values(), ids=ACKED)
def test_to_truncate_what_was_acknowledged_is_our_own_bug_and_changes_nothing(
    bench: Bench, floor: int, applied: int, base: int, truncate: int
) -> None:
    store = bench.open()
    load(store)
    append(store, 1, 6, floor=floor)
    store.compact(Index(base))
    load(store, applied)
    with pytest.raises(AssertionError, match="acknowledged"):
        store.append((entry(truncate, 2),), None, Index(0), Index(truncate))
    assert store.read(Index(base + 1), Index(9)) == [*entries(base + 1, 6)]
    append(store, 4, 4, term=2, truncate=4)  # one above it may go
    assert load(store).last == 4


def test_the_floor_of_the_truncating_write_itself_may_cover_its_new_entries(bench: Bench) -> None:
    """A follower may learn with the new entries that they are committed."""
    store = bench.open()
    load(store)
    append(store, 1, 6, floor=2)
    append(store, 3, 5, term=2, floor=5, truncate=3)
    with pytest.raises(AssertionError):
        append(store, 5, 5, term=3, truncate=5)
    store.close()
    assert load(bench.open()).acked_floor == 5


def test_entries_that_leave_a_gap_or_come_twice_are_our_own_bug(bench: Bench) -> None:
    store = bench.open()
    load(store)
    append(store, 1, 3)
    for first, truncate in ((5, None), (3, None), (3, 3 - 1), (4, 3)):
        with pytest.raises(AssertionError):
            append(store, first, first, truncate=truncate)
    assert store.read(Index(1), Index(9)) == [*entries(1, 3)]


def test_a_torn_end_behind_a_truncation_is_cut_off_and_damage_before_it_is_refused(bench: Bench) -> None:
    store = bench.open()
    load(store)
    append(store, 1, 6, floor=2)
    append(store, 4, 8, term=2, floor=2, truncate=4)
    store.close()
    bench.damage(8)
    store = bench.open()
    loaded = load(store)
    assert (loaded.last, loaded.torn, loaded.runs) == (7, 1, ((1, 1), (4, 2)))
    append(store, 6, 7, term=3, floor=2, truncate=6)
    store.close()
    bench.damage(6)
    before = bench.content()
    store = bench.open()
    with pytest.raises(CorruptLog, match="entry 6 "):
        load(store)
    store.close()
    assert bench.content() == before


# -- terms, kinds and configurations ---------------------------------------------------------------------------------


def test_the_runs_of_equal_terms_are_those_of_what_is_kept(bench: Bench) -> None:
    store = bench.open()
    load(store)
    append(store, 1, 3)
    append(store, 4, 4, term=2)
    append(store, 5, 9, term=5)
    assert load(store).runs == ((1, 1), (4, 2), (5, 5))
    append(store, 7, 8, term=6, truncate=7)
    assert load(store).runs == ((1, 1), (4, 2), (5, 5), (7, 6))
    store.compact(Index(2))
    assert load(store).runs == ((3, 1), (4, 2), (5, 5), (7, 6))
    store.compact(Index(5))
    assert load(store).runs == ((6, 5), (7, 6))
    assert (load(store).base, load(store).base_term) == (5, 5)


def test_a_configuration_is_kept_as_one_and_told_at_the_next_start(bench: Bench) -> None:
    store = bench.open()
    load(store)
    store.append((entry(1), config_entry(2, OLD), entry(3), config_entry(4, NEW)), None, Index(2))
    store.close()
    store = bench.open()
    assert load(store).configs == ((2, OLD), (4, NEW))
    assert [one.kind for one in store.read(Index(1), Index(4))] == [0, CONFIG, 0, CONFIG]
    assert store.read(Index(2), Index(2)) == [config_entry(2, OLD)]


def test_a_truncated_configuration_is_rolled_back_also_for_a_later_compaction(bench: Bench) -> None:
    store = bench.open()
    load(store)
    store.append((entry(1), config_entry(2, OLD), config_entry(3, NEW)), None, Index(2))
    store.append((entry(3, 2), entry(4, 2)), None, Index(2), Index(3))
    store.compact(Index(3))
    loaded = load(store)
    assert (loaded.base, loaded.base_term, loaded.base_config, loaded.configs) == (3, 2, OLD, ())


@HOW
@pytest.mark.parametrize("ends", [((1, 1, Config()), (3, 2, OLD), (4, 2, NEW), (6, 3, NEW)), ((5, 3, NEW),)])
def test_compaction_keeps_the_term_the_chain_and_the_configuration_of_its_end(
    bench: Bench, how: str, ends: tuple[tuple[int, int, Config], ...]
) -> None:
    log = (entry(1), config_entry(2, OLD), entry(3, 2), config_entry(4, NEW, 2), entry(5, 3), entry(6, 3))
    store = bench.open()
    load(store)
    store.append(log, None, Index(6))
    for upto, term, config in ends:
        store.compact(Index(upto))
        store = restarted(bench, store, how=how)
        loaded = load(store)
        assert (loaded.base, loaded.base_term, loaded.base_config) == (upto, term, config)
        assert loaded.configs == tuple((i, c) for i, c in ((2, OLD), (4, NEW)) if i > upto)
        assert store.chain_at(Index(upto)) == chain_of(*log[:upto])
        assert store.term_at(Index(upto)) == term


def test_a_configuration_that_cannot_be_read_refuses_the_start(bench: Bench) -> None:
    store = bench.open()
    load(store)
    store.append((Entry(Index(1), Term(1), b"no semicolon", CONFIG), entry(2)), None, Index(2))
    store.close()
    with pytest.raises(CorruptLog, match=r"entry 1 .*configuration"):
        load(bench.open())


def test_an_entrys_kind_is_part_of_its_checksum_and_of_the_chain(bench: Bench) -> None:
    one = entry(1, body=b"a@1;")
    assert checksum(one) != checksum(one._replace(kind=CONFIG))
    assert chain(bytes(16), one) != chain(bytes(16), one._replace(kind=CONFIG))
    # No command says with its body what another kind says with its head.
    for body in (b"1:a@1;", b":1:a@1;", b"/1:1:a@1;"):
        assert chain(bytes(16), one._replace(body=body)) != chain(bytes(16), one._replace(kind=CONFIG))


def test_a_commands_checksum_and_chain_are_those_of_format_1() -> None:
    """Numbers that the build before wrote: what it stored must still be found sound."""
    one = entry(7, 3, b"body")
    assert checksum(one) == 1227126417
    assert chain(bytes(range(16)), one).hex() == "bf002162dbb0580407966a357e35e25a"


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "most", "want"),
    [
        (1, 5, 300, (1, 3)),
        (1, 5, 299, (1, 2)),
        (1, 5, 0, (1, 1)),
        (2, 2, 1, (2, 2)),
        (4, 9, 10_000, (4, 5)),
        (6, 9, 100, (1, 0)),
        (5, 4, 100, (1, 0)),
        (1, 5, 500, (1, 5)),
    ],
)
def test_a_read_stops_before_too_many_bytes_but_not_before_one_entry(
    bench: Bench, first: int, last: int, most: int, want: tuple[int, int]
) -> None:
    store = bench.open()
    load(store)
    log = [entry(n, body=b"%d" % n * 100) for n in range(1, 6)]
    store.append(log, None, Index(0))
    assert store.read(Index(first), Index(last), most) == log[want[0] - 1 : want[1]]


def test_a_read_of_what_is_compacted_begins_with_what_is_kept(bench: Bench) -> None:
    store = bench.open()
    load(store)
    append(store, 1, 6, floor=6)
    store.compact(Index(3))
    assert store.read(Index(2), Index(5)) == [*entries(4, 5)]
    assert store.read(Index(1), Index(3)) == []


def test_chain_and_term_are_known_for_what_is_kept_and_for_the_base(bench: Bench) -> None:
    store = bench.open()
    load(store)
    assert (store.chain_at(Index(0)), store.term_at(Index(0))) == (bytes(16), 0)
    append(store, 1, 3)
    append(store, 4, 6, term=2, floor=6)
    log = [*entries(1, 3), *entries(4, 6, 2)]
    for n in range(1, 7):
        assert (store.chain_at(Index(n)), store.term_at(Index(n))) == (chain_of(*log[:n]), log[n - 1].term)
    store.compact(Index(3))
    assert (store.chain_at(Index(3)), store.term_at(Index(3))) == (chain_of(*log[:3]), 1)
    for n in (0, 2, 7):
        assert (store.chain_at(Index(n)), store.term_at(Index(n))) == (None, None)


# -- an installed snapshot -------------------------------------------------------------------------------------------


@HOW
@pytest.mark.parametrize("index", [6, 4, 1_000])
def test_a_reset_log_begins_behind_the_snapshot_with_nothing_in_it(bench: Bench, index: int, how: str) -> None:
    store = bench.open()
    load(store)
    append(store, 1, 6, term=3, floor=4)
    store.append((), HardState(Term(9), VOTER), Index(4))
    store.reset(Index(index), Term(8), b"c" * 16, NEW)
    for _ in range(2):
        store = restarted(bench, store, how=how)
        loaded = load(store)
        assert (loaded.first, loaded.last, loaded.acked_floor, loaded.torn) == (index + 1, index, index, 0)
        assert (loaded.base, loaded.base_term, loaded.base_config) == (index, 8, NEW)
        assert (loaded.runs, loaded.configs, loaded.hard_state) == ((), (), HardState(Term(9), VOTER))
        assert (store.chain_at(Index(index)), store.term_at(Index(index))) == (b"c" * 16, 8)
        assert store.read(Index(1), Index(2_000)) == []
    append(store, index + 1, index + 2, term=9)
    store = restarted(bench, store, how=how)
    assert (load(store).last, load(store).runs) == (index + 2, ((index + 1, 9),))


def test_a_reset_may_be_done_again_and_before_the_log_is_loaded(bench: Bench) -> None:
    """A crash between the new state and the new log: the state is ahead of the log, which would be refused."""
    store = bench.open()
    load(store)
    append(store, 1, 6, floor=4)
    store.close()
    store = bench.open()
    with pytest.raises(CorruptLog):
        load(store, applied=20)
    store.close()
    for _ in range(2):
        store = bench.open()
        store.reset(Index(20), Term(2), b"c" * 16, OLD)
        assert (load(store, applied=20).last, load(store, applied=20).base_config) == (20, OLD)
        store.close()


def test_a_reset_to_before_what_was_acknowledged_is_our_own_bug(bench: Bench) -> None:
    store = bench.open()
    load(store)
    append(store, 1, 6, floor=4)
    with pytest.raises(AssertionError, match="acknowledged"):
        store.reset(Index(3), Term(1), b"c" * 16, OLD)
    load(store, applied=5)
    with pytest.raises(AssertionError, match="acknowledged"):
        store.reset(Index(4), Term(1), b"c" * 16, OLD)
    assert store.read(Index(1), Index(9)) == [*entries(1, 6)]


def test_damage_behind_a_reset_is_judged_by_the_same_rule(bench: Bench) -> None:
    store = bench.open()
    load(store)
    store.reset(Index(10), Term(1), b"c" * 16, OLD)
    append(store, 11, 13, floor=11)
    store.close()
    bench.damage(13)
    store = bench.open()
    loaded = load(store)
    assert (loaded.last, loaded.torn) == (12, 1)
    store.close()
    bench.lose(11)
    with pytest.raises(CorruptLog, match="entry 11 "):
        load(bench.open())


# -- whose it is -----------------------------------------------------------------------------------------------------


@HOW
def test_a_founded_store_belongs_to_its_cluster_with_its_first_configuration(bench: Bench, how: str) -> None:
    store = bench.open()
    load(store)
    store.found(ClusterId("c1"), NEW)
    store = restarted(bench, store, how=how)
    loaded = load(store)
    assert (loaded.identity.cluster, loaded.base_config, loaded.last) == ("c1", NEW, 0)
    for cluster in ("c1", "c2"):
        with pytest.raises(WrongStore, match="c1"):
            store.found(ClusterId(cluster), OLD)
    assert load(store).base_config == NEW


@HOW
def test_a_store_joins_one_cluster_and_may_say_so_twice(bench: Bench, how: str) -> None:
    store = bench.open()
    load(store)
    store.join(ClusterId("c1"))
    store = restarted(bench, store, how=how)
    loaded = load(store)
    assert (loaded.identity.cluster, loaded.base_config) == ("c1", Config())
    store.join(ClusterId("c1"))
    with pytest.raises(StorageError, match=r"c1.*c2"):
        store.join(ClusterId("c2"))
    with pytest.raises(StorageError):
        store.found(ClusterId("c2"), OLD)
    assert load(store).identity.cluster == "c1"


def filled(bench: Bench, config: Config | None = None, *log: Entry) -> None:
    """A store of cluster c1 with three entries; `config` None: its own voter is the only one."""
    store = bench.open()
    mine = voters(load(store).identity.voter)
    store.found(ClusterId("c1"), mine if config is None else config)
    store.append(log or entries(1, 3), HardState(Term(1), VOTER), Index(2))
    store.close()


def test_a_copy_of_a_store_is_refused_and_left_alone(bench: Bench) -> None:
    filled(bench, NEW)
    load(bench.open())
    bench.copied()
    before = bench.content()
    for _ in range(2):
        with pytest.raises(CopiedStore, match="--adopt") as error:
            bench.open()
        assert not error.value.alone
    assert bench.content() == before


def test_an_adopted_copy_is_another_voter_with_the_same_log(bench: Bench) -> None:
    filled(bench, NEW)
    old = load(bench.open()).identity
    bench.copied()
    store = bench.open(adopt=True)
    loaded = load(store)
    assert (loaded.identity.cluster, loaded.identity.node) == (old.cluster, old.node)
    assert loaded.identity.disk != old.disk
    assert load(store).identity == loaded.identity, "adopted once"
    assert (loaded.base_config, loaded.last, loaded.hard_state) == (NEW, 3, HardState(Term(1), VOTER))
    store.close()
    assert load(bench.open()).identity == loaded.identity


def test_the_adopted_copy_of_a_clusters_only_voter_is_its_only_voter(bench: Bench) -> None:
    filled(bench)
    bench.copied()
    with pytest.raises(CopiedStore) as error:
        bench.open()
    assert error.value.alone
    loaded = load(bench.open(adopt=True))
    assert loaded.base_config == voters(loaded.identity.voter)


def test_an_adopted_copy_of_one_of_several_voters_is_none(bench: Bench) -> None:
    store = bench.open()
    several = Config((*voters(load(store).identity.voter).voters, *NEW.voters))
    store.found(ClusterId("c1"), several)
    store.close()
    bench.copied()
    with pytest.raises(CopiedStore) as error:
        bench.open()
    assert not error.value.alone
    assert load(bench.open(adopt=True)).base_config == several


def test_adopting_does_not_rewrite_a_configuration_that_is_in_the_log(bench: Bench) -> None:
    store = bench.open()
    mine = voters(load(store).identity.voter)
    store.found(ClusterId("c1"), mine)
    store.append((entry(1), config_entry(2, mine)), None, Index(2))
    store.close()
    bench.copied()
    with pytest.raises(CopiedStore) as error:
        bench.open()
    assert error.value.alone
    loaded = load(bench.open(adopt=True))
    assert (loaded.base_config, loaded.configs) == (mine, ((2, mine),))


def test_an_unchecked_copy_is_taken_for_the_original_from_then_on(bench: Bench) -> None:
    filled(bench)
    old = load(bench.open()).identity
    bench.copied()
    store = bench.open(check_copy=False)
    assert load(store).identity == old
    store.close()
    assert load(bench.open()).identity == old


def test_a_damaged_copy_is_refused_before_it_is_adopted(bench: Bench) -> None:
    filled(bench)
    bench.copied()
    bench.damage(1)
    before = bench.content()
    store = bench.open(adopt=True)
    with pytest.raises(CorruptLog, match="Nothing was changed"):
        load(store)
    store.close()
    assert bench.content() == before


# -- a full disk -----------------------------------------------------------------------------------------------------


def test_a_full_disk_takes_nothing_of_a_write_and_the_store_goes_on_when_there_is_room(bench: Bench) -> None:
    store = bench.open()
    load(store)
    append(store, 1, 3, floor=2)
    make_room = bench.fill(store)
    for _ in range(3):
        with pytest.raises(DiskFull):
            store.append(
                [entry(n, 2, b"x" * 5_000) for n in range(3, 40)], HardState(Term(2), None), Index(3), Index(3)
            )
    assert store.read(Index(1), Index(99)) == [*entries(1, 3)]
    make_room()
    append(store, 4, 4, floor=3)
    store.append((entry(4, 1, b"again"),), None, Index(3), Index(4))
    store = restarted(bench, store, how="power cut")
    loaded = load(store)
    assert (loaded.last, loaded.acked_floor, loaded.hard_state) == (4, 3, HardState(Term(1), VOTER))
    assert store.read(Index(1), Index(9)) == [*entries(1, 3), entry(4, 1, b"again")]
