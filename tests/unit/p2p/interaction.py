"""A small cluster moved by hand: replicas over disks in memory, a wire that does nothing by itself, one clock.

Nothing happens that a test does not ask for, so a test can stop between any two steps. After every step the replica
checks its own invariants, and the cluster those that no replica can see: one leader a term (PROTOCOL §3, I1), the same
entry applied everywhere at the same index (I5), nothing sent that a crash could take back (I8). `say` is told, in
words, everything that is sent, written, applied and decided.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from p2p.effects import (
    CONFIG,
    Apply,
    Config,
    Effect,
    Entry,
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
from p2p.ids import ClusterId, DiskId, Index, NodeId, Term, VoterId, node_of, voter_id
from p2p.messages import (
    Append,
    AppendReply,
    Message,
    PreVote,
    PreVoteReply,
    SnapshotOffer,
    TimeoutNow,
    Vote,
    VoteReply,
    decode,
    encode,
)
from p2p.replica import (
    Applied,
    Compacted,
    Fetched,
    Installed,
    InstallFailed,
    Persisted,
    Received,
    Replica,
    ReplicaEvent,
    SetFitness,
    SnapshotOffered,
    Tick,
)
from p2p.storage.memory import MemoryLog

CLUSTER = ClusterId("c")
MOST_ROUNDS = 400  # a cluster that is not quiet after so many turns never will be
State = tuple[Entry, ...]  # what a state machine has been given, in order


def voter(name: str) -> VoterId:
    """The identity under which the node of this name votes."""
    return voter_id(NodeId(name), DiskId("d"))


@dataclass
class Node:
    """One machine: what survives a crash is in `store`, `state` and `snapshots`."""

    name: str
    store: MemoryLog
    replica: Replica
    state: State = ()
    applied: int = 0
    snapshots: dict[str, State] = field(default_factory=dict)
    writes: deque[Persist] = field(default_factory=deque)
    chores: deque[Effect] = field(default_factory=deque)
    up: bool = True
    disk_hangs: bool = False
    chores_wait: bool = False
    priority: int = 0
    draw: float = 0.0

    @property
    def voter(self) -> VoterId:
        return voter(self.name)


class Cluster:
    """`voters` and `learners` know each other from the start; `strangers` have joined but are in no configuration."""

    def __init__(
        self,
        voters: int = 3,
        *,
        learners: int = 0,
        strangers: int = 0,
        say: Callable[[str], None] = lambda _: None,
        timers: Timers | None = None,
    ) -> None:
        self.say = say
        self.timers = timers or Timers()
        self.now = 0.0
        self.nodes: dict[str, Node] = {}
        self.wire: dict[tuple[str, str], deque[Message]] = {}
        self.cuts: set[tuple[str, str]] = set()
        self.muted: set[tuple[str, str]] = set()  # whose Appends to whom are lost, though votes are not
        self.lose: Callable[[Message], bool] = lambda _: False
        self.leaders: dict[int, str] = {}
        self.agreed: dict[int, Entry] = {}
        names = [f"n{n + 1}" for n in range(voters + learners + strangers)]
        members = [voter(name) for name in names[: voters + learners]]
        self.config = Config(tuple(members[:voters]), tuple(members[voters:]))
        for at, name in enumerate(names):
            self._make(name, self.config if at < voters + learners else Config())

    def _make(self, name: str, config: Config) -> None:
        store = MemoryLog(NodeId(name), new_disk=lambda: DiskId("d"))
        if config.voters:
            store.found(CLUSTER, config)
        else:
            store.join(CLUSTER)
        node = Node(name, store, None)  # type: ignore[arg-type]
        self.nodes[name] = node
        self._boot(node)

    def _boot(self, node: Node) -> None:
        found = node.store.load(applied=Index(node.applied))
        start = found.start
        node.replica = Replica(
            node.voter,
            found.hard_state,
            start,
            applied=Index(node.applied),
            now=self.now,
            draw=lambda: node.draw,
            timers=self.timers,
            priority=node.priority,
        )

    def preset(self, name: str, terms: list[int], *, term: int | None = None, vote: str | None = None) -> None:
        """Gives a node a past: a log of entries with these terms, bodies that tell where each came from."""
        node = self.nodes[name]
        entries = [Entry(Index(at), Term(t), f"{at}.{t}".encode()) for at, t in enumerate(terms, 1)]
        state = node.store.hard_state
        term = max([state.term, *terms]) if term is None else term
        node.store.append(entries, replace(state, term=Term(term), voted_for=voter(vote) if vote else None), Index(0))
        self._boot(node)

    # -- steps -------------------------------------------------------------------------------------------------

    def step(self, name: str, event: ReplicaEvent) -> list[Effect]:
        """One step of one replica, and whatever it asks for put where it belongs."""
        node = self.nodes[name]
        assert node.up, f"{name} is down"
        effects = node.replica.step(event, self.now)
        node.replica.check_invariants()
        for effect in effects:
            self._take(node, effect)
        return effects

    def tick(self, name: str) -> None:
        self.step(name, Tick())

    def receive(self, name: str, sender: str, message: Message) -> None:
        self.step(name, Received(voter(sender), message))

    def _take(self, node: Node, effect: Effect) -> None:
        match effect:
            case Persist():
                node.writes.append(effect)
                self.say(f"{node.name} writes {_write(effect)}")
            case Send(to, message):
                self._send(node, str(node_of(to)), message)
            case Apply(upto):
                self._apply(node, upto)
            case Fetch() | OfferSnapshot() | Install():
                node.chores.append(effect)
                self.say(f"{node.name} {_chore(effect)}")
            case ReadReady(context, index):
                self.say(f"{node.name} answers read {context} once {index} is applied")
            case ReadFailed(context):
                self.say(f"{node.name} cannot answer read {context}")
            case RoleChanged():
                self._note_role(node, effect)

    def _send(self, node: Node, to: str, message: Message) -> None:
        assert decode(encode(message)) == message
        self._check_durable(node, to, message)
        link = (node.name, to)
        lost = to not in self.nodes or not self.nodes[to].up or link in self.cuts or self.lose(message)
        lost |= link in self.muted and isinstance(message, Append)
        self.say(f"{node.name} -> {to} {describe(message)}{' (lost)' if lost else ''}")
        if not lost:
            self.wire.setdefault(link, deque()).append(message)

    def _check_durable(self, node: Node, to: str, message: Message) -> None:
        """I8: what is promised is on the disk, not only in its cache."""
        disk, hard = node.store, node.store.hard_state
        if isinstance(message, VoteReply) and message.granted:
            assert hard.term >= message.term, f"{node.name} tells a vote that is not on its disk"
        if isinstance(message, Vote):
            mine = hard.term > message.term or (hard.term, hard.voted_for) == (message.term, node.voter)
            assert mine, f"{node.name} asks for votes, and its own is not on its disk"
        if isinstance(message, AppendReply) and message.ok:
            assert hard.term >= message.term, f"{node.name} acknowledges in a term that is not on its disk"
            end = disk.base + len(disk.records)
            assert message.match <= end, f"{node.name} acknowledges {message.match}; its disk ends at {end}"
            self._check_match(node, to, message)

    def _check_match(self, node: Node, to: str, message: AppendReply) -> None:
        """I3: what is acknowledged to a leader is what that leader has."""
        leader = self.nodes[to].replica
        if leader.role == "leader" and leader.term == message.term:
            theirs = leader.journal.log.term_at(message.match)
            mine = node.replica.journal.log.term_at(message.match)
            assert None in (mine, theirs) or mine == theirs, f"{node.name} claims {to}'s entry {message.match}"

    def _apply(self, node: Node, upto: Index) -> None:
        fresh = node.store.read(Index(node.applied + 1), upto)
        assert [e.index for e in fresh] == list(range(node.applied + 1, upto + 1)), "applied what is not on the disk"
        for entry in fresh:
            assert self.agreed.setdefault(entry.index, entry) == entry, f"{node.name} applies another {entry.index}"
        node.state += tuple(fresh)
        node.applied = int(upto)
        self.say(f"{node.name} applies {span(fresh)}")
        node.chores.append(Apply(upto))

    def _note_role(self, node: Node, told: RoleChanged) -> None:
        if told.role == "leader":
            first = self.leaders.setdefault(told.term, node.name)
            assert first == node.name, f"two leaders of term {told.term}: {first} and {node.name}"
            self.say(f"{node.name} leads term {told.term}{', established' if told.established else ''}")
        elif told.role == "candidate":
            self.say(f"{node.name} is a candidate in term {told.term}")
        elif told.leader is not None:
            self.say(f"{node.name} follows {node_of(told.leader)} in term {told.term}")
        else:
            self.say(f"{node.name} follows nobody in term {told.term}: {told.why.replace('@d', '')}")

    # -- disks and chores --------------------------------------------------------------------------------------

    def sync(self, name: str, most: int = 1 << 30) -> bool:
        """The disk does its oldest writes; whether there were any."""
        node = self.nodes[name]
        did = False
        while node.up and node.writes and most > 0:
            write = node.writes.popleft()
            node.store.append(write.entries, write.hard_state, write.acked_floor, write.truncate)
            self.step(name, Persisted(write.seq))
            did, most = True, most - 1
        return did

    def do_chores(self, name: str) -> bool:
        """Applied, Fetched, SnapshotOffered and Installed come back."""
        node = self.nodes[name]
        did = False
        while node.up and node.chores:
            self._do(node, node.chores.popleft())
            did = True
        return did

    def _do(self, node: Node, chore: Effect) -> None:
        match chore:
            case Apply(upto):
                if upto >= node.replica.journal.applied_index:
                    self.step(node.name, Applied(upto))
            case Fetch(to, first, most, most_bytes):
                found = node.store.read(first, Index(first + most - 1), most_bytes)
                self.step(node.name, Fetched(to, tuple(found)))
            case OfferSnapshot(to):
                self.step(node.name, SnapshotOffered(to, self.take_snapshot(node.name)))
            case Install(source, snapshot):
                self._install(node, source, snapshot)

    def take_snapshot(self, name: str) -> SnapshotMeta:
        """Of what is applied now; the newest one if nothing was applied since."""
        node = self.nodes[name]
        at = Index(node.applied)
        label = f"state-{at}"
        node.snapshots[label] = node.state
        term, chain = node.store.term_at(at), node.store.chain_at(at)
        assert term is not None and chain is not None
        config = node.replica.journal.log.config_at(at)
        return SnapshotMeta(at, term, config, chain, label, len(node.state), "0" * 64)

    def _install(self, node: Node, source: VoterId, meta: SnapshotMeta) -> None:
        giver = self.nodes[str(node_of(source))]
        if not giver.up or (giver.name, node.name) in self.cuts:
            self.say(f"{node.name} could not fetch the snapshot from {giver.name}")
            self.step(node.name, InstallFailed())
            return
        while node.writes:  # one thread does one after the other
            self.sync(node.name)
        node.state = giver.snapshots[meta.name]
        node.applied = int(meta.index)
        node.store.reset(meta.index, meta.term, meta.chain, meta.config)
        self.say(f"{node.name} installs the snapshot of {meta.index}/{meta.term}")
        self.step(node.name, Installed(source, meta))

    def compact(self, name: str, upto: int) -> None:
        node = self.nodes[name]
        assert upto <= node.applied, "only what is applied is forgotten"
        self.take_snapshot(name)
        while node.store.compact(Index(upto)) > 0:
            pass
        self.step(name, Compacted(Index(upto)))

    def crash(self, name: str) -> None:
        """What was not synced is gone, and so is what was on the wire to it."""
        node = self.nodes[name]
        node.up = False
        node.writes.clear()
        node.chores.clear()
        for (_, to), queue in self.wire.items():
            if to == name:
                queue.clear()

    def restart(self, name: str) -> None:
        node = self.nodes[name]
        assert not node.up, f"{name} runs"
        node.up = True
        node.disk_hangs = node.chores_wait = False
        self._boot(node)

    def forget(self, name: str, upto: int) -> None:
        """The machine comes back with a backup of its disk that ends at `upto` (PROTOCOL §2.10)."""
        node = self.nodes[name]
        del node.store.records[upto - node.store.base :]
        node.applied = min(node.applied, upto)
        node.state = node.state[: node.applied]
        node.store.acked_floor = Index(min(node.store.acked_floor, upto))
        self.restart(name)

    # -- the wire ----------------------------------------------------------------------------------------------

    def deliver(self, sender: str, to: str, most: int = 1 << 30) -> bool:
        """Hands over what is on the wire now, oldest first."""
        queue = self.wire.get((sender, to), deque())
        count = min(most, len(queue))
        for _ in range(count):
            self.receive(to, sender, queue.popleft())
        return count > 0

    def cut(self, sender: str, to: str) -> None:
        self.cuts.add((sender, to))
        self.wire.pop((sender, to), None)

    def links(self) -> Iterator[tuple[str, str]]:
        return iter(sorted(self.wire))

    # -- until nothing moves -----------------------------------------------------------------------------------

    def stabilize(self, *names: str) -> None:
        """Disks, chores and messages of these nodes (of all, if none is named) until nothing moves; no time passes."""
        among = names or tuple(self.nodes)
        for _ in range(MOST_ROUNDS):
            moved = False
            for name in among:
                node = self.nodes[name]
                if node.up and not node.disk_hangs:
                    moved |= self.sync(name)
                if node.up and not node.chores_wait:
                    moved |= self.do_chores(name)
                for sender, to in self.links():
                    if to == name and sender in among:
                        moved |= self.deliver(sender, to)
            if not moved:
                return
        raise AssertionError("the cluster does not come to rest")

    def run_to(self, until: float) -> None:
        """Lets time pass: each node ticks when it asks to, and everything moves at once."""
        self.stabilize()
        while True:
            due = [
                (deadline, name)
                for name, node in self.nodes.items()
                if node.up and (deadline := node.replica.next_deadline()) is not None
            ]
            if not due or min(due)[0] > until:
                break
            at, name = min(due)
            self.now = max(self.now, at)
            self.tick(name)
            self.stabilize()
        self.now = max(self.now, until)

    def elect(self, name: str) -> None:
        """Time passes until it is this node's turn to stand; nobody else's timer is looked at, and nobody is higher."""
        node = self.nodes[name]
        replica, priority = node.replica, node.replica.election.priority
        self.now = max(self.now, replica.election.deadline)
        self.step(name, SetFitness(1 << 30))
        self.tick(name)
        self.stabilize()
        self.step(name, SetFitness(priority))
        assert replica.role == "leader", f"{name} was not elected"

    # -- looking -----------------------------------------------------------------------------------------------

    def log(self, name: str) -> list[Entry]:
        """What its replica believes to be its log, as far as it is kept, from its disk and its writes under way."""
        node = self.nodes[name]
        entries = list(node.store.read(Index(node.store.base + 1), Index(1 << 40)))
        for write in node.writes:
            if write.truncate is not None:
                entries = [e for e in entries if e.index < write.truncate]
            entries += write.entries
        return entries


# -- words -----------------------------------------------------------------------------------------------------


def span(entries: list[Entry] | State) -> str:
    if not entries:
        return "nothing"
    first, last = entries[0].index, entries[-1].index
    return f"{first}" if first == last else f"{first}..{last}"


def body(kind: int, raw: bytes) -> str:
    """``{n1 n2}`` for a configuration, ``-`` for a no-op."""
    if kind == CONFIG:
        return config_text(Config.decode(raw))
    return raw.decode() or "-"


def config_text(config: Config) -> str:
    learners = f" + {' '.join(map(node_of, config.learners))}" if config.learners else ""
    return f"{{{' '.join(map(node_of, config.voters))}{learners}}}"


def _write(write: Persist) -> str:
    parts = []
    if write.hard_state is not None:
        vote = write.hard_state.voted_for
        parts.append(f"term {write.hard_state.term} vote {node_of(vote) if vote else '-'}")
    if write.truncate is not None:
        parts.append(f"forgets {write.truncate} on")
    parts += _entries([(e.index, e.term, e.kind, e.body) for e in write.entries])
    return ", ".join(parts) or "nothing new"


MOST_SHOWN = 6


def _entries(entries: list[tuple[int, int, int, bytes]]) -> list[str]:
    shown = [f"{index}/{term} {body(kind, raw)}" for index, term, kind, raw in entries[:MOST_SHOWN]]
    return shown if len(entries) <= MOST_SHOWN else [*shown, f"… {entries[-1][0]}/{entries[-1][1]}"]


def _chore(effect: Fetch | OfferSnapshot | Install) -> str:
    match effect:
        case Fetch(to, first):
            return f"reads entry {first} and on for {node_of(to)}"
        case OfferSnapshot(to):
            return f"looks for a snapshot for {node_of(to)}"
        case Install(source, snapshot):
            return f"fetches the snapshot of {snapshot.index}/{snapshot.term} from {node_of(source)}"


def describe(message: Message) -> str:
    """One line a message; log positions are index/term."""
    match message:
        case PreVote():
            return f"PreVote for term {message.next_term}, log {message.last_index}/{message.last_term}"
        case PreVoteReply():
            word = "granted" if message.granted else f"refused ({message.reason})"
            return f"PreVote for term {message.next_term} {word}, term {message.term}"
        case Vote():
            asked = ", asked by the leader" if message.transfer else ""
            return f"Vote in term {message.term}, log {message.last_index}/{message.last_term}{asked}"
        case VoteReply():
            return f"Vote {'granted' if message.granted else f'refused ({message.reason})'}, term {message.term}"
        case Append():
            return _append_text(message)
        case AppendReply():
            return _reply_text(message)
        case SnapshotOffer():
            return f"Snapshot of {message.index}/{message.last_term}, term {message.term}"
        case TimeoutNow():
            return f"TimeoutNow, term {message.term}"


def _append_text(m: Append) -> str:
    entries = _entries([(m.prev_index + at, t, k, b) for at, (t, k, b) in enumerate(m.entries, 1)])
    at = (
        f"Append after {m.prev_index}/{m.prev_term}: {', '.join(entries)}"
        if entries
        else f"Heartbeat at {m.prev_index}"
    )
    return f"{at}; commit {m.commit}, term {m.term}"


def _reply_text(m: AppendReply) -> str:
    unwell = "" if m.ready else ", not ready"
    if m.ok:
        return f"holds {m.match}{unwell}, term {m.term}"
    if not m.conflict_first:
        return f"refused, term {m.term}"
    why = f"has term {m.conflict_term} there" if m.conflict_term else "has nothing there"
    return f"refused: {why}, look at {m.conflict_first}{unwell}, term {m.term}"
