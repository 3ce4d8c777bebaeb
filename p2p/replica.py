"""Election and journal behind one ``step()``: the only owner of the term (the idea is etcd-io/raft's ``raft.go``).

Several code paths that could change the leader made another system's leaders flap every five minutes; here there is
this one. `step(event, now)` changes the voter and answers what is to be carried out. `now` is seconds of a clock that
runs through suspend; whenever `next_deadline()` has passed, a `Tick` is due.

What depends on the disk is held back here until `Persisted` says that it is durable: no `Send` in an answer of `step`
may ever be premature.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from p2p.effects import (
    COMMAND,
    CONFIG,
    NO_MARK,
    Apply,
    Config,
    Effect,
    Entry,
    Fetch,
    HardState,
    Install,
    Mark,
    OfferSnapshot,
    Persist,
    ReadFailed,
    ReadReady,
    RoleChanged,
    Send,
    SnapshotMeta,
)
from p2p.election.core import ElectionCore
from p2p.election.rank import Timers, order
from p2p.ids import Index, Term, VoterId
from p2p.journal.core import Conflict, JournalCore
from p2p.journal.log import LogStart
from p2p.journal.progress import BATCH_BYTES, BATCH_ENTRIES, SNAPSHOT, Progress
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
)
from p2p.quorum import majority

FOLLOWER, CANDIDATE, LEADER = "follower", "candidate", "leader"
MAX_READS = 10_000
CLOSE_ENTRIES = 64  # a voter this close to the end of the log may inherit, be promoted and be handed the seat
MARKS = 8  # kept for comparison with followers that are behind or ahead
FAREWELL_SECONDS = 2.0  # how long a removed voter is still told that it was removed


# -- events ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Received:
    """A message of another voter, whose identity the transport has proved. `came`: when, on this node's clock, if it
    then waited for its turn: how long an answer was on its way is counted without that."""

    sender: VoterId
    message: Message
    came: float | None = None


@dataclass(frozen=True, slots=True)
class Propose:
    """Append these bodies, in order. Raises NotLeader."""

    bodies: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Persisted:
    """This node's disk holds every write up to number `seq`."""

    seq: int


@dataclass(frozen=True, slots=True)
class Applied:
    """The state machine holds everything up to `upto`; its newest mark, if it has one."""

    upto: Index
    mark: Mark = NO_MARK


@dataclass(frozen=True, slots=True)
class Fetched:
    """What `Fetch` asked for."""

    to: VoterId
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class SnapshotOffered:
    """What `OfferSnapshot` asked for."""

    to: VoterId
    snapshot: SnapshotMeta


@dataclass(frozen=True, slots=True)
class Installed:
    """The snapshot is the state now, and the store's log begins behind it; `source` is who offered it."""

    source: VoterId
    snapshot: SnapshotMeta


@dataclass(frozen=True, slots=True)
class InstallFailed:
    """It could not be fetched or did not verify; it will be offered again."""


@dataclass(frozen=True, slots=True)
class Compacted:
    """The store has forgotten the entries up to `upto`."""

    upto: Index


@dataclass(frozen=True, slots=True)
class Read:
    """A linearizable read wants to know how far the state must be applied. Answered by ReadReady or ReadFailed."""

    context: int


@dataclass(frozen=True, slots=True)
class Reconfigure:
    """Append this configuration. Raises NotLeader or ConfigRefused."""

    config: Config


@dataclass(frozen=True, slots=True)
class Transfer:
    """Hand the seat to `to`. Raises NotLeader or ConfigRefused."""

    to: VoterId


@dataclass(frozen=True, slots=True)
class SetFitness:
    """Whether this node may lead, and its bully priority. `why` says what is wrong; empty if nothing is."""

    priority: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Farewell:
    """`voter` is there and has a log, and does not know yet that it was removed (it was down, perhaps): a leader tells
    it by what it tells every follower, for a while. Changes nothing where it belongs to the configuration. If that
    voter has stood in a later term, its refusal ends this one, once: it can only be told in a term it accepts."""

    voter: VoterId


@dataclass(frozen=True, slots=True)
class Found:
    """This blank store is the first voter of a new cluster, of this configuration; the store has it written down."""

    config: Config


@dataclass(frozen=True, slots=True)
class Unreachable:
    """The connection to `voter` broke: what was under way to it is probably lost."""

    voter: VoterId


ReplicaEvent = (
    Tick
    | Received
    | Propose
    | Persisted
    | Applied
    | Fetched
    | SnapshotOffered
    | Installed
    | InstallFailed
    | Compacted
    | Read
    | Reconfigure
    | Transfer
    | SetFitness
    | Found
    | Unreachable
    | Farewell
)


class NotLeader(Exception):
    """This node does not lead, so it cannot append. Definitely not done."""


class ConfigRefused(Exception):
    """The change of voters is not allowed now; the message says why. Definitely not done."""


# -- what is kept between steps --------------------------------------------------------------------------------


class _Held(NamedTuple):
    """An answer that waits for write number `seq`. An Append's acknowledgement is made when it is due, from `round`."""

    seq: int
    to: VoterId
    term: Term
    reply: VoteReply | None
    round: int = 0


class _WaitingRead(NamedTuple):
    context: int
    index: Index  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    after_round: int  # a majority must acknowledge something sent after this


@dataclass(slots=True)
class _Handover:
    to: VoterId
    deadline: float
    told: bool = False


