"""The composition root: builds every part of a node, starts them in order, stops them in the reverse order.

Start: lock the data directory, open the journal and the state (restoring a snapshot if the state is damaged), begin a
term, take up leases, listen, start the loops. Stop (SIGTERM, SIGINT): loops first, then the listener, then the
journal; jobs go on under the runner and are taken up by the next start.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import IO, Any, TypeVar

import apsw

from config.settings import Settings
from coordination import live
from coordination.alerts import AlertBook
from coordination.clock import SystemClock
from coordination.daemon_manager import Supervisor
from coordination.daemon_types import DaemonType
from coordination.dispatcher import Dispatcher
from coordination.event_log import EventLog
from coordination.events import Event, EventBus
from coordination.events import EventType as E
from coordination.kinds import Kinds
from coordination.operations import Operations
from coordination.queue_reads import QueueReader
from coordination.queue_state import QueueState
from coordination.unified_queue_populator import Populator
from p2p.api import app as api
from p2p.api.context import Context
from p2p.api.listener import listen
from p2p.driver import Driver, die
from p2p.ids import Index, NodeId
from p2p.journal import snapshot
from p2p.loops.base import Loop
from p2p.loops.health_loops import HealthMonitorLoop
from p2p.loops.job_loops import JobReaperConfig, JobReaperLoop, WorkerPullLoop
from p2p.loops.queue_loops import QueueMaintenanceLoop, QueuePopulatorLoop
from p2p.metrics import exposition
from p2p.replica import Replica
from p2p.resources import Resources, detect
from p2p.storage.disk import DiskLog
from p2p.workplace import Workplace, attempt_folder

log = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_SECONDS = 0.2
SAY_EVERY_SECONDS = 5.0
SUSPECT = "state.suspect"  # left by a run that found the state damaged: the next start restores it


class ToldToStop(Exception):
    """A signal came before this node had started."""


class StartError(Exception):
    """This node cannot start; the message says why and what to do."""


def version() -> str:
    """The installed version of this project."""
    try:
        return metadata.version("p2p-orchestrator")
    except metadata.PackageNotFoundError:
        return "0.0.0+source"


class Node:
    """One node, from start to stop. `run` is all a caller needs; tests use `start` and `stop`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.clock = SystemClock()
        self.bus = EventBus()
        self.started_at = time.monotonic()
        self.loops: dict[str, Loop] = {}
        self.port = settings.port
        self.draining = False
        self._stop = asyncio.Event()
        self._undo: list[Callable[[], Any]] = []
        self._lock: IO[str] | None = None
        self._reading: ThreadPoolExecutor | None = None

    # -- start and stop -------------------------------------------------------------------------------------------

    async def run(self, *, ready: Callable[[Node], None] = lambda node: None) -> None:
        """Starts, runs until told to stop by a signal or ``/admin/shutdown``, stops."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        try:
            try:
                await self.start()
            except ToldToStop:
                return
            ready(self)
            await self._stop.wait()
            log.info("stopping; running jobs go on under the runner")
        finally:
            await self.stop()

    async def start(self) -> None:
        """Raises StartError with a sentence for the person at the terminal."""
        settings = self.settings
        private, open_to_umask = 0o700, 0o777  # the environments of jobs lie in the data directory
        for folder, mode in ((settings.data_dir, private), (settings.log_dir, open_to_umask)):
            try:
                folder.mkdir(mode=mode, parents=True, exist_ok=True)
            except OSError as error:
                raise StartError(f"the folder {folder} cannot be made: {error.strerror}") from None
        await self._wait_for("the data directory", self._take_lock)
        listener = await self._wait_for(f"port {settings.port}", self._bind)
        self.port = listener.getsockname()[1]
        event_log = EventLog(settings.log_dir)
        self._undo.append(event_log.close)
        self.bus.subscribe(event_log.on_events)
        kinds = Kinds.load(settings.jobs_file)
        state, self.driver = await asyncio.to_thread(self._open_journal)
        elected = self.driver.start()
        self._undo.append(lambda: asyncio.to_thread(self.driver.stop))
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="reader")
        reader = await asyncio.wrap_future(self._reading.submit(QueueReader, str(self._state_path)))
        self._undo.append(lambda: asyncio.to_thread(self._stop_reading, reader))
        self._reader = reader
        self.desk = Dispatcher(
            journal=self.driver,
            state=state,
            read=self._read,
            kinds=kinds,
            clock=self.clock,
            bus=self.bus,
            lease_ms=round(settings.queue.lease_seconds * 1000),
            max_unfinished=settings.queue.max_unfinished,
        )
        await self._lead(elected)
        self._build_work()
        await self._listen(listener)
        if settings.worker:
            await self._open_workplace()
        self.supervisor.start_all()
        self._undo.append(self.supervisor.stop_all)
        live.set_live(live.LiveBackend(self.operations))
        self._undo.append(lambda: live.set_live(None))
        self.bus.publish([Event(E.NODE_JOINED, self.clock.now_ms(), {"node": settings.node_id, "version": version()})])
        gc.collect()
        gc.freeze()

    async def stop(self) -> None:
        """Undoes what was started, last first; safe after a start that failed half way."""
        while self._undo:
            result = self._undo.pop()()
            if asyncio.iscoroutine(result):
                await result
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def request_stop(self) -> None:
        """Makes `run` return soon."""
        self._stop.set()

    # -- the pieces -------------------------------------------------------------------------------------------------

    async def _wait_for(self, what: str, attempt: Callable[[], T | None]) -> T:
        """A restart follows the kill at once, so a start waits, bounded and saying so, for its predecessor to end."""
        deadline = time.monotonic() + self.settings.start_wait_seconds
        said = 0.0
        while True:
            got = attempt()
            if got is not None:
                return got
            now = time.monotonic()
            if now >= deadline:
                raise StartError(
                    f"{what} is still in use after {self.settings.start_wait_seconds:g} s{self._holder()}; stop the "
                    "other node, or give this one another --port and --data-dir"
                )
            if now - said >= SAY_EVERY_SECONDS:
                said = now
                log.warning("waiting for %s, which another process holds%s", what, self._holder())
            await asyncio.sleep(RETRY_SECONDS)
            if self._stop.is_set():
                raise ToldToStop

    def _holder(self) -> str:
        try:
            pid = (self.settings.data_dir / "node.lock").read_text(encoding="ascii").strip()
        except OSError:
            return ""
        return f" (node process {pid})" if pid and pid != str(os.getpid()) else ""

    def _take_lock(self) -> bool | None:
        file = (self.settings.data_dir / "node.lock").open("a+", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._lock = file
        return True

    def _bind(self) -> socket.socket | None:
        host, port = self.settings.host, self.settings.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(1024)
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE:
                return None
            raise StartError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
        return listener

    @property
    def _state_path(self) -> Path:
        return self.settings.data_dir / "state.db"

    def _open_journal(self) -> tuple[QueueState, Driver]:
        """Opens raft.db and state.db, restoring the state from a snapshot if it is damaged or gone. Blocks."""
        data, node = self.settings.data_dir, NodeId(self.settings.node_id)
        snapshots = data / "snapshots"
        store = DiskLog(data / "raft.db", node)
        state = self._open_state(snapshots)
        loaded = store.load(applied=Index(state.applied_index))
        if state.applied_index + 1 < loaded.first:
            raise StartError(
                f"the queue in {self._state_path} stops at entry {state.applied_index}, but the journal begins at "
                f"{loaded.first} and no good snapshot fills the gap; restore {data} from a backup"
            )
        if loaded.torn:
            log.warning("the last journal entry was torn by a crash; it was never acknowledged and is cut off")
        replica = Replica(node, loaded.hard_state, last=loaded.last, applied=Index(state.applied_index))
        driver = Driver(
            replica,
            store,
            state,
            on_events=self.bus.publish,
            state_path=self._state_path,
            snapshots=snapshots,
            on_fatal=self._fatal,
        )
        return state, driver

    def _open_state(self, snapshots: Path) -> QueueState:
        suspect = self.settings.data_dir / SUSPECT
        path = self._state_path
        if not suspect.exists() and (path.exists() or not snapshot.listed(snapshots)):
            try:
                return QueueState(str(path))
            except (apsw.CorruptError, apsw.NotADBError) as error:
                log.error("%s is damaged: %s", path, error)
        if path.exists():
            path.replace(path.with_name(f"state.db.damaged-{int(time.time())}"))
        for side in ("-wal", "-shm"):
            Path(f"{path}{side}").unlink(missing_ok=True)
        restored = snapshot.restore(snapshots, path)
        log.warning(
            "state restored from %s; the journal brings it up to date", restored.path if restored else "nothing"
        )
        suspect.unlink(missing_ok=True)
        return QueueState(str(path))

    def _fatal(self, why: str) -> None:
        """The journal or the state failed: leave word for the next start, and end at once."""
        if "corrupt" in why.lower() or "malformed" in why.lower():
            (self.settings.data_dir / SUSPECT).touch()
        die(why)

    def _read(self, question: Callable[[QueueReader], T]) -> Future[T]:
        assert self._reading is not None

        def ask() -> T:
            with self._reader.snapshot():
                return question(self._reader)

        return self._reading.submit(ask)

    def _stop_reading(self, reader: QueueReader) -> None:
        assert self._reading is not None
        self._reading.submit(reader.close).result()
        self._reading.shutdown()

    async def _lead(self, elected: Future[Any]) -> None:
        """Waits until the term's no-op is applied, however much is to be replayed, then takes up the leases."""
        while not (await asyncio.wait([asyncio.wrap_future(elected)], timeout=SAY_EVERY_SECONDS))[0]:
            progress = self.driver.progress()
            log.info("replaying the journal: entry %d of %d", progress.applied_index, progress.commit_index)
        await self.desk.begin_term()
        term = self.driver.progress().term
        self.bus.publish([Event(E.LEADER_ELECTED, self.clock.now_ms(), {"node": self.settings.node_id, "term": term})])

    def _build_work(self) -> None:
        settings = self.settings
        alerts = AlertBook(self.bus)
        populator = Populator(self.desk, enabled=settings.populator.enabled, totals=settings.populator.totals)
        self.supervisor = Supervisor(self.clock, self.bus)
        self.operations = Operations(self.desk, populator, self.supervisor, alerts, settings.health, self.status)
        reaper = JobReaperConfig(**settings.reaper.model_dump())
        health = HealthMonitorLoop(
            self.operations,
            self.desk,
            alerts,
            self.bus,
            data_dir=settings.data_dir,
            min_free_disk_mb=settings.queue.min_free_disk_mb,
            stuck_seconds=settings.reaper.stuck_job_threshold_seconds,
            interval_seconds=settings.health.interval_seconds,
        )
        self._add(DaemonType.QUEUE_POPULATOR, QueuePopulatorLoop(populator, settings.populator.interval_seconds))
        self._add(DaemonType.JOB_REAPER, JobReaperLoop(self.desk, reaper))
        self._add(DaemonType.QUEUE_MAINTENANCE, QueueMaintenanceLoop(self.desk, settings.queue))
        self._add(DaemonType.HEALTH_MONITOR, health)

    def _add(self, type: DaemonType, loop: Loop) -> None:
        self.loops[loop.name] = loop
        self.supervisor.add(type, loop.run)

    async def _listen(self, listener: socket.socket) -> None:
        context = Context(
            settings=self.settings,
            operations=self.operations,
            dispatcher=self.desk,
            bus=self.bus,
            progress=self.driver.progress,
            node_status=self.node_status,
            nodes=self.nodes,
            metrics=exposition(self._read, self.driver.progress, self._loops_json),
            attempt_folder=lambda job, attempt: attempt_folder(self.settings.data_dir / "jobs", job, attempt),
            shut_down=self.request_stop,
            drain=self.drain,
        )
        self._undo.append(await listen(api.build(context), listener))

    async def _open_workplace(self) -> None:
        settings = self.settings
        self.resources = await asyncio.to_thread(detect, settings.data_dir, settings.resources)
        if self.resources.gpu_error:
            log.warning("no GPUs offered: %s", self.resources.gpu_error)
        workplace = Workplace(
            settings.node_id,
            self.resources.offer(settings.node_id),
            (settings.data_dir / "jobs").resolve(),
            self.url,
            settings.work.max_jobs,
        )
        self._add(
            DaemonType.WORKER_PULL,
            WorkerPullLoop(
                self.desk,
                workplace,
                (settings.data_dir / "runner").resolve(),
                settings.work,
                heartbeat_seconds=settings.queue.heartbeat_seconds,
                lease_seconds=settings.queue.lease_seconds,
            ),
        )

    def drain(self, on: bool) -> None:
        """Stops or resumes taking jobs; what runs goes on."""
        self.draining = on
        worker = self.loops.get(WorkerPullLoop.name)
        if isinstance(worker, WorkerPullLoop):
            worker.accept(not on)

    # -- what it tells ----------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The address jobs and people on this machine use."""
        host = self.settings.host
        if host in ("0.0.0.0", "::"):  # noqa: S104 - a listen address, told as the loopback one
            host = "127.0.0.1"
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def _loops_json(self) -> dict[str, Any]:
        return {name: loop.as_json() for name, loop in self.loops.items()}

    def _member(self) -> dict[str, Any]:
        worker = self.loops.get(WorkerPullLoop.name)
        running = worker.running_jobs() if isinstance(worker, WorkerPullLoop) else 0
        resources: Resources | None = getattr(self, "resources", None)
        return {
            "state": "alive",
            "address": self.settings.advertise or f"{self.settings.host}:{self.port}",
            "role": "leader",
            "last_seen_age": 0.0,
            "resources": resources.as_json() if resources else None,
            "running_jobs": running,
            "draining": self.draining,
            "version": version(),
        }

    def nodes(self) -> dict[str, Any]:
        """Every member by id."""
        return {self.settings.node_id: self._member()}

    def node_status(self) -> dict[str, Any]:
        """``/status`` without the queue's part."""
        progress = self.driver.progress()
        return {
            "node_id": self.settings.node_id,
            "role": "leader",
            "leader_id": self.settings.node_id,
            "term": progress.term,
            "voters": [self.settings.node_id],
            "alive_peers": 1,
            "total_peers": 1,
            "peers": self.nodes(),
            "uptime_seconds": time.monotonic() - self.started_at,
            "version": version(),
            "journal": {
                "commit_index": progress.commit_index,
                "applied_index": progress.applied_index,
                "lag": progress.commit_index - progress.applied_index,
                "snapshot_index": progress.snapshot_index,
            },
            "loops": self._loops_json(),
            "not_ready": "stopping" if self._stop.is_set() else "draining" if self.draining else None,
        }

    async def status(self) -> dict[str, Any]:
        """The whole of ``/status``."""
        return {**self.node_status(), "work_queue": await self.operations.queue_status()}
