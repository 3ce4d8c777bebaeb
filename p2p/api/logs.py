"""``/jobs/{id}/logs``: what a job has written, live while it runs, and after, through any node.

Offsets count the bytes that the attempt had ever written to the stream before; they stay true whatever the log's cap
drops (`p2p.runner.stream`). So whoever was cut off asks again with ``offset=`` what he was told in ``X-P2P-Log-Offset``
and what he has read since, added up, and gets the rest: no byte twice, and none is missing that is still kept.

Decides which node is asked, and which bytes are told. Does not decide what is kept (the runner), or how the answer of
another node gets here (`relay`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from aiohttp import web

from coordination.errors import InvalidInput, Refused
from p2p.api.bodies import check_query, query_int, query_text
from p2p.api.context import Context, context
from p2p.api.errors import Problem
from p2p.api.relay import DIRECT, LIVE, listens, relay
from p2p.peers import PeerRefused, PeerUnreachable
from p2p.runner.stream import Kept, Stream

routes = web.RouteTableDef()

FOLLOW_SECONDS = 0.2
APPEAR_SECONDS = 10.0  # between a claim's acknowledgement and its worker having the attempt
MAX_TAIL = 1_000_000
MAX_OFFSET = 1 << 59
LOOK_UP_SECONDS = 2.0
JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,56}(\.[0-9]{1,7})?")  # a member of an array is <array>.<index>
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_PARAMETERS = ("stream", "tail", "offset", "limit", "follow", "attempt", "rank", "node")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What of a log is wanted. ``first`` and ``last`` are of a Range header: (None, n) its last n bytes."""

    stream: str
    follow: bool
    tail: int | None
    offset: int | None
    limit: int | None
    range: tuple[int | None, int | None] | None

    @classmethod
    def of(cls, request: web.Request) -> Asked:
        """Raises InvalidInput. A Range header that is none is ignored, as RFC 9110 §14.2 has it."""
        told = cls(
            stream=query_text(request, "stream", ("stdout", "stderr")) or "stdout",
            follow=query_text(request, "follow", ("0", "1")) == "1",
            tail=query_int(request, "tail", least=0, most=MAX_TAIL),
            offset=query_int(request, "offset", least=0, most=MAX_OFFSET),
            limit=query_int(request, "limit", least=0, most=MAX_OFFSET),
            range=_range_of(request.headers.get("Range")),
        )
        if told.tail is not None and told.offset is not None:
            raise InvalidInput("tail", "goes with no offset: one counts lines from the end, the other is a place")
        if told.range is not None and (told.follow or {told.tail, told.offset, told.limit} != {None}):
            raise InvalidInput("Range", "goes with none of follow, tail, offset and limit")
        return told

    @property
    def counts(self) -> bool:
        """Whoever names a place counts bytes: he is told no word of ours, and no gap as if it were none."""
        return self.offset is not None or self.range is not None


class Part(NamedTuple):
    """Which bytes the answer begins and, if it follows nothing, ends with."""

    begin: int
    end: int
    kept: Kept


@routes.get("/jobs/{id}/logs")
async def logs(request: web.Request) -> web.StreamResponse:
    """Plain text, the newest attempt unless one is named. ``?stream=stdout|stderr``, ``?tail=LINES`` or
    ``?offset=BYTES``, ``?limit=BYTES``, ``?follow=1``, ``?attempt=N``; of a gang ``?rank=N`` or ``?node=NAME``; or a
    Range header."""
    check_query(request, *_PARAMETERS)
    asked = Asked.of(request)
    number = query_int(request, "attempt", least=1, most=1 << 31)
    rank, node = query_int(request, "rank", least=0, most=1 << 20), query_text(request, "node")
    here, job_id = context(request), request.match_info["id"]
    if not JOB_ID.fullmatch(job_id):
        raise Refused(404, f"there is no job {job_id[:80]!r}", field="id")  # and it will not name a folder
    if rank is not None and node is not None:
        raise InvalidInput("rank", "goes with no node: give one of them")
    if DIRECT in request.headers and number is not None:
        attempt, live = number, request.headers[DIRECT] == LIVE
    else:
        job = await find_job(here, job_id)
        if "counts" in job:
            raise Refused(409, f"{job_id} is an array; ask for a member's log: /jobs/{job_id}.INDEX/logs", field="id")
        if asked.follow and number is None and job["attempt"] == 0:
            job = await _first_attempt(request, job)
        job_id, attempt = job["id"], number or job["attempt"]
        live = job["finished_at"] is None and attempt == job["attempt"]
        if attempt > job["attempt"]:
            raise Refused(
                404, f"job {job_id} has no attempt {attempt}; its newest is {job['attempt']}", field="attempt"
            )
        worker = node or _worker_of(job, attempt, rank)
        if worker not in (None, here.settings.node_id):
            if here.cluster.knows(worker):
                query = urlencode({**request.query, "attempt": attempt})
                path = f"/jobs/{quote(job_id, safe='')}/logs?{query}"
                return await relay(request, str(worker), path, direct=LIVE if live else "1")
            if node is not None or not live:
                raise Refused(404, f"there is no node {str(worker)[:80]} that could be asked", field="node")
    return await _answer(request, asked, job_id, attempt, live=live)


