"""Carries out what the replica decides: event -> step -> persist -> apply -> answer. The only place that does.

Two threads, so that neither SQLite nor fsync is ever on an event loop. The *journal* thread owns the replica and
``raft.db``: it gathers whatever was proposed while the last fsync was in flight (group commit, no timer), persists the
batch, and hands what that commits to the *apply* thread, which owns ``state.db``. A proposal is answered after its
entry is durable on a majority and applied. Persist-before-answer is visible in `_journal_turn`.

A disk error or an exception while applying ends the process at once with exit code 70: after either nobody knows
what the disk or the state holds, and a restart verifies both (PROTOCOL §2.19).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from p2p.effects import Entry, Persist
from p2p.ids import Index
from p2p.journal import snapshot
from p2p.replica import Applied, Campaign, Persisted, Propose, Replica
from p2p.storage import LogStore

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_BATCH_ENTRIES = 1_024
MAX_BATCH_BYTES = 4 << 20
MAX_WAITING_ENTRIES = 50_000
MAX_WAITING_BYTES = 256 << 20
MAX_UNAPPLIED_BATCHES = 4
FLOOR_IDLE_SECONDS = 0.05  # how soon an idle journal writes down what it has acknowledged
TRAILING_ENTRIES = 10_000  # kept behind a snapshot for followers that are a little behind (PROTOCOL §1)
STATE_CHECKPOINT_BYTES = 32 << 20
SNAPSHOT_RETRY_SECONDS = 60.0
FATAL_EXIT = 70


class StateMachine(Protocol):
    """What the journal drives. `apply_batch` answers (result, events) for each entry, in one transaction."""

    applied_index: int

    def apply_batch(self, entries: Iterable[tuple[int, int, bytes]]) -> list[tuple[Any, list[Any]]]: ...
    def checkpoint(self) -> int: ...
    def close(self) -> None: ...


class Overloaded(Exception):
    """Too much is waiting for the journal. Definitely not done; try again."""


class Stopped(Exception):
    """The driver is stopping or has stopped. Definitely not done."""


class Progress(NamedTuple):
    """The journal's pointers, for people: never ahead of the truth, possibly a moment behind."""

    term: int
    commit_index: int
    applied_index: int
    snapshot_index: int


class _Proposal(NamedTuple):
    body: bytes
    future: Future[Any]


class _Committed(NamedTuple):
    entries: tuple[Entry, ...]
    futures: tuple[Future[Any] | None, ...]


def die(why: str) -> None:
    """Ends the process without any clean-up that could write. Replaced only by tests."""
    log.critical("fatal: %s", why)
    logging.shutdown()
    os._exit(FATAL_EXIT)


