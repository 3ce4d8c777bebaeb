"""A node's part in its cluster: who is there (gossip), who leads (the replica, or hearsay), who votes (autopilot), and
how a blank node gets in (formation). One event loop owns it; the replica's thread calls `send`, `role_changed`,
`download`.

Decides nothing by itself: `p2p.membership`, `p2p.election`, `p2p.formation` and `p2p.autopilot` do. What a leader does
with its office is the node's business: `on_office(True)` once it may answer clients, `on_office(False)` when it may
not.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from aiohttp import web

from config.settings import Settings
from coordination.clock import Clock
from coordination.errors import OutcomeUnknown, Refused
from coordination.events import Event, EventBus
from coordination.events import EventType as E
from p2p import autopilot, formation
from p2p.addresses import AddressBook, own_address
from p2p.driver import Driver, Unknown, View
from p2p.effects import Config, RoleChanged, SnapshotMeta
from p2p.ids import ClusterId, DiskId, NodeId, Term, VoterId, disk_of, node_of, voter_id
from p2p.journal import snapshot
from p2p.leadership import Leader, Leadership
from p2p.membership.events import Conflict
from p2p.membership.hint import LeaderHint
from p2p.membership.member import Member, MembershipError, State
from p2p.messages import Append, BadMessage, Message, decode, encode
from p2p.peers import PeerRefused, Peers, PeerUnreachable
from p2p.replica import ConfigRefused, NotLeader
from p2p.storage import Identity
from p2p.storage.identity import new_cluster_id
from p2p.transport.gossip import Gossip, JoinRefused
from p2p.transport.links import Links
from p2p.transport.streams import TunnelError
from p2p.transport.tunnel import CHANNEL as TUNNEL
from p2p.transport.tunnel import Tunnel

log = logging.getLogger(__name__)
T = TypeVar("T")

PROTOCOL = 1
AGREED_SECONDS = 6.0  # for so long a node that has agreed to a founding founds nothing itself
FOUNDING_SECONDS = 4.0  # and so soon after it has asked for agreement the founder must have founded
OFFICE_RETRY_SECONDS = 0.5
ECHO_SECONDS = 10.0  # an anchor vouches for 3 s, and joins are tried again within 5
OPERATOR_SECONDS = 10.0  # the autopilot lets an operator's change of voters be heard of everywhere
HEARSAY_TURNS = 2
DOUBT_SECONDS = 1.5  # a suspicion that is wrong is refuted sooner
FORMATION_SECONDS = 0.5
SAY_EVERY_SECONDS = 5.0
AUTOPILOT_SECONDS = 1.0
CHANGES_A_TURN = 4  # one after the other, each committed before the next is decided
ASK_SECONDS = 2.0
CHUNK = 1 << 20
CHUNK_SECONDS = 10.0
CHUNK_TRIES = 5
TRANSFER_SECONDS = 2.0
CATCH_UP_SECONDS = 60.0
WISH = "voter.wish"  # what an operator decided about this node's vote; outlives restarts

_EVENTS = {State.ALIVE: E.NODE_JOINED, State.SUSPECT: E.NODE_SUSPECT, State.DEAD: E.NODE_DEAD, State.LEFT: E.NODE_LEFT}


class Callbacks(NamedTuple):
    """What the node gives its cluster part. `meta` is what others see of this node at a glance."""

    on_office: Callable[[bool], Coroutine[Any, Any, None]]
    meta: Callable[[], dict[str, Any]]
    capabilities: Callable[[], dict[str, Any] | None]
    alert: Callable[[str, str], None]  # a name and a sentence, told once; without a sentence: it is over
    refused: Callable[[str], None]  # this node cannot be part of the cluster; a sentence


class Cluster:
    """See the module's docstring. `start` after the node listens; `stop` before it does not any more."""

    def __init__(
        self,
        settings: Settings,
        identity: Identity,
        *,
        port: int,
        peers: Peers,
        leadership: Leadership,
        bus: EventBus,
        clock: Clock,
        version: str,
        callbacks: Callbacks,
    ) -> None:
        self.settings, self.peers, self.leadership = settings, peers, leadership
        self._bus, self._clock, self._version, self._callbacks = bus, clock, version, callbacks
        self.me = voter_id(identity.node, identity.disk)
        self.cluster = identity.cluster
        self.snapshots = settings.data_dir / "snapshots"
        self.address = own_address(settings, port)
        self.waiting_for: str | None = None if self.cluster else "asks its peers"  # why it is in no cluster yet
        self._token = settings.auth_token.get_secret_value() if settings.auth_token else None
        self._port = port
        self._boot = secrets.token_hex(8)
        self._started_at = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._since: dict[VoterId, tuple[State, float]] = {}
        self._office: asyncio.Task[None] | None = None
        self._in_office = False
        self._said_diverged = ""
        self._agreed_at = self._ordered_at = float("-inf")  # monotonic
        self._leaderless = 0  # turns of `_keep` without a leader
        self._founding = False
        self._wish = settings.voter if settings.voter is not None else _read_wish(settings.data_dir)
        self.autopilot_says = "not leading"
        self.driver: Driver | None = None
        self.links = Links(
            cluster=self.cluster, voter=self.me, boot=self._boot, resolve=self.address_of, token=self._token
        )
        self.tunnel = Tunnel(self.links, base_url=f"http://127.0.0.1:{port}", token=self._token)
        self._book = AddressBook(settings.data_dir / "members.json")
        self.gossip = Gossip(
            identity.node,
            identity.disk,
            address=self.address,
            boot=self._boot,
            cluster=self.cluster,
            meta=self._meta(),
            token=self._token,
            adopt=False,
        )
        self.links.on_receive = self._received
        self.links.on_link = self._link_changed
        self.gossip.on_change = self._member_changed
        self.gossip.on_update = self._member_updated
        self.gossip.on_hint = self._hinted
        self.gossip.on_conflict = self._conflict
        self.gossip.on_refused = self._join_refused
        self.links.on_clone = self._cloned

    # -- start and stop --------------------------------------------------------------------------------------

    async def start(self, driver: Driver) -> None:
        """Speaks and listens from now on."""
        self.driver = driver
        await self.tunnel.start()
        await self.links.start()
        self._own(self._form(), "formation")
        self._own(self._keep(), "autopilot")

    async def stop(self) -> None:
        for task in (*self._tasks,):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.gossip.stop()
        await self.tunnel.stop()
        await self.links.stop()

    def _own(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work, name=f"cluster-{name}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s failed", task.get_name(), exc_info=task.exception())

    # -- the replica's thread speaks ---------------------------------------------------------------------------

    def send(self, messages: Sequence[tuple[VoterId, Message]]) -> None:
        """Called on the replica's thread: encodes there, hands over in one piece."""
        packed = [(to, "log" if isinstance(m, Append) and m.entries else "control", encode(m)) for to, m in messages]
        self._soon(self._send_all, packed)

    def _send_all(self, packed: list[tuple[VoterId, Any, bytes]]) -> None:
        for to, channel, payload in packed:
            self.links.send(to, channel, payload)

    def role_changed(self, change: RoleChanged) -> None:
        """Called on the replica's thread."""
        self._soon(self._on_role, change)

    def download(self, source: VoterId, meta: SnapshotMeta) -> Future[Path]:
        """Called on the replica's thread."""
        return asyncio.run_coroutine_threadsafe(self._download(source, meta), self._loop)

    def _soon(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            pass  # the loop has ended, and with it whoever would have been told

    # -- the network speaks --------------------------------------------------------------------------------------

    def _received(self, sender: VoterId, payload: bytes) -> None:
        assert self.driver is not None
        try:
            self.driver.receive(sender, decode(payload))
        except BadMessage as error:
            log.warning("dropped a message of %s: %s", node_of(sender), error)

    def _link_changed(self, node: NodeId, up: bool) -> None:
        if not up and self.driver is not None:
            for voter in self.driver.view.config.everyone:
                if node_of(voter) == node:
                    self.driver.unreachable(voter)

    def links_status(self) -> dict[str, Any]:
        """The body of ``/peer/links``."""
        return {
            "links": self.links.peers(),
            "counts": dict(self.links.counts),
            "refused": dict(self.links.refused),
            "view": str(self.view()),
        }

    async def serve_link(self, request: web.Request) -> web.StreamResponse:
        return await self.links.serve(request)

    async def gossiped(self, body: bytes) -> bytes:
        return await self.gossip.handle(body)

    # -- who leads -------------------------------------------------------------------------------------------------

    def _on_role(self, change: RoleChanged) -> None:
        leader = node_of(change.leader) if change.leader is not None else None
        if change.leader == self.me and not change.established:
            return  # it may not answer anybody yet
        if change.leader == self.me:
            log.info("this node leads term %d: %s", change.term, change.why)
            self.leadership.learn(Leader(change.term, node_of(self.me), self.address))
            self.gossip.set_leader(change.term, node_of(self.me), self.address)
            self._take_office(True)
            self._tell(E.LEADER_ELECTED, node=str(leader), term=change.term)
            return
        self._take_office(False)
        if leader is None:
            if not self._votes() and self.leadership.leader.node != node_of(self.me):
                return  # the replica of a node that does not vote is told nothing: gossip knows better
            if self.leadership.lost(change.term):
                log.info("no leader in term %d: %s", change.term, change.why)
                self._tell(E.LEADER_LOST, term=change.term, reason=change.why)
        elif self.leadership.learn(Leader(change.term, leader, self.address_of(leader))):
            self.gossip.set_leader(change.term, leader, self.address_of(leader))
            self._tell(E.LEADER_ELECTED, node=str(leader), term=change.term)

    def _take_office(self, on: bool) -> None:
        """One change at a time, in order; the newest one counts."""
        if on == self._in_office:
            return
        self._in_office = on
        before = self._office

        async def change() -> None:
            if before is not None:
                before.cancel()
                await asyncio.gather(before, return_exceptions=True)
            while True:
                try:
                    await self._callbacks.on_office(on)
                    return
                except Exception:  # a leader whose desk stays shut serves nobody, and nobody else may lead
                    log.exception("the office could not be %s; it is tried again", "taken" if on else "left")
                await asyncio.sleep(OFFICE_RETRY_SECONDS)

        self._office = self._own(change(), "office")

    def _hinted(self, hint: LeaderHint) -> None:
        """Gossip has news of a leader."""
        if hint.leader is None or hint.leader == node_of(self.me):
            return
        known = self.leadership.leader
        heard = Leader(Term(hint.term), hint.leader, hint.address or self.address_of(hint.leader))
        if self.leadership.learn(heard) and (known.node, known.term) != (heard.node, heard.term):
            self._tell(E.LEADER_ELECTED, node=str(heard.node), term=heard.term)

    def _listen_to_gossip(self) -> None:
        """A voter that has been cut off for long may have been replaced meanwhile: its replica waits for a leader that
        will not speak to it, in a term that gossip has told of already. Only of one that has
        spoken since: what is sent to a frozen leader ends as nobody knows, what is kept here as certainly not done."""
        self._doubt_hearsay()
        self._leaderless = self._leaderless + 1 if self.leadership.leader.node is None else 0
        hint = self.gossip.leader_hint
        if self._leaderless > HEARSAY_TURNS and hint.leader is not None:
            age = self.gossip.last_seen_age(hint.leader)
            if age is not None and age < (self._leaderless - 1) * AUTOPILOT_SECONDS:
                self._hinted(hint)

    def _doubt_hearsay(self) -> None:
        """A leader that only gossip has told of is believed no longer when gossip has given it up, too: nothing else
        would ever tell a node that does not vote, or a voter that has just started, that there is none."""
        leader = self.leadership.leader
        if leader.node in (None, node_of(self.me)) or self.view().leader is not None:
            return
        member = self.gossip.member(leader.node)
        if member is None or member.state is State.ALIVE or self._since_seconds(member)[1] < DOUBT_SECONDS:
            return
        if self.leadership.lost(leader.term):
            log.info("no leader in term %d: %s is %s", leader.term, leader.node, member.state)
            self._tell(E.LEADER_LOST, term=leader.term, reason=f"{leader.node} is {member.state}")

    def _votes(self) -> bool:
        return self.me in self.view().config.voters

    def _conflict(self, conflict: Conflict) -> None:
        """Two living processes under one name: the newer one stops, and says why."""
        if conflict.ours:
            self._callbacks.refused(
                f"another living node calls itself {conflict.holder.node} (at {conflict.holder.address}): "
                "give one of them another --node-id"
            )

    def _join_refused(self, refusal: JoinRefused) -> None:
        """A name that a living process has is nothing that passes; the other refusals can be mended over there. But
        nobody can ask a node that cannot be dialled whether it lives, so its anchors take its word for a while: who
        comes back within that is refused for the sake of its own earlier life, and asks again."""
        if refusal.code != "conflict":
            return
        if self.address is not None or time.monotonic() - self._started_at > ECHO_SECONDS:
            self._callbacks.refused(f"{refusal.reason}; {refusal.fix}")

    def _tell(self, type: E, **fields: Any) -> None:
        self._bus.publish([Event(type, self._clock.now_ms(), fields)])

    def _cloned(self, voter: VoterId) -> None:
        """The second of two living processes with one disk id was refused (PROTOCOL §2.10)."""
        self._callbacks.alert(
            "cloned_disk",
            f"two living processes have the disk of {node_of(voter)}: one of them was cloned or restored from a copy; "
            "stop it and start it with --adopt",
        )

    # -- who is there ----------------------------------------------------------------------------------------------

    def address_of(self, node: NodeId) -> str | None:
        """Where a node is dialled; None if it is unknown or cannot be. After a start, before gossip has spoken with
        anybody, as it was last."""
        member = self.gossip.member(node)
        return member.address if member is not None else self._book.addresses.get(node)

    def _member_changed(self, member: Member, old: Member | None) -> None:
        self._since[voter_id(member.node, member.disk)] = (member.state, time.monotonic())
        if (old is None or old.state is not member.state) and member.node != node_of(self.me):
            self._tell(_EVENTS[member.state], node=str(member.node))
        self._member_updated(member, old)

    def _member_updated(self, member: Member, _old: Member | None) -> None:
        leader = self.leadership.leader
        if leader.node == member.node and member.address and leader.address != member.address:
            self.leadership.learn(leader._replace(address=member.address))

    def members(self) -> list[Member]:
        return list(self.gossip.members().values())

    def _meta(self) -> dict[str, Any]:
        own = {"version": self._version, "priority": self.settings.priority, "voter": self._wish, "protocol": PROTOCOL}
        if self.driver is not None and self.has_copy():
            own["copy"] = True
        return own | self._callbacks.meta()

    def refresh(self) -> None:
        """Announces this node anew if what it tells of itself has changed."""
        self.gossip.set_meta(self._meta())

    def capabilities_of(self, node: str) -> dict[str, Any] | None:
        if node == node_of(self.me):
            return self._callbacks.capabilities()
        return self.gossip.capabilities_of(NodeId(node))

    async def ask_capabilities(self, node: str) -> dict[str, Any] | None:
        """The same, but an anchor asks who cannot be dialled: nobody else can."""
        member = self.gossip.member(NodeId(node))
        if member is not None and member.address is None and node_of(self.me) in member.via:
            try:
                async with await self.tunnel.open(
                    member.node, "GET", "/peer/capabilities", timeout=ASK_SECONDS
                ) as told:
                    if told.status == 200:
                        return dict(json.loads(await told.read()))
            except (TunnelError, ValueError):
                pass  # what was known before, then
        return self.capabilities_of(node)

    # -- getting in --------------------------------------------------------------------------------------------------

    def hello(self) -> dict[str, Any]:
        """The body of ``/peer/hello``."""
        me = self._hello()
        return {
            "node": me.node, "disk": me.disk, "cluster": me.cluster, "priority": me.priority,
            "addresses": list(me.addresses), "version": me.version, "protocol": me.protocol, "time_ms": me.time_ms,
            "dialable": me.dialable, "votes": me.votes,
        }  # fmt: skip

    def _hello(self) -> formation.Hello:
        return formation.Hello(
            node=node_of(self.me),
            disk=disk_of(self.me),
            cluster=self.cluster,
            priority=self.settings.priority,
            addresses=self.settings.peers,
            version=self._version,
            protocol=PROTOCOL,
            time_ms=self._clock.now_ms(),
            dialable=self.address is not None,
            votes=self._wish is not False,
        )

    async def confirms(self, members: list[tuple[str, str]]) -> str:
        """Why this node does not agree to a founding of these members; empty if it does. To agree is a promise: it
        founds nothing itself for a while."""
        if self._founding:
            return f"{node_of(self.me)} is about to found a cluster itself"
        asked = {} if self.cluster else await self._ask_everybody()
        if self._founding:
            return f"{node_of(self.me)} is about to found a cluster itself"
        seen = tuple(sorted((NodeId(node), DiskId(disk)) for node, disk in members))
        why = formation.confirms(self._hello(), asked, seen)
        if not why:
            self._agreed_at = time.monotonic()
        return why

    async def _form(self) -> None:
        """Gets this node into a cluster, however long that takes, then keeps it in touch with its peers."""
        assert self.driver is not None
        said, said_at = "", 0.0
        while not self.cluster:
            if not self.settings.peers:
                await self._found()
                break
            why = await self._try_to_form()
            self.waiting_for = why
            if why and (why != said or time.monotonic() - said_at > SAY_EVERY_SECONDS):
                said, said_at = why, time.monotonic()
                log.info("waiting: %s", why)
            if why:
                await asyncio.sleep(FORMATION_SECONDS)
        self.waiting_for = None
        await self.gossip.start()
        seeds = [*self.settings.peers, *(a for n, a in self._book.addresses.items() if n != node_of(self.me))]
        if any(seed != self.address for seed in seeds):
            await self.gossip.join(seeds)

    async def _try_to_form(self) -> str:
        """One attempt; why it must be tried again, empty when this node is in a cluster."""
        match formation.decide(self._hello(), await self._ask_everybody()):
            case formation.Wait(why) | formation.Refuse(why):
                return why
            case formation.Join(cluster, through):
                return await self._join(cluster, through)
            case formation.Found(members, others):
                self._founding = True
                try:
                    return await self._found_with(members, others)
                finally:
                    self._founding = False

    async def _found_with(self, members: Sequence[tuple[NodeId, DiskId]], others: Sequence[str]) -> str:
        """Founds the cluster if all others agree; else why not."""
        began = time.monotonic()
        if began - self._agreed_at < AGREED_SECONDS:
            return "another node has just been going to found the cluster"
        for why in await asyncio.gather(*(self._agrees(address, members) for address in others)):
            if why:
                return f"to found the cluster all must agree: {why}"
        if time.monotonic() - began > FOUNDING_SECONDS:
            return "it took too long to agree"
        await self._found()
        return ""

    async def _agrees(self, address: str, members: Sequence[tuple[NodeId, DiskId]]) -> str:
        """Why the node there does not; empty if it does."""
        body = {"members": [list(member) for member in members]}
        try:
            told = await self.peers.call("POST", address, "/peer/genesis", body, seconds=ASK_SECONDS)
            return str(told["why"])
        except (PeerUnreachable, PeerRefused) as error:
            return str(error)
        except (KeyError, TypeError):
            return f"{address} is no node of this version"

    async def _ask_everybody(self) -> dict[str, formation.Hello | str]:
        """What each says that is to be asked, as long as their answers name more."""
        asked: dict[str, formation.Hello | str] = {}
        me = self._hello()
        while (wanted := sorted(formation.to_ask(me, asked) - set(asked))) and not formation.too_many(me, asked):
            for address, told in zip(wanted, await asyncio.gather(*map(self._ask, wanted)), strict=True):
                # Behind many a NAT a node cannot dial the address by which others reach it.
                asked[address] = me if isinstance(told, str) and address == self.address else told
        return asked

    async def _ask(self, address: str) -> formation.Hello | str:
        try:
            hello = _read_hello(await self.peers.call("GET", address, "/peer/hello", seconds=ASK_SECONDS))
        except PeerRefused as error:
            if error.status == 401:
                return "it refuses this node's token: give all nodes the same --auth-token-file"
            return f"it answers {error}"
        except PeerUnreachable as error:
            return str(error).partition(": ")[2] or str(error)
        except (KeyError, TypeError):
            return "it is no node of this version"
        if hello.protocol != PROTOCOL:
            return f"it speaks protocol {hello.protocol}, this node {PROTOCOL}: run the same version on both"
        skew = abs(hello.time_ms - self._clock.now_ms()) / 1000
        if skew > self.settings.cluster.max_clock_skew_seconds:
            return f"its clock is {skew:.0f} s off from this node's: set both by NTP"
        return hello

    async def _found(self) -> None:
        assert self.driver is not None
        cluster = new_cluster_id()
        await asyncio.wrap_future(self.driver.found(cluster, Config((self.me,))))
        self._belong(cluster)
        log.info("founded cluster %s", cluster)

    async def _join(self, cluster: ClusterId, through: tuple[str, ...]) -> str:
        assert self.driver is not None
        await asyncio.wrap_future(self.driver.join(cluster))
        self._belong(cluster)
        log.info("joined cluster %s through %s", cluster, ", ".join(through))
        return ""

    def _belong(self, cluster: ClusterId) -> None:
        self.cluster = cluster
        self.links.adopt(cluster)
        self.gossip.set_cluster(cluster)

    # -- snapshots ---------------------------------------------------------------------------------------------------

    async def _download(self, source: VoterId, meta: SnapshotMeta) -> Path:
        """Pulls a snapshot in pieces, resumable; its verified file. Raises OSError, PeerUnreachable or
        SnapshotError."""
        began = time.monotonic()
        incoming = await asyncio.to_thread(snapshot.Incoming, self.snapshots, meta)
        failures = 0
        while incoming.offset < meta.size:
            try:
                piece = await self._piece(node_of(source), meta.name, incoming.offset)
                failures = 0
            except (PeerUnreachable, PeerRefused):
                failures += 1
                if failures >= CHUNK_TRIES:
                    raise
                await asyncio.sleep(0.1 * 2**failures)
                continue
            await asyncio.to_thread(incoming.write, piece)
        path = await asyncio.to_thread(incoming.finish)
        log.info("fetched snapshot %s (%d bytes) in %.1f s", meta.name, meta.size, time.monotonic() - began)
        return path

    async def _piece(self, node: NodeId, name: str, offset: int) -> bytes:
        path = f"/peer/snapshot/{name}?offset={offset}&length={CHUNK}"
        address = self.address_of(node)
        if address is None:
            async with await self.tunnel.open(node, "GET", path, timeout=CHUNK_SECONDS) as answer:
                if answer.status != 200:
                    raise PeerRefused(answer.status, "no such snapshot")
                return await answer.read()
        return await self.peers.fetch(address, path, seconds=CHUNK_SECONDS)

    # -- voters --------------------------------------------------------------------------------------------------------

    def view(self) -> View:
        assert self.driver is not None
        return self.driver.view

    def has_copy(self) -> bool:
        """Whether the queue is replicated to this node."""
        return self.me in self.view().config.everyone

    def copies(self) -> list[tuple[NodeId, str]]:
        """Other living members that have a copy of the queue and can be dialled, with their addresses."""
        return [
            (m.node, m.address)
            for m in self.members()
            if m.state is State.ALIVE and m.address is not None and m.meta.get("copy") and m.node != node_of(self.me)
        ]

    def copy_age(self) -> float:
        """Seconds since the leader was last heard of."""
        assert self.driver is not None
        return max(self.driver.now() - self.view().contact, 0.0) if self.has_copy() else float("inf")

    def _since_seconds(self, member: Member) -> tuple[float, float]:
        """(alive for, dead for)."""
        state, at = self._since.get(voter_id(member.node, member.disk), (member.state, time.monotonic()))
        self._since.setdefault(voter_id(member.node, member.disk), (state, at))
        seconds = time.monotonic() - at
        return (seconds, 0.0) if member.state is State.ALIVE else (0.0, seconds)

    async def _keep(self) -> None:
        """The autopilot's loop, wherever the leader is."""
        while True:
            await asyncio.sleep(AUTOPILOT_SECONDS)
            if not self.cluster:
                continue
            try:
                await self._look_after()
            except (MembershipError, OSError) as error:
                log.warning("not done now: %s", error)  # gossip stops, or the disk is full: both pass

    async def _look_after(self) -> None:
        """One turn of `_keep`."""
        self.refresh()
        here = {m.node: m.address for m in self.members() if m.state.here and m.address is not None}
        if not self._book.knows(here):
            await asyncio.to_thread(self._book.note, here)
        self._hold_on()
        self._listen_to_gossip()
        if not self._in_office:
            self.autopilot_says = "not leading"
            return
        self._tell_the_removed()
        self._compare_states()
        if await self._gave_way():
            return
        if time.monotonic() - self._ordered_at < OPERATOR_SECONDS:
            self.autopilot_says = "an operator has just changed the voters"
            return
        for _ in range(CHANGES_A_TURN):
            change = self._change_due()
            self.autopilot_says = change.why if change is not None else "nothing to do"
            if change is None or not await self._reconfigure(change):
                return

    def _tell_the_removed(self) -> None:
        """Who was down when it was removed asks voters that do not speak to it, and would wait for their votes for
        ever; but gossip tells that it believes it has a copy."""
        assert self.driver is not None
        everyone = self.view().config.everyone
        for member in self.members():
            voter = voter_id(member.node, member.disk)
            if member.state is State.ALIVE and member.meta.get("copy") and voter not in everyone:
                self.driver.bid_farewell(voter)

    def _compare_states(self) -> None:
        """Equal journals must have made equal queues (PROTOCOL §2.23). Nothing is mended here, but that one of them is
        wrong must not stay unknown."""
        config = self.view().config
        copies = {node_of(f.voter): f.agrees for f in self.view().followers if f.voter in config.everyone}
        message = said_of_queues(node_of(self.me), copies)
        if message != self._said_diverged:
            self._said_diverged = message
            if message:
                log.critical(message)
            self._callbacks.alert("diverged", message)

    async def _gave_way(self) -> bool:
        """A leader that nobody can dial serves nobody but itself: it brings the others up to date, and hands over."""
        heirs = [f for f in self.view().followers if f.ready and f.voter in self.view().config.voters]
        if self.address is not None or not heirs:
            return False
        try:
            await self.transfer(None)
        except (Refused, OutcomeUnknown) as error:
            log.info("this node cannot be dialled and should not lead, but: %s", error)
        return True

    def _hold_on(self) -> None:
        """A node that nobody can dial keeps open what it is reached over: links to the other voters if it has a copy,
        and a tunnel to its anchors."""
        if self.address is not None:
            return
        others = {node_of(v) for v in self.view().config.everyone if v != self.me} if self.has_copy() else set()
        self.links.hold(others)
        self.links.hold(set(self.gossip.me.via), channels=(TUNNEL,))

    def _change_due(self) -> autopilot.Change | None:
        view, policy = self.view(), self.settings.cluster
        members = []
        there = {voter_id(member.node, member.disk) for member in self.members()}
        self._since = {voter: since for voter, since in self._since.items() if voter in there}
        for member in self.members():
            alive_for, dead_for = self._since_seconds(member)
            meta = member.meta
            wish = meta.get("voter")
            members.append(
                autopilot.Member(
                    voter_id(member.node, member.disk),
                    alive_for,
                    dead_for,
                    member.address is not None,
                    wish if isinstance(wish, bool) else None,
                    _int(meta.get("priority")),
                    str(meta.get("zone") or ""),
                )
            )
        followers = [
            autopilot.Follower(f.voter, view.last_index - f.match, f.contact_age, f.round_seconds, f.regressed)
            for f in view.followers
        ]
        return autopilot.decide(
            self.me,
            view.config,
            members,
            followers,
            autopilot.Policy(
                target=policy.voter_target,
                steady=policy.steady_seconds,
                young_steady=policy.young_steady_seconds,
                replace_dead_after=policy.replace_dead_after_seconds,
            ),
        )

    async def _reconfigure(self, change: autopilot.Change) -> bool:
        """Carries a change out; whether it did. Raises nothing: what was refused now is decided again in a second."""
        try:
            await self._set_config(change.config)
        except (Refused, OutcomeUnknown) as error:
            log.info("not changed (%s): %s", change.why, error)
            return False
        log.info("voters are %s: %s", ", ".join(map(node_of, change.config.voters)), change.why)
        return True

    async def _set_config(self, config: Config) -> None:
        """Raises Refused or OutcomeUnknown."""
        assert self.driver is not None
        before = self.view().config
        await self._ordered(self.driver.reconfigure(config))
        for voter in sorted(set(config.voters) - set(before.voters)):
            self._tell(E.VOTER_ADDED, node=str(node_of(voter)))
        for voter in sorted(set(before.voters) - set(config.voters)):
            self._tell(E.VOTER_REMOVED, node=str(node_of(voter)))

    async def _ordered(self, order: Future[T]) -> T:
        try:
            async with asyncio.timeout(CATCH_UP_SECONDS):
                return await asyncio.wrap_future(order)
        except ConfigRefused as error:
            raise Refused(409, str(error)) from None
        except NotLeader as error:
            raise Refused(503, f"{error}; nothing was done") from None
        except (Unknown, TimeoutError):
            raise OutcomeUnknown("no answer from a majority; look at /admin/voters") from None

    async def voters(self) -> dict[str, Any]:
        """The body of ``/admin/voters``, told by the leader."""
        view = self.view()
        by_voter = {f.voter: f for f in view.followers}

        def row(voter: VoterId) -> dict[str, Any]:
            member = self.gossip.member(node_of(voter))
            f = by_voter.get(voter)
            told: dict[str, Any] = {
                "node": node_of(voter),
                "disk": disk_of(voter),
                "state": _state_of(voter, member),
                "leads": voter == view.leader,
            }
            if f is not None:
                told |= {
                    "match_index": f.match,
                    "contact_age_seconds": round(f.contact_age, 3),
                    "ready": f.ready,
                    "priority": f.priority,
                    "lost_entries": f.regressed,
                    "diverged": f.agrees is False,
                }
            return told

        return {
            "cluster": self.cluster,
            "leader": self.leadership.leader.node,
            "leader_since": self.leadership.since,
            "term": view.term,
            "last_index": view.last_index,
            "commit_index": view.commit_index,
            "voters": [row(voter) for voter in view.config.voters],
            "learners": [row(voter) for voter in view.config.learners],
            "voter_target": self.settings.cluster.voter_target,
            "autopilot": self.autopilot_says,
        }

    def _known(self, node: str) -> Member:
        member = self.gossip.member(NodeId(node))
        if member is None:
            raise Refused(404, f"there is no node {node!r}", field="node")
        return member

    async def add_voter(self, node: str) -> dict[str, Any]:
        """Learner first; voter as soon as it has caught up."""
        member = self._known(node)
        if member.state is not State.ALIVE:
            raise Refused(409, f"{node} is {member.state}", field="node")
        voter = voter_id(member.node, member.disk)
        await self._tell_wish(member, True)
        deadline = time.monotonic() + CATCH_UP_SECONDS
        while voter not in self.view().config.voters:
            self._ordered_at = time.monotonic()
            config = self.view().config
            learners = tuple(v for v in config.learners if v != voter)
            try:
                if voter in config.learners:
                    await self._set_config(Config((*config.voters, voter), learners))
                else:
                    await self._set_config(Config(config.voters, (*config.learners, voter)))
            except Refused as error:
                if error.status != 409 or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)
        return await self.voters()

    async def remove_voter(self, node: str) -> dict[str, Any]:
        config = self.view().config
        gone = {voter for voter in config.everyone if node_of(voter) == node}
        if not gone:
            raise Refused(404, f"{node} is no voter", field="node")
        if len(config.voters) == 1 and gone & set(config.voters):
            raise Refused(409, "the last voter cannot be removed", field="node")
        self._ordered_at = time.monotonic()
        member = self.gossip.member(NodeId(node))
        if member is not None and member.state.here:
            await self._tell_wish(member, False)
        keep = Config(
            tuple(v for v in config.voters if v not in gone), tuple(v for v in config.learners if v not in gone)
        )
        await self._set_config(keep)
        return await self.voters()

    async def _tell_wish(self, member: Member, wish: bool) -> None:
        """Has the node itself remember that it is to vote, or not to: it outlives leaders."""
        if member.node == node_of(self.me):
            await asyncio.to_thread(self.remember_wish, wish)
            self.refresh()
        elif member.address is not None:
            try:
                await self.peers.call("POST", member.address, "/peer/wish", {"voter": wish}, seconds=ASK_SECONDS)
            except (PeerUnreachable, PeerRefused) as error:
                log.warning("%s was not told about its vote: %s", member.node, error)

    def remember_wish(self, wish: bool) -> None:
        """An operator's word about this node's vote, which outlives a restart. Blocks; `refresh` then tells others."""
        (self.settings.data_dir / WISH).write_text("vote" if wish else "no vote", encoding="ascii")
        self._wish = wish

    async def transfer(self, to: str | None) -> dict[str, Any]:
        """Hands the leadership over; answers when somebody else leads."""
        view = self.view()
        voters = [v for v in view.config.voters if v != self.me and to in (None, node_of(v))]
        if to == node_of(self.me):
            return {"leader": to, "term": view.term}
        if not voters:
            raise Refused(409, f"{to} is not a voter" if to else "there is no other voter", field="to")
        heirs = {f.voter: (f.ready, f.match, f.priority, f.voter) for f in view.followers}
        target = max(voters, key=lambda v: heirs.get(v, (False, 0, 0, v)))
        assert self.driver is not None
        await self._ordered(self.driver.transfer(target))
        deadline = time.monotonic() + TRANSFER_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            leader = self.leadership.leader
            if leader.node not in (None, node_of(self.me)) and leader.term > view.term:
                return {"leader": leader.node, "term": leader.term}
            await self.leadership.change(left)
        raise OutcomeUnknown(f"{node_of(target)} has not taken over within {TRANSFER_SECONDS:g} s; look at /status")

    async def start_election(self) -> dict[str, Any]:
        """With a leader: it hands over. Without one: this voter stands."""
        leader = self.leadership.leader
        if self._in_office:
            return await self.transfer(None)
        if leader.node is not None and leader.address is not None:
            try:
                told = await self.peers.call(
                    "POST", leader.address, "/admin/leadership/transfer", {}, seconds=TRANSFER_SECONDS + 1
                )
                return dict(told)
            except PeerRefused as error:
                raise Refused(error.status, error.detail) from None
            except PeerUnreachable:
                pass  # then this voter stands
        if not self._votes():
            raise Refused(409, "there is no leader now, and this node does not vote: ask one that does")
        assert self.driver is not None
        self.driver.stand()
        return {"standing": node_of(self.me)}

    async def resign(self) -> None:
        """Before a clean stop: hands the leadership to whoever should have it, if there is anybody."""
        if self._in_office and len(self.view().config.voters) > 1:
            try:
                await self.transfer(None)
            except (Refused, OutcomeUnknown) as error:
                log.info("stopping without a hand-over: %s", error)

    def last_seen_age(self, node: NodeId) -> float | None:
        return self.gossip.last_seen_age(node) if self.cluster else None

    def needs_nobody(self) -> bool:
        """Whether this node is a cluster by itself: no other voter is needed for it to lead."""
        voters = self.view().config.voters
        return not voters or voters == (self.me,)

    def voters_heard_of(self) -> set[str]:
        """By a node without a copy: nobody tells it but the leader's hint."""
        leader = self.leadership.leader.node
        return {leader} if leader is not None else set()

    def knows(self, node: str | None) -> bool:
        return node is not None and self.gossip.member(NodeId(node)) is not None

    def anchors_of(self, node: str) -> tuple[NodeId, ...]:
        """The members to which a node holds a tunnel."""
        return self._known(node).via

    def way_to(self, node: NodeId) -> tuple[str | None, tuple[str, ...]]:
        """How a node is asked over HTTP: (its address, or None) and the addresses of other members to which it holds a
        tunnel, if it cannot be dialled. Raises Refused (404)."""
        member = self._known(node)
        anchors = [self.address_of(anchor) for anchor in member.via if anchor != node_of(self.me)]
        return member.address, tuple(address for address in anchors if address is not None)


