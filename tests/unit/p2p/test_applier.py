"""The apply thread: order, answers, queries between batches, and a state that is replaced."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from p2p.applier import Applier, Batch, Snapshots, Stopped
from p2p.effects import COMMAND, CONFIG, Config, Entry, SnapshotMeta
from p2p.ids import Index, Term
from tests.unit.p2p.driving import SECONDS, Story, WatchedMachine


class Rig:
    def __init__(self, snapshots: Snapshots | None = None) -> None:
        self.story: Story = []
        self.machine = WatchedMachine(self.story)
        self.events: list[Any] = []
        self.applied: list[int] = []
        self.marks: list[tuple[int, int]] = []
        self.fatal: list[str] = []
        self.died = threading.Event()
        self.applier = Applier(
            self.machine,
            on_events=self.events.extend,
            applied=self._applied,
            fatal=self._died,
            snapshots=snapshots,
        )

    def _applied(self, index: int, mark: tuple[int, int]) -> None:
        self.applied.append(index)
        self.marks.append(mark)

    def _died(self, why: str) -> None:
        self.fatal.append(why)
        self.died.set()

    def apply(self, *bodies: bytes, first: int | None = None, kind: int = COMMAND) -> list[Future[Any]]:
        begin = first if first is not None else self.machine.applied_index + 1
        entries = [Entry(Index(begin + n), Term(1), body, kind) for n, body in enumerate(bodies)]
        futures: list[Future[Any]] = [Future() for _ in bodies]
        self.applier.apply(Batch(entries, futures))
        return futures

    def settled(self) -> None:
        self.applier.query(lambda: None).result(SECONDS)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    rig.applier.start()
    yield rig
    rig.machine.gate.open()
    rig.applier.stop()


def test_each_proposal_is_answered_once_applied_and_after_its_events(rig: Rig) -> None:
    told: list[list[Any]] = []
    entries = [Entry(Index(n), Term(1), body, COMMAND) for n, body in ((1, b"a"), (2, b"b"))]
    futures: list[Future[Any] | None] = [Future(), None]  # nobody waits for the second
    rig.machine.mark = (1024, 5)
    assert futures[0] is not None
    futures[0].add_done_callback(lambda done: told.append(list(rig.events)))
    rig.applier.apply(Batch(entries, futures))
    assert futures[0].result(SECONDS) == (1, b"a")
    rig.settled()
    assert told == [[b"a", b"b"]]
    assert rig.applied == [2]
    assert rig.marks == [(1024, 5)]


def test_a_change_of_voters_is_only_counted_by_the_machine(rig: Rig) -> None:
    rig.apply(Config((), ()).encode(), kind=CONFIG)
    rig.settled()
    assert (rig.machine.applied_index, rig.machine.bodies) == (1, [])


def test_queries_and_jobs_run_between_batches_in_their_order(rig: Rig) -> None:
    rig.machine.gate.shut()
    rig.apply(b"a")
    rig.machine.gate.arrived()
    assert rig.applier.batches == 1
    seen = [rig.applier.query(lambda: rig.machine.applied_index)]
    rig.apply(b"b", first=2)
    seen.append(rig.applier.query(lambda: rig.machine.applied_index))
    rig.machine.gate.open()
    assert [future.result(SECONDS) for future in seen] == [1, 2]
    assert rig.applier.batches == 0


def test_a_query_that_fails_or_is_cancelled_hurts_nobody_else(rig: Rig) -> None:
    rig.machine.gate.shut()
    rig.apply(b"a")
    rig.machine.gate.arrived()
    asked: list[int] = []
    cancelled = rig.applier.query(lambda: asked.append(1))
    failing = rig.applier.query(lambda: 1 // 0)
    assert cancelled.cancel()
    rig.machine.gate.open()
    assert isinstance(failing.exception(SECONDS), ZeroDivisionError)
    rig.settled()
    assert asked == []


def test_a_stop_applies_what_was_handed_over_and_refuses_the_rest(rig: Rig) -> None:
    futures = rig.apply(b"a", b"b")
    rig.applier.stop()
    assert [future.result(0) for future in futures] == [(1, b"a"), (2, b"b")]
    assert rig.machine.closed
    for ask in (lambda: rig.applier.query(lambda: None), lambda: rig.applier.do(lambda: None)):
        with pytest.raises(Stopped):
            ask()
    rig.applier.want_snapshot()  # nothing to be done any more, and nothing to complain about


def test_a_batch_that_fails_is_fatal_and_answers_nobody(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.machine.poison = b"b"
    rig.applier.start()
    with caplog.at_level(logging.CRITICAL + 1, "p2p.applier"):
        futures = rig.apply(b"a", b"b")
        assert rig.died.wait(SECONDS)
    rig.applier.stop()
    assert not any(future.done() for future in futures)
    assert (rig.events, rig.applied) == ([], [])
    assert rig.fatal == ["apply: database disk image is malformed"]


def test_a_snapshot_is_installed_between_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Snapshots(tmp_path / "state.db", tmp_path / "snapshots", 10**9, 10**9, lambda index: None, lambda *_: None)
    setup.folder.mkdir()
    setup.state_path.write_bytes(b"")
    rig = Rig(setup)
    installs: list[tuple[Any, ...]] = []
    monkeypatch.setattr("p2p.journal.snapshot.install", lambda *arguments: installs.append(arguments))
    rig.applier.start()
    meta = SnapshotMeta(Index(7), Term(1), Config(), b"", "name", 1, "")
    rig.machine.gate.shut()
    rig.apply(b"a")
    rig.machine.gate.arrived()
    swapped = threading.Event()
    at: list[int] = []

    def then() -> None:
        at.append(rig.machine.applied_index)
        swapped.set()

    rig.applier.install(tmp_path / "incoming", meta, then)
    assert installs == []
    rig.machine.gate.open()
    assert swapped.wait(SECONDS)
    assert at == [1]
    assert [(arguments[0].name, arguments[1], arguments[3]) for arguments in installs] == [
        ("incoming", setup.state_path, meta)
    ]
    rig.applier.stop()
    with pytest.raises(Stopped):
        rig.applier.install(tmp_path / "incoming", meta, then)
