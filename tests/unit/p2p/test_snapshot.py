"""Copies of the queue: consistent while it is written, checked before use, two kept, and the log let go behind them."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from coordination import commands as c
from coordination.queue_state import QueueState
from p2p.driver import Driver, boot_seconds
from p2p.effects import Config, Entry, HardState, SnapshotMeta
from p2p.ids import ClusterId, Index, Term, VoterId
from p2p.journal import snapshot
from p2p.replica import Replica
from p2p.storage.memory import MemoryLog
from tests.nodes import wait_until
from tests.simulation.workload import Workload, dump, dump_file, new_job, replayed
from tests.unit.p2p.driving import NODE, SECONDS

Entries = list[tuple[int, int, bytes]]


def filled(path: Path, upto: int, seed: int = 0) -> tuple[QueueState, Entries, Workload]:
    """A queue file with so many random entries applied."""
    state, work, entries = QueueState(str(path)), Workload(random.Random(seed)), []
    while state.applied_index < upto:
        entries.append((state.applied_index + 1, 1, c.encode(work.next(state))))
        state.apply_batch(entries[-1:])
    return state, entries, work


# -- take and restore -------------------------------------------------------------------------------------------------


def test_a_snapshot_holds_the_state_at_its_index(tmp_path: Path) -> None:
    state, entries, _ = filled(tmp_path / "state.db", 60)
    made = snapshot.take(tmp_path / "state.db", tmp_path / "snapshots")
    assert (made.at_index, made.term, made.path.name) == (60, 1, "state-60-1.db")
    state.apply_batch([(61, 1, c.encode(c.Submit(2_000_000_000_000, (new_job("late"),), "", "")))])
    state.close()
    assert snapshot.restore(tmp_path / "snapshots", tmp_path / "other.db") == made
    restored = QueueState(str(tmp_path / "other.db"))
    assert restored.applied_index == 60
    assert dump(restored._db) == replayed(entries)
    restored.close()


def test_a_snapshot_is_consistent_while_the_queue_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "PAGES_A_STEP", 1)
    state, entries, work = filled(tmp_path / "state.db", 100)
    made: list[snapshot.Snapshot] = []

    def take() -> None:
        for _ in range(5):
            made.append(snapshot.take(tmp_path / "state.db", tmp_path / "snapshots"))

    thread = threading.Thread(target=take)
    thread.start()
    while thread.is_alive():
        entries.append((state.applied_index + 1, 1, c.encode(work.next(state))))
        state.apply_batch(entries[-1:])
        if state.applied_index % 50 == 0:
            state.checkpoint()
    thread.join()
    state.close()
    assert made[-1].at_index > 100
    for kept in snapshot.listed(tmp_path / "snapshots"):
        assert dump_file(kept.path) == replayed(entries[: kept.at_index])


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    state, _, work = filled(tmp_path / "state.db", 5)
    for upto in (5, 6, 7, 8):
        while state.applied_index < upto:
            state.apply_batch([(state.applied_index + 1, 1, c.encode(work.next(state)))])
        snapshot.take(tmp_path / "state.db", tmp_path / "snapshots")
    state.close()
    assert [kept.at_index for kept in snapshot.listed(tmp_path / "snapshots")] == [8, 7]
    assert len(list((tmp_path / "snapshots").iterdir())) == 4


def two_snapshots(tmp_path: Path) -> tuple[snapshot.Snapshot, snapshot.Snapshot]:
    state, _, work = filled(tmp_path / "state.db", 20)
    older = snapshot.take(tmp_path / "state.db", tmp_path / "snapshots")
    for index in range(21, 31):
        state.apply_batch([(index, 1, c.encode(work.next(state)))])
    newer = snapshot.take(tmp_path / "state.db", tmp_path / "snapshots")
    state.close()
    return older, newer


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5_000])


def flip(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 4
    path.write_bytes(body)


def spoil_hash(path: Path) -> None:
    path.with_suffix(".sha256").write_bytes(b"\xff\xfe nonsense")


def lose_hash(path: Path) -> None:
    path.with_suffix(".sha256").unlink()


@pytest.mark.parametrize("damage", [truncate, flip, spoil_hash, lose_hash, Path.unlink])
def test_a_damaged_newest_snapshot_falls_back_to_the_older(tmp_path: Path, damage: Any) -> None:
    older, newer = two_snapshots(tmp_path)
    damage(newer.path)
    assert snapshot.restore(tmp_path / "snapshots", tmp_path / "state.db") == older
    restored = QueueState(str(tmp_path / "state.db"))
    assert restored.applied_index == older.at_index
    restored.close()


def test_two_damaged_snapshots_restore_nothing_and_touch_nothing(tmp_path: Path) -> None:
    for made in two_snapshots(tmp_path):
        flip(made.path)
    before = (tmp_path / "state.db").read_bytes()
    assert snapshot.restore(tmp_path / "snapshots", tmp_path / "state.db") is None
    assert (tmp_path / "state.db").read_bytes() == before


def test_a_damaged_database_with_a_good_hash_is_not_restored(tmp_path: Path) -> None:
    older, newer = two_snapshots(tmp_path)
    body = bytearray(newer.path.read_bytes())
    body[4096:8192] = b"\xaa" * 4096
    newer.path.write_bytes(body)
    newer.path.with_suffix(".sha256").write_text(snapshot._sha256(newer.path))
    assert snapshot.restore(tmp_path / "snapshots", tmp_path / "state.db") == older


def test_a_restore_leaves_no_write_ahead_log_of_the_old_state(tmp_path: Path) -> None:
    two_snapshots(tmp_path)
    state, _, _ = filled(tmp_path / "broken.db", 10, seed=5)
    state._db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    state._db.close(True)
    assert (tmp_path / "broken.db-wal").stat().st_size
    snapshot.restore(tmp_path / "snapshots", tmp_path / "broken.db")
    restored = QueueState(str(tmp_path / "broken.db"))
    assert restored.applied_index == 30
    restored.close()


def test_no_snapshots_restore_nothing(tmp_path: Path) -> None:
    assert snapshot.listed(tmp_path / "none") == []
    assert snapshot.restore(tmp_path / "none", tmp_path / "state.db") is None


def test_leftovers_of_a_snapshot_cut_short_do_no_harm(tmp_path: Path) -> None:
    state, entries, _ = filled(tmp_path / "state.db", 12)
    folder = tmp_path / "snapshots"
    folder.mkdir()
    for side in ("", "-journal", "-wal", "-shm"):
        (folder / f"unfinished.db{side}").write_bytes(b"half a page" * 400)
    (folder / "state-99-1.db").write_bytes(b"no hash beside it")
    made = snapshot.take(tmp_path / "state.db", folder)
    state.close()
    assert [s.path for s in snapshot.listed(folder)] == [made.path]
    assert dump_file(made.path) == replayed(entries)


def test_a_snapshot_gives_up_when_told_to(tmp_path: Path) -> None:
    state, _, _ = filled(tmp_path / "state.db", 10)
    with pytest.raises(snapshot.GivenUp):
        snapshot.take(tmp_path / "state.db", tmp_path / "snapshots", give_up=lambda: True)
    state.close()
    assert snapshot.listed(tmp_path / "snapshots") == []


# -- offering to a follower -------------------------------------------------------------------------------------------

CONFIG = Config((VoterId("n1@d1"), VoterId("n2@d2")), (VoterId("ö@d3"),))
CHAIN = bytes(range(16))


def described(index: int) -> tuple[bytes, Config]:
    return CHAIN, CONFIG


def offered(folder: Path, upto: int = 40, seed: int = 0) -> SnapshotMeta:
    """A leader's folder with a snapshot in it, and the offer of that."""
    folder.mkdir(parents=True, exist_ok=True)
    state, _, _ = filled(folder / "state.db", upto, seed)
    snapshot.take(folder / "state.db", folder / "snapshots", describe=described)
    state.close()
    offer = snapshot.offerable(folder / "snapshots")
    assert offer is not None
    return offer


