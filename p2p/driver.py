"""Carries out what the replica decides: event -> step -> persist, send, apply -> answer. The only place that does.

Three threads, so that neither SQLite nor fsync is ever on an event loop or in the way of a heartbeat::

    any thread ── propose, receive, … ──> replica thread (owns the Replica) ──> send (the transport's event loop)
                                            │      ^
                              Persist, Fetch│      │ Persisted, Fetched, Applied
                                            v      │
                                  journal thread (writer.py, raft.db)      apply thread (applier.py, state.db)

The replica thread gathers whatever was proposed while the last fsync was in flight (group commit, no timer). A proposal
is answered once its entry is durable on a majority and applied. It fails with `NotLeader` when it was definitely not
done, and with `Unknown` when this node was deposed before it could tell.

A disk error or an exception while applying ends the process at once with exit code 70: after either nobody knows what
the disk or the state holds, and a restart verifies both (PROTOCOL §2.19).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from p2p.applier import Applier, Batch, Snapshots, StateMachine, Stopped
from p2p.effects import (
    Apply,
    Config,
    Effect,
    Entry,
    Fetch,
    Install,
    Mark,
    OfferSnapshot,
    Persist,
    ReadFailed,
    ReadReady,
    RoleChanged,
    Send,
    SnapshotMeta,
)
from p2p.ids import ClusterId, Index, Term, VoterId
from p2p.journal import snapshot
from p2p.journal.progress import Progress
from p2p.messages import Message
from p2p.replica import (
    Applied,
    Compacted,
    ConfigRefused,
    Farewell,
    Fetched,
    Found,
    Installed,
    InstallFailed,
    NotLeader,
    Persisted,
    Propose,
    Read,
    Received,
    Reconfigure,
    Replica,
    ReplicaEvent,
    SnapshotOffered,
    Tick,
    Transfer,
    Unreachable,
    moves_nothing,
)
from p2p.storage import LogStore
from p2p.writer import Writer

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_BATCH_ENTRIES = 1_024
MAX_BATCH_BYTES = 4 << 20
MAX_WAITING_ENTRIES = 50_000
MAX_WAITING_BYTES = 256 << 20
MAX_INBOX = 20_000  # messages of peers beyond this are dropped: they are sent again
MAX_UNAPPLIED_BATCHES = 4
FLOOR_IDLE_SECONDS = 0.05  # how soon an idle journal writes down what it has acknowledged
STOP_SECONDS = 5.0  # how long a stop waits for the answers to what was accepted
ASK_SECONDS = 0.2
VIEW_SECONDS = 0.25
FATAL_EXIT = 70


class Overloaded(Exception):
    """Too much is waiting for the journal. Definitely not done; try again."""


class Unknown(Exception):
    """This node was deposed before the entry was committed: a later leader may have kept it or not."""


class Progresses(NamedTuple):
    """A follower as the leader sees it, for people and the autopilot."""

    voter: VoterId
    match: Index
    state: str
    contact_age: float
    steady_for: float
    round_seconds: float
    priority: int
    ready: bool
    regressed: bool
    agrees: bool | None


class View(NamedTuple):
    """The replica at a glance: made on its thread, read from any."""

    role: str
    term: Term
    leader: VoterId | None
    established: bool
    why: str
    config: Config
    config_index: Index
    last_index: Index
    commit_index: Index
    applied_index: Index
    snapshot_index: Index
    contact: float  # when a leader was last heard, on the driver's clock
    followers: tuple[Progresses, ...]
    unfit: str  # why this node must not lead; empty if nothing is wrong


def boot_seconds() -> float:
    """A clock that runs through suspend and never steps (PROTOCOL §2.14)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def die(why: str) -> None:
    """Ends the process without any clean-up that could write. Replaced only by tests."""
    log.critical("fatal: %s", why)
    logging.shutdown()
    os._exit(FATAL_EXIT)


def _discard(messages: Sequence[tuple[VoterId, Message]]) -> None:
    """The transport of a node alone."""


class _Proposal(NamedTuple):
    body: bytes
    future: Future[Any]


