"""Clients that never stop asking while somebody kills, freezes or cuts off the nodes, and the checker of what they were
told: everything acknowledged is kept, once, in the right state, on every voter (DESIGN §8.1 to §8.3).

A client repeats what it did not hear the outcome of, with the same key, through another node, until it knows. So in the
end every outcome is known, and the queue must hold exactly what was acknowledged.
"""

from __future__ import annotations

import itertools
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.nodes import UNKNOWN, ClusterProcesses, NodeProcess, queue_of, wait_until

ANSWER_SECONDS = 2.0
PACE_SECONDS = 0.02
CERTAIN_SECONDS = 60.0
TELLING = (200, 201, 404, 409)


@dataclass
class Kept:
    """A job that was acknowledged, and what was acknowledged of it since."""

    id: str
    cancelled: bool = False
    claims: list[int] = field(default_factory=list)  # the attempts that a client was given
    completed: int = 0  # the attempt whose completion was acknowledged
    maybe: bool = False  # a claim was asked for of which nobody heard: it may have been placed


@dataclass
class Ack:
    """When something was asked and acknowledged, on the monotonic clock, and by which node."""

    asked: float
    told: float
    via: str
    verb: str


class Clients:
    """Some threads that submit, cancel, claim and complete through all of `nodes`. `stop` waits until each knows what
    became of its last request."""

    def __init__(
        self,
        nodes: Sequence[NodeProcess],
        *,
        seed: int = 1,
        submitters: int = 2,
        workers: int = 1,
        cancels: bool = True,
    ) -> None:
        self.nodes, self.seed = list(nodes), seed
        self.jobs: dict[str, Kept] = {}
        self.before: set[str] = set()  # jobs that were there already: not ours to judge
        self.acks: list[Ack] = []
        self.answers: Counter[str] = Counter()
        self.problems: list[str] = []
        self._keys = 0
        self._run = secrets.token_hex(4)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        works: list[Callable[[random.Random], None]] = [self._submit] * submitters
        works += [self._cancel] * cancels
        works += [self._worker(n) for n in range(workers)]
        self._threads = [
            threading.Thread(target=self._client, args=(work, random.Random(seed * 100 + n)), daemon=True)
            for n, work in enumerate(works)
        ]

    def start(self) -> Clients:
        self.before = set(queue_of(self.nodes[0], consistency="linearizable"))
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(CERTAIN_SECONDS + 30)
            assert not thread.is_alive(), "a client never got a certain answer"

    def __enter__(self) -> Clients:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _client(self, work: Callable[[random.Random], None], rng: random.Random) -> None:
        try:
            while not self._stop.is_set():
                work(rng)
                self._stop.wait(rng.random() * PACE_SECONDS)
        except BaseException as error:
            self.problems.append(f"a client failed: {error!r}")
            raise

    # -- what they ask -----------------------------------------------------------------------------------------------

    def _submit(self, rng: random.Random) -> None:
        body = {"command": ["true"], "requires": {"cpus": 900}, "params": {"tag": rng.randrange(10**9)}}
        status, told = self._certain(rng, "submit", "/jobs", body)
        if status not in (200, 201):
            self.problems.append(f"submit: {status} {told}")
            return
        with self._lock:
            if told["id"] in self.jobs:
                self.problems.append(f"job {told['id']} was given to two submits")
            self.jobs[told["id"]] = Kept(told["id"])

    def _cancel(self, rng: random.Random) -> None:
        with self._lock:
            choice = [job for job in list(self.jobs.values())[-40:] if not job.cancelled and not job.completed]
        if not choice or rng.random() < 0.5:
            self._stop.wait(0.05)
            return
        job = rng.choice(choice)
        status, told = self._certain(rng, "cancel", f"/jobs/{job.id}/cancel", {"reason": "test"})
        if status == 200:
            job.cancelled = True
        elif status != 409 or told.get("field") == "Idempotency-Key":
            self.problems.append(f"cancel {job.id}: {status} {told}")

    def _worker(self, n: int) -> Callable[[random.Random], None]:
        """A worker that is no node of ours: it claims one job and completes it."""
        name = f"outside-{self.seed}-{n}"

        def work(rng: random.Random) -> None:
            body = {"worker": name, "resources": {"cpus": 1000}, "max_jobs": 1, "wait_seconds": 0.2}
            status, told, _ = self._ask(rng, "claim", "/worker/claim", body, {})
            if status != 200:
                self._stop.wait(0.05)
                return
            for job in told["jobs"]:
                item = {"id": job["id"], "attempt": job["attempt"], "worker": name, "result": {"by": name}}
                status, answer = self._certain(rng, "complete", "/worker/complete", item)
                with self._lock:
                    kept = self.jobs.get(job["id"])
                if kept is not None:
                    kept.claims.append(job["attempt"])
                    if status == 200:
                        kept.completed = job["attempt"]
                if status not in (200, 409):
                    self.problems.append(f"complete {job['id']}: {status} {answer}")

        return work

    # -- how they ask ------------------------------------------------------------------------------------------------

    def _certain(self, rng: random.Random, verb: str, path: str, body: Any) -> tuple[int, Any]:
        """Asks again, with the same key, through whoever answers, until the outcome is known."""
        with self._lock:
            self._keys += 1
            key = f"{self._run}-{self._keys}"
        deadline = time.monotonic() + CERTAIN_SECONDS
        while True:
            status, told, ack = self._ask(rng, verb, path, body, {"Idempotency-Key": key})
            if status in TELLING:
                if ack is not None:
                    self.acks.append(ack)
                return status, told
            if status not in (0, 429, 503, 504):
                return status, told
            assert time.monotonic() < deadline, (
                f"{verb}: no certain answer in {CERTAIN_SECONDS} s; last {status} {told}"
            )
            self._stop.wait(PACE_SECONDS) if not self._stop.is_set() else time.sleep(PACE_SECONDS)

    def _ask(
        self, rng: random.Random, verb: str, path: str, body: Any, headers: dict[str, str]
    ) -> tuple[int, Any, Ack | None]:
        node = rng.choice(self.nodes)
        asked = time.monotonic()
        try:
            status, told = node.request("POST", path, body, headers=headers, timeout=ANSWER_SECONDS)
        except UNKNOWN as error:
            self.answers[f"{verb} {type(error).__name__}"] += 1
            return 0, None, None
        self.answers[f"{verb} {status}"] += 1
        if status == 0 or status >= 300:
            return status, told, None
        return status, told, Ack(asked, time.monotonic(), node.node_id, verb)

    # -- what they know ----------------------------------------------------------------------------------------------

    def wait_acks(self, more: int = 20, *, since: float | None = None, seconds: float = 20.0) -> float:
        """Waits until so many things asked from now on (or `since`) were acknowledged; answers `since`."""
        at = time.monotonic() if since is None else since
        wait_until(lambda: sum(ack.asked >= at for ack in self.acks[-10_000:]) >= more, seconds=seconds)
        return at

    def gap(self, since: float) -> float:
        """Seconds from `since` to the first acknowledgement of something that was asked after it."""
        told = [ack.told for ack in self.acks if ack.asked >= since]
        assert told, "nothing was acknowledged since"
        return min(told) - since

    def longest_gap(self, *, since: float = 0.0) -> float:
        """The longest time in which nothing was acknowledged."""
        told = sorted(ack.told for ack in list(self.acks) if ack.told >= since)
        return max((b - a for a, b in itertools.pairwise(told)), default=0.0)


