"""``/jobs/{id}/logs`` on one node: places, ranges, the cap, and a follower that comes back."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.logs import NUMBERS, Reader, numbered
from tests.nodes import NodeProcess, wait_until

CAP = 1 << 20
WRITTEN = b"".join(b"line %d\n" % n for n in range(1_000))


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node that keeps 1 MiB of each stream."""
    node = NodeProcess(tmp_path_factory.mktemp("capped"), ["--no-populate"], {"work": {"log_cap_mb": 1}})
    try:
        node.start()
        yield node
    finally:
        node.destroy()


@pytest.fixture(scope="module")
def ended(capped: NodeProcess) -> str:
    """A job that has written `WRITTEN`."""
    job = capped.submit(command=["python", "-c", "for n in range(1000): print('line', n)"], requires={"cpus": 0})
    capped.wait_for(job, "completed")
    return job


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "gate"
    (tmp_path / "gate").touch()


def writer(node: NodeProcess, gate: Path, at_once: int, pause: float) -> str:
    return node.submit(
        command=["python", "-c", NUMBERS, str(gate), str(at_once), str(pause)], requires={"cpus": 0}, max_attempts=1
    )


def get(
    node: NodeProcess, job: str, query: str = "", *, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(node.host, node.port, timeout=30)
    try:
        connection.request(method, f"/jobs/{job}/logs{query}", headers=headers)
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


SIZE = len(WRITTEN)
RANGES = {
    "first": ("bytes=0-9", 0, 10),
    "middle": ("bytes=100-199", 100, 200),
    "from": (f"bytes={SIZE - 5}-", SIZE - 5, SIZE),
    "beyond-the-end": (f"bytes=10-{SIZE * 2}", 10, SIZE),
    "last": ("bytes=-7", SIZE - 7, SIZE),
    "more-than-there-is": (f"bytes=-{SIZE * 2}", 0, SIZE),
    "one": ("bytes=0-0", 0, 1),
}


@pytest.mark.parametrize(("header", "begin", "end"), RANGES.values(), ids=RANGES.keys())
def test_a_range_is_answered_with_206(capped: NodeProcess, ended: str, header: str, begin: int, end: int) -> None:
    status, headers, body = get(capped, ended, Range=header)
    assert (status, body) == (206, WRITTEN[begin:end])
    assert headers["content-range"] == f"bytes {begin}-{end - 1}/{SIZE}"
    assert (headers["content-length"], headers["accept-ranges"]) == (str(end - begin), "bytes")


@pytest.mark.parametrize("header", [f"bytes={SIZE}-", f"bytes={SIZE + 9}-{SIZE + 10}", "bytes=-0"])
def test_a_range_that_is_not_there_gets_416(capped: NodeProcess, ended: str, header: str) -> None:
    status, headers, _ = get(capped, ended, Range=header)
    assert (status, headers["content-range"]) == (416, f"bytes */{SIZE}")
    assert headers["content-type"] == "application/problem+json"
    assert (headers["x-p2p-log-start"], headers["x-p2p-log-size"]) == ("0", str(SIZE))


@pytest.mark.parametrize("header", ["bytes", "bytes=-", "bytes=5-2", "lines=1-2", "bytes=0-1,5-6", "bytes=a-b"])
def test_a_range_that_is_none_is_ignored(capped: NodeProcess, ended: str, header: str) -> None:
    assert get(capped, ended, Range=header)[::2] == (200, WRITTEN)


PLACES = {
    "offset": ("?offset=10", 10, SIZE),
    "offset-and-limit": ("?offset=10&limit=5", 10, 15),
    "limit": ("?limit=5", 0, 5),
    "nothing": ("?offset=10&limit=0", 10, 10),
    "at-the-end": (f"?offset={SIZE}", SIZE, SIZE),
    "tail-and-limit": ("?tail=2&limit=5", SIZE - 18, SIZE - 13),
    "follow-from": ("?offset=10&follow=1", 10, SIZE),
    "follow-and-limit": ("?offset=10&limit=7&follow=1", 10, 17),
    "tail": ("?tail=1", SIZE - 9, SIZE),
}


@pytest.mark.parametrize(("query", "begin", "end"), PLACES.values(), ids=PLACES.keys())
def test_a_place_is_told_and_counted(capped: NodeProcess, ended: str, query: str, begin: int, end: int) -> None:
    status, headers, body = get(capped, ended, query)
    assert (status, body) == (200, WRITTEN[begin:end])
    assert (headers["x-p2p-log-offset"], headers["x-p2p-log-start"]) == (str(begin), "0")
    assert (headers["x-p2p-log-size"], headers["x-p2p-node"], headers["x-p2p-attempt"]) == (str(SIZE), "n1", "1")


def test_a_head_request_tells_how_much_there_is(capped: NodeProcess, ended: str) -> None:
    for query in ("", "?follow=1", "?offset=5"):
        status, headers, body = get(capped, ended, query, method="HEAD")
        assert (status, headers["x-p2p-log-size"], body) == (200, str(SIZE), b"")


WRONG = {
    "offset-beyond": (f"?offset={SIZE + 1}", {}, 416, "offset"),
    "offset-negative": ("?offset=-1", {}, 422, "offset"),
    "offset-text": ("?offset=x", {}, 422, "offset"),
    "limit-negative": ("?limit=-1", {}, 422, "limit"),
    "tail-and-offset": ("?tail=1&offset=2", {}, 422, "tail"),
    "range-and-follow": ("?follow=1", {"Range": "bytes=0-1"}, 422, "Range"),
    "range-and-tail": ("?tail=1", {"Range": "bytes=0-1"}, 422, "Range"),
    "rank-unknown": ("?rank=3", {}, 404, "rank"),
    "rank-text": ("?rank=first", {}, 422, "rank"),
    "node-unknown": ("?node=nowhere", {}, 404, "node"),
    "node-and-rank": ("?node=n1&rank=0", {}, 422, "rank"),
    "attempt-unknown": ("?attempt=7", {}, 404, "attempt"),
    "no-such-parameter": ("?lines=7", {}, 422, "lines"),
}


@pytest.mark.parametrize(("query", "headers", "status", "field"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_question_says_what_is_wrong(
    capped: NodeProcess, ended: str, query: str, headers: dict[str, str], status: int, field: str
) -> None:
    connection = http.client.HTTPConnection(capped.host, capped.port, timeout=30)
    connection.request("GET", f"/jobs/{ended}/logs{query}", headers=headers)
    response = connection.getresponse()
    told = response.read().decode()
    connection.close()
    assert (response.status, f'"field": "{field}"' in told) == (status, True), told


def test_the_job_names_the_member_of_a_gang_by_rank_or_node(capped: NodeProcess, ended: str) -> None:
    for query in ("?rank=0", "?node=n1"):
        assert get(capped, ended, query)[::2] == (200, WRITTEN)


def test_beyond_its_cap_the_newest_is_kept_and_what_went_is_said(capped: NodeProcess, gate: Path) -> None:
    job = writer(capped, gate, 10_000, 0.0)
    wait_until(lambda: int(get(capped, job, method="HEAD")[1]["x-p2p-log-start"]) > CAP)
    gate.touch()
    capped.wait_for(job, "completed")
    _, headers, body = get(capped, job)
    start, size = int(headers["x-p2p-log-start"]), int(headers["x-p2p-log-size"])
    word, _, rest = body.partition(b"\n")
    assert word == b"[p2p: %d bytes were dropped here, the log is capped]" % start
    assert rest == numbered(start, size)
    assert CAP // 2 <= len(rest) <= CAP
    assert int(headers["x-p2p-log-offset"]) + len(body) == size, "who counts comes out right all the same"
    # Who names a place gets what is there and nothing else.
    _, headers, body = get(capped, job, "?offset=5&limit=100")
    assert (headers["x-p2p-log-offset"], body) == (str(start), numbered(start, start + 100))
    status, headers, body = get(capped, job, Range=f"bytes=5-{start + 99}")
    assert (status, headers["content-range"]) == (206, f"bytes {start}-{start + 99}/{size}")
    assert body == numbered(start, start + 100)
    assert get(capped, job, Range=f"bytes=5-{start - 1}")[0] == 416
    assert get(capped, job, "?tail=3")[2] == numbered(size - 27, size)


def test_a_follower_loses_and_repeats_nothing_while_the_cap_drops_what_it_has_read(
    capped: NodeProcess, gate: Path
) -> None:
    """Some 4 MB under a cap of 1 MB, and the connection is cut every now and then."""
    job = writer(capped, gate, 2_000, 0.01)
    capped.wait_for(job, "running")
    reader = Reader(capped, job)
    while reader.at < 4 * CAP:
        cut_at = reader.at + 200_000
        for piece in reader.pieces(follow=1):
            assert piece == numbered(reader.at, reader.at + len(piece))
            if reader.at > cut_at:
                break
    gate.touch()
    for offset, piece in reader.all():
        assert piece == numbered(offset, offset + len(piece))
    record = capped.wait_for(job, "completed")
    assert (record["exit_code"], reader.skipped) == (0, 0)
    assert reader.at == int(get(capped, job, method="HEAD")[1]["x-p2p-log-size"]) > 4 * CAP


def test_who_reads_slower_than_a_flood_is_told_where_the_rest_begins(capped: NodeProcess, gate: Path) -> None:
    """A gap is never told as if it were none: one who counts is broken off, others read how much is missing."""
    job = writer(capped, gate, 50_000, 0.0)
    capped.wait_for(job, "running")
    reader = Reader(capped, job)
    for _, piece in zip(range(400), reader.all(), strict=False):
        assert piece[1] == numbered(piece[0], piece[0] + len(piece[1]))
    assert reader.skipped > 0
    with_words = http.client.HTTPConnection(capped.host, capped.port, timeout=30)
    with_words.request("GET", f"/jobs/{job}/logs?follow=1")
    response = with_words.getresponse()
    words = 0
    while words < 3:
        words += response.readline().count(b"bytes were dropped here")
    with_words.close()


def test_a_job_that_empties_its_own_log_is_followed_on(capped: NodeProcess, gate: Path) -> None:
    emptied = Path(f"{gate}.1")
    wait = 'while [ ! -e "{}" ]; do sleep 0.02; done'
    script = f"echo the first; {wait.format(emptied)}; : > stdout; echo two; {wait.format(gate)}"
    job = capped.submit(command=["sh", "-c", script], requires={"cpus": 0})
    capped.wait_for(job, "running")
    connection = http.client.HTTPConnection(capped.host, capped.port, timeout=30)
    connection.request("GET", f"/jobs/{job}/logs?follow=1")
    response = connection.getresponse()
    assert response.readline() == b"the first\n"
    emptied.touch()
    assert response.readline() == b"two\n"
    gate.touch()
    assert response.read() == b""
    connection.close()


def test_who_follows_a_node_that_stops_is_cut_off_and_goes_on_when_it_is_back(capped: NodeProcess, gate: Path) -> None:
    """A clean end means that the log is whole; a stop must not look like one."""
    job = writer(capped, gate, 10, 0.02)
    capped.wait_for(job, "running")
    reader = Reader(capped, job)
    pieces = reader.pieces(follow=1)
    next(pieces)
    capped.kill(15)
    with pytest.raises((http.client.HTTPException, OSError)):
        for piece in pieces:
            assert piece == numbered(reader.at, reader.at + len(piece))
    before = reader.at
    capped.start()
    seen: list[Any] = []
    for offset, piece in reader.all():
        assert piece == numbered(offset, offset + len(piece))
        seen.append(time.monotonic())
        if reader.at > before + 5_000:
            gate.touch()
    assert seen and reader.skipped == 0
    assert reader.at == int(get(capped, job, method="HEAD")[1]["x-p2p-log-size"])
    assert capped.wait_for(job, "completed")["attempt"] == 1