async def _answer(request: web.Request, asked: Asked, job: str, attempt: int, *, live: bool) -> web.StreamResponse:
    """From the files here. ``live``: by its record the attempt is not over; its process may not be here yet."""
    here, as_of = context(request), context(request).as_of()
    folder = here.attempt_folder(job, attempt)
    runs = here.attempt_runs(job, attempt)
    if attempt > 0 and runs is not True and not await asyncio.to_thread(folder.is_dir):
        if runs is None:
            raise Problem(503, f"node {here.settings.node_id} has just started and does not know yet what it runs")
        if not live:
            raise Refused(404, f"the logs of attempt {attempt} of job {job} are no longer kept", field="attempt")
    stream = Stream(str(folder / asked.stream))
    part = await asyncio.to_thread(_part_of, asked, stream)
    word = b""
    if not asked.counts and asked.tail is None and part.begin > len(_word_of(part.begin)):
        word = _word_of(part.begin)  # it takes the place of the last bytes that were dropped, so that counting goes on
    headers = {
        "Content-Type": "text/plain; charset=utf-8",
        "X-Content-Type-Options": "nosniff",
        "Accept-Ranges": "bytes",
        "X-P2P-Attempt": str(attempt),
        "X-P2P-Node": here.settings.node_id,
        "X-P2P-Log-Offset": str(part.begin - len(word)),
        "X-P2P-Log-Start": str(part.kept.start),
        "X-P2P-Log-Size": str(part.kept.size),
        "X-P2P-Term": str(as_of["term"]),
        "X-P2P-Index": str(as_of["index"]),
    }
    if asked.range is not None:
        headers["Content-Range"] = f"bytes {part.begin}-{part.end - 1}/{part.kept.size}"
        headers["Content-Length"] = str(part.end - part.begin)
    response = web.StreamResponse(status=200 if asked.range is None else 206, headers=headers)
    await response.prepare(request)
    if request.method == "HEAD":
        return response
    await response.write(word)
    sending = _Sending(response, stream, part.begin, counts=asked.counts)
    await sending.up_to(part.end)
    if asked.range is not None and sending.at != part.end:
        raise ConnectionResetError("the job has emptied its log")  # and what was promised cannot be sent
    if asked.follow and attempt > 0:
        end = None if asked.limit is None else part.begin + asked.limit
        await _follow(request, sending, folder, (job, attempt), end, live=live)
    await response.write_eof()
    return response


def _part_of(asked: Asked, stream: Stream) -> Part:
    """Blocks. Raises Problem (416) for a place that is not there, or not any more."""
    kept = stream.look()
    begin, end = kept.start, kept.size
    if asked.range is not None:
        first, last = asked.range
        if first is None:
            begin = max(kept.start, kept.size - (last or 0))
        else:
            begin, end = max(kept.start, first), min(kept.size, MAX_OFFSET if last is None else last + 1)
        if begin >= end:
            raise _not_there(kept, "Range")
    elif asked.offset is not None:
        if asked.offset > kept.size:
            raise _not_there(kept, "offset")
        begin = max(kept.start, asked.offset)
    elif asked.tail is not None:
        begin = stream.last_lines(asked.tail, kept)
    if asked.limit is not None:
        end = min(end, begin + asked.limit)
    return Part(begin, end, kept)


def _not_there(kept: Kept, field: str) -> Problem:
    headers = {
        "Content-Range": f"bytes */{kept.size}",
        "X-P2P-Log-Start": str(kept.start),
        "X-P2P-Log-Size": str(kept.size),
    }
    return Problem(
        416, f"{kept.size} bytes were written so far, of which those from {kept.start} on are kept", field=field,
        headers=headers,
    )  # fmt: skip


