"""One attempt as the runner holds it: what was asked, what became of it, and the sentence that says so.

Decides: what a record and a report contain, how an end is put into words.  Does not decide: when (``supervisor.py``).
"""

from __future__ import annotations

import asyncio
import signal as signals
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from p2p.runner.groups import Group
from p2p.runner.logs import LogPair
from p2p.runner.protocol import AttemptReport, Key, StartSpec

STARTING, RUNNING, EXITED = "starting", "running", "exited"

RECORD_COLUMNS = (
    "job",
    "attempt",
    "state",
    "directory",
    "grace_seconds",
    "log_cap_bytes",
    "command",
    "pid",
    "pid_start",
    "boot_id",
    "started_ms",
    "ended_ms",
    "exit_code",
    "signal",
    "reason",
    "error",
    "user_seconds",
    "system_seconds",
    "max_rss_mb",
)
_MEANINGS: dict[
    int, str
] = {  # of signals that a process brings upon itself; who sent another one is not known, so nothing is said
    signals.SIGSEGV: "it used memory that it does not have",
    signals.SIGBUS: "it used memory that is not there, such as the end of a file that was cut",
    signals.SIGILL: "an instruction that this CPU does not know",
    signals.SIGFPE: "an impossible calculation, such as a division by zero",
    signals.SIGABRT: "it gave up by itself",
    signals.SIGPIPE: "nobody read what it wrote to a pipe",
    signals.SIGSYS: "a system call that is forbidden to it",
    signals.SIGXCPU: "its limit of CPU time was reached",
    signals.SIGXFSZ: "its limit of file sizes was reached",
}
_COMMAND_CHARACTERS = 200  # of the command line kept in the record, for people


@dataclass(slots=True, kw_only=True, eq=False)
class Attempt:
    """Mutable; changed by the supervisor only."""

    job: str
    attempt: int
    directory: str
    grace_seconds: float
    log_cap_bytes: int
    command: str
    boot_id: str
    state: str = STARTING
    pid: int | None = None
    pid_start: int | None = None
    started_ms: int | None = None
    ended_ms: int | None = None
    exit_code: int | None = None
    signal: int | None = None
    reason: str = ""
    error: str | None = None
    user_seconds: float | None = None
    system_seconds: float | None = None
    max_rss_mb: float | None = None

    # Below: not recorded.
    durable: bool = False  # the end is on disk, so it may be told
    memory_limit_mb: int = 0
    memory_kill: bool = True
    group: Group | None = None  # its memory cgroup
    over_memory_mb: float = 0.0  # the most it was seen to have beyond its limit
    stray_cpu_seconds: float = 0.0  # of adopted orphans that have ended
    killed_by: str = ""  # who sent the SIGKILL, if the kernel says so
    spec: StartSpec | None = None  # until it is spawned: the environment may be large
    reaped: bool = False  # the leader is dead and its status known
    ending: str | None = None  # why it is being brought down
    ending_error: str | None = None
    killing: bool = False  # past its grace: SIGKILL
    signalled: set[int] = field(default_factory=set)  # groups that have had their SIGTERM
    strays: set[int] = field(default_factory=set)  # adopted orphans of this attempt, alive
    timeout: asyncio.TimerHandle | None = None
    deadline: asyncio.TimerHandle | None = None
    logs: LogPair | None = None

    @property
    def key(self) -> Key:
        return (self.job, self.attempt)

    @classmethod
    def asked(cls, spec: StartSpec, boot_id: str) -> Attempt:
        return cls(
            job=spec.job,
            attempt=spec.attempt,
            directory=spec.directory,
            grace_seconds=spec.grace_seconds,
            log_cap_bytes=spec.log_cap_bytes,
            command=" ".join(spec.argv[:20])[:_COMMAND_CHARACTERS],
            boot_id=boot_id,
            memory_limit_mb=spec.memory_limit_mb,
            memory_kill=spec.memory_kill,
            spec=spec,
        )

    @classmethod
    def recorded(cls, row: Sequence[Any]) -> Attempt:
        """From a row of the store, whose end, if it has one, is therefore on disk."""
        attempt = cls(**dict(zip(RECORD_COLUMNS, row, strict=True)))
        attempt.durable = attempt.state == EXITED
        return attempt

    def row(self) -> tuple[Any, ...]:
        """Bytes that are not UTF-8 are replaced: a record is for people, the process had them exactly."""
        values = (getattr(self, name) for name in RECORD_COLUMNS)
        return tuple(_storable(value) if isinstance(value, str) else value for value in values)

    def report(self) -> AttemptReport:
        """An end that is not on disk yet is not told."""
        if self.state == EXITED and not self.durable:
            return AttemptReport(
                job=self.job, attempt=self.attempt, state=RUNNING, pid=self.pid, started_ms=self.started_ms
            )
        usage = {
            name: value
            for name in ("user_seconds", "system_seconds", "max_rss_mb")
            if (value := getattr(self, name)) is not None
        }
        if self.over_memory_mb:
            usage["over_memory_mb"] = round(self.over_memory_mb, 1)
        return AttemptReport(
            job=self.job,
            attempt=self.attempt,
            state=self.state,
            pid=self.pid,
            started_ms=self.started_ms,
            ended_ms=self.ended_ms,
            exit_code=self.exit_code,
            signal=self.signal,
            reason=self.reason,
            error=self.error,
            usage=usage,
        )


def failure_sentence(attempt: Attempt, last_lines: str) -> str | None:
    """What a user reads in ``error``; None after success."""
    if attempt.ending_error is not None:
        return attempt.ending_error
    if attempt.ending is not None:
        return f"{attempt.ending}: {_status(attempt)}"
    if attempt.exit_code == 0:
        return None
    return f"{_status(attempt)}: {last_lines}" if last_lines else _status(attempt)


def memory_sentence(attempt: Attempt) -> str:
    return f"killed: used more than its memory limit of {attempt.memory_limit_mb} MB"


def _status(attempt: Attempt) -> str:
    if attempt.signal is None:
        return f"exit code {attempt.exit_code}"
    means = attempt.killed_by or _MEANINGS.get(attempt.signal, "")
    return f"killed by {signal_name(attempt.signal)}" + (f" ({means})" if means else "")


def signal_name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:  # real-time signals between the two that have names
        return f"signal {number}"


def _storable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text
