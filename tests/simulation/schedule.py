"""One seed: a cluster starts, things go wrong, everything is healed, and then what must be true is looked for."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from p2p.effects import Config
from p2p.ids import DiskId, NodeId, voter_id
from tests.simulation import checkers as c
from tests.simulation import profile as profiles
from tests.simulation.disk import Disk
from tests.simulation.exams import Exam
from tests.simulation.model import Model
from tests.simulation.nemesis import Nemesis
from tests.simulation.node import Node
from tests.simulation.profile import Profile
from tests.simulation.real import RealQueue
from tests.simulation.requests import Client, Request, Worker
from tests.simulation.watch import Watch
from tests.simulation.world import Violation, World

LEADER_BOUND = 5.0
APPLIED_BOUND = 8.0
START_BOUND = 2.5


class Outcome(NamedTuple):
    """What became of a seed. `violation` is empty if all was well."""

    seed: int
    violation: str
    kind: str
    events: int
    virtual: float
    trace: int
    coverage: Counter[tuple[str, str]]
    figures: dict[str, float]
    story: list[str]
    exam: str = ""


class Schedule:
    """Builds the cluster of a seed and runs it."""

    def __init__(self, seed: int, profile: Profile, story: list[str] | None = None) -> None:
        self.profile = profile
        self.world = world = World(seed, profile, story)
        self.watch = Watch(world)
        world.told = self.watch.told
        self.figures: dict[str, float] = {}
        self.exam = ""
        self._make_nodes()
        self.nemesis = Nemesis(world, self.watch, self._blank)
        world.elected.append(self._read_too_early)
        self.clients = [Client(world, f"c{n}") for n in range(profile.clients)]
        self.workers = [Worker(world, n) for n in range(profile.workers)]

    def _blank(self) -> Any:
        return RealQueue() if self.profile.real_queue else Model()

    def _make_nodes(self) -> None:
        rng = self.world.stream("nodes")
        names = [NodeId(f"n{n}") for n in range(1, self.profile.voters + self.profile.spares + 1)]
        founders = tuple(voter_id(name, DiskId("0d")) for name in names[: self.profile.voters])
        self.watch.config = Config(founders)
        for n, name in enumerate(names):
            config = Config(founders) if n < self.profile.voters else Config()
            priority = rng.randint(0, 3) if self.profile.ranks else 0
            disk = Disk(DiskId("0d"), config)
            self.world.nodes[name] = Node(self.world, self.watch, name, disk, self._blank(), priority)

    def run(self) -> None:
        world = self.world
        for node in world.nodes.values():
            node.boot()
        if self.profile.faults:
            self.nemesis.start()
        world.run(self.profile.chaos)
        began = world.now
        self.nemesis.heal()
        self._wait("a leader after healing", self._led, LEADER_BOUND, "leader_s")
        if not self.profile.faults:
            first = min(at for at, _ in self.watch.established_at)
            self.watch.changes.calm(first, world.now)
        if self.profile.exam:
            self.exam = Exam(self).take()
            self.nemesis.heal()
        for client in self.clients:
            client.stopped = True
        for worker in self.workers:
            worker.stopped = True
        self._wait("everything applied everywhere", self._settled, APPLIED_BOUND, "applied_s")
        self._check_end(began)

    def _read_too_early(self, node: Node) -> None:
        """A client that asks a leader before it can know what the last one has committed."""
        node.enter(node.ask, Request(self.world, "read", lambda *answer: None), 0)

    def pause(self, wanted: bool) -> None:
        """Clients and workers ask nothing for a while, or go on."""
        for one in (*self.clients, *self.workers):
            one.paused = wanted

    def slack(self) -> float:
        """What the bounds grow by where an election timeout has adapted itself to slow answers: deposing a leader that
        hears nobody takes two of them, and so does each round of votes that fails."""
        nodes = [node for node in self.world.nodes.values() if node.up]
        return 4 * max(node.replica.election.timeout - node.timers.election for node in nodes)

    def _wait(self, what: str, done: Any, bound: float, figure: str) -> None:
        began = self.world.now
        while not done():
            if self.world.now - began > bound + self.slack():
                c.Deadlines.within(what, None, bound)
            self.world.run(self.world.now + 0.02)
        self.figures[figure] = self.world.now - began

    def _led(self) -> bool:
        return any(node.up and node.replica.established for node in self.world.nodes.values())

    def _settled(self) -> bool:
        if any(client.waiting is not None or client.again is not None for client in self.clients):
            return False
        nodes = self.world.nodes.values()
        leaders = [node for node in nodes if node.up and node.replica.established]
        if not leaders:
            return False
        leader = max(leaders, key=lambda node: node.replica.term)
        upto = self.watch.commits.index
        config = leader.replica.config
        if any(n.up and n.voter in n.replica.config.everyone and n.voter not in config.everyone for n in nodes):
            return False  # it was removed, and does not know
        return all(node.machine.applied_index >= upto for node in nodes if node.voter in config.everyone)

    def _check_end(self, began: float) -> None:
        upto = self.watch.commits.index
        contents = set()
        for node in self.world.nodes.values():
            if node.machine.applied_index == upto:
                self.watch.keys.state(node.voter, node.machine.jobs_by_key())
                contents.add(node.machine.content())
        if len(contents) != 1:
            raise Violation("state machine safety", f"{len(contents)} different states at {upto}")


@contextmanager
def small_limits(wanted: bool) -> Iterator[None]:
    """Tiny buffers and batches: followers are read back from the store and given snapshots all the time."""
    if not wanted:
        yield
        return
    with (
        patch("p2p.journal.log.KEPT_ENTRIES", 8),
        patch("p2p.replica.BATCH_ENTRIES", 4),
        patch("p2p.journal.progress.PIPELINE", 2),
        patch("p2p.replica.CLOSE_ENTRIES", 8),
        patch("tests.simulation.desk.CLOSE_ENTRIES", 8),
        patch("tests.simulation.watch.CLOSE_ENTRIES", 8),
    ):
        yield


def run_seed(seed: int, profile: Profile | None = None, *, story: bool = False) -> Outcome:
    """Never raises for what the cores do wrong: the outcome tells it."""
    profile = profile or profiles.draw(seed)
    lines: list[str] | None = [] if story else None
    with small_limits(profile.small):
        schedule = Schedule(seed, profile, lines)
        world = schedule.world
        violation = kind = ""
        gc.disable()  # a schedule is short, and what it leaves behind is found when the next one begins
        try:
            schedule.run()
        except Violation as found:
            violation, kind = str(found), found.kind
        except Exception as error:  # of the cores, or of the simulator: either way the seed must be told
            violation, kind = f"core: {error!r}", "core"
        finally:
            gc.enable()
        if violation:
            world.note("", f"VIOLATION {violation}")
    return Outcome(
        seed,
        violation,
        kind,
        world.events,
        world.now,
        world.trace,
        world.coverage,
        schedule.figures,
        lines or [],
        schedule.exam,
    )
