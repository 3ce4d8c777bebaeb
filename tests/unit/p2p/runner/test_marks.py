"""Whose process is it? Told by its environment, which the kernel shows empty in the moment of an exec."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2p.runner import processes


@pytest.fixture
def child(tmp_path: Path) -> Iterator[int]:
    marks = {"P2P_JOB_ID": "j", "P2P_ATTEMPT": "2", "P2P_JOB_DIR": str(tmp_path)}
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, env={**os.environ, **marks})
    yield process.pid
    process.communicate()


def test_a_child_that_is_just_becoming_another_program_is_still_known(
    child: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, looks = Path.read_bytes, []

    def read_bytes(path: Path) -> bytes:
        if path == Path(f"/proc/{child}/environ"):
            looks.append(path)
            if len(looks) < 4:
                return b""
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert processes.mark_of(child, looks=processes.EXEC_LOOKS) == processes.Mark("j", 2, str(tmp_path))
    assert len(looks) == 4


def test_nobody_waits_for_a_process_that_has_no_environment_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's thread, looked at once among all processes; and one that is gone."""
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: pytest.fail("waited"))
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"")
    assert processes.mark_of(os.getpid()) is None
