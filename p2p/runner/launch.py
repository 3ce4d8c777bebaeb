"""How the daemon is started, so that it outlives the orchestrator and is not mistaken for it.

People restart nodes with ``pkill -f p2p_orchestrator``.  A checkout or a virtual environment in a directory of that
name would put the word on the daemon's command line, so the command line holds nothing but the base interpreter and
``-m p2p.runner``; where to find modules and which directory to serve travel in the environment, which jobs never see.

The started process forks, waits until its child listens, and exits: the daemon is nobody's child, and the launch is
over when the socket is there.
"""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL
from pathlib import Path

from p2p.runner.address import LOG_NAME
from p2p.runner.protocol import RunnerUnavailable

DIRECTORY_VARIABLE = "P2P_RUNNER_DIR"
FORBIDDEN_WORD = "p2p_orchestrator"

# What the interpreter itself may need.  Secrets in the orchestrator's environment stay there.
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONHOME")
_LOG_TAIL_BYTES = 2_000


async def launch(directory: Path, *, timeout_seconds: float) -> None:
    """Returns when a runner serves ``directory`` (this one, or one that was there first).

    Raises ``RunnerUnavailable`` with the last lines of its log.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # noqa: ASYNC240  (once in a runner's life)
    log_fd = os.open(directory / LOG_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    program, arguments = command_line()
    try:
        starter = await asyncio.create_subprocess_exec(
            *arguments,
            executable=program,
            env=environment(directory),
            cwd=directory,
            stdin=DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            start_new_session=True,
        )
    except OSError as error:
        raise RunnerUnavailable(f"cannot start the runner with {program}: {error}") from error
    finally:
        os.close(log_fd)
    try:
        async with asyncio.timeout(timeout_seconds):
            code = await starter.wait()
    except TimeoutError:
        starter.kill()
        await starter.wait()
        raise RunnerUnavailable(f"the runner in {directory} was not ready within {timeout_seconds:g} s") from None
    if code != 0:
        raise RunnerUnavailable(f"the runner in {directory} did not start: {_log_tail(directory)}")


def command_line(base: str | None = None) -> tuple[str, list[str]]:
    """The program, and the arguments that ps and pkill see.

    Without ``site`` (-S): our search path is given whole.  Without the working directory on it (-P).
    """
    program = os.path.realpath(base or str(getattr(sys, "_base_executable", sys.executable)))
    shown = program
    if FORBIDDEN_WORD in shown:
        shown = "/proc/self/exe"  # the interpreter finds its library through this link all the same
    return program, [shown, "-S", "-P", "-m", "p2p.runner"]


def environment(directory: Path) -> dict[str, str]:
    """The daemon's own environment; no job gets any of it."""
    source = str(Path(__file__).resolve().parents[2])  # an editable install may not be on sys.path
    paths = [source, *(str(Path(entry).resolve()) for entry in sys.path if entry)]
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONUTF8": "1",
        DIRECTORY_VARIABLE: str(directory.resolve()),
    }


def _log_tail(directory: Path) -> str:
    try:
        text = (directory / LOG_NAME).read_bytes()[-_LOG_TAIL_BYTES:]
    except OSError as error:
        return f"no log ({error.strerror})"
    return text.decode(errors="replace").strip()
