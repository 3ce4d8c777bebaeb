"""A bound on what a job writes to stdout and stderr.

The job writes its files itself, so a hung runner never blocks a job; the runner only looks at their size now and then.
When the kept bytes of a stream pass its cap, the newest half of the cap goes to ``<stream>.old`` (replacing it, under a
line that says how many bytes are gone so far) and the live file is emptied, which O_APPEND makes safe.  Kept on disk:
at most the cap, plus what the job writes between two looks.
"""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

TAIL_BYTES = 4_096
TAIL_LINES = 20
_COPY_BYTES = 1024 * 1024
_MARKER_BYTES = 100  # room for the line above the kept half


class StreamCap:
    """One stream of one attempt.  ``enforce`` may be called from any thread."""

    __slots__ = ("_cap_bytes", "_emptied_bytes", "_has_old", "_lock", "_path")

    def __init__(self, path: str, cap_bytes: int) -> None:
        self._path = path
        self._cap_bytes = cap_bytes
        self._lock = threading.Lock()
        self._emptied_bytes = 0  # ever truncated away from the live file
        self._has_old = False

    def written_bytes(self) -> int:
        """Ever written by the job."""
        return self._emptied_bytes + _size(self._path)

    def enforce(self) -> bool:
        """One look; True if the file had to be cut."""
        if not self._is_over():
            return False
        with self._lock:
            if not self._is_over():  # another thread has just cut it; cutting again would lose what it kept
                return False
            try:
                self._cut()
            except OSError:  # the folder is gone, or the disk is full: the next look tries again
                return False
        return True

    def _is_over(self) -> bool:
        return _size(self._path) > (self._cap_bytes // 2 if self._has_old else self._cap_bytes)

    def _cut(self) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            keep = min(size, max(0, self._cap_bytes // 2 - _MARKER_BYTES))
            self._save(fd, size - keep, size, dropped=self._emptied_bytes + size - keep)
            self._emptied_bytes += os.fstat(fd).st_size  # what the job wrote while we copied is lost too
            os.ftruncate(fd, 0)
        finally:
            os.close(fd)
        self._has_old = True

    def _save(self, fd: int, start: int, end: int, *, dropped: int) -> None:
        draft = self._path + ".old.new"
        out = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            os.write(out, b"[runner: %d bytes were dropped here, the log is capped]\n" % dropped)
            while start < end and (chunk := os.pread(fd, min(_COPY_BYTES, end - start), start)):
                start += os.write(out, chunk)
        finally:
            os.close(out)
        os.replace(draft, self._path + ".old")  # noqa: PTH105


class LogPair:
    """The two streams of one attempt."""

    __slots__ = ("stderr", "stdout")

    def __init__(self, directory: str, cap_bytes: int) -> None:
        self.stdout = StreamCap(directory + "/stdout", cap_bytes)
        self.stderr = StreamCap(directory + "/stderr", cap_bytes)

    def enforce(self) -> None:
        self.stdout.enforce()
        self.stderr.enforce()


def tail(directory: str) -> str:
    """The last lines of stderr, as text, whatever bytes they are; at most 20 lines and 4 KB."""
    text = _last_bytes(directory + "/stderr")
    if len(text) < TAIL_BYTES:  # the cap may have cut the file a moment ago
        text = (_last_bytes(directory + "/stderr.old") + text)[-TAIL_BYTES:]
    lines = text.decode(errors="replace").strip().splitlines()
    return "\n".join(lines[-TAIL_LINES:])


def _last_bytes(path: str) -> bytes:
    try:
        size = _size(path)
        if not size:
            return b""
        with Path(path).open("rb") as file:
            file.seek(max(0, size - TAIL_BYTES))
            return file.read(TAIL_BYTES)
    except OSError:
        return b""


def _size(path: str) -> int:
    """0 for what is not a plain file: a job may have put a pipe there, and opening that would block."""
    try:
        status = os.lstat(path)
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0
