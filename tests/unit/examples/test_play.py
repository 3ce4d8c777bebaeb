"""Self-play: the same seed, the same games; every game is legal; what is reported is what was played."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples.selfplay.__main__ import main
from examples.selfplay.errors import ExampleError
from examples.selfplay.games import GameRecord, replay
from examples.selfplay.report import default_seed
from examples.selfplay.store import read_games

Step = Callable[..., dict[str, Any]]
GAMES = ["connect_four", "hex5"]


def play(step: Step, out: Path, game: str, seed: int, games: int = 6) -> list[GameRecord]:
    step(
        "play",
        f"--game={game}",
        f"--games={games}",
        "--simulations=15",
        f"--seed={seed}",
        f"--out={out}",
    )
    return [replace(record, seconds=0.0) for record in read_games(out / "games.jsonl", game=game)]


@pytest.mark.parametrize("game", GAMES)
def test_same_seed_gives_the_same_games_and_another_seed_others(game: str, step: Step, tmp_path: Path) -> None:
    first = play(step, tmp_path / "a", game, seed=7)
    assert play(step, tmp_path / "b", game, seed=7) == first
    other = play(step, tmp_path / "c", game, seed=8)
    assert not {record.moves for record in first} & {record.moves for record in other}


def test_a_game_does_not_depend_on_the_games_before_it(step: Step, tmp_path: Path) -> None:
    long = play(step, tmp_path / "a", "hex5", seed=7, games=6)
    assert play(step, tmp_path / "b", "hex5", seed=7, games=3) == long[:3]


def test_the_games_of_a_run_differ(step: Step, tmp_path: Path) -> None:
    records = play(step, tmp_path / "a", "connect_four", seed=1, games=20)
    assert len({record.moves for record in records}) == 20
    assert {record.random_plies for record in records} == {0, 1, 2, 3}


@pytest.mark.parametrize("game", GAMES)
def test_recorded_games_replay_to_their_result(game: str, step: Step, tmp_path: Path) -> None:
    records = play(step, tmp_path, game, seed=3)
    assert len(records) == 6
    for record in records:
        assert replay(record) == record.returns


@pytest.mark.parametrize("fault", ["illegal", "short", "long"])
def test_a_forged_game_does_not_replay(fault: str, step: Step, tmp_path: Path) -> None:
    record = play(step, tmp_path, "hex5", seed=3, games=1)[0]
    moves = {
        "illegal": (record.moves[0], record.moves[0], *record.moves[2:]),
        "short": record.moves[:-1],
        "long": (*record.moves, record.moves[0]),
    }[fault]
    with pytest.raises(ExampleError, match=r"is not legal|has no result"):
        replay(replace(record, moves=moves))


def test_result_adds_up(step: Step, job: Path, store: Path) -> None:
    result = step("play", "--game", "connect_four", "--games", "8", "--simulations", "15", "--seed", "5")
    records = list(read_games(job / result["files"][0], game="connect_four"))
    firsts = [record.returns[0] for record in records]
    assert result["kind"] == "selfplay"
    assert result["files"] == ["games/games.jsonl"]
    assert (result["games"], result["simulations"], result["seed"]) == (8, 15, 5)
    assert result["first_player_wins"] == firsts.count(1)
    assert result["second_player_wins"] == firsts.count(-1)
    assert result["draws"] == firsts.count(0)
    assert result["moves"] == sum(len(record.moves) for record in records)
    assert result["mean_length"] == round(result["moves"] / 8, 2)
    assert Path(result["published"]).parent == store / "connect_four"


def test_progress_reaches_the_end_and_the_log_has_a_line_a_game(
    step: Step, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step("play", "--game", "hex5", "--games", "4", "--simulations", "5")
    progress = json.loads((job / "progress.json").read_text())
    assert (progress["done"], progress["total"], progress["percent"], progress["stopped"]) == (4, 4, 100.0, False)
    assert [f"game {n}/4:" in line for n, line in enumerate(game_lines(capsys), start=1)] == [True] * 4
    assert sorted(path.name for path in job.iterdir()) == ["games", "progress.json", "result.json"]


def game_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("game ")]


def test_a_long_run_keeps_its_log_short(step: Step, capsys: pytest.CaptureFixture[str]) -> None:
    step("play", "--game", "hex5", "--games", "250", "--simulations", "1")
    lines = game_lines(capsys)
    assert 50 <= len(lines) <= 101
    assert lines[-1].startswith("game 250/250")


def test_a_repeated_run_does_not_count_its_games_twice(step: Step, store: Path) -> None:
    for _attempt in range(2):
        step("play", "--game", "hex5", "--games", "3", "--simulations", "5", "--seed", "2")
    step("play", "--game", "hex5", "--games", "3", "--simulations", "5", "--seed", "3")
    assert len(list((store / "hex5").iterdir())) == 2


def test_jobs_differ_by_default_and_retries_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    first = default_seed()
    monkeypatch.setenv("P2P_ATTEMPT", "2")
    assert default_seed() == first
    monkeypatch.setenv("P2P_JOB_ID", "job-2")
    assert default_seed() != first
    monkeypatch.delenv("P2P_JOB_ID")
    assert default_seed() == 0


def test_by_hand_the_files_go_to_a_new_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("P2P_JOB_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["play", "--game", "hex5", "--games", "1", "--simulations", "1"]) == 0
    (result,) = tmp_path.glob("p2p-selfplay-*/result.json")
    assert str(result) in capsys.readouterr().out
