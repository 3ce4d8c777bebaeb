"""What a crash or a bad disk did to the files, seen from the start that follows: torn is mended, damaged is refused,
and a lost queue is rebuilt from the journal."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import pytest

from p2p.journal import snapshot
from p2p.storage.wal import FRAME_HEADER_BYTES, HEADER_BYTES
from tests.nodes import START_SECONDS, NodeProcess, wait_until

MARK = b"before-the-flip-9f3a"
ASIDE = ("--no-populate", "--no-worker")


def records(node: NodeProcess, jobs: list[str]) -> list[dict[str, Any]]:
    found = [node.job(job) for job in jobs]
    for record in found:
        for volatile in ("as_of", "why_pending", "progress", "last_sign_of_life_seconds"):
            record.pop(volatile, None)
    return found


def stocked(node: NodeProcess) -> list[str]:
    """Jobs of several states."""
    jobs = [node.submit(command=["true"], params={"n": n}, group=f"g{n % 3}") for n in range(20)]
    for job in jobs[::4]:
        assert node.request("POST", f"/jobs/{job}/cancel", {"reason": "test"})[0] == 200
    later = node.submit(command=["true"], depends_on=[jobs[1]], unique_key="only one")
    return [*jobs, later]


def exit_code(node: NodeProcess) -> int:
    """Of a start that is expected to end by itself."""
    node.start(wait=False)
    assert node.process is not None
    return node.process.wait(START_SECONDS)


def written_floor(node: NodeProcess) -> int:
    connection = apsw.Connection(str(node.data / "raft.db"), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return int(connection.execute("SELECT value FROM meta WHERE key = 'acked_floor'").fetchone()[0])
    finally:
        connection.close()


def frames(wal: Path) -> list[tuple[int, bool]]:
    """(where it begins, is it a commit) of each frame."""
    body = wal.read_bytes()
    page_bytes = int.from_bytes(body[8:12], "big")
    step = FRAME_HEADER_BYTES + page_bytes
    return [
        (at, int.from_bytes(body[at + 4 : at + 8], "big") != 0)
        for at in range(HEADER_BYTES, len(body) - step + 1, step)
    ]


@pytest.mark.parametrize("into", [0.0, 0.3, 0.9], ids=["just before", "early in", "late in"])
def test_a_torn_end_of_the_journal_loses_nothing_acknowledged(
    start_node: Callable[..., NodeProcess], into: float
) -> None:
    """At rest the newest transaction is the floor, which answers depend on no more: a power cut may take it."""
    node = start_node(*ASIDE)
    jobs = stocked(node)
    whole = records(node, jobs)
    commit = node.request("GET", "/status")[1]["journal"]["commit_index"]
    wait_until(lambda: written_floor(node) >= commit)
    wal = node.data / "raft.db-wal"
    node.kill()
    found = frames(wal)
    commits = [at for at, commit in found if commit]
    last = next(at for at, _ in found if at > commits[-2])
    with wal.open("r+b") as file:
        file.truncate(last + int(into * (wal.stat().st_size - last)))
    node.start()
    assert records(node, jobs) == whole
    again = node.submit(command=["true"])
    assert node.job(again)["state"] == "pending"


def test_a_journal_cut_deeper_than_a_torn_write_is_refused(start_node: Callable[..., NodeProcess]) -> None:
    node = start_node(*ASIDE)
    stocked(node)
    node.kill()
    wal = node.data / "raft.db-wal"
    with wal.open("r+b") as file:
        file.truncate(wal.stat().st_size // 2)
    assert exit_code(node) == 1
    assert "Nothing was changed" in node.log_text
    assert "Traceback" not in node.log_text


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL], ids=["in the file", "in the write-ahead log"])
def test_a_flipped_byte_in_an_acknowledged_entry_refuses_the_start_with_a_sentence(
    start_node: Callable[..., NodeProcess], stop: int
) -> None:
    node = start_node(*ASIDE)
    node.submit(command=["true"], params={"mark": MARK.decode()})
    stocked(node)
    node.kill(stop)
    target = node.data / ("raft.db" if stop == signal.SIGTERM else "raft.db-wal")
    body = target.read_bytes()
    assert MARK in body
    target.write_bytes(body.replace(MARK, MARK.swapcase()))  # every copy: some are leftovers of a page that was split
    before = {path.name: path.read_bytes() for path in node.data.glob("raft.db*") if not path.name.endswith("-shm")}
    for _ in range(2):
        assert exit_code(node) == 1
        assert {name: (node.data / name).read_bytes() for name in before} == before
    text = node.log_text
    assert "cannot start" in text
    assert "Nothing was changed" in text
    assert "Traceback" not in text


def delete(state: Path) -> None:
    for side in ("", "-wal", "-shm"):
        Path(f"{state}{side}").unlink(missing_ok=True)


def scribble(state: Path) -> None:
    delete(Path(f"{state}-none"))
    state.write_bytes(b"this is no database" * 1_000)
    Path(f"{state}-wal").unlink(missing_ok=True)


def spoil_pages(state: Path) -> None:
    body = state.read_bytes()
    state.write_bytes(body[:4096] + b"\x5a" * (len(body) - 4096))
    Path(f"{state}-wal").unlink(missing_ok=True)


def halve(state: Path) -> None:
    body = state.read_bytes()
    state.write_bytes(body[: len(body) // 8192 * 4096])
    Path(f"{state}-wal").unlink(missing_ok=True)


@pytest.mark.parametrize("damage", [delete, scribble, spoil_pages, halve])
@pytest.mark.parametrize("with_snapshot", [False, True], ids=["log only", "snapshot and log"])
def test_a_lost_queue_is_rebuilt_with_the_same_records(
    start_node: Callable[..., NodeProcess], damage: Callable[[Path], None], with_snapshot: bool
) -> None:
    node = start_node(*ASIDE)
    jobs = stocked(node)
    if with_snapshot:
        node.kill(signal.SIGTERM)
        made = snapshot.take(node.data / "state.db", node.data / "snapshots")
        assert made.at_index > 0
        node.start()
        jobs += stocked_more(node)
    whole = records(node, jobs)
    counts = node.request("GET", "/work_queue_status")[1]["by_state"]
    node.kill(signal.SIGTERM)
    damage(node.data / "state.db")
    node.start()
    assert records(node, jobs) == whole
    assert node.request("GET", "/work_queue_status")[1]["by_state"] == counts
    if with_snapshot:
        assert "state restored from" in node.log_text


def stocked_more(node: NodeProcess) -> list[str]:
    return [node.submit(command=["true"], params={"more": n}) for n in range(5)]


def test_a_damaged_snapshot_does_not_stop_a_rebuild(start_node: Callable[..., NodeProcess]) -> None:
    node = start_node(*ASIDE)
    jobs = stocked(node)
    whole = records(node, jobs)
    node.kill(signal.SIGTERM)
    made = snapshot.take(node.data / "state.db", node.data / "snapshots")
    made.path.write_bytes(b"x" * 10_000)
    delete(node.data / "state.db")
    node.start()
    assert records(node, jobs) == whole


def test_a_lost_journal_beside_its_queue_is_refused(start_node: Callable[..., NodeProcess]) -> None:
    node = start_node(*ASIDE)
    stocked(node)
    node.kill(signal.SIGTERM)
    for path in node.data.glob("raft.db*"):
        path.unlink()
    assert exit_code(node) == 1
    assert "Traceback" not in node.log_text


def test_another_nodes_data_directory_is_refused(start_node: Callable[..., NodeProcess]) -> None:
    node = start_node(*ASIDE)
    node.kill(signal.SIGTERM)
    node.flags += ["--node-id", "somebody-else"]
    assert exit_code(node) == 1
    assert "belongs to node 'n1', not to 'somebody-else'" in node.log_text
    assert "Traceback" not in node.log_text


def test_a_copy_taken_at_a_kill_is_a_whole_node(start_node: Callable[..., NodeProcess], tmp_path: Path) -> None:
    node = start_node(*ASIDE)
    jobs = stocked(node)
    whole = records(node, jobs)
    node.kill()
    copy = NodeProcess(tmp_path / "copy", ASIDE)
    shutil.copytree(node.data, copy.data)
    try:
        copy.start()
        assert records(copy, jobs) == whole
    finally:
        copy.destroy()
