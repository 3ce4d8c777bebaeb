"""The *apply* thread: owns the state machine. Applies what is committed, answers who proposed it, runs queries between
batches, and has snapshots made of what is applied.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from p2p.effects import COMMAND, Config, Entry, SnapshotMeta
from p2p.journal import snapshot

log = logging.getLogger(__name__)
T = TypeVar("T")

STATE_CHECKPOINT_BYTES = 32 << 20
SNAPSHOT_RETRY_SECONDS = 60.0
TRAILING_ENTRIES = 10_000  # kept behind a snapshot for followers that are a little behind (PROTOCOL §1)


class Stopped(Exception):
    """The node is stopping or has stopped. Definitely not done."""


class StateMachine(Protocol):
    """What the journal drives. `apply_batch` answers (result, events) for each entry, in one transaction."""

    applied_index: int
    mark: tuple[int, int]  # the newest (index, digest) by which voters compare their states; (0, 0): none yet

    def apply_batch(self, entries: Iterable[tuple[int, int, bytes]]) -> list[tuple[Any, list[Any]]]: ...
    def checkpoint(self) -> int: ...
    def close(self) -> None: ...
    def replace(self, install: Callable[[], None]) -> None:
        """Closes the database, has its file replaced by a snapshot's, and opens that."""


class Batch(NamedTuple):
    """Committed entries and who waits for each."""

    entries: Sequence[Entry]
    futures: Sequence[Future[Any] | None]


class Snapshots(NamedTuple):
    """When and how snapshots are made. `describe(index)` tells the log's running hash and configuration there."""

    state_path: Path
    folder: Path
    entries: int
    least_bytes: int
    describe: Callable[[int], tuple[bytes, Config] | None]
    made: Callable[[int, int], None]  # (index of the newest snapshot, up to where the log may be forgotten)
    trailing: int | None = None  # entries kept behind it; None: TRAILING_ENTRIES


