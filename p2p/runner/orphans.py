"""What an earlier runner left when it was killed: its jobs' processes, which go on without anyone to take their status.

They are ended, not adopted: their exit status can never be known, and a result that nobody can vouch for is worse than
a retry.  A process is theirs if it is in the session of the recorded leader (same pid *and* start time), or if its
environment names this job, attempt and directory; once found it is remembered by (pid, start time).

Decides: which processes belong to a record, when a record's processes are gone.
Source of the rule: pids come round again, and an old pid file has killed strangers on many systems.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from p2p.runner import processes
from p2p.runner.attempts import RUNNING, Attempt
from p2p.runner.processes import Mark, Stat

PROCESS_NAME = "p2p-runner"  # what ps shows of a runner
QUIET_LOOKS = 2  # a scan can miss a process forked behind its back; two in a row cannot

MACHINE_RESTARTED = "the machine restarted while this job ran"
ENDED = "the runner was killed while this job ran; its orphaned process group was ended"
GONE = "the runner was killed while this job ran; its exit status is unknown"


class _Orphan:
    """One record and the processes found for it."""

    def __init__(self, attempt: Attempt, kill_at: float) -> None:
        self.attempt = attempt
        self.members: dict[int, int] = {}  # pid -> start time
        self.signalled: set[tuple[int, int]] = set()
        self.kill_at = kill_at
        self.quiet_looks = 0

    @property
    def mark(self) -> Mark:
        return Mark(self.attempt.job, self.attempt.attempt, self.attempt.directory)


class Orphans:
    """``look()`` until ``done``.  Blocking: one scan of /proc each; not to be called from two threads at once."""

    def __init__(self, attempts: Iterable[Attempt], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: dict[tuple[int, int], Mark | None] = {}
        self._boot_id = processes.boot_id()
        self._orphans = [_Orphan(attempt, clock() + attempt.grace_seconds) for attempt in attempts]

    @property
    def done(self) -> bool:
        return not self._orphans

    def look(self) -> list[Attempt]:
        """Signals what is still there; returns the attempts of which nothing is left, with their end filled in."""
        stats = {stat.pid: stat for stat in processes.scan() if stat.alive}
        marks = self._read_marks(stats)
        ended = [orphan for orphan in self._orphans if self._press(orphan, stats, marks)]
        self._orphans = [orphan for orphan in self._orphans if orphan not in ended]
        return [_describe(orphan, self._boot_id) for orphan in ended]

    def find_unrecorded(self, data_directory: Path) -> list[Attempt]:
        """The records were lost: jobs that run in ``data_directory`` and have no living runner over them."""
        stats = {stat.pid: stat for stat in processes.scan() if stat.alive}
        known = {orphan.mark for orphan in self._orphans}
        found: dict[Mark, Attempt] = {}
        for (pid, _), mark in self._read_marks(stats).items():
            if (
                mark is None
                or mark in known
                or mark in found
                or not Path(mark.directory).is_relative_to(data_directory)
            ):
                continue
            leader = stats.get(stats[pid].session, stats[pid])
            if processes.name_of(leader.parent) == PROCESS_NAME:
                continue  # another node's, and well looked after
            found[mark] = _from_mark(mark, self._boot_id)
        self._orphans += [_Orphan(attempt, self._clock() + attempt.grace_seconds) for attempt in found.values()]
        return list(found.values())

    def _read_marks(self, stats: dict[int, Stat]) -> dict[tuple[int, int], Mark | None]:
        """An environment is read once in a process's life, as it never changes there for others to see."""
        present = {(stat.pid, stat.start) for stat in stats.values()}
        self._marks = {
            identity: self._marks[identity] if identity in self._marks else processes.mark_of(identity[0])
            for identity in present
        }
        return self._marks

    def _press(self, orphan: _Orphan, stats: dict[int, Stat], marks: dict[tuple[int, int], Mark | None]) -> bool:
        """True when none of its processes was seen in two looks."""
        attempt = orphan.attempt
        if attempt.boot_id != self._boot_id:
            return True
        leader = stats.get(attempt.pid or 0)
        leads = leader is not None and leader.start == attempt.pid_start
        for stat in stats.values():
            if (leads and stat.session == attempt.pid) or marks[(stat.pid, stat.start)] == orphan.mark:
                orphan.members[stat.pid] = stat.start
        alive = [(pid, start) for pid, start in orphan.members.items() if pid in stats and stats[pid].start == start]
        if not alive:
            orphan.quiet_looks += 1
            return orphan.quiet_looks >= QUIET_LOOKS
        orphan.quiet_looks = 0
        self._signal(orphan, alive)
        return False

    def _signal(self, orphan: _Orphan, alive: list[tuple[int, int]]) -> None:
        number = signal.SIGKILL if self._clock() >= orphan.kill_at else signal.SIGTERM
        for pid, start in alive:
            if number == signal.SIGKILL or (pid, start) not in orphan.signalled:
                orphan.signalled.add((pid, start))
                processes.signal_exactly(pid, start, number)
                processes.signal_exactly(pid, start, signal.SIGCONT)


def _describe(orphan: _Orphan, boot_id: str) -> Attempt:
    attempt = orphan.attempt
    if attempt.boot_id != boot_id:
        attempt.ending, attempt.ending_error = "machine_restarted", MACHINE_RESTARTED
    else:
        attempt.ending, attempt.ending_error = "runner_lost", ENDED if orphan.members else GONE
    return attempt


def _from_mark(mark: Mark, boot_id: str) -> Attempt:
    return Attempt(
        job=mark.job,
        attempt=mark.attempt,
        directory=mark.directory,
        grace_seconds=5.0,  # what was asked for is lost with the record
        log_cap_bytes=0,
        command="",
        boot_id=boot_id,
        state=RUNNING,
    )
