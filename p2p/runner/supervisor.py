"""The life of an attempt on this machine: spawned, watched, timed out or stopped, reaped, described.

    asked --(intent recorded)--> starting --spawn--> running --the leader is reaped--> (its strays are ended) --> exited
                                    |                   |                                                          ^
                                    |                   +-- timeout, stop: SIGTERM, grace, SIGKILL to its groups --+
                                    +-- spawn failed, or stopped before it began ---------------------------------+

A job is its leader and everything that came of it.  The runner is a "child subreaper": a descendant whose parent died
becomes the runner's child, so it is seen, attributed (by session, else by the environment), ended after the leader, and
its death is a SIGCHLD like any other.  No polling, and no signal to a pid or group that we do not pin.

More memory than its limit ends a job at once, by SIGKILL and without a grace, whether the kernel does it
(``groups.py``) or we do (``memory.py``): what it would allocate while it tidied up is its neighbours'. Slurm's
OverMemoryKill and the OOM killer in a Kubernetes pod do the same.

Decides: who is signalled when, what ended how.  Does not decide: what is durable (``recorder.py``), who is told.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable

from p2p.runner import processes
from p2p.runner.attempts import EXITED, RUNNING, STARTING, Attempt, failure_sentence, memory_sentence
from p2p.runner.groups import Group, Groups
from p2p.runner.kernel_log import WRITE_SECONDS, KernelLog
from p2p.runner.logs import LogPair, tail
from p2p.runner.protocol import Key, StartSpec
from p2p.runner.spawn import Spawner, SpawnFailed

LEFTOVER_GRACE_SECONDS = 5.0  # for what a job leaves behind after its main process ended
CLOCKS_APART_US = 2_000_000  # the kernel stamps its log by another clock than processes, and by ticks
UNKILLABLE_SECONDS = 30.0  # after SIGKILL a process may hang in the kernel; then its job is reported without it


class Supervisor:
    """Owns the processes.  ``changed(attempt)`` is called whenever its record differs from what is stored."""

    def __init__(
        self,
        *,
        spawner: Spawner,
        changed: Callable[[Attempt], None],
        log: Callable[[str], None],
        find_groups: Callable[[], Groups | None],
        kernel_log: KernelLog | None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._spawner = spawner
        self._changed = changed
        self._log = log
        self.boot_id = processes.boot_id()
        self._leaders: dict[int, Attempt] = {}  # not yet reaped
        self._sessions: dict[int, Attempt] = {}  # by session id, which is the leader's pid; until the end is complete
        self._strays: dict[int, Attempt | None] = {}  # adopted, not yet reaped; None: of no job that we know
        self.attempts: dict[Key, Attempt] = {}  # every one known
        self._find_groups, self._looked_for_groups = find_groups, False
        self.groups: Groups | None = None  # once an attempt has wanted one
        self._kernel_log = kernel_log
        self.busy = asyncio.Event()  # set by each spawn
        self.limited = asyncio.Event()  # set by each spawn of one with a limit

    def running(self) -> list[Attempt]:
        return list(self._sessions.values())

    def watched(self) -> list[Attempt]:
        """Those whose memory limit nobody else holds."""
        return [a for a in self._sessions.values() if a.memory_limit_mb and (a.group is None or not a.group.holds)]

    def roots(self) -> dict[int, Attempt]:
        """The unreaped leaders and strays: every process of a job is one of them or descends from one. Nobody tells
        when an orphan becomes ours, so they are looked for."""
        self._adopt()
        roots = {stray: owner for stray, owner in self._strays.items() if owner is not None}
        return {**roots, **self._leaders}

    # -- beginning

    def spawn(self, attempt: Attempt) -> None:
        """Never raises for what is wrong with the job: that is its end, and says why."""
        spec, attempt.spec = attempt.spec, None
        assert spec is not None and attempt.state == STARTING
        if attempt.ending is not None:
            attempt.ending_error = f"{attempt.ending}: before it was started"
            self._finish(attempt)
            return
        attempt.group = self._group_for(spec)
        try:
            pid = self._spawner.spawn(spec)
        except SpawnFailed as failure:
            attempt.ending, attempt.ending_error = "spawn_failed", str(failure)
            attempt.exit_code = failure.exit_code
            self._finish(attempt)
            return
        if attempt.group is not None and self.groups is not None:
            self.groups.enter_soon(attempt.group, pid)
        stat = processes.read_stat(pid)  # there, even if dead: it is ours to reap
        attempt.pid, attempt.pid_start = pid, stat.start if stat else None
        attempt.state, attempt.started_ms = RUNNING, _now_ms()
        attempt.logs = LogPair(attempt.directory, attempt.log_cap_bytes)
        if spec.timeout_seconds is not None:
            attempt.timeout = self._loop.call_later(
                spec.timeout_seconds, self._timed_out, attempt, spec.timeout_seconds
            )
        self._leaders[pid] = self._sessions[pid] = attempt
        self.busy.set()
        if attempt.memory_limit_mb:
            self.limited.set()
        self._changed(attempt)

    def _group_for(self, spec: StartSpec) -> Group | None:
        if not (spec.memory_limit_mb and spec.memory_kill and spec.memory_group):
            return None
        if not self._looked_for_groups:
            self.groups, self._looked_for_groups = self._find_groups(), True
        if self.groups is None:
            return None
        try:
            return self.groups.make(spec.job, spec.attempt, spec.memory_limit_mb)
        except OSError as error:
            self._log(f"{spec.key}: no memory cgroup ({error}); it is watched instead")
            return None

    # -- bringing down

    def exceeded(self, attempt: Attempt, used_mb: float) -> None:
        """It was seen to have more memory than its limit."""
        if attempt.state == EXITED or attempt.killing:
            return
        if not attempt.over_memory_mb:
            self._log(
                f"{attempt.key}: has {used_mb:.0f} MB, more than its memory limit of {attempt.memory_limit_mb} MB"
            )
        attempt.over_memory_mb = max(attempt.over_memory_mb, used_mb)
        if not attempt.memory_kill:
            return
        if attempt.ending is None and not attempt.reaped:
            attempt.ending, attempt.ending_error = (
                "memory_limit",
                f"{memory_sentence(attempt)} (it had {used_mb:.0f} MB)",
            )
        if attempt.deadline is not None:
            attempt.deadline.cancel()
        self._kill(attempt)

    def stop(self, attempt: Attempt, *, reason: str, grace_seconds: float, error: str | None = None) -> None:
        """The first reason stands; a second call can only shorten the grace."""
        if attempt.state == EXITED:
            return
        if attempt.ending is None and not attempt.reaped:
            attempt.ending, attempt.ending_error = reason, error
        if self._sessions.get(attempt.pid or 0) is attempt:  # spawned by us; orphans of an earlier runner are not
            self._end_within(attempt, grace_seconds)

    def _timed_out(self, attempt: Attempt, timeout_seconds: float) -> None:
        error = f"timeout after {timeout_seconds:g} s"
        self.stop(attempt, reason="timeout", grace_seconds=attempt.grace_seconds, error=error)

    def _end_within(self, attempt: Attempt, seconds: float) -> None:
        when = self._loop.time() + seconds
        if not attempt.killing and (attempt.deadline is None or when < attempt.deadline.when()):
            if attempt.deadline is not None:
                attempt.deadline.cancel()
            attempt.deadline = self._loop.call_at(when, self._kill, attempt)
        self._signal(attempt)

    def _kill(self, attempt: Attempt) -> None:
        attempt.killing = True
        attempt.deadline = self._loop.call_later(UNKILLABLE_SECONDS, self._give_up, attempt)
        self._signal(attempt)

    def _give_up(self, attempt: Attempt) -> None:
        if not attempt.reaped:
            self._log(f"{attempt.key}: pid {attempt.pid} is still there {UNKILLABLE_SECONDS:g} s after SIGKILL")
            return
        self._log(f"{attempt.key}: gave up on {sorted(attempt.strays)}, still there after SIGKILL")
        self._finish(attempt)

    def _signal(self, attempt: Attempt) -> None:
        """To every group of the attempt that an unreaped child of ours is in; SIGTERM once each, SIGKILL always."""
        groups = set() if attempt.reaped or attempt.pid is None else {attempt.pid}
        for stray in attempt.strays:
            groups.add(os.getpgid(stray))
        if attempt.killing:
            if attempt.group is not None and attempt.group.holds:
                attempt.group.kill()
            for group in groups:
                processes.signal_group(group, signal.SIGKILL)
            return
        for group in groups - attempt.signalled:
            attempt.signalled.add(group)
            processes.signal_group(group, signal.SIGTERM)
            processes.signal_group(group, signal.SIGCONT)  # a stopped process takes its SIGTERM only when it runs

    # -- reaping

    def reap(self) -> None:
        """Takes every dead child.  Called at SIGCHLD, and now and then in case one went missing."""
        touched: set[Attempt] = set()
        while (dead := _next_dead()) is not None:
            pid, status, usage = dead
            attempt = self._leaders.pop(pid, None)
            if attempt is not None:
                _note_status(attempt, status, usage)
            else:
                attempt = self._strays.pop(pid, None)
                if attempt is not None:
                    attempt.strays.discard(pid)
                    attempt.stray_cpu_seconds += usage.ru_utime + usage.ru_stime  # type: ignore[attr-defined]
            if attempt is not None:
                touched.add(attempt)
        if touched:
            touched |= self._adopt()
        for attempt in touched:
            self._after_death(attempt)

    def _adopt(self) -> set[Attempt]:
        """Orphans become our children when their parent dies, so after each death there may be new ones."""
        owners = set()
        for pid in processes.children() - self._leaders.keys() - self._strays.keys():
            owner = self._strays[pid] = self._owner_of(pid)
            if owner is None:
                self._log(f"pid {pid} was left behind by no job that is known; it is left alone")
            else:
                owner.strays.add(pid)
                owners.add(owner)
        return owners

    def _owner_of(self, pid: int) -> Attempt | None:
        stat = processes.read_stat(pid)
        if stat is not None and stat.session in self._sessions:
            return self._sessions[stat.session]
        mark = processes.mark_of(pid, looks=processes.EXEC_LOOKS)
        owner = self.attempts.get((mark.job, mark.attempt)) if mark else None
        return owner if owner is not None and self._sessions.get(owner.pid or 0) is owner else None

    def _after_death(self, attempt: Attempt) -> None:
        if attempt.reaped and not attempt.strays:
            if self._kernel_log is not None and attempt.signal == signal.SIGKILL and attempt.ending is None:
                self._loop.call_later(WRITE_SECONDS, self._finish, attempt)  # it may say who did it
            else:
                self._finish(attempt)
        elif attempt.killing or attempt.deadline is not None:
            self._signal(attempt)
        elif attempt.reaped:
            self._end_within(attempt, min(attempt.grace_seconds, LEFTOVER_GRACE_SECONDS))

    def finish_orphan(self, attempt: Attempt) -> None:
        """An earlier runner's attempt, of which nothing is left."""
        self._finish(attempt)

    def _finish(self, attempt: Attempt) -> None:
        if attempt.state == EXITED:
            return
        for timer in (attempt.timeout, attempt.deadline):
            if timer is not None:
                timer.cancel()
        attempt.timeout = attempt.deadline = None
        if attempt.logs is not None:
            attempt.logs.enforce()
            attempt.logs = None
        self._ask_who_killed(attempt)
        attempt.reason = attempt.ending or ("out_of_memory" if attempt.killed_by else "exit")
        failed = attempt.ending is None and attempt.exit_code != 0
        attempt.error = failure_sentence(attempt, tail(attempt.directory) if failed else "")
        attempt.state = EXITED
        attempt.ended_ms = attempt.ended_ms or _now_ms()
        if attempt.pid is not None and self._sessions.get(attempt.pid) is attempt:
            del self._sessions[attempt.pid]
        self._changed(attempt)

    def _ask_who_killed(self, attempt: Attempt) -> None:
        """The group's own count knows its limit from everything else; the kernel's log knows any process."""
        group, attempt.group = attempt.group, None
        if group is not None and self.groups is not None:
            kills = group.kills()
            self.groups.remove(group)
            if kills.killed and attempt.ending is None:
                if kills.own:
                    attempt.ending, attempt.ending_error = "memory_limit", memory_sentence(attempt)
                else:
                    attempt.killed_by = "the kernel's OOM killer ended it, though it was within its own memory limit"
        unknown = attempt.signal == signal.SIGKILL and attempt.ending is None and not attempt.killed_by
        if unknown and self._kernel_log is not None and attempt.pid is not None and attempt.pid_start is not None:
            since_us = int(attempt.pid_start / processes.TICKS_PER_SECOND * 1e6) - CLOCKS_APART_US
            attempt.killed_by = self._kernel_log.who_killed(attempt.pid, since_us=since_us)


def _next_dead() -> tuple[int, int, object] | None:
    try:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status, usage) if pid else None


def _note_status(attempt: Attempt, status: int, usage: object) -> None:
    attempt.reaped = True
    attempt.ended_ms = _now_ms()
    if os.WIFSIGNALED(status):
        attempt.signal = os.WTERMSIG(status)
    else:
        attempt.exit_code = os.WEXITSTATUS(status)
    attempt.user_seconds = round(usage.ru_utime, 6)  # type: ignore[attr-defined]
    attempt.system_seconds = round(usage.ru_stime, 6)  # type: ignore[attr-defined]
    attempt.max_rss_mb = round(usage.ru_maxrss / 1024, 3)  # type: ignore[attr-defined]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
