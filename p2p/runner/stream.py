"""One stream of one attempt as it lies on disk, addressed by how many bytes the job had ever written before.

    stdout        written by the job, appended to only. What the cap has dropped is a hole at its beginning: the file's
                  own offsets stay true, nothing is copied, and no byte is lost that the cap did not mean to drop.
    stdout.cut    only where the file system knows no holes, or the file has grown beyond `MAX_FILE_BYTES`: the file was
                  copied in part and emptied. Says how often, and which offset the file's first byte has since.
    stdout.old    what was copied then

Offsets are for good: a reader that was cut off goes on where it was, whatever the cap did meanwhile, and learns where
what is left begins if that is later. Decides: what is kept, and where it lies. Does not decide: how much (``logs.py``).
Read by the orchestrator while the runner cuts; the two share nothing but these files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CHUNK = 64 << 10
MAX_FILE_BYTES = 1 << 40  # of a file with a hole; ext4 ends at 16 TiB, where the job's writes would fail
CUTTING_SECONDS = 1.0  # a cut takes milliseconds; a longer one was broken off with its runner
_LOOK_AGAIN_SECONDS = 0.002
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a job may have put a pipe or a link there


class Cut(NamedTuple):
    """What ``<stream>.cut`` says. An odd number: it is being cut right now."""

    number: int = 0
    live_from: int = 0  # the offset of the live file's first byte
    old_from: int = 0  # of the first byte of ``.old``

    @property
    def under_way(self) -> bool:
        return self.number % 2 == 1


class Kept(NamedTuple):
    """Offsets: what is there begins at ``start``; ``size`` bytes were ever written."""

    start: int
    size: int


class Stream:
    """Every method blocks, raises ``OSError`` for a disk that fails, and takes what is missing for empty."""

    __slots__ = ("_cut_path", "old_path", "path")

    def __init__(self, path: str) -> None:
        self.path, self.old_path, self._cut_path = path, path + ".old", path + ".cut"

    def look(self) -> Kept:
        """What there is now."""
        for cut in self._between_cuts():
            with _opened(self.path) as live:
                size = cut.live_from + _size(live)
                start = cut.live_from + data_from(live, 0)
            with _opened(self.old_path) as old:
                if _size(old) and start == cut.live_from:
                    start = cut.old_from
        return Kept(start, size)

    def read(self, offset: int, most: int) -> tuple[int, bytes]:
        """Up to ``most`` bytes from ``offset`` on, or from where what is left begins, if that is later: the offset of
        the first byte, and the bytes; none at the end."""
        at, chunk = offset, b""
        for cut in self._between_cuts():
            at, chunk = self._read(cut, offset, most)
        return at, chunk

    def chunks(self, offset: int, end: int) -> Iterator[tuple[int, bytes]]:
        """All of [offset, end) that is left, in order. A gap is where one chunk's end is not the next one's offset."""
        while offset < end:
            offset, chunk = self.read(offset, min(CHUNK, end - offset))
            chunk = chunk[: max(end - offset, 0)]
            if not chunk:
                return
            yield offset, chunk
            offset += len(chunk)

    def last_lines(self, wanted: int, kept: Kept) -> int:
        """The offset at which the last ``wanted`` lines of what is kept begin."""
        at, found = kept.size, 0
        if wanted == 0:
            return at
        while at > kept.start:
            begin = max(at - CHUNK, kept.start)
            first, block = self._unbroken(begin, at)
            cut = len(block) - (at == kept.size and block.endswith(b"\n"))
            while (cut := block.rfind(b"\n", 0, cut)) >= 0:
                found += 1
                if found == wanted:
                    return first + cut + 1
            if first != begin:
                return first  # what lies before it was dropped
            at = begin
        return kept.start

    def _unbroken(self, begin: int, end: int) -> tuple[int, bytes]:
        """The newest part of [begin, end) that has no gap, and where it begins."""
        first, block = begin, b""
        for offset, piece in self.chunks(begin, end):
            if offset != first + len(block):
                first, block = offset, b""
            block += piece
        return first, block

    def read_cut(self) -> Cut:
        """Nothing was ever cut away by copying: all zero."""
        try:
            number, live_from, old_from = map(int, Path(self._cut_path).read_text().split())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return self._older_cut()
        return Cut(number, live_from, old_from)

    def write_cut(self, cut: Cut) -> None:
        """Takes effect at once or not at all."""
        draft = Path(self._cut_path + ".new")
        draft.write_text(f"{cut.number} {cut.live_from} {cut.old_from}\n")
        draft.replace(self._cut_path)

    def _older_cut(self) -> Cut:
        """By a runner of version 0.1: a line above what it copied says what was dropped before that."""
        try:
            with _opened(self.old_path) as old:
                size, line = _size(old), os.pread(old, 200, 0).partition(b"\n")[0] if old >= 0 else b""
        except OSError:
            return Cut()
        words = line.split()
        if not line.startswith(b"[runner: ") or not words[1].isdigit():
            return Cut()
        dropped = int(words[1]) - len(line) - 1
        return Cut(0, dropped + size, dropped)

    def _between_cuts(self) -> Iterator[Cut]:
        """Gives the cut under which the caller is to read, again until none came in between."""
        give_up = time.monotonic() + CUTTING_SECONDS
        cut = self.read_cut()
        while True:
            late = time.monotonic() > give_up
            if not cut.under_way or late:
                yield cut
                after = self.read_cut()
                if after == cut or late:
                    return
                cut = after
            else:
                time.sleep(_LOOK_AGAIN_SECONDS)
                cut = self.read_cut()

    def _read(self, cut: Cut, offset: int, most: int) -> tuple[int, bytes]:
        if offset < cut.live_from:
            with _opened(self.old_path) as old:
                at = max(offset - cut.old_from, 0)
                if at < _size(old):
                    chunk = os.pread(old, min(most, cut.live_from - cut.old_from - at), at)
                    if chunk:
                        return cut.old_from + at, chunk
            offset = cut.live_from
        with _opened(self.path) as live:
            if live < 0:
                return offset, b""
            at = data_from(live, offset - cut.live_from)
            while True:
                chunk = os.pread(live, most, at)
                # A hole reads as zeros: what was dropped between the look and the read must not pass for the log.
                begins = data_from(live, at) if chunk else at
                if begins == at:
                    return cut.live_from + at, chunk
                at = begins


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    """A descriptor, or -1 for what is not there or is not a plain file."""
    try:
        fd = os.open(path, _FLAGS)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENOTDIR):
            raise
        yield -1
        return
    try:
        yield fd if stat.S_ISREG(os.fstat(fd).st_mode) else -1
    finally:
        os.close(fd)


def _size(fd: int) -> int:
    return os.fstat(fd).st_size if fd >= 0 else 0


def size_of(path: str) -> int:
    """0 for what is not a plain file: a job may have put a pipe there, and opening that would block."""
    try:
        status = os.lstat(path)
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def data_from(fd: int, at: int) -> int:
    """The first offset from ``at`` on that is no hole; the end if all is."""
    if fd < 0:
        return 0
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            return at  # a file system that does not tell; then none of our holes are there either
        return max(at, _size(fd))
