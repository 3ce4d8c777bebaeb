"""A cluster whose majority is lost for good goes on, by a person's decision, as a new one of a single voter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from p2p.effects import HardState
from p2p.ids import ClusterId, Index, Term, VoterId
from p2p.storage import CorruptLog, DiskFull, LogStore, WrongStore
from p2p.storage.glance import glance
from tests.conformance.stores import (
    BENCHES,
    VOTER,
    Bench,
    DiskBench,
    config_entry,
    entries,
    entry,
    load,
    voters,
)

OLD, NEW = ClusterId("old"), ClusterId("new")


@pytest.fixture(params=BENCHES)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    yield BENCHES[request.param](tmp_path)


def follower(bench: Bench, *, floor: int = 4) -> LogStore:
    """A store of one voter of three that holds entries 1 to 6, and knows those up to `floor` to be committed."""
    store = bench.open()
    me = load(store).identity.voter
    store.join(OLD)
    store.append(
        (*entries(1, 2), config_entry(3, voters(me, "n2@d2", "n3@d3"), 2), *entries(4, 6, 2)),
        HardState(Term(4), VOTER),
        Index(floor),
    )
    return store


def reopened(bench: Bench, store: LogStore, **how: bool) -> LogStore:
    store.close()
    return bench.open(**how)


def recovered(bench: Bench, store: LogStore) -> VoterId:
    """As `p2pctl recover` does it: a new disk, then a new cluster."""
    store = reopened(bench, store, adopt=True)
    me = load(store).identity.voter
    store.recover(NEW, voters(me))
    store.close()
    return me


def test_the_whole_log_is_kept_and_the_only_voter_comes_behind_it_in_a_new_term(bench: Bench) -> None:
    me = recovered(bench, follower(bench))
    store = bench.open()
    loaded = load(store)
    assert (loaded.identity.cluster, loaded.identity.voter) == (NEW, me)
    assert loaded.hard_state == HardState(Term(5), me), "a term that no voter has seen, with its own vote given"
    assert (loaded.last, loaded.torn) == (7, 0)
    assert loaded.configs[-1] == (7, voters(me))
    assert store.read(Index(4), Index(7)) == [*entries(4, 6, 2), config_entry(7, voters(me), 5)]
    assert loaded.runs[-1] == (7, 5)


def test_the_disk_is_another_one_so_that_the_lost_voters_do_not_count_it(bench: Bench) -> None:
    store = follower(bench)
    before = load(reopened(bench, store)).identity
    after = recovered(bench, bench.open())
    assert after.partition("@")[0] == before.node
    assert after != before.voter


def test_everything_counts_as_acknowledged_from_then_on(bench: Bench) -> None:
    recovered(bench, follower(bench))
    store = bench.open()
    assert load(store).acked_floor == 7
    with pytest.raises(AssertionError):
        store.append((), None, Index(7), Index(6))
    store.close()
    bench.damage(7)
    store = bench.open()
    with pytest.raises(CorruptLog):
        load(store)


def test_it_goes_on_from_there(bench: Bench) -> None:
    me = recovered(bench, follower(bench))
    store = bench.open()
    load(store)
    store.append((entry(8, 6, b""), entry(9, 6)), HardState(Term(6), me), Index(7))
    store = reopened(bench, store)
    assert load(store).last == 9
    assert store.compact(Index(8)) == 0
    store = reopened(bench, store)
    loaded = load(store, applied=8)
    assert (loaded.base, loaded.base_config, loaded.configs) == (8, voters(me), ())


def test_a_log_that_begins_behind_a_snapshot_and_holds_nothing_else_is_recovered(bench: Bench) -> None:
    store = bench.open()
    load(store)
    store.join(OLD)
    store.append((), HardState(Term(2), None), Index(0))
    store.reset(Index(50), Term(9), b"c" * 16, voters("n2@d2", "n3@d3"))
    me = recovered(bench, store)
    store = bench.open()
    loaded = load(store, applied=50)
    assert (loaded.last, loaded.hard_state.term) == (51, 10), "above the term of the last entry too"
    assert loaded.configs == ((51, voters(me)),)


def test_a_copy_is_recovered_too(bench: Bench) -> None:
    """All voters are gone, and there is a backup of one of them."""
    follower(bench).close()
    bench.copied()
    me = recovered(bench, bench.open(adopt=True))
    assert load(bench.open()).configs[-1][1] == voters(me)


@pytest.mark.parametrize("clustered", [False, True], ids=["blank", "joined and empty"])
def test_a_store_that_holds_nothing_is_not_recovered(bench: Bench, clustered: bool) -> None:
    store = bench.open()
    me = load(store).identity.voter
    if clustered:
        store.join(OLD)
    with pytest.raises(WrongStore, match="nothing to recover"):
        store.recover(NEW, voters(me))


@pytest.mark.parametrize(
    ("cluster", "names"),
    [(OLD, ("n1@d1",)), (ClusterId(""), ("n1@d1",)), (NEW, ("n1@d1", "n2@d2")), (NEW, ("n2@d2",)), (NEW, ())],
    ids=["the same cluster", "no cluster", "two voters", "another node", "nobody"],
)
def test_only_a_new_cluster_of_this_node_alone_can_be_made(
    bench: Bench, cluster: ClusterId, names: tuple[str, ...]
) -> None:
    store = follower(bench)
    with pytest.raises(AssertionError):
        store.recover(cluster, voters(*names))


def test_a_full_disk_changes_nothing(bench: Bench) -> None:
    store = reopened(bench, follower(bench), adopt=True)
    me = load(store).identity.voter
    store.compact(Index(1))
    make_room = bench.fill(store)
    big = voters(f"n1@{'x' * 20_000}")
    with pytest.raises(DiskFull):
        store.recover(NEW, big)
    make_room()
    store = reopened(bench, store)
    loaded = load(store)
    assert (loaded.identity.cluster, loaded.last, loaded.hard_state.term) == (OLD, 6, 4)
    store.recover(NEW, voters(me))


def test_a_power_cut_after_it_returned_takes_nothing_back(bench: Bench) -> None:
    store = reopened(bench, follower(bench), adopt=True)
    me = load(store).identity.voter
    store.recover(NEW, voters(me))
    bench.power_cut(store)
    assert load(bench.open()).configs[-1] == (7, voters(me))


# -- looking first ---------------------------------------------------------------------------------------------------


def test_a_glance_tells_what_is_there_and_changes_nothing(tmp_path: Path) -> None:
    bench = DiskBench(tmp_path)
    store = follower(bench)
    me = load(reopened(bench, store)).identity
    before = bench.content()
    seen = glance(bench.path)
    assert (seen.identity, seen.copied) == (me, False)
    assert (seen.term, seen.base, seen.last, seen.last_term, seen.acked_floor) == (4, 0, 6, 2, 4)
    assert (seen.config, seen.newest) == (voters(me.voter, "n2@d2", "n3@d3"), b"body 6")
    assert bench.content() == before
    bench.copied()
    assert glance(bench.path).copied
    assert bench.content() == before
    recovered(bench, bench.open(adopt=True))
    seen = glance(bench.path)
    assert (seen.identity.cluster, seen.last, seen.acked_floor) == (NEW, 7, 7)
    assert seen.config.voters == (seen.identity.voter,)
    assert seen.newest == b"body 6", "a configuration is no command"