def test_a_described_snapshot_is_offered_with_what_a_follower_must_know(tmp_path: Path) -> None:
    offer = offered(tmp_path)
    file = tmp_path / "snapshots" / "state-40-1.db"
    assert offer == (40, 1, CONFIG, CHAIN, file.name, file.stat().st_size, snapshot._sha256(file))


def test_a_snapshot_whose_log_is_not_known_is_restored_here_and_not_offered(tmp_path: Path) -> None:
    offer = offered(tmp_path)
    asked = []

    def unknown(index: int) -> None:
        asked.append(index)

    state = QueueState(str(tmp_path / "state.db"))
    state.apply_batch([(41, 1, c.encode(c.Submit(2_000_000_000_000, (new_job("late"),), "", "")))])
    state.close()
    newest = snapshot.take(tmp_path / "state.db", tmp_path / "snapshots", describe=unknown)
    assert asked == [41]
    assert snapshot.offerable(tmp_path / "snapshots") == offer, "the older one then"
    assert snapshot.restore(tmp_path / "snapshots", tmp_path / "other.db") == newest


def test_a_snapshot_taken_again_without_a_description_is_not_offered_with_the_old_one(tmp_path: Path) -> None:
    offered(tmp_path)
    snapshot.take(tmp_path / "state.db", tmp_path / "snapshots")
    assert snapshot.offerable(tmp_path / "snapshots") is None


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff", b"[]", b"{}", b"null", {"format": 2}, {"name": "state-41-1.db"}]
    + [{key: "../state.db"} for key in ("index", "size", "config", "chain", "name")],
)
def test_a_damaged_description_is_not_offered(tmp_path: Path, body: Any) -> None:
    offered(tmp_path)
    path = tmp_path / "snapshots" / "state-40-1.meta"
    path.write_bytes(body if isinstance(body, bytes) else json.dumps(json.loads(path.read_bytes()) | body).encode())
    assert snapshot.offerable(tmp_path / "snapshots") is None


