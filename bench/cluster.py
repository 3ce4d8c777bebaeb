"""Three real nodes for the benchmarks of a cluster: started as an operator starts them, spoken to by HTTP, ended
after."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from bench.harness import ROOT

FORM_SECONDS = 60.0


class Box:
    """One node: its process and its port."""

    def __init__(self, folder: Path, name: str, port: int, flags: list[str]) -> None:
        self.folder, self.name, self.port, self.flags = folder / name, name, port, flags
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        command = [sys.executable, str(ROOT / "scripts/p2p_orchestrator.py"), "--node-id", self.name]
        command += ["--port", str(self.port), "--data-dir", str(self.folder / "data"), "--no-populate", *self.flags]
        command += ["--log-dir", str(self.folder / "logs"), "--config", str(self.folder.parent / "cluster.yaml")]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("P2P_", "RINGRIFT_"))}
        with (self.folder / "p2p.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env, cwd=self.folder
            )

    def end(self, number: int = signal.SIGKILL) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
                self.process.send_signal(number)
            self.process.wait(30)

    def ask(self, method: str, path: str, body: Any = None, *, seconds: float = 15.0) -> tuple[int, Any]:
        """(status, JSON body). Raises OSError if nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            raw = None if body is None else json.dumps(body)
            connection.request(method, path, raw, {"Content-Type": "application/json"} if raw else {})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        except http.client.HTTPException as error:
            raise OSError(str(error)) from None
        finally:
            connection.close()


class Boxes:
    """All of them."""

    def __init__(self, folder: Path, n: int, flags: list[str]) -> None:
        ports = [_free_port() for _ in range(n)]
        peers = ",".join(f"127.0.0.1:{port}" for port in ports)
        self.all = [Box(folder, f"n{i + 1}", port, ["--peers", peers, *flags]) for i, port in enumerate(ports)]

    def start(self) -> None:
        for box in self.all:
            box.start()
        self.wait_voters()

    def leader(self) -> Box | None:
        """The node that says that it leads; None while there is none."""
        for box in self.all:
            if box.alive:
                with contextlib.suppress(OSError, ValueError):
                    status, told = box.ask("GET", "/status", seconds=2.0)
                    if status == 200 and told["role"] == "leader":
                        return box
        return None

    def wait_voters(self) -> Box:
        """Until all vote and are well, as the leader sees it; the leader."""
        deadline = time.monotonic() + FORM_SECONDS
        while time.monotonic() < deadline:
            leader = self.leader()
            if leader is not None:
                with contextlib.suppress(OSError, ValueError):
                    status, told = leader.ask("GET", "/admin/voters")
                    rows = told["voters"] if status == 200 else []
                    well = len(rows) == len(self.all) and all(row["leads"] or row.get("ready") for row in rows)
                    # What the leader says of one that was started a moment ago is what it said before it died.
                    if well and all(box.ask("GET", "/ready")[0] == 200 for box in self.all):
                        return leader
            time.sleep(0.1)
        raise SystemExit(f"no {len(self.all)} voters within {FORM_SECONDS:g} s")

    def term(self) -> int:
        """The highest term anybody knows."""
        terms = [0]
        for box in self.all:
            with contextlib.suppress(OSError, ValueError):
                terms.append(box.ask("GET", "/status")[1]["term"])
        return max(terms)


@contextlib.contextmanager
def boxes(n: int = 3, *flags: str, settings: dict[str, Any] | None = None, started: bool = True) -> Iterator[Boxes]:
    """A cluster of n voters that does nothing by itself; nothing of it outlives the block."""
    (ROOT / "data").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=ROOT / "data"))
    told = {"cluster": {"young_steady_seconds": 0.5}, **(settings or {})}
    (folder / "cluster.yaml").write_text(yaml.safe_dump(told))
    made = Boxes(folder, n, list(flags))
    try:
        if started:
            made.start()
        yield made
    finally:
        for box in made.all:
            box.end()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("P2P_RUNNER_DIR", "").startswith(str(folder)):
                    process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
