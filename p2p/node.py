"""The composition root: builds every part of a node, starts them in order, stops them in the reverse order.

Start: lock the data directory, open the journal and the state (restoring a snapshot if the state is damaged), listen,
join or found a cluster, start the loops. Whenever this node is elected it takes up the leases and opens the desk; when
it is deposed it closes it. Stop (SIGTERM, SIGINT): hand the leadership over, then stop the loops, the listener and the
journal; jobs go on under the runner and are taken up by the next start.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import hashlib
import json
import logging
import random
import secrets
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
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
from coordination.errors import OutcomeUnknown, Refused
from coordination.event_log import EventLog
from coordination.events import Event, EventBus
from coordination.events import EventType as E
from coordination.kinds import Kinds
from coordination.operations import Operations
from coordination.planner import PlanPolicy
from coordination.queue_reads import QueueReader
from coordination.queue_state import QueueState
from coordination.scheduler import Scheduler
from coordination.unified_queue_populator import Populator
from p2p.api import app as api
from p2p.api.context import Context
from p2p.api.listener import listen
from p2p.cluster import Callbacks, Cluster
from p2p.driver import Driver, NotLeader, Stopped, Unknown, boot_seconds, die
from p2p.election.rank import WAN, Timers
from p2p.gpu_jobs import identify, ownership
from p2p.gpu_sampler import GpuSampler
from p2p.gpus import Reading, figures, free_mb
from p2p.ids import Index, NodeId, node_of
from p2p.journal import snapshot
from p2p.leadership import Leadership
from p2p.loops.base import Loop
from p2p.loops.desk import DeskOfTheLeader
from p2p.loops.gpu_loops import GpuWatchLoop
from p2p.loops.health_loops import HealthMonitorLoop
from p2p.loops.job_loops import JobReaperConfig, JobReaperLoop, WorkerPullLoop
from p2p.loops.queue_loops import QueueMaintenanceLoop, QueuePopulatorLoop, SchedulerLoop
from p2p.membership.member import Member, State
from p2p.metrics import exposition
from p2p.peers import PeerRefused, Peers, PeerUnreachable
from p2p.replica import Replica
from p2p.resources import Resources, detect
from p2p.storage import CopiedStore, Loaded, lock
from p2p.storage.disk import DiskLog
from p2p.workplace import Workplace, attempt_folder

log = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_SECONDS = 0.2
SAY_EVERY_SECONDS = 5.0
QUEUE_PART_SECONDS = 0.7
HIDDEN_PRIORITY = -10_000  # of a voter that nobody can dial: it leads only until another can
GPU_META_SECONDS = 30.0  # between two figures of free GPU memory that every node is told
STALE_SECONDS = 3.0  # a copy that has not heard its leader for so long has none
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


def _in_words_of_the_queue(error: Exception) -> Exception:
    """The journal's errors as callers of the queue know them."""
    match error:
        case NotLeader() | Stopped():
            return Refused(503, f"{error}; nothing was done")
        case Unknown():
            return OutcomeUnknown(f"{error}; ask again by the idempotency key")
    return error


