"""The orchestrator's handle on its runner: connect, start, stop, ack; reports come as they happen.

The connection may be lost at any time and nothing is lost with it: jobs go on, ends wait on the runner's disk, and
``connect`` gives everything that is running or not yet acknowledged.  A report may come twice; it is never missing.
``exited`` is final: whatever says otherwise of that attempt is older.

Decides: how a batch is cut into frames, when a connection counts as lost.  Does not decide: what a report means.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from p2p.runner.address import SocketAddress
from p2p.runner.launch import launch
from p2p.runner.protocol import (
    MAX_START_BYTES_PER_FRAME,
    PROTOCOL,
    ActivitySample,
    AttemptReport,
    FrameReader,
    Key,
    ProtocolError,
    RunnerBusy,
    RunnerUnavailable,
    StartSpec,
    pack,
)

REQUEST_SECONDS = 30.0
_RETRY_SECONDS = 0.05
_MAX_ACKS_PER_FRAME = 10_000

__all__ = ["ActivitySample", "AttemptReport", "RunnerBusy", "RunnerClient", "RunnerUnavailable", "StartSpec"]


class RunnerClient:
    """One at a time per runner: a newer client displaces an older one, which sees ``on_lost``.

    Both callbacks run on the event loop.  ``on_lost`` is called once per connection, and not after ``close``.
    """

    def __init__(
        self,
        directory: Path,
        *,
        on_report: Callable[[list[AttemptReport]], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._directory = Path(os.path.abspath(directory))  # noqa: PTH100  (resolve() would follow the user's links)
        self._on_report = on_report
        self._on_lost = on_lost
        self._link: _Link | None = None
        self._numbers = itertools.count(1)

    @property
    def connected(self) -> bool:
        return self._link is not None and self._link.open

    @property
    def runner_pid(self) -> int | None:
        return self._link.pid if self._link else None

    @property
    def runner_version(self) -> str | None:
        return self._link.version if self._link else None

    @property
    def lost_reason(self) -> str | None:
        """Why the last connection ended, for a log line."""
        return self._link.lost_reason if self._link else None

    async def connect(self, *, spawn: bool = True, timeout: float = 10) -> list[AttemptReport]:
        """All that run or ended unacknowledged.  Starts a runner if none answers.

        Raises ``RunnerUnavailable`` (nobody there, no answer in time), ``ProtocolError`` (it speaks another version).
        """
        await self.close()
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        try:
            async with asyncio.timeout_at(end):
                while True:
                    try:
                        return await self._connect_once()
                    except (OSError, RunnerUnavailable) as error:
                        if not spawn:
                            raise RunnerUnavailable(f"no runner answers in {self._directory}: {error}") from error
                    await launch(self._directory, timeout_seconds=max(0.1, end - loop.time()))
                    await asyncio.sleep(0 if self._answers() else _RETRY_SECONDS)
        except TimeoutError:
            await self.close()
            raise RunnerUnavailable(f"the runner in {self._directory} did not answer within {timeout:g} s") from None

    async def start(self, specs: Sequence[StartSpec]) -> None:
        """Idempotent by (job, attempt).  What becomes of each arrives as reports."""
        link = self._linked()
        for some in _by_size(specs):
            await link.send("start", specs=some)

    async def stop(self, job: str, attempt: int, *, reason: str, grace_seconds: float) -> None:
        """SIGTERM to the whole job, SIGKILL after the grace.  Of an attempt that is not known: nothing happens."""
        await self._linked().send("stop", key=[job, attempt], reason=reason, grace_seconds=grace_seconds)

    async def ack(self, items: Sequence[Key]) -> None:
        """These ends are safely elsewhere: the runner forgets them, and refuses to start them again."""
        link = self._linked()
        for start in range(0, len(items), _MAX_ACKS_PER_FRAME):
            await link.send("ack", items=[list(item) for item in items[start : start + _MAX_ACKS_PER_FRAME]])

    async def sample(self) -> list[ActivitySample]:
        """One for each running attempt."""
        number = next(self._numbers)
        answer = await self._linked().ask(("sample", number), "sample", number=number)
        return [ActivitySample.from_wire(item) for item in answer["items"]]

    async def shutdown(self) -> None:
        """Ends an idle runner; its unacknowledged ends stay on disk.  Raises ``RunnerBusy`` while jobs run."""
        link = self._linked()
        answer = await link.ask(("shutdown", None), "shutdown")
        if answer["unfinished"]:
            raise RunnerBusy(f"{answer['unfinished']} jobs are unfinished")
        await link.gone.wait()
        self._link = None

    async def close(self) -> None:
        """Drops the connection; jobs and the runner go on."""
        link, self._link = self._link, None
        if link is not None:
            link.on_lost = None
            link.close()
            await link.gone.wait()

    async def _connect_once(self) -> list[AttemptReport]:
        link = _Link()
        connection = SocketAddress(self._directory).connect()
        await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=connection)
        try:
            await link.send("hello", protocol=PROTOCOL)
            known = await link.greeting()
        except BaseException:
            link.close()
            raise
        link.on_report, link.on_lost = self._on_report, self._on_lost
        self._link = link
        return known

    def _answers(self) -> bool:
        try:
            SocketAddress(self._directory).connect().close()
        except OSError:
            return False
        return True

    def _linked(self) -> _Link:
        if self._link is None or not self._link.open:
            raise RunnerUnavailable("not connected to the runner")
        return self._link


class _Link(asyncio.Protocol):
    """One connection, from hello to its end."""

    def __init__(self) -> None:
        self.on_report: Callable[[list[AttemptReport]], None] | None = None
        self.on_lost: Callable[[], None] | None = None
        self.pid: int | None = None
        self.version: str | None = None
        self.lost_reason: str | None = None
        self.gone = asyncio.Event()
        self._reader = FrameReader()
        self._known: dict[Key, AttemptReport] = {}
        self._waiting: dict[tuple[str, Any], asyncio.Future[dict[str, Any]]] = {}
        self._writable = asyncio.Event()
        self._writable.set()
        self._transport: asyncio.Transport | None = None

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def greeting(self) -> list[AttemptReport]:
        """What is known, as of the last report that has come."""
        await self._answer(("known", None))
        known, self._known = self._known, {}
        return list(known.values())

    async def send(self, kind: str, **body: Any) -> None:
        if not self.open or self._transport is None:
            raise RunnerUnavailable(self.lost_reason or "the connection to the runner is closed")
        self._transport.write(pack(kind, **body))
        await self._writable.wait()

    async def ask(self, key: tuple[str, Any], kind: str, **body: Any) -> dict[str, Any]:
        await self.send(kind, **body)
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                return await self._answer(key)
        except TimeoutError:
            raise RunnerUnavailable(f"the runner did not answer {kind} within {REQUEST_SECONDS:g} s") from None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    async def _answer(self, key: tuple[str, Any]) -> dict[str, Any]:
        if self.gone.is_set():
            raise RunnerUnavailable(self.lost_reason or "the connection to the runner is closed")
        waiting = self._waiting.get(key)
        if waiting is None:
            waiting = self._waiting[key] = asyncio.get_running_loop().create_future()
        try:
            return await waiting
        finally:
            self._waiting.pop(key, None)

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            self._on_message(message)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost_reason = self.lost_reason or (str(error) if error else "the runner closed the connection")
        self.gone.set()
        self._writable.set()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(RunnerUnavailable(self.lost_reason))
        tell, self.on_lost = self.on_lost, None
        if tell is not None:
            tell()

    def _on_message(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind in ("known", "reports"):
            reports = [AttemptReport.from_wire(item) for item in message["items"]]
            if self.on_report is None:
                self._known.update((report.key, report) for report in reports)
            elif reports:
                self.on_report(reports)
            if message.get("last"):
                self._resolve(("known", None), message)
        elif kind == "hello":
            self.pid, self.version = message["pid"], message["version"]
        elif kind == "displaced":
            self.lost_reason = "a newer orchestrator took over the runner"
        elif kind == "error":
            self.lost_reason = message["message"]
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(ProtocolError(message["message"]))
        else:
            if kind == "shutdown" and not message["unfinished"]:
                self.on_lost = None  # what follows is no loss; the connection may close before our caller runs again
            self._resolve((kind, message.get("number")), message)

    def _resolve(self, key: tuple[str, Any], message: dict[str, Any]) -> None:
        waiting = self._waiting.get(key)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)


def _by_size(specs: Sequence[StartSpec]) -> Iterator[list[dict[str, Any]]]:
    """Batches that fit a frame, judged by the characters in them."""
    batch: list[dict[str, Any]] = []
    size = 0
    for spec in specs:
        cost = 500 + sum(map(len, spec.argv)) + sum(len(name) + len(value) for name, value in spec.env.items())
        if batch and size + cost > MAX_START_BYTES_PER_FRAME:
            yield batch
            batch, size = [], 0
        batch.append(spec.to_wire())
        size += cost
    if batch:
        yield batch