class Driver:
    """Runs one replica over one store and one state machine.

    `send` gets the messages of one turn; `on_role` every RoleChanged; `download(source, meta)` fetches a snapshot and
    answers its verified file through a future: all three are called on the replica's thread and must not block.
    """

    def __init__(
        self,
        replica: Replica,
        store: LogStore,
        machine: StateMachine,
        *,
        on_events: Callable[[list[Any]], None],
        send: Callable[[Sequence[tuple[VoterId, Message]]], None] = _discard,
        on_role: Callable[[RoleChanged], None] = lambda change: None,
        download: Callable[[VoterId, SnapshotMeta], Future[Path]] | None = None,
        state_path: Path | None = None,
        snapshots: Path | None = None,
        snapshot_entries: int = 50_000,
        snapshot_bytes: int = 64 << 20,
        keep_entries: int | None = None,
        clock: Callable[[], float] = boot_seconds,
        on_fatal: Callable[[str], None] = die,
    ) -> None:
        self._replica, self._machine, self._clock = replica, machine, clock
        self._send, self._on_role, self._download = send, on_role, download
        self._on_events, self._on_fatal = on_events, on_fatal
        self._dead = self._started = False
        self._snapshots = snapshots
        setup = None
        if snapshots is not None and state_path is not None:
            setup = Snapshots(
                state_path,
                snapshots,
                snapshot_entries,
                snapshot_bytes,
                self._describe,
                self._snapshot_made,
                keep_entries,
            )
        self._wake = threading.Condition()
        self._inbox: deque[ReplicaEvent | Callable[[], None]] = deque()
        self._messages = 0  # in the inbox
        self._calm = False  # the answers to heartbeats can wait: each would wake the thread for nothing
        self.messages_dropped = 0
        self._waiting: deque[_Proposal] = deque()
        self._waiting_bytes = 0
        self._stopping = False
        # The rest belongs to the replica's thread.
        self._unanswered: dict[int, tuple[Term, Future[Any]]] = {}
        self._writing: int | None = None  # the write that holds the newest proposals
        self._committed = Index(replica.journal.applied_index)  # told by the newest Apply
        self._handed = self._committed  # handed to the apply thread
        self._reading_back = False
        self._floor_asked = Index(0)
        self._viewed_at = float("-inf")
        self._reads: dict[int, Future[int]] = {}
        self._ready_reads: list[tuple[Index, Future[int]]] = []
        self._next_read = 0
        self._outgoing: list[tuple[VoterId, Message]] = []
        self._elected: Future[Any] = Future()
        self._elected.set_running_or_notify_cancel()
        self._applier = Applier(
            machine,
            on_events=lambda events: self._on_events(events),  # noqa: PLW0108 - tests replace it
            applied=lambda index, mark: self._put(Applied(Index(index), Mark(*mark))),
            fatal=self._fatal,
            snapshots=setup,
        )
        self._writer = Writer(
            store,
            written=lambda seq: self._put(Persisted(seq)),
            compacted=lambda base: self._put(Compacted(base)),
            fatal=self._fatal,
        )
        self.view = self._look()
        self._thread = threading.Thread(target=self._run, name="replica", daemon=True)

    # -- from any thread -------------------------------------------------------------------------------------

    def start(self) -> Future[Any]:
        """Starts. The future is done once this node first leads and the no-op of its term is applied, and with it
        everything that was ever acknowledged: until then it does not know what was once answered."""
        self._started = True
        self._applier.start()
        self._writer.start()
        self._thread.start()
        return self._elected

    def propose(self, body: bytes) -> Future[Any]:
        """The state machine's answer to this entry, once it is committed and applied. Raises Overloaded or Stopped,
        which both mean: definitely not done. A future that fails with Stopped or NotLeader was not done either; one
        that fails with Unknown may have been."""
        future: Future[Any] = Future()
        with self._wake:
            if self._stopping:
                raise Stopped("the node is stopping")
            if len(self._waiting) >= MAX_WAITING_ENTRIES or self._waiting_bytes + len(body) > MAX_WAITING_BYTES:
                raise Overloaded("too much is waiting for the journal")
            self._waiting.append(_Proposal(body, future))
            self._waiting_bytes += len(body)
            self._wake.notify()
        return future

    def query(self, question: Callable[[], T]) -> Future[T]:
        """Runs `question` on the apply thread, between batches: it sees everything applied and nothing half done."""
        return self._applier.query(question)

    def read_index(self) -> Future[int]:
        """Done once everything that was committed when this was called is applied here, and a majority has confirmed
        that this node led then. Fails with NotLeader."""
        future: Future[int] = Future()

        def ask() -> None:
            self._next_read += 1
            self._reads[self._next_read] = future
            self._step(Read(self._next_read))

        self._put(ask)
        return future

    def reconfigure(self, config: Config) -> Future[None]:
        """Done once the configuration is committed. Fails with NotLeader, ConfigRefused or Unknown."""
        return self._order(Reconfigure(config), answered_at_commit=True)

    def transfer(self, to: VoterId) -> Future[None]:
        """Done once the hand-over has begun; see `view` for how it ends. Fails with NotLeader or ConfigRefused."""
        return self._order(Transfer(to), answered_at_commit=False)

    def receive(self, sender: VoterId, message: Message) -> None:
        """A message of a voter whose identity the transport has proved."""
        with self._wake:
            if self._messages >= MAX_INBOX:
                self.messages_dropped += 1
                return
            self._messages += 1
            if self._calm and moves_nothing(message):
                self._inbox.append(Received(sender, message, self._clock()))  # the next heartbeat is soon enough
                return
            self._inbox.append(Received(sender, message))
            self._wake.notify()

    def unreachable(self, voter: VoterId) -> None:
        """The connection to `voter` broke."""
        self._put(Unreachable(voter))

    def bid_farewell(self, voter: VoterId) -> None:
        """`voter` believes that it has a copy to keep, and was removed: tells it, if this node leads."""
        self._put(Farewell(voter))

    def found(self, cluster: ClusterId, config: Config) -> Future[None]:
        """Makes this blank store the first of a new cluster. Done once that is on disk; it then stands for election."""
        done: Future[None] = Future()

        def write(store: LogStore) -> None:
            store.found(cluster, config)
            self._put(Found(config))
            done.set_result(None)

        self._writer.do(write)
        return done

    def join(self, cluster: ClusterId) -> Future[None]:
        """Makes this blank store a member's. Done once that is on disk."""
        done: Future[None] = Future()

        def write(store: LogStore) -> None:
            store.join(cluster)
            done.set_result(None)

        self._writer.do(write)
        return done

    def stand(self) -> None:
        """Stands for election at once, if this node votes and hears no leader (an operator's order)."""

        def hurry() -> None:
            self._replica.election.deadline = min(self._replica.election.deadline, self._clock())

        self._put(hurry)

    def now(self) -> float:
        """Seconds on the clock of `View.contact`."""
        return self._clock()

    def stop(self) -> None:
        """Finishes what was accepted, then closes both databases. Blocks."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if not self._started:  # a start that failed before this one's turn came
            self.start()
        self._thread.join()
        self._writer.stop()
        self._applier.stop()

    @property
    def applied_index(self) -> Index:
        """Now, not as of the newest `view`: whoever was answered finds its own entry applied."""
        return Index(self._machine.applied_index)

    @property
    def _batches(self) -> int:
        return self._applier.batches

    def _fatal(self, why: str) -> None:
        """One of the three threads has failed: nothing more is waited for."""
        self._dead = True
        self._on_fatal(why)

    # -- the replica's thread --------------------------------------------------------------------------------

    def _put(self, event: ReplicaEvent | Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(event)
            self._wake.notify()

    def _run(self) -> None:
        try:
            stop_at: float | None = None
            while stop_at is None or not self._finished(stop_at):
                self._turn()
                if self._stopping and stop_at is None:
                    stop_at = time.monotonic() + STOP_SECONDS
            self._write_floor()
            self._fail_everything(Stopped("the node is stopping"))
        except BaseException as error:
            log.exception("the replica thread failed")
            self._fatal(f"replica: {error}")

    def _finished(self, stop_at: float) -> bool:
        with self._wake:
            idle = not self._waiting and not self._inbox
        behind = self._handed < self._committed or self._batches > 0
        answered = not self._unanswered and self._writing is None
        leads = self._replica.role == "leader"
        return (idle and not behind and (answered or not leads)) or self._dead or time.monotonic() >= stop_at

    def _turn(self) -> None:
        """One round: what came in, then what time makes due, then what was proposed meanwhile."""
        events = self._wait()
        for event in events:
            if callable(event):
                event()
            else:
                self._step(event)
        deadline = self._replica.next_deadline()
        if deadline is not None and self._clock() >= deadline:
            self._step(Tick())
        if self._writing is None and self._batches < MAX_UNAPPLIED_BATCHES:
            batch = self._take_proposals()
            if batch:
                self._propose(batch)
        self._hand_over()
        if not events:
            self._write_floor()
        self._calm = self._replica.calm  # before anything is sent that could be answered
        self._flush()
        self._renew_view()

    def _renew_view(self) -> None:
        """At once when something has changed that others decide by, else four times a second: most turns are a
        heartbeat or its answer."""
        replica, journal, now = self._replica, self._replica.journal, self._clock()
        seen = self.view
        changed = (
            (replica.role, replica.term, replica.leader, replica.established)
            != (seen.role, seen.term, seen.leader, seen.established)
            or (journal.log.config_index, journal.commit_index, journal.last_index)
            != (seen.config_index, seen.commit_index, seen.last_index)
            or (self._machine.applied_index, self._writer.trouble or replica.unfit) != (seen.applied_index, seen.unfit)
        )
        if changed or now - self._viewed_at >= VIEW_SECONDS:
            self._viewed_at = now
            self.view = self._look()

    def _wait(self) -> list[ReplicaEvent | Callable[[], None]]:
        with self._wake:
            if not self._inbox and not (self._waiting and self._writing is None):
                self._wake.wait(self._patience())
            events = list(self._inbox)
            self._inbox.clear()
            self._messages = 0
        return events

    def _patience(self) -> float | None:
        """How long nothing will be due."""
        deadline = self._replica.next_deadline()
        patience = None if deadline is None else max(deadline - self._clock(), 0.0)
        if self._replica.journal.commit_index > max(self._writer.floor, self._floor_asked):
            patience = min(FLOOR_IDLE_SECONDS, patience if patience is not None else FLOOR_IDLE_SECONDS)
        if self._stopping:
            patience = min(FLOOR_IDLE_SECONDS, patience if patience is not None else FLOOR_IDLE_SECONDS)
        return patience

    def _take_proposals(self) -> list[_Proposal]:
        batch: list[_Proposal] = []
        size = 0
        with self._wake:
            while self._waiting and len(batch) < MAX_BATCH_ENTRIES and size < MAX_BATCH_BYTES:
                proposal = self._waiting.popleft()
                self._waiting_bytes -= len(proposal.body)
                if proposal.future.set_running_or_notify_cancel():
                    size += len(proposal.body)
                    batch.append(proposal)
        return batch

    def _propose(self, batch: list[_Proposal]) -> None:
        replica = self._replica
        first = replica.journal.last_index + 1
        try:
            effects = replica.step(Propose(tuple(proposal.body for proposal in batch)), self._clock())
        except NotLeader as error:
            for proposal in batch:
                proposal.future.set_exception(error)
            self._step(Tick())
            return
        for n, proposal in enumerate(batch):
            self._unanswered[first + n] = (replica.term, proposal.future)
        self._writing = next(effect.seq for effect in effects if isinstance(effect, Persist))
        self._carry_out(effects)

    def _order(self, event: Reconfigure | Transfer, *, answered_at_commit: bool) -> Future[None]:
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            before = self._replica.journal.last_index
            try:
                effects = self._replica.step(event, self._clock())
            except (NotLeader, ConfigRefused) as error:
                future.set_exception(error)
                return
            if answered_at_commit and self._replica.journal.last_index > before:
                self._unanswered[before + 1] = (self._replica.term, future)
            else:
                future.set_result(None)
            self._carry_out(effects)

        self._put(run)
        return future

    def _step(self, event: ReplicaEvent) -> None:
        self._carry_out(self._replica.step(event, self._clock()))
        if isinstance(event, Persisted) and self._writing is not None and event.seq >= self._writing:
            self._writing = None
        elif isinstance(event, Applied):
            self._answer_reads(event.upto)

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Persist():
                    self._writer.persist(effect)
                case Send(to, message):
                    self._outgoing.append((to, message))
                case Apply(upto):
                    self._committed = upto
                case ReadReady(context, index):
                    self._ready_reads.append((index, self._reads.pop(context)))
                    self._answer_reads(self._replica.journal.applied_index)
                case ReadFailed(context):
                    _fail(self._reads.pop(context), NotLeader("this node does not lead"))
                case RoleChanged():
                    self._role_changed(effect)
                case Fetch():
                    self._fetch(effect)
                case OfferSnapshot(to):
                    self._offer(to)
                case Install(source, meta):
                    self._install(source, meta)

    def _flush(self) -> None:
        if self._outgoing:
            outgoing, self._outgoing = self._outgoing, []
            self._send(outgoing)

    def _role_changed(self, change: RoleChanged) -> None:
        if change.role != "leader":
            # What is committed is applied and answered all the same, such as this node's own removal; of the rest
            # nobody knows.
            committed = self._replica.journal.commit_index
            unknown = [index for index in self._unanswered if index > committed]
            for index in unknown:
                _fail(self._unanswered.pop(index)[1], Unknown("this node was deposed before it could tell"))
        self.view = self._look()
        self._on_role(change)

    # -- applying --------------------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        """Gives the apply thread what is committed, never more than a few batches ahead; after a start that includes
        what the last run left unapplied, which is read back from the store."""
        while self._handed < self._committed and self._batches < MAX_UNAPPLIED_BATCHES and not self._reading_back:
            first = Index(self._handed + 1)
            last = Index(min(self._handed + MAX_BATCH_ENTRIES, self._committed))
            entries = self._replica.journal.log.slice(first, last)
            if entries is None:
                self._reading_back = True
                self._writer.do(lambda store, first=first, last=last: self._read_back(store.read(first, last)))  # type: ignore[misc]
                return
            self._hand(entries)

    def _read_back(self, entries: list[Entry]) -> None:
        def hand() -> None:
            self._reading_back = False
            if entries and entries[0].index == self._handed + 1:
                self._hand(entries)

        self._put(hand)

    def _hand(self, entries: Sequence[Entry]) -> None:
        futures: list[Future[Any] | None] = []
        for entry in entries:
            term, future = self._unanswered.pop(entry.index, (entry.term, None))
            if future is not None and term != entry.term:
                _fail(future, NotLeader("another leader's entry took its place"))
                future = None
            futures.append(future)
        replica = self._replica
        start = replica.journal.term_start
        if not self._elected.done() and replica.role == "leader" and entries[0].index <= start <= entries[-1].index:
            futures[start - entries[0].index] = self._elected
        self._handed = entries[-1].index
        self._applier.apply(Batch(entries, futures))

    def _answer_reads(self, applied: Index) -> None:
        if self._ready_reads:
            due = [(index, future) for index, future in self._ready_reads if index <= applied]
            self._ready_reads = [(index, future) for index, future in self._ready_reads if index > applied]
            for index, future in due:
                if not future.done():
                    future.set_result(index)

    def _write_floor(self) -> None:
        """Writes down how far answers have gone, so that damage below it is never taken for a torn write."""
        commit = min(self._replica.journal.commit_index, self._replica.journal.stable_index)
        if commit > max(self._writer.floor, self._floor_asked):
            self._floor_asked = commit
            self._writer.persist(Persist(0, (), None, commit))

    def _fail_everything(self, error: Exception) -> None:
        with self._wake:
            waiting = list(self._waiting)
            self._waiting.clear()
        for proposal in waiting:
            _fail(proposal.future, error)
        for _, future in self._unanswered.values():
            _fail(future, Unknown("the node stopped before it could tell"))
        for _, read in self._ready_reads:
            _fail(read, error)
        for read in self._reads.values():
            _fail(read, error)

    # -- catching followers up, and being caught up ------------------------------------------------------------

    def _fetch(self, effect: Fetch) -> None:
        last = Index(effect.first + effect.most - 1)
        self._writer.do(
            lambda store: self._put(Fetched(effect.to, tuple(store.read(effect.first, last, effect.most_bytes))))
        )

    def _offer(self, to: VoterId) -> None:
        """The newest snapshot, if the log goes on behind it; else one is made, and it is asked for again."""
        base = self._replica.journal.log.base

        def look(store: LogStore) -> None:
            found = snapshot.offerable(self._snapshots) if self._snapshots is not None else None
            if found is not None and found.index >= base and store.term_at(found.index) == found.term:
                self._put(SnapshotOffered(to, found))
            else:
                self._applier.want_snapshot()

        self._writer.do(look)

    def _describe(self, index: int) -> tuple[bytes, Config] | None:
        """Called on the snapshot's thread: the log's hash and the configuration at `index`; None if they are not known,
        or the node stops meanwhile."""
        config: Future[Config] = Future()
        chain: Future[bytes | None] = Future()
        self._put(lambda: config.set_result(self._replica.journal.log.config_at(Index(index))))
        self._writer.do(lambda store: chain.set_result(store.chain_at(Index(index))))
        while not (wait([chain], ASK_SECONDS).done and wait([config], ASK_SECONDS).done):
            if self._stopping or self._dead:
                return None
        known = chain.result()
        return (known, config.result()) if known is not None else None

    def _snapshot_made(self, index: int, upto: int) -> None:
        self._put(lambda: self._writer.compact(Index(upto)) if upto else None)

    def _install(self, source: VoterId, meta: SnapshotMeta) -> None:
        """Fetch (the node's business), then swap the state between two batches, then begin the log behind it."""
        if self._download is None:
            self._put(InstallFailed())
            return

        def fetched(done: Future[Path]) -> None:
            if done.cancelled() or done.exception() is not None:
                log.warning("snapshot %s could not be fetched: %s", meta.name, done.exception())
                self._put(InstallFailed())
                return
            try:
                self._applier.install(done.result(), meta, swapped)
            except Stopped:
                return

        def swapped() -> None:
            reset = threading.Event()

            def begin(store: LogStore) -> None:
                store.reset(meta.index, meta.term, meta.chain, meta.config)
                assert self._snapshots is not None
                snapshot.installed(snapshot.marker_in(self._snapshots))
                reset.set()

            self._writer.do(begin)
            reset.wait()
            self._put(lambda: self._begin_behind(source, meta))

        self._download(source, meta).add_done_callback(fetched)

    def _begin_behind(self, source: VoterId, meta: SnapshotMeta) -> None:
        self._handed = self._committed = meta.index
        self._step(Installed(source, meta))

    # -- looking ---------------------------------------------------------------------------------------------

    def _look(self) -> View:
        replica, journal = self._replica, self._replica.journal
        now = self._clock()
        return View(
            replica.role,
            replica.term,
            replica.leader,
            replica.established,
            replica.why,
            replica.config,
            journal.log.config_index,
            journal.last_index,
            journal.commit_index,
            Index(self._machine.applied_index),
            Index(self._applier.snapshot_index),
            replica.election.contact,
            tuple(_seen(p, now) for p in replica.progress.values()),
            self._writer.trouble or replica.unfit,
        )


def _seen(p: Progress, now: float) -> Progresses:
    return Progresses(
        p.voter,
        p.match,
        p.state,
        now - p.contact,
        now - p.steady_since,
        p.round_seconds,
        p.priority,
        p.ready,
        p.regressed,
        p.agrees,
    )


def _fail(future: Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


__all__ = ["Driver", "NotLeader", "Overloaded", "Stopped", "Unknown", "View", "boot_seconds", "die"]
