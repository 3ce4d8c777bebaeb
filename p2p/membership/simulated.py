"""Many cores on one virtual clock: the simulated twin of `p2p.transport.gossip`, for tests and `bench.gossip`.

Decides when a message arrives, is lost, or waits for a process that sleeps; nothing about membership. Everything is
drawn from the one `random` it is given, so a run repeats exactly. An exchange is a request and its reply, as over HTTP.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush

from p2p.ids import NodeId
from p2p.membership.core import MembershipCore
from p2p.membership.events import Answered, Effect, Event, Failed, Reply, Requested, Send, Tick
from p2p.membership.message import Join, Message, Ping, Probe, encode
from p2p.membership.rota import Draw

Watch = Callable[[NodeId, Effect, float], None]


@dataclass(slots=True)
class Host:
    """One simulated process."""

    core: MembershipCore
    alive: bool = True
    clock_ms: int = 0  # how far its wall clock is off
    asleep_until: float = 0.0
    slept: bool = False
    nap: float = 0.0  # it stands still for this long after the next question it sends
    naps: Callable[[], tuple[float, float]] | None = None  # draws how long it goes on, then how long it stands still
    backlog: deque[Event] = field(default_factory=deque)  # what came while it slept
    tick_at: float | None = None


class Network:
    """`delay` is one way, in seconds; `loss` the share of exchanges that get no answer; `watch` sees every effect."""

    def __init__(
        self, draw: Draw, *, delay: tuple[float, float] = (0.0005, 0.003), loss: float = 0.0, watch: Watch | None = None
    ) -> None:
        self.now = 0.0
        self.hosts: dict[NodeId, Host] = {}
        self.loss = loss
        self.counted: Counter[str] = Counter()
        self.count_bytes = False
        self.check_every = 0  # a core's invariants are checked after each so-manieth step; 0 = never
        self.cut: Callable[[NodeId, NodeId], bool] = lambda _from, _to: False
        self._draw = draw
        self._delay = delay
        self._watch = watch
        self._heap: list[tuple[float, int, NodeId, Event | Callable[[], None] | None]] = []
        self._count = 0
        self._steps = 0
        self._at: dict[str, NodeId] = {}
        self._open: dict[int, tuple[NodeId, int]] = {}  # ticket -> who asked, and its id of the exchange

    def add(self, core: MembershipCore, *, clock_ms: int = 0, name: NodeId | None = None) -> Host:
        """A process appears, in the place of any earlier one of its name: its node id, unless two have the same."""
        host = Host(core, clock_ms=clock_ms)
        name = name or core.node
        self.hosts[name] = host
        if core.me.address is not None:
            self._at[core.me.address] = name
        self._arm(name, host)
        return host

    def kill(self, node: NodeId) -> None:
        """Its machine is gone: nothing answers, nothing even refuses."""
        self.hosts[node].alive = False

    def sleep(self, node: NodeId, seconds: float) -> None:
        """The process stands still; what is sent to it waits."""
        host = self.hosts[node]
        host.asleep_until = max(host.asleep_until, self.now + seconds)
        self._push(host.asleep_until, node, None)

    def disturb(self, node: NodeId, naps: Callable[[], tuple[float, float]]) -> None:
        """Again and again the process goes on for a while and stands still for another: `naps` draws both, in seconds.

        It stops as it sends a question, as blocked processes do (Dadgar et al. 2017, §V-C): the worst moment, since
        the answer then waits unread.
        """
        self.hosts[node].naps = naps
        self._nap_later(node, naps)

    def _nap_later(self, node: NodeId, naps: Callable[[], tuple[float, float]]) -> None:
        awake, asleep = naps()

        def drowsy() -> None:
            self.hosts[node].nap = asleep

        self.at(self.now + awake, drowsy)

    def at(self, seconds: float, act: Callable[[], None]) -> None:
        """Calls `act` at that virtual time."""
        self._push(seconds, NodeId(""), act)

    def tell(self, node: NodeId, event: Event) -> None:
        """A local event, now."""
        self._step(node, self.hosts[node], event)

    def run(self, until: float) -> None:
        """Everything that happens up to that virtual time."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, node, what = heappop(heap)
            if node not in self.hosts:
                assert callable(what)
                what()
                continue
            host = self.hosts[node]
            assert not callable(what)
            if host.alive:
                self._happen(node, host, what)
        self.now = until

    # --- inside ---------------------------------------------------------------------------------------------------

    def _happen(self, node: NodeId, host: Host, event: Event | None) -> None:
        """None is a deadline of the core or the end of a sleep.

        A sleeper looks at its clock first and reads what came afterwards: the order of an event loop, whose timers run
        before an answer has made its way through HTTP.
        """
        if host.asleep_until > self.now:
            host.slept = True
            if event is not None:
                host.backlog.append(event)
            return
        if host.slept:
            host.slept = False
            self._step(node, host, Tick())
            while host.backlog:
                self._step(node, host, host.backlog.popleft())
        if event is not None:
            self._step(node, host, event)
            return
        due = host.core.next_deadline()
        if due is not None and due <= self.now:
            self._step(node, host, Tick())
        else:
            self._arm(node, host)

    def _step(self, node: NodeId, host: Host, event: Event) -> None:
        for effect in host.core.step(event, self.now):
            if self._watch is not None:
                self._watch(node, effect, self.now)
            if type(effect) is Send:
                self._carry(node, effect)
            elif type(effect) is Reply:
                self._answer(node, effect)
        self._steps += 1
        if self.check_every and self._steps % self.check_every == 0:
            host.core.check_invariants()
        self._arm(node, host)

    def _arm(self, node: NodeId, host: Host) -> None:
        due = host.core.next_deadline()
        if due is not None and (host.tick_at is None or due < host.tick_at or host.tick_at <= self.now):
            host.tick_at = max(due, self.now)
            self._push(host.tick_at, node, None)

    def _carry(self, node: NodeId, send: Send) -> None:
        self._tally(node, send.message)
        asker = self.hosts[node]
        if asker.nap and asker.naps is not None and isinstance(send.message.body, Ping):
            self.sleep(node, asker.nap)
            asker.nap = 0.0
            self.at(asker.asleep_until, partial(self._nap_later, node, asker.naps))
        target = self._at.get(send.to_address)
        gives_up = self.now + send.timeout_seconds
        host = self.hosts[target] if target is not None else None
        lost = self.loss > 0 and self._draw.random() < self.loss
        if target is None or host is None or not host.alive or lost or self.cut(node, target):
            self._push(gives_up, node, Failed(send.id, "no answer"))
            return
        self._count += 1
        ticket = self._count
        self._open[ticket] = (node, send.id)
        if host.asleep_until > self.now or isinstance(send.message.body, Probe | Join):
            self._expire(ticket, node, send.id, gives_up)
        clock = int(self.now * 1_000) + host.clock_ms
        self._push(self.now + self._latency(), target, Requested(ticket, send.message, clock))

    def _expire(self, ticket: int, node: NodeId, id_: int, at: float) -> None:
        def give_up() -> None:
            if self._open.pop(ticket, None) is not None:
                self._push(at, node, Failed(id_, "no answer"))

        self.at(at, give_up)

    def _answer(self, node: NodeId, reply: Reply) -> None:
        asker = self._open.pop(reply.ticket, None)
        self._tally(node, reply.message)
        if asker is not None:
            to, id_ = asker
            self._push(self.now + self._latency(), to, Answered(id_, reply.message))

    def _latency(self) -> float:
        low, high = self._delay
        return low + (high - low) * self._draw.random()

    def _tally(self, node: NodeId, message: Message) -> None:
        self.counted["messages"] += 1
        if self.count_bytes:
            self.counted["bytes"] += len(encode(message))

    def _push(self, at: float, node: NodeId, what: Event | Callable[[], None] | None) -> None:
        self._count += 1
        heappush(self._heap, (at, self._count, node, what))
