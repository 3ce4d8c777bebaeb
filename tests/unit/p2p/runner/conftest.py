"""A node with a real runner and real processes.  Nothing here is faked, and nothing survives a test."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from p2p.runner.client import AttemptReport, RunnerClient, StartSpec

DEADLINE_SECONDS = float(
    os.environ.get("P2P_TEST_DEADLINE_SECONDS", "20")
)  # for what should take milliseconds, on a machine that does other things too


class Node:
    """What the orchestrator sees of its runner, and hands to look behind it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.directory = root / "runner"
        self.history: list[AttemptReport] = []
        self.losses = 0
        self._changed = asyncio.Event()
        self.clients: list[RunnerClient] = []
        self.client = self.new_client()

    def new_client(self) -> RunnerClient:
        client = RunnerClient(self.directory, on_report=self._on_report, on_lost=self._on_lost)
        self.clients.append(client)
        return client

    async def connect(self) -> list[AttemptReport]:
        """What is known counts as reported."""
        known = await self.client.connect()
        self._on_report(known)
        return known

    def spec(self, job: str, *argv: str, attempt: int = 1, **more: object) -> StartSpec:
        """``argv`` of one word with spaces is a shell script."""
        command = ["/bin/sh", "-c", argv[0]] if len(argv) == 1 and " " in argv[0] else list(argv)
        directory = self.root / "jobs" / job / str(attempt)
        env = {"PATH": "/usr/bin:/bin", "P2P_JOB_ID": job, "P2P_ATTEMPT": str(attempt), "P2P_JOB_DIR": str(directory)}
        fields = {"env": env, "directory": str(directory), "grace_seconds": 5.0, **more}
        return StartSpec(job=job, attempt=attempt, argv=command, **fields)  # type: ignore[arg-type]

    async def start(self, job: str, *argv: str, **more: object) -> StartSpec:
        spec = self.spec(job, *argv, **more)
        await self.client.start([spec])
        return spec

    async def run(self, job: str, *argv: str, **more: object) -> AttemptReport:
        await self.start(job, *argv, **more)
        return await self.exited(job, int(more.get("attempt", 1)))  # type: ignore[call-overload]

    async def exited(self, job: str, attempt: int = 1) -> AttemptReport:
        return await self.reported(job, "exited", attempt)

    async def reported(self, job: str, state: str, attempt: int = 1) -> AttemptReport:
        def found() -> AttemptReport | None:
            ours = (r for r in self.history if r.key == (job, attempt) and r.state == state)
            return next(ours, None)

        await self.until(lambda: found() is not None)
        report = found()
        assert report is not None
        return report

    async def until(self, holds: Callable[[], bool]) -> None:
        """Looks again at every report and every loss."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    async def kill_runner(self) -> None:
        pid, losses = self.client.runner_pid, self.losses
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await self.gone(pid)
        await self.until(lambda: self.losses > losses)

    async def gone(self, pid: int) -> None:
        """Returns when the process has ended."""
        await asyncio.to_thread(_wait_gone, pid)

    def stream(self, spec: StartSpec, name: str = "stdout") -> bytes:
        return (Path(spec.directory) / name).read_bytes()

    def _on_report(self, reports: list[AttemptReport]) -> None:
        self.history += reports
        self._changed.set()

    def _on_lost(self) -> None:
        self.losses += 1
        self._changed.set()


class Signal:
    """A named pipe that a job writes a line to: ``echo $$ > {signal.path}``."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    async def line(self) -> str:
        readable = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._fd, readable.set)
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                text = b""
                while not text.endswith(b"\n"):
                    await readable.wait()
                    readable.clear()
                    try:
                        text += os.read(self._fd, 1)
                        while not text.endswith(b"\n"):
                            text += os.read(self._fd, 1)
                    except BlockingIOError:
                        continue
                return text.decode().strip()
        finally:
            loop.remove_reader(self._fd)

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(tmp_path)
    try:
        yield node
    finally:
        for client in node.clients:
            await client.close()
        leaked = await asyncio.to_thread(_end_everything, tmp_path)
    assert not leaked, f"processes outlived their runner: {leaked}"


@pytest.fixture
async def running(node: Node) -> Node:
    """A node whose runner is up."""
    await node.client.connect()
    return node


@pytest.fixture
def new_signal(tmp_path: Path) -> AsyncIterator[Callable[[str], Signal]]:
    made: list[Signal] = []

    def make(name: str = "signal") -> Signal:
        made.append(Signal(tmp_path / name))
        return made[-1]

    yield make  # type: ignore[misc]
    for one in made:
        one.close()


def _wait_gone(pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ended, _, _ = select.select([pidfd], [], [], DEADLINE_SECONDS)
        assert ended, f"pid {pid} is still there"
    finally:
        os.close(pidfd)


def _end_everything(root: Path) -> list[str]:
    """Asks the runners to end, which ends their jobs; kills what is left and says what that was."""
    runners = _pids(b"P2P_RUNNER_DIR=" + bytes(root))
    for pid in runners:
        _signal(pid, signal.SIGTERM)
    for pid in runners:
        try:
            _wait_gone(pid)
        except AssertionError:
            pass  # it is among what is left
    left = _pids(bytes(root))
    names = [_command(pid) for pid in left]
    for pid in left:
        _signal(pid, signal.SIGKILL)
    return names


def _pids(text: bytes) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if text in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return "(gone)"