class Driver:
    """Runs one replica over one store and one state machine. `on_events` is called on the apply thread, in order,
    before the proposals that caused the events are answered; it must not block."""

    def __init__(
        self,
        replica: Replica,
        store: LogStore,
        machine: StateMachine,
        *,
        on_events: Callable[[list[Any]], None],
        state_path: Path | None = None,
        snapshots: Path | None = None,
        snapshot_entries: int = 50_000,
        snapshot_bytes: int = 64 << 20,
        on_fatal: Callable[[str], None] = die,
    ) -> None:
        self._replica, self._store, self._machine = replica, store, machine
        self._on_events, self._on_fatal = on_events, on_fatal
        self._state_path, self._snapshots = state_path, snapshots
        self._snapshot_entries, self._snapshot_bytes = snapshot_entries, snapshot_bytes
        self._wake = threading.Condition()
        self._waiting: deque[_Proposal] = deque()
        self._waiting_bytes = 0
        self._unanswered: dict[int, Future[Any]] = {}
        self._stopping = False
        self._work = threading.Condition()
        self._jobs: deque[_Committed | Callable[[], None]] = deque()
        self._batches = 0
        self._applier_stop = False
        self._floor_written = Index(0)
        self._applied_seen = Index(replica.journal.applied_index)
        self._bytes_since_snapshot = 0
        self._snapshot_index = max((s.at_index for s in snapshot.listed(snapshots)), default=0) if snapshots else 0
        self._snapshot_thread: threading.Thread | None = None
        self._snapshot_asked = False
        self._snapshot_not_before = 0.0
        self._durable_applied = 0
        self._compact_upto = Index(0)
        self._elected: Future[Any] = Future()
        self._elected.set_running_or_notify_cancel()
        self._give_up_snapshot = threading.Event()
        self._journal_thread = threading.Thread(target=self._guard(self._journal_loop), name="journal", daemon=True)
        self._apply_thread = threading.Thread(target=self._guard(self._apply_loop), name="apply", daemon=True)

    # -- from any thread --------------------------------------------------------------------------------------------

    def start(self) -> Future[Any]:
        """Begins a term. The future is done once its no-op is applied, and with it everything that was ever
        acknowledged: until then this node does not know what it once answered (PROTOCOL §1, "Election")."""
        self._apply_thread.start()
        self._journal_thread.start()
        return self._elected

    def propose(self, body: bytes) -> Future[Any]:
        """The state machine's answer to this entry, once it is durable and applied. Raises Overloaded or Stopped, which
        both mean: definitely not done. A future that fails with Stopped was not done either."""
        future: Future[Any] = Future()
        with self._wake:
            if self._stopping:
                raise Stopped("the node is stopping")
            if len(self._waiting) >= MAX_WAITING_ENTRIES or self._waiting_bytes + len(body) > MAX_WAITING_BYTES:
                raise Overloaded("too much is waiting for the journal")
            self._waiting.append(_Proposal(body, future))
            self._waiting_bytes += len(body)
            self._wake.notify()
        return future

    def query(self, question: Callable[[], T]) -> Future[T]:
        """Runs `question` on the apply thread, between batches: it sees everything applied and nothing half done."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(question())
            except Exception as error:  # the asker's own mistake is the asker's to handle
                future.set_exception(error)

        with self._work:
            if self._applier_stop:
                raise Stopped("the node is stopping")
            self._jobs.append(run)
            self._work.notify()
        return future

    def progress(self) -> Progress:
        """A glance at the pointers; reads of single integers need no lock."""
        journal = self._replica.journal
        return Progress(self._replica.term, journal.commit_index, self._machine.applied_index, self._snapshot_index)

    def stop(self) -> None:
        """Finishes what was accepted, then closes both databases. Blocks."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._journal_thread.join()
        with self._work:
            self._applier_stop = True
            self._work.notify()
        self._apply_thread.join()
        self._give_up_snapshot.set()
        if self._snapshot_thread is not None:
            self._snapshot_thread.join()

    # -- the journal thread --------------------------------------------------------------------------------------------

    def _guard(self, loop: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                loop()
            except BaseException as error:
                log.exception("the %s thread failed", threading.current_thread().name)
                self._on_fatal(f"{threading.current_thread().name}: {error}")

        return run

    def _journal_loop(self) -> None:
        self._persist(self._replica.step(Campaign()), (self._elected,))
        while True:
            batch = self._next_batch()
            self._note_applied()
            if batch is None:
                break
            if batch:
                self._journal_turn(batch)
            else:
                self._write_floor()
            self._compact_slice()
        self._write_floor()
        self._store.close()

    def _next_batch(self) -> list[_Proposal] | None:
        """What was proposed since the last turn; empty if nothing came for a while; None when it is time to stop."""
        batch: list[_Proposal] = []
        size = 0
        with self._wake:
            if not self._waiting and not self._stopping:
                self._wake.wait(FLOOR_IDLE_SECONDS if self._has_chores() else None)
            while self._waiting and len(batch) < MAX_BATCH_ENTRIES and size < MAX_BATCH_BYTES:
                proposal = self._waiting.popleft()
                self._waiting_bytes -= len(proposal.body)
                if proposal.future.set_running_or_notify_cancel():
                    size += len(proposal.body)
                    batch.append(proposal)
            if not batch and self._stopping:
                return None
        return batch

    def _has_chores(self) -> bool:
        behind = self._replica.journal.commit_index > self._floor_written
        unnoted = self._machine.applied_index > self._replica.journal.applied_index
        return behind or unnoted or self._compact_upto > 0

    def _journal_turn(self, batch: list[_Proposal]) -> None:
        """Persist, then say so, then let what that commits be applied and answered."""
        effects = self._replica.step(Propose(tuple(proposal.body for proposal in batch)))
        self._persist(effects, tuple(proposal.future for proposal in batch))

    def _persist(self, effects: Iterable[Any], futures: tuple[Future[Any], ...]) -> None:
        for effect in effects:
            assert isinstance(effect, Persist)
            self._store.append(effect.entries, effect.hard_state, effect.acked_floor)
            self._floor_written = max(self._floor_written, effect.acked_floor)
            self._bytes_since_snapshot += sum(len(entry.body) for entry in effect.entries)
            for entry, future in zip(effect.entries, futures, strict=False):
                self._unanswered[entry.index] = future
            for outcome in self._replica.step(Persisted(effect.entries[-1].index)):
                assert not isinstance(outcome, Persist)
                self._hand_over(effect.entries, outcome.upto)

    def _hand_over(self, fresh: tuple[Entry, ...], upto: Index) -> None:
        """Gives the apply thread everything committed up to `upto`; after a start that includes what the last run
        left unapplied."""
        first = Index(self._applied_seen + 1)
        self._applied_seen = upto
        while first < fresh[0].index:
            end = Index(min(first + MAX_BATCH_ENTRIES, fresh[0].index) - 1)
            self._enqueue(tuple(self._store.read(first, end)))
            first = Index(end + 1)
        self._enqueue(fresh)

    def _enqueue(self, entries: tuple[Entry, ...]) -> None:
        futures = tuple(self._unanswered.pop(entry.index, None) for entry in entries)
        with self._work:
            while self._batches >= MAX_UNAPPLIED_BATCHES:
                self._work.wait()
            self._batches += 1
            self._jobs.append(_Committed(entries, futures))
            self._work.notify_all()

    def _note_applied(self) -> None:
        applied = Index(self._machine.applied_index)
        if applied > self._replica.journal.applied_index:
            self._replica.step(Applied(applied))

    def _compact_slice(self) -> None:
        """A bounded piece of compaction between two batches, so that a busy journal shrinks too."""
        if self._compact_upto and self._store.compact(self._compact_upto) <= 0:
            self._compact_upto = Index(0)

    def _write_floor(self) -> None:
        """Writes down how far answers have gone, so that damage below it is never taken for a torn write."""
        commit = self._replica.journal.commit_index
        if commit > self._floor_written:
            self._store.append((), None, commit)
            self._floor_written = commit

    # -- the apply thread --------------------------------------------------------------------------------------------

    def _apply_loop(self) -> None:
        last_checkpoint_bytes = 0
        while True:
            with self._work:
                while not self._jobs and not self._applier_stop:
                    self._work.wait()
                if not self._jobs:
                    break
                job = self._jobs.popleft()
            if isinstance(job, _Committed):
                self._apply(job)
                last_checkpoint_bytes += sum(len(entry.body) for entry in job.entries) + 512 * len(job.entries)
                with self._work:
                    self._batches -= 1
                    self._work.notify_all()
                if last_checkpoint_bytes >= STATE_CHECKPOINT_BYTES:
                    self._durable_applied = self._machine.checkpoint()
                    last_checkpoint_bytes = 0
                self._maybe_snapshot()
            else:
                job()
        self._machine.close()

    def _apply(self, batch: _Committed) -> None:
        answers = self._machine.apply_batch([(entry.index, entry.term, entry.body) for entry in batch.entries])
        events = [event for _, caused in answers for event in caused]
        if events:
            self._on_events(events)
        for (result, _), future in zip(answers, batch.futures, strict=True):
            if future is not None:
                future.set_result(result)

    def _maybe_snapshot(self) -> None:
        """Starts a snapshot when the log behind the last one has grown; lets the log be compacted when it is done."""
        if self._snapshots is None or self._state_path is None or self._snapshot_asked:
            return
        if time.monotonic() < self._snapshot_not_before:
            return
        entries = self._machine.applied_index - self._snapshot_index
        least = max(self._snapshot_bytes, self._state_path.stat().st_size // 2) if entries else 0
        if entries < self._snapshot_entries and (not entries or self._bytes_since_snapshot < least):
            return
        self._durable_applied = self._machine.checkpoint()
        self._snapshot_asked = True
        self._bytes_since_snapshot = 0
        self._snapshot_thread = threading.Thread(target=self._take_snapshot, name="snapshot", daemon=True)
        self._snapshot_thread.start()

    def _take_snapshot(self) -> None:
        assert self._state_path is not None and self._snapshots is not None
        began = time.monotonic()
        try:
            made = snapshot.take(self._state_path, self._snapshots, give_up=self._give_up_snapshot.is_set)
            kept = snapshot.listed(self._snapshots)
        except snapshot.GivenUp:
            return
        except Exception:
            log.exception("snapshot failed; the log is kept and it is tried again in a minute")
            self._snapshot_not_before = time.monotonic() + SNAPSHOT_RETRY_SECONDS
            self._snapshot_asked = False
            return
        log.info("snapshot %s took %.1f s", made.path.name, time.monotonic() - began)
        self._snapshot_index = made.at_index
        # Up to the older of two, so that either of them and the log make the state, should the other be damaged.
        oldest = kept[-1].at_index if len(kept) > 1 else 0
        upto = min(oldest, made.at_index - TRAILING_ENTRIES, self._durable_applied)
        with self._wake:
            self._compact_upto = Index(max(upto, 0))
            self._wake.notify()
        self._snapshot_asked = False
