"""A bound on what a job writes to stdout and stderr.

The job writes its files itself, so a hung runner never blocks a job; the runner only looks at their size now and then,
more often at a file that grows fast (``pace.py``). When what is kept of a stream passes its cap, all but the newest
half of the cap is dropped: a hole is punched at the file's beginning, which copies nothing, loses nothing else and
makes a very fast writer wait. Where the file system knows no holes the newest half goes to ``<stream>.old`` and the
file is emptied, which O_APPEND makes safe (``stream.py`` has both layouts).

Kept on disk: at most the cap, and what is written between two looks (1 to 50 ms) and while the hole is made.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from pathlib import Path

from p2p.runner.pace import Pace
from p2p.runner.stream import MAX_FILE_BYTES, Cut, Stream, data_from, size_of

TAIL_BYTES = 4_096
TAIL_LINES = 20
MOST_SECONDS, LEAST_SECONDS = 0.05, 0.001  # between two looks
_COPY_BYTES = 1024 * 1024
_PAGE_BYTES = 4096
_PUNCH_HOLE = 0x01 | 0x02  # <linux/falloc.h>: FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]


class StreamCap:
    """One stream of one attempt. ``enforce`` may be called from any thread. ``holes``: whether it may be cut by making
    a hole; not a file that people read with ``cat``."""

    __slots__ = ("_cap_bytes", "_cut", "_hole", "_holes", "_lock", "_old_bytes", "_pace", "_stream")

    def __init__(self, path: str, cap_bytes: int, *, holes: bool = True) -> None:
        self._stream = Stream(path)
        self._cap_bytes = cap_bytes
        self._holes = holes
        self._lock = threading.Lock()
        self._cut = self._stream.read_cut()
        self._hole = 0  # where the live file's data begins, in its own offsets
        self._old_bytes = size_of(self._stream.old_path)
        self._pace = Pace(self.written_bytes(), least_seconds=LEAST_SECONDS, most_seconds=MOST_SECONDS)

    def written_bytes(self) -> int:
        """Ever written by the job."""
        return self._cut.live_from + size_of(self._stream.path)

    def enforce(self) -> bool:
        """One look; True if something had to be dropped."""
        return self.look()[0]

    def look(self) -> tuple[bool, float]:
        """One look: whether something was dropped, and how many seconds the next look may wait."""
        size = size_of(self._stream.path)
        self._pace.seen(self._cut.live_from + size)
        dropped = self._room(size) < 0 and self._drop()
        return dropped, self._pace.pause(self._room(size))

    def _room(self, size: int) -> int:
        return self._cap_bytes - (self._old_bytes + size - self._hole)

    def _drop(self) -> bool:
        with self._lock:
            try:
                fd = os.open(self._stream.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                return False
            try:
                size = os.fstat(fd).st_size
                if self._hole == 0:
                    self._hole = data_from(fd, 0)  # an earlier attempt's file is appended to
                # Another thread may just have cut it; cutting again would lose what it kept.
                if self._room(size) >= 0:
                    return False
                if not self._punch(fd, size):
                    self._empty(fd)
            except OSError:  # the folder is gone, or the disk is full: the next look tries again
                return False
            finally:
                os.close(fd)
        return True

    def _punch(self, fd: int, size: int) -> bool:
        """False where there are no holes, or none that could be told from zeros."""
        if not self._holes or size > MAX_FILE_BYTES:
            return False
        if self._old_bytes:  # of an earlier cut by copying: older than all of the file
            Path(self._stream.old_path).unlink(missing_ok=True)
            self._old_bytes = 0
        end = (size - self._cap_bytes // 2) // _PAGE_BYTES * _PAGE_BYTES
        if end <= self._hole:
            return True
        if _fallocate(fd, _PUNCH_HOLE, 0, end) != 0:
            if ctypes.get_errno() not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise OSError(ctypes.get_errno(), "fallocate")
            self._holes = False
        elif self._hole == 0 and data_from(fd, 0) < end:
            self._holes = False
        else:
            self._hole = end
        return self._holes

    def _empty(self, fd: int) -> None:
        """The newest part goes to ``.old``. What the job writes between the last copy and the emptying is lost; what it
        writes in the microseconds before that is not even counted, so that offsets may fall behind a little here."""
        half, was = self._cap_bytes // 2, self._cut
        begin = at = max(os.fstat(fd).st_size - half, self._hole)
        draft = Path(self._stream.old_path + ".new")
        out = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            # A very fast writer is never caught up with.
            while at - begin < half * 3 // 2 and (chunk := os.pread(fd, _COPY_BYTES, at)):
                at += os.write(out, chunk)
        finally:
            os.close(out)
        cutting = (was.number + 1) | 1
        self._stream.write_cut(was._replace(number=cutting))
        draft.replace(self._stream.old_path)
        size = os.fstat(fd).st_size
        os.ftruncate(fd, 0)
        self._cut = Cut(cutting + 1, was.live_from + size, was.live_from + begin)
        self._stream.write_cut(self._cut)
        self._hole, self._old_bytes = 0, at - begin


class LogPair:
    """The two streams of one attempt."""

    __slots__ = ("stderr", "stdout")

    def __init__(self, directory: str, cap_bytes: int) -> None:
        self.stdout = StreamCap(directory + "/stdout", cap_bytes)
        self.stderr = StreamCap(directory + "/stderr", cap_bytes)

    def enforce(self) -> float:
        """One look at each; how many seconds the next may wait."""
        return min(self.stdout.look()[1], self.stderr.look()[1])


def tail(directory: str) -> str:
    """The last lines of stderr, as text, whatever bytes they are; at most 20 lines and 4 KB."""
    stream = Stream(directory + "/stderr")
    try:
        kept = stream.look()
        chunks = stream.chunks(max(kept.start, kept.size - TAIL_BYTES), kept.size)
        text = b"".join(chunk for _, chunk in chunks)
    except OSError:
        return ""
    return "\n".join(text.decode(errors="replace").strip().splitlines()[-TAIL_LINES:])
