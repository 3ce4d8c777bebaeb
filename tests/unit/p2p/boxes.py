"""A few nodes' HTTP APIs on loopback: the real application, forwarder, desk and operations, over one queue that all of
them have applied and a journal that commits at once, or goes wrong as told. Who leads is said, not elected."""

from __future__ import annotations

import asyncio
import io
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import aiohttp
from aiohttp import web

from config.settings import HealthSettings, build
from coordination import commands as c
from coordination.alerts import AlertBook
from coordination.clock import SystemClock
from coordination.daemon_manager import Supervisor
from coordination.dispatcher import Dispatcher
from coordination.errors import OutcomeUnknown, Refused
from coordination.events import EventBus
from coordination.kinds import Kinds
from coordination.operations import Operations
from coordination.queue_reads import QueueReader
from coordination.queue_state import QueueState
from coordination.scheduler import Scheduler
from coordination.unified_queue_populator import Populator
from p2p.api import app as api
from p2p.api.context import Context
from p2p.api.listener import listen
from p2p.effects import Config
from p2p.ids import DiskId, NodeId, Term, voter_id
from p2p.leadership import NOBODY, Leader, Leadership
from p2p.peers import Peers

TOKEN = "token-token-token-token"
SECONDS = 10.0  # how long a test waits for what takes milliseconds
Journal = Callable[["Box", bytes], Future[Any]]


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any

    @property
    def detail(self) -> str:
        return str(self.body["detail"])


class Queue:
    """What all nodes have applied."""

    def __init__(self, path: Path) -> None:
        self.state, self.reader = QueueState(str(path)), QueueReader(str(path))
        self.boxes: list[Box] = []
        self.commands: list[c.Command] = []

    def commit(self, body: bytes) -> Any:
        self.commands.append(c.decode(body))
        ((result, events),) = self.state.apply_batch([(self.state.applied_index + 1, 1, body)])
        for box in self.boxes:
            box.bus.publish(events)
        return result

    def close(self) -> None:
        self.reader.close()
        self.state.close()


class FakeCluster:
    """What the API asks of `p2p.cluster`, as a test says it."""

    def __init__(self) -> None:
        self.copy, self.age = True, 0.01
        self.others: list[tuple[NodeId, str]] = []
        self.ways: dict[str, tuple[str | None, tuple[str, ...]]] = {}
        self.anchors: dict[str, tuple[str, ...]] = {}
        self.tunnel: Any = None

    def has_copy(self) -> bool:
        return self.copy

    def copy_age(self) -> float:
        return self.age

    def copies(self) -> list[tuple[NodeId, str]]:
        return self.others

    def knows(self, node: str | None) -> bool:
        return node in self.ways

    def way_to(self, node: NodeId) -> tuple[str | None, tuple[str, ...]]:
        return self.ways[node]

    def anchors_of(self, node: str) -> tuple[str, ...]:
        return self.anchors.get(node, ())

    async def voters(self) -> dict[str, Any]:
        return {"voters": [], "learners": []}