def test_a_snapshot_that_was_cut_off_is_not_offered(tmp_path: Path) -> None:
    offered(tmp_path)
    truncate(tmp_path / "snapshots" / "state-40-1.db")
    assert snapshot.offerable(tmp_path / "snapshots") is None
    assert snapshot.offerable(tmp_path / "none") is None


def test_what_is_offered_goes_with_its_description_when_it_is_old(tmp_path: Path) -> None:
    state, _, work = filled(tmp_path / "state.db", 10)
    for upto in (10, 20, 30):
        for index in range(state.applied_index + 1, upto + 1):
            state.apply_batch([(index, 1, c.encode(work.next(state)))])
        snapshot.take(tmp_path / "state.db", tmp_path / "snapshots", describe=described)
    state.close()
    names = sorted(path.name for path in (tmp_path / "snapshots").iterdir())
    assert names == [f"state-{n}-1.{ending}" for n in (20, 30) for ending in ("db", "meta", "sha256")]


def test_chunks_make_the_whole_and_end_with_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer = offered(tmp_path)
    monkeypatch.setattr(snapshot, "CHUNK_BYTES", 10_000)
    whole = (tmp_path / "snapshots" / offer.name).read_bytes()
    chunks = []
    while chunk := snapshot.read_chunk(tmp_path / "snapshots", offer.name, sum(map(len, chunks)), 1 << 30):
        chunks.append(chunk)
    assert b"".join(chunks) == whole
    assert max(map(len, chunks)) == 10_000
    assert snapshot.read_chunk(tmp_path / "snapshots", offer.name, 5, 3) == whole[5:8]
    assert snapshot.read_chunk(tmp_path / "snapshots", offer.name, 1 << 50, 10) == b""


