"""The async shell round `p2p.membership.core`: carries its messages over HTTP and tells it the time.

Every message is one ``POST http://{address}/peer/gossip`` with a msgpack body, and its reply is the response: ping and
ack, a helper's probe and its verdict, a state and the other one. The server's route calls `Gossip.handle`. Decides
nothing about members; the core does. Decides when a join is tried again, and what the event loop's lateness is.

::

    p2p/api/peer ── body ──> handle ──┐                       ┌──> Reply ──> response
                                      ├── core.step(event) ───┼──> Send  ──> Poster.post ──> Answered | Failed ──┐
    timer ── Tick ────────────────────┤                       └──> Changed, Hinted, … ──> callbacks              │
                                      └───────────────────────────────────────────────────────────────────────────┘

Everything is called, and calls back, on one event loop; callbacks must be quick and must not raise.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import ssl
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from p2p.ids import ClusterId, DiskId, NodeId
from p2p.membership.core import MembershipCore, Transition
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
from p2p.membership.figures import Figures
from p2p.membership.hint import LeaderHint
from p2p.membership.member import MalformedMessage, Member, MembershipError, Meta, first_record
from p2p.membership.message import VERSION, Join, Message, Ping, Refuse, WrongVersion, decode, encode
from p2p.membership.rota import Draw
from p2p.transport.gossip_capabilities import Capabilities
from p2p.transport.gossip_http import ExchangeFailed, Poster
from p2p.transport.gossip_join import JoinRefused, JoinRound, NotJoined, rounds

__all__ = ["Gossip", "GossipBusy", "GossipStopped", "JoinRefused", "NotJoined"]

log = logging.getLogger(__name__)

MAX_EXCHANGES = 512  # under way at once; beyond that a send fails at once
MAX_REQUESTS = 1_024  # of peers, answered at once
HANDLE_SECONDS = 10.0  # the core answers every request far sooner
FAREWELL_SECONDS = 1.0
LAG_EVERY_SECONDS = 0.25
JOIN_WAIT_SECONDS = 5.0  # the longest pause between two rounds of a join
SAY_AGAIN_SECONDS = 60.0  # the same refusal is logged once in this
MAX_SAID = 1_024

OnMember = Callable[[Member, Member | None], None]


class GossipStopped(MembershipError):
    """This node's gossip has stopped."""


class GossipBusy(MembershipError):
    """This node has too many requests of peers under way; nothing was done."""


def ignore(*_: object) -> None:
    """What a callback is until somebody listens."""


