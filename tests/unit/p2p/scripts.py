"""Small clusters as readable scripts (the idea: etcd-io/raft's ``rafttest`` and ``testdata``).

A script is a list of orders, one a line; what an order causes is written under it, indented. A line that begins with
``#`` tells the reader why. ``quietly`` before an order leaves its consequences out. ``expect`` causes nothing: it fails
the test if it is not so, also when transcripts are being made anew, so that no wrong end can be written down as right.

=====================================  =============================================================================
cluster 3 [+ 1 learner] [+ 1 stranger] voters n1 to n3, at time 0; a stranger is in no configuration
past n1 1 1 2 [term 3] [vote n2]       n1's log so far has entries of these terms
at 0.65                                the clock is set; nobody looks at it
tick n1 [at 0.65]                      n1 looks at its timers
run to 2.0                             time passes: everybody ticks when due, messages and disks take no time
elect n1                               n1 stands as soon as it may, and everything moves until it leads
stabilize [n1 n2]                      disks and messages (between these nodes) until nothing moves
deliver n1->n2 [2]                     the oldest messages arrive; ``drop``, ``repeat`` and ``delay`` for the network
cut n1->n2 | cut n1 n2 | isolate n1 | mute n1->n2 (loses its Appends only) | heal
hang n1 | sync n1 [1] | wake n1        n1's disk stops, does its oldest writes, works again
busy n1 | idle n1                      n1 does not (does) read entries and snapshots from its disk
propose n1 x y | read n1 7 | transfer n1 n2 | configure n1 n1 n2 + n3 | compact n1 5 | unreachable n1 n2
well n1 5 | unwell n1 too hot          n1's priority, or why it must not lead
crash n1 | restart n1 | forget n1 3     comes back; with a backup of its disk that ends at entry 3
show n1 | followers n1
expect n1 leader|follower|candidate|term 2|log 1 1 2|commit 3|applied x y|follows n2|heirs n2 n3|voters n1 n2
expect n1 sees n2 replicate|probe|snapshot|regressed|gone
expect agreement                       whoever is up has applied and holds the same
=====================================  =============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from p2p.effects import Config
from p2p.ids import node_of
from p2p.replica import (
    ConfigRefused,
    NotLeader,
    Propose,
    Read,
    Reconfigure,
    ReplicaEvent,
    SetFitness,
    Transfer,
    Unreachable,
)
from tests.unit.p2p.interaction import Cluster, Node, body, config_text, voter

INDENT = "    "


class Script:
    """Runs the orders of one script; `lines` is the transcript so far."""

    def __init__(self) -> None:
        self.cluster = Cluster(1)
        self.lines: list[str] = []
        self.quiet = False

    def run(self, text: str) -> str:
        """The script with what really happened."""
        for line in text.splitlines():
            if line.startswith(INDENT):
                continue  # what happened when the transcript was made
            self.lines.append(line)
            if line and not line.startswith("#"):
                try:
                    self.do(line)
                except AssertionError as error:
                    raise AssertionError(f"{error}\nat the end of:\n" + "\n".join(self.lines[-40:])) from error
        return "\n".join(self.lines) + "\n"

    def do(self, line: str) -> None:
        words = line.split()
        self.quiet = words[0] == "quietly"
        order, *rest = words[self.quiet :]
        getattr(self, f"do_{order}")(*rest)

    def say(self, line: str) -> None:
        if not self.quiet:
            self.lines.append(INDENT + line)

    # -- the cluster and its time ------------------------------------------------------------------------------

    def do_cluster(self, voters: str, *more: str) -> None:
        sorts = dict(zip((sort.rstrip("s") for sort in more[2::3]), map(int, more[1::3]), strict=True))
        self.cluster = Cluster(
            int(voters), learners=sorts.get("learner", 0), strangers=sorts.get("stranger", 0), say=self.say
        )

    def do_past(self, name: str, *words: str) -> None:
        terms = [int(word) for word in words[: next((n for n, w in enumerate(words) if not w.isdigit()), len(words))]]
        named = dict(zip(words[len(terms) :: 2], words[len(terms) + 1 :: 2], strict=True))
        self.cluster.preset(name, terms, term=int(named["term"]) if "term" in named else None, vote=named.get("vote"))

    def do_at(self, time: str) -> None:
        assert float(time) >= self.cluster.now, "time does not go back"
        self.cluster.now = float(time)

    def do_tick(self, name: str, at: str = "at", time: str = "0") -> None:
        self.cluster.now = max(self.cluster.now, float(time))
        self.cluster.tick(name)

    def do_run(self, to: str, time: str) -> None:
        self.cluster.run_to(float(time))

    def do_elect(self, name: str) -> None:
        self.cluster.elect(name)

    def do_stabilize(self, *names: str) -> None:
        self.cluster.stabilize(*names)

    # -- the wire ----------------------------------------------------------------------------------------------

    def do_deliver(self, link: str, most: str = "1000000") -> None:
        sender, _, to = link.partition("->")
        assert self.cluster.deliver(sender, to, int(most)), f"nothing from {sender} to {to}"

    def do_drop(self, link: str, most: str = "1000000") -> None:
        sender, _, to = link.partition("->")
        queue = self.cluster.wire.get((sender, to))
        assert queue, f"nothing from {sender} to {to}"
        for _ in range(min(int(most), len(queue))):
            queue.popleft()

    def do_repeat(self, link: str) -> None:
        """The oldest message will arrive twice."""
        sender, _, to = link.partition("->")
        queue = self.cluster.wire[sender, to]
        queue.appendleft(queue[0])

    def do_delay(self, link: str) -> None:
        """The oldest message falls behind all others."""
        sender, _, to = link.partition("->")
        queue = self.cluster.wire[sender, to]
        queue.append(queue.popleft())

    def do_cut(self, *link: str) -> None:
        for pair in [tuple(link[0].split("->"))] if len(link) == 1 else [(link[0], link[1]), (link[1], link[0])]:
            self.cluster.cut(pair[0], pair[1])

    def do_isolate(self, name: str) -> None:
        for other in self.cluster.nodes:
            if other != name:
                self.do_cut(name, other)

    def do_mute(self, *links: str) -> None:
        for link in links:
            sender, _, to = link.partition("->")
            self.cluster.muted.add((sender, to))

    def do_heal(self) -> None:
        self.cluster.cuts.clear()
        self.cluster.muted.clear()

    # -- machines ----------------------------------------------------------------------------------------------

    def do_hang(self, name: str) -> None:
        self.cluster.nodes[name].disk_hangs = True

    def do_sync(self, name: str, most: str = "1000000") -> None:
        assert self.cluster.sync(name, int(most)), f"{name} has nothing to write"

    def do_wake(self, name: str) -> None:
        self.cluster.nodes[name].disk_hangs = False

    def do_busy(self, name: str) -> None:
        self.cluster.nodes[name].chores_wait = True

    def do_idle(self, name: str) -> None:
        self.cluster.nodes[name].chores_wait = False

    def do_crash(self, *names: str) -> None:
        for name in names:
            self.cluster.crash(name)

    def do_restart(self, *names: str) -> None:
        for name in names:
            self.cluster.restart(name)

    def do_forget(self, name: str, upto: str) -> None:
        self.cluster.forget(name, int(upto))

    def do_compact(self, name: str, upto: str) -> None:
        self.cluster.compact(name, int(upto))

    # -- orders ------------------------------------------------------------------------------------------------

    def do_propose(self, name: str, *bodies: str) -> None:
        self._order(name, Propose(tuple(body.encode() for body in bodies)))

    def do_read(self, name: str, context: str) -> None:
        self._order(name, Read(int(context)))

    def do_transfer(self, name: str, to: str) -> None:
        self._order(name, Transfer(voter(to)))

    def do_configure(self, name: str, *words: str) -> None:
        voters, learners = split_config(words)
        self._order(name, Reconfigure(Config(tuple(map(voter, voters)), tuple(map(voter, learners)))))

    def do_unreachable(self, name: str, other: str) -> None:
        self._order(name, Unreachable(voter(other)))

    def do_well(self, name: str, priority: str = "0") -> None:
        self.cluster.nodes[name].priority = int(priority)
        self._order(name, SetFitness(int(priority)))

    def do_unwell(self, name: str, *why: str) -> None:
        self._order(name, SetFitness(self.cluster.nodes[name].priority, " ".join(why)))

    def _order(self, name: str, event: ReplicaEvent) -> None:
        try:
            self.cluster.step(name, event)
        except (NotLeader, ConfigRefused) as refusal:
            self.say(f"refused: {refusal}".replace("@d", ""))

    # -- looking -----------------------------------------------------------------------------------------------

    def do_show(self, name: str) -> None:
        replica = self.cluster.nodes[name].replica
        journal = replica.journal
        base = f"behind {journal.log.base}/{journal.log.base_term}, " if journal.log.base else ""
        log = " ".join(f"{e.index}/{e.term}" for e in self.cluster.log(name)) or "empty"
        self.say(f"{name} {replica.role}, term {replica.term}, voters {config_text(replica.config)}")
        self.say(f"{base}log {log}; on disk {journal.stable_index}, commit {journal.commit_index}")

    def do_followers(self, name: str) -> None:
        for p in self.cluster.nodes[name].replica.progress.values():
            lost = ", has lost its disk" if p.regressed else ""
            way = f", under way {' '.join(map(str, p.under_way))}" if p.under_way else ""
            self.say(f"{node_of(p.voter)} {p.state}, holds {p.match}, next {p.next}{way}{lost}")

    def do_expect(self, name: str, *words: str) -> None:
        if name == "agreement":
            self._expect_agreement()
            return
        what, *rest = words
        found, wanted = LOOKS[what](self.cluster, self.cluster.nodes[name], rest)
        assert found == wanted, f"{name} {what}: {found!r}, not {wanted!r}"

    def _expect_agreement(self) -> None:
        up = [node for node in self.cluster.nodes.values() if node.up and node.replica.config.voters]
        assert len({tuple(node.state) for node in up}) == 1, "what was applied differs"
        assert len({node.replica.journal.last for node in up}) == 1, "the logs end differently"
        ends = [(node.applied, node.replica.journal.last_index) for node in up]
        assert all(applied == last for applied, last in ends), f"not everything is applied: {ends}"


def split_config(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """``n1 n2 + n3``: voters, then learners."""
    voters, _, learners = " ".join(words).partition("+")
    return voters.split(), learners.split()


Look = Callable[[Cluster, Node, list[str]], tuple[object, object]]


def _role(wanted: str) -> Look:
    return lambda cluster, node, rest: (node.replica.role, wanted)


def _heirs(cluster: Cluster, node: Node, rest: list[str]) -> tuple[object, object]:
    return [str(node_of(heir)) for heir in node.replica.election.heirs], rest


def _sees(cluster: Cluster, node: Node, rest: list[str]) -> tuple[object, object]:
    p = node.replica.progress.get(voter(rest[0]))
    return "gone" if p is None else "regressed" if p.regressed else p.state, rest[1]


LOOKS: dict[str, Look] = {
    "leader": _role("leader"),
    "follower": _role("follower"),
    "candidate": _role("candidate"),
    "term": lambda cluster, node, rest: (node.replica.term, int(rest[0])),
    "log": lambda cluster, node, rest: ([e.term for e in cluster.log(node.name)], [int(term) for term in rest]),
    "commit": lambda cluster, node, rest: (node.replica.journal.commit_index, int(rest[0])),
    "applied": lambda cluster, node, rest: (
        " ".join(body(e.kind, e.body) for e in node.state if e.body),
        " ".join(rest),
    ),
    "follows": lambda cluster, node, rest: (node.replica.leader, voter(rest[0])),
    "alone": lambda cluster, node, rest: (node.replica.leader, None),
    "heirs": _heirs,
    "sees": _sees,
    "voters": lambda cluster, node, rest: (
        tuple(map(node_of, node.replica.config.voters)),
        tuple(split_config(rest)[0]),
    ),
}


def transcript(path: Path) -> tuple[str, str]:
    """What the file says, and what running its orders says now."""
    text = path.read_text(encoding="utf-8")
    return text, Script().run(text)
