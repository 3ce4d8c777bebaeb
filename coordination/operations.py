"""Every operation a person or a script can ask of the queue, once: the HTTP API and the operators' Python API both end
here. Each takes plain values and answers a JSON object; errors are those of `coordination.errors`.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections import defaultdict
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from typing import Any, cast

from config.settings import HealthSettings
from coordination.alerts import AlertBook
from coordination.daemon_manager import Supervisor
from coordination.daemon_types import DaemonState, DaemonType
from coordination.dispatcher import Dispatcher
from coordination.errors import InvalidInput, Refused
from coordination.health import QueueFigures, judge
from coordination.job import WORD, JobState
from coordination.leases import Verdict
from coordination.queue_reads import MAX_PAGE, NodeMark, QueueReader
from coordination.scheduler import Scheduler
from coordination.stalls import Stalls
from coordination.unified_queue_populator import Populator

DEFAULT_STUCK_SECONDS = 3600.0
# Environment variables whose values no page shows: whoever may read the queue need not hold every job's credentials.
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)


class Depth:
    """How long the queue has been deep, or has had work pending, without a break. Fed by whoever looks."""

    def __init__(self) -> None:
        self._deep_since: int | None = None
        self._pending_since: int | None = None

    def note(self, pending: int, limit: int, now: int) -> tuple[float, float | None]:
        """(seconds over the limit, seconds with work pending or None); `now` is monotonic ms."""
        self._deep_since = (self._deep_since or now) if pending > limit else None
        self._pending_since = (self._pending_since or now) if pending else None
        deep = (now - self._deep_since) / 1000 if self._deep_since else 0.0
        return deep, (now - self._pending_since) / 1000 if self._pending_since else None


def check_number(name: str, value: Any, *, least: float = 0.0, most: float = 1e9) -> float:
    """A finite number in range. Raises InvalidInput naming it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise InvalidInput(name, f"must be a number from {least:g} to {most:g}")
    return float(value)


def check_text(name: str, value: Any, *, most: int = 500) -> str:
    """A short text. Raises InvalidInput naming it."""
    if not isinstance(value, str) or not value or len(value) > most or not value.isprintable():
        raise InvalidInput(name, f"must be a printable text of 1 to {most} characters")
    return value


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidInput(name, "must be true or false")
    return value


