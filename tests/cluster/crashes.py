"""What the crash tests share: a ledger that jobs sign when they start, clients that retry until they know, and hands to
end the processes of a node behind its back."""

from __future__ import annotations

import contextlib
import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.nodes import NodeProcess, wait_until

UNKNOWN = (ConnectionError, http.client.HTTPException, TimeoutError, OSError)
RETRY_SECONDS = 0.02


def runner_of(node: NodeProcess) -> psutil.Process | None:
    """The node's runner, if one is alive."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            folder = process.environ().get("P2P_RUNNER_DIR", "")
            if folder.startswith(str(node.data)) and process.status() != psutil.STATUS_ZOMBIE:
                return process
    return None


def kill_runner(node: NodeProcess) -> int:
    """SIGKILL to the runner; its former pid."""
    runner = runner_of(node)
    assert runner is not None, "there is no runner"
    runner.kill()
    wait_until(lambda: not alive(runner))
    return int(runner.pid)


def job_processes(node: NodeProcess, job: str) -> list[psutil.Process]:
    """Everything alive that this job started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get("P2P_JOB_ID") == job and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def alive(process: psutil.Process) -> bool:
    """Whether it still runs; one that only waits to be collected does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def finished_or_none(node: NodeProcess, job: str) -> dict[str, Any] | None:
    record = node.job(job)
    return record if record["state"] in ("completed", "failed", "cancelled") else None


@dataclass(kw_only=True)
class Asked:
    """One job of the campaign: what was asked for, and what has to come of it."""

    tag: int
    exit_code: int
    seconds: float
    max_attempts: int
    id: str = ""
    cancelled: bool = False
    releases: int = 0

    def body(self, ledger: Path) -> dict[str, Any]:
        """Signs the ledger with one write, works a while, leaves a result, ends with its code. With two attempts the
        first one fails."""
        code = f"$(( P2P_ATTEMPT == 1 ? 9 : {self.exit_code} ))" if self.max_attempts > 1 else str(self.exit_code)
        script = (
            f'printf "%s %s\\n" "$P2P_JOB_ID" "$P2P_ATTEMPT" >> "{ledger}"; sleep {self.seconds:.3f}; '
            f'echo \'{{"tag": {self.tag}}}\' > "$P2P_JOB_DIR/result.json"; exit {code}'
        )
        return {
            "command": ["/bin/sh", "-c", script],
            "max_attempts": self.max_attempts,
            "retry_backoff_seconds": 0,
            "grace_seconds": 1,
            "group": f"tag{self.tag}",
        }


@dataclass
class Campaign:
    """Clients that work against a node while somebody else kills it. Everything they were told is kept."""

    node: NodeProcess
    seed: int
    ledger: Path
    acked: dict[str, Asked] = field(default_factory=dict)
    verbs: Counter[str] = field(default_factory=Counter)
    unknown: int = 0
    problems: list[str] = field(default_factory=list)
    _tags: int = 0
    _keys: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        clients: tuple[Callable[[random.Random], None], ...] = (self._submit, self._submit, self._meddle)
        for n, client in enumerate(clients):
            rng = random.Random(self.seed * 100 + n)
            self._threads.append(threading.Thread(target=self._client, args=(client, rng), daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """Waits until every client knows what became of its last request; the node must be up."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client never got an answer"

    def _client(self, work: Callable[[random.Random], None], rng: random.Random) -> None:
        try:
            while not self._stop.is_set():
                work(rng)
                self._stop.wait(rng.random() * 0.12)
        except BaseException as error:
            self.problems.append(f"a client failed: {error!r}")
            raise

    def _submit(self, rng: random.Random) -> None:
        batch = [self._ask(rng) for _ in range(rng.choice([1, 1, 1, 2, 5]))]
        bodies = [asked.body(self.ledger) for asked in batch]
        if len(batch) == 1:
            status, answer = self._certain("/jobs", bodies[0])
            ids = [answer.get("id")]
        else:
            status, answer = self._certain("/jobs", {"jobs": bodies})
            ids = answer.get("ids", [])
        if status not in (200, 201) or len(ids) != len(batch):
            self.problems.append(f"submit: {status} {answer}")
            return
        with self._lock:
            for asked, job in zip(batch, ids, strict=True):
                asked.id = str(job)
                if asked.id in self.acked:
                    self.problems.append(f"job {job} was given to two submits")
                self.acked[asked.id] = asked

    def _ask(self, rng: random.Random) -> Asked:
        with self._lock:
            self._tags += 1
            tag = self._tags
        long = rng.random() < 0.15
        return Asked(
            tag=tag,
            exit_code=tag % 4,
            seconds=rng.uniform(1, 4) if long else rng.random() * 0.06,
            max_attempts=2 if rng.random() < 0.1 else 1,
        )

    def _meddle(self, rng: random.Random) -> None:
        """Cancels or releases somebody's job."""
        with self._lock:
            recent = [job for job, asked in self.acked.items() if not asked.cancelled][-6:]
        if not recent:
            return
        job, verb = rng.choice(recent), rng.choice(["cancel", "release"])
        status, answer = self._certain(f"/jobs/{job}/{verb}", {"reason": "campaign"})
        self.verbs[f"{verb} {status}"] += 1
        if status == 200 and verb == "cancel":
            self.acked[job].cancelled = True
        elif status == 200:
            self.acked[job].releases += 1
        elif status != 409:
            self.problems.append(f"{verb} {job}: {status} {answer}")

    def _certain(self, path: str, body: Any) -> tuple[int, Any]:
        """Asks again, with the same key, until the outcome is known."""
        with self._lock:
            self._keys += 1
            key = f"campaign-{self.seed}-{self._keys}"
        deadline = time.monotonic() + 90
        while True:
            try:
                status, answer = self.node.request("POST", path, body, headers={"Idempotency-Key": key}, timeout=15)
            except UNKNOWN:
                status, answer = 0, None
            if status not in (0, 429, 503, 504):
                return status, answer
            self.unknown += 1
            assert time.monotonic() < deadline, f"{path}: no certain answer in 90 s"
            time.sleep(RETRY_SECONDS)  # a client's pace, not a synchronisation


