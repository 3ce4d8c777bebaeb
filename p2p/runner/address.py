"""Where a runner is found: the names in its directory, and a socket path that is never too long.

A Unix socket's path holds 107 bytes.  Data directories are longer now and then, so both sides go through
``/proc/self/fd``: the directory is opened, and its descriptor is the short way to it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

LOCK_NAME = "runner.lock"
LOG_NAME = "runner.log"
SOCKET_NAME = "runner.sock"

_MAX_PATH_BYTES = 107
_BACKLOG = 16


class SocketAddress:
    """The runner's socket in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def bind(self) -> socket.socket:
        """Listening, for this user only.  The caller holds the lock, so an older socket file is nobody's."""
        (self._directory / SOCKET_NAME).unlink(missing_ok=True)
        return self._through_directory(_listen)

    def connect(self) -> socket.socket:
        """Raises ``OSError`` when nobody takes the call."""
        return self._through_directory(_connect)

    def _through_directory(self, act: Callable[[socket.socket, str], None]) -> socket.socket:
        path = os.fspath(self._directory / SOCKET_NAME)
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.setblocking(False)
        directory_fd = -1
        try:
            if len(os.fsencode(path)) > _MAX_PATH_BYTES:
                directory_fd = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                path = f"/proc/self/fd/{directory_fd}/{SOCKET_NAME}"
            act(made, path)
        except BaseException:
            made.close()
            raise
        finally:
            if directory_fd >= 0:
                os.close(directory_fd)
        return made


def _listen(made: socket.socket, path: str) -> None:
    made.bind(path)
    Path(path).chmod(0o600)
    made.listen(_BACKLOG)


def _connect(made: socket.socket, path: str) -> None:
    made.connect(path)