class Operations:
    """See the module's docstring."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        populator: Populator,
        supervisor: Supervisor,
        alerts: AlertBook,
        limits: HealthSettings,
        node_status: Callable[[], Awaitable[dict[str, Any]]],
        scheduler: Scheduler,
        *,
        gpu_idle_seconds: float = 600.0,
    ) -> None:
        self._desk, self._populator, self._supervisor, self._alerts = dispatcher, populator, supervisor, alerts
        self._limits = limits
        self._node_status = node_status
        self._scheduler = scheduler
        self._depth = Depth()
        self.stalls = Stalls(dispatcher, gpu_idle_seconds=gpu_idle_seconds)

    # -- what the queue looks like --------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """The body of ``/status``."""
        return await self._node_status()

    async def queue_status(self) -> dict[str, Any]:
        """The body of ``/work_queue_status``."""
        desk = self._desk
        now_ms, now = desk.now_ms(), desk.mono_ms()
        hour_ago = now_ms // 60_000 - 59

        def read(reader: QueueReader) -> tuple[Any, ...]:
            return (
                reader.counts(),
                reader.ends_since(hour_ago),
                reader.oldest_pending_ms(),
                reader.last_completion_ms(),
                reader.totals(),
                reader.workers(),
            )

        counts, ends, oldest, last_done, totals, books = await desk.ask(read)
        by_state: defaultdict[str, int] = defaultdict(int, {str(state): 0 for state in JobState})
        by_kind: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for state, kind, _group, n in counts:
            by_state[state] += n
            by_kind[kind][state] = by_kind[kind].get(state, 0) + n
        hour: defaultdict[str, int] = defaultdict(int)
        for _minute, _kind, what, n in ends:
            hour[what] += n
        stuck = await self.stalls.now(int(DEFAULT_STUCK_SECONDS * 1000))
        deep_for, pending_for = self._depth.note(by_state["pending"], self._limits.queue_depth, now)
        figures = QueueFigures(
            pending=by_state["pending"],
            stuck=len(stuck),
            completed_hour=hour["completed"],
            failed_hour=hour["failed"],
            since_completion=(now_ms - last_done) / 1000 if last_done is not None else None,
            since_pending=pending_for,
            depth_over_for=deep_for,
        )
        active = self._active_workers(books, now)
        return {
            "pending": by_state["pending"],
            "in_progress": by_state["claimed"] + by_state["running"],
            "waiting": by_state["waiting"],
            "array_members_to_come": desk.array_backlog,
            "completed_hour": hour["completed"],
            "failed_hour": hour["failed"],
            "active_workers": len(active),
            "workers": active,
            "stalled": len(stuck),
            "oldest_item_age_seconds": max((now_ms - oldest) / 1000, 0.0) if oldest is not None else 0.0,
            "by_kind": dict(by_kind),
            "by_state": dict(by_state),
            "totals": _nest(totals),
            "health": judge(figures, self._limits).as_json(figures),
            "alerts": self._alerts.standing(),
        }

    def _active_workers(self, books: list[Any], now: int) -> list[dict[str, Any]]:
        leases = self._desk.leases
        by_name = {book.worker: book for book in books}
        rows = []
        for worker, at in sorted(leases.seen_at.copy().items()):
            if now - at <= leases.lease_ms:
                book = by_name.get(worker)
                rows.append(
                    {
                        "node": worker,
                        "last_heartbeat": leases.seen_ms.get(worker, 0) / 1000,
                        "assigned": book.assigned if book else 0,
                        "completed": book.completed if book else 0,
                        "failed": book.failed if book else 0,
                    }
                )
        return rows

    async def assignment_status(self) -> dict[str, Any]:
        """The body of ``/work_assignment_status``: ``{worker: {assigned, completed, failed, last_heartbeat}}``."""
        books = await self._desk.ask(lambda reader: reader.workers())
        seen = self._desk.leases.seen_ms.copy()
        rows: dict[str, Any] = {
            worker: {"assigned": 0, "completed": 0, "failed": 0, "last_heartbeat": at / 1000}
            for worker, at in seen.items()
        }
        for book in books:
            rows[book.worker] = {
                "assigned": book.assigned,
                "completed": book.completed,
                "failed": book.failed,
                "last_heartbeat": seen[book.worker] / 1000 if book.worker in seen else None,
            }
        return dict(sorted(rows.items()))

    async def stuck(self, threshold_seconds: Any = None) -> dict[str, Any]:
        """``{"jobs": […]}``: in progress for at least the threshold and with a reason; without a threshold those that
        ``stalled`` counts."""
        if threshold_seconds is None:
            found = await self.stalls.now(int(DEFAULT_STUCK_SECONDS * 1000))
        else:
            found = self._desk.stuck(int(check_number("threshold_seconds", threshold_seconds) * 1000))
        now_ms = self._desk.steady_ms()
        return {"jobs": [_stuck_row(verdict, now_ms) for verdict in found]}

    async def failures(self, limit: Any = 20) -> dict[str, Any]:
        """``{"jobs": […]}``, newest first."""
        n = int(check_number("limit", limit, least=1, most=MAX_PAGE))
        return {"jobs": await self._desk.ask(lambda reader: reader.recent_failures(n))}

    async def job(self, id: str) -> dict[str, Any]:
        """The whole record, with history and, while pending, `why_pending`. Raises Refused (404)."""

        def read(reader: QueueReader) -> tuple[dict[str, Any] | None, int | None]:
            record = reader.job(id)
            pending = record is not None and record["state"] == "pending"
            return record, reader.ahead(record["priority"], record["number"]) if record and pending else None

        record, ahead = await self._desk.ask(read)
        if record is None:
            return await self._array(id)
        return self._annotate(record, ahead)

    async def _array(self, id: str) -> dict[str, Any]:
        """The summary of an array, or what there is to say of a member that is not made yet."""
        record = await self._desk.ask(lambda reader: reader.array(id) or reader.member_to_come(id))
        if record is None:
            raise Refused(404, f"there is no job {id[:80]!r}", field="id")
        if "env" in record:
            record["env"] = _without_secrets(record["env"])
        return record

    async def jobs(
        self, *, filters: dict[str, str], limit: int, before: int | None, array: str | None = None
    ) -> dict[str, Any]:
        """A page: ``{"jobs", "cursor"}``; a cursor of null ends the list."""
        found, cursor = await self._desk.ask(
            lambda reader: reader.jobs(filters=filters, limit=limit, before=before, array=array)
        )
        looked: dict[str, list[Any]] = {}  # jobs that are equal wait for the same reasons
        for record in found:
            known = len(looked)
            self._annotate(record, looked=looked)
            if len(looked) > known:
                await asyncio.sleep(0)  # a look at a thousand nodes takes a while, and others wait for their answers
        return {"jobs": found, "cursor": str(cursor) if cursor else None}

    def _annotate(
        self, record: dict[str, Any], ahead: int | None = None, looked: dict[str, list[Any]] | None = None
    ) -> dict[str, Any]:
        """Adds what only the leader's memory knows: why it waits, its progress, its last sign of life."""
        record["env"] = _without_secrets(record["env"])
        state = record["state"]
        if state == "pending":
            record["why_pending"] = self._desk.why_pending(record, ahead, looked)
        elif state == "waiting":
            record["why_pending"] = _why_waiting(record, self._desk.now_ms())
        held = self._desk.leases.by_job.get(record["id"])
        if held is not None and held.attempt == record["attempt"]:
            record["progress"] = json.loads(held.progress) if held.progress else None
            record["last_sign_of_life_seconds"] = max((self._desk.mono_ms() - held.alive_at) / 1000, 0.0)
        return record

    # -- changing it ----------------------------------------------------------------------------------------------

    async def submit(
        self, body: Any, *, key: str | None = None, digest: str = "", batch: bool = False
    ) -> dict[str, Any]:
        """One job's ``{"id", "created"}``, or a batch's ``{"ids", "created": [bool]}``; with arrays among them also how
        many members each has: ``"count"``, or ``"counts"`` with null for what is none."""
        key = key or secrets.token_hex(12)
        bodies: AsyncIterable[Any] | Iterable[Any] = body if batch else [body]
        answer = cast(dict[str, Any], await self._desk.submit(bodies, batch=batch, key=key, digest=digest))
        if batch:
            return answer
        told = {"id": answer["ids"][0], "created": answer["created"][0]}
        return {**told, "count": answer["counts"][0]} if "counts" in answer else told

    async def cancel(self, id: str, reason: Any = "operator", *, key: str = "") -> dict[str, Any]:
        await self._desk.cancel([id], check_text("reason", reason), key=key)
        return await self.job(id)

    async def release(self, id: str, reason: Any = "operator", *, key: str = "") -> dict[str, Any]:
        await self._desk.release([id], check_text("reason", reason), key=key)
        return await self.job(id)

    async def retry(self, id: str, *, key: str = "") -> dict[str, Any]:
        await self._desk.retry(id, key=key)
        return await self.job(id)

    async def retry_failed(
        self,
        kind: Any = None,
        group: Any = None,
        array: Any = None,
        max_age_hours: Any = 24 * 365,
        limit: Any = 1_000_000,
    ) -> dict[str, Any]:
        """``{"retried": n}``: the dead letters of this kind, group or array, newest first, have all their attempts
        again."""
        hours = check_number("max_age_hours", max_age_hours, most=1e6)
        retried = await self._desk.retry_failed(
            kind=self._desk.kinds.canonical(check_text("kind", kind)) if kind is not None else None,
            group=check_text("group", group) if group is not None else None,
            array=check_text("array", array) if array is not None else None,
            max_age_ms=int(hours * 3_600_000),
            limit=int(check_number("limit", limit, least=1, most=1e6)),
        )
        return {"retried": retried}

    async def schedules(self) -> dict[str, Any]:
        """``{"schedules": […]}`` by name, each with its next and its last run."""
        return {"schedules": [_shown_schedule(row) for row in await self._scheduler.rows()]}

    async def schedule(self, name: str) -> dict[str, Any]:
        return _shown_schedule(await self._scheduler.row(name))

    async def put_schedule(self, /, name: Any, **body: Any) -> dict[str, Any]:
        """Adds a schedule or replaces the one of this name; answers it."""
        if not isinstance(name, str) or len(name) > 64 or not re.fullmatch(WORD, name):
            raise InvalidInput("name", "must be a word of at most 64 letters, digits and . _ : / -")
        return _shown_schedule(await self._scheduler.put(name, body))

    async def drop_schedule(self, name: str) -> dict[str, Any]:
        await self._scheduler.drop(name)
        return {"dropped": name}

    async def clear(self, include_running: Any = False) -> dict[str, Any]:
        return {"cleared": await self._desk.clear(include_running=check_flag("include_running", include_running))}

    async def purge_failed(self, max_age_hours: Any = 24) -> dict[str, Any]:
        hours = check_number("max_age_hours", max_age_hours, most=1e6)
        return {"purged": await self._desk.purge(("failed",), older_than_ms=int(hours * 3_600_000))}

    async def clear_inactive_workers(self, threshold_seconds: Any = 300) -> dict[str, Any]:
        seconds = check_number("threshold_seconds", threshold_seconds)
        return {"cleared": await self._desk.clear_inactive_workers(int(seconds * 1000))}

    async def release_stuck(self, threshold_seconds: Any = DEFAULT_STUCK_SECONDS) -> dict[str, Any]:
        threshold = check_number("threshold_seconds", threshold_seconds)
        stuck = self._desk.stuck(int(threshold * 1000))
        released: list[str] = []
        if stuck:
            released = await self._desk.release_those_held([verdict.held.job for verdict in stuck], "stuck")
        return {"released": len(released), "ids": released}

    # -- nodes ----------------------------------------------------------------------------------------------------

    async def mark_node(self, node: str, verb: str, reason: str, deadline_seconds: float | None) -> dict[str, Any]:
        """cordon, uncordon, drain or undrain; answers what is said of the node then."""
        deadline_ms = self._desk.now_ms() + round(deadline_seconds * 1000) if deadline_seconds is not None else 0
        change = {"cordon": {"cordoned": True}, "uncordon": {"cordoned": False}, "drain": {"draining": True}}
        what = change.get(verb, {"draining": False})
        mark = await self._desk.mark_node(node, deadline_ms=deadline_ms, reason=check_text("reason", reason), **what)
        return self._shown_mark(node, mark)

    async def node_marks(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What is said of these nodes: by the leader, or by the copy of the queue here."""
        marks = self._desk.marks.values() if self._desk.leads else await self._desk.ask(lambda reader: reader.nodes())
        known = {mark.node: mark for mark in marks}
        return {name: self._shown_mark(name, known.get(name)) for name in names}

    def _shown_mark(self, node: str, mark: NodeMark | None) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "cordoned": bool(mark and mark.cordoned),
            "draining": bool(mark and mark.draining),
            "drain_deadline": mark.deadline_ms / 1000 if mark and mark.deadline_ms else None,
            "marked_at": mark.since_ms / 1000 if mark else None,
            "mark_reason": mark.reason if mark else None,
        }
        if self._desk.leads:
            shown["jobs_left"] = len(self._desk.leases.by_worker.get(node, {}))
            shown["drained"] = bool(mark and mark.draining) and not shown["jobs_left"]
        return shown

    # -- the populator, the daemons, alerts -----------------------------------------------------------------------

    async def populator(self) -> dict[str, Any]:
        """The populator's health: ``{"is_healthy", "message", "details"}``; `details["daemon"]` is its loop's state."""
        health = await self._populator.health()
        daemon = self._supervisor.daemons.get(DaemonType.QUEUE_POPULATOR)
        state = daemon.state if daemon is not None else DaemonState.STOPPED
        health["details"]["daemon"] = str(state)
        if health["details"]["enabled"] and state is not DaemonState.RUNNING:
            why = f" after: {daemon.last_error}" if daemon is not None and daemon.last_error else ""
            health["is_healthy"] = False
            health["message"] = f"its daemon is not running ({state}){why}; restart {DaemonType.QUEUE_POPULATOR}"
        return health

    async def populate(self, force: Any = False) -> dict[str, Any]:
        return {"added": await self._populator.populate(force=check_flag("force", force))}

    async def daemons(self) -> dict[str, Any]:
        return self._supervisor.as_json()

    async def daemon_restart(self, type: str) -> dict[str, Any]:
        daemon = self._supervisor.get(type)
        await self._supervisor.on_loop(lambda: self._supervisor.restart(daemon))
        return {"daemon": str(daemon.type), **daemon.as_json()}

    async def daemon_start(self, type: str) -> dict[str, Any]:
        daemon = self._supervisor.get(type)

        async def start() -> None:
            self._supervisor.start(daemon)

        await self._supervisor.on_loop(start)
        return {"daemon": str(daemon.type), **daemon.as_json()}

    async def daemon_stop(self, type: str) -> dict[str, Any]:
        daemon = self._supervisor.get(type)
        await self._supervisor.on_loop(lambda: self._supervisor.stop(daemon))
        return {"daemon": str(daemon.type), **daemon.as_json()}

    async def raise_alert(self, name: Any, message: Any = "", severity: Any = "warning") -> dict[str, Any]:
        name = check_text("name", name, most=100)
        if severity not in ("info", "warning", "critical"):
            raise InvalidInput("severity", "must be one of info, warning, critical")
        text = check_text("message", message or name, most=2_000)
        raised = self._alerts.raise_alert(name, text, self._desk.now_ms(), severity=severity)
        return {"alert": name, "raised": raised}

    async def clear_alert(self, name: Any) -> dict[str, Any]:
        name = check_text("name", name, most=100)
        return {"alert": name, "cleared": self._alerts.clear_alert(name, self._desk.now_ms())}


def _without_secrets(env: dict[str, str]) -> dict[str, str]:
    return {name: "***" if _SECRET.search(name) else value for name, value in env.items()}


def _shown_schedule(row: dict[str, Any]) -> dict[str, Any]:
    """As anybody may see it: without the credentials of its job."""
    body = row["schedule"]
    job = {**body["job"], "env": _without_secrets(body["job"]["env"])} if "env" in body["job"] else body["job"]
    return {**row, "schedule": {**body, "job": job}}


def _nest(totals: dict[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    nested: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for (kind, what), n in sorted(totals.items()):
        nested[kind][what] = n
    return dict(nested)


def _stuck_row(verdict: Verdict, now_ms: int) -> dict[str, Any]:
    held = verdict.held
    return {
        "id": held.job,
        "kind": held.kind,
        "worker": held.worker,
        "attempt": held.attempt,
        "claimed_at": held.claimed_ms / 1000,
        "started_at": held.started_ms / 1000 if held.started_ms is not None else None,
        "seconds_in_progress": (now_ms - held.claimed_ms) / 1000,
        "cause": verdict.cause,
        "reason": verdict.reason,
    }


def _why_waiting(record: dict[str, Any], now_ms: int) -> str:
    if record["unfinished_dependencies"]:
        n = record["unfinished_dependencies"]
        return f"waits for {n} unfinished dependenc{'ies' if n > 1 else 'y'}"
    left = max((record["not_before"] or 0) - now_ms / 1000, 0.0)
    why = record["reason"] or "not before its time"
    return f"{why}; due in {left:.0f} s"
