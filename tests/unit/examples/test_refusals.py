"""What is wrong is said in one sentence that names it, with exit code 2; and a stop signal ends a step in time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from examples.selfplay.__main__ import main
from examples.selfplay.errors import Stopped
from examples.selfplay.report import Report
from examples.selfplay.stop import PATIENCE_SECONDS, StopRequest

ROOT = Path(__file__).resolve().parents[3]
Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        pytest.param("play --game conect_four", ["--game", "did you mean connect_four?"], id="game"),
        pytest.param("play --games many", ["--games", "whole number", "'many'"], id="games-word"),
        pytest.param("play --games 0", ["--games", "between 1 and"], id="games-zero"),
        pytest.param("play --simulations 1.5", ["--simulations", "'1.5'"], id="simulations-fraction"),
        pytest.param("play --simulations 1000000000", ["--simulations", "1000000"], id="simulations-huge"),
        pytest.param("play --seed -1", ["--seed", "between 0 and"], id="seed-negative"),
        pytest.param("play --opening-plies x", ["--opening-plies"], id="plies"),
        pytest.param("evaluate --baseline-simulations 0", ["--baseline-simulations"], id="baseline"),
        pytest.param("evaluate --newest /nowhere/model.json", ["--newest", "/nowhere/model.json"], id="newest"),
        pytest.param("evaluate --window 201", ["--window"], id="window"),
        pytest.param("tournament --players mcts25", ["--players", "2 to 16"], id="one-player"),
        pytest.param("tournament --players mcts25,alphazero", ["--players", "'alphazero'", "mcts100"], id="player"),
        pytest.param("tournament --players mcts0,random", ["--players", "'mcts0'"], id="no-budget"),
        pytest.param("tournament --players random,random", ["--players", "twice"], id="same-player"),
        pytest.param("tournament --rounds 0", ["--rounds"], id="rounds"),
        pytest.param("play --bord hex5", ["--bord"], id="unknown-flag"),
        pytest.param("train", ["train", "play"], id="unknown-step"),
        pytest.param("", ["STEP"], id="no-step"),
    ],
)
def test_a_wrong_flag_is_named(argv: str, words: list[str], refused: Refused) -> None:
    sentence = refused(*argv.split())
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize("step", ["play", "evaluate", "tournament"])
def test_missing_openspiel_says_how_to_get_it(step: str, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyspiel", None)
    assert "OpenSpiel is not installed: pip install 'p2p-orchestrator[examples]'" in refused(step)


def test_a_folder_that_cannot_be_used_is_named(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused("play", "--games=1", "--simulations=1", "--out", str(tmp_path / "file"))


@pytest.mark.parametrize("argv", [["--help"], ["play", "--help"], ["evaluate", "--help"], ["tournament", "--help"]])
def test_help_needs_no_openspiel(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyspiel", None)
    with pytest.raises(SystemExit) as done:
        main(argv)
    assert done.value.code == 0
    assert "usage: selfplay" in capsys.readouterr().out


def test_main_puts_the_signal_handlers_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["play", "--game=hex5", "--games=1", "--simulations=1"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


@contextmanager
def running(folder: Path, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """A step as a process of its own, killed at the end if it still runs."""
    command = [sys.executable, "-m", "examples.selfplay", *argv]
    env = {**os.environ, "P2P_JOB_DIR": str(folder)}
    with subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("step", ["play", "evaluate"])
def test_sigterm_lets_the_game_end_and_keeps_the_count(step: str, job: Path, store: Path) -> None:
    with running(job, step, "--game=connect_four", "--games=50000", "--simulations=50") as process:
        assert process.stdout is not None and process.stderr is not None
        while not process.stdout.readline().startswith("game 1/"):
            pass
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 143
        assert time.monotonic() - asked < 3
        assert process.stderr.read() == f"selfplay {step}: stopped by SIGTERM; a retry starts afresh\n"
    progress = json.loads((job / "progress.json").read_text())
    assert progress["stopped"] is True
    assert 1 <= progress["done"] < progress["total"] == 50000
    assert not (job / "result.json").exists()
    assert not store.exists()  # half a run is not published: its retry would count the same games again


def test_sigterm_does_not_wait_for_an_endless_game(job: Path) -> None:
    with running(job, "play", "--game=connect_four", "--games=2", "--simulations=200000") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 143
    progress = json.loads((job / "progress.json").read_text())
    assert (progress["stopped"], progress["done"]) == (True, 0)


def test_a_stop_between_two_games_is_obeyed_at_once_and_one_after_the_last_is_not_needed(tmp_path: Path) -> None:
    stop = StopRequest()
    with (
        pytest.raises(Stopped),
        Report(tmp_path, kind="selfplay", game="hex5", total=2, stop=stop) as report,
    ):
        stop.request(signal.SIGTERM)
        report.advance("draw", {"draws": 1})
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert (progress["stopped"], progress["done"], progress["draws"]) == (True, 1, 1)
    report.advance("draw", {"draws": 2})


def test_patience_is_counted_from_the_first_signal() -> None:
    now = 100.0
    stop = StopRequest(clock=lambda: now)
    stop.check()
    stop.check_patience()
    stop.request(signal.SIGTERM)
    stop.check_patience()
    with pytest.raises(Stopped):
        stop.check()
    now += PATIENCE_SECONDS * 0.9
    stop.request(signal.SIGINT)
    stop.check_patience()
    now += PATIENCE_SECONDS * 0.2
    with pytest.raises(Stopped) as stopped:
        stop.check_patience()
    assert stopped.value.signum == signal.SIGTERM
