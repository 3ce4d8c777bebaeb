"""``/jobs/{id}/logs``: what a job has written, live while it runs, and after."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from aiohttp import web

from coordination.errors import Refused
from p2p.api.bodies import check_query, query_int, query_text
from p2p.api.context import Context, context
from p2p.api.relay import DIRECT, listens, relay
from p2p.peers import PeerRefused, PeerUnreachable

routes = web.RouteTableDef()

CHUNK = 64 << 10
FOLLOW_SECONDS = 0.2
MAX_TAIL = 1_000_000
LOOK_UP_SECONDS = 2.0
JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,56}(\.[0-9]{1,7})?")  # a member of an array is <array>.<index>


@routes.get("/jobs/{id}/logs")
async def logs(request: web.Request) -> web.StreamResponse:
    """``?stream=stdout|stderr&tail=LINES&follow=1&attempt=N``; plain text, the newest attempt unless one is named."""
    check_query(request, "stream", "tail", "follow", "attempt")
    stream = query_text(request, "stream", ("stdout", "stderr")) or "stdout"
    follow = query_text(request, "follow", ("0", "1")) == "1"
    tail = query_int(request, "tail", least=0, most=MAX_TAIL)
    asked = query_int(request, "attempt", least=1, most=1 << 31)
    here, job_id = context(request), request.match_info["id"]
    if not JOB_ID.fullmatch(job_id):
        raise Refused(404, f"there is no job {job_id[:80]!r}", field="id")  # and it will not name a folder
    if DIRECT in request.headers and asked is not None:
        attempt, finished = asked, not here.attempt_runs(job_id, asked)
    else:
        job = await find_job(here, job_id)
        if "counts" in job:
            raise Refused(409, f"{job_id} is an array; ask for a member's log: /jobs/{job_id}.INDEX/logs", field="id")
        if follow and asked is None and job["attempt"] == 0:
            job = await _first_attempt(request, job)
        job_id, attempt, finished = job["id"], asked or job["attempt"], job["finished_at"] is not None
        if attempt > job["attempt"]:
            raise Refused(
                404, f"job {job_id} has no attempt {attempt}; its newest is {job['attempt']}", field="attempt"
            )
        worker = _worker_of(job, attempt)
        if worker not in (None, here.settings.node_id) and here.cluster.knows(worker):
            query = urlencode({**request.query, "attempt": attempt})
            return await relay(request, str(worker), f"/jobs/{quote(job_id, safe='')}/logs?{query}")
    folder = here.attempt_folder(job_id, attempt)
    exists = attempt > 0 and await asyncio.to_thread(folder.is_dir)
    if not exists and attempt > 0 and finished:
        raise Refused(404, f"the logs of attempt {attempt} of job {job_id} are no longer kept", field="attempt")
    as_of = here.as_of()
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/plain; charset=utf-8",
            "X-Content-Type-Options": "nosniff",
            "X-P2P-Attempt": str(attempt),
            "X-P2P-Term": str(as_of["term"]),
            "X-P2P-Index": str(as_of["index"]),
        }
    )
    await response.prepare(request)
    if attempt > 0:
        reader = _Reader(folder, stream)
        async for chunk in _chunks(reader.history(tail)):
            await response.write(chunk)
        if follow:
            await _follow(here, request, response, reader, (job_id, attempt))
    await response.write_eof()
    return response


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


def _worker_of(job: dict[str, Any], attempt: int) -> str | None:
    """The node that has, or had, this attempt; None if it is not known any more."""
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
    here: Context, request: web.Request, response: web.StreamResponse, reader: _Reader, followed: tuple[str, int]
) -> None:
    """Sends what is added until the attempt is over, the asker hangs up or the node stops."""
    job, attempt = followed
    while listens(here, request):
        over = not here.attempt_runs(job, attempt)
        async for chunk in _chunks(reader.added()):
            await response.write(chunk)
        if over:
            return
        await asyncio.sleep(FOLLOW_SECONDS)


async def _chunks(blocking: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Reads the disk in a thread, a chunk at a time."""
    while True:
        chunk = await asyncio.to_thread(next, blocking, None)
        if chunk is None:
            return
        yield chunk


class _Reader:
    """One stream of one attempt: what the cap has moved to ``.old``, then the live file."""

    def __init__(self, folder: Path, stream: str) -> None:
        self._old, self._live = folder / f"{stream}.old", folder / stream
        self._at = 0

    def history(self, tail: int | None) -> Iterator[bytes]:
        """Everything kept, or its last `tail` lines."""
        end = _size(self._live)
        self._at = end
        if tail is None:
            yield from _read(self._old, 0, _size(self._old))
            yield from _read(self._live, 0, end)
            return
        begin = _last_lines(self._live, end, tail)
        if begin[1] > 0:
            old_end = _size(self._old)
            old = _last_lines(self._old, old_end, begin[1])
            yield from _read(self._old, old[0], old_end)
        yield from _read(self._live, begin[0], end)

    def added(self) -> Iterator[bytes]:
        """What was written since the last look; from the beginning if the log cap has cut the file meanwhile."""
        end = _size(self._live)
        if end < self._at:
            self._at = 0
        begin, self._at = self._at, end
        yield from _read(self._live, begin, end)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read(path: Path, begin: int, end: int) -> Iterator[bytes]:
    if begin >= end:
        return
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(begin)
        left = end - begin
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            left -= len(chunk)
            yield chunk


def _last_lines(path: Path, end: int, wanted: int) -> tuple[int, int]:
    """(where the last `wanted` lines begin, how many of them are missing)."""
    if wanted == 0 or end == 0:
        return end, wanted
    at, found = end, 0
    with path.open("rb") as file:
        while at > 0:
            begin = max(at - CHUNK, 0)
            file.seek(begin)
            block = file.read(at - begin)
            if at == end and block.endswith(b"\n"):
                block = block[:-1]
            cut = len(block)
            while (cut := block.rfind(b"\n", 0, cut)) >= 0:
                found += 1
                if found == wanted:
                    return begin + cut + 1, 0
            at = begin
    return 0, wanted - found - 1
