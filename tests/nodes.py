"""Real nodes for tests: started as people start them, spoken to by HTTP, killed without mercy."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(what: Callable[[], Any], *, seconds: float = 20.0, every: float = 0.02) -> Any:
    """The first true value of `what`; fails the test if there is none in time. For conditions that give no signal."""
    deadline = time.monotonic() + seconds
    while True:
        value = what()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(every)


@contextlib.contextmanager
def node_offering(folder: Path, resources: dict[str, Any]) -> Iterator[NodeProcess]:
    """A ready node with these resources, whatever this machine has, that does not fill its queue by itself."""
    file = folder / "resources.yaml"
    file.write_text(yaml.safe_dump(resources))
    node = NodeProcess(folder, ["--no-populate", "--resources", str(file)])
    try:
        node.start()
        yield node
    finally:
        node.destroy()


class NodeProcess:
    """A node in `folder`. `settings` become its cluster.yaml (nested dicts for sections)."""

    def __init__(self, folder: Path, flags: Sequence[str] = (), settings: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.logs = folder / "logs"
        self.port = free_port()
        self.flags = list(flags)
        self.settings = settings or {}
        self.process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        self.token: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log_text(self) -> str:
        return (self.folder / "p2p.log").read_text(errors="replace")

    def start(self, *, wait: bool = True) -> None:
        """Starts the process; with `wait` returns once it is ready."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "cluster.yaml"
        config.write_text(yaml.safe_dump(self.settings))
        command = [
            sys.executable,
            str(ROOT / "scripts/p2p_orchestrator.py"),
            *("--node-id", "n1", "--port", str(self.port), "--config", str(config)),
            *("--data-dir", str(self.data), "--log-dir", str(self.logs)),
            *self.flags,
        ]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("P2P_", "RINGRIFT_"))} | self.environment
        with (self.folder / "p2p.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env, cwd=self.folder
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"the node ended with {self.process.returncode}:\n{self.log_text}"
            with contextlib.suppress(OSError):
                return self.request("GET", "/ready")[0] == 200
            return False

        wait_until(ready, seconds=START_SECONDS)

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Ends the orchestrator (not the runner, not the jobs) and answers its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)

    def destroy(self) -> None:
        """Ends the orchestrator, its runner and every job, whatever state they are in."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)
        doomed = []
        mine = str(self.data)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if environment.get("P2P_RUNNER_DIR", "").startswith(mine) or environment.get(
                    "P2P_JOB_DIR", ""
                ).startswith(mine):
                    process.kill()
                    doomed.append(process)
        psutil.wait_procs(doomed, timeout=10)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        raw: bytes | None = None,
        timeout: float = 30.0,
    ) -> tuple[int, Any]:
        """(status, JSON body, or text if it is not JSON)."""
        status, _, answer = self.exchange(method, path, body, headers=headers, raw=raw, timeout=timeout)
        return status, answer

    def exchange(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        raw: bytes | None = None,
        timeout: float = 30.0,
    ) -> tuple[int, dict[str, str], Any]:
        """(status, headers in lower case, body)."""
        sent = {"Content-Type": "application/json"} if method != "GET" else {}
        if self.token:
            sent["Authorization"] = f"Bearer {self.token}"
        sent |= headers or {}
        if raw is None and method != "GET":
            raw = json.dumps({} if body is None else body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body=raw, headers=sent)
            response = connection.getresponse()
            text = response.read()
            told = {name.lower(): value for name, value in response.getheaders()}
        finally:
            connection.close()
        try:
            return response.status, told, json.loads(text)
        except ValueError:
            return response.status, told, text.decode(errors="replace")

    def submit(self, **job: Any) -> str:
        """The id of a job that was accepted."""
        status, answer = self.request("POST", "/jobs", job)
        assert status in (200, 201), answer
        return str(answer["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        status, answer = self.request("GET", f"/jobs/{job_id}")
        assert status == 200, answer
        assert isinstance(answer, dict)
        return answer

    def wait_for(self, job_id: str, *states: str, seconds: float = 30.0) -> dict[str, Any]:
        """The job's record once it is in one of these states."""
        record: dict[str, Any] = {}

        def there() -> bool:
            record.clear()
            record.update(self.job(job_id))
            return record["state"] in states

        wait_until(there, seconds=seconds)
        return record
