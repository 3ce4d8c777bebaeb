"""One request to a node, and its answer or the one error that says what is known of it. Decides nothing else."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from typing import Any

from config.settings import DEFAULT_PORT

CONNECT_SECONDS = 5.0
READ_SECONDS, ORDER_SECONDS = 10.0, 90.0  # a node answers sooner: adding a voter waits until it has caught up
SLACK_SECONDS = 2.0  # a node answers within the deadline it was given; the way back takes a moment


class CliError(Exception):
    """What a person is told: a sentence, what to do about it, and the exit code."""

    code = 1

    def __init__(self, sentence: str, hint: str = "") -> None:
        super().__init__(sentence)
        self.sentence, self.hint = sentence, hint


class Usage(CliError):
    """The command line, the environment or a file it names is wrong."""

    code = 2


class Unreachable(CliError):
    """No node answered. A request that changes something was not sent."""

    code = 3


class Unknown(CliError):
    """It was sent, and may or may not have been done."""

    code = 4


class Failed(CliError):
    """The node refused or failed; nothing was changed. `status` is HTTP's."""

    def __init__(self, sentence: str, hint: str = "", *, status: int = 0) -> None:
        super().__init__(sentence, hint)
        self.status = status


class Client:
    """Speaks to the node at `url`. `seconds` is a deadline that the node is told; None: its own."""

    def __init__(self, url: str, token: str | None, seconds: float | None = None) -> None:
        try:
            parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
            self._host, self._port = parts.hostname, parts.port or 80
        except ValueError:
            self._host = None
            parts = urllib.parse.urlsplit("")
        if parts.scheme != "http" or not self._host or parts.path.strip("/") or parts.username:
            raise Usage(f"--url: {url!r} is no address of a node", f"it looks like http://127.0.0.1:{DEFAULT_PORT}")
        self.url = f"http://{parts.netloc}"
        self._token, self._seconds = token, seconds

    def get(self, path: str) -> dict[str, Any]:
        """Raises Unreachable, Failed."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Raises Unreachable, Failed, Unknown."""
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        connection = self._connected()
        usual = READ_SECONDS if method == "GET" else ORDER_SECONDS
        connection.sock.settimeout(usual if self._seconds is None else self._seconds + SLACK_SECONDS)
        headers = {"Accept": "application/json"}
        if self._seconds is not None:
            headers["X-P2P-Deadline-Ms"] = str(int(self._seconds * 1000))
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            connection.request(method, path, body=json.dumps(body) if body is not None else None, headers=headers)
            response = connection.getresponse()
            status, raw = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            why = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
            if method == "GET":
                raise Unreachable(f"the node at {self.url} does not answer: {why}", "ask another node: --url") from None
            raise Unknown(
                f"the node at {self.url} went away before it had answered ({why}): it may have been done",
                "look before you repeat it: p2pctl voters list, p2pctl leader",
            ) from None
        finally:
            connection.close()
        return self._told(status, raw)

    def _connected(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(str(self._host), self._port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
        except OSError as error:
            raise Unreachable(
                f"no node answers at {self.url}: {error.strerror or error}",
                "set --url or P2P_URL to a node that runs, or start one: "
                "nohup python scripts/p2p_orchestrator.py >> logs/p2p.log 2>&1 &",
            ) from None
        return connection

    def _told(self, status: int, raw: bytes) -> dict[str, Any]:
        try:
            told = json.loads(raw)
        except ValueError:
            told = None
        if not isinstance(told, dict):
            raise Failed(
                f"what answers at {self.url} is no node of this kind (HTTP {status})", "correct --url or P2P_URL"
            )
        if status < 300:
            return told
        detail = str(told.get("detail") or f"HTTP {status}")
        if status == 504:
            raise Unknown(detail, "look before you repeat it: p2pctl voters list, p2pctl leader")
        raise Failed(detail, _hint(status), status=status)


def _hint(status: int) -> str:
    match status:
        case 401:
            return (
                "name the file with the cluster's token: --token-file, or RINGRIFT_CLUSTER_AUTH_TOKEN_FILE; without "
                "one, run this as the node's own user"
            )
        case 403:
            return "use the node's address, or a name it knows, in --url"
        case 404:
            return "see who there is: p2pctl status"
        case 503:
            return (
                "see who is there: p2pctl status; docs/runbooks/P2P_LEADER_FAILOVER.md says what to do without a leader"
            )
    return ""