@pytest.mark.parametrize(
    ("name", "offset", "length"),
    [
        ("../state.db", 0, 10),
        ("state.db", 0, 10),
        ("", 0, 10),
        (".", 0, 10),
        ("state-40-1.db\n", 0, 10),
        ("state-40-1.sha256", 0, 10),
        ("/state-40-1.db", 0, 10),
        ("state-٤٠-1.db", 0, 10),
        ("state-41-1.db", 0, 10),
        ("state-42-1.db", 0, 10),
        ("state-40-1.db", -1, 10),
        ("state-40-1.db", 0, -1),
    ],
)
def test_nothing_but_a_finished_snapshot_is_read_for_a_peer(
    tmp_path: Path, name: str, offset: int, length: int
) -> None:
    offered(tmp_path)
    (tmp_path / "snapshots" / "state-41-1.db").write_bytes(b"no hash beside it")
    (tmp_path / "snapshots" / "state-42-1.sha256").write_bytes(b"a hash alone")
    with pytest.raises(snapshot.NoSuchSnapshot):
        snapshot.read_chunk(tmp_path / "snapshots", name, offset, length)


def test_all_of_a_snapshot_is_durable_before_its_name_says_that_it_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story: list[str] = []
    real_sync, real_replace = snapshot._sync, Path.replace

    def sync(path: Path) -> None:
        story.append(f"sync {path.name}")
        real_sync(path)

    def replace(path: Path, target: Path) -> Path:
        story.append(f"rename {path.name}")
        return real_replace(path, target)

    monkeypatch.setattr(snapshot, "_sync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    beside = ["sync state-40-1.sha256", "sync state-40-1.meta"]
    offer = offered(tmp_path / "leader")
    assert story == [*beside, "sync unfinished.db", "rename unfinished.db", "sync snapshots"]
    incoming = snapshot.Incoming(tmp_path / "mine", offer)
    fetch(tmp_path / "leader", incoming)
    story.clear()
    incoming.finish()
    partial = incoming._partial.name
    assert story == [*beside, f"sync {partial}", f"rename {partial}", "sync mine"]


# -- fetching ---------------------------------------------------------------------------------------------------------


def fetch(leader: Path, incoming: snapshot.Incoming, step: int = 30_000, upto: int | None = None) -> None:
    while incoming.offset < (incoming.meta.size if upto is None else upto):
        incoming.write(snapshot.read_chunk(leader / "snapshots", incoming.meta.name, incoming.offset, step))


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_fetched_snapshot_is_one_like_any_other(tmp_path: Path) -> None:
    offer = offered(tmp_path / "leader")
    mine = tmp_path / "mine"
    incoming = snapshot.Incoming(mine, offer)
    assert incoming.offset == 0
    fetch(tmp_path / "leader", incoming)
    path = incoming.finish()
    assert path.read_bytes() == (tmp_path / "leader/snapshots" / offer.name).read_bytes()
    assert left_in(mine) == ["state-40-1.db", "state-40-1.meta", "state-40-1.sha256"]
    assert snapshot.offerable(mine) == offer
    restored = snapshot.restore(mine, tmp_path / "state.db")
    assert restored is not None and restored.path == path


def test_fetching_goes_on_where_it_was_after_a_restart_and_forgets_other_fetches(tmp_path: Path) -> None:
    older, offer = offered(tmp_path / "older", 30, 1), offered(tmp_path / "leader")
    mine = tmp_path / "mine"
    fetch(tmp_path / "older", snapshot.Incoming(mine, older), upto=50_000)
    fetch(tmp_path / "leader", snapshot.Incoming(mine, offer), upto=50_000)
    assert len(left_in(mine)) == 1
    again = snapshot.Incoming(mine, offer)
    assert 50_000 <= again.offset < offer.size
    fetch(tmp_path / "leader", again)
    assert snapshot._sha256(again.finish()) == offer.sha256


def test_fetching_does_not_touch_finished_snapshots(tmp_path: Path) -> None:
    mine, offer = offered(tmp_path / "mine", 20, 1), offered(tmp_path / "leader")
    incoming = snapshot.Incoming(tmp_path / "mine/snapshots", offer)
    fetch(tmp_path / "leader", incoming)
    incoming.finish()
    assert [s.at_index for s in snapshot.listed(tmp_path / "mine/snapshots")] == [40, 20]
    assert snapshot.offerable(tmp_path / "mine/snapshots") == offer != mine


def test_a_fetched_snapshot_is_kept_even_behind_two_newer_ones(tmp_path: Path) -> None:
    for upto in (50, 60):
        offered(tmp_path / "mine", upto, seed=upto)
        (tmp_path / "mine/state.db").unlink()
    offer = offered(tmp_path / "leader")
    incoming = snapshot.Incoming(tmp_path / "mine/snapshots", offer)
    fetch(tmp_path / "leader", incoming)
    assert incoming.finish().exists()


def not_a_database(offer: SnapshotMeta, body: bytes) -> tuple[SnapshotMeta, bytes]:
    body = b"q" * len(body)
    return offer._replace(sha256=hashlib.sha256(body).hexdigest()), body


def damaged_inside(offer: SnapshotMeta, body: bytes) -> tuple[SnapshotMeta, bytes]:
    body = body[:-4096] + b"\xaa" * 4096
    return offer._replace(sha256=hashlib.sha256(body).hexdigest()), body


def another_database(offer: SnapshotMeta, body: bytes) -> tuple[SnapshotMeta, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        db = apsw.Connection(f"{folder}/other.db")
        db.execute("CREATE TABLE other (x)")
        db.close()
        body = Path(folder, "other.db").read_bytes()
    return offer._replace(sha256=hashlib.sha256(body).hexdigest(), size=len(body)), body


BAD_FETCHES: dict[str, Any] = {
    "too short": lambda offer, body: (offer, body[:-1]),
    "a flipped bit": lambda offer, body: (offer, body[:-1] + bytes([body[-1] ^ 1])),
    "no database": not_a_database,
    "damaged inside": damaged_inside,
    "no state": another_database,
    "another index": lambda offer, body: (offer._replace(index=41, name="state-41-1.db"), body),
    "another term": lambda offer, body: (offer._replace(term=2, name="state-40-2.db"), body),
}


@pytest.mark.parametrize("spoil", BAD_FETCHES.values(), ids=BAD_FETCHES)
def test_what_is_not_what_was_offered_is_refused_and_removed(tmp_path: Path, spoil: Any) -> None:
    offer = offered(tmp_path / "leader")
    offer, body = spoil(offer, (tmp_path / "leader/snapshots" / offer.name).read_bytes())
    incoming = snapshot.Incoming(tmp_path / "mine", offer)
    incoming.write(body)
    with pytest.raises(snapshot.BadSnapshot):
        incoming.finish()
    assert left_in(tmp_path / "mine") == []
    assert snapshot.Incoming(tmp_path / "mine", offer).offset == 0


def test_more_than_was_offered_is_refused(tmp_path: Path) -> None:
    offer = offered(tmp_path / "leader")
    incoming = snapshot.Incoming(tmp_path / "mine", offer)
    fetch(tmp_path / "leader", incoming)
    with pytest.raises(snapshot.BadSnapshot):
        incoming.write(b"!")
    (tmp_path / "mine" / incoming._partial.name).write_bytes(bytes(offer.size + 1))
    assert snapshot.Incoming(tmp_path / "mine", offer).offset == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "../../state.db"},
        {"name": "state-41-1.db"},
        {"index": -40, "name": "state--40-1.db"},
        {"sha256": "../../x"},
        {"sha256": ""},
        {"size": 0},
    ],
)
def test_an_offer_that_cannot_be_one_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    offer = offered(tmp_path / "leader")
    with pytest.raises(snapshot.BadSnapshot):
        snapshot.Incoming(tmp_path / "mine", offer._replace(**wrong))
    assert not (tmp_path / "mine").exists()


