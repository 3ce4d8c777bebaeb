"""What SQLite's write-ahead log holds beyond what SQLite accepts of it: a torn write, or damage?

SQLite ends a log at its first bad frame and forgets the rest without a word. That is right for the write a power cut
interrupted, and wrong for a flipped bit among transactions whose fsync had returned: it would lose acknowledged
entries silently. Every transaction of ours is synced before the next one is written, so the two can be told apart:
behind a torn write there is at most the rest of its own transaction (PROTOCOL §2.20).

File format: https://sqlite.org/fileformat2.html#the_write_ahead_log. Decides nothing about entries.
"""

from __future__ import annotations

import struct
from pathlib import Path

HEADER_BYTES = 32
FRAME_HEADER_BYTES = 24
_MAGIC = 0x377F0682  # the lowest bit tells the byte order of the checksums


def damaged(path: Path, accepted_frames: int) -> str | None:
    """Why the log at `path` has lost a synced transaction, given how many frames SQLite accepts; None if it has not."""
    if not path.exists() or path.stat().st_size <= HEADER_BYTES:
        return None  # the header is synced before the first frame is written: a short file was never more
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
        if not _header_is_good(header):
            return "the header of its write-ahead log does not match its checksum"
        page_bytes, salts = struct.unpack(">I", header[8:12])[0], struct.unpack(">II", header[16:24])
        seen: set[int] = set()
        committed = False
        at = HEADER_BYTES + accepted_frames * (FRAME_HEADER_BYTES + page_bytes)
        while True:
            file.seek(at)
            frame = file.read(FRAME_HEADER_BYTES)
            if len(frame) < FRAME_HEADER_BYTES:
                return None
            page, size_after_commit, *theirs = struct.unpack(">IIII", frame[:16])
            if theirs[0] == salts[0] or theirs[1] == salts[1]:
                if committed or page in seen:  # a transaction writes a page once
                    return "its write-ahead log is damaged before its last transaction"
                seen.add(page)
                committed = size_after_commit != 0
            at += FRAME_HEADER_BYTES + page_bytes


def _header_is_good(header: bytes) -> bool:
    magic = struct.unpack(">I", header[:4])[0]
    if magic & ~1 != _MAGIC:
        return False
    words = struct.unpack(f"{'>' if magic & 1 else '<'}6I", header[:24])
    first = second = 0
    for n in range(0, 6, 2):
        first = (first + words[n] + second) & 0xFFFFFFFF
        second = (second + words[n + 1] + first) & 0xFFFFFFFF
    return bool((first, second) == struct.unpack(">II", header[24:32]))
