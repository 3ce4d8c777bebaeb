"""The bound on stdout and stderr."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from p2p.runner.logs import StreamCap, tail

CAP = 10_000


@pytest.fixture
def stream(tmp_path):
    path = tmp_path / "stdout"
    path.touch()

    class Stream:
        cap = StreamCap(str(path), CAP)
        old = tmp_path / "stdout.old"

        def write(self, data: bytes) -> None:
            with path.open("ab") as file:
                file.write(data)

        def kept(self) -> bytes:
            """What a reader of both files gets."""
            return (self.old.read_bytes() if self.old.exists() else b"") + path.read_bytes()

    return Stream()


def test_stream_up_to_its_cap_is_kept_whole(stream):
    stream.write(b"x" * CAP)
    assert not stream.cap.enforce()
    assert stream.kept() == b"x" * CAP and not stream.old.exists()


def test_stream_over_its_cap_keeps_the_newest_half_and_says_how_much_went(stream):
    data = bytes(range(256)) * 100
    stream.write(data)
    assert stream.cap.enforce()
    marker, _, rest = stream.kept().partition(b"\n")
    assert marker == b"[runner: %d bytes were dropped here, the log is capped]" % (len(data) - len(rest))
    assert data.endswith(rest) and CAP // 2 - 100 <= len(rest) <= CAP // 2


def test_stream_never_keeps_more_than_its_cap_and_loses_nothing_in_the_middle(stream):
    written = b""
    for number in range(2_000):
        line = b"line %d\n" % number
        stream.write(line)
        written += line
        stream.cap.enforce()
        assert stream.cap.written_bytes() == len(written)
        kept = stream.kept()
        assert len(kept) <= CAP
        if kept.startswith(b"[runner: "):
            marker, _, kept = kept.partition(b"\n")
            assert int(marker.split()[1]) == len(written) - len(kept)
        assert written.endswith(kept)
    assert stream.old.exists()


def test_two_threads_that_cut_at_once_keep_what_the_first_one_kept(stream):
    """Found by the fast writer below: the second one replaced the kept half by nothing."""
    with ThreadPoolExecutor(2) as threads:
        for _ in range(200):
            stream.write(b"x" * 2 * CAP)
            cuts = [threads.submit(stream.cap.enforce) for _ in range(2)]
            assert sorted(cut.result() for cut in cuts) == [False, True]
            assert len(stream.kept()) > CAP // 2 - 100


def test_stream_that_is_not_a_plain_file_is_left_alone(tmp_path):
    """Opening a pipe would block the watcher for ever."""
    os.mkfifo(tmp_path / "stdout")
    (tmp_path / "victim").write_bytes(b"x" * 2 * CAP)
    (tmp_path / "stderr").symlink_to(tmp_path / "victim")
    for name in ("stdout", "stderr", "missing"):
        assert not StreamCap(str(tmp_path / name), CAP).enforce()
    assert (tmp_path / "victim").stat().st_size == 2 * CAP


def test_tail_reaches_back_over_a_cut(tmp_path):
    (tmp_path / "stderr.old").write_bytes(b"earlier\n")
    (tmp_path / "stderr").write_bytes(b"later\n")
    assert tail(str(tmp_path)) == "earlier\nlater"
    assert tail(str(tmp_path / "nowhere")) == ""


async def test_fast_writer_is_held_to_its_cap(running, new_signal):
    """``yes`` writes a gigabyte a second; it is counted, cut, and never stopped."""
    cap = 1_000_000
    spec = await running.start("job", "/usr/bin/yes", log_cap_bytes=cap)
    await running.reported("job", "running")
    seen = 0
    old = Path(spec.directory) / "stdout.old"
    async with asyncio.timeout(20):
        while seen < 100 * cap or not old.exists():  # cut while it runs, not only at its end
            (sample,) = await running.client.sample()
            assert sample.stdout_bytes >= seen, "the total only grows"
            seen = sample.stdout_bytes
    await running.client.stop("job", 1, reason="cancelled", grace_seconds=5)
    assert (await running.exited("job")).signal == 15
    kept = running.stream(spec, "stdout.old")
    assert len(kept) + len(running.stream(spec)) <= cap
    marker, _, rest = kept.partition(b"\n")
    assert int(marker.split()[1]) > 50 * cap
    assert set(rest) == {ord("y"), ord("\n")}


async def test_burst_that_ends_between_two_looks_is_cut_before_the_end_is_told(running):
    spec = await running.start("job", "head -c 5000000 /dev/zero >&2; exit 1", log_cap_bytes=100_000)
    await running.exited("job")
    kept = sum(len(running.stream(spec, name)) for name in ("stderr", "stderr.old"))
    assert kept <= 100_000