# -- putting it in place ----------------------------------------------------------------------------------------------


class Cut(Exception):
    """The power goes."""


def power_cut(*_: Any) -> None:
    raise Cut


class Follower:
    """A folder with a state, its write-ahead log full of what is not in the main file, a journal behind a leader's,
    and a finished snapshot that was fetched."""

    def __init__(self, folder: Path) -> None:
        self.offer = offered(folder / "leader")
        self.state, self.snapshots = folder / "mine/state.db", folder / "mine/snapshots"
        incoming = snapshot.Incoming(self.snapshots, self.offer)
        fetch(folder / "leader", incoming)
        self.incoming = incoming.finish()
        state, _, _ = filled(self.state, 10, seed=5)
        state._db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        state._db.close(True)
        self.log = MemoryLog(NODE)
        self.log.load(applied=Index(0))
        entries = [Entry(Index(n), Term(1), b"") for n in range(1, 16)]
        self.log.append(entries, HardState(Term(1), None), Index(10))

    def install(self) -> None:
        """What a running node does."""
        marker = snapshot.marker_in(self.snapshots)
        snapshot.install(self.incoming, self.state, marker, self.offer)
        self._finish(self.offer)

    def start(self) -> SnapshotMeta | None:
        """What a start does first."""
        pending = snapshot.resume_install(self.snapshots, self.state)
        if pending is not None:
            self._finish(pending)
        return pending

    def _finish(self, meta: SnapshotMeta) -> None:
        self.log.reset(meta.index, meta.term, meta.chain, meta.config)
        snapshot.installed(snapshot.marker_in(self.snapshots))

    def where(self) -> tuple[int, int]:
        """(applied by the state, last of the log), as a start finds them."""
        state = QueueState(str(self.state))
        applied = state.applied_index
        state.close()
        return applied, self.log.load(applied=Index(applied)).last


