"""Every test has its own job folder and store, as a job has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examples.selfplay.__main__ import main


@pytest.fixture(autouse=True)
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment that a job process sees; gives its folder."""
    folder = tmp_path / "job"
    monkeypatch.setenv("P2P_JOB_ID", "job-1")
    monkeypatch.setenv("P2P_ATTEMPT", "1")
    monkeypatch.setenv("P2P_JOB_DIR", str(folder))
    monkeypatch.setenv("SELFPLAY_STORE", str(tmp_path / "store"))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def step(job: Path) -> Callable[..., dict[str, Any]]:
    """Runs a step that must succeed and gives its `result.json`."""

    def run(*argv: str) -> dict[str, Any]:
        assert main(argv) == 0
        result: dict[str, Any] = json.loads((job / "result.json").read_text())
        return result

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a step that must exit 2 with one sentence on stderr, and gives the sentence."""

    def run(*argv: str) -> str:
        try:
            code = main(argv)
        except SystemExit as error:  # argparse's way out
            code = error.code  # type: ignore[assignment]
        sentence = capsys.readouterr().err
        assert code == 2
        assert sentence.endswith("\n") and sentence.count("\n") == 1, sentence
        return sentence

    return run
