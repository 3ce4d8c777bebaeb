"""Voters for the benchmarks that use the tests' own nodes, and the asking of them on connections that stay open."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.harness import ROOT
from tests.nodes import UNKNOWN, ClusterProcesses, NodeProcess

NOOP = {"command": ["true"], "requires": {"cpus": 900}}


@contextlib.contextmanager
def voters(n: int = 3, *flags: str, settings: dict[str, Any] | None = None) -> Iterator[ClusterProcesses]:
    """A cluster of `n` nodes that vote (at most as many as `voter_target`), run no jobs and fill no queue."""
    (ROOT / "data").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=ROOT / "data"))
    cluster = ClusterProcesses(folder, n, flags=["--no-populate", "--no-worker", *flags], settings=settings)
    try:
        cluster.start(voters=n if n > 2 else 1)
        yield cluster
    finally:
        cluster.destroy()
        shutil.rmtree(folder, ignore_errors=True)


class Caller:
    """Asks one node, on a connection that it keeps open."""

    def __init__(self, node: NodeProcess, *, timeout: float = 5.0) -> None:
        self.node, self._timeout = node, timeout
        self._connection: http.client.HTTPConnection | None = None

    def submit(self, key: str) -> int:
        """The status of a submit, 0 if there was no answer."""
        if self._connection is None:
            self._connection = http.client.HTTPConnection(self.node.host, self.node.port, timeout=self._timeout)
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        if self.node.token:
            headers["Authorization"] = f"Bearer {self.node.token}"
        try:
            self._connection.request("POST", "/jobs", body=json.dumps(NOOP), headers=headers)
            answer = self._connection.getresponse()
            answer.read()
        except UNKNOWN:
            self.close()
            return 0
        return answer.status

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
