"""``/worker/*``: a worker of another make, over HTTP, as far as the leader can tell."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgpack
import pytest

from tests.nodes import NodeProcess, wait_until

ROOM = {"cpus": 8, "memory_mb": 1000}
MSGPACK = "application/msgpack"


class Worker:
    """Speaks for one worker; each test has its own, so that their jobs do not mix."""

    def __init__(self, node: NodeProcess, name: str, kind: str = "application/json") -> None:
        self.node, self.name, self.kind = node, name, kind

    def tell(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """(status, answer), in this worker's tongue; errors are always JSON."""
        text = msgpack.packb(body) if self.kind == MSGPACK else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.node.port, timeout=30)
        try:
            connection.request("POST", f"/worker/{path}", body=text, headers={"Content-Type": self.kind})
            response = connection.getresponse()
            told = response.read()
        finally:
            connection.close()
        if response.status == 200:
            assert response.getheader("Content-Type") == self.kind
            return 200, msgpack.unpackb(told) if self.kind == MSGPACK else json.loads(told)
        assert response.getheader("Content-Type") == "application/problem+json"
        return response.status, json.loads(told)

    def claim(self, *, wait: float = 0, jobs: int = 10, **more: Any) -> dict[str, Any]:
        label = {"labels": {"only": self.name}}
        body = {"worker": self.name, "resources": ROOM | label, "max_jobs": jobs, "wait_seconds": wait, **more}
        status, told = self.tell("claim", body)
        assert status == 200, told
        assert set(told) == {"jobs", "cancel"}
        return dict(told)

    def submit(self, **more: Any) -> str:
        """A job that only this worker can get."""
        requires = {"labels": {"only": self.name}, **more.pop("requires", {})}
        return self.node.submit(command=["true"], requires=requires, **more)

    def holding(self, **more: Any) -> dict[str, Any]:
        """A job that this worker has just claimed."""
        self.submit(**more)
        (job,) = self.claim()["jobs"]
        return dict(job)

    def beat(self, *jobs: dict[str, Any], **more: Any) -> dict[str, Any]:
        status, told = self.tell("heartbeat", {"worker": self.name, "jobs": list(jobs), **more})
        assert status == 200, told
        return dict(told)

    def report(self, path: str, job: dict[str, Any], **more: Any) -> tuple[int, Any]:
        return self.tell(path, {"id": job["id"], "attempt": job["attempt"], "worker": self.name, **more})

    def parked_claim(self, seconds: float = 20) -> Callable[[], tuple[float, dict[str, Any]]]:
        """Starts a claim that the leader holds open; the answer waits for (when it was answered, what it got)."""
        before = self.last_heard()
        results: list[tuple[float, dict[str, Any]]] = []

        def ask() -> None:
            told = self.claim(wait=seconds)
            results.append((time.monotonic(), told))

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: self.last_heard() != before)

        def answer() -> tuple[float, dict[str, Any]]:
            thread.join(seconds + 10)
            assert results, "the claim failed"
            return results[0]

        return answer

    def last_heard(self) -> float | None:
        row = self.node.request("GET", "/work_assignment_status")[1].get(self.name)
        return row and row["last_heartbeat"]


@pytest.fixture(params=["application/json", MSGPACK], ids=["json", "msgpack"])
def worker(request: pytest.FixtureRequest, desk: NodeProcess) -> Worker:
    name = f"w-{abs(hash(request.node.name)) % 10**8}"
    return Worker(desk, name, request.param)


def ids(jobs: list[dict[str, Any]]) -> list[str]:
    return [job["id"] for job in jobs]


