"""The executor itself: it can fail, and its `pkill` and `ssh` do to a careless block what the real ones do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runbook import blocks, deployment
from tests.runbook.blocks import Block
from tests.runbook.deployment import Deployment, Outcome

LOST_CONNECTION = 255


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Deployment]:
    """A deployment on which nothing runs."""
    made = Deployment(tmp_path / "home")
    yield made
    made.destroy()


def shell(box: Deployment, text: str) -> Outcome:
    return box.run(Block("bash", text + "\n", "a section", 1))


def python(box: Deployment, text: str) -> Outcome:
    return box.run(Block("python", text + "\n", "a section", 1))


def stand_in(box: Deployment) -> subprocess.Popen[bytes]:
    """A process with the orchestrator's name on its command line."""
    command = [sys.executable, "-c", "import time; time.sleep(600)", "scripts/p2p_orchestrator.py"]
    return subprocess.Popen(command, env=box.environment)


# -- it can fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "false",
        "false; echo done",
        "false | cat",
        "curl -fsS http://127.0.0.1:1/health",
        "no-such-program",
        "cd /no/such/folder",
        "echo 'never closed",
    ],
)
def test_a_wrong_shell_block_fails(box: Deployment, text: str) -> None:
    assert shell(box, text).status != 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("await asyncio.sleep(0)\nraise ValueError('late')", "late"),
        ("print('before'\n", "middle of a statement"),
        ("if True:\n    pass\nprint('no empty line before this')", "SyntaxError"),
        pytest.param(
            "print(f\"{'\\\\n'.join([])}\")",
            "SyntaxError",
            marks=pytest.mark.skipif(sys.version_info >= (3, 12), reason="a backslash there is allowed since 3.12"),
        ),
        ("from coordination.work_queue import get_work_queue\nget_work_queue().get_stats()", "NodeUnreachable"),
    ],
)
def test_a_wrong_python_block_fails(box: Deployment, text: str, sentence: str) -> None:
    done = python(box, text)
    assert done.status != 0
    assert sentence in done.output


def test_a_failed_block_is_told_with_its_place_and_output(box: Deployment) -> None:
    block = Block("bash", "echo why; false\n", "a section", 42)
    with pytest.raises(AssertionError, match=r"line 42, in 'a section': exit status 1\n(?s:.*)why"):
        box.run(block).check(block)


def test_a_block_that_never_ends_fails(box: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "BLOCK_SECONDS", 0.3)
    done = shell(box, "sleep 600")
    assert done.status != 0
    assert "not done within" in done.output


def test_a_python_block_may_await_and_echoes_values_as_a_prompt_does(box: Deployment) -> None:
    text = "import asyncio\nawait asyncio.sleep(0, 'slept')\nfor n in (1, 2):\n    print(n)\n\n40 + 2"
    done = python(box, text)
    assert (done.status, done.output.split()) == (0, ["'slept'", "1", "2", "42"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("```\nls\n```\n", "not ''"),
        ("```console\nls\n```\n", "not 'console'"),
        ("```bash\nls\n", "never closed"),
        ("    text\n1. item\n   ```\n   ls\n   ```\n", "not ''"),
    ],
)
def test_a_fence_that_nobody_would_run_is_an_error(tmp_path: Path, text: str, sentence: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        blocks.read(page)


def test_blocks_know_their_section_and_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```sh\n# not a heading\n```\n## B\n```python\nx\n```\n")
    assert [(b.language, b.section, b.line) for b in blocks.read(page)] == [("bash", "A", 3), ("python", "B", 7)]


# -- the trap -------------------------------------------------------------------------------------------------------


def test_a_plain_pkill_over_ssh_kills_its_own_shell(box: Deployment) -> None:
    done = shell(box, 'ssh gpu-box-2 "pkill -f p2p_orchestrator; echo survived" || echo "status $?"')
    assert done.output == f"status {LOST_CONNECTION}\n"


def test_a_plain_pkill_kills_the_shell_that_was_given_the_block(box: Deployment) -> None:
    done = shell(box, "pkill -f p2p_orchestrator || true\necho survived")
    assert done.status < 0
    assert "survived" not in done.output


def test_brackets_in_the_pkill_alone_do_not_help_if_the_start_stands_beside_it(box: Deployment) -> None:
    command = "pkill -f '[p]2p_orchestrator'; python scripts/p2p_orchestrator.py --help"
    done = shell(box, f'ssh gpu-box-2 "{command}" || echo "status $?"')
    assert done.output == f"status {LOST_CONNECTION}\n"


def test_with_brackets_in_both_the_shell_survives_and_the_node_does_not(box: Deployment) -> None:
    node = stand_in(box)
    command = "cd ~/p2p-orchestrator; pkill -f '[p]2p_orchestrator'; python scripts/[p]2p_orchestrator.py --help"
    done = shell(box, f'ssh gpu-box-2 "{command}"')
    assert done.status == 0, done.output
    assert "Start a node" in done.output
    assert node.wait(10) == -15


def test_pkill_leaves_the_nodes_of_other_deployments_alone(box: Deployment, tmp_path: Path) -> None:
    other = Deployment(tmp_path / "home2")  # its home begins with the name of ours
    try:
        theirs, ours = stand_in(other), stand_in(box)
        assert shell(box, "pkill -f '[p]2p_orchestrator'").status == 0
        assert ours.wait(10) == -15
        assert theirs.poll() is None
        assert shell(box, "pkill -f '[p]2p_orchestrator' || echo none").output == "none\n"
    finally:
        theirs.kill()
        theirs.wait()
        other.destroy()


def test_pkill_sends_the_signal_it_is_told(box: Deployment) -> None:
    node = stand_in(box)
    assert shell(box, "pkill -KILL -f '[p]2p_orchestrator'").status == 0
    assert node.wait(10) == -9


def test_ssh_runs_in_the_home_and_hands_on_output_and_status(box: Deployment) -> None:
    done = shell(box, 'ssh -o BatchMode=yes gpu-box-2 "pwd; exit 7" || echo "status $?"')
    assert done.output.split("\n")[:2] == [str(box.home), "status 7"]


def test_ssh_waits_for_a_daemon_that_holds_its_output(box: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "BLOCK_SECONDS", 0.5)
    assert "not done within" in shell(box, 'ssh gpu-box-2 "sleep 600 &"').output
    assert shell(box, 'ssh gpu-box-2 "sleep 600 > /dev/null 2>&1 &"').status == 0
