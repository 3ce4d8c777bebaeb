"""What clients and workers ask, and the clients and workers themselves. They reach every node that runs, whatever the
nodes reach of each other: the worst a client can do is to ask a leader that is none any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from p2p.ids import NodeId
from tests.simulation import model

if TYPE_CHECKING:
    from tests.simulation.node import Node
    from tests.simulation.world import World

PATIENCE = 0.8  # seconds until an answer that has not come counts as unknown


class Request:
    """One question on its way. `answered` is called once, with the outcome; never, if the answer is lost."""

    __slots__ = ("_world", "answered", "done", "floor", "held", "job", "key", "made", "number", "via", "what", "worker")

    def __init__(self, world: World, what: str, answered: Callable[[Request, str, Any], None]) -> None:
        self._world, self.what, self.answered = world, what, answered
        self.key = self.job = self.worker = self.number = 0
        self.held: list[tuple[int, int]] = []
        self.made: model.Command | None = None
        self.via: NodeId | None = None
        self.floor = 0
        self.done = False

    def body(self, node: Node) -> bytes:
        """The command, with what the proposing leader stamps into it."""
        at, what = node.wall(), self.what
        if what == "submit":
            self._world.jobs += 1
            self.made = model.Submit(at, self.key, self._world.jobs)
        elif what == "claim":
            self.made = model.Claim(at, self.job, self.worker)
        elif what == "finish":
            self.made = model.Finish(at, self.job, self.number, self.worker)
        else:
            self.made = model.Release(at, self.job, self.key)
        return node.machine.body(self.made)

    def answer(self, node: Node, outcome: str, value: Any) -> None:
        """The way back: through whoever forwarded it."""
        if self.done:
            return
        self.done = True
        world = self._world
        if self.via is not None and not world.net.open(node.name, self.via):
            return
        world.after(world.net.delay, self.answered, self, outcome, value)


class Order(Request):
    """The leader's own: nobody waits for the answer."""

    __slots__ = ()

    def __init__(self, made: model.Command) -> None:
        self.made = made
        self.done = True

    def body(self, node: Node) -> bytes:
        assert self.made is not None
        return node.machine.body(self.made)

    def answer(self, node: Node, outcome: str, value: Any) -> None:
        pass


class Client:
    """Submits, reads, now and then releases; repeats with the same key, through any node, what it has no answer to."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.rng = world.stream(name)
        self.acked: dict[int, int] = {}  # key -> job
        self.waiting: Request | None = None
        self.again: tuple[str, int, int] | None = None
        self.stopped = self.paused = False
        world.after(self.rng.random() * 0.3, self._next)

    def _next(self) -> None:
        if self.stopped and self.again is None:
            return
        if self.paused:
            self.world.after(0.1, self._next)
            return
        world, rng = self.world, self.rng
        if self.again is not None:
            what, key, job = self.again
        else:
            toss = rng.random()
            reads = world.profile.reads
            what = "read" if toss < reads else "release" if toss > 0.93 else "submit"
            job = rng.choice(list(self.acked.values())) if what == "release" and self.acked else 0
            if what == "release" and not job:
                what = "submit"
            world.keys += 1
            key = world.keys
        request = Request(world, what, self._answered)
        request.key, request.job = key, job
        self.waiting = request
        up = [node for node in world.nodes.values() if node.up]
        world.after(PATIENCE, self._timeout, request)
        if up:
            node = rng.choice(up)
            world.after(0.001, node.enter, node.ask, request)

    def _timeout(self, request: Request) -> None:
        if self.waiting is request:
            self._ended(request, "unknown", None)

    def _answered(self, request: Request, outcome: str, value: Any) -> None:
        if self.waiting is request:
            self._ended(request, outcome, value)

    def _ended(self, request: Request, outcome: str, value: Any) -> None:
        self.waiting = None
        self.again = None
        if outcome == "ok":
            if request.what == "submit":
                self.acked[request.key] = value[0]
            if request.what != "read":
                self.world.told(request, value)
        elif request.what != "read" or not self.stopped:
            self.again = (request.what, request.key, request.job) if request.what != "read" else None
        self.world.note(self.name, f"{request.what} {request.key}: {outcome} {value if value is not None else ''}")
        pause = self.rng.expovariate(1 / self.world.profile.think)
        self.world.after(pause + (0.05 if outcome != "ok" else 0.0), self._next)


class Worker:
    """Claims, renews, finishes. Kills what it holds when it has not been renewed for too long, by its own clock."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.rng = world.stream(f"worker {number}")
        self.held: dict[int, tuple[int, float]] = {}  # job -> attempt, when it will be done
        self.stopped = self.paused = False
        self._claiming: Request | None = None
        world.after(self.rng.random() * 0.5, self._claim)
        world.after(self.rng.random() * 0.5, self._renew)

    def _send(self, request: Request) -> None:
        up = [node for node in self.world.nodes.values() if node.up]
        if up:
            node = self.rng.choice(up)
            self.world.after(0.001, node.enter, node.ask, request)

    def _claim(self) -> None:
        if self.stopped:
            return
        self.world.after(0.2 + 0.3 * self.rng.random(), self._claim)
        if len(self.held) < 3 and not self.paused:
            request = Request(self.world, "claim", self._claimed)
            request.worker = self.number
            self._send(request)

    def _claimed(self, request: Request, outcome: str, value: Any) -> None:
        if outcome == "ok" and len(value) == 3 and not self.stopped:
            job, attempt, _ = value
            self.world.note(f"w{self.number}", f"begins {job}, attempt {attempt}")
            self.held[job] = (attempt, self.world.now + self.rng.expovariate(1.0))

    def _renew(self) -> None:
        if self.stopped:
            return
        self.world.after(0.4, self._renew)
        if not self.held or self.paused:
            return
        for job, (attempt, until) in list(self.held.items()):
            if self.world.now >= until:
                request = Request(self.world, "finish", self._finished)
                request.job, request.number, request.worker = job, attempt, self.number
                self._send(request)
        request = Request(self.world, "renew", self._renewed)
        request.worker = self.number
        request.held = [(job, attempt) for job, (attempt, _) in self.held.items()]
        self._send(request)

    def _renewed(self, request: Request, outcome: str, value: Any) -> None:
        if outcome == "ok":
            for job in value:
                known = self.held.get(job)
                if known is not None and (job, known[0]) in request.held:
                    del self.held[job]

    def _finished(self, request: Request, outcome: str, value: Any) -> None:
        if outcome == "ok":
            self.held.pop(request.job, None)
            self.world.told(request, value)
