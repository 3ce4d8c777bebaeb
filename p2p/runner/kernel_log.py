"""Whether the kernel's OOM killer ended a process, by the kernel's own word (``/dev/kmsg``), never by a guess.

The kernel names processes by their pids in the first pid namespace, so a runner in another one (most containers) would
take a stranger's end for its job's: there, and where the log may not be read, nothing is said.
"""

from __future__ import annotations

import os
import re
from typing import Self

PATH = "/dev/kmsg"
WRITE_SECONDS = 0.05  # the kernel kills first and writes then
MAX_KILLS = 1_000  # remembered
_RECORD_BYTES = 8192
_FIRST_PID_NAMESPACE = "pid:[4026531836]"  # <linux/proc_ns.h>: PROC_PID_INIT_INO
# "Memory cgroup out of memory: Killed process 71 (python3) …" and "Out of memory: Killed process 71 …" (mm/oom_kill.c)
_KILLED = re.compile(rb"^\d+,\d+,(\d+),[^;]*;(Memory cgroup out of memory|Out of memory)[^:]*: Killed process (\d+) ")
_WORDS = {
    b"Memory cgroup out of memory": "the kernel's OOM killer ended it: the memory cgroup it was in was full",
    b"Out of memory": "the kernel's OOM killer ended it: this machine was out of memory",
}


class KernelLog:
    """From its opening on."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._kills: dict[int, tuple[int, bytes]] = {}  # pid -> (microseconds after boot, by what)

    @classmethod
    def open(cls) -> Self | None:
        """None where it cannot be read, or names strangers."""
        try:
            if os.readlink("/proc/self/ns/pid") != _FIRST_PID_NAMESPACE:  # noqa: PTH115
                return None
            fd = os.open(PATH, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(fd, 0, os.SEEK_END)
        except OSError:
            return None
        return cls(fd)

    def who_killed(self, pid: int, *, since_us: int) -> str:
        """A sentence, or nothing. ``since_us``: the process began then, after boot: an earlier one had its pid."""
        self._read()
        at, by = self._kills.pop(pid, (0, b""))
        return _WORDS[by] if by and at >= since_us else ""

    def _read(self) -> None:
        while True:
            try:
                record = os.read(self._fd, _RECORD_BYTES)
            except BrokenPipeError:
                continue  # what was overwritten is skipped
            except OSError:
                return  # nothing more now
            match = _KILLED.match(record)
            if match is not None:
                self._kills[int(match[3])] = (int(match[1]), match[2])
                if len(self._kills) > MAX_KILLS:
                    del self._kills[next(iter(self._kills))]
