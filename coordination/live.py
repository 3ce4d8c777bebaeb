"""Where the operators' API goes: to the live objects inside a node, else over HTTP to the node beside this shell.

`Backend.call(name, **arguments)` names an operation of `coordination.operations`; `HttpBackend` knows the request each
one is. The node sets the live backend when it starts; every other process speaks to ``P2P_URL``.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import threading
import urllib.parse
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from config.settings import DEFAULT_PORT, read_token
from coordination.answers import Answer
from coordination.errors import InvalidInput, NodeUnreachable, OutcomeUnknown, Refused

TIMEOUT_SECONDS = 60.0

# operation -> (method, path, names of the arguments that are part of the path)
ROUTES: dict[str, tuple[str, str]] = {
    "status": ("GET", "/status"),
    "queue_status": ("GET", "/work_queue_status"),
    "assignment_status": ("GET", "/work_assignment_status"),
    "stuck": ("GET", "/work_queue/stuck"),
    "failures": ("GET", "/work_queue/failures"),
    "job": ("GET", "/jobs/{id}"),
    "submit": ("POST", "/jobs"),
    "cancel": ("POST", "/jobs/{id}/cancel"),
    "release": ("POST", "/jobs/{id}/release"),
    "retry": ("POST", "/jobs/{id}/retry"),
    "retry_failed": ("POST", "/work_queue/retry_failed"),
    "schedules": ("GET", "/schedules"),
    "schedule": ("GET", "/schedules/{name}"),
    "put_schedule": ("POST", "/schedules"),
    "drop_schedule": ("DELETE", "/schedules/{name}"),
    "clear": ("POST", "/work_queue/clear"),
    "purge_failed": ("POST", "/work_queue/purge_failed"),
    "clear_inactive_workers": ("POST", "/work_queue/clear_inactive_workers"),
    "release_stuck": ("POST", "/work_queue/release_stuck"),
    "populator": ("GET", "/populator"),
    "populate": ("POST", "/populator/populate"),
    "daemons": ("GET", "/daemons"),
    "daemon_restart": ("POST", "/daemons/{type}/restart"),
    "daemon_start": ("POST", "/daemons/{type}/start"),
    "daemon_stop": ("POST", "/daemons/{type}/stop"),
    "raise_alert": ("POST", "/alerts"),
    "clear_alert": ("POST", "/alerts/clear"),
}


READING = frozenset(name for name, (method, _) in ROUTES.items() if method == "GET")
OF_ONE_NODE = frozenset({"status", "daemons", "daemon_restart", "daemon_start", "daemon_stop"})


class Backend(Protocol):
    """Carries out one operation and answers its JSON object. Blocks for as long as that takes."""

    def call(self, operation: str, **arguments: Any) -> Answer: ...


class LiveBackend:
    """The operations of this very process. A call from inside the node's event loop must not wait for that loop, so
    each runs on a short-lived loop of its own thread; the operations need nothing of the main one.

    `elsewhere(operation)` tells who carries it out if this node does not: the leader. It may raise Refused (503)."""

    def __init__(self, operations: Any, *, elsewhere: Callable[[str], Backend | None] = lambda operation: None) -> None:
        self._operations, self._elsewhere = operations, elsewhere

    def call(self, operation: str, **arguments: Any) -> Answer:
        other = self._elsewhere(operation)
        if other is not None:
            return other.call(operation, **arguments)
        method: Callable[..., Coroutine[Any, Any, dict[str, Any]]] = getattr(self._operations, operation)
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.append(asyncio.run(method(**arguments)))
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=run, name=f"operators-{operation}")
        thread.start()
        thread.join()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return Answer(outcome[0])


class HttpBackend:
    """Speaks to a node's HTTP API. `url` like ``http://127.0.0.1:8770``; `token` as in DESIGN §4."""

    def __init__(self, url: str, token: str | None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise InvalidInput("P2P_URL", f"must look like http://127.0.0.1:{DEFAULT_PORT}, not {url!r}")
        self.url, self._host, self._port = url.rstrip("/"), parts.hostname, parts.port or 80
        self._token = token

    def call(self, operation: str, **arguments: Any) -> Answer:
        """Raises NodeUnreachable, InvalidInput, Refused or OutcomeUnknown, each with the node's own sentence."""
        method, path = ROUTES[operation]
        for name in ("id", "type", "name"):
            if f"{{{name}}}" in path:
                path = path.replace(f"{{{name}}}", urllib.parse.quote(str(arguments.pop(name)), safe=""))
        headers = {"Accept": "application/json"}
        body = None
        if method == "GET":
            query = urllib.parse.urlencode({key: value for key, value in arguments.items() if value is not None})
            path += f"?{query}" if query else ""
        else:
            body = json.dumps(arguments.pop("body", arguments))
            headers["Content-Type"] = "application/json"
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        status, answer = self._exchange(method, path, body, headers)
        if status < 300:
            return Answer(answer)
        detail, field = str(answer.get("detail", answer)), str(answer.get("field") or "")
        if status in (400, 422) and field:
            raise InvalidInput(field, detail)
        if status == 504:
            raise OutcomeUnknown(detail)
        raise Refused(status, detail, field=field)

    def _exchange(self, method: str, path: str, body: str | None, headers: dict[str, str]) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_SECONDS)
        try:
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
            raw = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise NodeUnreachable(
                f"no node answers at {self.url} ({error}). Start one with: nohup python scripts/p2p_orchestrator.py "
                "> logs/p2p.log 2>&1 &   or set P2P_URL to where it listens"
            ) from error
        finally:
            connection.close()
        try:
            return response.status, json.loads(raw)
        except ValueError:
            return response.status, {"detail": raw[:500].decode("utf-8", "replace")}


def on_loop(loop: asyncio.AbstractEventLoop | None) -> bool:
    """Whether this is called on that event loop's thread, inside it."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


_live: Backend | None = None


def set_live(backend: Backend | None) -> None:
    """Called by the node at start and stop."""
    global _live  # noqa: PLW0603 - the one documented singleton behind get_work_queue() and its siblings
    _live = backend


def is_live() -> bool:
    """Whether this process is a node."""
    return _live is not None


def backend() -> Backend:
    """The live objects inside a node, else the node at ``P2P_URL``."""
    if _live is not None:
        return _live
    url = os.environ.get("P2P_URL") or f"http://127.0.0.1:{DEFAULT_PORT}"
    return HttpBackend(url, read_token(os.environ, None))
