"""Who may ask (DESIGN §4): the owner of the socket without a token, the token with one, and never a page of another
site. Clients of other users are forked children that change their uid, so those tests need root."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from aiohttp import web

from p2p.api.errors import problem_of
from p2p.api.security import Gate, socket_owner
from tests.nodes import ROOT, NodeProcess, free_port, wait_until

NOBODY, SOMEBODY = 65534, 65533
TOKEN = "correct-horse-battery-staple"
JSON = {"Content-Type": "application/json"}
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")


def as_user(uid: int, act: Callable[[], Any]) -> Any:
    """What `act` answers in a child process of that user; JSON values only."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # never returns into pytest
        with contextlib.suppress(BaseException):
            os.close(reading)
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            os.write(writing, json.dumps(act()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    assert text, "the child failed"
    return json.loads(text)


def ask(port: int, method: str, path: str, headers: dict[str, str], host: str = "127.0.0.1") -> list[Any]:
    """[status, body as text, WWW-Authenticate]."""
    connection = http.client.HTTPConnection(host, port, timeout=10)
    try:
        connection.request(method, path, body=b'{"command": ["true"]}' if method == "POST" else None, headers=headers)
        response = connection.getresponse()
        return [response.status, response.read().decode(), response.getheader("WWW-Authenticate")]
    finally:
        connection.close()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node with a token, given as people give it: in the environment."""
    node = NodeProcess(tmp_path_factory.mktemp("guarded"), ["--no-populate"])
    node.environment = {"RINGRIFT_CLUSTER_AUTH_TOKEN": TOKEN}
    node.token = TOKEN
    try:
        node.start()
        yield node
    finally:
        node.destroy()


# -- without a token -------------------------------------------------------------------------------------------------


@needs_root
def test_without_a_token_anybody_here_reads_and_only_the_owner_writes(desk: NodeProcess) -> None:
    assert as_user(NOBODY, lambda: ask(desk.port, "GET", "/status", {}))[0] == 200
    for path in ("/jobs", "/work_queue/clear", "/worker/claim", "/admin/shutdown"):
        status, body, asked = as_user(NOBODY, lambda path=path: ask(desk.port, "POST", path, JSON))
        assert (status, asked) == (401, "Bearer"), path
        assert f"uid {os.getuid()}" in json.loads(body)["detail"]
    assert ask(desk.port, "POST", "/jobs", JSON)[0] == 201
    assert desk.request("GET", "/health")[0] == 200


@needs_root
async def test_a_node_of_another_user_takes_writes_from_that_user_and_from_root(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate(None, set())

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        try:
            await gate.check(request)  # type: ignore[arg-type]
        except Exception as error:
            return problem_of(error).response()
        return web.Response(text="done")

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    monkeypatch.setattr(os, "getuid", lambda: SOMEBODY)
    try:
        for uid, expected in ((SOMEBODY, 200), (0, 200), (NOBODY, 401)):
            status = await asyncio.to_thread(as_user, uid, lambda: ask(port, "POST", "/jobs", JSON)[0])
            assert status == expected, uid
    finally:
        await runner.cleanup()


@needs_root
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_owner_of_a_socket_is_told_and_an_orphaned_socket_has_none(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        try:
            listener.bind((host, 0))
        except OSError:
            pytest.skip(f"no {host} here")
        listener.listen()
        name = listener.getsockname()
        ours: list[socket.socket] = []

        def connect() -> int:
            ours.append(socket.create_connection(name[:2]))
            return os.getuid()

        with socket.create_connection(name[:2]):
            peer, there = listener.accept()
            assert socket_owner(there, peer.getsockname()) == 0
            peer.close()
        assert as_user(NOBODY, connect) == NOBODY  # its process has ended, and the kernel shows the socket as root's
        peer, there = listener.accept()
        assert socket_owner(there, peer.getsockname()) is None
        peer.close()


@needs_root
def test_a_socket_closed_right_after_sending_is_not_taken_for_roots(desk: NodeProcess) -> None:
    def send_and_vanish() -> int:
        connection = socket.create_connection(("127.0.0.1", desk.port), timeout=10)
        # Long enough to be in flight still when the node looks for the sender; the kernel delivers it all the same.
        body = b'{"command": ["true"], "unique_key": "orphan"}' + b" " * (1 << 20)
        head = "POST /jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        port = int(connection.getsockname()[1])
        connection.close()
        return port

    def handled() -> bool:
        mine = [c for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == desk.port and c.raddr]
        return all(c.raddr.port != port for c in mine)

    assert desk.process is not None
    known = {job["id"] for job in desk.request("GET", "/jobs")[1]["jobs"]}
    desk.process.send_signal(signal.SIGSTOP)  # so that it looks only after the sender is gone
    try:
        port = as_user(NOBODY, send_and_vanish)
    finally:
        desk.process.send_signal(signal.SIGCONT)
    wait_until(handled)
    after = desk.submit(command=["true"])
    assert {job["id"] for job in desk.request("GET", "/jobs")[1]["jobs"]} == known | {after}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_without_a_token_a_node_refuses_to_listen_beyond_loopback(host: str, tmp_path: Any) -> None:
    command = [sys.executable, str(ROOT / "scripts/p2p_orchestrator.py"), "--host", host, "--port", "0"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("P2P_", "RINGRIFT_"))}
    ended = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert (
        f"without a token a node listens on loopback only, and '{host}' is not; give --auth-token-file" in ended.stderr
    )
    assert "Traceback" not in ended.stderr


# -- with a token ----------------------------------------------------------------------------------------------------

BEARER = {"Authorization": f"Bearer {TOKEN}"}


def test_with_a_token_health_and_reads_from_loopback_are_open(guarded: NodeProcess) -> None:
    for path in ("/health", "/status", "/jobs", "/work_queue_status", "/metrics", "/nodes"):
        assert ask(guarded.port, "GET", path, {})[0] == 200, path


WRONG = {
    "none": None,
    "empty": "",
    "scheme-only": "Bearer",
    "wrong": "Bearer wrong-horse-battery-staple",
    "shorter": f"Bearer {TOKEN[:-1]}",
    "longer": f"Bearer {TOKEN}x",
    "upper-case": f"Bearer {TOKEN.upper()}",
    "basic": f"Basic {TOKEN}",
    "bare": TOKEN,
    "latin-1": "Bearer clé",
}


@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG.keys())
def test_with_a_token_a_write_without_it_is_refused(guarded: NodeProcess, given: str | None) -> None:
    headers = JSON if given is None else {**JSON, "Authorization": given}
    for path in ("/jobs", "/worker/claim", "/work_queue/clear", "/admin/shutdown", "/nowhere"):
        status, body, asked = ask(guarded.port, "POST", path, headers)
        assert (status, asked) == (401, "Bearer"), path
        assert json.loads(body)["field"] == "Authorization"
        assert TOKEN not in body


@pytest.mark.parametrize("given", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"Bearer  {TOKEN} "])
def test_with_the_token_a_write_is_taken(guarded: NodeProcess, given: str) -> None:
    assert ask(guarded.port, "POST", "/jobs", {**JSON, "Authorization": given})[0] == 201


@needs_root
def test_with_a_token_the_user_does_not_matter(guarded: NodeProcess) -> None:
    assert as_user(NOBODY, lambda: ask(guarded.port, "POST", "/jobs", {**JSON, **BEARER}))[0] == 201
    assert ask(guarded.port, "POST", "/jobs", JSON)[0] == 401


def test_the_token_is_compared_in_constant_time() -> None:
    assert "compare_digest" in inspect.getsource(Gate._check_token)


def outward_address() -> str | None:
    """An IPv4 address of this machine that is not loopback."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return address.address
    return None


def test_reads_from_beyond_loopback_need_the_token(guarded: NodeProcess) -> None:
    host = outward_address()
    if host is None:
        pytest.skip("this machine has no address but loopback's")
    assert ask(guarded.port, "GET", "/health", {}, host)[0] == 200
    for path in ("/status", "/jobs", "/metrics", "/events", "/"):
        status, body, asked = ask(guarded.port, "GET", path, {}, host)
        assert (status, asked) == (401, "Bearer"), path
        assert json.loads(body)["title"] == "Unauthorized"
    assert ask(guarded.port, "GET", "/status", BEARER, host)[0] == 200
    assert ask(guarded.port, "POST", "/jobs", {**JSON, **BEARER}, host)[0] == 201


def test_the_token_is_nowhere_to_be_read(guarded: NodeProcess) -> None:
    """Not in a log, a page, an error, a process list, nor in what a job can see of itself and of the runner."""
    script = 'env; tr "\\0" "\\n" < /proc/self/environ; tr "\\0" "\\n" < /proc/$PPID/environ; echo done'
    job = guarded.submit(command=["sh", "-c", script], env={"MINE": "1"})
    record = guarded.wait_for(job, "completed", "failed")
    assert record["state"] == "completed", record["error"]
    status, seen = guarded.request("GET", f"/jobs/{job}/logs")
    assert status == 200
    assert "MINE=1" in seen and "P2P_RUNNER_DIR=" in seen and seen.endswith("done\n")  # it did look, at both
    assert "RINGRIFT_CLUSTER_AUTH_TOKEN" not in seen
    pages = [
        "/",
        "/status",
        "/metrics",
        "/nodes",
        "/daemons",
        "/work_queue_status",
        f"/jobs/{job}",
        "/nowhere",
        "/ready",
    ]
    told = [json.dumps(guarded.request("GET", path, headers=BEARER)[1]) for path in pages]
    told += [json.dumps(guarded.request("POST", path, {"bad": 1})[1]) for path in ("/jobs", "/alerts", "/nowhere")]
    told.append(json.dumps(guarded.request("POST", "/jobs", raw=b"{", headers=BEARER)[1]))
    assert guarded.process is not None
    node = psutil.Process(guarded.process.pid)
    told += [" ".join(process.cmdline()) for process in (node, *node.children(recursive=True))]
    assert TOKEN not in "\n".join([seen, *told])
    written = [path for path in guarded.folder.rglob("*") if path.is_file()]
    assert {"p2p.log", "coordination.log", "raft.db"} <= {path.name for path in written}
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []


# -- pages of other sites ------------------------------------------------------------------------------------------

FOREIGN = {
    "host-rebound": ("Host", {"Host": "rebind.example:{port}"}),
    "host-like-ours": ("Host", {"Host": "localhost.evil.example"}),
    "host-with-an-address-in-it": ("Host", {"Host": "127.0.0.1.evil.example"}),
    "host-behind-an-at": ("Host", {"Host": "127.0.0.1@evil.example"}),
    "host-empty": ("Host", {"Host": ""}),
    "origin-foreign": ("Origin", {"Origin": "http://evil.example"}),
    "origin-null": ("Origin", {"Origin": "null"}),
    "origin-empty": ("Origin", {"Origin": ""}),
    "origin-other-port": ("Origin", {"Origin": "http://127.0.0.1:1"}),
    "origin-other-name": ("Origin", {"Origin": "http://localhost:{port}"}),
    "site-cross": ("Sec-Fetch-Site", {"Sec-Fetch-Site": "cross-site"}),
    "site-same": ("Sec-Fetch-Site", {"Sec-Fetch-Site": "same-site"}),
    "site-unknown": ("Sec-Fetch-Site", {"Sec-Fetch-Site": "any"}),
}


@pytest.mark.parametrize(("field", "headers"), FOREIGN.values(), ids=FOREIGN.keys())
@pytest.mark.parametrize("token", [False, True], ids=["open", "token"])
def test_a_page_of_another_site_can_neither_read_nor_write(
    desk: NodeProcess, guarded: NodeProcess, token: bool, field: str, headers: dict[str, str]
) -> None:
    node = guarded if token else desk
    foreign = {name: value.format(port=node.port) for name, value in headers.items()} | (BEARER if token else {})
    for method, path in (("GET", "/health"), ("GET", "/status"), ("GET", "/events"), ("POST", "/jobs")):
        status, body, _ = ask(node.port, method, path, JSON | foreign)
        assert status == 403, (method, path, body)
        assert json.loads(body)["field"] == field


OWN = {
    "no-page": {},
    "own-page": {"Origin": "http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"},
    "typed-by-hand": {"Sec-Fetch-Site": "none"},
    "by-name": {"Host": "localhost:{port}", "Origin": "http://localhost:{port}"},
    "by-host-name": {"Host": socket.gethostname()},
    "by-address-6": {"Host": "[::1]:{port}"},
}


@pytest.mark.parametrize("headers", OWN.values(), ids=OWN.keys())
def test_our_own_page_may_read_and_write(desk: NodeProcess, headers: dict[str, str]) -> None:
    own = {name: value.format(port=desk.port) for name, value in headers.items()}
    assert ask(desk.port, "GET", "/status", own)[0] == 200
    assert ask(desk.port, "POST", "/jobs", JSON | own)[0] == 201


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b"])
@pytest.mark.parametrize("token", [False, True], ids=["open", "token"])
def test_what_a_form_can_send_is_refused(desk: NodeProcess, guarded: NodeProcess, token: bool, kind: str) -> None:
    node, known = (guarded, BEARER) if token else (desk, {})
    for path in ("/jobs", "/work_queue/clear", "/admin/shutdown"):
        status, body, _ = ask(node.port, "POST", path, {**known, "Content-Type": kind})
        assert (status, json.loads(body)["field"]) == (415, "Content-Type"), path
    assert ask(node.port, "GET", "/ready", {})[0] == 200
