"""Becoming the runner: the lock, the name, the signals, the umask; then the daemon.

Decides: what kind of process the runner is.  Does not decide: anything that it does (``daemon.py``).
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path

from p2p.runner import processes
from p2p.runner.address import LOCK_NAME
from p2p.runner.daemon import Daemon, write_log
from p2p.runner.orphans import PROCESS_NAME
from p2p.runner.store import Store


def run(directory: Path, ready: Callable[[], None]) -> int:
    """The whole life of the process.  The exit code: 0 also when another runner already serves this directory."""
    umask = os.umask(0o077)
    os.chdir(directory)
    lock_fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        write_log(f"another runner serves {directory}; nothing to do")
        ready()
        return 0
    Path("/proc/self/comm").write_text(PROCESS_NAME)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    processes.adopt_orphans()
    store = Store(directory)
    gc.freeze()
    asyncio.run(_serve(directory, store, ready, umask))
    return 0


async def _serve(directory: Path, store: Store, ready: Callable[[], None], umask: int) -> None:
    def listening() -> None:
        os.umask(umask)  # jobs inherit it; our own files are made by now, or with their own mode
        ready()

    await Daemon(directory, store).run(listening)