def check(campaign: Campaign) -> dict[str, int]:
    """Everything that was acknowledged is so, and nothing ran that should not have. Answers the figures; the list of
    what is wrong is `campaign.problems`."""
    node, problems = campaign.node, campaign.problems
    lines = [tuple(line.split()) for line in campaign.ledger.read_text().splitlines()] if campaign.acked else []
    started = Counter((job, int(attempt)) for job, attempt in lines)
    by_job: dict[str, set[int]] = {}
    for (job, attempt), times in started.items():
        by_job.setdefault(job, set()).add(attempt)
        if times > 1:
            problems.append(f"job {job} attempt {attempt} was started {times} times")
        if job not in campaign.acked:
            problems.append(f"job {job} ran and was never acknowledged to anybody")
    lost = 0
    for job, asked in campaign.acked.items():
        status, record = node.request("GET", f"/jobs/{job}")
        if status != 200:
            lost += 1
            problems.append(f"job {job} was acknowledged and is gone: {status} {record}")
            continue
        problems.extend(f"job {job}: {what}" for what in _wrong(asked, record, by_job.get(job, set())))
    status, counts = node.request("GET", "/work_queue_status")
    total = sum(counts["by_state"].values())
    if total != len(campaign.acked):
        problems.append(f"{total} jobs are in the queue, {len(campaign.acked)} were acknowledged")
    return {
        "jobs acknowledged": len(campaign.acked),
        "lost": lost,
        "processes started": len(lines),
        "started twice": sum(times > 1 for times in started.values()),
        "unknown outcomes retried": campaign.unknown,
        "cancels acknowledged": campaign.verbs["cancel 200"],
        "releases acknowledged": campaign.verbs["release 200"],
    }


def _wrong(asked: Asked, record: dict[str, Any], ran: set[int]) -> list[str]:
    """What contradicts what was asked for; empty if nothing does."""
    history = [(step["state"], step["attempt"], step["reason"] or "") for step in record["history"]]
    story = f"; history {history}, ran {sorted(ran)}"
    wrong = []
    for state, attempt, reason in history:
        if "restarted without it" in reason and attempt in ran:
            wrong.append(f"attempt {attempt} had started and was given back by a restart{story}")
        if any(cause in reason for cause in ("lease_lapsed", "runner_lost", "never_started", "spawn_failed")):
            wrong.append(f"attempt {attempt} ended as {state}: {reason}{story}")
    retries = sum(reason.startswith("retry: exit") for _, _, reason in history)
    if len(ran) > 1 + asked.releases + retries:
        wrong.append(f"{len(ran)} attempts started, {asked.releases} releases, {retries} retries{story}")
    if asked.cancelled:
        return wrong if record["state"] == "cancelled" else [*wrong, f"was cancelled and is {record['state']}{story}"]
    expected = asked.exit_code
    if asked.max_attempts > 1 and record["attempt"] == 1:
        expected = 9
    state = "completed" if expected == 0 else "failed"
    if (record["state"], record["exit_code"]) != (state, expected):
        wrong.append(f"is {record['state']} with {record['exit_code']}, not {state} with {expected}{story}")
    if state == "completed" and record["result"] != {"tag": asked.tag}:
        wrong.append(f"has the result {record['result']}{story}")
    if record["attempt"] not in ran:
        wrong.append(f"ended with attempt {record['attempt']}, which never ran{story}")
    return wrong
