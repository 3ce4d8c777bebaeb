"""Who is alive, decided from (event, now) alone: SWIM with Lifeguard's refinements. Sans-IO.

`step` is the only mutator and returns what the shell (`p2p.transport.gossip`) is to do, in order. What `core` does not
decide: how messages travel, who is a voter, who leads, and where work goes (PROTOCOL §2.25).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import ceil, log2
from typing import Any, NamedTuple

from p2p.ids import ClusterId, NodeId
from p2p.membership import anchors
from p2p.membership.awareness import Awareness
from p2p.membership.broadcast import Broadcasts, Feed, retransmit_limit
from p2p.membership.events import (
    Answered,
    Changed,
    Conflict,
    Effect,
    Event,
    Failed,
    Garbled,
    Hinted,
    Joined,
    JoinFailed,
    JoinThrough,
    Leave,
    LoopLag,
    Met,
    Refused,
    Reply,
    Requested,
    Send,
    SetCluster,
    SetMeta,
    Tick,
    Updated,
)
from p2p.membership.figures import (
    MAX_CLAIMS,
    MAX_DETAIL_CHARS,
    MAX_MEMBERS,
    MAX_RELAYS,
    MAX_RIVALS,
    MAX_SEEDS,
    MAX_TOMBSTONES,
    Figures,
)
from p2p.membership.hint import NO_LEADER, LeaderHint
from p2p.membership.member import MalformedMessage, Member, MembershipError, Meta, State, checked_meta
from p2p.membership.message import (
    MAX_PATIENCE_MS,
    Ack,
    Body,
    Digest,
    FullState,
    Join,
    Message,
    Nack,
    News,
    Ping,
    Probe,
    Refuse,
    Welcome,
)
from p2p.membership.pending import (
    AnchorPing,
    Claim,
    Direct,
    Indirect,
    JoinTry,
    OwnProbe,
    Pending,
    Relay,
    Sync,
    Told,
)
from p2p.membership.roster import Roster
from p2p.membership.rota import Draw
from p2p.membership.suspicion import Suspicion, least_seconds
from p2p.membership.timers import Timers

ENVELOPE_BYTES = 96  # of a message without its names and updates
FEED_UPDATES = 32  # changes looked at for one reply to an outbound-only member
SWEEP_SECONDS = 10.0  # how often questions whose answer the shell lost are given up
FORGET_SECONDS = 60.0  # how often tombstones are looked through
AGAIN_SECONDS = 3.0  # after at most this a joiner compares with the one who let it in: others came at the same time
BLANK_RETRY_SECONDS = 1.0  # a full comparison with one who is still blank is tried again after this

PROBE, HELP, GOSSIP, SYNC, RECONNECT, ANCHOR, FORGET, SWEEP = (
    *("probe", "help", "gossip", "sync", "reconnect", "anchor", "forget", "sweep"),
)


class Transition(NamedTuple):
    """One line of a member's story."""

    at: float
    node: NodeId
    old: str  # "" for one never heard of
    new: str
    incarnation: int
    why: str


