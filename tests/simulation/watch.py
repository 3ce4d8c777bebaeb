"""Tells the checkers what happens. The only place that knows both them and the simulator; what it tells is taken from
the true disks wherever that is possible.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from p2p.effects import CONFIG, Config, Entry, Persist, RoleChanged, SnapshotMeta
from p2p.ids import VoterId
from p2p.messages import AppendReply, Message, Vote, VoteReply
from p2p.replica import CLOSE_ENTRIES, LEADER, Received
from tests.simulation import checkers as c
from tests.simulation.disk import Disk
from tests.simulation.model import LEASE_SECONDS
from tests.simulation.world import World

if TYPE_CHECKING:
    from tests.simulation.node import Node
    from tests.simulation.requests import Request


class Watch:
    """`disks` is the truth by voter: a disk that is lost stays here as it was when it was lost."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.disks: dict[VoterId, Disk] = {}
        self.believed: dict[VoterId, tuple[Disk, int]] = {}  # restored from an old copy, and nobody can know yet
        self.elections, self.votes, self.logs = c.ElectionSafety(), c.OneVote(), c.LogMatching()
        self.commits, self.states, self.monotonic = c.Commits(), c.StateMachineSafety(), c.Monotonic()
        self.keys, self.attempts, self.frozen, self.changes = c.Keys(), c.Attempts(), c.Frozen(), c.Changes()
        self.config, self.config_index = Config(), 0  # the newest committed one
        self.spoke: dict[VoterId, int] = {}
        self._applied_upto = 0
        self.established_at: list[tuple[float, VoterId]] = []

    # -- a step --------------------------------------------------------------------------------------------------

    def before(self, node: Node, event: Any) -> tuple[Any, ...] | None:
        if type(event) is Received and type(event.message) is Vote:
            ask, replica = event.message, node.replica
            lease = replica.election.in_lease(node.clock()) and ask.term > replica.term and not ask.transfer
            vote = replica.voted_for if ask.term == replica.term else None
            free = ask.term >= replica.term and vote is None and not lease and replica.role != LEADER
            return (replica.journal.last, free, replica.term, replica.voted_for)
        return None

    def after(self, node: Node, event: Any, seen: tuple[Any, ...] | None) -> None:
        if seen is not None:
            ask, replica = event.message, node.replica
            granted = (ask.term, event.sender) == (replica.term, replica.voted_for) != seen[2:]
            self.votes.judged(node.voter, event.sender, (ask.last_term, ask.last_index), seen[0], granted, seen[1])

        elif self.believed and type(event) is Received and type(event.message) is AppendReply:
            known = self.believed.get(event.sender)
            if known is not None and event.message.round > known[1]:
                del self.believed[event.sender]  # whoever leads has been told how little is left

    def restored(self, node: Node, lost: Disk, leader: Node) -> None:
        """Its disk is an old copy from now on. Until the leader has heard from it, it cannot know."""
        self.believed[node.voter] = (lost, leader.replica._round)

    def booted(self, node: Node) -> None:
        self.disks[node.voter] = node.disk
        self.monotonic.forgive(node.voter)  # what had not reached the disk was never said
        self.monotonic.started(node.voter, node.replica.term, self.spoke.get(node.voter, 0), self._last_term(node.disk))
        applied = node.machine.applied_index
        if applied > node.disk.last or applied < node.disk.base:
            raise c.Violation(
                "durability", f"{node.name} starts with state {applied}, log {node.disk.base}..{node.disk.last}"
            )

    @staticmethod
    def _last_term(disk: Disk) -> int:
        return disk.term_at(disk.last) or 0

    def persist(self, node: Node, write: Persist) -> None:
        if write.hard_state is not None:
            self.monotonic.saw(node.voter, write.hard_state)
        if write.entries:
            log = node.replica.journal.log
            first = write.entries[0]
            before = log.term_at(first.index - 1)
            leads = node.replica.role == LEADER
            self.logs.wrote(node.voter, leads, write.truncate, write.entries, before)
            for entry in write.entries:
                if entry.kind == CONFIG and leads:
                    self._reconfigured(node, entry)
        elif write.truncate is not None:
            self.logs.wrote(node.voter, node.replica.role == LEADER, write.truncate, (), None)

    def _reconfigured(self, node: Node, entry: Entry) -> None:
        journal, log = node.replica.journal, node.replica.journal.log
        earlier = [(at, config) for at, config in log.configs if at < entry.index]
        at, old = earlier[-1] if earlier else (log.base, log.base_config)
        new = Config.decode(entry.body)
        own = node.replica.established and log.term_at(journal.commit_index) == node.replica.term
        c.Configurations.appended(node.voter, old, new, at, journal.commit_index, own)
        for voter in set(new.voters) - set(old.voters):
            disk = self.disks.get(voter)
            c.Configurations.promoted(node.voter, voter, disk.last if disk else 0, journal.commit_index, CLOSE_ENTRIES)

    def sent(self, node: Node, to: VoterId, message: Message) -> None:
        kind = type(message)
        if kind is AppendReply:
            if message.ok:
                c.Acknowledgements.told(node.voter, message.match, node.disk.last)
        elif kind is VoteReply and message.granted:
            self.spoke[node.voter] = max(self.spoke.get(node.voter, 0), message.term)
            self.votes.granted(node.voter, message.term, to, node.disk.hard_state)

    def role(self, node: Node, change: RoleChanged) -> None:
        if change.role != LEADER:
            return
        replica, voter = node.replica, node.voter
        if change.established:
            self.established_at.append((self.world.now, voter))
            return
        self.changes.elected(self.world.now, voter, change.term)
        voters = replica.config.voters
        voted = 0
        for other in voters:
            disk = self._disk(other)
            state = disk.hard_state if disk is not None else None
            if state is not None and (
                state.term > change.term or (state.term, state.voted_for) == (change.term, voter)
            ):
                voted += 1
        self.elections.elected(voter, change.term, voted, len(voters))
        log = replica.journal.log
        for told in self.world.elected:
            self.world.after(0.0001, told, node)
        self.commits.elected(voter, change.term, log.base, log.term_at)

    def committed(self, node: Node, led: bool, old: int, new: int) -> None:
        """`led`: it did when the step began; a leader that removes itself does not any more."""
        replica, commits = node.replica, self.commits
        known = commits.index
        log = replica.journal.log
        commits.committed(node.voter, led or replica.role == LEADER, replica.term, old, new, log.term_at)
        if new > known:
            for at, config in log.configs:
                if known < at <= new:
                    self.config_index, self.config = at, config
            term = commits.terms[new]
            voters = log.config_at(log.last).voters
            held = sum((disk := self._disk(v)) is not None and disk.holds(new, term) for v in voters)
            commits.holders(new, term, held, len(voters))
            commits.own_term(new, term, replica.term)
            self.frozen.acted(node.voter, replica.term, f"commits {new}")

    def _disk(self, voter: VoterId) -> Disk | None:
        return self.believed[voter][0] if voter in self.believed else self.disks.get(voter)

    # -- the state -----------------------------------------------------------------------------------------------

    def applied(self, node: Node, entry: Entry, result: tuple[int, ...], digest: int) -> None:
        self.states.applied(node.voter, entry, digest)
        if entry.index > self._applied_upto:
            self._applied_upto = entry.index
            if entry.body and entry.kind != CONFIG:
                self.attempts.applied(entry.index, node.machine.decode(entry.body), result)

    def snapshot(self, node: Node, meta: SnapshotMeta, machine: Any) -> None:
        self.states.adopted(node.voter, meta.index, machine.digest, machine.content())

    def installed(self, node: Node, meta: SnapshotMeta) -> None:
        self.world.cover("snapshot installed", "any")
        commits = self.commits
        if meta.index > commits.index or commits.terms[meta.index] != meta.term:
            raise c.Violation(
                "commit", f"{node.name} installed {meta.index} of term {meta.term}, which is not committed"
            )
        c.Configurations.active(node.voter, node.replica.journal.log.base_config, meta.config)
        self.states.adopted(node.voter, meta.index, node.machine.digest, node.machine.content())

    def compacted(self, node: Node, upto: int) -> None:
        c.Compaction.compacted(node.voter, upto, node.kept.applied_index)

    # -- clients -------------------------------------------------------------------------------------------------

    def read(self, node: Node, request: Request) -> None:
        request.floor = max(request.floor, self.commits.index)

    def read_ready(self, node: Node, request: Request, index: int) -> None:
        c.Reads.ready(node.voter, index, request.floor)
        self.frozen.acted(node.voter, node.replica.term, "answers a read")

    def gave_up(self, node: Node, job: int, led_for: float) -> None:
        c.Grace.gave_up(node.voter, job, led_for, LEASE_SECONDS)

    def told(self, request: Request, value: Any) -> None:
        """A client or worker got an answer."""
        if request.what == "submit":
            self.keys.told(request.key, value[0])
        elif request.what == "claim" and len(value) == 3:
            self.attempts.began(value[0], value[1], request.worker)
