"""Real nodes for tests: started as people start them, spoken to by HTTP, killed without mercy."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 30.0
# What a request meets while its node is down, or goes down under it.
UNKNOWN = (ConnectionError, http.client.HTTPException, TimeoutError, OSError)
# Below the ports that the kernel gives to outgoing connections: one of those must not sit on the port of a node that
# is about to be started again.
PORTS = range(11_000, 32_000)
QUICK = {"cluster": {"young_steady_seconds": 0.3}}  # a member is made a voter as soon as it is there
# What a record says beside what the journal says: nothing that other nodes must agree with.
SOFT = frozenset({"as_of", "why_pending", "progress", "last_sign_of_life_seconds"})
_given: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on, and that this process has not given away before."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _given:
            _given.add(port)
            return port


def wait_until(what: Callable[[], Any], *, seconds: float = 20.0, every: float = 0.02) -> Any:
    """The first true value of `what`; fails the test if there is none in time. For conditions that give no signal."""
    deadline = time.monotonic() + seconds
    while True:
        value = what()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(every)


@contextlib.contextmanager
def node_offering(folder: Path, resources: dict[str, Any]) -> Iterator[NodeProcess]:
    """A ready node with these resources, whatever this machine has, that does not fill its queue by itself."""
    file = folder / "resources.yaml"
    file.write_text(yaml.safe_dump(resources))
    node = NodeProcess(folder, ["--no-populate", "--resources", str(file)])
    try:
        node.start()
        yield node
    finally:
        node.destroy()


class NodeProcess:
    """A node in `folder`. `settings` become its cluster.yaml (nested dicts for sections). `host` is where tests reach
    it, and `prefix` what its command begins with (``ip netns exec …``)."""

    def __init__(
        self,
        folder: Path,
        flags: Sequence[str] = (),
        settings: dict[str, Any] | None = None,
        *,
        node_id: str = "n1",
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.node_id = node_id
        self.host, self.prefix = host, list(prefix)
        self.data = folder / "data"
        self.logs = folder / "logs"
        self.port = free_port()
        self.flags = list(flags)
        self.settings = settings or {}
        self.process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        self.token: str | None = None

    def __repr__(self) -> str:
        return f"<{self.node_id} at {self.address}>"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def running(self) -> bool:
        """Whether its process lives, frozen or not."""
        return self.process is not None and self.process.poll() is None

    @property
    def log_text(self) -> str:
        return (self.folder / "p2p.log").read_text(errors="replace")

    def start(self, *, wait: bool = True) -> None:
        """Starts the process; with `wait` returns once it is ready."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "cluster.yaml"
        config.write_text(yaml.safe_dump(self.settings))
        command = [
            *self.prefix,
            sys.executable,
            str(ROOT / "scripts/p2p_orchestrator.py"),
            *("--node-id", self.node_id, "--port", str(self.port), "--config", str(config)),
            *("--data-dir", str(self.data), "--log-dir", str(self.logs)),
            *self.flags,
        ]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("P2P_", "RINGRIFT_"))} | self.environment
        with (self.folder / "p2p.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env, cwd=self.folder
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"the node ended with {self.process.returncode}:\n{self.log_text}"
            with contextlib.suppress(OSError):
                return self.request("GET", "/ready")[0] == 200
            return False

        wait_until(ready, seconds=START_SECONDS)

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Ends the orchestrator (not the runner, not the jobs) and answers its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)

    def freeze(self) -> None:
        """SIGSTOP to the orchestrator: its connections stay open, and nothing is answered."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def voters(self) -> dict[str, dict[str, Any]]:
        """``/admin/voters`` by node id."""
        status, told = self.request("GET", "/admin/voters")
        assert status == 200, told
        return {row["node"]: row for row in told["voters"]}

    def destroy(self) -> None:
        """Ends the orchestrator, its runner and every job, whatever state they are in."""
        destroy([self])

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        raw: bytes | None = None,
        timeout: float = 30.0,
    ) -> tuple[int, Any]:
        """(status, JSON body, or text if it is not JSON)."""
        status, _, answer = self.exchange(method, path, body, headers=headers, raw=raw, timeout=timeout)
        return status, answer

    def exchange(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        raw: bytes | None = None,
        timeout: float = 30.0,
    ) -> tuple[int, dict[str, str], Any]:
        """(status, headers in lower case, body)."""
        sent = {"Content-Type": "application/json"} if method != "GET" else {}
        if self.token:
            sent["Authorization"] = f"Bearer {self.token}"
        sent |= headers or {}
        if raw is None and method != "GET":
            raw = json.dumps({} if body is None else body).encode()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request(method, path, body=raw, headers=sent)
            response = connection.getresponse()
            text = response.read()
            told = {name.lower(): value for name, value in response.getheaders()}
        finally:
            connection.close()
        try:
            return response.status, told, json.loads(text)
        except ValueError:
            return response.status, told, text.decode(errors="replace")

    def submit(self, **job: Any) -> str:
        """The id of a job that was accepted."""
        status, answer = self.request("POST", "/jobs", job)
        assert status in (200, 201), answer
        return str(answer["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        status, answer = self.request("GET", f"/jobs/{job_id}")
        assert status == 200, answer
        assert isinstance(answer, dict)
        return answer

    def job_stale(self, job_id: str) -> dict[str, Any]:
        """The job as this node's own copy has it."""
        status, answer = self.request("GET", f"/jobs/{job_id}?consistency=stale")
        assert status == 200, answer
        return dict(answer)

    def wait_for(self, job_id: str, *states: str, seconds: float = 30.0) -> dict[str, Any]:
        """The job's record once it is in one of these states."""
        record: dict[str, Any] = {}

        def there() -> bool:
            record.clear()
            record.update(self.job(job_id))
            return record["state"] in states

        wait_until(there, seconds=seconds)
        return record

    def status(self, *, timeout: float = 5.0) -> dict[str, Any]:
        """``/status`` from its own copy, whoever leads; empty if it does not answer."""
        with contextlib.suppress(*UNKNOWN):
            code, told = self.request("GET", "/status?consistency=stale", timeout=timeout)
            if code == 200:
                return dict(told)
        return {}