class Box:
    """One node's API. `ills` are what happens to the next proposals here, one each; then all is well again."""

    def __init__(
        self, name: str, queue: Queue, folder: Path, *, voters: str = "a b c", token: str | None = None
    ) -> None:
        self.name, self.queue, self.folder = name, queue, folder
        self.clock, self.bus, self.leadership, self.cluster = SystemClock(), EventBus(), Leadership(), FakeCluster()
        self.ills: deque[Journal] = deque()
        self.asked: list[tuple[str, str]] = []  # (method, path with query) of what came in
        self.heads: list[dict[str, str]] = []
        self.before: Callable[[web.Request], Any] | None = None  # awaited before anything else
        self.running: set[tuple[str, int]] = set()
        settings = build({"node_id": name, "host": "127.0.0.1", "data_dir": folder, "auth_token": token})
        self.peers = Peers(token)
        self.desk = Dispatcher(
            journal=self,
            state=queue.state,
            read=self.read,
            kinds=Kinds({}, {}),
            clock=self.clock,
            bus=self.bus,
            translate=lambda error: error,
        )
        self.voters = tuple(voter_id(NodeId(voter), DiskId(voter)) for voter in voters.split())
        supervisor = Supervisor(self.clock, self.bus)
        alerts = AlertBook(self.bus)
        self.operations = Operations(
            self.desk,
            Populator(self.desk),
            supervisor,
            alerts,
            HealthSettings(),
            self._status,
            Scheduler(self.desk),
        )
        self.context = Context(
            settings=settings,
            operations=self.operations,
            dispatcher=self.desk,
            bus=self.bus,
            leadership=self.leadership,
            peers=self.peers,
            cluster=self.cluster,  # type: ignore[arg-type]
            read_index=self._read_index,
            view=lambda: SimpleNamespace(term=self.leadership.leader.term, config=Config(self.voters)),  # type: ignore[arg-type, return-value]
            applied_index=lambda: queue.state.applied_index,
            node_status=lambda: {"not_ready": None},
            nodes=lambda: {name: {"node": name} for name in (self.name, *self.cluster.ways)},
            metrics=lambda: b"",
            attempt_folder=lambda job, attempt: folder / f"{job}.{attempt}",
            attempt_runs=lambda job, attempt: (job, attempt) in self.running,
            shut_down=lambda: None,
        )
        self.address = ""
        self._stop: Callable[[], Awaitable[None]] | None = None
        queue.boxes.append(self)

    # -- the journal -------------------------------------------------------------------------------------------

    def propose(self, body: bytes) -> Future[Any]:
        if self.ills:
            return self.ills.popleft()(self, body)
        return done(self.queue.commit(body))

    def query(self, question: Callable[[], Any]) -> Future[Any]:
        return done(question())

    def read(self, question: Callable[[QueueReader], Any]) -> Future[Any]:
        return done(question(self.queue.reader))

    async def _read_index(self) -> int:
        if not self.desk.leads:
            raise Refused(503, "this node does not lead")
        return self.queue.state.applied_index

    async def _status(self) -> dict[str, Any]:
        return {"node_id": self.name}

    # -- life --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        await self.peers.start()
        app = api.build(self.context)

        @web.middleware
        async def watch(request: web.Request, handler: Any) -> Any:
            self.asked.append((request.method, request.raw_path))
            self.heads.append({name.lower(): value for name, value in request.headers.items()})
            if self.before is not None:
                await self.before(request)
            return await handler(request)

        app.middlewares.insert(0, watch)
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*listener.getsockname())
        self._stop = await listen(app, listener)

    async def stop(self) -> None:
        if self._stop is not None:
            await self._stop()
            self._stop = None
        await self.peers.stop()

    async def lead(self) -> None:
        await self.desk.begin_term()
        self.leadership.opened()

    # -- asking ------------------------------------------------------------------------------------------------

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        raw: bytes | None = None,
    ) -> Answer:
        """Over the wire, as anybody would."""
        given: dict[str, Any] = (
            {"data": io.BytesIO(raw)} if raw is not None else {"json": body} if body is not None else {}
        )
        sent = dict(headers or {})
        if raw is not None:
            sent.setdefault("Content-Type", "application/json")
        async with (
            asyncio.timeout(SECONDS),
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(
                method, f"http://{self.address}{path}", headers=sent, allow_redirects=False, **given
            ) as answer,
        ):
            text = await answer.read()
            told = {name.lower(): value for name, value in answer.headers.items()}
            kind = told.get("content-type", "")
            if "json" in kind and text:
                return Answer(answer.status, told, await answer.json(content_type=None))
            return Answer(answer.status, told, text)

    async def raw(self, request: bytes) -> bytes:
        """Bytes in, all bytes out, until the node closes."""
        host, port = self.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(request)
            async with asyncio.timeout(SECONDS):
                return await reader.read()
        finally:
            writer.close()


def done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def failed(error: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


class Boxes:
    """All of them, and who leads."""

    def __init__(self, queue: Queue, boxes: dict[str, Box]) -> None:
        self.queue, self._boxes = queue, boxes
        self.term = 0
        self.leader: Box | None = None

    def __getattr__(self, name: str) -> Box:
        try:
            return self._boxes[name]
        except KeyError:
            raise AttributeError(name) from None

    def depose(self) -> None:
        """The leader's replica gives up; nobody else has heard of it."""
        if self.leader is not None:
            box, self.leader = self.leader, None
            box.desk.end_term()
            box.leadership.lost(Term(self.term))

    async def elect(self, box: Box, *, heard_by: str = "a b c") -> None:
        """`box` leads the next term; those named hear of it."""
        self.depose()
        self.term += 1
        self.leader = box
        await box.desk.begin_term()
        for name in heard_by.split():
            if name in self._boxes:
                self._boxes[name].leadership.learn(Leader(Term(self.term), NodeId(box.name), box.address))
        box.leadership.learn(Leader(Term(self.term), NodeId(box.name), box.address))
        box.leadership.opened()

    def ill(self, box: Box, *ills: Journal) -> None:
        box.ills.extend(ills)

    # -- what may go wrong with a proposal ---------------------------------------------------------------------

    def committed_and_deposed(self, box: Box, body: bytes) -> Future[Any]:
        """A majority has it; this leader is deposed before it can say so."""
        self.queue.commit(body)
        self.depose()
        return failed(OutcomeUnknown("deposed"))

    def lost_and_deposed(self, box: Box, body: bytes) -> Future[Any]:
        """Nobody else has it, and nobody knows that."""
        self.depose()
        return failed(OutcomeUnknown("deposed"))

    def refused_and_deposed(self, box: Box, body: bytes) -> Future[Any]:
        self.depose()
        return failed(Refused(503, "this node does not lead; nothing was done"))

    def jobs(self) -> list[str]:
        return [row["id"] for row in self.queue.reader.jobs(filters={}, limit=100, before=None)[0]]


@asynccontextmanager
async def boxes(folder: Path, names: str = "a b c", *, token: str | None = None) -> AsyncIterator[Boxes]:
    queue = Queue(folder / "state.db")
    made = {name: Box(name, queue, folder / name, token=token) for name in names.split()}
    for box in made.values():
        box.folder.mkdir()
        await box.start()
    try:
        yield Boxes(queue, made)
    finally:
        for box in made.values():
            await box.stop()
        queue.close()


__all__ = ["NOBODY", "TOKEN", "Answer", "Box", "Boxes", "boxes", "done", "failed"]