def test_an_installed_snapshot_is_the_state_and_the_base_of_the_log(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    follower.install()
    assert follower.where() == (40, 40)
    loaded = follower.log.load(applied=Index(40))
    assert (loaded.base, loaded.base_term, loaded.base_config) == (40, 1, CONFIG)
    assert follower.log.chain_at(Index(40)) == CHAIN
    assert dump_file(follower.state) == dump_file(tmp_path / "leader/state.db")
    assert follower.start() is None
    assert snapshot.pending_install(follower.snapshots) is None
    assert not follower.state.with_suffix(".incoming").exists()


def cut_at(n: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The power goes before the n-th thing that an install does to the disk. The answer grows with what was done."""
    done: list[str] = []

    def watched(name: str, real: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            if len(done) == n:
                raise Cut
            done.append(name)
            return real(*arguments, **more)

        return call

    for owner, name in (
        (snapshot, "_sync"),
        (snapshot.shutil, "copyfile"),
        (Path, "replace"),
        (Path, "unlink"),
        (Path, "write_text"),
        (MemoryLog, "reset"),
    ):
        monkeypatch.setattr(owner, name, watched(name, getattr(owner, name)))
    return done


def test_an_install_that_is_cut_short_anywhere_is_done_again_by_the_next_start(tmp_path: Path) -> None:
    seen = set()
    for n in itertools.count():
        follower = Follower(tmp_path / str(n))
        with pytest.MonkeyPatch.context() as patch:
            done = cut_at(n, patch)
            try:
                follower.install()
            except Cut:
                pass
            else:
                break
        pending = follower.start()
        complete = done[-1:] == ["unlink"] and "reset" in done
        assert follower.where() == ((40, 40) if pending or complete else (10, 15)), f"cut after {done}"
        assert not (pending and complete)
        if pending:
            assert pending == follower.offer
            assert dump_file(follower.state) == dump_file(tmp_path / str(n) / "leader/state.db")
        assert follower.start() is None
        seen.add(pending is not None)
    assert n > 12, "every step is one to be cut at"
    assert seen == {True, False}


def test_a_start_that_is_cut_short_while_it_resumes_is_resumed(tmp_path: Path) -> None:
    for n in itertools.count():
        follower = Follower(tmp_path / str(n))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MemoryLog, "reset", power_cut)
            with pytest.raises(Cut):
                follower.install()
        with pytest.MonkeyPatch.context() as patch:
            cut_at(n, patch)
            try:
                follower.start()
            except Cut:
                pass
            else:
                break
        follower.start()
        assert follower.where() == (40, 40)
    assert n > 8


def test_the_marker_is_durable_before_the_state_is_touched_and_gone_durably_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = Follower(tmp_path)
    story: list[tuple[str, str]] = []
    real_sync, real_replace, real_unlink = snapshot._sync, Path.replace, Path.unlink

    def sync(path: Path) -> None:
        story.append(("sync", path.name))
        real_sync(path)

    def replace(path: Path, target: Path) -> Path:
        story.append(("rename", target.name))
        return real_replace(path, target)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            story.append(("unlink", path.name))
        real_unlink(path, missing_ok)

    monkeypatch.setattr(snapshot, "_sync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(Path, "unlink", unlink)
    follower.install()
    assert story == [
        ("sync", "installing.unfinished"),
        ("rename", "installing.json"),
        ("sync", "snapshots"),
        ("sync", "state.incoming"),
        ("unlink", "state.db-wal"),
        ("unlink", "state.db-shm"),
        ("sync", "mine"),
        ("rename", "state.db"),
        ("sync", "mine"),
        ("unlink", "installing.json"),
        ("sync", "snapshots"),
    ]


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_an_install_whose_snapshot_is_lost_is_not_resumed_with_something_else(tmp_path: Path, damage: Any) -> None:
    follower = Follower(tmp_path)
    snapshot.install(follower.incoming, follower.state, snapshot.marker_in(follower.snapshots), follower.offer)
    damage(follower.incoming)
    before = follower.state.read_bytes()
    for _ in range(2):
        with pytest.raises(snapshot.BadSnapshot, match="nothing was changed"):
            follower.start()
    assert follower.state.read_bytes() == before


def test_a_marker_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    snapshot.marker_in(follower.snapshots).write_bytes(b"{}")
    with pytest.raises(snapshot.BadSnapshot):
        follower.start()


def test_a_pending_install_tells_what_it_is(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    marker = snapshot.marker_in(follower.snapshots)
    snapshot.install(follower.incoming, follower.state, marker, follower.offer)
    assert snapshot.pending_install(follower.snapshots) == (marker, follower.incoming, follower.offer)
    snapshot.installed(marker)
    snapshot.installed(marker)
    assert snapshot.pending_install(follower.snapshots) is None


# -- the driver's part ------------------------------------------------------------------------------------------------


class Journal:
    """A driver over a real queue file, with small thresholds."""

    def __init__(self, folder: Path, log: MemoryLog | None = None) -> None:
        self.path, self.snapshots = folder / "state.db", folder / "snapshots"
        self.state = QueueState(str(self.path))
        self.log = log or MemoryLog(NODE)
        if log is None:
            self.log.found(ClusterId("c"), Config((self.log.identity.voter,)))
        self.fatal: list[str] = []
        loaded = self.log.load(applied=Index(self.state.applied_index))
        replica = Replica(
            loaded.identity.voter,
            loaded.hard_state,
            loaded.start,
            applied=Index(self.state.applied_index),
            now=boot_seconds(),
            draw=lambda: 0.5,
        )
        self.driver = Driver(
            replica,
            self.log,
            self.state,
            on_events=lambda events: None,
            state_path=self.path,
            snapshots=self.snapshots,
            snapshot_entries=20,
            snapshot_bytes=1 << 30,
            on_fatal=self.fatal.append,
        )
        self.driver.start().result(SECONDS)

    def submit(self, first: int, last: int) -> None:
        for n in range(first, last + 1):
            body = c.encode(c.Submit(1_700_000_000_000 + n, (new_job(f"job{n}"),), f"key{n}", ""))
            self.driver.propose(body).result(SECONDS)

    def listed(self) -> list[int]:
        return [made.at_index for made in snapshot.listed(self.snapshots)]


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    monkeypatch.setattr("p2p.applier.TRAILING_ENTRIES", 5)
    monkeypatch.setattr("p2p.applier.SNAPSHOT_RETRY_SECONDS", 0.0)
    made = Journal(tmp_path)
    yield made
    made.driver.stop()
    assert not made.fatal


def test_a_grown_log_is_snapshotted_and_compacted_but_never_beyond_the_older_snapshot(journal: Journal) -> None:
    journal.submit(1, 25)
    wait_until(lambda: len(journal.listed()) == 1)
    assert journal.log.base == 0, "one snapshot alone may turn out to be damaged"
    journal.submit(26, 60)
    wait_until(lambda: len(journal.listed()) == 2 and journal.log.base > 0)
    numbers = itertools.count(61)

    def compacted_further() -> bool:
        # Whether the log has grown enough is looked at with each entry, and not while a snapshot is being made.
        n = next(numbers)
        journal.submit(n, n)
        return journal.log.base > 40

    wait_until(compacted_further)
    for _ in range(20):
        newest, older = journal.listed()[:2]
        assert journal.log.base <= older < newest


def test_the_state_can_be_rebuilt_from_either_snapshot_and_the_log(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.submit(1, 120)
    wait_until(lambda: len(journal.listed()) == 2 and journal.log.base > 0)
    journal.submit(121, 125)
    journal.driver.stop()
    whole = dump_file(journal.path)
    del whole["meta"]
    for made in snapshot.listed(journal.snapshots):
        folder = tmp_path / made.path.stem
        folder.mkdir()
        (folder / "state.db").write_bytes(made.path.read_bytes())
        again = Journal(folder, journal.log)
        again.driver.stop()
        rebuilt = dump_file(folder / "state.db")
        del rebuilt["meta"]  # one term more
        assert rebuilt == whole


def test_the_journal_describes_its_snapshots_so_that_they_can_be_offered(journal: Journal) -> None:
    journal.submit(1, 25)
    wait_until(lambda: len(journal.listed()) == 1)
    offer = snapshot.offerable(journal.snapshots)
    assert offer is not None
    assert (offer.index, offer.term) == (journal.listed()[0], journal.log.term_at(offer.index))
    assert (offer.chain, offer.config) == (journal.log.chain_at(offer.index), journal.log.base_config)


def test_a_failed_snapshot_is_tried_again_and_the_log_is_kept_meanwhile(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []
    real = snapshot.take

    def failing(*arguments: Any, **more: Any) -> snapshot.Snapshot:
        tries.append(journal.log.base)
        if len(tries) < 4:
            raise OSError(28, "No space left on device")
        return real(*arguments, **more)

    monkeypatch.setattr(snapshot, "take", failing)
    n = 0
    while len(tries) < 4:
        n += 1
        journal.submit(n, n)
        assert n < 2_000
    wait_until(lambda: len(journal.listed()) == 1)
    assert tries == [0, 0, 0, 0]
    assert "snapshot failed" in caplog.text


def test_a_stop_does_not_wait_for_a_long_snapshot(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()
    real = snapshot.take

    def slow(*arguments: Any, give_up: Any, **more: Any) -> snapshot.Snapshot:
        begun.set()
        wait_until(give_up)
        return real(*arguments, give_up=give_up, **more)

    monkeypatch.setattr(snapshot, "take", slow)
    journal.submit(1, 25)
    assert begun.wait(SECONDS)
    journal.driver.stop()
    assert journal.listed() == []


def test_a_reader_that_holds_on_delays_a_checkpoint_and_nothing_else(journal: Journal) -> None:
    """A checkpoint cannot pass an open read: a snapshot of a large queue once ended the process here."""
    journal.submit(1, 3)
    reader = apsw.Connection(str(journal.path), flags=apsw.SQLITE_OPEN_READONLY)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM jobs").fetchall()
    durable = journal.driver.query(journal.state.checkpoint).result(SECONDS)
    journal.submit(4, 6)
    assert journal.driver.query(journal.state.checkpoint).result(SECONDS) == durable < journal.state.applied_index
    journal.driver.stop()
    reader.close()
    assert not journal.fatal
