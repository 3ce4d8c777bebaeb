"""Reading a job's log as a program does: bytes, counted, over as many answers as it takes."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from urllib.parse import urlencode

from tests.nodes import NodeProcess


def numbered(begin: int, end: int) -> bytes:
    """What `NUMBERS` has written from one offset to another: eight digits and a line's end at each multiple of nine."""
    whole = b"".join(b"%08d\n" % n for n in range(begin // 9, end // 9 + 1))
    return whole[begin % 9 :][: end - begin]


# Writes numbered lines until a file is there: argv is the file, the lines at once, and the seconds between.
NUMBERS = (
    "import os, sys, time\n"
    "gate, at_once, pause, n = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), 0\n"
    "while not os.path.exists(gate):\n"
    "    os.write(1, b''.join(b'%08d\\n' % (n + k) for k in range(at_once)))\n"
    "    n += at_once\n"
    "    time.sleep(pause)\n"
)


class Reader:
    """Follows a stream; may be cut off, and comes back with the offset it counted."""

    def __init__(self, node: NodeProcess, job: str, **query: object) -> None:
        self.node, self.job, self.query = node, job, query
        self.at = 0
        self.skipped = 0  # bytes that were dropped before it could read them

    def pieces(self, **more: object) -> Iterator[bytes]:
        """Of one answer, as they come. Raises what breaks it off."""
        query = urlencode({"offset": self.at, **self.query, **more})
        connection = http.client.HTTPConnection(self.node.host, self.node.port, timeout=30)
        try:
            connection.request("GET", f"/jobs/{self.job}/logs?{query}")
            response = connection.getresponse()
            if response.status != 200:
                raise http.client.HTTPException(f"{response.status}: {response.read()!r}")
            begins = int(response.headers["X-P2P-Log-Offset"])
            self.skipped += begins - self.at
            self.at = begins
            while piece := response.read1(1 << 16):
                yield piece
                self.at += len(piece)
        finally:
            connection.close()

    def all(self, *, seconds: float = 60.0) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) until the log is over, through whatever happens."""
        give_up = time.monotonic() + seconds
        while True:
            try:
                for piece in self.pieces(follow=1):
                    yield self.at, piece
                return
            except (http.client.HTTPException, OSError) as error:
                assert time.monotonic() < give_up, f"the log did not end: {error!r}"
                time.sleep(0.05)