class MembershipCore:
    """One node's view of all members. Built from its own first record; `draw` is its only randomness.

    `members` (this node's own record among them), `leader_hint`, `health` and `stats` are to be read, not changed.
    """

    def __init__(self, me: Member, draw: Draw, now: float, figures: Figures | None = None) -> None:
        self.figures = figures = figures or Figures()
        self.node = me.node
        self.leader_hint: LeaderHint = NO_LEADER
        self.health = Awareness(highest=figures.health_max, silent=figures.health_silent, enabled=figures.lifeguard)
        self.stats: Counter[str] = Counter()
        self.leaving = False
        self.displaced_by: Member | None = None  # the older process that keeps this node's name
        self._roster = Roster(replace(me, meta=checked_meta(me.meta)), draw, figures)
        self._broadcasts = Broadcasts()
        self._feed = Feed()
        self._suspicions: dict[NodeId, Suspicion] = {}
        self._heard_at: dict[NodeId, float] = {}
        self._story: deque[Transition] = deque(maxlen=figures.story_entries)
        self._draw = draw
        self._now = now
        self._out: list[Effect] = []
        self._sent = 0
        self._pending: dict[int, tuple[float, Pending]] = {}
        self._probe: OwnProbe | None = None
        self._relays = 0
        self._claims = 0
        self._gossiped_at = now - figures.gossip_interval_seconds
        self._hint_sends = 0
        self._hinted_at = now - figures.hint_gap_seconds
        self._late_at = now - figures.probe_interval_seconds
        self._rivals: dict[str, int] = {}  # boot -> the incarnation we have already outbid
        self._met: set[ClusterId] = set()
        self._anchor_turn = 0
        self._anchors_stale = True
        self._shunned: dict[NodeId, float] = {}  # anchors that did not answer, and until when they are passed over
        self._timers = self._first_timers()

    # --- what is known --------------------------------------------------------------------------------------------

    @property
    def me(self) -> Member:
        return self._roster.members[self.node]

    @property
    def members(self) -> Mapping[NodeId, Member]:
        """Everybody heard of, by node id: this node, the living, the dead and the left."""
        return self._roster.members

    @property
    def size(self) -> int:
        """Members here (alive or suspect), this node among them."""
        return self._roster.size

    @property
    def digest(self) -> bytes:
        return self._roster.digest()

    def heard_at(self, node: NodeId) -> float | None:
        """When the member last spoke with this node directly; None if it has not."""
        return self._heard_at.get(node)

    def gone_at(self, node: NodeId) -> float | None:
        """When the member died or left; None if it has not."""
        return self._roster.gone_at.get(node)

    def story(self, node: NodeId) -> list[Transition]:
        """The newest transitions of a member, oldest first; all members share a bounded log."""
        return [line for line in self._story if line.node == node]

    def next_deadline(self) -> float | None:
        """When a `Tick` is due at the latest; None once this node has left."""
        return self._timers.next()

    # --- the one mutator ------------------------------------------------------------------------------------------

    def step(self, event: Event, now: float) -> list[Effect]:
        """Takes in one event. Raises MalformedMessage (state untouched, counted), InvalidMeta, or MembershipError."""
        assert now >= self._now, f"time went from {self._now} back to {now}"
        if type(event) is Requested or type(event) is Answered:
            self._check(event)
        self._now = now
        due = self._timers.next()
        if due is not None and now - due > self.figures.lag_seconds:
            self._woke_late(now - due)
        out: list[Effect] = []
        self._out = out
        self._HANDLERS[type(event)](self, event)
        return out

    def _check(self, event: Requested | Answered) -> None:
        """Refuses what no honest peer sends, before anything is changed."""
        message = event.message
        body = message.body
        if isinstance(event, Answered):
            if isinstance(body, Ping | Probe | News | Digest | Join):
                self._malformed("a request came as an answer")
        elif isinstance(body, Ack | Nack | Welcome | Refuse):
            self._malformed("an answer came as a request")
        elif isinstance(body, Join):
            member = body.member
            named = (message.sender, message.boot, message.cluster) == (member.node, member.boot, member.cluster)
            if not named or member.state is not State.ALIVE:
                self._malformed("a node can only join for itself, alive")

    def _malformed(self, why: str) -> None:
        self.stats["malformed"] += 1
        raise MalformedMessage(why)

    def _woke_late(self, late: float) -> None:
        """This node slept. What it waited for may lie unread: everything gets that time again (PROTOCOL §2.15b).

        At most once a probe interval, so that a node that is always late still comes to its conclusions.
        """
        if not self.figures.lifeguard or self._now - self._late_at < self.figures.probe_interval_seconds:
            return
        self._late_at = self._now
        self.stats["late"] += 1
        self.health.add(min(1 + int(late), self.figures.health_silent))
        more = late + self.figures.probe_timeout_seconds
        self._timers.postpone(more)
        if GOSSIP in self._timers:
            self._timers.set(GOSSIP, self._now)  # what is to be told is the more urgent
        if self._probe:
            self._probe.deadline += more
        for suspicion in self._suspicions.values():
            suspicion.postpone(more)

    # --- time -----------------------------------------------------------------------------------------------------

    def _first_timers(self) -> Timers:
        figures, draw, now = self.figures, self._draw, self._now
        timers = Timers()
        timers.set(PROBE, now + draw.random() * figures.probe_interval_seconds)
        timers.set(SYNC, now + draw.random() * figures.push_pull_seconds)
        timers.set(RECONNECT, now + draw.random() * figures.reconnect_seconds)
        timers.set(FORGET, now + FORGET_SECONDS)
        timers.set(SWEEP, now + SWEEP_SECONDS)
        if self.me.address is None:
            timers.set(ANCHOR, now)
        return timers

    def on_tick(self, _: Tick) -> None:
        while (key := self._timers.pop_due(self._now)) is not None:
            match key:
                case ("suspect", str(node)):
                    self._suspicion_ended(NodeId(node))
                case ("answer", int(id_)):
                    self._on_silence(id_)
                case ("again", str(node)):
                    self._compare([NodeId(node)] if NodeId(node) in self._roster.dialable else [])
                case _:
                    self._TIMERS[str(key)](self)

    def _on_silence(self, id_: int) -> None:
        """A question whose asker waits here has had its time."""
        if (entry := self._pending.pop(id_, None)) is not None:
            self._no_answer(entry[1])

    def _sweep(self) -> None:
        """The shell answers every `Send`, one way or the other. Should it not, nothing is kept for ever."""
        self._timers.set(SWEEP, self._now + SWEEP_SECONDS)
        for id_ in [id_ for id_, (deadline, _) in self._pending.items() if deadline + SWEEP_SECONDS < self._now]:
            self._on_silence(id_)

    def _forget(self) -> None:
        self._timers.set(FORGET, self._now + FORGET_SECONDS)
        for node in self._roster.forget(self._now):
            self._drop(node)

    def _drop(self, node: NodeId) -> None:
        self._broadcasts.drop(node)
        self._heard_at.pop(node, None)
        self._shunned.pop(node, None)
        self._feed.forget(node)
        self._end_suspicion(node)

    # --- sending --------------------------------------------------------------------------------------------------

    def _message(self, to: NodeId | None, body: Body, updates: tuple[Member, ...]) -> Message:
        me = self.me
        return Message(self.node, me.boot, me.cluster, to, self.leader_hint, updates, body)

    def _send(
        self,
        member: Member,
        body: Body,
        timeout: float,
        pending: Pending | None = None,
        updates: tuple[Member, ...] | None = None,
    ) -> int:
        """Sends to a member that can be dialled, with what fits on top unless `updates` says what."""
        assert member.address is not None, f"{member.node} cannot be dialled"
        if updates is None:
            updates = self._piggyback(member.node, member.boot, member.cluster)
        return self._post(member.address, member.node, body, timeout, pending, updates)

    def _post(
        self,
        address: str,
        node: NodeId | None,
        body: Body,
        timeout: float,
        pending: Pending | None,
        updates: tuple[Member, ...] = (),
    ) -> int:
        self._sent += 1
        if pending is not None:
            self._pending[self._sent] = (self._now + timeout, pending)
        message = self._message(node, body, updates)
        self._out.append(Send(self._sent, address, node, message, pending is not None, timeout))
        return self._sent

    def _reply(self, ticket: int, asker: Message, body: Body) -> None:
        updates: tuple[Member, ...] = ()
        if not isinstance(body, FullState | Welcome | Refuse):
            updates = self._piggyback(asker.sender, asker.boot, asker.cluster, asker=asker)
        self._out.append(Reply(ticket, self._message(asker.sender, body, updates)))

    def _piggyback(
        self, peer: NodeId, boot: str, cluster: ClusterId, *, asker: Message | None = None
    ) -> tuple[Member, ...]:
        """What rides along. First what the peer must hear about itself: that it is suspected, or taken for dead, or
        that another process has its name (Lifeguard's buddy system, §IV-C). Then, if it has just passed on a rumour
        about this node, how that was refuted.

        On a reply, to `asker`, what this node says of itself does not count as sent. The asker may have given up: a
        node that slept answers a pile of old questions first, and its refutation, spent on those, would reach nobody.
        """
        if cluster != self.me.cluster:
            return ()
        names = 2 * len(self.node) + len(boot) + len(cluster) + len(peer) + len(self.leader_hint.address or "")
        budget = self.figures.message_bytes - ENVELOPE_BYTES - names
        updates: list[Member] = []
        known = self._roster.get(peer)
        if known is not None and (known.state is not State.ALIVE or known.boot != boot):
            updates.append(known)
            budget -= known.size()
        but = [peer]
        if asker is not None:
            but += (record.node for record in asker.updates)  # it has just told us
            if any(self._rumour(record) for record in asker.updates):
                updates.append(self.me)
                budget -= self.me.size()
        if known is not None and known.address is None and known.state.here:
            self._feed_to(peer, budget, updates)
        elif self._broadcasts:
            uncounted = None if asker is None else self.node
            updates += self._broadcasts.take(budget, self._retransmits(), but=but, uncounted=uncounted)
        return tuple(updates)

    def _rumour(self, record: Member) -> bool:
        return record.node == self.node and record.state is not State.ALIVE and self.me.overrides(record)

    def _feed_to(self, peer: NodeId, budget: int, updates: list[Member]) -> None:
        """Adds what an outbound-only member, who is never called, has not heard from this node yet."""
        taken = 0
        self._feed.listener(peer)
        for number, node in self._feed.unheard(peer, FEED_UPDATES):
            member = self._roster.get(node)
            if member is not None and node != peer and member not in updates:
                if taken + member.size() > budget:
                    break
                taken += member.size()
                updates.append(member)
            self._feed.told(peer, number)

    def _retransmits(self) -> int:
        return retransmit_limit(self._roster.size, self.figures.retransmit_mult)

    # --- gossip ---------------------------------------------------------------------------------------------------

    def _arm_gossip(self) -> None:
        """A round is due only while there is something to tell and somebody to tell it to: idle gossip is silent."""
        if GOSSIP in self._timers or self.leaving or self.displaced_by:
            return
        if not self._roster.dialable:
            self._broadcasts.clear()  # who comes is welcomed with everything
            return
        if self._broadcasts or self._hint_sends:
            at = max(self._now, self._gossiped_at + self.figures.gossip_interval_seconds)
            self._timers.set(GOSSIP, at)

    def _gossip(self) -> None:
        self._gossiped_at = self._now
        told = False
        for node in self._roster.dialable.pick(self.figures.gossip_fanout):
            member = self._roster.members[node]
            if member.cluster != self.me.cluster:
                continue  # one of the two is blank and would refuse it
            updates = self._piggyback(node, member.boot, member.cluster)
            if updates or self._hint_sends:
                self._hint_sends = max(self._hint_sends - 1, 0)
                self._send(member, News(), self.figures.probe_interval_seconds, updates=updates)
                told = True
        if not told and len(self._roster.dialable) <= self.figures.gossip_fanout:
            self._broadcasts.clear()  # what is left is about the very ones it could be told to
        self._arm_gossip()

    def on_hint(self, hint: LeaderHint) -> None:
        """A higher term, or a leader where none was known: passed on at once, not at the next round."""
        if not hint.beats(self.leader_hint):
            return
        self.leader_hint = hint
        self._hint_sends = self._retransmits()
        self._out.append(Hinted(hint))
        if self.leaving or self.displaced_by:
            return
        if self._now - self._hinted_at >= self.figures.hint_gap_seconds:
            self._hinted_at = self._now
            self._timers.cancel(GOSSIP)
            self._gossip()
        self._arm_gossip()

    # --- push/pull ------------------------------------------------------------------------------------------------

    def _sync(self) -> None:
        figures, size = self.figures, self._roster.size
        scale = 1 + max(ceil(log2(size / figures.push_pull_scale_from)), 0)
        self._timers.set(SYNC, self._now + figures.push_pull_seconds * scale)
        self._compare(self._roster.dialable.pick(1))

    def _reconnect(self) -> None:
        """The other half of a healed partition is dead to this one: somebody has to try."""
        self._timers.set(RECONNECT, self._now + self.figures.reconnect_seconds)
        self._compare(self._roster.lost.pick(1))

    def _compare(self, nodes: list[NodeId]) -> None:
        for node in nodes:
            self._send(self._roster.members[node], Digest(self.digest), self.figures.request_timeout_seconds, Sync())

    def _push(self, address: str, node: NodeId, theirs: FullState) -> None:
        """Sends what they lack."""
        lacking = tuple(self._roster.difference(theirs))
        if lacking:
            state = self._roster.state_of(lacking, self._now)
            self._post(address, node, state, self.figures.request_timeout_seconds, Told())

    def _merge_state(self, state: FullState, sender: NodeId, *, spread: bool) -> None:
        """Their dead are only suspects here: whoever is alive gets the chance to refute (memberlist's rule)."""
        for record in state.members:
            known = self._roster.get(record.node)
            if not record.state.here and known is None:
                self._bury(record, state.ages.get(record.node, 0))
                continue
            doubted = record.state is State.DEAD and known is not None and known.state.here
            told = record.as_(State.SUSPECT, by=sender) if doubted else record
            self._hear(told, sender, "full state", spread=spread or known is not None)

    def _bury(self, record: Member, age: int) -> None:
        """Takes over a tombstone of one never met, with its age."""
        full = len(self._roster.gone_at) >= MAX_TOMBSTONES
        if age < self.figures.tombstone_seconds and not full and self._ours(record) and record.node != self.node:
            self._put(record, "full state", spread=False)
            self._roster.gone_at[record.node] = self._now - age

    # --- merging --------------------------------------------------------------------------------------------------

    def _listen(self, message: Message) -> None:
        """What every accepted message says besides its body."""
        self._heard(message.sender, message.boot)
        if message.cluster != self.me.cluster:
            self._meet(message)
            return  # across the edge between blank and not blank, only joins tell about others
        if message.hint.beats(self.leader_hint):
            self.on_hint(message.hint)
        for record in message.updates:
            self._hear(record, message.sender, "gossip")

    def _heard(self, node: NodeId, boot: str) -> None:
        known = self._roster.get(node)
        if known is not None and known.boot == boot:
            self._heard_at[node] = self._now
            if self._probe is not None and self._probe.target.node == node:
                self._acked(self._probe)

    def _meet(self, message: Message) -> None:
        if message.cluster and message.cluster not in self._met and len(self._met) < MAX_RIVALS:
            self._met.add(message.cluster)
            known = self._roster.get(message.sender)
            self._out.append(Met(message.cluster, message.sender, known.address if known else None))

    def _ours(self, record: Member) -> bool:
        """Whether the record may be believed here: it is of this cluster, or blank, or this node is."""
        if record.cluster and self.me.cluster and record.cluster != self.me.cluster:
            self.stats["foreign_records"] += 1
            return False
        return True

    def _hear(self, record: Member, sender: NodeId, why: str, *, spread: bool = True) -> None:
        """One record from somebody else."""
        old = self._roster.members.get(record.node)
        if record.node == self.node:
            self._hear_of_me(record)
            return
        if old is not None and old.incarnation > record.incarnation:
            return  # most of what is heard is old
        if not self._ours(record):
            return
        if old is None and record.state.here and self._roster.size >= MAX_MEMBERS:
            self.stats["full"] += 1
        elif old is None or record.overrides(old):
            self._put(record, why if record.by is None else f"{why}; {record.by} says so", spread=spread)
        elif record.state is State.SUSPECT and record == old:
            self._confirm(old, record.by or sender)

    def _put(self, record: Member, why: str, *, spread: bool = True) -> None:
        """Believes a record, and everything that follows from it."""
        node = record.node
        old = self._roster.get(node)
        self._roster.put(record, self._now)
        self._feed.changed(node)
        if spread:
            self._broadcasts.put(record)
        self._end_suspicion(node)
        if record.state is State.SUSPECT:
            self._suspicions[node] = suspicion = Suspicion(
                record.by or node, self._now, self._roster.size, self.figures
            )
            self._timers.set(("suspect", node), suspicion.deadline)
        elif not record.state.here:
            self._heard_at.pop(node, None)
            self._feed.forget(node)
        self._tell(record, old, why)
        self._arm_gossip()

    def _tell(self, record: Member, old: Member | None, why: str) -> None:
        if old is None or old.state is not record.state or old.boot != record.boot:
            self._anchors_stale = True
            before = "" if old is None else str(old.state)
            self._story.append(Transition(self._now, record.node, before, str(record.state), record.incarnation, why))
            self._out.append(Changed(record, old))
        else:
            self._anchors_stale |= old.address != record.address
            self._out.append(Updated(record, old))

    # --- this node's own record -----------------------------------------------------------------------------------

    def _announce(self, incarnation: int | None = None, **changes: Any) -> None:
        me = self.me
        new = replace(me, incarnation=max(incarnation or 0, me.incarnation + 1), **changes)
        self._roster.put(new, self._now)
        self._feed.changed(self.node)
        self._broadcasts.put(new)
        self._arm_gossip()

    def _hear_of_me(self, record: Member, *, joining: bool = False) -> None:
        """Refutes rumours by the next incarnation (SWIM §4.2); a rival for the name is another matter."""
        me = self.me
        if self.leaving or self.displaced_by or record.incarnation < me.incarnation:
            return
        if record.boot != me.boot:
            self._hear_of_rival(record, joining=joining)
        elif record.state is not State.ALIVE or record.incarnation > me.incarnation:
            self.stats["refutations"] += 1
            self.health.add(1)
            self._announce(record.incarnation + 1)
            why = f"refuted {record.by or 'a rumour'}"
            self._story.append(Transition(self._now, self.node, str(record.state), "alive", self.me.incarnation, why))

    def _hear_of_rival(self, record: Member, *, joining: bool) -> None:
        """Another process under this name, at our incarnation or above. An earlier life of ours is simply outbid."""
        me = self.me
        older = (me.started_ms, me.boot) < (record.started_ms, record.boot)
        outbid = self._rivals.get(record.boot)
        if not record.state.here or joining:
            pass
        elif older:
            if outbid is None:
                self._out.append(Conflict(me, record, ours=False))
        elif outbid is not None and record.incarnation > outbid:
            # What we outbid has outbid us: it lives, and it was here first. We stop defending the name.
            self.displaced_by = record
            self._fall_silent()
            self._out.append(Conflict(record, me, ours=True))
            return
        if len(self._rivals) < MAX_RIVALS or record.boot in self._rivals:
            self._rivals[record.boot] = record.incarnation
        self._announce(record.incarnation + 1)

    def on_set_meta(self, event: SetMeta) -> None:
        meta: Meta = checked_meta(event.meta)
        if meta != self.me.meta and not self.leaving:
            self._announce(meta=meta)

    def on_set_cluster(self, event: SetCluster) -> None:
        mine = self.me.cluster
        if event.cluster == mine or self.leaving:
            return
        if mine or not event.cluster:
            raise MembershipError(f"this node belongs to cluster {mine}; it cannot become {event.cluster!r}")
        self._announce(cluster=event.cluster)
        for node in [node for node, member in self.members.items() if not self._ours(member)]:
            self._roster.remove(node)
            self._drop(node)
        self._timers.set(SYNC, self._now)

    def on_leave(self, _: Leave) -> None:
        if self.leaving:
            return
        self._announce(state=State.LEFT)
        self.leaving = True
        self._fall_silent()
        told = [*self.me.via, *self._roster.dialable.pick(self.figures.leave_fanout, but=self.me.via)]
        for node in told[: self.figures.leave_fanout]:
            if node in self._roster.dialable:
                self._send(self._roster.members[node], News(), self.figures.probe_interval_seconds, updates=(self.me,))

    def _fall_silent(self) -> None:
        """Nothing is begun any more; requests are still answered."""
        self._timers = Timers()
        self._probe = None

    def on_loop_lag(self, event: LoopLag) -> None:
        if event.seconds > self.figures.lag_seconds:
            self.stats["lag"] += 1
            self.health.add(1)

    def on_garbled(self, _: Garbled) -> None:
        self.stats["malformed"] += 1

    # --- suspicion ------------------------------------------------------------------------------------------------

    def _accuse(self, member: Member) -> None:
        if member.state is State.SUSPECT:
            self._confirm(member, self.node)
        else:
            self._put(member.as_(State.SUSPECT, by=self.node), "no answer to a probe")

    def _confirm(self, member: Member, accuser: NodeId) -> None:
        suspicion = self._suspicions[member.node]
        if suspicion.confirm(accuser):
            self._timers.set(("suspect", member.node), suspicion.deadline)
            self._broadcasts.put(member.as_(State.SUSPECT, by=accuser))
            self._arm_gossip()

    def _suspicion_ended(self, node: NodeId) -> None:
        if not self.health.may_accuse:
            # One who cannot hear would not have heard the refutation either.
            self._timers.set(("suspect", node), self._now + least_seconds(self._roster.size, self.figures))
            return
        self._put(self._roster.members[node].as_(State.DEAD, by=self.node), "did not refute the suspicion")

    def _end_suspicion(self, node: NodeId) -> None:
        if self._suspicions.pop(node, None) is not None:
            self._timers.cancel(("suspect", node))

    # --- probing --------------------------------------------------------------------------------------------------

    def _probe_next(self) -> None:
        self._conclude()
        interval = self.health.scaled(self.figures.probe_interval_seconds)
        self._timers.set(PROBE, self._now + interval)
        node = self._roster.ring.next()
        if node is None:
            return
        target = self._roster.members[node]
        self._probe = probe = OwnProbe(target, self._now + interval)
        self._timers.set(HELP, self._now + self.health.scaled(self.figures.probe_timeout_seconds))
        if target.address is None:
            self._ask_anchor(probe)
        else:
            self._send(target, Ping(), interval, Direct(probe))

    def _help(self) -> None:
        """The direct answer is late: others may reach the target where this node does not."""
        if self._probe is not None and not self._probe.acked:
            self._ask_others(self._probe)

    def _ask_others(self, probe: OwnProbe) -> None:
        if probe.asked_others:
            return
        probe.asked_others = True
        if probe.target.address is None:
            self._ask(probe, [node for node in probe.anchors[1:] if node != self.node])
        else:
            helpers = self._roster.dialable.pick(self.figures.helpers, but=(probe.target.node,))
            probe.nacks_expected = len(helpers)
            self._ask(probe, helpers)

    def _ask(self, probe: OwnProbe, helpers: list[NodeId]) -> None:
        patience = max(probe.deadline - self._now, 0.0)
        question = Probe(probe.target.node, min(int(patience * 1_000), MAX_PATIENCE_MS))
        for helper in helpers:
            if helper in self._roster.dialable:
                self._send(self._roster.members[helper], question, patience, Indirect(probe, helper))

    def _ask_anchor(self, probe: OwnProbe) -> None:
        """An outbound-only target is not called: its anchors are asked whether it called them. One first, then all."""
        target = probe.target
        vouching = target.via or tuple(self._roster.dialable.pick(self.figures.anchors))
        if (self.node in target.via or not target.via) and self._vouches(target.node):
            self._acked(probe)
            return
        others = [node for node in vouching if node in self._roster.dialable and node != self.node]
        turn = self._draw.randrange(0, len(others)) if others else 0
        probe.anchors = tuple(others[turn:] + others[:turn])
        self._ask(probe, others[turn : turn + 1])

    def _vouches(self, node: NodeId) -> bool:
        """Whether this node has itself heard from an outbound-only member lately."""
        at = self._heard_at.get(node)
        return at is not None and self._now - at <= self.figures.anchor_fresh_seconds

    def _acked(self, probe: OwnProbe) -> None:
        probe.acked = True
        if probe is self._probe:
            self._timers.cancel(HELP)

    def _conclude(self) -> None:
        """The probe's time is over: what it says about the target, and about this node."""
        probe, self._probe = self._probe, None
        self._timers.cancel(HELP)
        if probe is None:
            return
        if probe.acked:
            self.health.add(-1)
            return
        target = self._roster.get(probe.target.node)
        if target is None or not target.state.here or target.boot != probe.target.boot:
            return
        if target.address is None:
            # An anchor that died meanwhile vouches for nobody; one that is here but silent leaves it open.
            if any(anchor in self._roster.dialable and anchor not in probe.gone for anchor in probe.anchors):
                return
        else:
            # Helpers that did not even say nack make it likelier that the fault is here (Lifeguard §IV-A).
            self.health.add(probe.nacks_expected - probe.nacks if probe.nacks_expected else 1)
        if self.health.may_accuse:
            self._accuse(target)
        else:
            self.stats["held_back"] += 1

    # --- an outbound-only node's own anchors ----------------------------------------------------------------------

    def _keep_in_touch(self) -> None:
        """Pings one anchor after the other, each once a probe interval; the replies bring this node the news."""
        self._choose_anchors()
        via = self.me.via
        self._timers.set(ANCHOR, self._now + self.figures.probe_interval_seconds / max(len(via), 1))
        if not via:
            return
        self._anchor_turn += 1
        anchor = via[self._anchor_turn % len(via)]
        if anchor in self._roster.dialable:
            self._send(self._roster.members[anchor], Ping(), self.figures.probe_interval_seconds, AnchorPing(anchor))

    def _choose_anchors(self) -> None:
        over = [node for node, until in self._shunned.items() if until <= self._now]
        for node in over:
            del self._shunned[node]
        if not self._anchors_stale and not over:
            return
        self._anchors_stale = False
        alive = [n for n in self._roster.dialable if self._roster.members[n].state is State.ALIVE]
        reachable = [node for node in alive if node not in self._shunned]
        via = anchors.choose(self.node, reachable or alive, self.figures.anchors)
        if via != self.me.via:
            self._announce(via=via)

    # --- requests -------------------------------------------------------------------------------------------------

    def on_requested(self, event: Requested) -> None:
        ticket, message = event.ticket, event.message
        body = message.body
        refusal = self._refusal(message)
        if refusal is not None:
            self._refuse(ticket, message, refusal)
            return
        self._listen(message)
        match body:
            case Ping():
                self._reply(ticket, message, Ack() if message.to == self.node else Nack())
            case Probe():
                self._probe_for(ticket, message, body)
            case Digest(digest):
                same = digest == self.digest
                self._reply(ticket, message, Ack() if same else self._roster.full(self._now))
            case FullState():
                self._merge_state(body, message.sender, spread=True)
                self._reply(ticket, message, Ack())
            case Join():
                self._consider(event, body)
            case _:
                self._reply(ticket, message, Ack())

    def _refusal(self, message: Message) -> Refuse | None:
        """Whether what the peer says may be listened to at all."""
        ours, theirs = self.me.cluster, message.cluster
        if message.sender == self.node and message.boot == self.me.boot:
            return Refuse("self", f"{self.node} called itself", "remove this node's own address from --peers")
        if ours == theirs:
            return None
        if ours and theirs:
            return Refuse(
                "cluster",
                f"{self.node} belongs to cluster {ours}, {message.sender} belongs to cluster {theirs}",
                "two clusters never merge: correct --peers, or give the node that is to move a new --data-dir",
            )
        if isinstance(message.body, Join | Welcome | Ping | Ack | Nack | Refuse):
            return None
        blank = message.sender if ours else self.node
        return Refuse("blank", f"{blank} belongs to no cluster yet", "it takes part once it has joined one")

    def _refuse(self, ticket: int, message: Message, refusal: Refuse) -> None:
        self.stats[f"refused_{refusal.code}"] += 1
        self._reply(ticket, message, refusal)
        if refusal.code not in ("blank", "self"):
            address = message.body.member.address if isinstance(message.body, Join) else None
            self._refused(refusal, message, address, by_us=True, joining=False)

    def _refused(self, refusal: Refuse, message: Message, address: str | None, *, by_us: bool, joining: bool) -> None:
        known = self._roster.get(message.sender)
        if address is None and known is not None:
            address = known.address
        self._out.append(Refused(refusal.code, refusal.detail, refusal.fix, by_us, message.sender, address, joining))

    def _probe_for(self, ticket: int, message: Message, body: Probe) -> None:
        """Somebody asks for our help: their target is pinged from here, or vouched for if nobody can call it."""
        target = self._roster.get(body.target)
        if body.target == self.node:
            self._reply(ticket, message, Ack())
        elif target is None or not target.state.here or self._relays >= MAX_RELAYS:
            self._reply(ticket, message, Nack())
        elif target.address is None:
            self._reply(ticket, message, Ack() if self._vouches(target.node) else Nack())
        else:
            self._relays += 1
            patience = self.figures.nack_share * body.patience_ms / 1_000
            id_ = self._send(target, Ping(), patience, Relay(ticket, message, target.node))
            self._timers.set(("answer", id_), self._now + patience)

    # --- joining, from inside -------------------------------------------------------------------------------------

    def _consider(self, event: Requested, join: Join) -> None:
        """A join is refused for the clock or a full table, and held back while its name is another process's."""
        message, member = event.message, join.member
        apart = (join.unix_ms - event.unix_ms) / 1_000
        known = self._roster.get(member.node)
        if abs(apart) > self.figures.clock_skew_seconds:
            ahead = "ahead of" if apart > 0 else "behind"
            refusal = Refuse(
                "clock",
                f"the clock of {member.node} is {abs(apart):.0f} s {ahead} that of {self.node}",
                "set both clocks (timedatectl set-ntp true) and start the node again",
            )
            self._refuse(event.ticket, message, refusal)
        elif member.node == self.node:
            self._claimed(event.ticket, message, self.me, member)
        elif known is None and self._roster.size >= MAX_MEMBERS:
            refusal = Refuse("full", f"{self.node} knows {MAX_MEMBERS} members, the most there can be", "start fewer")
            self._refuse(event.ticket, message, refusal)
        elif known is not None and known.state.here and not known.same_process(member):
            self._verify(event.ticket, message, join, known)
        else:
            self._admit(event.ticket, message, join)

    def _verify(self, ticket: int, message: Message, join: Join, holder: Member) -> None:
        """The name is taken. A restart in place is let in at once; otherwise the holder is asked for a sign of life."""
        claim = Claim(ticket, message, join, holder)
        patience = self.figures.probe_timeout_seconds
        if holder.address is None:
            if self._vouches(holder.node):
                self._claimed(ticket, message, holder, join.member)
                return
            witness = next((node for node in holder.via if node in self._roster.dialable), None)
        else:
            witness = holder.node
        restarted = holder.address is not None and holder.same_machine(join.member)
        if restarted or witness is None or self._claims >= MAX_CLAIMS:
            self._admit(ticket, message, join)
            return
        self._claims += 1
        body = Ping() if holder.address else Probe(holder.node, int(patience * 1_000))
        # Nothing rides along: were the address the joiner's own, it would hear of its own rival too early.
        id_ = self._send(self._roster.members[witness], body, patience, claim, updates=())
        self._timers.set(("answer", id_), self._now + patience)

    def _claimed(self, ticket: int, message: Message, holder: Member, claimant: Member) -> None:
        """The holder of the name lives: the claimant is told, and so is everybody who reads our log."""
        where = holder.address or "an address nobody can dial"
        refusal = Refuse(
            "conflict",
            f"a living process at {where} already goes by the node id {holder.node}"[:MAX_DETAIL_CHARS],
            "give this node another --node-id, or stop the other one",
        )
        self._refuse(ticket, message, refusal)
        self._out.append(Conflict(holder, claimant, ours=False))

    def _admit(self, ticket: int, message: Message, join: Join) -> None:
        self._hear(join.member, message.sender, "joined")
        self._heard(message.sender, message.boot)
        self._reply(ticket, message, Welcome(self._roster.full(self._now)))

    # --- joining, from outside ------------------------------------------------------------------------------------

    def on_join_through(self, event: JoinThrough) -> None:
        if self.leaving or self.displaced_by:
            return
        for address in event.addresses[:MAX_SEEDS]:
            body = Join(self.me, event.unix_ms)
            self._post(address, None, body, self.figures.request_timeout_seconds, JoinTry(address))

    def _welcomed(self, message: Message, welcome: Welcome, address: str) -> None:
        """Everybody is new here. Records of this node's earlier life are outbid, whatever they say."""
        for record in welcome.state.members:
            if record.node == self.node:
                self._hear_of_me(record, joining=True)
        self._merge_state(welcome.state, message.sender, spread=False)
        self._heard(message.sender, message.boot)
        if message.cluster == self.me.cluster:
            self._push(address, message.sender, welcome.state)
            self._timers.set(("again", message.sender), self._now + AGAIN_SECONDS * (1 + self._draw.random()) / 2)
        self._out.append(Joined(message.cluster, message.sender, address))

    # --- answers --------------------------------------------------------------------------------------------------

    def on_answered(self, event: Answered) -> None:
        message = event.message
        entry = self._pending.pop(event.id, None)
        pending = entry[1] if entry is not None else None
        refusal = message.body if isinstance(message.body, Refuse) else None
        by_us = refusal is None
        if refusal is None:
            refusal = self._refusal(message)
        if refusal is not None:
            self._turned_away(pending, refusal, message, by_us=by_us)
            return
        self._listen(message)
        if pending is not None:
            self._answer_to(pending, message)

    def on_failed(self, event: Failed) -> None:
        entry = self._pending.pop(event.id, None)
        if entry is not None:
            self._no_answer(entry[1], event.why)

    def _turned_away(self, pending: Pending | None, refusal: Refuse, message: Message, *, by_us: bool) -> None:
        self.stats[f"refused_{refusal.code}"] += 1
        joining = isinstance(pending, JoinTry)
        address = pending.address if isinstance(pending, JoinTry) else None
        if joining or refusal.code not in ("blank", "self"):
            self._refused(refusal, message, address, by_us=by_us, joining=joining)
        if isinstance(pending, Sync) and refusal.code == "blank":
            self._timers.set(SYNC, self._now + BLANK_RETRY_SECONDS)
        elif pending is not None and not joining:
            self._no_answer(pending)

    def _answer_to(self, pending: Pending, message: Message) -> None:
        yes = isinstance(message.body, Ack)
        match pending:
            case Direct(probe):
                if yes and message.sender == probe.target.node:
                    self._acked(probe)
                else:
                    self._no_answer(pending)
            case Indirect(probe, helper):
                self._helper_said(probe, helper, yes=yes)
            case Relay(ticket, asker, target):
                self._relays -= 1
                good = yes and message.sender == target
                self._reply(ticket, asker, Ack() if good else Nack())
            case Claim(ticket, asker, join, holder):
                self._claims -= 1
                relayed = holder.address is None
                if yes and (relayed or (message.sender, message.boot) == (holder.node, holder.boot)):
                    self._claimed(ticket, asker, holder, join.member)
                else:
                    self._admit(ticket, asker, join)
            case AnchorPing(anchor):
                if not (yes and message.sender == anchor):
                    self._no_answer(pending)
            case Sync() if isinstance(message.body, FullState):
                self._merge_state(message.body, message.sender, spread=True)
                known = self._roster.get(message.sender)
                if known is not None and known.address is not None:
                    self._push(known.address, message.sender, message.body)
            case JoinTry(address):
                if isinstance(message.body, Welcome):
                    self._welcomed(message, message.body, address)
                else:
                    self._no_answer(pending, "it answered something else")

    def _helper_said(self, probe: OwnProbe, helper: NodeId, *, yes: bool) -> None:
        if yes:
            self._acked(probe)
            return
        probe.nacks += 1
        if probe.target.address is None:
            probe.gone.add(helper)
            if probe is self._probe:
                self._ask_others(probe)

    def _no_answer(self, pending: Pending, why: str = "no answer") -> None:
        match pending:
            case Direct(probe):
                if probe is self._probe and not probe.acked:
                    self._ask_others(probe)  # a refused connection is a fast hint: no need to wait for the timeout
            case Indirect(probe) if probe.target.address is None and probe is self._probe:
                self._ask_others(probe)
            case Relay(ticket, asker):
                self._relays -= 1
                self._reply(ticket, asker, Nack())
            case Claim(ticket, asker, join):
                self._claims -= 1
                self._admit(ticket, asker, join)
            case AnchorPing(anchor):
                self._shunned[anchor] = self._now + self.figures.anchor_retry_seconds
                self._anchors_stale = True
            case JoinTry(address):
                self._out.append(JoinFailed(address, why))

    # --- under test -----------------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Raises AssertionError if the parts contradict each other; run after every step under test."""
        self._roster.check_invariants()
        self._broadcasts.check_invariants()
        suspects = {node for node, member in self.members.items() if member.state is State.SUSPECT}
        assert set(self._suspicions) == suspects, "every suspect has one clock"
        silent = self.leaving or self.displaced_by is not None
        assert silent or all(("suspect", node) in self._timers for node in suspects)
        assert self.me.state is (State.LEFT if self.leaving else State.ALIVE)
        assert self._relays == sum(isinstance(pending, Relay) for _, pending in self._pending.values())
        assert self._claims == sum(isinstance(pending, Claim) for _, pending in self._pending.values())
        assert 0 <= self._relays <= MAX_RELAYS and 0 <= self._claims <= MAX_CLAIMS
        assert 0 <= self.health.score <= self.figures.health_max
        telling = bool(self._broadcasts or self._hint_sends) and len(self._roster.dialable) > 0
        assert silent or GOSSIP in self._timers or not telling, "there is news and no round is due"
        assert set(self._heard_at) <= set(self.members)

    _TIMERS: Mapping[str, Callable[[MembershipCore], None]] = {
        PROBE: _probe_next,
        HELP: _help,
        GOSSIP: _gossip,
        SYNC: _sync,
        RECONNECT: _reconnect,
        ANCHOR: _keep_in_touch,
        FORGET: _forget,
        SWEEP: _sweep,
    }
    _HANDLERS: Mapping[type[Any], Callable[[MembershipCore, Any], None]] = {
        Tick: on_tick,
        Requested: on_requested,
        Answered: on_answered,
        Failed: on_failed,
        Garbled: on_garbled,
        JoinThrough: on_join_through,
        Leave: on_leave,
        SetMeta: on_set_meta,
        SetCluster: on_set_cluster,
        LeaderHint: on_hint,
        LoopLag: on_loop_lag,
    }
