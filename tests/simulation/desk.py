"""What only a leader does for clients and workers: places claims, keeps leases, gives up the silent, mends the voter
set. Soft state: gone with the leadership (`coordination.dispatcher` and `p2p.autopilot` in small).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2p.effects import Config, Entry
from p2p.ids import VoterId, node_of
from p2p.replica import CLOSE_ENTRIES, Farewell, Reconfigure
from tests.simulation import model
from tests.simulation.requests import Order, Request

if TYPE_CHECKING:
    from tests.simulation.node import Node

ROUND_SECONDS = 0.25


class Desk:
    """Opens once everything up to this term's first entry is applied, and gives every attempt a whole lease then."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.term = node.replica.term
        self.opened = False
        self._opened_at = 0.0
        self.leases = node.machine.leases()
        self._placed: set[int] = set()  # jobs in claims that are not applied yet
        self._expiring: set[tuple[int, int]] = set()
        self._later: list[Request] = []
        self._open()
        node.later(ROUND_SECONDS, self._round)

    def _open(self) -> None:
        node = self.node
        if self.opened or node.machine.applied_index < node.replica.journal.term_start:
            return
        self.opened = True
        self._opened_at = now = node.clock()
        for job, attempt, worker in node.machine.claimed():
            self.leases.grant(job, attempt, worker, now)
        for request in self._later:
            self.ask(request)
        self._later.clear()

    def applied(self, entry: Entry, result: tuple[int, ...]) -> None:
        """An entry that may concern leases was applied."""
        self._open()
        command = self.node.machine.decode(entry.body)
        if isinstance(command, model.Claim):
            self._placed.discard(command.job)
            if len(result) == 3:
                self.leases.grant(command.job, result[1], command.worker, self.node.clock())
        elif isinstance(command, model.Expire):
            self._expiring.discard((command.job, command.attempt))
            if result == (1,):
                self.leases.drop(command.job)
        elif isinstance(command, model.Finish | model.Release) and result == (1,):
            self.leases.drop(command.job)

    def ask(self, request: Request) -> None:
        node = self.node
        self._open()
        if not self.opened:
            self._later.append(request)
        elif request.what == "read":
            node.read(request)
        elif request.what == "renew":
            request.answer(node, "ok", tuple(self.leases.renew(request.worker, request.held, node.clock())))
        elif request.what == "claim":
            free = next((job for job in node.machine.pending() if job not in self._placed), None)
            if free is None:
                request.answer(node, "refused", None)
            else:
                self._placed.add(free)
                request.job = free
                node.propose(request)
        else:
            node.propose(request)

    # -- now and then --------------------------------------------------------------------------------------------

    def _round(self) -> None:
        node = self.node
        if node.desk is not self:
            return
        node.later(ROUND_SECONDS, self._round)
        self._open()
        if self.opened:
            for job, attempt in self.leases.lapsed(node.clock()):
                if (job, attempt) not in self._expiring:
                    self._expiring.add((job, attempt))
                    node.watch.gave_up(node, job, node.clock() - self._opened_at)
                    node.propose(Order(model.Expire(node.wall(), job, attempt)))
        if node.desk is self:
            self._mend()

    def _mend(self) -> None:
        """Who was removed and does not know is told; voters whose disk is gone or has forgotten are removed; learners
        that have caught up are promoted; whoever runs and belongs to nothing becomes a learner. One change at a time,
        never one that costs a majority."""
        node, world = self.node, self.node.world
        replica = node.replica
        config = replica.config
        alive = {n.voter: n for n in world.nodes.values()}
        wanted = world.profile.voters
        for voter, other in sorted(alive.items()):
            if voter not in config.everyone and other.up and voter in other.replica.config.everyone:
                node.order(Farewell(voter))
        if node.desk is not self:
            return  # it leads no more
        for voter in config.everyone:
            p = replica.progress.get(voter)
            gone = voter not in alive or (p is not None and p.regressed)
            if voter != node.voter and gone and self._safe_without(voter):
                node.order(Reconfigure(without(config, voter)))
                return
        if len(config.voters) < wanted:
            for learner in config.learners:
                p = replica.progress.get(learner)
                if p is not None and p.match + CLOSE_ENTRIES >= replica.journal.last_index and p.round_seconds < 0.6:
                    rest = tuple(v for v in config.learners if v != learner)
                    node.order(Reconfigure(Config((*config.voters, learner), rest)))
                    return
            for voter, other in sorted(alive.items()):
                if voter not in config.everyone and other.up and voter not in other.replica.config.everyone:
                    node.order(Reconfigure(Config(config.voters, (*config.learners, voter))))
                    return

    def _safe_without(self, voter: VoterId) -> bool:
        replica, now = self.node.replica, self.node.clock()
        left = [v for v in replica.config.voters if v != voter]
        well = sum(v == self.node.voter or now - replica.progress[v].contact < 1.0 for v in left)
        return len(left) > 0 and well > len(left) // 2


def without(config: Config, voter: VoterId) -> Config:
    return Config(tuple(v for v in config.voters if v != voter), tuple(v for v in config.learners if v != voter))


def names(config: Config) -> str:
    return ",".join(node_of(v) for v in config.voters) + "+" + ",".join(node_of(v) for v in config.learners)