def said_of_queues(me: NodeId, copies: Mapping[NodeId, bool | None]) -> str:
    """Which copies of the queue differ from the leader's, and which of them must be wrong, if that can be known: only
    where more than half of all copies are known to agree. Empty if none differs."""
    other = sorted(node for node, agrees in copies.items() if agrees is False)
    same = sorted([me, *(node for node, agrees in copies.items() if agrees)])
    unknown = sorted(node for node, agrees in copies.items() if agrees is None)
    if not other:
        return ""
    told = f"the queue of {', '.join(other)} differs from that of {', '.join(same)}, though the journals are equal"
    if 2 * len(same) > len(copies) + 1:
        return f"{told}: {', '.join(other)} went wrong"
    wait = f"; {', '.join(unknown)} cannot be compared yet" if unknown else ""
    return f"{told}: it is not known which one went wrong{wait}"


def _state_of(voter: VoterId, member: Member | None) -> str:
    """Of a voter; its node may be alive, and its disk gone."""
    if member is None:
        return "unknown"
    return str(member.state) if member.disk == disk_of(voter) else "another disk"


def _read_wish(folder: Path) -> bool | None:
    try:
        return {"vote": True, "no vote": False}.get((folder / WISH).read_text(encoding="ascii").strip())
    except OSError:
        return None


def _read_hello(told: Any) -> formation.Hello:
    """Raises KeyError or TypeError for what `Cluster.hello` does not make."""
    known = {field.name: told[field.name] for field in fields(formation.Hello)}
    addresses = known["addresses"]
    texts = (known["node"], known["disk"], known["cluster"], known["version"], *addresses)
    numbers = (known["priority"], known["protocol"], known["time_ms"])
    if not (all(isinstance(text, str) for text in texts) and all(isinstance(number, int) for number in numbers)):
        raise TypeError("not a hello")
    return formation.Hello(**{**known, "addresses": tuple(addresses), "dialable": bool(known["dialable"])})


def _int(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
