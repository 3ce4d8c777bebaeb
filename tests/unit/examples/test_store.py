"""The store: files appear whole, are bounded in number, and bad ones stop nobody."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from examples.selfplay.games import GameRecord
from examples.selfplay.store import STALE_SECONDS, Store, default_store, read_games

LINE = json.dumps(
    GameRecord(
        game="hex5",
        game_string="hex(board_size=5)",
        moves=("a1", "b2"),
        returns=(1.0, -1.0),
        random_plies=0,
        simulations=1,
        seed=1,
        seconds=0.1,
    ).to_json()
)
WRITERS, FILES_EACH, LIMIT, LINES = 4, 30, 10, 200


def games_file(folder: Path, name: str = "source", games: int = 1) -> Path:
    path = folder / name
    path.write_text(f"{LINE}\n" * games)
    return path


def test_only_the_newest_files_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", max_files=3)
    source = games_file(tmp_path)
    for number in range(6):
        path = store.publish("hex5", source, f"{number}.jsonl")
        os.utime(path, ns=(number * 10**9 + 1,) * 2)
    assert [path.name for path in store.newest("hex5", 10)] == ["5.jsonl", "4.jsonl", "3.jsonl"]
    assert [path.name for path in store.newest("hex5", 2)] == ["5.jsonl", "4.jsonl"]
    assert store.newest("connect_four", 2) == []


def publish_many(root: Path, source: Path, writer: int) -> None:
    store = Store(root, max_files=LIMIT)
    for number in range(FILES_EACH):
        store.publish("hex5", source, f"{writer}-{number}.jsonl")


def test_concurrent_writers_and_readers_see_whole_files_only(tmp_path: Path) -> None:
    """Real processes publish and prune in one folder while this one reads it all the time."""
    root, source = tmp_path / "store", games_file(tmp_path, games=LINES)
    with ProcessPoolExecutor(WRITERS, mp_context=get_context("spawn")) as pool:
        writers = [pool.submit(publish_many, root, source, writer) for writer in range(WRITERS)]
        while not all(writer.done() for writer in writers):
            records, files, skipped = Store(root).records("hex5", LIMIT)
            assert (len(records), skipped) == (files * LINES, 0)
        for writer in writers:
            writer.result()
    assert len(Store(root).newest("hex5", 1000)) == LIMIT
    assert len(list((root / "hex5").iterdir())) == LIMIT  # and no half-written ones


def test_writers_of_one_name_leave_one_file(tmp_path: Path) -> None:
    store, source = Store(tmp_path / "store"), games_file(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: store.publish("hex5", source, "same.jsonl"), range(40)))
    assert [path.name for path in (tmp_path / "store" / "hex5").iterdir()] == ["same.jsonl"]


def test_half_copies_of_killed_writers_are_swept_when_stale(tmp_path: Path) -> None:
    store, source = Store(tmp_path), games_file(tmp_path)
    store.publish("hex5", source, "a.jsonl")
    stale, fresh = tmp_path / "hex5" / ".old.part", tmp_path / "hex5" / ".new.part"
    for path in (stale, fresh):
        path.write_text("half")
    aged = stale.stat().st_mtime - STALE_SECONDS - 1
    os.utime(stale, (aged, aged))
    store.publish("hex5", source, "b.jsonl")
    assert not stale.exists() and fresh.exists()


def test_a_failed_publish_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Store(tmp_path).publish("hex5", tmp_path / "absent", "a.jsonl")
    assert list((tmp_path / "hex5").iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "not json\n",
        "\udcff\n",
        "[]\n",
        "{}\n",
        LINE.replace("hex5", "chess") + "\n",
        LINE.replace("[1.0, -1.0]", "[1.0]"),
    ],
)
def test_a_bad_file_is_skipped_and_counted(text: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.publish("hex5", games_file(tmp_path, games=2), "good.jsonl")
    bad = tmp_path / "bad"
    bad.write_text(f"{LINE}\n{text}", errors="surrogateescape")
    store.publish("hex5", bad, "bad.jsonl")
    records, files, skipped = store.records("hex5", 10)
    assert (len(records), files, skipped) == (2, 1, 1)


def test_records_survive_a_round_trip(tmp_path: Path) -> None:
    (record,) = read_games(games_file(tmp_path), game="hex5")
    assert json.dumps(record.to_json()) == LINE


def test_the_store_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert default_store() == tmp_path / "store"
    monkeypatch.delenv("SELFPLAY_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_store() == tmp_path / "p2p-orchestrator" / "selfplay"
