"""Processes as the kernel tells of them: who is who, who is whose child, and signals that never hit a stranger.

A pid alone names nobody for long: the kernel hands it out again.  A process is (pid, start time, boot id).  Two rules
keep signals safe.  Our own child keeps its pid, and a group keeps its id, until we have reaped it, so signalling either
before that is safe.  For anyone else's child: take a pidfd, *then* compare the start time, then signal through it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1024 / 1024
EXEC_LOOKS, EXEC_SECONDS = 20, 0.002  # an exec takes far less than all of them
_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


class Stat(NamedTuple):
    """The fields of ``/proc/PID/stat`` that the runner needs (man 5 proc_pid_stat)."""

    pid: int
    state: str  # Z and X are the dead
    parent: int
    group: int
    session: int
    cpu_seconds: float  # own and waited-for children's, user and system
    start: int  # clock ticks after boot: with the pid, an identity
    rss_mb: float

    @property
    def alive(self) -> bool:
        return self.state not in "ZX"


class Mark(NamedTuple):
    """What a job's process carries in its environment."""

    job: str
    attempt: int
    directory: str


def read_stat(pid: int | str) -> Stat | None:
    """None when there is no such process (any more)."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except OSError:
        return None
    try:
        text = os.read(fd, 4096)
    except OSError:  # ESRCH: it ended between the two calls
        return None
    finally:
        os.close(fd)
    field = text[text.rindex(b")") + 2 :].split()  # the name before it may hold spaces and parentheses
    cpu = int(field[11]) + int(field[12]) + int(field[13]) + int(field[14])
    return Stat(
        pid=int(text[: text.index(b" ")]),
        state=field[0].decode(),
        parent=int(field[1]),
        group=int(field[2]),
        session=int(field[3]),
        cpu_seconds=cpu / TICKS_PER_SECOND,
        start=int(field[19]),
        rss_mb=int(field[21]) * PAGE_MB,
    )


def scan() -> Iterator[Stat]:
    """Every process there is, one by one: about 15 microseconds each."""
    for name in os.listdir("/proc"):  # noqa: PTH208  (Path objects would double the price)
        if name.isdigit() and (stat := read_stat(name)) is not None:
            yield stat


def children() -> set[int]:
    """The pids of our unreaped children, with the orphans we adopted."""
    own = os.getpid()
    try:
        return {int(pid) for pid in Path(f"/proc/self/task/{own}/children").read_bytes().split()}
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN
        return {stat.pid for stat in scan() if stat.parent == own}


def _environment(pid: int, looks: int) -> bytes:
    """As the kernel shows it. In the moment of an exec it shows nothing: a child that was taken for nobody's because of
    that would be left behind for good, so with more looks than one that moment is waited for. Raises OSError."""
    for _ in range(looks):
        raw = Path(f"/proc/{pid}/environ").read_bytes()
        stat = read_stat(pid)
        if raw or stat is None or not stat.alive:
            return raw
        if looks > 1:
            time.sleep(EXEC_SECONDS)
    return b""


def mark_of(pid: int, *, looks: int = 1) -> Mark | None:
    """Whose job this process belongs to, by the environment it was started with; None if it does not say."""
    try:
        entries = _environment(pid, looks).split(b"\0")
    except OSError:  # gone, or somebody else's
        return None
    values = {name: value for name, _, value in (entry.partition(b"=") for entry in entries)}
    try:
        attempt = int(values[b"P2P_ATTEMPT"])
        return Mark(os.fsdecode(values[b"P2P_JOB_ID"]), attempt, os.fsdecode(values[b"P2P_JOB_DIR"]))
    except (KeyError, ValueError):
        return None


def name_of(pid: int) -> str:
    """The kernel's short name of a process, or nothing."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return ""


def signal_exactly(pid: int, start: int, number: int) -> bool:
    """Signals the process that started at ``start``, and no later one that got its pid.  False: it is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        stat = read_stat(pid)
        if stat is None or stat.start != start:
            return False
        signal.pidfd_send_signal(pidfd, number)
        return True
    except OSError:
        return False
    finally:
        os.close(pidfd)


def signal_group(group: int, number: int) -> None:
    """Only for a group that an unreaped child of ours is in: its id cannot have passed to others."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass  # all of them are dead, the leader is waiting to be reaped
    except PermissionError:
        pass  # a set-user-id program: it is not ours to end


def adopt_orphans() -> None:
    """From now on a job's orphaned descendants become our children, so that we see them and their end."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
