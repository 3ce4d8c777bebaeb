"""The pages people and machines read: their exact shapes (DESIGN §4), how fresh they say they are, events, logs."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.nodes import NodeProcess, wait_until


def sh(script: str, **more: Any) -> dict[str, Any]:
    return {"command": ["sh", "-c", script], **more}


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """A file for which jobs wait; it appears at the end of the test at the latest."""
    yield tmp_path / "gate"
    (tmp_path / "gate").touch()


def until(gate: Path, then: str = "true") -> str:
    return f'while [ ! -e "{gate}" ]; do sleep 0.02; done; {then}'


class Stream:
    """An answer that goes on: read line by line, with a limit on the wait for each."""

    def __init__(self, node: NodeProcess, path: str, headers: dict[str, str] | None = None) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=20)
        self._connection.request("GET", path, headers=headers or {})
        self.response = self._connection.getresponse()

    def line(self) -> str:
        """The next line; empty at the end of the stream."""
        return self.response.readline().decode()

    def rest(self) -> str:
        return self.response.read().decode()

    def event(self) -> tuple[int, str, dict[str, Any]]:
        """The next server-sent event: (number, name, data)."""
        fields: dict[str, str] = {}
        while (line := self.line()) != "\n" or not fields:
            assert line, "the stream ended"
            name, _, value = line.rstrip("\n").partition(": ")
            if name:
                fields[name] = value
        return int(fields["id"]), fields["event"], json.loads(fields["data"])

    def close(self) -> None:
        self.response.close()
        self._connection.close()


@contextlib.contextmanager
def streaming(node: NodeProcess, path: str, headers: dict[str, str] | None = None) -> Iterator[Stream]:
    stream = Stream(node, path, headers)
    try:
        yield stream
    finally:
        stream.close()


AS_OF = {"term", "index", "age_seconds", "consistency"}

# -- shapes ------------------------------------------------------------------------------------------------------------


def test_health_and_ready(running_node: NodeProcess) -> None:
    assert running_node.request("GET", "/health") == (200, {"status": "ok"})
    assert running_node.request("GET", "/ready") == (200, {"ready": True})


def test_ready_says_why_not(start_node: Callable[..., NodeProcess]) -> None:
    node = start_node("--no-populate")
    assert node.request("POST", "/nodes/n1/drain", {})[0] == 200
    status, headers, told = node.exchange("GET", "/ready")
    assert (status, told["ready"], told["reason"]) == (503, False, "draining")
    assert "retry-after" in headers
    assert node.request("GET", "/health")[0] == 200
    assert node.request("POST", "/nodes/n1/undrain", {})[0] == 200
    assert node.request("GET", "/ready")[0] == 200


def test_status_has_what_the_contract_names(running_node: NodeProcess) -> None:
    status, told = running_node.request("GET", "/status")
    assert status == 200
    assert {
        *("node_id", "role", "leader_id", "term", "voters", "alive_peers", "total_peers", "peers", "uptime_seconds"),
        *("version", "journal", "work_queue", "loops", "as_of"),
    } <= set(told)
    assert (told["node_id"], told["role"], told["leader_id"], told["voters"]) == ("n1", "leader", "n1", ["n1"])
    assert (told["alive_peers"], told["total_peers"]) == (1, 1)
    peer = told["peers"]["n1"]
    assert {"state", "address", "role", "last_seen_age", "resources", "running_jobs", "version"} <= set(peer)
    assert (peer["state"], peer["resources"]["cpus"], peer["resources"]["labels"]) == ("alive", 16, {"zone": "eu"})
    assert {"commit_index", "applied_index", "lag"} <= set(told["journal"])
    assert told["uptime_seconds"] > 0 and isinstance(told["version"], str)
    assert {"JobReaperLoop", "WorkerPullLoop", "QueuePopulatorLoop"} <= set(told["loops"])
    for loop in told["loops"].values():
        assert {"running", "last_run_time", "runs", "errors", "stats"} <= set(loop)
    assert {"pending", "in_progress", "completed_hour"} <= set(told["work_queue"])


def test_work_queue_status_counts_what_happens(running_node: NodeProcess, gate: Path) -> None:
    before = running_node.request("GET", "/work_queue_status")[1]
    assert {
        *("pending", "in_progress", "completed_hour", "failed_hour", "active_workers", "stalled"),
        *("oldest_item_age_seconds", "by_kind", "by_state", "health", "as_of"),
    } <= set(before)
    assert set(before["by_state"]) == {"waiting", "pending", "claimed", "running", "completed", "failed", "cancelled"}
    assert {"is_healthy", "message", "details"} <= set(before["health"])
    assert before["health"]["is_healthy"] is True
    done, failed = running_node.submit(**sh("true")), running_node.submit(**sh("false", max_attempts=1))
    held = running_node.submit(**sh(until(gate)))
    stuck = running_node.submit(**sh("true", requires={"cpus": 1_000}))
    running_node.wait_for(done, "completed")
    running_node.wait_for(failed, "failed")
    running_node.wait_for(held, "running")
    after = running_node.request("GET", "/work_queue_status")[1]
    for name, more in (("pending", 1), ("in_progress", 1), ("completed_hour", 1), ("failed_hour", 1)):
        assert after[name] == before[name] + more, name
    assert (after["active_workers"], after["stalled"]) == (1, 0)
    assert after["oldest_item_age_seconds"] > 0
    assert after["by_kind"]["command"]["running"] == 1
    gate.touch()
    running_node.wait_for(held, "completed")
    running_node.request("POST", f"/jobs/{stuck}/cancel", {})


def test_work_assignment_status_has_workers_and_nothing_else(running_node: NodeProcess, gate: Path) -> None:
    job = running_node.submit(**sh(until(gate)))
    running_node.wait_for(job, "running")
    status, headers, told = running_node.exchange("GET", "/work_assignment_status")
    assert status == 200
    assert set(told) == {"n1"}
    assert set(told["n1"]) == {"assigned", "completed", "failed", "last_heartbeat"}
    assert told["n1"]["assigned"] == 1
    assert abs(told["n1"]["last_heartbeat"] - time.time()) < 30
    assert int(headers["x-p2p-index"]) > 0
    gate.touch()
    running_node.wait_for(job, "completed")
    after = running_node.request("GET", "/work_assignment_status")[1]["n1"]
    assert (after["assigned"], after["completed"]) == (0, told["n1"]["completed"] + 1)


def test_nodes_lists_every_member(running_node: NodeProcess) -> None:
    status, told = running_node.request("GET", "/nodes")
    assert (status, set(told), set(told["nodes"])) == (200, {"nodes", "as_of"}, {"n1"})
    assert told["nodes"]["n1"]["address"].endswith(str(running_node.port))


def test_the_index_lists_every_page_with_its_purpose(running_node: NodeProcess) -> None:
    status, told = running_node.request("GET", "/")
    assert status == 200
    pages = {(page["method"], page["path"]) for page in told["pages"]}
    assert {("POST", "/jobs"), ("GET", "/status"), ("GET", "/events"), ("POST", "/worker/claim")} <= pages


def test_metrics_are_prometheus_text_and_agree_with_the_queue(running_node: NodeProcess) -> None:
    done = running_node.submit(**sh("true"))
    running_node.wait_for(done, "completed")
    status, headers, text = running_node.exchange("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {"p2p_jobs", "p2p_jobs_ends", "p2p_journal_term", "p2p_loop_runs", "process_open_fds"} <= set(families)
    jobs = {(s.labels["state"], s.labels["kind"]): s.value for s in families["p2p_jobs"].samples}
    by_kind = running_node.request("GET", "/work_queue_status")[1]["by_kind"]["command"]
    assert jobs[("completed", "command")] == by_kind["completed"]
    labels = {name for family in families.values() for sample in family.samples for name in sample.labels}
    assert labels <= {"state", "kind", "what", "loop"}, "ids in labels grow without bound"


# -- freshness ---------------------------------------------------------------------------------------------------------

FRESH = ["/status", "/work_queue_status", "/nodes", "/jobs", "/work_queue/stuck", "/work_queue/failures"]
FIXED = ["/work_assignment_status", "/populator", "/daemons"]


@pytest.mark.parametrize("path", FRESH + FIXED)
def test_every_read_says_how_fresh_it_is(running_node: NodeProcess, path: str) -> None:
    status, headers, told = running_node.exchange("GET", path)
    assert status == 200
    named = {name: headers[f"x-p2p-{name.replace('_', '-')}"] for name in AS_OF}
    assert named["consistency"] == "linearizable"
    if path in FRESH:
        assert set(told["as_of"]) == AS_OF
        assert {name: str(value) for name, value in told["as_of"].items()} == named
    else:
        assert "as_of" not in told


@pytest.mark.parametrize("path", FRESH)
def test_a_stale_read_is_said_to_be_one(running_node: NodeProcess, path: str) -> None:
    status, headers, told = running_node.exchange("GET", f"{path}?consistency=stale")
    assert (status, told["as_of"]["consistency"], headers["x-p2p-consistency"]) == (200, "stale", "stale")


def test_min_index_reads_ones_own_write_and_waits_only_so_long(running_node: NodeProcess) -> None:
    for _ in range(20):
        _, headers, told = running_node.exchange("POST", "/jobs", sh("true"))
        index = int(headers["x-p2p-index"])
        status, record = running_node.request("GET", f"/jobs/{told['id']}?min_index={index}&consistency=stale")
        assert status == 200
        assert record["as_of"]["index"] >= index
    begun = time.monotonic()
    status, headers, told = running_node.exchange("GET", f"/status?min_index={index + 10**9}")
    assert (status, told["field"]) == (503, "min_index")
    assert "retry-after" in headers and headers["content-type"] == "application/problem+json"
    assert 1 < time.monotonic() - begun < 10


# -- events ------------------------------------------------------------------------------------------------------------


def test_events_are_streamed_as_they_happen(running_node: NodeProcess) -> None:
    with streaming(running_node, "/events") as stream:
        assert stream.response.getheader("Content-Type") == "text/event-stream"
        job = running_node.submit(**sh("true"))
        seen = []
        while not seen or seen[-1][1] != "WORK_COMPLETED":
            number, name, data = stream.event()
            assert data["event"] == name
            if data.get("job") == job:
                seen.append((number, name))
    assert [name for _, name in seen] == ["WORK_QUEUED", "WORK_CLAIMED", "WORK_STARTED", "WORK_COMPLETED"]
    assert [number for number, _ in seen] == sorted({number for number, _ in seen})


@pytest.mark.parametrize("how", ["header", "query"])
def test_a_listener_that_comes_back_misses_nothing(running_node: NodeProcess, how: str) -> None:
    with streaming(running_node, "/events?after=0") as stream:
        first, name, data = stream.event()
        assert (first, name) == (1, "LEADER_ELECTED")
        assert data["node"] == "n1"
    missed = [running_node.submit(**sh("true")) for _ in range(3)]
    for job in missed:
        running_node.wait_for(job, "completed")
    path, headers = ("/events", {"Last-Event-ID": "1"}) if how == "header" else ("/events?after=1", {})
    with streaming(running_node, path, headers) as stream:
        live = running_node.submit(**sh("true"))
        numbers, ended = [], []
        while live not in ended:
            number, name, data = stream.event()
            numbers.append(number)
            if name == "WORK_COMPLETED" and data["job"] in (*missed, live):
                ended.append(data["job"])
    assert numbers == list(range(2, 2 + len(numbers))), "each once, in order, replayed and live"
    assert sorted(ended[:-1]) == sorted(missed)


def test_a_listener_that_hangs_up_leaves_no_trace(running_node: NodeProcess) -> None:
    for _ in range(5):
        with streaming(running_node, "/events?after=0") as stream:
            stream.event()
        job = running_node.submit(**sh("true"))
        running_node.wait_for(job, "completed")
    assert "Traceback" not in running_node.log_text


def test_listeners_have_a_limit_and_it_is_told(start_node: Callable[..., NodeProcess]) -> None:
    node = start_node("--no-populate", "--no-worker")
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(streaming(node, "/events")) for _ in range(100)]
        assert {stream.response.status for stream in streams} == {200}
        status, headers, told = node.exchange("GET", "/events")
        assert (status, told["title"]) == (429, "Too Many Requests")
        assert "retry-after" in headers
    # Those that have hung up make room at the next event.

    def room() -> bool:
        node.submit(**sh("true"))
        with streaming(node, "/events") as stream:
            return stream.response.status == 200

    wait_until(room)
    assert "Traceback" not in node.log_text


# -- logs --------------------------------------------------------------------------------------------------------------


def test_a_log_can_be_read_whole_and_by_its_tail(running_node: NodeProcess) -> None:
    # More than one block of the reader, with lines of many lengths and none at the end.
    job = running_node.submit(
        command=["python", "-c", "for n in range(20000): print(n, 'x' * (n % 20))\nprint('end', end='')"]
    )
    running_node.wait_for(job, "completed")
    lines = [f"{n} {'x' * (n % 20)}\n" for n in range(20_000)] + ["end"]
    status, headers, text = running_node.exchange("GET", f"/jobs/{job}/logs")
    assert (status, text) == (200, "".join(lines))
    assert headers["content-type"] == "text/plain; charset=utf-8"
    assert (headers["x-content-type-options"], headers["x-p2p-attempt"]) == ("nosniff", "1")
    for tail in (0, 1, 2, 5_000, 20_000, 20_001, 20_002, 1_000_000):
        told = running_node.exchange("GET", f"/jobs/{job}/logs?tail={tail}&stream=stdout")[2]
        assert str(told) == "".join(lines[-tail:] if tail else []), tail
    assert running_node.request("GET", f"/jobs/{job}/logs?stream=stderr") == (200, "")


def test_each_attempt_keeps_its_own_log(running_node: NodeProcess) -> None:
    script = 'echo "attempt $P2P_ATTEMPT"; echo "oops $P2P_ATTEMPT" >&2; exit 1'
    job = running_node.submit(**sh(script, max_attempts=2, retry_backoff_seconds=0))
    running_node.wait_for(job, "failed")
    assert running_node.request("GET", f"/jobs/{job}/logs") == (200, "attempt 2\n")
    assert running_node.request("GET", f"/jobs/{job}/logs?attempt=1") == (200, "attempt 1\n")
    assert running_node.request("GET", f"/jobs/{job}/logs?attempt=1&stream=stderr") == (200, "oops 1\n")
    status, told = running_node.request("GET", f"/jobs/{job}/logs?attempt=3")
    assert (status, told["field"]) == (404, "attempt")


def test_a_log_is_followed_live_and_ends_with_the_job(running_node: NodeProcess, tmp_path: Path, gate: Path) -> None:
    middle = tmp_path / "middle"
    job = running_node.submit(**sh(f"echo one; {until(middle, 'echo two')}; {until(gate, 'echo three')}"))
    running_node.wait_for(job, "running")
    with streaming(running_node, f"/jobs/{job}/logs?follow=1") as stream:
        assert stream.line() == "one\n"
        assert running_node.request("GET", f"/jobs/{job}/logs") == (200, "one\n")
        middle.touch()
        assert stream.line() == "two\n"
        assert running_node.job(job)["state"] == "running"
        gate.touch()
        assert stream.rest() == "three\n"
    assert running_node.wait_for(job, "completed")["state"] == "completed"
    begun = time.monotonic()
    assert running_node.request("GET", f"/jobs/{job}/logs?follow=1") == (200, "one\ntwo\nthree\n")
    assert time.monotonic() - begun < 5


def test_a_follower_of_a_cancelled_job_is_let_go(running_node: NodeProcess, gate: Path) -> None:
    job = running_node.submit(**sh(f"echo one; {until(gate)}", grace_seconds=0))
    running_node.wait_for(job, "running")
    with streaming(running_node, f"/jobs/{job}/logs?follow=1") as stream:
        assert stream.line() == "one\n"
        running_node.request("POST", f"/jobs/{job}/cancel", {})
        assert stream.rest() == ""


def test_many_followers_that_hang_up_leave_no_trace(running_node: NodeProcess, gate: Path) -> None:
    job = running_node.submit(**sh(f"echo one; {until(gate, 'echo two')}"))
    running_node.wait_for(job, "running")
    for _ in range(20):
        with streaming(running_node, f"/jobs/{job}/logs?follow=1") as stream:
            assert stream.line() == "one\n"
    gate.touch()
    running_node.wait_for(job, "completed")
    assert "Traceback" not in running_node.log_text


def test_a_job_that_has_not_started_has_an_empty_log(desk: NodeProcess) -> None:
    job = desk.submit(**sh("true"))
    for query in ("", "?tail=5", "?stream=stderr"):
        assert desk.request("GET", f"/jobs/{job}/logs{query}") == (200, "")


def test_bytes_that_are_not_text_come_through_as_they_are(running_node: NodeProcess) -> None:
    job = running_node.submit(command=["sh", "-c", r"printf '\377\376\000\r\n'"])
    running_node.wait_for(job, "completed")
    with streaming(running_node, f"/jobs/{job}/logs") as stream:
        assert stream.response.read() == b"\xff\xfe\x00\r\n"


def how_it_ends(stream: Stream) -> str:
    try:
        stream.rest()
    except (http.client.HTTPException, OSError):
        return "broken off"
    return "well"


def test_a_node_that_stops_lets_its_listeners_go(start_node: Callable[..., NodeProcess]) -> None:
    node = start_node("--no-populate")
    job = node.submit(**sh("echo one; sleep 600", grace_seconds=0))
    node.wait_for(job, "running")
    ends: list[str] = []
    with streaming(node, "/events") as events, streaming(node, f"/jobs/{job}/logs?follow=1") as log:
        assert log.line() == "one\n"
        readers = [threading.Thread(target=lambda s=s: ends.append(how_it_ends(s))) for s in (events, log)]
        for reader in readers:
            reader.start()
        begun = time.monotonic()
        assert node.request("POST", "/admin/shutdown", {}) == (200, {"shutting_down": True})
        assert node.process is not None
        assert node.process.wait(15) == 0
        assert time.monotonic() - begun < 8
        for reader in readers:
            reader.join(5)
            assert not reader.is_alive()
    assert sorted(ends) == ["broken off", "well"], "only a log that is whole ends well"
    assert "Traceback" not in node.log_text


def test_a_head_request_is_a_get_without_its_body(running_node: NodeProcess) -> None:
    """And never opens a stream that has no end: its listener could not be told from one that listens."""
    for path, expected in (("/status", 200), ("/jobs", 200), ("/nowhere", 404), ("/events", 405)):
        status, _, body = running_node.exchange("HEAD", path, headers={"Content-Type": "application/json"}, raw=b"")
        assert (status, body) == (expected, ""), path


def test_following_a_pending_job_waits_for_its_start(start_node: Callable[..., NodeProcess], tmp_path: Path) -> None:
    resources = tmp_path / "one.yaml"
    resources.write_text("cpus: 1\n")
    node = start_node("--no-populate", "--resources", str(resources))
    gate = tmp_path / "gate"
    first = node.submit(command=["sh", "-c", f'while [ ! -e "{gate}" ]; do sleep 0.05; done'])
    node.wait_for(first, "running")
    second = node.submit(command=["sh", "-c", "echo here I am"])
    with ThreadPoolExecutor(1) as pool:
        followed = pool.submit(node.request, "GET", f"/jobs/{second}/logs?follow=1")
        gate.touch()
        assert followed.result(30) == (200, "here I am\n")
