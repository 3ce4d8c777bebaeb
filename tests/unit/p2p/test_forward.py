"""Any peer answers: real nodes' APIs on loopback, elections in the middle, and askers who mean no good."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgpack
import pytest
from aiohttp import web

from coordination import commands as c
from coordination.dispatcher import Room
from coordination.errors import Refused
from coordination.placement import Offer
from p2p.api import forward
from p2p.ids import NodeId, Term
from p2p.leadership import Leader
from tests.unit.p2p.boxes import TOKEN, Box, Boxes, boxes

JOB = {"command": ["true"]}
OFFER = Offer(node="w9", cpus=1)
SOON = {"X-P2P-Deadline-Ms": "400"}


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[Boxes]:
    async with boxes(tmp_path) as made:
        yield made


@pytest.fixture
async def led(three: Boxes) -> Boxes:
    """`a` leads, and all know it."""
    await three.elect(three.a)
    return three


def dead_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


# -- where a request is answered -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/jobs", JOB),
        ("GET", "/jobs", None),
        ("GET", "/jobs?limit=5&state=pending", None),
        ("GET", "/populator", None),
        ("POST", "/populator/populate", {"force": True}),
        ("POST", "/alerts", {"name": "x"}),
        ("POST", "/work_queue/clear", {}),
        ("GET", "/admin/voters", None),
        ("GET", "/work_queue_status", None),
    ],
)
async def test_the_leader_answers_what_was_asked_of_a_follower(led: Boxes, method: str, path: str, body: Any) -> None:
    answer = await led.b.ask(method, path, body)
    assert answer.status in (200, 201), answer
    assert led.a.asked == [(method, path)]


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/status", "/daemons", "/metrics"])
async def test_what_is_about_one_node_is_answered_there(led: Boxes, path: str) -> None:
    assert (await led.b.ask("GET", path)).status == 200
    assert led.a.asked == []


async def test_the_listing_of_a_follower_is_its_own(led: Boxes) -> None:
    assert (await led.b.ask("GET", "/")).body["node_id"] == "b"


async def test_what_is_said_of_a_node_is_the_leaders_to_keep(led: Boxes) -> None:
    led.a.context.dispatcher.make_room(Room(OFFER, None, 0))
    answer = await led.b.ask("POST", f"/nodes/{OFFER.node}/drain", {"reason": "it is old"})
    assert (answer.status, answer.body["node"], answer.body["draining"]) == (200, OFFER.node, True)
    assert led.a.desk.marks[OFFER.node].reason == "it is old"
    assert (await led.b.ask("POST", "/nodes/nobody/drain", {})).status == 404


async def test_nodes_are_told_of_without_a_leader_and_without_a_copy(three: Boxes) -> None:
    three.b.cluster.copy = False
    assert (await three.b.ask("GET", "/nodes")).status == 200


async def test_the_answer_of_the_leader_arrives_whole(led: Boxes) -> None:
    at_leader = await led.a.ask("POST", "/jobs", JOB)
    answer = await led.b.ask("POST", "/jobs", JOB)
    assert (answer.status, set(answer.body)) == (201, {"id", "created"})
    assert answer.headers["location"] == f"/jobs/{answer.body['id']}"
    ours = {"date", "server", "content-length"}
    assert set(answer.headers) - ours == set(at_leader.headers) - ours
    missing = await led.b.ask("GET", "/jobs/none")
    assert (missing.status, missing.headers["content-type"]) == (404, "application/problem+json")


async def test_msgpack_stays_msgpack(led: Boxes) -> None:
    packed = {"Content-Type": "application/msgpack"}
    answer = await led.b.ask("POST", "/jobs", raw=msgpack.packb(JOB), headers=packed)
    assert answer.status == 201
    assert set(msgpack.unpackb(answer.body)) == {"id", "created"}


async def test_a_packed_body_is_unpacked_once(led: Boxes) -> None:
    """aiohttp unpacks it on the way in; passed on with its header it could not be read by the leader."""
    headers = {"Content-Encoding": "gzip"}
    answer = await led.b.ask("POST", "/jobs", raw=gzip.compress(json.dumps(JOB).encode()), headers=headers)
    assert answer.status == 201, answer
    assert "content-encoding" not in led.a.heads[0]


async def test_head_is_a_get_without_a_body(led: Boxes) -> None:
    got = await led.b.ask("GET", "/jobs")
    answer = await led.b.ask("HEAD", "/jobs")
    assert (answer.status, answer.body) == (200, b"")
    assert led.a.asked[-1] == ("HEAD", "/jobs")
    assert abs(int(answer.headers["content-length"]) - len(json.dumps(got.body, separators=(",", ":")))) < 20


async def test_a_body_that_is_too_large_goes_no_further(led: Boxes) -> None:
    answer = await led.b.ask("POST", "/jobs", raw=b" " * ((16 << 20) + 1))
    assert answer.status == 413
    assert led.a.asked == []


async def test_who_expects_100_continue_gets_it_once(led: Boxes) -> None:
    body = json.dumps(JOB).encode()
    head = f"POST /jobs HTTP/1.1\r\nHost: {led.b.address}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    told = await led.b.raw(f"{head}Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert told.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201")
    assert "expect" not in led.a.heads[0]


async def test_only_the_leader_says_what_a_wrong_request_is_told(led: Boxes) -> None:
    answer = await led.b.ask("POST", "/jobs", {"command": ["true"], "priority": 101})
    assert (answer.status, answer.body["field"]) == (422, "priority")
    assert (await led.b.ask("POST", "/jobs", raw=b"{", headers={})).status == 400


# -- askers who mean no good -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "x:@{evil}/jobs",
        "http://{evil}/jobs",
        "//{evil}/jobs",
        "@{evil}/jobs",
        "/\\{evil}/jobs",
        "/jobs%00",
        "/jobs\xff",
    ],
)
async def test_no_target_leads_the_cluster_token_astray(tmp_path: Path, target: str) -> None:
    """``GET x:@evil/`` is no path: put behind the leader's address it would make of that the user of a URL and of evil
    its host, which then is sent the token that every request between nodes carries. (The parser in C refuses some.)"""
    async with boxes(tmp_path, token=TOKEN) as made:
        await made.elect(made.a)
        evil: list[dict[str, str]] = []

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            evil.append({"said": (await reader.read(4096)).decode("latin-1")})
            writer.close()

        server = await asyncio.start_server(listen, "127.0.0.1", 0)
        where = "{}:{}".format(*server.sockets[0].getsockname())
        async with server:
            line = f"GET {target.format(evil=where)} HTTP/1.1\r\nHost: {made.b.address}\r\nConnection: close\r\n\r\n"
            told = await made.b.raw(line.encode("latin-1"))
        assert evil == []
        assert int(told.split()[1]) in (200, 400, 403, 404), told  # an absolute target of ours is its path


async def test_what_only_nodes_may_say_is_not_believed_from_outside(tmp_path: Path) -> None:
    async with boxes(tmp_path, token=TOKEN) as made:
        await made.elect(made.a)
        lies = {
            "x-p2p-hops": "1",
            "X-P2P-Forwarded-By": "a",
            "x-p2p-direct": "1",
            "x-p2p-not-leader": "1",
            "Origin": f"http://{made.b.address}",
            "Keep-Alive": "1",
            "TE": "trailers",
            "X-Mine": "stays",
            "X-Hop": "goes",
            "Connection": "keep-alive, X-Hop",
        }
        refused = await made.b.ask("POST", "/jobs", JOB, headers=lies)
        assert refused.status == 401
        assert made.a.asked == []
        answer = await made.b.ask("POST", "/jobs", JOB, headers=lies | {"authorization": f"bearer {TOKEN}"})
        assert answer.status == 201, answer
        (head,) = made.a.heads
        assert (head["x-p2p-hops"], head["x-p2p-forwarded-by"]) == ("2", "b")
        assert head["authorization"] == f"Bearer {TOKEN}"
        assert head["host"] == made.a.address
        assert head["x-mine"] == "stays"
        assert not {"x-p2p-direct", "x-p2p-not-leader", "origin", "te", "x-hop", "keep-alive"} & set(head)


async def test_headers_in_small_letters_are_the_same_headers(led: Boxes) -> None:
    """HTTP clients of many languages write them so; beside ours in capitals there were two of each."""
    headers = {"idempotency-key": "k1", "x-p2p-deadline-ms": "5000", "x-p2p-hops": "0"}
    first = await led.b.ask("POST", "/jobs", JOB, headers=headers)
    again = await led.c.ask("POST", "/jobs", JOB, headers=headers)
    assert (first.status, again.status) == (201, 200), (first, again)
    assert first.body["id"] == again.body["id"]


async def test_two_keys_are_refused_on_every_node(led: Boxes) -> None:
    two = "Idempotency-Key: k1\r\nIdempotency-Key: k2\r\n"
    head = f"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{two}Connection: close\r\n"
    body = json.dumps(JOB).encode()
    for box in (led.a, led.b):
        request = head.replace("Host: x", f"Host: {box.address}") + f"Content-Length: {len(body)}\r\n\r\n"
        assert b"HTTP/1.1 422" in await box.raw(request.encode() + body)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-P2P-Hops", "-1"),
        ("X-P2P-Hops", "999"),
        ("X-P2P-Hops", "²"),
        ("X-P2P-Deadline-Ms", "soon"),
        ("X-P2P-Deadline-Ms", "1e3"),
        ("X-P2P-Deadline-Ms", "9999999999"),
    ],
)
async def test_a_header_of_ours_that_is_nonsense_is_named(led: Boxes, name: str, value: str) -> None:
    line = f"GET /jobs HTTP/1.1\r\nHost: {led.b.address}\r\n{name}: {value}\r\nConnection: close\r\n\r\n"
    told = await led.b.raw(line.encode())
    assert b"HTTP/1.1 400" in told
    assert name.encode() in told


async def test_a_leader_that_sends_elsewhere_is_not_followed(led: Boxes) -> None:
    async def elsewhere(request: web.Request) -> None:
        raise web.HTTPTemporaryRedirect(f"http://{led.c.address}/jobs")

    led.a.before = elsewhere
    answer = await led.b.ask("GET", "/jobs")
    assert answer.status == 307
    assert led.c.asked == []


# -- who leads is not who it was -------------------------------------------------------------------------------------


async def test_nobody_leads_and_that_is_told_in_time(three: Boxes) -> None:
    began = time.monotonic()
    answer = await three.b.ask("POST", "/jobs", JOB, headers=SOON)
    assert answer.status == 503
    assert 0.05 < time.monotonic() - began < 2.0
    assert "nothing was done" in answer.detail
    assert answer.headers["retry-after"] == "1"
    assert answer.body["idempotency_key"]


async def test_a_read_waits_two_seconds_for_a_leader(three: Boxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "READ_SECONDS", 0.3)
    began = time.monotonic()
    answer = await three.b.ask("GET", "/jobs")
    assert (answer.status, "retry-after" in answer.headers) == (503, True)
    assert time.monotonic() - began < 2.0


async def test_who_asks_during_an_election_is_answered_after_it(three: Boxes) -> None:
    asking = asyncio.create_task(three.b.ask("POST", "/jobs", JOB))
    while not three.b.asked:
        await asyncio.sleep(0)
    await three.elect(three.c)
    assert (await asking).status == 201
    assert len(three.jobs()) == 1


async def test_a_new_leader_answers_as_soon_as_its_desk_is_open(three: Boxes) -> None:
    three.a.leadership.learn(Leader(Term(1), NodeId("a"), three.a.address))
    asking = asyncio.create_task(three.a.ask("POST", "/jobs", JOB))
    while not three.a.asked:
        await asyncio.sleep(0)
    await three.a.lead()
    assert (await asking).status == 201


async def test_a_leader_that_is_gone_is_waited_for_no_longer_than_its_successor_takes(three: Boxes) -> None:
    three.b.leadership.learn(Leader(Term(1), NodeId("x"), dead_address()))
    asking = asyncio.create_task(three.b.ask("POST", "/work_queue/clear", {}))  # not keyed, and surely not done
    while not three.b.asked:
        await asyncio.sleep(0)
    await three.elect(three.a, heard_by="a b") if three.term else None
    three.term = 1
    await three.elect(three.a)
    assert (await asking).status == 200


@pytest.mark.parametrize("at", ["a", "b"], ids=["asked at the leader", "asked at a follower"])
@pytest.mark.parametrize("how", ["committed_and_deposed", "lost_and_deposed", "refused_and_deposed"])
async def test_a_submit_is_never_doubled_nor_lost(led: Boxes, at: str, how: str) -> None:
    """The leader falls in the middle; whether a majority had the job or not, it is there once."""
    led.ill(led.a, getattr(led, how))
    asking = asyncio.create_task(getattr(led, at).ask("POST", "/jobs", JOB))
    while led.leader is not None:
        await asyncio.sleep(0.001)
    await led.elect(led.c)
    answer = await asking
    assert answer.status in (200, 201), answer
    assert led.jobs() == [answer.body["id"]]


@pytest.mark.parametrize("at", ["a", "b"])
async def test_an_outcome_that_stays_unknown_is_never_told_as_not_done(led: Boxes, at: str) -> None:
    """No successor comes: a 503 would say that nothing was done, and the job is there."""
    led.ill(led.a, led.committed_and_deposed)
    answer = await getattr(led, at).ask("POST", "/jobs", JOB, headers=SOON | {"Idempotency-Key": "mine"})
    assert answer.status == 504
    assert answer.body["idempotency_key"] == "mine"
    assert "may have been done" in answer.detail
    assert len(led.jobs()) == 1


@pytest.mark.parametrize("at", ["b", "c"], ids=["asked at a follower", "asked at the next leader"])
async def test_a_refusal_of_the_second_attempt_says_nothing_of_the_first(led: Boxes, at: str) -> None:
    led.ill(led.a, led.committed_and_deposed)
    led.c.desk.disk_low = True
    asking = asyncio.create_task(getattr(led, at).ask("POST", "/jobs", JOB))
    while led.leader is not None:
        await asyncio.sleep(0.001)
    await led.elect(led.c)
    answer = await asking
    assert answer.status == 504, answer
    assert answer.body["idempotency_key"]


@pytest.mark.parametrize("at", ["a", "b"])
@pytest.mark.parametrize("keyed", [False, True], ids=["", "with a key that means nothing here"])
async def test_what_has_no_key_is_never_asked_twice(led: Boxes, at: str, keyed: bool) -> None:
    led.ill(led.a, led.lost_and_deposed)
    headers = {"Idempotency-Key": "k"} if keyed else {}
    asking = asyncio.create_task(getattr(led, at).ask("POST", "/work_queue/clear", {}, headers=headers))
    while led.leader is not None:
        await asyncio.sleep(0.001)
    await led.elect(led.c)
    assert (await asking).status == 504
    assert not any(isinstance(command, c.Clear) for command in led.queue.commands)


async def test_what_was_certainly_not_done_is_asked_again(led: Boxes) -> None:
    led.ill(led.a, led.refused_and_deposed)
    asking = asyncio.create_task(led.b.ask("POST", "/work_queue/clear", {}))
    while led.leader is not None:
        await asyncio.sleep(0.001)
    await led.elect(led.c)
    assert (await asking).status == 200


class Frozen:
    """A leader that takes a request and says nothing more."""

    def __init__(self, box: Box) -> None:
        self.reached, self.thawed = asyncio.Event(), asyncio.Event()
        box.before = self._freeze

    async def _freeze(self, request: web.Request) -> None:
        self.reached.set()
        await self.thawed.wait()


@pytest.mark.parametrize("keyed", [True, False], ids=["keyed", "not keyed"])
async def test_a_frozen_leader_is_left_for_its_successor_at_once(led: Boxes, keyed: bool) -> None:
    frozen = Frozen(led.a)
    path, body = ("/jobs", JOB) if keyed else ("/work_queue/clear", {})
    began = time.monotonic()
    asking = asyncio.create_task(led.b.ask("POST", path, body))
    await frozen.reached.wait()
    await led.elect(led.c, heard_by="b c")
    answer = await asking
    frozen.thawed.set()
    assert time.monotonic() - began < 5.0
    assert answer.status == (201 if keyed else 504), answer
    assert led.jobs() == ([answer.body["id"]] if keyed else [])


async def test_a_frozen_leader_does_not_hold_a_read_beyond_its_time(led: Boxes) -> None:
    frozen = Frozen(led.a)
    began = time.monotonic()
    answer = await led.b.ask("GET", "/jobs", headers=SOON)
    frozen.thawed.set()
    assert answer.status == 503
    assert time.monotonic() - began < 2.0


async def test_a_write_to_a_frozen_leader_ends_unknown_with_its_key(led: Boxes) -> None:
    frozen = Frozen(led.a)
    answer = await led.b.ask("POST", "/jobs", JOB, headers=SOON)
    frozen.thawed.set()
    assert answer.status == 504
    assert answer.body["idempotency_key"]


async def test_two_nodes_that_take_each_other_for_the_leader_end_it(three: Boxes) -> None:
    three.a.leadership.learn(Leader(Term(1), NodeId("b"), three.b.address))
    three.b.leadership.learn(Leader(Term(1), NodeId("a"), three.a.address))
    answer = await three.a.ask("POST", "/work_queue/clear", {}, headers=SOON)
    assert answer.status == 503
    hops = {head.get("x-p2p-hops") for head in three.a.heads + three.b.heads}
    assert hops <= {None, "1", "2"}


async def test_a_follower_that_was_taken_for_the_leader_passes_it_on_once(led: Boxes) -> None:
    led.b.leadership.learn(Leader(Term(2), NodeId("c"), led.c.address))
    assert (await led.b.ask("POST", "/jobs", JOB)).status == 201
    assert [box.heads[-1]["x-p2p-hops"] for box in (led.c, led.a)] == ["1", "2"]
    deadlines = [int(box.heads[-1]["x-p2p-deadline-ms"]) for box in (led.c, led.a)]
    assert 0 < deadlines[1] <= deadlines[0] <= 10_000


async def test_an_unexpected_answer_of_the_leader_is_passed_back(led: Boxes) -> None:
    def full(box: Box, body: bytes) -> Future[Any]:
        raise Refused(429, "the queue is full")

    led.ill(led.a, full)
    answer = await led.b.ask("POST", "/jobs", JOB)
    assert (answer.status, answer.headers["retry-after"]) == (429, "1")


# -- claims are held open --------------------------------------------------------------------------------------------

CLAIM = {"worker": "w", "resources": {"cpus": 1, "memory_mb": 1000}, "max_jobs": 1, "wait_seconds": 30}


async def test_a_claim_may_wait_longer_than_other_requests(led: Boxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "WRITE_SECONDS", 0.05)
    monkeypatch.setattr(forward, "LATE_SECONDS", 0.05)
    asking = asyncio.create_task(led.b.ask("POST", "/worker/claim", CLAIM))
    while not led.a.desk.matching._parked:
        await asyncio.sleep(0.001)
    late = asyncio.get_running_loop().time() + 0.3
    while asyncio.get_running_loop().time() < late:
        await asyncio.sleep(0.01)
    assert (await led.a.ask("POST", "/jobs", JOB)).status == 201
    answer = await asking
    assert answer.status == 200, answer
    assert len(answer.body["jobs"]) == 1


async def test_a_worker_that_hangs_up_is_given_nothing(led: Boxes) -> None:
    asking = asyncio.create_task(led.b.ask("POST", "/worker/claim", CLAIM))
    while not led.a.desk.matching._parked:
        await asyncio.sleep(0.001)
    asking.cancel()
    ((parked,),) = led.a.desk.matching._parked.values()
    while led.b.context.peers.session.connector._acquired:  # type: ignore[union-attr]
        await asyncio.sleep(0.01)
    assert not parked.future.done()
    assert (await led.a.ask("POST", "/jobs", JOB)).status == 201
    while led.a.desk.matching._parked:
        await asyncio.sleep(0.001)
    assert led.queue.state.pending_total == 1


# -- copies and pages ------------------------------------------------------------------------------------------------


async def test_a_stale_read_is_answered_from_the_copy_and_says_so(three: Boxes) -> None:
    answer = await three.b.ask("GET", "/jobs?consistency=stale")
    assert (answer.status, answer.body["as_of"]["consistency"]) == (200, "stale")
    assert answer.headers["x-p2p-consistency"] == "stale"


async def test_a_node_reads_its_own_write_by_its_index(led: Boxes) -> None:
    index = int((await led.a.ask("POST", "/jobs", JOB)).headers["x-p2p-index"])
    answer = await led.b.ask("GET", f"/jobs?min_index={index}")
    assert (answer.status, len(answer.body["jobs"])) == (200, 1)
    assert led.b.asked
    assert [path for _, path in led.a.asked] == ["/jobs"]


async def test_an_index_that_does_not_come_is_503(led: Boxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2p.api.context.MIN_INDEX_SECONDS", 0.05)
    answer = await led.b.ask("GET", "/jobs?min_index=99999")
    assert (answer.status, answer.body["field"]) == (503, "min_index")


@pytest.mark.parametrize("path", ["/work_queue_status", "/work_assignment_status"])
async def test_pages_never_go_dark(three: Boxes, path: str) -> None:
    assert (await three.b.ask("GET", path)).status == 200
    three.b.leadership.learn(Leader(Term(1), NodeId("x"), dead_address()))
    assert (await three.b.ask("GET", path)).status == 200
    await three.elect(three.a)
    assert (await three.b.ask("GET", path)).status == 200
    assert three.a.asked == [("GET", path)]


async def test_a_page_does_not_wait_for_a_frozen_leader(led: Boxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "PAGE_SECONDS", 0.1)
    frozen = Frozen(led.a)
    answer = await led.b.ask("GET", "/work_queue_status")
    frozen.thawed.set()
    assert answer.status == 200
    assert answer.body["as_of"]["consistency"] == "stale"


async def test_a_node_without_a_copy_shows_somebody_elses(three: Boxes) -> None:
    three.b.cluster.copy, three.b.cluster.age = False, float("inf")
    assert (await three.b.ask("GET", "/work_queue_status")).status == 503
    three.b.cluster.others = [(NodeId("x"), dead_address()), (NodeId("c"), three.c.address)]
    for path in ("/work_queue_status", "/jobs?consistency=stale"):
        assert (await three.b.ask("GET", path)).status == 200
    assert [path for _, path in three.c.asked] == ["/work_queue_status", "/jobs?consistency=stale"]


async def test_a_node_without_a_copy_tells_no_age_that_json_has_not(three: Boxes) -> None:
    three.b.cluster.copy, three.b.cluster.age = False, float("inf")
    told = await three.b.raw(f"GET /nodes HTTP/1.1\r\nHost: {three.b.address}\r\nConnection: close\r\n\r\n".encode())
    assert b"Infinity" not in told
    assert b'"age_seconds":null' in told


async def test_logs_are_found_by_no_name_that_leads_out_of_the_folder(three: Boxes) -> None:
    secret = three.b.folder.parent / "secret.1"
    secret.mkdir()
    (secret / "stdout").write_text("secret")
    for name in ("..%2Fsecret", "..%2F..%2Fetc", "%00", "a%2F..%2F..%2Fsecret"):
        answer = await three.b.ask("GET", f"/jobs/{name}/logs?attempt=1", headers={"X-P2P-Direct": "1"})
        assert answer.status == 404, name