def destroy(nodes: Iterable[NodeProcess]) -> None:
    """Ends orchestrators, their runners and every job of theirs, whatever state they are in; none is left behind."""
    nodes = list(nodes)
    folders = tuple(f"{node.data}/" for node in nodes)
    for node in nodes:
        if node.running:
            assert node.process is not None
            node.process.kill()
    for node in nodes:
        if node.process is not None:
            node.process.wait(30)
    while doomed := _processes_in(folders):
        for process in doomed:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(doomed, timeout=10)


def _processes_in(folders: tuple[str, ...]) -> list[psutil.Process]:
    """Runners and jobs whose folders lie in one of these."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            mine = (environment.get(name, "") + "/" for name in ("P2P_RUNNER_DIR", "P2P_JOB_DIR"))
            if any(folder.startswith(folders) for folder in mine) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class ClusterProcesses:
    """Nodes that are told of each other, started as an operator would start them on `n` boxes. `each` gives further
    flags by node id. Nothing of it outlives `destroy`."""

    def __init__(
        self,
        folder: Path,
        n: int = 3,
        *,
        flags: Sequence[str] = ("--no-populate", "--no-worker"),
        settings: Mapping[str, Any] | None = None,
        each: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.folder, self.flags = folder, list(flags)
        self.settings = dict(settings if settings is not None else QUICK)
        self.token: str | None = None
        self.nodes: dict[str, NodeProcess] = {}
        for name in [f"n{i + 1}" for i in range(n)]:
            self.make(name, *(each or {}).get(name, ()))
        peers = self.peers()
        for node in self.nodes.values():
            node.flags += ["--peers", peers]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()

    def make(self, name: str, *flags: str, settings: Mapping[str, Any] | None = None, **more: Any) -> NodeProcess:
        """One more node, not started, told of nobody yet."""
        own = dict(settings if settings is not None else self.settings)
        node = NodeProcess(self.folder / name, [*self.flags, *flags], own, node_id=name, **more)
        node.token = self.token
        self.nodes[name] = node
        return node

    def peers(self) -> str:
        return ",".join(node.address for node in self.nodes.values())

    def __getitem__(self, name: str) -> NodeProcess:
        return self.nodes[name]

    @property
    def all(self) -> list[NodeProcess]:
        return list(self.nodes.values())

    def start(self, *names: str, voters: int | None = None) -> ClusterProcesses:
        """Starts these (or all) at once, and waits until they are ready; with `voters`, until there are so many."""
        chosen = [self.nodes[name] for name in names] or self.all
        for node in chosen:
            node.start(wait=False)
        for node in chosen:
            node.wait_ready()
        if voters is not None:
            self.wait_voters(voters)
        return self

    def mend(self, voters: int = 3) -> None:
        """Thaws what is frozen and starts what is down, as a test that shares these nodes leaves them to the next."""
        for node in self.all:
            if node.running:
                node.thaw()
            else:
                node.start(wait=False)
        self.wait_voters(voters)

    def destroy(self) -> None:
        destroy(self.all)

    # -- who leads ---------------------------------------------------------------------------------------------------

    def leads(self) -> NodeProcess | None:
        """The node that holds the office now, by its own word; the one of the latest term if two say so."""
        said = [(node.status(timeout=1.0), node) for node in self.all if node.running]
        leading = [(status["term"], node) for status, node in said if status.get("role") == "leader"]
        return max(leading, key=lambda pair: pair[0])[1] if leading else None

    def leader(self, *, other_than: NodeProcess | None = None, seconds: float = 10.0) -> NodeProcess:
        """Waits for a leader."""

        def there() -> NodeProcess | None:
            found = self.leads()
            return found if found is not other_than else None

        found = wait_until(there, seconds=seconds)
        assert isinstance(found, NodeProcess)
        return found

    def followers(self) -> list[NodeProcess]:
        """The running nodes that do not lead."""
        leader = self.leader()
        return [node for node in self.all if node is not leader and node.running]

    def wait_voters(self, count: int, *, seconds: float = 20.0) -> NodeProcess:
        """Waits until every running voter knows of `count` voters and all running nodes of one leader; answers it."""

        def agreed() -> NodeProcess | None:
            said = [node.status(timeout=2.0) for node in self.all if node.running]
            leaders = {status.get("leader_id") for status in said}
            copies = [status for status in said if status.get("voters")]
            if len(leaders) != 1 or not copies or any(len(status["voters"]) != count for status in copies):
                return None
            name = leaders.pop()
            leads = [status["node_id"] for status in said if status["role"] == "leader"]
            return self.nodes[name] if name is not None and leads == [name] else None

        found = wait_until(agreed, seconds=seconds)
        assert isinstance(found, NodeProcess)
        return found

    def wait_equal(self, *, seconds: float = 15.0) -> dict[str, dict[str, Any]]:
        """Waits until every running voter and learner has applied the same entries, and fails unless their queues are
        the same then; answers it."""
        differing: list[str] = []

        def equal() -> dict[str, dict[str, Any]] | None:
            leader = self.leads()
            if leader is None:
                return None
            config = leader.status()
            names = [*config.get("voters", ()), *config.get("learners", ())]
            copies = [self.nodes[name] for name in names if self.nodes[name].running]
            before = [node.status().get("journal", {}).get("applied_index") for node in copies]
            queues = [queue_of(node) for node in copies]
            after = [node.status().get("journal", {}).get("applied_index") for node in copies]
            if len({*before, *after}) != 1 or None in before:
                return None
            differing[:] = [node.node_id for node, queue in zip(copies, queues, strict=True) if queue != queues[0]]
            assert not differing, f"at entry {before[0]} the queues of {differing} differ from {copies[0].node_id}'s"
            return queues[0] or {"": {}}

        found = wait_until(equal, seconds=seconds, every=0.1)
        return {job: record for job, record in found.items() if job}


def queue_of(node: NodeProcess, *, consistency: str = "stale") -> dict[str, dict[str, Any]]:
    """Every job by id, from the node's own copy unless asked otherwise."""
    jobs: dict[str, dict[str, Any]] = {}
    cursor = ""
    while True:
        code, page = node.request("GET", f"/jobs?consistency={consistency}&limit=1000{cursor}")
        assert code == 200, page
        jobs |= {job["id"]: {k: v for k, v in job.items() if k not in SOFT} for job in page["jobs"]}
        if page["cursor"] is None:
            return jobs
        cursor = f"&cursor={page['cursor']}"