def _range_of(header: str | None) -> tuple[int | None, int | None] | None:
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or match[0] == "bytes=-":
        return None
    first, last = (int(text) if text else None for text in match.groups())
    return None if first is not None and last is not None and last < first else (first, last)


def _word_of(dropped: int) -> bytes:
    return b"[p2p: %d bytes were dropped here, the log is capped]\n" % dropped


async def find_job(here: Context, job_id: str) -> dict[str, Any]:
    """The job's record, from the leader, or from the copy here if there is no leader. Raises Refused (404, 503)."""
    if not here.dispatcher.leads:
        leader = here.leadership.leader
        if leader.address is not None and leader.node != here.settings.node_id:
            try:
                path = f"/jobs/{quote(job_id, safe='')}"
                told = await here.peers.call("GET", leader.address, path, seconds=LOOK_UP_SECONDS)
                return dict(told)
            except PeerRefused as error:
                if error.status == 404:
                    raise Refused(404, error.detail, field="id") from None
            except PeerUnreachable:
                pass  # from the copy, then
        if not here.has_copy():
            raise Refused(503, "there is no leader now, and this node has no copy of the queue")
    return await here.operations.job(job_id)


def _worker_of(job: dict[str, Any], attempt: int, rank: int | None) -> str | None:
    """The node that has, or had, this attempt, or its member of this rank; None if it is not known any more. Raises
    Refused (404)."""
    if rank is not None:
        members = job.get("members") or () if attempt == job["attempt"] else ()
        found = next((one.get("worker") for one in members if one.get("rank") == rank), None)
        if found is not None:
            return str(found)
        if rank > 0:
            raise Refused(404, f"attempt {attempt} of job {job['id']} has no member of rank {rank}", field="rank")
    if attempt == job["attempt"] and job["worker"] is not None:
        return str(job["worker"])
    rows = [row for row in job.get("history", ()) if row["attempt"] == attempt and row["worker"] is not None]
    return str(rows[-1]["worker"]) if rows else None


async def _first_attempt(request: web.Request, job: dict[str, Any]) -> dict[str, Any]:
    """Waits for a job that has not started yet: whoever follows it wants its output, not an empty answer."""
    here = context(request)
    while job["attempt"] == 0 and job["finished_at"] is None and listens(here, request):
        await asyncio.sleep(FOLLOW_SECONDS)
        job = await find_job(here, job["id"])
    return job


async def _follow(
    request: web.Request, sending: _Sending, folder: Path, followed: tuple[str, int], end: int | None, *, live: bool
) -> None:
    """Sends what is added until the attempt is over or ``end`` is reached. If the asker hangs up or the node stops, the
    connection breaks off: only a log that is whole ends well."""
    here = context(request)
    patience = APPEAR_SECONDS if live else 0.0
    while end is None or sending.at < end:
        over = here.attempt_runs(*followed) is False
        if over and patience > 0 and not await asyncio.to_thread(folder.is_dir):
            over, patience = False, patience - FOLLOW_SECONDS
        await sending.up_to(end)
        if over:
            return
        await asyncio.sleep(FOLLOW_SECONDS)
        if not listens(here, request):
            raise ConnectionResetError("this node stops, or nobody listens any more")


class _Sending:
    """How far one answer has come."""

    def __init__(self, response: web.StreamResponse, stream: Stream, at: int, *, counts: bool) -> None:
        self._response, self._stream, self._counts = response, stream, counts
        self.at = at

    async def up_to(self, end: int | None) -> None:
        """Sends what there is, at most up to ``end``. What was dropped before it could be sent is said in words, or,
        to one who counts, by breaking off: he comes back and is told where the rest begins."""
        size = (await asyncio.to_thread(self._stream.look)).size
        if size < self.at:  # the job itself has emptied its file
            self._stay_counted()
            self.at = 0
        async for offset, chunk in _each(self._stream.chunks(self.at, size if end is None else min(end, size))):
            if offset > self.at:
                self._stay_counted()
                await self._response.write(_word_of(offset - self.at))
            await self._response.write(chunk)
            self.at = offset + len(chunk)

    def _stay_counted(self) -> None:
        if self._counts:
            raise ConnectionResetError("what comes next in the log is not there any more")


async def _each(blocking: Iterator[tuple[int, bytes]]) -> AsyncIterator[tuple[int, bytes]]:
    """Reads the disk in a thread, a chunk at a time."""
    while (one := await asyncio.to_thread(next, blocking, None)) is not None:
        yield one
