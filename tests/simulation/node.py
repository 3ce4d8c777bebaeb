"""One process of the simulated cluster: a real Replica, and what `p2p.driver` does for it (persist, send, apply,
answer, catch up) in a form that can be stopped between any two events. What only a leader's desk does is `desk.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from p2p.effects import (
    COMMAND,
    Apply,
    Effect,
    Fetch,
    Install,
    OfferSnapshot,
    Persist,
    ReadFailed,
    ReadReady,
    RoleChanged,
    Send,
    SnapshotMeta,
)
from p2p.election.rank import Timers
from p2p.ids import Index, NodeId, Term, VoterId, voter_id
from p2p.replica import (
    Applied,
    Compacted,
    ConfigRefused,
    Fetched,
    Installed,
    InstallFailed,
    NotLeader,
    Persisted,
    Propose,
    Read,
    Received,
    Replica,
    ReplicaEvent,
    SetFitness,
    SnapshotOffered,
    Tick,
    moves_nothing,
)
from tests.simulation.desk import Desk
from tests.simulation.disk import Disk, Reset
from tests.simulation.world import Violation, World

if TYPE_CHECKING:
    from tests.simulation.requests import Request
    from tests.simulation.watch import Watch

OK, REFUSED, UNKNOWN = "ok", "refused", "unknown"
WALL_START_MS = 1_700_000_000_000


class Snapshot(NamedTuple):
    meta: SnapshotMeta
    machine: Any


class Node:
    """`up` and not `frozen`: it runs. `kept` is what a power cut leaves of the state machine."""

    def __init__(self, world: World, watch: Watch, name: NodeId, disk: Disk, machine: Any, priority: int) -> None:
        self.world, self.watch, self.name, self.priority = world, watch, name, priority
        self.disk = disk
        self.machine = machine
        self.kept = machine.copy()
        self.snapshots: list[Snapshot] = []
        self.marker: SnapshotMeta | None = None  # the state is installed, the log does not begin behind it yet
        self.rate, self.offset = (
            1.0,
            1000.0 * (1 + len(world.nodes)),
        )  # the monotonic clock: local = now * rate + offset
        self.wall_ms = 0  # how wrong the wall clock is
        self.rng = world.stream(f"disk {name}")
        self.up = self.frozen = False
        self._armed = float("inf")
        self.lag = 0.0  # how long the event loop takes for one event, at most
        self.bad_install = False
        self.unfit = ""
        self.timers = Timers()
        self.boots = 0
        self._busy_until = 0.0
        self._inbox: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._wanted_to_write = False
        self.replica: Replica
        self.desk: Desk | None = None

    @property
    def disk(self) -> Disk:
        return self._disk

    @disk.setter
    def disk(self, disk: Disk) -> None:
        self._disk = disk
        self.voter: VoterId = voter_id(self.name, disk.id)

    def clock(self) -> float:
        """Seconds of this node's monotonic clock."""
        return self.world.now * self.rate + self.offset

    def wall(self) -> int:
        return WALL_START_MS + int(self.world.now * 1000) + self.wall_ms

    def set_rate(self, rate: float) -> None:
        self.offset = self.clock() - self.world.now * rate
        self.rate = rate
        self._armed = float("inf")
        self._arm()

    @property
    def role(self) -> str:
        """For coverage: what a fault meets."""
        if not self.up:
            return "down"
        config = self.replica.config
        if self.voter not in config.voters:
            return "learner" if self.voter in config.learners else "outsider"
        return self.replica.role

    # -- life ----------------------------------------------------------------------------------------------------

    def boot(self) -> None:
        self.boots += 1
        self.up, self.frozen = True, False
        if self.marker is not None:
            self.disk.reset(self.marker)
            self.marker = None
        applied = self.machine.applied_index
        self.replica = Replica(
            self.voter,
            self.disk.hard_state,
            self.disk.start(),
            applied=Index(applied),
            now=self.clock(),
            draw=self.world.draws.random,
            timers=self.timers,
            priority=self.priority,
        )
        self.waiting: list[Request] = []
        self._lain: deque[Received] = deque()
        self.writing = 0  # the number of the write that holds the newest proposals
        self.unanswered: dict[int, tuple[Term, Request]] = {}
        self.reads: dict[int, Request] = {}
        self.ready_reads: list[tuple[int, Request]] = []
        self.told_upto = self.handed = applied
        self._applying = False
        self._snapshotting = False
        self._next_read = 0
        self._armed = float("inf")
        self._inbox = []
        self._busy_until = 0.0
        self.desk = None
        self.world.note(self.name, f"starts: term {self.replica.term}, log ..{self.disk.last}, applied {applied}")
        self.watch.booted(self)
        if self.unfit:
            self.step(SetFitness(self.priority, self.unfit))
        self._arm()

    def crash(self, *, power: bool, keep: int | None = None) -> None:
        """Killed: what was written stays, synced or not. Without power: a prefix of it, and the state machine's file
        is as of its last checkpoint."""
        pending = len(self.disk.queue)
        if keep is None:
            keep = self.rng.randint(0, pending) if power else pending if self.rng.random() < 0.5 else 0
        self.disk.crash(keep, self.rng if power and self.world.profile.torn else None)
        if power:
            self.machine = self.kept.copy()
        self.up = self.frozen = False
        self._inbox = []
        self._lain.clear()
        self.world.note(self.name, f"{'loses power' if power else 'is killed'}, {keep} of {pending} writes survive")

    def freeze(self) -> None:
        self.frozen = True
        self.world.note(self.name, "freezes")

    def thaw(self) -> None:
        """Goes on where it stood: what came meanwhile lies in its sockets, and its timers are late."""
        if not self.up or not self.frozen:
            return
        self.frozen = False
        self.world.note(self.name, f"thaws with {len(self._inbox)} events waiting")
        inbox, self._inbox = self._inbox, []
        if self.rng.random() < 0.5:
            self._tick(self.boots)
        for act, args in inbox:
            self.enter(act, *args)
        self._armed = float("inf")
        if self.up:
            self._arm()
            if self._wanted_to_write:
                self._start_write()

    def enter(self, act: Callable[..., None], *args: Any) -> None:
        """Everything that comes from outside comes through here: lost if the node is down, late if it is slow."""
        if not self.up:
            return
        if self.frozen:
            self._inbox.append((act, args))
        elif self.lag:
            self._busy_until = max(self.world.now, self._busy_until) + self.lag * self.rng.random()
            self.world.at(self._busy_until, self._enter_late, self.boots, act, args)
        else:
            act(*args)

    def _enter_late(self, boots: int, act: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self.up and boots == self.boots:
            if self.frozen:
                self._inbox.append((act, args))
            else:
                act(*args)

    def receive(self, event: ReplicaEvent) -> None:
        if self.up and not self.frozen and not self.lag:
            self.step(event)
        else:
            self.enter(self.step, event)

    def later(self, delay: float, act: Callable[..., None], *args: Any) -> None:
        """Something this process has under way: gone if it dies."""
        self.world.after(delay, self._due, self.boots, act, args)

    def _due(self, boots: int, act: Callable[..., None], args: tuple[Any, ...]) -> None:
        if boots == self.boots:
            self.enter(act, *args)

    # -- time ----------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """One timer, which is never late; it may be early and is then set again."""
        deadline = self.replica.next_deadline()
        if deadline is None:
            return
        due = (deadline - self.offset) / self.rate + 1e-6
        if due < self._armed:
            self._armed = due = max(due, self.world.now)
            self.world.at(due, self._timer, self.boots, due)

    def _timer(self, boots: int, due: float) -> None:
        if self.up and boots == self.boots and due == self._armed and not self.frozen:
            if self.lag:
                self.enter(self._tick, boots)
            else:
                self._tick(boots)

    def _tick(self, boots: int) -> None:
        self._armed = float("inf")
        deadline = self.replica.next_deadline()
        if deadline is not None and self.clock() >= deadline:
            self.step(Tick())
        elif deadline is not None:
            self._arm()

    # -- the four duties -----------------------------------------------------------------------------------------

    def step(self, event: ReplicaEvent) -> None:
        """As `p2p.driver` does: agreeing answers to a calm leader lie until something else is due, and are heard before
        that. Lets NotLeader and ConfigRefused through."""
        if type(event) is Received and moves_nothing(event.message) and self.replica.calm:
            self._lain.append(replace(event, came=self.clock()))
            return
        while self._lain:
            self._step(self._lain.popleft())
        if self.up:
            self._step(event)

    def _step(self, event: ReplicaEvent) -> None:
        replica, watch = self.replica, self.watch
        journal = replica.journal
        seen = watch.before(self, event)
        committed, led = journal.commit_index, replica.role == "leader"
        try:
            effects = replica.step(event, self.world.now * self.rate + self.offset)
            replica.check_invariants()
        except AssertionError as error:
            raise Violation("core", f"{self.name}: {type(event).__name__}: {error}") from error
        if self.world.story is not None:
            self._tell(event, effects)
        if journal.commit_index != committed:
            watch.committed(self, led, committed, journal.commit_index)
        watch.after(self, event, seen)
        if effects:
            self._carry_out(effects)
        if not self.up:
            return
        if type(event) is Persisted and self.writing and event.seq >= self.writing:
            self.writing = 0
        if self.waiting and not self.writing:
            self._propose()
        self._arm()

    def _tell(self, event: ReplicaEvent, effects: list[Effect]) -> None:
        shown = [e for e in effects if not isinstance(e, Persist) or e.entries or e.hard_state or e.truncate]
        what = f"{event.sender} -> {event.message}" if hasattr(event, "sender") else repr(event)
        self.world.note(self.name, what)
        for effect in shown:
            self.world.note("", f"    {effect}")

    def _carry_out(self, effects: list[Effect]) -> None:
        watch, net = self.watch, self.world.net
        for effect in effects:
            kind = type(effect)
            if kind is Send:
                watch.sent(self, effect.to, effect.message)
                net.send(self.name, self.voter, effect.to, effect.message)
            elif kind is Persist:
                watch.persist(self, effect)
                self.disk.queue.append(effect)
                self._start_write()
            elif kind is Apply:
                self.told_upto = effect.upto
                self._apply_some()
            elif kind is RoleChanged:
                self._role_changed(effect)
            elif kind is ReadReady:
                self._read_ready(effect)
            elif kind is ReadFailed:
                self.reads.pop(effect.context).answer(self, REFUSED, None)
            elif kind is Fetch:
                self.later(0.001 + 0.003 * self.rng.random(), self._fetch, effect)
            elif kind is OfferSnapshot:
                self.later(0.001 + 0.003 * self.rng.random(), self._offer, effect.to)
            elif kind is Install:
                self.later(0.005 + 0.05 * self.rng.random(), self._download, effect)

    def _role_changed(self, change: RoleChanged) -> None:
        if change.role != "leader":
            for index in [index for index in self.unanswered if index > self.told_upto]:
                self.unanswered.pop(index)[1].answer(self, UNKNOWN, None)
            self.desk = None
        self.watch.role(self, change)
        if change.established and self.desk is None:
            self.desk = Desk(self)

    # -- the disk ------------------------------------------------------------------------------------------------

    def _start_write(self) -> None:
        disk = self.disk
        if disk.writing or not disk.queue:
            return
        if self.frozen:
            self._wanted_to_write = True
            return
        self._wanted_to_write = False
        disk.writing = disk.next_batch(1 if self.world.profile.small and self.rng.random() < 0.3 else 64)
        delay = self.world.profile.fsync * disk.slow * (0.5 + self.rng.random())
        disk.number += 1
        self.world.after(delay, self._wrote, disk, disk.number)

    def hurry(self) -> None:
        """The disk is well again: a write that hung is done at once."""
        if self.disk.writing:
            self.world.after(self.world.profile.fsync, self._wrote, self.disk, self.disk.number)

    def _wrote(self, disk: Disk, number: int) -> None:
        if disk is not self.disk or disk.number != number or not disk.writing:
            return
        if disk.hung_until > self.world.now:
            self.world.at(disk.hung_until, self._wrote, disk, number)
            return
        if disk.full:
            self.world.note(self.name, "its disk is full: it stops")
            self.crash(power=False, keep=0)
            return
        try:
            finished = disk.done()
        except AssertionError as error:
            raise Violation("disk", f"{self.name}: {error}") from error
        last = finished[-1]
        if isinstance(last, Reset):
            self.enter(self._reset_done, last)
        else:
            self.enter(self._written, last.seq)

    def _written(self, seq: int) -> None:
        self._start_write()
        self.step(Persisted(seq))

    # -- the state machine ---------------------------------------------------------------------------------------

    def _apply_some(self) -> None:
        if self._applying:
            return
        slow = self.world.profile.apply
        if slow:
            self._applying = True
            self.later(slow * self.rng.random(), self._apply)
        else:
            self._apply()

    def _apply(self) -> None:
        self._applying = False
        upto = self.told_upto
        if upto <= self.handed:
            return
        entries = self.disk.read(self.handed + 1, upto)
        if len(entries) != upto - self.handed:
            raise Violation("durability", f"{self.name} applies up to {upto}, but its disk ends at {self.disk.last}")
        for entry in entries:
            result = self.machine.apply(entry)
            self.watch.applied(self, entry, result, self.machine.digest)
            self.handed = entry.index
            term, request = self.unanswered.pop(entry.index, (entry.term, None))
            if self.desk is not None and entry.kind == COMMAND and entry.body:
                self.desk.applied(entry, result)
            if request is not None:
                if term == entry.term:
                    request.answer(self, OK, result)
                else:
                    request.answer(self, REFUSED, None)
        self.step(Applied(Index(upto)))
        if self.ready_reads:
            due = [request for index, request in self.ready_reads if index <= upto]
            self.ready_reads = [(index, request) for index, request in self.ready_reads if index > upto]
            for request in due:
                request.answer(self, OK, None)
        newest = self.snapshots[-1].meta.index if self.snapshots else 0
        if self.machine.applied_index - newest >= self.world.profile.snapshot_every:
            self.take_snapshot()

    def take_snapshot(self) -> None:
        """A checkpoint of the state, then a copy, which takes its time; then the log behind it is forgotten."""
        at = self.machine.applied_index
        if self._snapshotting or (self.snapshots and self.snapshots[-1].meta.index >= at):
            return
        self._snapshotting = True
        self.kept = self.machine.copy()
        self.later(0.01 + 0.1 * self.rng.random(), self._snapshot_made, self.machine.copy())

    def _snapshot_made(self, machine: Any) -> None:
        self._snapshotting = False
        at, log = machine.applied_index, self.replica.journal.log
        term = self.disk.term_at(at)
        if at < log.base or term is None or not at:
            return
        name = f"state-{at}-{term}"
        meta = SnapshotMeta(Index(at), Term(term), log.config_at(Index(at)), b"", name, 100 * len(machine.jobs), "")
        self.snapshots = [*self.snapshots[-1:], Snapshot(meta, machine)]
        upto = min(at - self.world.profile.trailing, self.kept.applied_index)
        self.watch.snapshot(self, meta, machine)
        if upto > self.disk.base:
            self.later(0.005 * self.rng.random(), self._compact, upto)

    def _compact(self, upto: int) -> None:
        if upto > self.disk.base:
            self.watch.compacted(self, upto)
            self.disk.compact(upto)
            self.step(Compacted(Index(upto)))

    # -- catching up ---------------------------------------------------------------------------------------------

    def _fetch(self, effect: Fetch) -> None:
        found = self.disk.read(effect.first, effect.first + effect.most - 1, effect.most_bytes)
        self.step(Fetched(effect.to, tuple(found)))

    def _offer(self, to: VoterId) -> None:
        base = self.replica.journal.log.base
        for snapshot in reversed(self.snapshots):
            if snapshot.meta.index >= base and self.disk.term_at(snapshot.meta.index) == snapshot.meta.term:
                self.step(SnapshotOffered(to, snapshot.meta))
                return
        self.take_snapshot()

    def _download(self, effect: Install) -> None:
        source = self.world.nodes.get(NodeId(effect.source.partition("@")[0]))
        held = None
        if source is not None and source.up and source.voter == effect.source:
            held = next((s for s in source.snapshots if s.meta == effect.snapshot), None)
        whole = source is not None and self.world.net.open(source.name, self.name)
        if held is None or not whole or self.bad_install:
            self.later(0.1 + 0.5 * self.rng.random(), self.step, InstallFailed())
            return
        self.machine = held.machine.copy()
        self.kept = held.machine.copy()
        self.marker = effect.snapshot
        self.handed = self.told_upto = effect.snapshot.index
        self.disk.queue.append(Reset(effect.source, effect.snapshot))
        self._start_write()

    def _reset_done(self, reset: Reset) -> None:
        self.marker = None
        self.snapshots = [s for s in self.snapshots if s.meta.index <= reset.meta.index]
        self._start_write()
        self.step(Installed(reset.source, reset.meta))
        self.watch.installed(self, reset.meta)

    # -- asked by clients ------------------------------------------------------------------------------------------

    def ask(self, request: Request, hops: int = 1) -> None:
        """Answers, or forwards to whom it believes to lead; one hop, as the API does."""
        replica = self.replica
        if replica.established:
            assert self.desk is not None
            self.desk.ask(request)
        elif request.what == "read" and replica.role == "leader":
            self.read(request)  # to be refused: it does not know yet what was acknowledged before it
        elif hops and replica.leader is not None and replica.leader != self.voter:
            leader = self.world.nodes.get(NodeId(replica.leader.partition("@")[0]))
            net = self.world.net
            if leader is not None and net.open(self.name, leader.name):
                self.world.after(net.delay, self._forwarded, leader, replica.leader, request)
        else:
            request.answer(self, REFUSED, None)

    def _forwarded(self, leader: Node, voter: VoterId, request: Request) -> None:
        if leader.voter == voter and self.world.net.open(self.name, leader.name):
            request.via = self.name
            leader.enter(leader.ask, request, 0)

    def propose(self, request: Request) -> None:
        """Waits for the write under way, as the driver's group commit does."""
        self.waiting.append(request)
        if not self.writing:
            self._propose()

    def _propose(self) -> None:
        batch, self.waiting = self.waiting, []
        first = self.replica.journal.last_index + 1
        if not self.replica.established:
            for request in batch:
                request.answer(self, REFUSED, None)
            return
        bodies = tuple(request.body(self) for request in batch)
        term = self.replica.term
        for n, request in enumerate(batch):
            self.unanswered[first + n] = (term, request)
        self.writing = self.replica.journal._seq + 1
        try:
            self.step(Propose(bodies))
        except NotLeader:
            self.writing = 0
            for n, request in enumerate(batch):
                self.unanswered.pop(first + n, None)
                request.answer(self, REFUSED, None)
            self.step(Tick())

    def read(self, request: Request) -> None:
        self._next_read += 1
        self.reads[self._next_read] = request
        self.watch.read(self, request)
        self.step(Read(self._next_read))

    def _read_ready(self, effect: ReadReady) -> None:
        request = self.reads.pop(effect.context)
        self.watch.read_ready(self, request, effect.index)
        if effect.index <= self.machine.applied_index:
            request.answer(self, OK, None)
        else:
            self.ready_reads.append((effect.index, request))

    def order(self, event: ReplicaEvent) -> bool:
        """Reconfigure or Transfer: whether it was taken."""
        try:
            self.step(event)
        except (NotLeader, ConfigRefused) as refused:
            self.world.note(self.name, f"refuses {event}: {refused}")
            self.step(Tick())
            return False
        return True
