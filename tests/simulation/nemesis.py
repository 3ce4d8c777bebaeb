"""The faults. Each kind has its own random numbers and its own rhythm, so that leaving one out of a profile leaves the
others as they were. What a fault does, it takes back after a while; `heal` takes back everything at once.

What no protocol survives is not done: a majority of the voters keeps its disks, and a disk is restored from an old copy
only in a quiet moment in which nothing is lost by it (PROTOCOL §2.10: the leader must live to notice).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations

from p2p.effects import Config
from p2p.ids import DiskId, NodeId, VoterId
from p2p.replica import Reconfigure, SetFitness, Transfer
from tests.simulation.desk import without
from tests.simulation.disk import Disk
from tests.simulation.node import Node
from tests.simulation.profile import FAULTS
from tests.simulation.watch import Watch
from tests.simulation.world import World

MAX_FREEZE = 6.0


class Nemesis:
    """`start` lets the profile's faults loose; `heal` ends them for good."""

    def __init__(self, world: World, watch: Watch, blank: Callable[[], object]) -> None:
        self.world, self.watch, self._blank = world, watch, blank
        self.over = False
        self.quiet_until = 0.0
        self._rngs: dict[str, random.Random] = {}
        self._disks = 0
        self._copies: dict[NodeId, Disk] = {}
        self._acts: dict[str, Callable[[random.Random], None]] = {
            kind: getattr(self, f"_{kind}") for kind in sorted(FAULTS)
        }

    def start(self) -> None:
        if "members" in self.world.profile.faults:
            self.world.elected.append(self._too_early)
        for kind, intensity in self.world.profile.faults.items():
            self._rngs[kind] = self.world.stream(f"fault {kind}")
            self._again(kind, FAULTS[kind] / intensity)

    def _again(self, kind: str, mean: float) -> None:
        self.world.after(self._rngs[kind].expovariate(1 / mean), self._strike, kind, mean)

    def _strike(self, kind: str, mean: float) -> None:
        if self.over:
            return
        self._again(kind, mean)
        if self.world.now >= self.quiet_until:
            self._acts[kind](self._rngs[kind])

    def heal(self) -> None:
        """Everything is well from now on, but for clocks, which keep what they have become."""
        world = self.world
        self.over = True
        world.net.heal()
        world.note("", "everything is healed")
        for node in world.nodes.values():
            self._mend_disk(node)
            node.lag, node.bad_install = 0.0, False
            node.set_rate(1.0) if node.up else setattr(node, "rate", 1.0)
            node.unfit = ""
            if not node.up:
                node.boot()
            elif node.frozen:
                node.thaw()
            if node.up and node.replica.unfit:
                node.step(SetFitness(node.priority))

    # -- whom ----------------------------------------------------------------------------------------------------

    def _some(self, rng: random.Random, kind: str) -> Node | None:
        """A node that runs: the leader half of the time."""
        running = [node for node in self.world.nodes.values() if node.up and not node.frozen]
        leading = [node for node in running if node.replica.role == "leader"]
        if not running:
            return None
        node = rng.choice(leading if leading and rng.random() < 0.5 else running)
        self.world.cover(kind, node.role)
        return node

    def _names(self) -> list[NodeId]:
        return list(self.world.nodes)

    def _leader(self) -> Node | None:
        found = [n for n in self.world.nodes.values() if n.up and not n.frozen and n.replica.established]
        return max(found, key=lambda n: n.replica.term, default=None)

    def _later(self, delay: float, act: Callable[..., None], *args: object) -> None:
        def run() -> None:
            if not self.over:
                act(*args)

        self.world.after(delay, run)

    # -- processes -----------------------------------------------------------------------------------------------

    def _kill(self, rng: random.Random) -> None:
        self._stop(rng, "kill", power=False)

    def _power(self, rng: random.Random) -> None:
        self._stop(rng, "power", power=True)

    def _stop(self, rng: random.Random, kind: str, *, power: bool) -> None:
        node = self._some(rng, kind)
        if node is not None:
            node.crash(power=power)
            self._later(rng.choice((0.01, 0.2, 1.0, 3.0)) * (0.5 + rng.random()), self._boot, node)

    @staticmethod
    def _boot(node: Node) -> None:
        if not node.up and not node.disk.full:
            node.boot()

    def _freeze(self, rng: random.Random) -> None:
        node = self._some(rng, "freeze")
        if node is None:
            return
        led = node.replica.term if node.replica.role == "leader" and len(node.replica.config.voters) > 1 else -1
        length = rng.choice((0.05, 0.3, 0.7, 1.0, 2.0, MAX_FREEZE)) * (0.5 + rng.random())
        lease = node.replica.election.timeout
        began, boots, voter = node.clock(), node.boots, node.voter
        node.freeze()

        def thaw() -> None:
            if node.up and node.frozen and node.boots == boots:
                if led >= 0 and node.clock() - began > lease:
                    self.watch.frozen.thawed(voter, led)
                node.thaw()

        self._later(length, thaw)

    def _slow_loop(self, rng: random.Random) -> None:
        node = self._some(rng, "slow_loop")
        if node is not None:
            node.lag = rng.choice((0.002, 0.01, 0.05))
            self._later(rng.uniform(0.5, 3.0), setattr, node, "lag", 0.0)

    def _clock_rate(self, rng: random.Random) -> None:
        node = self._some(rng, "clock_rate")
        if node is not None:
            node.set_rate(rng.uniform(0.8, 1.2))

    def _wall_jump(self, rng: random.Random) -> None:
        node = self._some(rng, "wall_jump")
        if node is not None:
            node.wall_ms += rng.choice((-1, 1)) * rng.choice((50, 2_000, 90_000, 10_000_000))

    def _unfit(self, rng: random.Random) -> None:
        """It says that it cannot lead, or its priority is changed."""
        node = self._some(rng, "unfit")
        if node is None:
            return
        if rng.random() < 0.5:
            node.unfit = "not well"
            node.step(SetFitness(node.priority, node.unfit))
            self._later(rng.uniform(0.3, 3.0), self._fit, node)
        else:
            node.priority = rng.randint(0, 9)
            node.step(SetFitness(node.priority, node.unfit))

    @staticmethod
    def _fit(node: Node) -> None:
        node.unfit = ""
        if node.up:
            node.enter(node.step, SetFitness(node.priority))

    # -- disks ---------------------------------------------------------------------------------------------------

    def _disk_slow(self, rng: random.Random) -> None:
        node = self._some(rng, "disk_slow")
        if node is not None:
            node.disk.slow = rng.choice((5.0, 20.0, 50.0))
            self._later(rng.uniform(0.5, 3.0), setattr, node.disk, "slow", 1.0)

    def _disk_hang(self, rng: random.Random) -> None:
        node = self._some(rng, "disk_hang")
        if node is not None:
            node.disk.hung_until = self.world.now + rng.choice((0.1, 0.5, 1.2, 3.0, 5.0)) * (0.5 + 0.5 * rng.random())
            self.world.note(node.name, f"its disk hangs until {node.disk.hung_until:.3f}")

    def _disk_full(self, rng: random.Random) -> None:
        """The next write fails, and the node stops there; it comes back when there is room."""
        node = self._some(rng, "disk_full")
        if node is not None:
            node.disk.full = True
            self._later(rng.uniform(0.5, 4.0), self._room, node)

    def _room(self, node: Node) -> None:
        node.disk.full = False
        self._boot(node)

    @staticmethod
    def _mend_disk(node: Node) -> None:
        node.disk.full = False
        node.disk.slow = 1.0
        node.disk.hung_until = 0.0
        node.hurry()

    def _configs(self) -> set[Config]:
        """Every configuration that anybody may count by from now on: the newest committed one, and later ones."""
        watch = self.watch
        found = {watch.config}
        for node in self.world.nodes.values():
            found |= {config for at, config in node.disk.start().configs if at > watch.config_index}
            if node.up:
                found |= {config for at, config in node.replica.journal.log.configs if at > watch.config_index}
        return found

    def _may_lose(self, voter: VoterId) -> bool:
        """Whether a majority of every configuration in use still has its disk without this voter's."""
        lost = {v for v, disk in self.watch.disks.items() if self._owner(v) is None} | {voter}
        return all(2 * len(lost & set(config.voters)) < len(config.voters) for config in self._configs())

    def _owner(self, voter: VoterId) -> Node | None:
        return next((node for node in self.world.nodes.values() if node.voter == voter), None)

    def _wipe(self, rng: random.Random) -> None:
        """The machine comes back with an empty disk, and so under another identity; it belongs to nothing."""
        node = rng.choice(list(self.world.nodes.values()))
        if not self._may_lose(node.voter) or node.voter in self.watch.believed:
            return
        self.world.cover("wipe", node.role)
        if node.up:
            node.crash(power=True)
        old = node.voter
        node.disk = Disk(self._new_disk(node), Config())
        node.machine = self._blank()
        node.kept = node.machine.copy()
        node.snapshots.clear()
        node.marker = None
        self._copies.pop(node.name, None)
        self.world.note(node.name, f"has lost its disk: {old} is now {node.voter}")
        self._later(rng.uniform(0.1, 2.0), self._boot, node)

    def _new_disk(self, node: Node) -> DiskId:
        self._disks += 1
        return DiskId(f"{self._disks}d")

    def _restore(self, rng: random.Random) -> None:
        """Takes a copy of a disk, or puts an old one back."""
        names = self._names()
        name = rng.choice(names)
        node = self.world.nodes[name]
        copy = self._copies.get(name)
        if copy is None or copy.id != node.disk.id or rng.random() < 0.3:
            if node.up and node.replica.role != "leader":
                self._copies[name] = node.disk.copy()
            return
        leader = self._leader()
        if leader is None or node is leader or not self._may_restore(node, copy, leader):
            return
        self.world.cover("restore", node.role)
        self.quiet_until = self.world.now + 4.0
        self._pause()
        if node.up:
            node.crash(power=False)
        for other in self.world.nodes.values():
            if not other.up:
                self._mend_disk(other)
                other.boot()
        self.world.note(name, f"its disk is an old copy now: ..{copy.last} instead of ..{node.disk.last}")
        self.watch.restored(node, node.disk, leader)
        number = node.disk.number
        node.disk = copy.copy()
        node.disk.number = number + 1
        node.machine = self._blank()
        node.snapshots.clear()
        node.kept = node.machine.copy()
        del self._copies[name]
        node.boot()

    def _may_restore(self, node: Node, copy: Disk, leader: Node) -> bool:
        """Nothing is lost if a majority of the others holds all that is committed, leads, and has heard of nothing
        later; if the leader has just heard so many that it goes on leading; and a copy that begins at nothing can be
        replayed."""
        replica = leader.replica
        others = [v for v in replica.config.voters if v != node.voter]
        log = replica.journal
        held = [
            v for v in others if self.watch.disks[v].holds(log.commit_index, log.log.term_at(log.commit_index) or 0)
        ]
        heard = [
            v
            for v in others
            if (p := replica.progress.get(v)) is None or leader.clock() - p.contact < 2 * leader.timers.heartbeat
        ]
        running = all(n.up and not n.frozen for n in self.world.nodes.values() if n.voter in replica.config.voters)
        return (
            copy.base == 0
            and running
            and not self.world.net.cut
            and log.log.config_index <= log.commit_index
            and node.voter in replica.config.voters
            and not node.replica.installing
            and 2 * len(held) > len(replica.config.voters)
            and 2 * len(heard) > len(replica.config.voters)
            and copy.hard_state == node.disk.hard_state
            and replica.term == copy.hard_state.term
            and copy.last < node.disk.last
        )

    def _pause(self) -> None:
        """Nothing else goes wrong for a moment."""
        self.world.net.heal()
        for node in self.world.nodes.values():
            self._mend_disk(node)
            node.lag = 0.0
            if node.frozen:
                node.thaw()

    # -- the network ---------------------------------------------------------------------------------------------

    def _cut(self, rng: random.Random, links: list[tuple[NodeId, NodeId]], why: str) -> None:
        net = self.world.net
        net.block(links)
        self.world.note("net", f"{why}: {', '.join(f'{a}>{b}' for a, b in links)} carry nothing")
        self._later(rng.choice((0.2, 0.7, 1.5, 3.0)) * (0.5 + rng.random()), net.unblock, links)

    def _isolate(self, rng: random.Random) -> None:
        node = self._some(rng, "isolate")
        if node is not None:
            others = [name for name in self._names() if name != node.name]
            links = [link for name in others for link in ((node.name, name), (name, node.name))]
            self._cut(rng, links, "isolated")

    def _split(self, rng: random.Random) -> None:
        names = self._names()
        rng.shuffle(names)
        at = rng.randint(1, max(len(names) - 1, 1))
        self._cover_all("split")
        links = [link for a in names[:at] for b in names[at:] for link in ((a, b), (b, a))]
        self._cut(rng, links, "split")

    def _one_way(self, rng: random.Random) -> None:
        """A node is not heard, or hears nothing, or by some only."""
        node = self._some(rng, "one_way")
        if node is None:
            return
        others = [name for name in self._names() if name != node.name]
        some = rng.sample(others, rng.randint(1, len(others))) if others else []
        heard = rng.random() < 0.5
        self._cut(rng, [(name, node.name) if heard else (node.name, name) for name in some], "one way")

    def _bridge(self, rng: random.Random) -> None:
        """Two halves that reach each other through one node only."""
        names = self._names()
        if len(names) < 3:
            return
        rng.shuffle(names)
        self._cover_all("bridge")
        half = 1 + (len(names) - 1) // 2
        links = [link for a in names[1:half] for b in names[half:] for link in ((a, b), (b, a))]
        self._cut(rng, links, "bridge")

    def _partial(self, rng: random.Random) -> None:
        pairs = list(combinations(self._names(), 2))
        if not pairs:
            return
        self._cover_all("partial")
        some = rng.sample(pairs, rng.randint(1, max(len(pairs) // 2, 1)))
        self._cut(rng, [link for a, b in some for link in ((a, b), (b, a))], "partial")

    def _cover_all(self, kind: str) -> None:
        for node in self.world.nodes.values():
            self.world.cover(kind, node.role)

    def _loss(self, rng: random.Random) -> None:
        self._for_a_while(rng, "loss", "loss", rng.choice((0.02, 0.1, 0.3, 0.6)))

    def _duplicate(self, rng: random.Random) -> None:
        self._for_a_while(rng, "duplicate", "duplicates", rng.choice((0.05, 0.3)))

    def _reorder(self, rng: random.Random) -> None:
        self._for_a_while(rng, "reorder", "disorder", rng.choice((0.05, 0.3)))

    def _for_a_while(self, rng: random.Random, kind: str, what: str, value: float) -> None:
        self._cover_all(kind)
        self.world.note("net", f"{what} {value}")
        setattr(self.world.net, what, value)
        self._later(rng.uniform(0.3, 3.0), setattr, self.world.net, what, 0.0)

    def _slow_link(self, rng: random.Random) -> None:
        node = self._some(rng, "slow_link")
        others = [name for name in self._names() if node is not None and name != node.name]
        if node is None or not others:
            return
        other = rng.choice(others)
        link = (node.name, other) if rng.random() < 0.5 else (other, node.name)
        self.world.net.slow[link] = rng.choice((0.02, 0.1, 0.4, 1.0))
        self._later(rng.uniform(0.3, 3.0), self.world.net.slow.pop, link, None)

    def _reset(self, rng: random.Random) -> None:
        node = self._some(rng, "reset")
        others = [name for name in self._names() if node is not None and name != node.name]
        if node is not None and others:
            self.world.net.reset(node.name, rng.choice(others))

    def _bad_install(self, rng: random.Random) -> None:
        node = self._some(rng, "bad_install")
        if node is not None:
            node.bad_install = True
            self._later(rng.uniform(0.5, 3.0), setattr, node, "bad_install", False)

    # -- orders --------------------------------------------------------------------------------------------------

    def _transfer(self, rng: random.Random) -> None:
        leader = self._leader()
        if leader is not None:
            self.world.cover("transfer", leader.role)
            leader.order(Transfer(rng.choice(leader.replica.config.voters)))

    def _members(self, rng: random.Random) -> None:
        """An operator changes voters: anybody in, out, up or down, one at a time."""
        leader = self._leader()
        if leader is None:
            return
        self.world.cover("members", leader.role)
        config = leader.replica.config
        if rng.random() < 0.25:
            leader.order(Reconfigure(self._illegal(rng, config)))
            return
        alive = [node.voter for node in self.world.nodes.values() if node.up]
        outside = [voter for voter in alive if voter not in config.everyone]
        toss = rng.random()
        if outside and toss < 0.4:
            new = Config(config.voters, (*config.learners, rng.choice(outside)))
        elif config.learners and toss < 0.6:
            learner = rng.choice(config.learners)
            new = Config((*config.voters, learner), without(config, learner).learners)
        elif len(config.voters) > 1 and self._may_lose(voter := rng.choice(config.voters)):
            new = without(config, voter)
            if toss < 0.75:
                new = Config(new.voters, (*new.learners, voter))
        else:
            return
        if not any(2 * len(self._gone(c)) >= len(c.voters) for c in (new,)):
            leader.order(Reconfigure(new))

    def _too_early(self, node: Node) -> None:
        """An operator who does not wait until the new leader knows what the last one had committed."""
        if not self.over and node.up and not node.frozen and node.replica.role == "leader":
            config = node.replica.config
            others = [voter for voter in config.voters if voter != node.voter]
            if others and not node.replica.established and self._may_lose(others[0]):
                node.order(Reconfigure(without(config, others[0])))

    def _illegal(self, rng: random.Random, config: Config) -> Config:
        """What must be refused: two voters more or less at once, or one that nobody has brought up to date."""
        outside = [n.voter for n in self.world.nodes.values() if n.voter not in config.voters]
        if len(config.voters) >= 4 and rng.random() < 0.3:
            return Config(config.voters[2:], config.learners)
        if len(outside) >= 2 and rng.random() < 0.5:
            return Config((*config.voters, *outside[:2]), ())
        if outside:
            return Config((*config.voters, outside[0]), tuple(v for v in config.learners if v != outside[0]))
        return Config((), config.voters)

    def _gone(self, config: Config) -> list[VoterId]:
        return [voter for voter in config.voters if self._owner(voter) is None]
