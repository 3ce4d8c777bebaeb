"""The leader's desk as the worker of any node sees it: the dispatcher itself where this node leads, else the same five
calls over HTTP to whoever leads (``POST /peer/desk/<call>``, msgpack).

A call that was under way when the leader changed ends at once, so that the worker asks the new one: workers find it as
soon as this node hears of it. Nothing is retried here; `WorkerPullLoop` knows what may be asked again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from coordination.commands import AttemptDone
from coordination.dispatcher import Beat, Dispatcher, Room
from coordination.errors import OutcomeUnknown, Refused
from coordination.leases import Notice, Signs
from coordination.placement import GpuOffer, Offer
from p2p.leadership import Deposed, Leadership
from p2p.peers import PeerRefused, Peers, PeerUnreachable
from p2p.workplace import Key

CALL_SECONDS = 3.0  # beyond what the call itself may wait
FINISH_SECONDS = 15.0
MAX_WAIT_SECONDS = 60.0
PATH = "/peer/desk"


class DeskOfTheLeader:
    """Belongs to the event loop. Raises Refused (503) while nobody is known to lead."""

    def __init__(self, node: str, dispatcher: Dispatcher, leadership: Leadership, peers: Peers) -> None:
        self._node, self._own, self._leadership, self._peers = node, dispatcher, leadership, peers
        self._room: Room | None = None
        self._claiming = False  # a claim is under way at a leader elsewhere
        self._telling: asyncio.Task[None] | None = None
        self._mark = ""

    @property
    def mark(self) -> str:
        """What the leader says of this node: "cordoned", "draining", or nothing."""
        return self._own.matching.barred.get(self._node, "") if self._own.leads else self._mark

    def mono_ms(self) -> int:
        return self._own.mono_ms()

    def make_room(self, room: Room) -> None:
        """Room for the next claim; a claim that is parked elsewhere is told of it."""
        self._room = room
        if self._own.leads:
            self._own.make_room(room)
        elif self._claiming and (self._telling is None or self._telling.done()):
            self._telling = asyncio.ensure_future(self._tell_room())

    async def _tell_room(self) -> None:
        told: Room | None = None
        while self._claiming and self._room is not None and self._room is not told:
            told = self._room
            try:
                await self._ask("room", {"room": pack_room(told)}, CALL_SECONDS)
            except (Refused, OutcomeUnknown):
                return  # the claim under way will notice

    async def claim(self, worker: str, *, wait_seconds: float) -> tuple[list[dict[str, Any]], list[Notice]]:
        if self._own.leads:
            if self._room is not None:
                self._own.make_room(self._room)
            self._mark = self.mark  # for when this node leads no more, and has not asked the next leader yet
            return await self._own.claim(worker, wait_seconds=wait_seconds)
        assert self._room is not None, "a worker states its room before it claims"
        self._claiming = True
        try:
            body = {"worker": worker, "room": pack_room(self._room), "wait_seconds": wait_seconds}
            told = await self._ask("claim", body, wait_seconds + CALL_SECONDS, "jobs", "doomed")
        finally:
            self._claiming = False
            if self._telling is not None:
                self._telling.cancel()  # no claim is parked there that would care
                self._telling = None
        self._mark = str(told.get("mark", ""))
        return told["jobs"], [Notice(*item) for item in told["doomed"]]

    async def heartbeat(
        self, worker: str, beats: list[Beat], *, first: bool, whole: bool = False
    ) -> tuple[list[str], list[str]]:
        if self._own.leads:
            return await self._own.heartbeat(worker, beats, first=first, whole=whole)
        told_beats = [(*beat.signs, beat.started_ms) for beat in beats]
        body = {"worker": worker, "first": first, "whole": whole, "beats": told_beats}
        told = await self._ask("heartbeat", body, CALL_SECONDS, "stale", "cancelled")
        return told["stale"], told["cancelled"]

    async def describe(self, keys: list[Key]) -> dict[Key, dict[str, Any]]:
        if self._own.leads:
            return await self._own.describe(keys)
        told = await self._ask("describe", {"keys": keys}, CALL_SECONDS, "jobs")
        return {(job["id"], job["attempt"]): job for job in told["jobs"]}

    async def leave(self, worker: str, seconds: float) -> None:
        """This node's machine will be taken away: nothing new, and what runs in so many seconds goes elsewhere."""
        if self._own.leads:
            await self._own.leave(worker, seconds)
            return
        await self._ask("leave", {"worker": worker, "seconds": seconds}, CALL_SECONDS)

    async def finish(self, items: tuple[AttemptDone, ...]) -> list[Refused | None]:
        if self._own.leads:
            return await self._own.finish(items)
        told = await self._ask("finish", {"items": [tuple(item) for item in items]}, FINISH_SECONDS, "answers")
        return [Refused(no[0], no[1], field=no[2]) if no is not None else None for no in told["answers"]]

    async def _ask(self, call: str, body: dict[str, Any], seconds: float, *wanted: str) -> dict[str, Any]:
        """Asks whoever leads for an answer that has `wanted`; gives up as soon as somebody else leads."""
        leader = self._leadership.leader
        if leader.node is None or leader.address is None or leader.node == self._node:
            raise Refused(503, "nobody is known to lead; nothing was done")
        request = self._peers.call("POST", leader.address, f"{PATH}/{call}", body, seconds=seconds)
        try:
            told = await self._leadership.unless_deposed(request)
        except Deposed as error:
            raise OutcomeUnknown(str(error)) from None
        except PeerUnreachable as error:
            if error.sent:
                raise OutcomeUnknown(f"leader {leader.node}: {error}") from None
            raise Refused(503, f"leader {leader.node} cannot be reached: {error}") from None
        except PeerRefused as error:
            if error.status == 504:
                raise OutcomeUnknown(error.detail) from None
            raise Refused(error.status, error.detail, field=error.field or "") from None
        if not isinstance(told, dict) or any(not isinstance(told.get(name), list) for name in wanted):
            raise OutcomeUnknown(f"leader {leader.node} gives an answer that this version cannot read")
        return told