def test_a_claim_tells_all_a_worker_needs(worker: Worker) -> None:
    job_id = worker.submit(
        env={"A": "b"}, cwd="/tmp", params={"x": 1}, timeout_seconds=60, grace_seconds=5, fence="strict"
    )
    assert worker.node.job(job_id)["state"] == "pending"
    (job,) = worker.claim()["jobs"]
    assert job.pop("token") > 0
    assert job == {
        "id": job_id,
        "attempt": 1,
        "kind": "command",
        "command": ["true"],
        "params": {"x": 1},
        "env": {"A": "b"},
        "cwd": "/tmp",
        "requires": {"labels": {"only": worker.name}},
        "gpus": [],
        "timeout_seconds": 60.0,
        "grace_seconds": 5.0,
        "fence": "strict",
        "checkpoint": None,
        "array": None,
    }
    record = worker.node.job(job_id)
    assert (record["state"], record["worker"], record["attempt"]) == ("claimed", worker.name, 1)
    assert worker.claim() == {"jobs": [], "cancel": []}


def test_a_claim_takes_no_more_than_asked_for_and_than_fits(worker: Worker) -> None:
    made = [worker.submit(requires={"cpus": 3}, priority=p) for p in (10, 30, 20)]
    assert ids(worker.claim(jobs=1)["jobs"]) == [made[1]]
    assert worker.claim(jobs=0)["jobs"] == []
    assert ids(worker.claim()["jobs"]) == [made[2], made[0]]
    more = [worker.submit(requires={"cpus": 3}) for _ in range(3)]
    assert ids(worker.claim()["jobs"]) == more[:2]
    assert ids(worker.claim()["jobs"]) == more[2:]


def test_a_heartbeat_starts_a_job_and_carries_its_progress(worker: Worker) -> None:
    job = worker.holding()
    beat = {"id": job["id"], "attempt": 1}
    begun = time.time()
    assert worker.beat({**beat, "progress": {"step": 1, "é": [None, 2.5]}}) == {"cancel": [], "stale": []}
    record = worker.node.job(job["id"])
    assert (record["state"], record["progress"]) == ("running", {"step": 1, "é": [None, 2.5]})
    assert abs(record["started_at"] - begun) < 10
    worker.beat({**beat, "progress": {"step": 2}, "cpu_seconds": 1.5, "output_bytes": 10})
    worker.beat(beat)
    assert worker.node.job(job["id"])["progress"] == {"step": 2}
    started = worker.holding()
    worker.beat({"id": started["id"], "attempt": 1, "started_at": 1_700_000_000.5})
    assert worker.node.job(started["id"])["started_at"] == 1_700_000_000.5


def test_one_completion_is_kept_and_may_be_told_twice(worker: Worker) -> None:
    job = worker.holding()
    result = {"score": 7, "text": "é", "list": [1, None, True], "big": 2**60}
    for _ in range(2):
        status, told = worker.report("complete", job, result=result, started_at=1_700_000_000.0)
        assert (status, told) == (200, {"id": job["id"], "attempt": 1, "status": 200})
    record = worker.node.job(job["id"])
    assert (record["state"], record["result"], record["exit_code"]) == ("completed", result, 0)
    assert [step["state"] for step in record["history"]] == ["pending", "claimed", "running", "completed"]
    books = worker.node.request("GET", "/work_assignment_status")[1][worker.name]
    assert (books["assigned"], books["completed"], books["failed"]) == (0, 1, 0)


def test_a_failure_is_retried_until_the_attempts_are_spent(worker: Worker) -> None:
    job = worker.holding(max_attempts=2, retry_backoff_seconds=0)
    assert worker.report("fail", job, error="out of luck", exit_code=3)[0] == 200
    record = worker.node.job(job["id"])
    assert (record["state"], record["error"], record["failed_attempts"]) == ("pending", "out of luck", 1)
    (again,) = worker.claim()["jobs"]
    assert (again["id"], again["attempt"]) == (job["id"], 2)
    assert worker.report("fail", again, error="again", exit_code=-9, cause="killed")[0] == 200
    record = worker.node.job(job["id"])
    assert (record["state"], record["exit_code"], record["reason"]) == ("failed", -9, "killed")


