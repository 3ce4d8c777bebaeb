"""What a healthy cluster must survive without a fuss: one small, exact disturbance after the healing, with a bound for
each answer (PROTOCOL §3, L1, L3 to L5, and the numbers of §2 that are about liveness).
"""

from __future__ import annotations

import random
from itertools import combinations
from typing import TYPE_CHECKING

from p2p.ids import NodeId
from p2p.replica import Transfer
from tests.simulation import checkers as c
from tests.simulation.node import Node
from tests.simulation.requests import Request
from tests.simulation.world import Violation

if TYPE_CHECKING:
    from tests.simulation.schedule import Schedule

FAILOVER_BOUND = 3.0  # one lost round of votes included
EXAMS = ("calm", "return", "partial", "deaf", "mute", "dead", "hung", "frozen", "handover", "stale", "suffix")


class Exam:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.world, self.watch = schedule, schedule.world, schedule.watch
        self.rng: random.Random = self.world.stream("exam")

    def take(self) -> str:
        """Answers which exam it was; raises Violation."""
        leader = self._leader()
        config = leader.replica.config
        voters = [n for n in self.world.nodes.values() if n.voter in config.voters]
        name = self.rng.choice(EXAMS)
        if self.world.profile.exam != "any":
            name = self.world.profile.exam
        if (
            name in ("return", "partial", "mute", "deaf", "dead", "hung", "frozen", "handover", "stale", "suffix")
            and len(voters) < 3
        ):
            name = "calm"
        if len(voters) < len(config.voters) or not self._steady(voters):
            return ""  # somebody is still to be replaced
        self.world.note("", f"exam: {name}")
        getattr(self, f"_{name}")(leader, voters)
        return name

    def _leader(self) -> Node:
        found = [n for n in self.world.nodes.values() if n.up and n.replica.established]
        return max(found, key=lambda n: n.replica.term)

    def _steady(self, voters: list[Node]) -> bool:
        """Waits until every voter has followed one leader for a while and nothing is under way."""
        until = self.world.now + 6.0 + self.schedule.slack()
        calm = 0
        while self.world.now < until:
            self.world.run(self.world.now + 0.1)
            calm = calm + 1 if self._all_well(voters) else 0
            if calm >= 7:
                return True
        return False

    @staticmethod
    def _all_well(voters: list[Node]) -> bool:
        leaders = [n for n in voters if n.up and n.replica.established]
        if len(leaders) != 1:
            return False
        replica = leaders[0].replica
        if replica.transferring or set(replica.config.voters) != {n.voter for n in voters}:
            return False
        return not any(p.regressed for p in replica.progress.values()) and all(
            n.replica.leader == leaders[0].voter
            and n.replica.config == replica.config
            and n.replica.journal.last_index + 8 >= replica.journal.last_index
            for n in voters
        )

    def _terms(self) -> int:
        return max(n.replica.term for n in self.world.nodes.values() if n.up)

    def _led_again(self, what: str, without: Node | None, bound: float = FAILOVER_BOUND) -> None:
        began = self.world.now
        while self.world.now - began <= bound + self.schedule.slack():
            self.world.run(self.world.now + 0.02)
            if any(n.up and n is not without and n.replica.established for n in self.world.nodes.values()):
                self.schedule.figures[f"exam_{what}_s"] = self.world.now - began
                return
        c.Deadlines.within(f"a leader after: {what}", None, bound)

    # -- the exams -----------------------------------------------------------------------------------------------

    def _calm(self, leader: Node, voters: list[Node]) -> None:
        """L4: without faults nothing changes."""
        began, term = self.world.now, self._terms()
        self.world.run(began + 3.0)
        self.watch.changes.calm(began, self.world.now)
        self.watch.changes.terms_still(term, self._terms())

    def _return(self, leader: Node, voters: list[Node]) -> None:
        """§2.5: a follower that was cut off comes back and disturbs nobody, even if it has missed nothing."""
        self.schedule.pause(self.rng.random() < 0.5)
        self.world.run(self.world.now + 1.0)
        leader = self._leader()
        node = self.rng.choice([n for n in voters if n is not leader])
        links = [link for n in self.world.nodes if n != node.name for link in ((node.name, n), (n, node.name))]
        began, term = self.world.now, self._terms()
        self.world.net.block(links)
        self.world.run(self.world.now + 2.5)
        self.world.net.unblock(links)
        self.world.run(self.world.now + 1.5)
        self.watch.changes.calm(began, self.world.now)
        self.watch.changes.terms_still(term, self._terms())
        self.schedule.pause(False)

    def _partial(self, leader: Node, voters: list[Node]) -> None:
        """L5: some links break, but somebody reaches everybody: then somebody leads, and stays."""
        self.schedule.pause(self.rng.random() < 0.5)
        hub = self.rng.choice(voters)
        pairs = [p for p in combinations([n.name for n in voters], 2) if hub.name not in p]
        some = self.rng.sample(pairs, self.rng.randint(1, len(pairs)))
        links: list[tuple[NodeId, NodeId]] = [link for a, b in some for link in ((a, b), (b, a))]
        self.world.note("net", f"partial: {some}")
        leader = self._leader()
        cut = sum((leader.name, n.name) in links for n in voters)
        self.world.net.block(links)
        began = self.world.now
        if 2 * (len(voters) - cut) <= len(voters):  # else it reaches a majority and is not to be disturbed at all
            self.world.run(began + 4.0 + self.schedule.slack())
            self._led_again("partial", None)
            began = self.world.now
        self.world.run(self.world.now + 3.0)
        self.watch.changes.calm(began, self.world.now)
        self.world.net.unblock(links)
        self.schedule.pause(False)

    def _deaf(self, leader: Node, voters: list[Node]) -> None:
        """§2.6: the leader is heard but hears nobody."""
        leader = self._leader()
        links = [(n, leader.name) for n in self.world.nodes if n != leader.name]
        self.world.net.block(links)
        self._led_again("deaf leader", leader)
        self.world.net.unblock(links)

    def _mute(self, leader: Node, voters: list[Node]) -> None:
        """§2.1, §2.6: whoever leads hears everybody, and nobody hears it."""
        leader = self._leader()
        links = [(leader.name, n) for n in self.world.nodes if n != leader.name]
        self.world.net.block(links)
        self._led_again("mute leader", leader)
        self.world.net.unblock(links)

    def _dead(self, leader: Node, voters: list[Node]) -> None:
        """§1, failover."""
        leader = self._leader()
        leader.crash(power=False)
        self._led_again("dead leader", leader)
        leader.boot()

    def _hung(self, leader: Node, voters: list[Node]) -> None:
        """§2.7: the leader's disk does not answer. Only who writes can notice: the bound counts from a write."""
        leader = self._leader()
        leader.disk.hung_until = self.world.now + 60.0
        self._submit(leader)
        self._led_again("hung disk", leader, FAILOVER_BOUND + leader.timers.disk_stall)
        leader.disk.hung_until = self.world.now
        leader.hurry()

    def _frozen(self, leader: Node, voters: list[Node]) -> None:
        """§2.15: a leader that was stopped says nothing as a leader when it goes on."""
        leader = self._leader()
        term = leader.replica.term
        leader.freeze()
        self._led_again("frozen leader", leader)
        self.world.run(self.world.now + 0.5)
        self.watch.frozen.thawed(leader.voter, term)
        leader.thaw()
        self.world.run(self.world.now + 0.5)

    def _stale(self, leader: Node, voters: list[Node]) -> None:
        """§2.15: a leader that is cut off and whose clock is slow leads on for a moment beside the next one. It may
        say what it likes but what it has not confirmed."""
        leader = self._leader()
        for node in voters:
            node.set_rate(0.8 if node is leader else 1.2)
        links = [link for n in self.world.nodes if n != leader.name for link in ((leader.name, n), (n, leader.name))]
        self.world.net.block(links)
        until = self.world.now + 1.2
        while self.world.now < until:
            self.world.run(self.world.now + 0.01)
            leader.enter(leader.ask, Request(self.world, "read", lambda *answer: None), 0)
        for node in voters:
            node.set_rate(1.0)
        self.world.net.unblock(links)

    def _suffix(self, leader: Node, voters: list[Node]) -> None:
        """§2.2: a deposed leader has the longest log of all, of entries that nobody else has, and stands again when its
        successor dies."""
        leader = self._leader()
        links = [link for n in self.world.nodes if n != leader.name for link in ((leader.name, n), (n, leader.name))]
        self.world.net.block(links)
        for _ in range(12):
            self._submit(leader)
            self.world.run(self.world.now + 0.03)
        self.schedule.pause(True)
        self._led_again("suffix", leader)
        self._leader_but(leader).crash(power=False)
        self.world.net.unblock(links)
        if len(voters) > 2:
            self._led_again("longest log", None)
        self.schedule.pause(False)

    def _submit(self, leader: Node) -> None:
        request = Request(self.world, "submit", lambda *answer: None)
        self.world.keys += 1
        request.key = self.world.keys
        leader.enter(leader.ask, request, 0)

    def _leader_but(self, old: Node) -> Node:
        found = [n for n in self.world.nodes.values() if n.up and n is not old and n.replica.established]
        return max(found, key=lambda n: n.replica.term)

    def _handover(self, leader: Node, voters: list[Node]) -> None:
        """§1, handoff: the seat goes to whom it is given."""
        leader = self._leader()
        to = self.rng.choice([n for n in voters if n is not leader])
        for _ in range(5):  # a batch that was lost delays the first try for longer than it lasts
            if leader.replica.role == "leader" and not leader.order(Transfer(to.voter)):
                return
            self.world.run(self.world.now + 0.7)
            if to.replica.established:
                return
        raise Violation("liveness", f"{to.name} was handed the seat and does not lead {5 * 0.7:.1f} s later")
