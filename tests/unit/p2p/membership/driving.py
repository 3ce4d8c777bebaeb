"""One core under test, its peers played by hand, on a clock that only the test moves."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from p2p.ids import ClusterId, DiskId, NodeId
from p2p.membership.core import MembershipCore
from p2p.membership.events import Answered, Effect, Event, Failed, Reply, Requested, Send, Tick
from p2p.membership.figures import Figures
from p2p.membership.hint import NO_LEADER, LeaderHint
from p2p.membership.member import Member, State
from p2p.membership.message import Ack, Body, Message, News
from p2p.membership.simulated import Network, Watch

E = TypeVar("E")
B = TypeVar("B")
NOW_MS = 1_700_000_000_000


def record(node: str, **fields: Any) -> Member:
    """A member named `node`, dialable, of cluster c1, alive."""
    given: dict[str, Any] = {
        "disk": DiskId(f"disk-{node}"),
        "boot": f"boot-{node}",
        "cluster": ClusterId("c1"),
        "address": f"{node}:1",
        "incarnation": 1_000,
        "started_ms": 1_000,
        **fields,
    }
    return Member(node=NodeId(node), **given)


class Driven:
    """`core` is node "me"; every step is followed by its invariants. `sends` collects what it sent."""

    def __init__(self, *peers: Member, me: Member | None = None, seed: int = 1, **figures: Any) -> None:
        self.now = 100.0
        self.core = MembershipCore(me or record("me"), random.Random(seed), self.now, Figures(**figures))
        self.effects: list[Effect] = []
        self._ticket = 0
        if peers:
            self.hear(*peers)
        self.quiet()

    def step(self, event: Event) -> list[Effect]:
        out = self.core.step(event, self.now)
        self.core.check_invariants()
        self.effects += out
        return out

    def advance(self, seconds: float) -> list[Effect]:
        """Lets time pass; ticks at every deadline."""
        end, out = self.now + seconds, []
        while (due := self.core.next_deadline()) is not None and due <= end:
            self.now = max(due, self.now)
            out += self.step(Tick())
        self.now = end
        return out

    def until(self, true: Callable[[list[Effect]], bool], seconds: float = 60.0) -> list[Effect]:
        """Ticks on until an effect list satisfies `true`; answers that list."""
        end = self.now + seconds
        while (due := self.core.next_deadline()) is not None and due <= end:
            self.now = max(due, self.now)
            out = self.step(Tick())
            if true(out):
                return out
        raise AssertionError("it did not happen")

    def quiet(self, seconds: float = 10.0) -> None:
        """Answers everything and lets the gossip of what is new run out."""
        end = self.now + seconds
        while (due := self.core.next_deadline()) is not None and due <= end:
            self.now = max(due, self.now)
            for send in sends(self.step(Tick())):
                self.answer(send)
        self.now = end
        self.effects.clear()

    def sends_until(self, body: type[Any], to: str | None = None) -> Send:
        """The next send with such a body (to that node), everything else going unanswered."""
        out = self.until(lambda out: any(_is(send, body, to) for send in sends(out)))
        return next(send for send in sends(out) if _is(send, body, to))

    def message(
        self,
        sender: Member,
        body: Body,
        updates: Iterable[Member] = (),
        hint: LeaderHint = NO_LEADER,
        to: str | None = "me",
    ) -> Message:
        addressee = None if to is None else NodeId(to)
        return Message(sender.node, sender.boot, sender.cluster, addressee, hint, tuple(updates), body)

    def ask(
        self, sender: Member, body: Body, updates: Iterable[Member] = (), hint: LeaderHint = NO_LEADER, to: str = "me"
    ) -> list[Effect]:
        """A peer's request, and everything it led to."""
        self._ticket += 1
        return self.step(Requested(self._ticket, self.message(sender, body, updates, hint, to), NOW_MS))

    def hear(self, *members: Member, by: Member | None = None) -> list[Effect]:
        """Gossip about these, from the first of them unless `by` says from whom."""
        return self.ask(by or members[0], News(), members)

    def answer(self, send: Send, body: Body | None = None, *updates: Member, by: Member | None = None) -> list[Effect]:
        sender = by or (self.core.members.get(send.to_node) if send.to_node else None) or record("seed")
        return self.step(Answered(send.id, self.message(sender, body or Ack(), updates)))

    def fail(self, send: Send) -> list[Effect]:
        return self.step(Failed(send.id, "refused"))

    def state_of(self, node: str) -> State | None:
        member = self.core.members.get(NodeId(node))
        return None if member is None else member.state


def _is(send: Send, body: type[Any], to: str | None) -> bool:
    return isinstance(send.message.body, body) and (to is None or send.to_node == to)


def only(effects: Iterable[Effect], kind: type[E]) -> list[E]:
    return [effect for effect in effects if isinstance(effect, kind)]


def sends(effects: Iterable[Effect]) -> list[Send]:
    return only(effects, Send)


def the_reply(effects: Iterable[Effect]) -> Message:
    (reply,) = only(effects, Reply)
    return reply.message


def cluster_of(
    count: int,
    *,
    seed: int = 1,
    outbound: Iterable[int] = (),
    watch: Watch | None = None,
    loss: float = 0.0,
    figures: Figures | None = None,
) -> Network:
    """`count` simulated nodes n0, n1, … of one cluster that all know each other; invariants are checked as they go."""
    net = Network(random.Random(seed), loss=loss, watch=watch)
    net.check_every = 5  # not a divisor of anything that repeats, so every kind of step comes up
    without = set(outbound)
    members = [record(f"n{i}", address=None if i in without else f"n{i}:1") for i in range(count)]
    for i, member in enumerate(members):
        core = MembershipCore(member, random.Random(seed * 10_007 + i), 0.0, figures)
        net.add(core)
    introduce(net, members)
    return net


def introduce(net: Network, members: list[Member]) -> None:
    """Everybody hears of everybody from the first, as after long gossip."""
    for host in net.hosts.values():
        greeting = Message(
            *(NodeId("stranger"), "boot", ClusterId("c1"), None, NO_LEADER),
            updates=tuple(member for member in members if member.node != host.core.node),
            body=News(),
        )
        host.core.step(Requested(-1, greeting, 0), 0.0)
        net.tell(host.core.node, Tick())
