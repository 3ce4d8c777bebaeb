"""The *journal* thread: owns the log store, and does to it what it is told, in order. The only place that fsyncs.

Writes that wait while one fsync is in flight share the next one. What the replica wants to read back (entries that are
no longer in memory) and compaction are done between writes, in bounded pieces.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from p2p.effects import Entry, HardState, Persist
from p2p.ids import Index
from p2p.storage import DiskFull, LogStore

log = logging.getLogger(__name__)

MERGED_ENTRIES = 2_048
MERGED_BYTES = 8 << 20
FULL_SECONDS = 1.0  # between two attempts to write on a full disk

Job = Callable[[LogStore], None]


class Writer:
    """`written(seq)` is told on this thread after each fsync; `compacted(base)` after each slice of compaction. An
    exception ends in `fatal`: after a failed fsync nobody knows what the disk holds (PROTOCOL §2.19)."""

    def __init__(
        self,
        store: LogStore,
        *,
        written: Callable[[int], None],
        compacted: Callable[[Index], None],
        fatal: Callable[[str], None],
    ) -> None:
        self._store, self._written, self._compacted, self._fatal = store, written, compacted, fatal
        self._wake = threading.Condition()
        self._jobs: deque[Persist | Job] = deque()
        self._compact_upto = Index(0)
        self._stopping = False
        self._gave_up = False
        self.trouble: str | None = None  # why writes wait, in words
        self.floor = Index(0)  # the highest index that is written down as acknowledged
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def persist(self, write: Persist) -> None:
        self._put(write)

    def do(self, job: Job) -> None:
        """Runs `job` on this thread, behind every write asked for before it."""
        self._put(job)

    def compact(self, upto: Index) -> None:
        """Forgets the entries up to `upto`, a slice at a time, when there is nothing better to do."""
        with self._wake:
            self._compact_upto = max(self._compact_upto, upto)
            self._wake.notify()

    def stop(self) -> None:
        """Does what was asked for, then closes the store. Blocks."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _put(self, job: Persist | Job) -> None:
        with self._wake:
            self._jobs.append(job)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            self._store.close()
        except BaseException as error:
            log.exception("the journal thread failed")
            self._fatal(f"journal: {error}")

    def _turn(self) -> bool:
        with self._wake:
            while not self._jobs and not self._compact_upto and not self._stopping:
                self._wake.wait()
            if not self._jobs and self._stopping:
                return False
            job = self._next_job()
        if isinstance(job, Persist):
            self._write(job)
        elif job is not None:
            job(self._store)
        if self._compact_upto:
            self._compact_slice()
        return True

    def _next_job(self) -> Persist | Job | None:
        """The next job; consecutive writes become one, unless the later one begins by cutting something off."""
        if not self._jobs:
            return None
        first = self._jobs.popleft()
        if not isinstance(first, Persist) or not self._jobs:
            return first
        entries: list[Entry] = list(first.entries)
        size = sum(len(entry.body) for entry in entries)
        hard_state: HardState | None = first.hard_state
        seq, floor = first.seq, first.acked_floor
        while self._jobs and len(entries) < MERGED_ENTRIES and size < MERGED_BYTES:
            following = self._jobs[0]
            if not isinstance(following, Persist) or following.truncate is not None:
                break
            self._jobs.popleft()
            entries.extend(following.entries)
            size += sum(len(entry.body) for entry in following.entries)
            hard_state = following.hard_state or hard_state
            seq, floor = max(seq, following.seq), max(floor, following.acked_floor)
        return Persist(seq, tuple(entries), hard_state, floor, first.truncate)

    def _write(self, write: Persist) -> None:
        if write.entries or write.hard_state or write.truncate or write.acked_floor > self.floor:
            if self._gave_up or not self._append(write):
                self._gave_up = True  # nothing may follow upon what was not written
                return
            self.floor = max(self.floor, write.acked_floor)
        if write.seq:  # 0: nobody waits for it, see `Driver._write_floor`
            self._written(write.seq)

    def _append(self, write: Persist) -> bool:
        """Whether it is on disk. A full disk has taken nothing of it: it is tried again until there is room, and
        meanwhile nothing is acknowledged; the replica sees a disk that does not answer and leads no more (PROTOCOL
        §2.7, §2.18). False: the node stops first."""
        while True:
            try:
                self._store.append(write.entries, write.hard_state, write.acked_floor, write.truncate)
            except DiskFull as error:
                if self.trouble is None:
                    log.critical("the disk is full, and this node can neither lead nor vote until it is not: %s", error)
                self.trouble = "its disk is full"
            else:
                if self.trouble is not None:
                    log.warning("there is room on the disk again")
                self.trouble = None
                return True
            with self._wake:
                if not self._stopping:
                    self._wake.wait(FULL_SECONDS)
                if self._stopping:
                    return False

    def _compact_slice(self) -> None:
        upto = self._compact_upto
        left = self._store.compact(upto)
        if left <= 0:
            self._compact_upto = Index(0)
        self._compacted(Index(upto - max(left, 0)))