class Node:
    """One node, from start to stop. `run` is all a caller needs; tests use `start` and `stop`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.clock = SystemClock()
        self.bus = EventBus()
        self.started_at = time.monotonic()
        self.loops: dict[str, Loop] = {}
        self.port = settings.port
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._notice, self._hurry = asyncio.Event(), asyncio.Event()  # see `_on_sigterm`
        self._refused = ""  # why the cluster has no place for this node
        self._alerts = AlertBook(self.bus)
        self.resources: Resources | None = None
        self.gpus: GpuSampler | None = None
        self._gpu_meta: dict[str, Any] = {}
        self._gpu_meta_at = float("-inf")
        self._opened = asyncio.Event()  # the desk has been open at least once
        self._undo: list[Callable[[], Any]] = []
        self._lock: IO[str] | None = None
        self._reading: ThreadPoolExecutor | None = None

    # -- start and stop -------------------------------------------------------------------------------------------

    async def run(self, *, ready: Callable[[Node], None] = lambda node: None) -> None:
        """Starts, runs until told to stop by a signal or ``/admin/shutdown``, stops."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._on_sigint)
        loop.add_signal_handler(signal.SIGTERM, self._on_sigterm)
        try:
            try:
                await self.start()
            except ToldToStop:
                return
            ready(self)
            await self._stop.wait()
            if self._notice.is_set():
                await self._leave()
            log.info("stopping; running jobs go on under the runner")
            if self._refused:
                raise StartError(self._refused)
        finally:
            await self.stop()

    def _on_sigterm(self) -> None:
        """With `drain_on_sigterm` the first is a notice that the machine goes away; the second stops at once."""
        if self.settings.work.drain_on_sigterm and not self._stop.is_set():
            self._notice.set()
        else:
            self._hurry.set()
        self._stop.set()

    def _on_sigint(self) -> None:
        """Whoever sits at the terminal does not wait for a notice to be over."""
        self._hurry.set()
        self._stop.set()

    async def _leave(self) -> None:
        """Has the jobs here end or move on, within the notice: spot instances are told a little before they vanish."""
        worker = self.loops.get(WorkerPullLoop.name)
        if not isinstance(worker, WorkerPullLoop):
            return
        notice = self.settings.work.notice_seconds
        log.warning("SIGTERM: this machine goes away; its jobs have %g s to end or to move on", notice)
        try:
            async with asyncio.timeout(notice):
                leaving = asyncio.create_task(worker.leave(notice))
                hurry = asyncio.create_task(self._hurry.wait())
                await asyncio.wait({leaving, hurry}, return_when=asyncio.FIRST_COMPLETED)
                log.info("%s", "drained" if leaving.done() else "told to hurry")
        except TimeoutError:
            log.warning("the notice is over; %d jobs still run here", worker.running_jobs())
        finally:
            leaving.cancel()
            hurry.cancel()
            await asyncio.gather(leaving, hurry, return_exceptions=True)

    async def start(self) -> None:
        """Raises StartError with a sentence for the person at the terminal."""
        settings = self.settings
        self._loop = asyncio.get_running_loop()
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
        self.leadership = Leadership()
        self.peers = Peers(settings.auth_token.get_secret_value() if settings.auth_token else None)
        await self.peers.start()
        self._undo.append(self.peers.stop)
        store, loaded, state = await asyncio.to_thread(self._open_stores)
        self.cluster = Cluster(
            settings,
            loaded.identity,
            port=self.port,
            peers=self.peers,
            leadership=self.leadership,
            bus=self.bus,
            clock=self.clock,
            version=version(),
            callbacks=Callbacks(self._office, self._meta, self._capabilities, self._alert, self._cannot_go_on),
        )
        self.driver = self._make_driver(store, loaded, state)
        self.cluster.driver = self.driver
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
            translate=_in_words_of_the_queue,
            policy=PlanPolicy(
                preempt_gap=settings.placement.preempt_gap,
                preempt_after_ms=round(settings.placement.preempt_after_seconds * 1000),
            ),
            group_weights=settings.placement.group_weights,
        )
        self.desk.address_of = self._host_of
        self.desk.on_trouble = self._cordoned
        self._build_work()
        if settings.worker:
            self.resources = await asyncio.to_thread(detect, settings.data_dir, settings.resources)
            await self._start_sampling(self.resources)
        await self._listen(listener)
        await self.cluster.start(self.driver)
        self.driver.start()  # the last of all: a lone voter is elected at once, and then the desk must be there
        self._undo.append(self.cluster.stop)
        self._undo.append(self.cluster.resign)
        if not settings.peers:
            await self._first_office()
        if settings.worker:
            self._open_workplace()
        self.supervisor.start_all()
        self._undo.append(self.supervisor.stop_all)
        live.set_live(live.LiveBackend(self.operations, elsewhere=self._elsewhere))
        self._undo.append(lambda: live.set_live(None))
        self.bus.publish([Event(E.NODE_JOINED, self.clock.now_ms(), {"node": settings.node_id, "version": version()})])
        gc.collect()
        gc.freeze()

    def _elsewhere(self, operation: str) -> live.Backend | None:
        """Who carries out an operator's call that was made inside this process: None is this node itself. Called on
        any thread. Raises Refused (503)."""
        if operation in live.OF_ONE_NODE:
            return None
        if self.desk.leads:
            if operation not in live.READING and not self.cluster.needs_nobody() and live.on_loop(self._loop):
                raise Refused(
                    503,
                    "this call waits for other voters, whom this very event loop speaks to: make it "
                    "from a thread (asyncio.to_thread); nothing was done",
                )
            return None
        leader = self.leadership.leader
        if leader.node is None or leader.address is None or leader.node == self.settings.node_id:
            raise Refused(503, "nobody is known to lead; nothing was done")
        token = self.settings.auth_token
        return live.HttpBackend(f"http://{leader.address}", token.get_secret_value() if token else None)

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
        pid = lock.holder(self.settings.data_dir)
        return f" (node process {pid})" if pid else ""

    def _take_lock(self) -> bool | None:
        self._lock = lock.take(self.settings.data_dir)
        return True if self._lock is not None else None

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

    def _open_stores(self) -> tuple[DiskLog, Loaded, QueueState]:
        """Opens raft.db and state.db, restoring the state from a snapshot if it is damaged or gone. Blocks."""
        data, node = self.settings.data_dir, NodeId(self.settings.node_id)
        snapshots = data / "snapshots"
        store = self._open_log(data / "raft.db", node)
        installed = snapshot.resume_install(snapshots, self._state_path)
        if installed is not None:  # the last run ended in the middle of it
            store.reset(installed.index, installed.term, installed.chain, installed.config)
            snapshot.installed(snapshot.marker_in(snapshots))
        state = self._open_state(snapshots)
        loaded = store.load(applied=Index(state.applied_index))
        if state.applied_index + 1 < loaded.first:
            raise StartError(
                f"the queue in {self._state_path} stops at entry {state.applied_index}, but the journal begins at "
                f"{loaded.first} and no good snapshot fills the gap; restore {data} from a backup"
            )
        if loaded.torn:
            log.warning("the last journal entry was torn by a crash; it was never acknowledged and is cut off")
        return store, loaded, state

    def _open_log(self, path: Path, node: NodeId) -> DiskLog:
        """The store, unless it is a copy of one that votes elsewhere. A copy of the only voter there is may go on: a
        backup is restored that way, and there is nobody to be confused. `--adopt` makes any copy a new disk."""
        try:
            return DiskLog(path, node)
        except CopiedStore as error:
            if self.settings.adopt:
                return DiskLog(path, node, adopt=True)
            if not error.alone:
                raise
            log.warning("%s has been copied or moved; it goes on as the only voter of its cluster", path)
            return DiskLog(path, node, check_copy=False)

    def _make_driver(self, store: DiskLog, loaded: Loaded, state: QueueState) -> Driver:
        policy = self.settings.cluster
        timers = WAN if policy.profile == "wan" else Timers()
        if policy.preempt:
            timers = replace(timers, preempt_steady=policy.preempt_after_seconds)
        else:
            timers = replace(timers, preempt_steady=float("inf"), preempt_longest=float("inf"))
        replica = Replica(
            loaded.identity.voter,
            loaded.hard_state,
            loaded.start,
            applied=Index(state.applied_index),
            now=boot_seconds(),
            draw=random.Random(secrets.randbits(64)).random,  # noqa: S311 - jitter, not secrets
            timers=timers,
            priority=self.settings.priority if self.cluster.address is not None else HIDDEN_PRIORITY,
        )
        return Driver(
            replica,
            store,
            state,
            on_events=self.bus.publish,
            send=self.cluster.send,
            on_role=self.cluster.role_changed,
            download=self.cluster.download,
            state_path=self._state_path,
            snapshots=self.cluster.snapshots,
            snapshot_entries=policy.snapshot_entries,
            keep_entries=policy.keep_entries,
            on_fatal=self._fatal,
        )

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

    def _host_of(self, node: str) -> str:
        """Where other machines reach the processes of a node: the host of its address, as far as it is known."""
        address = self.cluster.address if node == self.settings.node_id else None
        if address is None and self.cluster.knows(node):
            address = self.cluster.way_to(NodeId(node))[0]
        return address.rpartition(":")[0].strip("[]") if address else "127.0.0.1"

    def _cordoned(self, node: str, why: str) -> None:
        message = f"node {node} was cordoned: {why}; see its logs, then: POST /nodes/{node}/uncordon"
        self._alert(f"node_cordoned:{node}", message if why else "")

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

    async def _office(self, on: bool) -> None:
        """Opens the desk once everything that was ever acknowledged is applied here, however much is to be replayed;
        closes it when this node leads no more."""
        if not on:
            self.desk.end_term()
            return
        caught_up = asyncio.wrap_future(self.driver.read_index())
        try:
            while not (await asyncio.wait([caught_up], timeout=SAY_EVERY_SECONDS))[0]:
                view = self.driver.view
                log.info("replaying the journal: entry %d of %d", view.applied_index, view.commit_index)
            caught_up.result()
        except NotLeader:
            if self.driver.view.established:
                raise  # it could not be answered now, and nothing will happen by itself: ask again
            return  # deposed meanwhile: the next change says what is to be done
        except Stopped:
            return
        finally:
            caught_up.cancel()  # nobody waits for it any more
        await self.desk.begin_term()
        self.leadership.opened()
        self._opened.set()

    async def _first_office(self) -> None:
        """A node that needs nobody is ready once it leads; one with other voters does not wait for them."""
        while self.cluster.needs_nobody() and not self._opened.is_set():
            try:
                async with asyncio.timeout(RETRY_SECONDS):
                    await self._opened.wait()
            except TimeoutError:
                if self._stop.is_set():
                    raise ToldToStop from None

    def _alert(self, name: str, message: str) -> None:
        if not message:
            self._alerts.clear_alert(name, self.clock.now_ms())
            return
        self._alerts.raise_alert(name, message, self.clock.now_ms(), severity="critical")

    def _cannot_go_on(self, why: str) -> None:
        """The cluster has no place for this node."""
        log.critical("stopping: %s", why)
        self._refused = why
        self.request_stop()

    def _build_work(self) -> None:
        settings = self.settings
        alerts = self._alerts
        populator = Populator(self.desk, enabled=settings.populator.enabled, totals=settings.populator.totals)
        scheduler = Scheduler(self.desk)
        self.supervisor = Supervisor(self.clock, self.bus)
        self.operations = Operations(
            self.desk,
            populator,
            self.supervisor,
            alerts,
            settings.health,
            self.status,
            scheduler,
            gpu_idle_seconds=settings.reaper.gpu_idle_seconds,
        )
        reaper = JobReaperConfig(**settings.reaper.model_dump(exclude={"gpu_idle_seconds"}))
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
        self._add(DaemonType.SCHEDULER, SchedulerLoop(scheduler, self.desk.kinds.schedules))
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
            leadership=self.leadership,
            peers=self.peers,
            cluster=self.cluster,
            read_index=self._read_index,
            view=lambda: self.driver.view,
            applied_index=lambda: self.driver.applied_index,
            node_status=self.node_status,
            nodes=self.nodes,
            metrics=exposition(self._read, lambda: self.driver.view, self._loops_json),
            attempt_folder=lambda job, attempt: attempt_folder(self.settings.data_dir / "jobs", job, attempt),
            attempt_runs=self._attempt_runs,
            shut_down=self.request_stop,
        )
        self._undo.append(await listen(api.build(context), listener))

    async def _read_index(self) -> int:
        """Waits until a read here is linearizable. Raises Refused (503)."""
        try:
            return await asyncio.wrap_future(self.driver.read_index())
        except NotLeader as error:
            raise Refused(503, f"{error}; ask again") from None

    async def _start_sampling(self, resources: Resources) -> None:
        """Looks at the GPUs once, and from then on again and again."""
        work = self.settings.work
        self.gpus = GpuSampler(
            resources.look,
            identify=identify,
            interval_seconds=work.gpu_sample_seconds,
            deadline_seconds=work.gpu_deadline_seconds,
        )
        await asyncio.to_thread(self.gpus.start)
        self._undo.append(lambda: asyncio.to_thread(self._stop_sampling, resources))
        if self._gpu_reading().error:
            log.warning("no GPUs offered: %s", self._gpu_reading().error)

    def _stop_sampling(self, resources: Resources) -> None:
        assert self.gpus is not None
        if self.gpus.stop():
            resources.close()

    def _gpu_reading(self) -> Reading:
        return self.gpus.reading if self.gpus is not None else Reading()

    def _open_workplace(self) -> None:
        settings = self.settings
        assert self.resources is not None
        workplace = Workplace(
            settings.node_id,
            self.resources.offer(settings.node_id, self._gpu_reading()),
            (settings.data_dir / "jobs").resolve(),
            self.url,
            settings.work.max_jobs,
            gpus=self._gpu_reading,
        )
        worker = WorkerPullLoop(
            DeskOfTheLeader(settings.node_id, self.desk, self.leadership, self.peers),
            workplace,
            (settings.data_dir / "runner").resolve(),
            settings.work,
            heartbeat_seconds=settings.queue.heartbeat_seconds,
            lease_seconds=settings.queue.lease_seconds,
            pause=self.leadership.change,
        )
        self._add(DaemonType.WORKER_PULL, worker)
        self._watch_gpus(worker)

    def _watch_gpus(self, worker: WorkerPullLoop) -> None:
        assert self.gpus is not None and self._loop is not None
        work, loop = self.settings.work, self._loop
        watch = GpuWatchLoop(
            worker,
            self._gpu_reading,
            self._alerts,
            self.clock.now_ms,
            policy=work.gpu_memory_policy,
            interval_seconds=work.gpu_sample_seconds,
        )
        self._add(DaemonType.GPU_WATCH, watch)

        def sampled() -> None:
            try:
                loop.call_soon_threadsafe(watch.poke)
            except RuntimeError:
                pass  # the loop has been closed: this node has stopped

        self.gpus.on_sample = sampled
        worker.on_gpus_freed = self.gpus.poke

    @property
    def draining(self) -> bool:
        """Whether the leader has said that this node drains."""
        worker = self.loops.get(WorkerPullLoop.name)
        return isinstance(worker, WorkerPullLoop) and worker.mark == "draining"

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

    def _attempt_runs(self, job: str, attempt: int) -> bool | None:
        worker = self.loops.get(WorkerPullLoop.name)
        if isinstance(worker, WorkerPullLoop):
            mine = worker.workplace.jobs.get((job, attempt))
            if mine is not None:
                return not mine.ended
            if not worker.taken_up:
                return None
        held = self.desk.leases.by_job.get(job)  # claimed by a worker that is no node of ours
        return held is not None and held.attempt == attempt

    def _running(self) -> int:
        worker = self.loops.get(WorkerPullLoop.name)
        return worker.running_jobs() if isinstance(worker, WorkerPullLoop) else 0

    def _meta(self) -> dict[str, Any]:
        """What others see of this node at a glance; what it has travels by the hash of it."""
        resources = self._capabilities()
        meta: dict[str, Any] = {"running_jobs": self._running(), "draining": self.draining}
        meta |= self._gpu_meta_now()
        if resources is not None:
            meta["caps"] = hashlib.sha256(json.dumps(resources, sort_keys=True).encode()).hexdigest()[:16]
            meta["zone"] = str(resources["labels"].get("zone", ""))[:60]
        return meta

    def _gpu_meta_now(self) -> dict[str, Any]:
        """How much of its GPUs is free, in figures so round and so seldom new that telling everybody costs nothing."""
        reading = self._gpu_reading()
        if not reading.gpus:
            return {}
        if time.monotonic() - self._gpu_meta_at >= GPU_META_SECONDS:
            self._gpu_meta_at = time.monotonic()
            used = [gpu.utilization for gpu in reading.gpus if gpu.healthy and gpu.utilization is not None]
            self._gpu_meta = {
                "gpu_free_gb": sum(self._gpu_free(reading).values()) // 1024,
                "gpu_use": round(sum(used) / len(used), -1) if used else None,
            }
        return self._gpu_meta

    def _gpu_free(self, reading: Reading) -> dict[str, int]:
        worker = self.loops.get(WorkerPullLoop.name)
        if isinstance(worker, WorkerPullLoop):
            return worker.workplace.gpu_free_mb(reading)
        return {
            gpu.uuid: free_mb(gpu, {}, lambda _: None) for gpu in reading.gpus if gpu.healthy
        }  # it is being started

    def _capabilities(self) -> dict[str, Any] | None:
        """What seldom changes. It travels to every node whenever it does, so what changes all the time is not in it."""
        return self.resources.as_json(self._gpu_reading()) if self.resources is not None else None

    def _own_resources(self) -> dict[str, Any] | None:
        """For this node's own pages: with what its GPUs do now."""
        described, reading = self._capabilities(), self._gpu_reading()
        if described is not None:
            free, worker = self._gpu_free(reading), self.loops.get(WorkerPullLoop.name)
            claims = worker.workplace.gpu_claims() if isinstance(worker, WorkerPullLoop) else []
            now = figures(reading.gpus, lambda gpu: free.get(gpu.uuid, 0), ownership(claims))
            described["gpus"] = [gpu | now.get(gpu["uuid"], {}) for gpu in described["gpus"]]
        return described

    def _member(self, member: Member, voters: set[str]) -> dict[str, Any]:
        node = member.node
        mine = node == self.settings.node_id
        gpus = self._gpu_meta_now() if mine else member.meta
        role = "leader" if node == self.leadership.leader.node else "follower" if node in voters else "worker"
        return {
            "state": str(member.state),
            "address": self.cluster.address if mine else member.address,
            "role": role,
            "last_seen_age": 0.0 if mine else self.cluster.last_seen_age(node),
            "resources": self._own_resources() if mine else self.cluster.capabilities_of(node),
            "gpu_free_gb": gpus.get("gpu_free_gb"),
            "gpu_use": gpus.get("gpu_use"),
            "running_jobs": self._running() if mine else member.meta.get("running_jobs", 0),
            "draining": self.draining if mine else bool(member.meta.get("draining", False)),
            "version": member.meta.get("version"),
        }

    def nodes(self) -> dict[str, Any]:
        """Every member by id."""
        voters: set[str] = {
            node_of(voter) for voter in self.driver.view.config.voters
        } or self.cluster.voters_heard_of()
        return {str(m.node): self._member(m, voters) for m in sorted(self.cluster.members(), key=lambda m: m.node)}

    def node_status(self) -> dict[str, Any]:
        """``/status`` without the queue's part."""
        view, leader = self.driver.view, self.leadership.leader
        members = self.cluster.members()
        voters = sorted(node_of(voter) for voter in view.config.voters)
        me = self.settings.node_id
        return {
            "node_id": me,
            "cluster_id": self.cluster.cluster or None,
            "role": "leader" if self.desk.leads else "follower" if me in voters else "worker",
            "leader_id": leader.node,
            "term": max(view.term, leader.term),
            "voters": voters,
            "learners": sorted(node_of(voter) for voter in view.config.learners),
            "alive_peers": sum(member.state is State.ALIVE for member in members),
            "total_peers": len(members),
            "peers": self.nodes(),
            "uptime_seconds": time.monotonic() - self.started_at,
            "version": version(),
            "journal": {
                "commit_index": view.commit_index,
                "applied_index": view.applied_index,
                "lag": view.commit_index - view.applied_index,
                "snapshot_index": view.snapshot_index,
            },
            "loops": self._loops_json(),
            "not_ready": self._not_ready(),
        }

    def _not_ready(self) -> str | None:
        if self._stop.is_set():
            return "stopping"
        if self.cluster.waiting_for is not None:
            return f"waiting: {self.cluster.waiting_for}"
        leader = self.leadership.leader
        if leader.node is None:
            return "no leader"
        if leader.node == self.settings.node_id and not self.desk.leads:
            return "catching up"
        if self.cluster.has_copy() and self.cluster.copy_age() > STALE_SECONDS and not self.desk.leads:
            return "no leader"
        return self.driver.view.unfit or ("draining" if self.draining else None)

    async def status(self) -> dict[str, Any]:
        """The whole of ``/status``. The queue's part is the leader's word, or as this node's copy has it."""
        return {**self.node_status(), "work_queue": await self._queue_part()}

    async def _queue_part(self) -> dict[str, Any] | None:
        """None on a node without a copy that can ask nobody."""
        if self.desk.leads:
            return await self.operations.queue_status()
        leader = self.leadership.leader
        asked = [[str(leader.address)]] if leader.node not in (None, self.settings.node_id) else []
        if not self.cluster.has_copy():
            asked.append([address for node, address in self.cluster.copies() if node != leader.node][:2])
        for at_once in asked:
            for told in await asyncio.gather(*(self._queue_part_of(address) for address in at_once)):
                if told is not None:
                    return told
        return await self.operations.queue_status() if self.cluster.has_copy() else None

    async def _queue_part_of(self, address: str) -> dict[str, Any] | None:
        """As a node tells it that is asked by another: from what it has, without asking further."""
        path = "/work_queue_status?consistency=stale"
        try:
            return dict(await self.peers.call("GET", address, path, seconds=QUEUE_PART_SECONDS))
        except (PeerUnreachable, PeerRefused):
            return None