def pack_room(room: Room) -> Any:
    """A Room as it travels."""
    return [asdict(room.free), asdict(room.total) if room.total is not None else None, room.max_jobs]


def unpack_room(value: Any) -> Room:
    """Raises KeyError, TypeError or ValueError for what `pack_room` does not make."""
    free, total, max_jobs = value
    return Room(_offer(free), _offer(total) if total is not None else None, int(max_jobs))


def _offer(value: dict[str, Any]) -> Offer:
    return Offer(**{**value, "gpus": tuple(_gpu(gpu) for gpu in value["gpus"])})


def _gpu(value: dict[str, Any]) -> GpuOffer:
    return GpuOffer(**{**value, "links": tuple(value.get("links", ()))})


Answering = Callable[[Dispatcher, dict[str, Any]], Awaitable[dict[str, Any]]]


async def _room(desk: Dispatcher, body: dict[str, Any]) -> dict[str, Any]:
    desk.make_room(unpack_room(body["room"]))
    return {}


async def _claim(desk: Dispatcher, body: dict[str, Any], gone: Callable[[], bool]) -> dict[str, Any]:
    desk.make_room(unpack_room(body["room"]))
    seconds = min(max(float(body["wait_seconds"]), 0.0), MAX_WAIT_SECONDS)
    jobs, doomed = await desk.claim(str(body["worker"]), wait_seconds=seconds, gone=gone)
    mark = desk.matching.barred.get(str(body["worker"]), "")
    return {"jobs": jobs, "doomed": [list(item) for item in doomed], "mark": mark}


async def _heartbeat(desk: Dispatcher, body: dict[str, Any]) -> dict[str, Any]:
    beats = [Beat(Signs(*beat[:-1]), beat[-1]) for beat in body["beats"]]
    told = (bool(body["first"]), bool(body.get("whole", False)))
    stale, cancelled = await desk.heartbeat(str(body["worker"]), beats, first=told[0], whole=told[1])
    return {"stale": stale, "cancelled": cancelled}


async def _describe(desk: Dispatcher, body: dict[str, Any]) -> dict[str, Any]:
    found = await desk.describe([(str(job), int(attempt)) for job, attempt in body["keys"]])
    return {"jobs": list(found.values())}


async def _finish(desk: Dispatcher, body: dict[str, Any]) -> dict[str, Any]:
    answers = await desk.finish(tuple(AttemptDone(*item) for item in body["items"]))
    return {"answers": [None if a is None else [a.status, a.detail, a.field] for a in answers]}


async def _leave(desk: Dispatcher, body: dict[str, Any]) -> dict[str, Any]:
    await desk.leave(str(body["worker"]), float(body["seconds"]))
    return {}


_CALLS: dict[str, Answering] = {
    "room": _room,
    "heartbeat": _heartbeat,
    "describe": _describe,
    "finish": _finish,
    "leave": _leave,
}


async def serve(desk: Dispatcher, call: str, body: dict[str, Any], gone: Callable[[], bool]) -> dict[str, Any] | None:
    """The leader's side of a call; None for one that there is not. Raises what the desk raises, and KeyError,
    TypeError, ValueError or IndexError for a body that is none of ours."""
    desk.check_leads()
    if call == "claim":
        return await _claim(desk, body, gone)
    answering = _CALLS.get(call)
    return await answering(desk, body) if answering is not None else None
