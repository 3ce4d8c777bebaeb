"""One process uses a data directory: ``node.lock`` says which. Decides nothing about what is in the directory.

The lock is the kernel's (flock), so it ends with its process however that ends; the pid in the file is for people.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

NAME = "node.lock"


def take(folder: Path) -> IO[str] | None:
    """The held lock, to be closed in the end; None while another process holds it."""
    file = (folder / NAME).open("a+", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def holder(folder: Path) -> str:
    """The pid that last took the lock, if it is not this process; empty if nobody has."""
    try:
        pid = (folder / NAME).read_text(encoding="ascii").strip()
    except OSError:
        return ""
    return pid if pid != str(os.getpid()) else ""