@dataclass(slots=True)
class _Seat:
    """What only a leader has."""

    progress: dict[VoterId, Progress]
    next_beat: float
    reads: deque[_WaitingRead] = field(default_factory=deque)
    reads_asked: int = 0  # every round sent for the reads that wait is later than this one
    handover: _Handover | None = None
    established: bool = False
    adapt_at: float = 0.0
    answered: float = float("-inf")  # a round sent then, at the least, was answered by a majority of these voters


def moves_nothing(message: Message) -> bool:
    """Whether a `Replica.calm` leader may let this lie until its next heartbeat."""
    return isinstance(message, AppendReply) and message.ok


class Replica:
    """One voter (or learner, or a store that is neither yet). `step` is the only way to change it."""

    def __init__(
        self,
        me: VoterId,
        hard_state: HardState,
        start: LogStart,
        *,
        applied: Index,
        now: float,
        draw: Callable[[], float],
        timers: Timers | None = None,
        priority: int = 0,
    ) -> None:
        self.me = me
        self.term = hard_state.term
        self.voted_for = hard_state.voted_for
        self.role = FOLLOWER
        self.leader: VoterId | None = None
        self.timers = timers or Timers()
        self.journal = JournalCore(me, start, applied=applied)
        if self.journal.log.last_term > self.term:  # a snapshot was installed, and its term not written before a crash
            self.term, self.voted_for = self.journal.log.last_term, None
        self.election = ElectionCore(me, self.timers, draw, now)
        self.election.priority = priority
        self.unfit = ""  # why this node must not lead, as told by `SetFitness`
        self.why = "started"
        self.installing: SnapshotMeta | None = None
        self._seat: _Seat | None = None
        self._out: list[Effect] = []
        self._held: deque[_Held] = deque()
        self._dirty = False  # term or vote changed and not yet written
        self._term_seq = self._synced = 0  # the write that carries the newest of them; the newest durable write
        self._transfer_asked = False
        self._round = 0
        self._handed_over = applied  # the last Apply told
        self._told: tuple[str, Term, VoterId | None, bool] = (FOLLOWER, self.term, None, False)
        self.marks: deque[Mark] = deque((NO_MARK,), maxlen=MARKS)
        self.dropped = 0  # messages of peers that made no sense, counted
        if self.config.voters == (me,):
            self.election.deadline = now  # nobody to wait for
        else:
            self.election.rest(now, self.config.voters)

    # -- the one way in ----------------------------------------------------------------------------------------

    def step(self, event: ReplicaEvent, now: float) -> list[Effect]:
        """Decides; the effects are to be carried out in order. Raises NotLeader or ConfigRefused for orders that
        cannot be carried out; nothing has changed then but what the time alone has changed, and its effects come with
        the next step."""
        # An answer that lay here is proof of the moment it came: what it says is heard before the seat is given up.
        came = event.came if isinstance(event, Received) and event.came is not None else now
        self._keep_seat(came)
        match event:
            case Received(sender, AppendReply() as reply):
                self._on_append_reply(sender, reply, now, came)
            case Received(sender, message):
                self._on_message(sender, message, now)
            case Persisted(seq):
                self._on_persisted(seq, now)
            case Propose(bodies):
                self._on_propose(bodies, now)
            case Applied(upto, mark):
                self.journal.applied(upto)
                if mark.index > self.marks[-1].index:
                    self.marks.append(mark)
            case Tick():
                self._on_tick(now)
            case Fetched(to, entries):
                self._on_fetched(to, entries, now)
            case Read(context):
                self._on_read(context, now)
            case SnapshotOffered(to, snapshot):
                self._on_snapshot_offered(to, snapshot, now)
            case Installed(source, snapshot):
                self._on_installed(source, snapshot, now)
            case InstallFailed():
                self.installing = None
            case Compacted(upto):
                self.journal.log.compact(upto)
            case Reconfigure(config):
                self._on_reconfigure(config, now)
            case Transfer(to):
                self._on_transfer(to, now)
            case SetFitness(priority, why):
                self.election.priority, self.unfit = priority, why
                if why and self.role != FOLLOWER:
                    self._step_down(now, why)
            case Farewell(voter):
                self._bid_farewell(voter, now)
            case Found(config):
                self.journal.log.found(config)
                self.election.deadline = now
            case Unreachable(voter):
                p = self._seat.progress.get(voter) if self._seat is not None else None
                if p is not None and p.state != SNAPSHOT:
                    p.lost()
        return self._finish(now)

    def _finish(self, now: float) -> list[Effect]:
        if self._dirty:
            self._persist((), None, now)
        told = (self.role, self.term, self.leader, self.established)
        if told != self._told:
            self._told = told
            self._out.append(RoleChanged(self.role, self.term, self.leader, self.established, self.why))
        upto = min(self.journal.commit_index, self.journal.stable_index)
        if upto > self._handed_over and self.installing is None:
            self._handed_over = upto
            self._out.append(Apply(upto))
        out, self._out = self._out, []
        return out

    @property
    def config(self) -> Config:
        return self.journal.log.config

    @property
    def established(self) -> bool:
        """Leads, and has committed an entry of its own term: it knows everything that was ever acknowledged."""
        return self._seat is not None and self._seat.established

    @property
    def progress(self) -> dict[VoterId, Progress]:
        """What a leader knows of its followers; empty for others. To look at only."""
        return self._seat.progress if self._seat is not None else {}

    @property
    def calm(self) -> bool:
        """Leads, and all have everything: no agreeing answer of a follower moves anything before the next heartbeat."""
        seat, last = self._seat, self.journal.last_index
        if seat is None or seat.reads or seat.handover is not None:
            return False
        return all(p.match == last for p in seat.progress.values())

    @property
    def transferring(self) -> bool:
        return self._seat is not None and self._seat.handover is not None

    def next_deadline(self) -> float | None:
        """When a Tick is due; None if nothing happens by itself."""
        if self._seat is not None:
            return self._seat.next_beat
        return self.election.deadline if self._may_stand_for_ever() or self.leader is not None else None

    def _may_stand_for_ever(self) -> bool:
        """A voter; and one whose removal is not known to be committed, which stands without a vote of its own: what it
        holds may be what the others lack to elect one of themselves (Ongaro §4.2.2, Figure 4.6)."""
        log = self.journal.log
        if self.me in log.config.voters:
            return True
        open_change = log.config_index > self.journal.commit_index
        return open_change and self.me in log.config_at(Index(log.config_index - 1)).voters

    # -- time --------------------------------------------------------------------------------------------------

    def _keep_seat(self, now: float) -> None:
        """A leader that has not been answered by a majority for an election timeout, or whose disk hangs, leads no
        more: before anything else, so that one that was frozen says nothing more as a leader (§8.3 of DESIGN)."""
        if self._seat is None:
            return
        began = self.journal.write_began
        if began is not None and now - began >= self.timers.disk_stall:
            self._step_down(now, "its disk does not answer")
        elif now - self._seat.answered >= self.election.timeout:  # it only grows: an old figure says less, not more
            self._seat.answered = self._quorum_contact(now)
            if now - self._seat.answered >= self.election.timeout:
                self._step_down(now, "a majority does not answer")

    def _quorum_contact(self, now: float) -> float:
        """When the newest round was sent that a majority has answered, counting this node itself."""
        assert self._seat is not None
        voters = self.config.voters
        contacts = sorted(
            (p.contact if (p := self._seat.progress.get(v)) is not None else now for v in voters), reverse=True
        )
        return contacts[majority(len(voters)) - 1]

    def _fit(self, now: float) -> bool:
        began = self.journal.write_began
        stalled = began is not None and now - began >= self.timers.disk_stall
        return not self.unfit and not stalled and self.installing is None

    def _on_tick(self, now: float) -> None:
        if self._seat is not None:
            if now >= self._seat.next_beat:
                self._beat(now)
        elif now >= self.election.deadline and (self.config.voters == (self.me,) or not self.election.excuse(now)):
            if self._may_stand_for_ever() and self._fit(now):
                self._ask_for_votes(now)
            else:
                self._forget_leader()
                self.election.rest(now, self.config.voters)

    # -- standing for election ---------------------------------------------------------------------------------

    def _ask_for_votes(self, now: float) -> None:
        """The first half: would you? Changes no term, so a voter that is cut off disturbs nobody when it returns."""
        if self.role == CANDIDATE:
            self.role = FOLLOWER
        self._forget_leader()
        voters = self.config.voters
        ballot = self.election.stand(Term(self.term + 1), voters, now, real=False)
        ballot.count(self.me, True)
        if ballot.won:
            self._campaign(now, transfer=False)
            return
        last_term, last_index = self.journal.last
        ask = PreVote(self.term, ballot.term, last_index, last_term, self.election.priority)
        for voter in voters:
            if voter != self.me:
                self._out.append(Send(voter, ask))

    def _forget_leader(self) -> None:
        if self.leader is not None:
            self.leader, self.why = None, "the leader was not heard for an election timeout"

    def _campaign(self, now: float, *, transfer: bool) -> None:
        """The second half: a new term and a vote for itself, durable before anybody is asked (Raft §5.2)."""
        self.role, self.leader = CANDIDATE, None
        self._set_term(Term(self.term + 1), self.me)
        voters = self.config.voters
        self.election.stand(self.term, voters, now, real=True)
        self._transfer_asked = transfer
        seq = self._persist((), None, now)
        self._held.append(_Held(seq, self.me, self.term, VoteReply(self.term, True, "voted")))

    def _own_vote_is_durable(self, now: float) -> None:
        ballot = self.election.ballot
        if self.role != CANDIDATE or ballot is None or not ballot.real or ballot.term != self.term:
            return
        ballot.count(self.me, True)
        if ballot.won:
            self._become_leader(now)
            return
        self.election.asked(now)
        last_term, last_index = self.journal.last
        ask = Vote(self.term, last_index, last_term, self._transfer_asked)
        for voter in ballot.voters:
            if voter != self.me:
                self._out.append(Send(voter, ask))

    def _become_leader(self, now: float) -> None:
        """A majority has voted: announce it, and commit what earlier terms left by an entry of this one (§5.4.2)."""
        self.role, self.leader, self.why = LEADER, self.me, "elected"
        self.election.ballot = None
        self.election.changed(now, self.term)
        journal = self.journal
        journal.term_start = Index(journal.last_index + 1)
        self._seat = _Seat({}, now)
        self._append((b"",), COMMAND, now)
        self._match_progress_to_config(now)
        self._beat(now)

    def _step_down(self, now: float, why: str) -> None:
        """Leads no more; the term stays."""
        if self._seat is not None:
            for read in self._seat.reads:
                self._out.append(ReadFailed(read.context))
            self._seat = None
        self.role, self.leader, self.why = FOLLOWER, None, why
        self.election.ballot = None
        self.journal.verified = self.journal.commit_index
        self.election.rest(now, self.config.voters)

    def _set_term(self, term: Term, voted_for: VoterId | None) -> None:
        assert term > self.term or (term == self.term and self.voted_for in (None, voted_for))
        if term > self.term:
            self.journal.verified = self.journal.commit_index  # what equalled an earlier leader's log says nothing now
        self.term, self.voted_for = term, voted_for
        self._dirty = True

    def _follow(self, term: Term, leader: VoterId | None, now: float, why: str) -> None:
        """Adopts a later term, or the leader of this one."""
        if self._seat is not None or self.role == CANDIDATE:
            self._step_down(now, why)
        if term > self.term:
            self._set_term(term, None)
            self.election.ballot = None
            self.leader, self.why = None, why
        if leader is not None and leader != self.leader:
            self.leader, self.why = leader, why
            self.election.changed(now, term)

    # -- writing -----------------------------------------------------------------------------------------------

    def _persist(self, entries: tuple[Entry, ...], truncate: Index | None, now: float) -> int:
        hard_state = HardState(self.term, self.voted_for) if self._dirty else None
        seq = self.journal.write(now)
        if self._dirty:
            self._dirty, self._term_seq = False, seq
        self._out.append(Persist(seq, entries, hard_state, self.journal.commit_index, truncate))
        return seq

    def _on_persisted(self, seq: int, now: float) -> None:
        self.journal.written(seq)
        self._synced = seq
        while self._held and self._held[0].seq <= seq:
            held = self._held.popleft()
            if held.to == self.me:
                if held.term == self.term:  # an earlier candidacy's vote says nothing about this one's
                    self._own_vote_is_durable(now)
            elif held.reply is not None:
                self._out.append(Send(held.to, held.reply))
            elif held.term == self.term:
                self._out.append(Send(held.to, self._acknowledgement(held.round, now)))
        if self._seat is not None:
            self._try_commit(now)

    # -- messages ----------------------------------------------------------------------------------------------

    def _on_message(self, sender: VoterId, message: Message, now: float) -> None:
        match message:
            case Append():
                self._on_append(sender, message, now)
            case PreVote():
                self._on_pre_vote(sender, message, now)
            case PreVoteReply():
                self._on_pre_vote_reply(sender, message, now)
            case Vote():
                self._on_vote(sender, message, now)
            case VoteReply():
                self._on_vote_reply(sender, message, now)
            case SnapshotOffer():
                self._on_snapshot_offer(sender, message, now)
            case TimeoutNow():
                self._on_timeout_now(sender, message, now)

    def _on_pre_vote(self, sender: VoterId, ask: PreVote, now: float) -> None:
        fit = self._fit(now) and self.me in self.config.voters
        leads = self._seat is not None
        why = (
            "lease"
            if leads and ask.next_term > self.term
            else self.election.judge(sender, ask, term=self.term, last=self.journal.last, now=now, fit=fit)
        )
        self._out.append(Send(sender, PreVoteReply(self.term, ask.next_term, not why, why)))
        if why == "higher" and self.role != CANDIDATE:
            self._ask_for_votes(now)  # the bully answers by standing itself
        elif why == "log" and fit:
            self.election.hurry(now)
        elif not why and self.election.ballot is None:
            self.election.deadline = max(self.election.deadline, now + self.timers.rank_delay)

    def _on_pre_vote_reply(self, sender: VoterId, reply: PreVoteReply, now: float) -> None:
        if reply.term > self.term:
            self._follow(reply.term, None, now, "a later term exists")
            return
        ballot = self.election.ballot
        if ballot is None or ballot.real or reply.next_term != ballot.term or self._seat is not None:
            return
        ballot.count(sender, reply.granted, reply.reason)
        if ballot.won:
            if self._fit(now):
                self._campaign(now, transfer=False)
        elif reply.reason == "higher" and not reply.granted:
            self.election.told_to_wait(now)

    def _on_vote(self, sender: VoterId, ask: Vote, now: float) -> None:
        if ask.term < self.term:
            self._out.append(Send(sender, VoteReply(self.term, False, "term")))
            return
        if not ask.transfer and ask.term > self.term and (self._seat is not None or self.election.in_lease(now)):
            # Not even its term is taken: a leader lives, and is not to be deposed by whoever did not hear it (§4.2.3).
            self._out.append(Send(sender, VoteReply(self.term, False, "lease")))
            return
        if ask.term > self.term:
            self._follow(ask.term, None, now, f"{sender} stands for election")
        behind = (ask.last_term, ask.last_index) < self.journal.last
        granted = not behind and self.voted_for in (None, sender) and self._seat is None
        if granted:
            if self.voted_for is None:
                self._set_term(self.term, sender)
            self.election.ballot = None
            self.election.rest(now, self.config.voters)
        reply = VoteReply(self.term, granted, "log" if behind else "" if granted else "voted")
        if self._dirty:
            self._held.append(_Held(self._persist((), None, now), sender, self.term, reply))
        elif self.journal.write_began is not None:
            # A vote given twice may still be on its way to the disk.
            self._held.append(_Held(self._persist((), None, now), sender, self.term, reply))
        else:
            self._out.append(Send(sender, reply))

    def _on_vote_reply(self, sender: VoterId, reply: VoteReply, now: float) -> None:
        if reply.term > self.term:
            self._follow(reply.term, None, now, "a later term exists")
            return
        ballot = self.election.ballot
        if self.role != CANDIDATE or ballot is None or not ballot.real or reply.term != ballot.term:
            return
        ballot.count(sender, reply.granted, reply.reason)
        if ballot.won:
            self._become_leader(now)

    # -- following ---------------------------------------------------------------------------------------------

    def _heard_leader(self, sender: VoterId, term: Term, now: float) -> bool:
        """Whether the sender leads this voter's term; adopts the term and the leader if so."""
        if term < self.term:
            reply = AppendReply(
                self.term, False, Index(0), Term(0), Index(0), Index(0), 0, self.election.priority, False
            )
            self._out.append(Send(sender, reply))
            return False
        if self._seat is not None and term == self.term:
            self.dropped += 1  # two leaders of one term: not ours to believe
            return False
        if term > self.term or self.role != FOLLOWER or self.leader != sender:
            if term == self.term and self.leader not in (None, sender):
                self.dropped += 1
                return False
            self._follow(term, sender, now, f"{sender} leads")
        return True

    def _on_append(self, sender: VoterId, message: Append, now: float) -> None:
        if not _configs_can_be_read(message):
            self.dropped += 1
            return
        if not self._heard_leader(sender, message.term, now):
            return
        self.election.heard(now, message.heirs, self.config.voters, message.timeout_ms / 1000)
        if self.installing is not None:
            self._acknowledge(sender, message.round, now)
            return
        outcome = self.journal.accept(message.prev_index, message.prev_term, message.entries)
        if isinstance(outcome, Conflict):
            reply = self._acknowledgement(message.round, now)._replace(
                ok=False, match=Index(0), conflict_term=outcome.term, conflict_first=outcome.first
            )
            self._out.append(Send(sender, reply))
            return
        self.journal.commit_upto(message.commit)
        if outcome.entries or outcome.truncate is not None:
            seq = self._persist(outcome.entries, outcome.truncate, now)
            self._hold(_Held(seq, sender, self.term, None, message.round))
        else:
            self._acknowledge(sender, message.round, now)

    def _acknowledge(self, to: VoterId, round: int, now: float) -> None:
        """At once, unless the term is still on its way to the disk (Raft, Figure 2): forgotten in a power cut, it would
        let an older leader cut off what was acknowledged to this one."""
        if self._dirty:
            self._persist((), None, now)
        if self._term_seq > self._synced:
            self._hold(_Held(self._term_seq, to, self.term, None, round))
        else:
            self._out.append(Send(to, self._acknowledgement(round, now)))

    def _hold(self, held: _Held) -> None:
        """Of acknowledgements to one leader that wait one behind the other, the last says what all say."""
        if self._held and held.reply is None:
            before = self._held[-1]
            if before.reply is None and (before.to, before.term, before.seq) == (held.to, held.term, held.seq):
                self._held.pop()
        self._held.append(held)

    def _acknowledgement(self, round: int, now: float) -> AppendReply:
        """What is durable here and known to equal the leader's log."""
        journal = self.journal
        match = min(journal.verified, journal.stable_index)
        ready = self._fit(now)
        return AppendReply(
            self.term,
            True,
            match,
            Term(0),
            Index(0),
            journal.last_index,
            round,
            self.election.priority,
            ready,
            *self.marks[-1],
        )

    def _on_snapshot_offer(self, sender: VoterId, offer: SnapshotOffer, now: float) -> None:
        if not self._heard_leader(sender, offer.term, now):
            return
        self.election.heard(now, self.election.heirs, self.config.voters, self.election.timeout)
        journal = self.journal
        if offer.index <= journal.commit_index or journal.log.term_at(offer.index) == offer.last_term:
            # It is here already, and so is what follows it, which may have been acknowledged.
            journal.verified = max(journal.verified, offer.index)
            journal.commit_upto(offer.index)
            self._acknowledge(sender, offer.round, now)
            return
        if self.installing is None:
            try:
                config = Config.decode(offer.config)
            except ValueError:
                self.dropped += 1
                return
            self.installing = SnapshotMeta(
                offer.index, offer.last_term, config, offer.chain, offer.name, offer.size, offer.sha256
            )
            self._out.append(Install(sender, self.installing))
        self._acknowledge(sender, offer.round, now)

    def _on_installed(self, source: VoterId, snapshot: SnapshotMeta, now: float) -> None:
        """The store's log begins behind the snapshot now, and the state machine is at it."""
        self.installing = None
        journal = self.journal
        journal.log.reset(snapshot.index, snapshot.term, snapshot.config)
        journal.forget_writes()
        journal.stable_index = journal.commit_index = journal.applied_index = snapshot.index
        journal.verified = snapshot.index
        self._handed_over = snapshot.index
        if self.leader == source:
            self._acknowledge(source, 0, now)

    # -- leading: sending --------------------------------------------------------------------------------------

    def _match_progress_to_config(self, now: float) -> None:
        assert self._seat is not None
        seats, everyone = self._seat.progress, self.config.everyone
        self._seat.answered = float("-inf")  # that was another majority
        for voter in everyone:
            known = seats.get(voter)
            if known is not None:
                known.leaving_at = None
            elif voter != self.me:
                seats[voter] = self._new_progress(voter, now)
        for voter, p in seats.items():
            if voter not in everyone and p.leaving_at is None:
                p.leaving_at = now + FAREWELL_SECONDS

    def _new_progress(self, voter: VoterId, now: float) -> Progress:
        last = self.journal.last_index  # the first probe asks for what lies before it
        return Progress(voter=voter, next=last, contact=now, steady_since=now, round_target=last, round_began=now)

    def _bid_farewell(self, voter: VoterId, now: float) -> None:
        seat = self._seat
        if seat is None or voter in (*self.config.everyone, *seat.progress, self.me):
            return
        p = seat.progress[voter] = self._new_progress(voter, now)  # the next beat speaks to it
        p.leaving_at = now + FAREWELL_SECONDS

    def _next_round(self, now: float) -> int:
        """Rounds are numbered by the time they were sent at, in microseconds, so that an answer tells it."""
        self._round = max(self._round + 1, int(now * 1e6))
        return self._round

    def _beat(self, now: float) -> None:
        """A heartbeat to everybody, and whatever time alone makes due."""
        seat = self._seat
        assert seat is not None
        seat.next_beat = now + self.timers.heartbeat
        for p in [p for p in seat.progress.values() if p.leaving_at is not None and now >= p.leaving_at]:
            del seat.progress[p.voter]
        self._prefer(now)
        if seat.handover is not None and now >= seat.handover.deadline:
            if (favourite := seat.progress.get(seat.handover.to)) is not None:
                favourite.steady_since = now  # else a favourite that cannot take the seat is offered it at every beat
            seat.handover = None  # not deposed in time: lead on
        self._adapt(now)
        heirs = self._heirs()
        for p in seat.progress.values():
            if p.under_way and now - p.sent_at >= self.timers.retransmit:
                p.lost()
            self._send_heartbeat(p, heirs, now)
            self._replicate(p, now)
        self._serve_reads(now)

    def _adapt(self, now: float) -> None:
        """Asks for a longer election timeout where a majority answers slowly, and for the usual one again when it no
        longer does (PROTOCOL §1). Looked at about once a second."""
        seat = self._seat
        assert seat is not None
        if now < seat.adapt_at:
            return
        seat.adapt_at = now + 10 * self.timers.heartbeat
        others = [seat.progress[v].slowness() for v in self.config.voters if v in seat.progress]
        known = sorted(slowness for slowness in others if slowness is not None)
        needed = majority(len(self.config.voters)) - (self.me in self.config.voters)
        if needed and len(known) >= needed:
            self.election.set_timeout(self.timers.slow_factor * known[needed - 1])

    def _timeout_ms(self) -> int:
        """What followers are told: 0 for the usual timeout."""
        slow = self.election.timeout > self.timers.election
        return round(self.election.timeout * 1000) if slow else 0

    def _send_heartbeat(self, p: Progress, heirs: tuple[VoterId, ...], now: float) -> None:
        """Behind what the follower is known to have, so that it is never refused; an answer tells what it lacks."""
        journal = self.journal
        prev, prev_term = p.match, journal.log.term_at(p.match)
        if prev_term is None:
            prev, prev_term = Index(0), Term(0)
        round = self._next_round(now)
        beat = Append(self.term, prev, prev_term, (), journal.commit_index, round, heirs, self._timeout_ms())
        self._out.append(Send(p.voter, beat))

    def _heirs(self) -> tuple[VoterId, ...]:
        """Who should stand if this leader dies: those that are well and nearly up to date, the highest first."""
        assert self._seat is not None
        voters = set(self.config.voters)
        close = self.journal.last_index - CLOSE_ENTRIES
        able = [
            p
            for v, p in self._seat.progress.items()
            if v in voters and p.ready and not p.regressed and p.match >= close
        ]
        return tuple(p.voter for p in sorted(able, key=lambda p: order(p.priority, p.voter), reverse=True))

    def _replicate(self, p: Progress, now: float) -> None:
        """As many batches as may be under way at once."""
        journal = self.journal
        while p.next <= journal.last_index and p.may_send():
            prev = Index(p.next - 1)
            prev_term = journal.log.term_at(prev)
            if prev_term is None:
                self._offer(p, now)
                return
            last = Index(min(p.next + BATCH_ENTRIES - 1, journal.last_index))
            entries = journal.log.slice(p.next, last)
            if entries is None:
                p.fetching = True
                self._out.append(Fetch(p.voter, p.next, BATCH_ENTRIES, BATCH_BYTES))
                return
            self._send_entries(p, prev, prev_term, entries, now)

    def _send_entries(self, p: Progress, prev: Index, prev_term: Term, entries: list[Entry], now: float) -> None:
        size, fitting = 0, 0
        for entry in entries:
            size += len(entry.body)
            fitting += 1
            if size >= BATCH_BYTES:
                break
        batch = tuple((e.term, e.kind, e.body) for e in entries[:fitting])
        message = Append(
            self.term,
            prev,
            prev_term,
            batch,
            self.journal.commit_index,
            self._next_round(now),
            self._heirs(),
            self._timeout_ms(),
        )
        p.sent(Index(prev + fitting), now)
        self._out.append(Send(p.voter, message))

    def _on_fetched(self, to: VoterId, entries: tuple[Entry, ...], now: float) -> None:
        p = self._seat.progress.get(to) if self._seat is not None else None
        if p is None or not p.fetching:
            return
        p.fetching = False
        prev_term = self.journal.log.term_at(Index(p.next - 1))
        if not entries or entries[0].index != p.next or prev_term is None or p.state == SNAPSHOT:
            return  # the world has moved on; the next beat looks again
        if any(self.journal.log.term_at(e.index) != e.term for e in entries):
            return
        self._send_entries(p, Index(p.next - 1), prev_term, list(entries), now)
        self._replicate(p, now)

    def _offer(self, p: Progress, now: float) -> None:
        p.state = SNAPSHOT
        p.under_way.clear()
        if now - p.offered_at >= self.timers.offer_again:
            p.offered_at = now
            self._out.append(OfferSnapshot(p.voter))

    def _on_snapshot_offered(self, to: VoterId, s: SnapshotMeta, now: float) -> None:
        p = self._seat.progress.get(to) if self._seat is not None else None
        if p is None or p.state != SNAPSHOT:
            return
        p.offered = s.index
        offer = SnapshotOffer(
            self.term, s.index, s.term, s.config.encode(), s.chain, s.name, s.size, s.sha256, self._next_round(now)
        )
        self._out.append(Send(to, offer))

    # -- leading: counting -------------------------------------------------------------------------------------

    def _on_append_reply(self, sender: VoterId, reply: AppendReply, now: float, came: float) -> None:
        if reply.term > self.term:
            self._follow(reply.term, None, now, "a later term exists")
            return
        seat = self._seat
        p = seat.progress.get(sender) if seat is not None and reply.term == self.term else None
        if seat is None or p is None or reply.round > self._round:
            return
        self._note_contact(p, reply, now, came)
        self._compare(p, Mark(reply.mark_index, reply.digest))
        if reply.last_index < p.match and reply.round > p.match_round:
            p.regressed = True
        if p.regressed:
            return
        if reply.ok:
            self._on_match(p, reply, now)
        else:
            self._on_conflict(p, reply, now)
        self._serve_reads(now)
        self._continue_handover(p, now)

    def _compare(self, p: Progress, mark: Mark) -> None:
        """With this voter's own mark of the same entry, if it has one by the same rules."""
        for mine in self.marks:
            if mark.index and mine.index == mark.index and mine.rules == mark.rules:
                p.agrees = mine.digest == mark.digest and p.agrees is not False

    def _note_contact(self, p: Progress, reply: AppendReply, now: float, came: float) -> None:
        """It is alive, as of the moment the round it answers was sent."""
        sent = reply.round / 1e6
        p.acked_round = max(p.acked_round, reply.round)
        if sent - p.contact >= self.election.timeout or not reply.ready or not p.ready:
            p.steady_since = now
        p.contact = max(p.contact, min(sent, now))
        if reply.round:  # an installed snapshot is told of unasked: that is no answer
            p.answers.append(max(came - sent, 0.0))
        p.priority, p.ready = reply.priority, reply.ready

    def _on_match(self, p: Progress, reply: AppendReply, now: float) -> None:
        before = p.match
        p.matched(min(reply.match, self.journal.last_index), now, self._round)
        if p.match >= p.round_target:
            p.round_seconds = now - p.round_began
            p.round_target, p.round_began = self.journal.last_index, now
        if p.match > before:
            self._try_commit(now)
        if self._seat is not None:
            if p.state == SNAPSHOT:
                self._offer(p, now)
            self._replicate(p, now)

    def _on_conflict(self, p: Progress, reply: AppendReply, now: float) -> None:
        """Back to where the logs may agree, a term at a time (Raft §5.3, the optimization at its end)."""
        first = reply.conflict_first
        if reply.conflict_term and (mine := self.journal.log.last_of(reply.conflict_term)) is not None:
            first = min(Index(mine + 1), max(reply.last_index, first))
        if p.state == SNAPSHOT or first <= p.match or reply.round <= p.refused_round:
            return  # an old answer
        p.refused_round = self._round
        p.probe_from(min(first, Index(self.journal.last_index + 1)))
        self._replicate(p, now)

    def _try_commit(self, now: float) -> None:
        seat = self._seat
        assert seat is not None
        match = {voter: p.match for voter, p in seat.progress.items() if not p.regressed}
        if not self.journal.commit_by(match, self.config.voters):
            return
        if not seat.established:
            seat.established = True
        if self.journal.commit_index >= self.journal.log.config_index and self.me not in self.config.voters:
            self._beat(now)  # the others learn that it is committed
            self._step_down(now, "it was removed from the voters")

    # -- orders ------------------------------------------------------------------------------------------------

    def _append(self, bodies: tuple[bytes, ...], kind: int, now: float) -> None:
        entries = self.journal.append(self.term, bodies, kind)
        self._persist(entries, None, now)

    def _on_propose(self, bodies: tuple[bytes, ...], now: float) -> None:
        seat = self._seat
        if seat is None:
            raise NotLeader("this node does not lead")
        if seat.handover is not None:
            raise NotLeader("the leader is handing its seat over")
        self._append(bodies, COMMAND, now)
        for p in seat.progress.values():
            self._replicate(p, now)

    def _on_read(self, context: int, now: float) -> None:
        """Ongaro §6.4: the index is what was committed when the read came; it holds once a majority has confirmed,
        after the read came, that this node still led then."""
        seat = self._seat
        if seat is None or not seat.established or len(seat.reads) >= MAX_READS:
            self._out.append(ReadFailed(context))
            return
        others = [voter for voter in self.config.voters if voter != self.me]
        if not others:
            self._out.append(ReadReady(context, self.journal.commit_index))
            return
        idle = not seat.reads
        seat.reads.append(_WaitingRead(context, self.journal.commit_index, self._round))
        if idle:
            self._ask_for_reads(now)

    def _ask_for_reads(self, now: float) -> None:
        """One round for all reads that wait; those that come while it is under way share the next one."""
        seat = self._seat
        assert seat is not None
        seat.reads_asked = self._round
        heirs = self._heirs()
        for p in seat.progress.values():
            self._send_heartbeat(p, heirs, now)

    def _serve_reads(self, now: float) -> None:
        seat = self._seat
        if seat is None or not seat.reads:
            return
        rounds = sorted(map(self._confirmed_round, self.config.voters), reverse=True)
        confirmed = rounds[majority(len(rounds)) - 1]
        while seat.reads and seat.reads[0].after_round < confirmed:
            read = seat.reads.popleft()
            self._out.append(ReadReady(read.context, read.index))
        if seat.reads and seat.reads_asked < confirmed and seat.reads[0].after_round > seat.reads_asked:
            self._ask_for_reads(now)

    def _confirmed_round(self, voter: VoterId) -> int:
        """The newest round in which the voter has confirmed that it follows. One that has lost its disk confirms
        nothing: it may have forgotten that it voted for a later leader (PROTOCOL §2.10)."""
        if voter == self.me:
            return self._round + 1
        p = self.progress.get(voter)
        return p.acked_round if p is not None and not p.regressed else 0

    def _on_reconfigure(self, config: Config, now: float) -> None:
        """One voter more or one less at a time, and only when nothing of the kind is uncommitted and this term has
        committed an entry (Ongaro's fix of 2015: without it two leaders' changes can have disjoint majorities)."""
        seat = self._seat
        if seat is None:
            raise NotLeader("this node does not lead")
        old = self.config
        config = Config(tuple(sorted(set(config.voters))), tuple(sorted(set(config.learners))))
        if not seat.established:
            raise ConfigRefused("this term has not committed an entry yet")
        if self.journal.log.config_index > self.journal.commit_index:
            raise ConfigRefused("another change of voters is not committed yet")
        if seat.handover is not None:
            raise ConfigRefused("the leader is handing its seat over")
        if not config.voters:
            raise ConfigRefused("a cluster has at least one voter")
        if len(set(old.voters) ^ set(config.voters)) > 1:
            raise ConfigRefused("only one voter may be added or removed at a time")
        if set(config.voters) & set(config.learners):
            raise ConfigRefused("a voter is no learner")
        for voter in set(config.voters) - set(old.voters):
            p = seat.progress.get(voter)
            if voter not in old.learners or p is None or not self._keeps_up(p, now):
                raise ConfigRefused(f"{voter} is not up to date: it must be a learner first")
        if config == old:
            return
        self._append((config.encode(),), CONFIG, now)
        self._match_progress_to_config(now)
        for p in seat.progress.values():
            self._replicate(p, now)

    def _keeps_up(self, p: Progress, now: float) -> bool:
        """A learner that is dead or has lost its disk must not be counted on, however much it once held."""
        heard = now - p.contact < self.election.timeout
        return heard and not p.regressed and p.match + CLOSE_ENTRIES >= self.journal.commit_index

    # -- handing over ------------------------------------------------------------------------------------------

    def _on_transfer(self, to: VoterId, now: float) -> None:
        seat = self._seat
        if seat is None:
            raise NotLeader("this node does not lead")
        p = seat.progress.get(to)
        if to not in self.config.voters or p is None:
            raise ConfigRefused(f"{to} is not a voter other than the leader")
        if not p.ready or p.regressed or p.match + CLOSE_ENTRIES < self.journal.last_index:
            raise ConfigRefused(f"{to} is not well or not up to date")
        if seat.handover is None:
            seat.handover = _Handover(to, now + self.election.timeout)
            self._continue_handover(p, now)
        elif seat.handover.to != to:
            raise ConfigRefused(f"the leader is handing its seat over to {seat.handover.to}")

    def _continue_handover(self, p: Progress, now: float) -> None:
        seat = self._seat
        if seat is None or seat.handover is None or seat.handover.to != p.voter or seat.handover.told:
            return
        if p.match == self.journal.last_index:
            seat.handover.told = True
            self._out.append(Send(p.voter, TimeoutNow(self.term, self.journal.last_index)))

    def _on_timeout_now(self, sender: VoterId, message: TimeoutNow, now: float) -> None:
        if message.term != self.term or self.leader != sender or self.me not in self.config.voters:
            return
        if self._fit(now):
            self._campaign(now, transfer=True)

    def _prefer(self, now: float) -> None:
        """Bully's preemption, the only way it may happen: this leader gives its seat to a voter of higher priority that
        has long been well. The favourite never campaigns against a live leader (PROTOCOL §2.4)."""
        seat = self._seat
        assert seat is not None
        if seat.handover is not None or not seat.established:
            return
        if not any(p.priority > self.election.priority for p in seat.progress.values()):
            return
        if self.election.since_change(now) < self.timers.preempt_since_change:
            return
        steady = self.election.preempt_after(now)
        heirs = self._heirs()
        best = seat.progress[heirs[0]] if heirs else None
        if (
            best is not None
            and best.priority > self.election.priority
            and now - best.steady_since >= steady
            and now - best.contact < self.election.timeout
            and best.match + CLOSE_ENTRIES >= self.journal.last_index
        ):
            seat.handover = _Handover(best.voter, now + self.election.timeout)
            self._continue_handover(best, now)

    # -- checking ----------------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Raises AssertionError if this voter contradicts itself; run after every step under test."""
        self.journal.check_invariants()
        assert (self.role == LEADER) == (self._seat is not None)
        assert self.role != LEADER or self.leader == self.me
        assert self._handed_over <= self.journal.commit_index
        if self._seat is not None:
            assert all(p.match <= self.journal.last_index for p in self._seat.progress.values() if not p.regressed)


def _configs_can_be_read(message: Append) -> bool:
    for _, kind, body in message.entries:
        if kind == CONFIG:
            try:
                Config.decode(body)
            except ValueError:
                return False
    return True