class Gossip:
    """A node's membership. Build it, set the callbacks you want, `await start()`, then `join`.

    `adopt`: a blank node takes the first cluster that lets it in for its own. With False it is told by `on_joined`,
    makes it durable, and calls `set_cluster`. Raises InvalidMeta, and MalformedMessage for ids that no peer would read.

    Callbacks, all optional: `on_change(member, old)` its state changed, or another process took its name (`old` None:
    new here); `on_update(member, old)` it announced other meta, address or anchors; `on_hint(hint)`;
    `on_conflict(conflict)`; `on_refused(refusal)` a join of ours was refused; `on_joined(joined)`;
    `on_capabilities(node, description)`; `on_broken(error)` the core contradicts itself and gossip has stopped.
    """

    def __init__(
        self,
        node: NodeId,
        disk: DiskId,
        *,
        address: str | None,
        boot: str | None = None,
        cluster: ClusterId | None = None,
        meta: Meta | None = None,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        adopt: bool = True,
        figures: Figures | None = None,
        draw: Draw | None = None,
        unix_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.on_change: OnMember = ignore
        self.on_update: OnMember = ignore
        self.on_hint: Callable[[LeaderHint], None] = ignore
        self.on_conflict: Callable[[Conflict], None] = ignore
        self.on_refused: Callable[[JoinRefused], None] = ignore
        self.on_joined: Callable[[Joined], None] = ignore
        self.on_broken: Callable[[BaseException], None] = ignore
        self.refusals: dict[str, JoinRefused] = {}  # by address: the newest refusal of each that this node asked
        self.unreachable: dict[str, str] = {}  # by address: why nobody answered there
        self._figures = figures or Figures()
        self._unix_ms = unix_ms
        self._draw: Draw = draw or random.Random(secrets.randbits(64))  # noqa: S311  jitter, not secrets
        boot = boot or secrets.token_hex(8)
        self._record = first_record(node, disk, boot, started_ms=unix_ms(), address=address, cluster=cluster, meta=meta)
        self._adopt = adopt
        self._core: MembershipCore | None = None
        self._early: list[Event] = []  # set before start
        self._poster = Poster(token=token, tls=tls)
        self._capabilities = Capabilities(self._poster, self.member, self._draw)
        self._tasks: set[asyncio.Task[None]] = set()
        self._tickets: dict[int, asyncio.Future[Message]] = {}
        self._ticket = 0
        self._timer: asyncio.TimerHandle | None = None
        self._lag_timer: asyncio.TimerHandle | None = None
        self._round: JoinRound | None = None
        self._joining = asyncio.Lock()
        self._said: dict[tuple[object, ...], float] = {}
        self._stopped = False  # nothing is said or heard any more
        self._closed = False

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begins to probe and to answer. Join afterwards: the route must already be served."""
        assert self._core is None, "gossip is started once"
        await self._poster.open()
        self._core = MembershipCore(self._record, self._draw, self._now(), self._figures)
        self._spawn(self._capabilities.run())
        self._measure_lag(self._now())
        for event in self._early:
            self._step(event)
        self._early.clear()
        self._arm()

    async def stop(self, *, leave: bool = True) -> None:
        """Says farewell (for at most a second), then ends everything it began. May be called twice."""
        if self._core is None or self._closed:
            return
        self._closed = True
        if leave and not self._stopped:
            before = set(self._tasks)
            self._step(Leave())
            told = self._tasks - before
            if told:
                await asyncio.wait(told, timeout=FAREWELL_SECONDS)
        await self._close()

    async def _close(self) -> None:
        self._stopped = True
        if self._round is not None:
            self._round.settled.set()  # nobody will answer any more
        for timer in (self._timer, self._lag_timer):
            if timer is not None:
                timer.cancel()
        for future in self._tickets.values():
            if not future.done():
                future.set_exception(GossipStopped("this node's gossip has stopped"))
        tasks = self._tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._poster.close()

    # --- what is known --------------------------------------------------------------------------------------------

    @property
    def me(self) -> Member:
        return self._core.me if self._core is not None else self._record

    @property
    def cluster(self) -> ClusterId:
        """ "" = blank."""
        return self.me.cluster

    @property
    def leader_hint(self) -> LeaderHint:
        return self._running().leader_hint

    @property
    def health(self) -> int:
        """0 is healthy, 8 is as bad as it gets: how far this node trusts itself."""
        return self._running().health.score

    @property
    def stats(self) -> Counter[str]:
        return self._running().stats

    def members(self) -> Mapping[NodeId, Member]:
        """Everybody heard of, read-only and live: this node, the living, the dead and the left."""
        return MappingProxyType(self._core.members if self._core is not None else {self.me.node: self._record})

    def member(self, node: NodeId) -> Member | None:
        return self.members().get(node)

    def last_seen_age(self, node: NodeId) -> float | None:
        """Seconds since the member last spoke with this node directly; None if it has not."""
        at = self._running().heard_at(node)
        return 0.0 if node == self.me.node else None if at is None else max(self._now() - at, 0.0)

    def gone_age(self, node: NodeId) -> float | None:
        """Seconds since the member died or left; None if it has not."""
        at = self._running().gone_at(node)
        return None if at is None else max(self._now() - at, 0.0)

    def story(self, node: NodeId) -> list[Transition]:
        """The newest transitions of a member, oldest first, `at` in the event loop's seconds."""
        return self._running().story(node)

    # --- what this node says --------------------------------------------------------------------------------------

    def set_meta(self, meta: Meta) -> None:
        """Announces this instead; raises InvalidMeta. The same meta again costs nothing."""
        self._step(SetMeta(meta))

    def set_cluster(self, cluster: ClusterId) -> None:
        """This node belongs to the cluster from now on; raises MembershipError if it belongs to another."""
        self._step(SetCluster(cluster))

    def set_leader(self, term: int, leader: NodeId | None, address: str | None) -> None:
        """What this node knows of the leader first hand. An older term, or none where one is known, changes nothing."""
        self._step(LeaderHint(term, leader, address))

    # --- capabilities ---------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Mapping[NodeId, dict[str, Any]]:
        """The newest description of each member that has announced one (``meta["caps"]``) and was reached."""
        return MappingProxyType(self._capabilities.known)

    def capabilities_of(self, node: NodeId) -> dict[str, Any] | None:
        return self._capabilities.known.get(node)

    async def fetch_capabilities(self, node: NodeId) -> dict[str, Any]:
        """Asks now rather than when it is due; raises ExchangeFailed."""
        return await self._capabilities.fetch(node)

    @property
    def on_capabilities(self) -> Callable[[NodeId, dict[str, Any]], None]:
        return self._capabilities.on_fetched

    @on_capabilities.setter
    def on_capabilities(self, callback: Callable[[NodeId, dict[str, Any]], None]) -> None:
        self._capabilities.on_fetched = callback

    # --- joining --------------------------------------------------------------------------------------------------

    async def join(self, addresses: Iterable[str], *, patient: bool = True) -> Joined:
        """Asks all addresses, again and again with backoff, until one lets this node in; tells by which.

        A member of a cluster goes before a blank one. Refusals are in `refusals` and told by `on_refused`; most can be
        mended on the other side, so asking goes on, unless `patient` is False: then the first refusal is raised, a
        JoinRefused, once every address has answered with one. Nobody at all to ask raises NotJoined.
        """
        async with self._joining:
            asked = [address for address in dict.fromkeys(addresses) if address != self.me.address]
            if not asked:
                raise NotJoined("there is no address to join through but this node's own")
            turns = rounds(asked)
            async for attempt in AsyncRetrying(
                wait=wait_random_exponential(multiplier=0.25, max=JOIN_WAIT_SECONDS),
                retry=retry_if_exception_type(NotJoined),
            ):
                with attempt:
                    return await self._join_once(next(turns), everybody=asked, patient=patient)
        raise AssertionError("unreachable: it is tried for ever")

    async def _join_once(self, asked: list[str], *, everybody: list[str], patient: bool) -> Joined:
        rival = self._running().displaced_by
        if rival is not None:
            raise MembershipError(f"an older process has the node id {rival.node}: this one may not join as it")
        round_ = self._round = JoinRound(asked)
        try:
            self._step(JoinThrough(tuple(asked), self._unix_ms()))
            async with asyncio.timeout(2 * self._figures.request_timeout_seconds):
                await round_.settled.wait()
        except TimeoutError:
            pass  # an answer was lost on the way; what came counts
        finally:
            self._round = None
        if round_.joined:
            return max(round_.joined, key=lambda joined: bool(joined.cluster))
        refusals = [self.refusals[address] for address in everybody if address in self.refusals]
        if len(refusals) == len(everybody) and not patient:
            raise refusals[0]
        raise NotJoined("; ".join([*map(str, refusals), *(f"{a}: {why}" for a, why in self.unreachable.items())]))

    def _join_outcome(self, address: str, joined: Joined | None = None) -> None:
        if self._round is not None:
            self._round.outcome(address, joined)

    # --- the server's side ----------------------------------------------------------------------------------------

    async def handle(self, body: bytes) -> bytes:
        """The answer to a peer's request. Raises MalformedMessage (400), GossipBusy or GossipStopped (503)."""
        core = self._running()
        try:
            message = decode(body)
        except WrongVersion as error:
            self._step(Garbled(str(error)))
            self._say(("version",), "a peer was refused: %s", error)
            return encode(self._version_refusal(core, str(error)))
        except MalformedMessage as error:
            self._step(Garbled(str(error)))
            raise
        if len(self._tickets) >= MAX_REQUESTS:
            raise GossipBusy("this node has too many requests of peers under way")
        self._ticket += 1
        ticket = self._ticket
        future = self._tickets[ticket] = asyncio.get_running_loop().create_future()
        try:
            self._step(Requested(ticket, message, self._unix_ms()))
            if future.done():
                return encode(future.result())
            async with asyncio.timeout(HANDLE_SECONDS):
                return encode(await future)
        except TimeoutError:
            raise GossipBusy("no answer was found in time") from None
        finally:
            del self._tickets[ticket]

    def _version_refusal(self, core: MembershipCore, detail: str) -> Message:
        body = Refuse("version", detail, f"run a version that speaks gossip {VERSION} on both nodes")
        return Message(core.node, core.me.boot, core.me.cluster, None, core.leader_hint, (), body)

    # --- stepping -------------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _running(self) -> MembershipCore:
        if self._core is None or self._stopped:
            raise GossipStopped("this node's gossip does not run")
        return self._core

    def _step(self, event: Event) -> None:
        if self._core is None and not self._stopped:
            self._early.append(event)
            return
        core = self._running()
        try:
            effects = core.step(event, self._now())
        except MembershipError:
            raise  # the event was illegal and has changed nothing
        except Exception as error:
            self._break(error)
            raise
        for effect in effects:
            self._act(effect)
        self._arm()

    def _break(self, error: Exception) -> None:
        """Our own impossible state: what this node believes can no longer be trusted, so it says nothing more."""
        log.critical("gossip has stopped: the core contradicts itself", exc_info=error)
        self._stopped = True
        self.on_broken(error)

    def _arm(self) -> None:
        """One timer, at the core's next deadline."""
        if self._stopped:
            return
        due = self._running().next_deadline()
        if self._timer is not None and (due is None or due < self._timer.when()):
            self._timer.cancel()
            self._timer = None
        if self._timer is None and due is not None:
            self._timer = asyncio.get_running_loop().call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if not self._stopped:
            self._step(Tick())

    def _measure_lag(self, expected: float) -> None:
        late = self._now() - expected
        if late > self._figures.lag_seconds and not self._stopped:
            self._step(LoopLag(late))
        at = self._now() + LAG_EVERY_SECONDS
        self._lag_timer = asyncio.get_running_loop().call_at(at, self._measure_lag, at)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._stopped:
            log.critical("a task of gossip failed", exc_info=error)

    # --- effects --------------------------------------------------------------------------------------------------

    def _act(self, effect: Effect) -> None:
        match effect:
            case Send():
                if len(self._tasks) >= MAX_EXCHANGES:
                    asyncio.get_running_loop().call_soon(self._too_many, effect.id)
                else:
                    self._spawn(self._exchange(effect))
            case Reply(ticket, message):
                future = self._tickets.get(ticket)
                if future is not None and not future.done():
                    future.set_result(message)
            case Changed(member, old):
                self._capabilities.noticed(member)
                self._call(self.on_change, member, old)
            case Updated(member, old):
                self._capabilities.noticed(member)
                self._call(self.on_update, member, old)
            case Hinted(hint):
                self._call(self.on_hint, hint)
            case Conflict():
                self._conflict(effect)
            case Refused():
                self._refused(effect)
            case Joined():
                self._joined(effect)
            case JoinFailed(address, why):
                self._join_failed(address, why)
            case Met(cluster, node, address):
                log.info("met %s of cluster %s", node, cluster)
                if address is not None:
                    self._step(JoinThrough((address,), self._unix_ms()))

    def _call(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            callback(*arguments)
        except Exception:
            log.exception("a listener to gossip failed")

    def _too_many(self, id_: int) -> None:
        if not self._stopped:
            self._step(Failed(id_, "too many exchanges under way"))

    async def _exchange(self, send: Send) -> None:
        """One request and its answer, fed back."""
        hedged = isinstance(send.message.body, Ping)
        joining = isinstance(send.message.body, Join)
        event: Event
        try:
            body = await self._poster.post(send.to_address, encode(send.message), send.timeout_seconds, hedged=hedged)
            event = Answered(send.id, decode(body))
        except ExchangeFailed as error:
            event = Failed(send.id, str(error))
            if error.status in (401, 403):
                self._wrong_token(send.to_address, error.status, joining=joining)
            elif error.status is not None:
                self._say((send.to_address, error.status), "%s answers gossip with %s", send.to_address, error)
        except MalformedMessage as error:
            event = Failed(send.id, str(error))
            if isinstance(error, WrongVersion) and joining:
                fix = f"run a version that speaks gossip {VERSION} on both nodes"
                self._refusal(JoinRefused("version", str(error), fix, send.to_address))
            if not self._stopped:
                self._step(Garbled(str(error)))
        if self._stopped:
            return
        try:
            self._step(event)
        except MalformedMessage as error:
            self._say((send.to_address, "malformed"), "%s: %s", send.to_address, error)
            self._step(Failed(send.id, str(error)))

    # --- what people must hear ------------------------------------------------------------------------------------

    def _joined(self, joined: Joined) -> None:
        self.refusals.pop(joined.address, None)
        self.unreachable.pop(joined.address, None)
        log.info("%s at %s let this node in, cluster %s", joined.node, joined.address, joined.cluster or "(blank)")
        if self._adopt and joined.cluster and not self.cluster:
            self.set_cluster(joined.cluster)
        self._call(self.on_joined, joined)
        self._join_outcome(joined.address, joined)

    def _join_failed(self, address: str, why: str) -> None:
        if address not in self.refusals or self.refusals[address].code not in ("token", "version"):
            self.refusals.pop(address, None)
            self.unreachable[address] = why
        self._join_outcome(address)

    def _wrong_token(self, address: str, status: int, *, joining: bool) -> None:
        reason = "this node's cluster token is not the one of the node there"
        fix = "give both nodes the same token (--auth-token-file or RINGRIFT_CLUSTER_AUTH_TOKEN)"
        if joining:
            self._refusal(JoinRefused("token", reason, fix, address))
        else:
            self._say((address, status), "%s refuses gossip with HTTP %d: %s; %s", address, status, reason, fix)

    def _refused(self, refused: Refused) -> None:
        where = refused.address or str(refused.node)
        if refused.joining:
            if refused.code != "self":
                self._refusal(JoinRefused(refused.code, refused.detail, refused.fix, where, refused.node))
            self._join_outcome(where)
            return
        who = "this node refused" if refused.by_us else "this node was refused by"
        self._say(
            (refused.code, refused.node, refused.by_us),
            *("%s %s (%s): %s; %s", who, refused.node, where, refused.detail, refused.fix),
        )

    def _refusal(self, refusal: JoinRefused) -> None:
        self.refusals[refusal.address] = refusal
        self.unreachable.pop(refusal.address, None)
        self._say((refusal.address, refusal.code), "%s", refusal)
        self._call(self.on_refused, refusal)

    def _conflict(self, conflict: Conflict) -> None:
        log.error(
            "two living processes go by the node id %s: %s (boot %s) keeps it, %s (boot %s) must stop",
            *(conflict.holder.node, conflict.holder.address, conflict.holder.boot),
            *(conflict.claimant.address, conflict.claimant.boot),
        )
        self._call(self.on_conflict, conflict)

    def _say(self, key: tuple[object, ...], text: str, *arguments: object) -> None:
        """A warning, once a minute for the same key."""
        now = self._now()
        if now - self._said.get(key, -SAY_AGAIN_SECONDS) < SAY_AGAIN_SECONDS:
            return
        if len(self._said) >= MAX_SAID:
            self._said.clear()
        self._said[key] = now
        log.warning(text, *arguments)