def test_a_failure_that_is_not_retryable_is_final(worker: Worker) -> None:
    job = worker.holding(max_attempts=5)
    assert worker.report("fail", job, error="bad input", retryable=False)[0] == 200
    record = worker.node.job(job["id"])
    assert (record["state"], record["failed_attempts"]) == ("failed", 1)


def test_a_batch_of_ends_is_answered_one_by_one(worker: Worker) -> None:
    for _ in range(3):
        worker.submit(max_attempts=1)
    first, second, third = worker.claim()["jobs"]
    mine = {"worker": worker.name}
    items = [
        {**mine, "id": first["id"], "attempt": 1, "result": 1},
        {**mine, "id": second["id"], "attempt": 2},
        {**mine, "id": "no-such-job", "attempt": 1},
        {**mine, "id": third["id"], "attempt": 1},
    ]
    status, told = worker.tell("complete", {"items": items})
    assert status == 200
    assert [(item["id"], item["status"]) for item in told["results"]] == [
        (first["id"], 200),
        (second["id"], 409),
        ("no-such-job", 404),
        (third["id"], 200),
    ]
    assert "is not the one in progress" in told["results"][1]["detail"]
    status, told = worker.tell("fail", {"items": [{**mine, "id": second["id"], "attempt": 1, "error": "x"}]})
    assert [item["status"] for item in told["results"]] == [200]
    states = [worker.node.job(job["id"])["state"] for job in (first, second, third)]
    assert states == ["completed", "failed", "completed"]


def test_an_old_attempt_gets_409_and_changes_nothing(worker: Worker) -> None:
    old = worker.holding()
    assert worker.node.request("POST", f"/jobs/{old['id']}/release", {"reason": "test"})[0] == 200
    (new,) = worker.claim()["jobs"]
    assert (new["id"], new["attempt"]) == (old["id"], 2)
    before = worker.node.job(old["id"])
    thief = Worker(worker.node, f"{worker.name}-thief", worker.kind)
    for who, job, path, more in (
        (worker, old, "complete", {"result": "stale"}),
        (worker, old, "fail", {"error": "stale"}),
        (worker, {**old, "attempt": 7}, "complete", {"result": "from the future"}),
        (thief, new, "complete", {"result": "of another worker"}),
    ):
        status, told = who.report(path, job, **more)
        assert (status, told["field"]) == (409, "attempt")
        after = worker.node.job(old["id"])
        for record in (before, after):
            for moving in ("as_of", "last_sign_of_life_seconds"):
                record.pop(moving, None)
        assert after == before
    assert worker.report("complete", new, result="fresh")[0] == 200
    assert worker.node.job(old["id"])["result"] == "fresh"


def test_a_heartbeat_names_what_is_stale_and_what_is_cancelled(worker: Worker) -> None:
    kept, cancelled, released = (worker.holding() for _ in range(3))
    lines = [{"id": job["id"], "attempt": 1} for job in (kept, cancelled, released)]
    assert worker.beat(*lines) == {"cancel": [], "stale": []}
    worker.node.request("POST", f"/jobs/{cancelled['id']}/cancel", {})
    worker.node.request("POST", f"/jobs/{released['id']}/release", {})
    told = worker.beat(*lines, {"id": "no-such-job", "attempt": 1})
    assert sorted(told["cancel"] + told["stale"]) == sorted([cancelled["id"], released["id"], "no-such-job"])
    assert cancelled["id"] in told["cancel"] and "no-such-job" in told["stale"]
    assert worker.node.job(kept["id"])["state"] == "running"
    told = worker.beat(lines[1])
    assert told["cancel"] + told["stale"] == [cancelled["id"]], "it is told for as long as it lists it"


def test_a_parked_claim_is_answered_when_a_job_arrives(worker: Worker) -> None:
    answer = worker.parked_claim()
    job = worker.submit()
    submitted = time.monotonic()
    at, told = answer()
    assert ids(told["jobs"]) == [job]
    assert at - submitted < 2