def check(clients: Clients, cluster: ClusterProcesses) -> dict[str, int]:
    """Fails with everything that contradicts what was acknowledged; answers figures. All copies must be equal."""
    queue = cluster.wait_equal()
    ours = clients.before | set(clients.jobs)
    problems = list(clients.problems)
    problems += [f"job {job} was acknowledged and is gone" for job in clients.jobs if job not in queue]
    problems += [f"job {job} is there and was acknowledged to nobody" for job in queue if job not in ours]
    for job, kept in clients.jobs.items():
        if job in queue:
            problems += [f"job {job}: {what}; {queue[job]}" for what in _wrong(kept, queue[job])]
    assert not problems, "\n".join([f"seed {clients.seed}; {dict(clients.answers)}", *problems[:20]])
    return {"jobs": len(queue), "acknowledged": len(clients.acks), **clients.answers}


def _wrong(kept: Kept, record: dict[str, Any]) -> list[str]:
    wrong = []
    state, attempt = record["state"], record["attempt"]
    if kept.cancelled and state != "cancelled":
        wrong.append(f"its cancel was acknowledged, and it is {state}")
    if kept.completed and (state, attempt) != ("completed", kept.completed):
        wrong.append(f"attempt {kept.completed} was acknowledged as complete, and attempt {attempt} is {state}")
    if kept.cancelled and kept.completed:
        wrong.append("both its cancel and its completion were acknowledged")
    if state == "completed" and attempt not in kept.claims:
        wrong.append(f"attempt {attempt} completed, which nobody was given")
    if len(set(kept.claims)) != len(kept.claims):
        wrong.append(f"an attempt was given out twice: {kept.claims}")
    if state not in ("pending", "claimed", "running", "completed", "cancelled", "waiting"):
        wrong.append(f"is {state}")
    return wrong