class Applier:
    """`on_events` is called on this thread, in order, before the proposals that caused the events are answered; it must
    not block. `applied(index, mark)` is told after each batch."""

    def __init__(
        self,
        machine: StateMachine,
        *,
        on_events: Callable[[list[Any]], None],
        applied: Callable[[int, tuple[int, int]], None],
        fatal: Callable[[str], None],
        snapshots: Snapshots | None,
    ) -> None:
        self.machine = machine
        self._on_events, self._applied, self._fatal = on_events, applied, fatal
        self._snapshots = snapshots
        self._work = threading.Condition()
        self._jobs: deque[Batch | Callable[[], None]] = deque()
        self.batches = 0  # waiting or being applied
        self._stopping = False
        self._bytes_since_snapshot = 0
        self.snapshot_index = (
            max((s.at_index for s in snapshot.listed(snapshots.folder)), default=0) if snapshots is not None else 0
        )
        self._snapshot_thread: threading.Thread | None = None
        self._snapshot_asked = False
        self._snapshot_wanted = False
        self._snapshot_not_before = 0.0
        self._durable_applied = 0
        self._unchecked_bytes = 0
        self._give_up_snapshot = threading.Event()
        self._thread = threading.Thread(target=self._run, name="apply", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def apply(self, batch: Batch) -> None:
        with self._work:
            self.batches += 1
            self._jobs.append(batch)
            self._work.notify()

    def do(self, job: Callable[[], None]) -> None:
        """Runs `job` between batches, behind all that were handed over before. Raises Stopped."""
        with self._work:
            if self._stopping:
                raise Stopped("the node is stopping")
            self._jobs.append(job)
            self._work.notify()

    def query(self, question: Callable[[], T]) -> Future[T]:
        """Runs `question` between batches: it sees everything applied and nothing half done. Raises Stopped."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(question())
            except Exception as error:  # the asker's own mistake is the asker's to handle
                future.set_exception(error)

        self.do(run)
        return future

    def want_snapshot(self) -> None:
        """A follower needs one: make it even if little has been applied since the last."""
        with self._work:
            if not self._stopping and not self._snapshot_wanted:
                self._snapshot_wanted = True
                self._jobs.append(self._maybe_snapshot)
                self._work.notify()

    def stop(self) -> None:
        """Applies what was handed over, then closes the state. Blocks."""
        with self._work:
            self._stopping = True
            self._work.notify()
        self._thread.join()
        self._give_up_snapshot.set()
        if self._snapshot_thread is not None:
            self._snapshot_thread.join()

    def _run(self) -> None:
        try:
            while True:
                with self._work:
                    while not self._jobs and not self._stopping:
                        self._work.wait()
                    if not self._jobs:
                        break
                    job = self._jobs.popleft()
                if isinstance(job, Batch):
                    self._apply(job)
                else:
                    job()
            self.machine.close()
        except BaseException as error:
            log.exception("the apply thread failed")
            self._fatal(f"apply: {error}")

    def _apply(self, batch: Batch) -> None:
        machine = self.machine
        # A change of voters is the journal's own business; the state machine only keeps count.
        answers = machine.apply_batch([(e.index, e.term, e.body if e.kind == COMMAND else b"") for e in batch.entries])
        events = [event for _, caused in answers for event in caused]
        if events:
            self._on_events(events)
        for (result, _), future in zip(answers, batch.futures, strict=True):
            if future is not None:
                future.set_result(result)
        size = sum(len(entry.body) for entry in batch.entries)
        self._bytes_since_snapshot += size
        self._unchecked_bytes += size + 512 * len(batch.entries)
        with self._work:
            self.batches -= 1
        self._applied(machine.applied_index, machine.mark)
        if self._unchecked_bytes >= STATE_CHECKPOINT_BYTES:
            self._durable_applied = machine.checkpoint()
            self._unchecked_bytes = 0
        self._maybe_snapshot()

    # -- snapshots -------------------------------------------------------------------------------------------

    def install(self, incoming: Path, meta: SnapshotMeta, then: Callable[[], None]) -> None:
        """Puts a verified snapshot in place of the state, then calls `then`, on this thread. Raises Stopped."""
        assert self._snapshots is not None
        state, marker = self._snapshots.state_path, snapshot.marker_in(self._snapshots.folder)

        def replace() -> None:
            snapshot.install(incoming, state, marker, meta)

        def run() -> None:
            self.machine.replace(replace)
            self._durable_applied = self.machine.applied_index
            self._bytes_since_snapshot = self._unchecked_bytes = 0
            then()

        self.do(run)

    def _maybe_snapshot(self) -> None:
        """Starts a snapshot when the log behind the last one has grown, or a follower waits for one."""
        setup = self._snapshots
        if setup is None or self._snapshot_asked or time.monotonic() < self._snapshot_not_before:
            return
        entries = self.machine.applied_index - self.snapshot_index
        least = max(setup.least_bytes, setup.state_path.stat().st_size // 2) if entries else 0
        enough = entries >= setup.entries or (entries and self._bytes_since_snapshot >= least)
        if not enough and not (self._snapshot_wanted and entries):
            self._snapshot_wanted = False
            return
        self._snapshot_wanted = False
        self._durable_applied = self.machine.checkpoint()
        self._snapshot_asked = True
        self._bytes_since_snapshot = 0
        self._snapshot_thread = threading.Thread(
            target=self._take_snapshot, args=(setup,), name="snapshot", daemon=True
        )
        self._snapshot_thread.start()

    def _take_snapshot(self, setup: Snapshots) -> None:
        began = time.monotonic()
        try:
            made = snapshot.take(
                setup.state_path, setup.folder, give_up=self._give_up_snapshot.is_set, describe=setup.describe
            )
            kept = snapshot.listed(setup.folder)
        except snapshot.GivenUp:
            return
        except Exception:
            log.exception("snapshot failed; the log is kept and it is tried again in a minute")
            self._snapshot_not_before = time.monotonic() + SNAPSHOT_RETRY_SECONDS
            self._snapshot_asked = False
            return
        log.info("snapshot %s took %.1f s", made.path.name, time.monotonic() - began)
        self.snapshot_index = made.at_index
        # Up to the older of two, so that either of them and the log make the state, should the other be damaged.
        oldest = kept[-1].at_index if len(kept) > 1 else 0
        trailing = TRAILING_ENTRIES if setup.trailing is None else setup.trailing
        upto = min(oldest, made.at_index - trailing, self._durable_applied)
        setup.made(made.at_index, max(upto, 0))
        self._snapshot_asked = False