def test_a_parked_claim_ends_empty_when_its_wait_is_over(worker: Worker) -> None:
    begun = time.monotonic()
    assert worker.claim(wait=0.3) == {"jobs": [], "cancel": []}
    assert 0.29 <= time.monotonic() - begun < 5


@pytest.mark.parametrize("verb", ["cancel", "release"])
def test_a_parked_claim_is_told_what_to_kill(worker: Worker, verb: str) -> None:
    job = worker.holding()
    answer = worker.parked_claim()
    assert worker.node.request("POST", f"/jobs/{job['id']}/{verb}", {})[0] == 200
    changed = time.monotonic()
    at, told = answer()
    assert told["cancel"] == [{"id": job["id"], "attempt": 1, "reason": "cancelled"}]
    assert at - changed < 2


def test_a_claim_that_hangs_up_takes_nothing_with_it(desk: NodeProcess) -> None:
    worker = Worker(desk, "w-hangs-up")
    body = {"worker": worker.name, "resources": ROOM | {"labels": {"only": worker.name}}, "wait_seconds": 60}
    text = json.dumps(body).encode()
    head = "POST /worker/claim HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(text)}\r\n\r\n"
    before = worker.last_heard()
    connection = socket.create_connection(("127.0.0.1", desk.port))
    connection.sendall(head.encode() + text)
    wait_until(lambda: worker.last_heard() != before)
    connection.close()
    job = worker.submit()
    answer = worker.parked_claim()
    _, told = answer()
    assert ids(told["jobs"]) == [job]
    record = worker.node.job(job)
    assert (record["state"], record["attempt"]) == ("claimed", 1), "nothing was ever given to the one that left"


def test_a_worker_that_starts_anew_gives_back_what_it_does_not_list(worker: Worker) -> None:
    kept, lost = worker.holding(), worker.holding()
    assert worker.beat({"id": kept["id"], "attempt": 1}, first=True)["stale"] == []
    record = worker.node.job(lost["id"])
    assert (record["state"], record["failed_attempts"]) == ("pending", 0)
    assert worker.node.job(kept["id"])["state"] == "running"


def test_a_lapsed_lease_passes_the_job_on_and_the_late_report_changes_nothing(
    start_node: Callable[..., NodeProcess],
) -> None:
    node = start_node("--no-populate", "--no-worker", queue={"lease_seconds": 1.2}, reaper={"interval_seconds": 0.1})
    slow, busy, quick = (Worker(node, name) for name in ("slow", "busy", "quick"))
    lost = slow.holding(max_attempts=3, retry_backoff_seconds=0)
    kept = busy.holding()
    slow.beat({"id": lost["id"], "attempt": 1})  # its process runs, so its silence spends the attempt

    def lapsed() -> bool:
        assert busy.beat({"id": kept["id"], "attempt": 1}) == {"cancel": [], "stale": []}
        return bool(node.job(lost["id"])["state"] == "pending")

    begun = time.monotonic()
    wait_until(lapsed, seconds=15, every=0.1)
    assert time.monotonic() - begun > 0.5, "a lease is a promise"
    record = node.job(lost["id"])
    assert "slow" in record["error"] and record["failed_attempts"] == 1
    assert node.job(kept["id"])["state"] == "running"
    label = {"resources": ROOM | {"labels": {"only": "slow"}}}
    (again,) = quick.claim(**label)["jobs"]
    assert (again["id"], again["attempt"]) == (lost["id"], 2)
    told = slow.beat({"id": lost["id"], "attempt": 1})
    assert told["stale"] + told["cancel"] == [lost["id"]]
    for path, more in (("complete", {"result": "late"}), ("fail", {"error": "late"})):
        status, told = slow.report(path, lost, **more)
        assert (status, told["field"]) == (409, "attempt")
    assert quick.report("complete", again, result="in time")[0] == 200
    record = node.job(lost["id"])
    assert (record["state"], record["worker"], record["result"]) == ("completed", "quick", "in time")


def test_gpus_are_granted_by_uuid_over_http(desk: NodeProcess) -> None:
    worker = Worker(desk, "w-gpus")
    gpus = [
        {"uuid": "GPU-1", "model": "A100", "memory_mb": 40_000, "share_free": 0.5},
        {"uuid": "GPU-2", "model": "A100", "memory_mb": 40_000, "memory_free_mb": 10_000},
    ]
    room = {"resources": {**ROOM, "labels": {"only": worker.name}, "gpus": gpus}}
    worker.submit(requires={"gpus": 1, "gpu_memory_mb": 20_000, "gpu_share": 0.5})
    big = worker.submit(requires={"gpus": 1, "gpu_memory_mb": 20_000})
    small = worker.submit(requires={"gpus": 1, "gpu_memory_mb": 5_000})
    granted = {job["id"]: job["gpus"] for job in worker.claim(**room)["jobs"]}
    assert big not in granted
    assert granted[small] == ["GPU-2"] and ["GPU-1"] in granted.values()
    assert "needs 1 GPU, whole; the most free of one is 0" in desk.job(big)["why_pending"]


# -- what a failure carries --------------------------------------------------------------------------------------------


def test_a_checkpoint_and_the_memory_of_a_gpu_travel_with_a_failure(worker: Worker) -> None:
    job = worker.holding(max_attempts=5, retry_backoff_seconds=0)
    more = {"cause": "cuda_oom", "gpu_memory_mb": 24_000, "checkpoint": {"step": 7}}
    assert worker.report("fail", job, error="CUDA out of memory", **more)[0] == 200
    record = worker.node.job(job["id"])
    assert record["placement_hints"] == {"avoid": [worker.name], "gpu_memory_above_mb": 24_000}
    assert (set(record["requires"]), record["checkpoint"], record["failed_attempts"]) == ({"labels"}, {"step": 7}, 1)
    (again,) = worker.claim()["jobs"]
    assert (again["id"], again["attempt"], again["checkpoint"]) == (job["id"], 2, {"step": 7})


def test_an_attempt_that_was_preempted_is_not_spent(worker: Worker) -> None:
    job = worker.holding(max_attempts=1)
    assert worker.report("fail", job, error="made way", cause="preempted")[0] == 200
    record = worker.node.job(job["id"])
    assert (record["state"], record["failed_attempts"], record["reason"]) == ("pending", 0, "released: preempted")


def test_a_worker_that_only_beats_is_told_who_must_make_way(worker: Worker) -> None:
    """It is full, so it does not claim; it would hear of it when its job was taken from it, without a checkpoint."""
    job = worker.holding(max_attempts=1)
    beat = {"id": job["id"], "attempt": 1}
    assert "make_way" not in worker.beat(beat)
    status, told = worker.node.request("POST", f"/nodes/{worker.name}/drain", {"deadline_seconds": 0})
    assert status == 200, told
    asked = wait_until(lambda: worker.beat(beat).get("make_way"))
    assert asked == [{"id": job["id"], "attempt": 1, "reason": "drained"}]
    assert worker.tell("fail", {**beat, "worker": worker.name, "error": "SIGTERM", "cause": "drained"})[0] == 200
    record = worker.node.job(job["id"])
    assert (record["state"], record["failed_attempts"]) == ("pending", 0)
    assert worker.node.request("POST", f"/nodes/{worker.name}/undrain", {})[0] == 200


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("checkpoint", "x" * (64 << 10), "at most 65536 bytes"),
        ("gpu_memory_mb", -1, "0"),
        ("cause", "Boom", ""),
    ],
)
def test_a_failure_with_a_bad_field_is_refused_by_name(worker: Worker, field: str, value: Any, words: str) -> None:
    job = worker.holding()
    status, told = worker.report("fail", job, error="x", **{field: value})
    assert (status, told["field"]) == (422, field)
    assert words in told["detail"]
    assert worker.node.job(job["id"])["state"] == "claimed"
