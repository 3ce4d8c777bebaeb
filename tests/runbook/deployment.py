"""A box as the runbook assumes it: a home, the project in ``~/p2p-orchestrator``, a node, ``python`` and ``ssh``.

Four things are not the real ones, each no further from it than it must be:

``pkill``  A real one would kill the nodes of every other test on this machine. A PID namespace would keep it in, but
           needs root, or user namespaces that many machines and most containers forbid. So the real matcher (``pgrep``,
           the same program under another name) says whom the command means, itself excepted, and of those only the
           processes of this deployment are signalled: those with its home in their environment. The shell that runs
           the block is one of them, so a pattern that matches its own shell kills it here as anywhere.
``ssh``    CI has no sshd, and with one the real pkill would be found. The stand-in does with the command what sshd
           does: joins the words, has the login shell run them with ``-c`` in the home, and is done when nobody holds
           the output any more; so a command that forgets to redirect a daemon's output hangs, and one that kills its
           own shell is a lost connection (255).
``python`` Each box of a fleet has its own host name and address; here they share both. So a node that is started on one
           is told what its box would have told it: its name, and a port of its own.
the clock  The page's thresholds are minutes and days. The node's process is started with its clocks set back by what a
           file says, and `pass_time` moves them on; what people read afterwards is the true time.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.nodes import ROOT, free_port, wait_until
from tests.runbook.blocks import PYTHON, SETTINGS, SHELL, Block

BLOCK_SECONDS = 60.0
NODE_ID = "box-1"
TOKEN = "a-secret-that-is-only-for-tests"

PYTHON_STAND_IN = """#!/bin/sh
case "$1" in *p2p_orchestrator.py) script=$1; shift; exec "{python}" "$script" {flags} "$@" ;; esac
exec "{python}" "$@"
"""
P2PCTL = '#!/bin/sh\nexec "{python}" -m p2p "$@"\n'

PKILL = """#!{python} -SEs
import os, re, signal, subprocess, sys
arguments, number = sys.argv[1:], signal.SIGTERM
if arguments and re.fullmatch("-[A-Z0-9]+", arguments[0]):
    word = arguments.pop(0)[1:]
    number = int(word) if word.isdigit() else signal.Signals["SIG" + word.removeprefix("SIG")]
answer = subprocess.run(["{pgrep}", *arguments], capture_output=True, text=True)
sys.stderr.write(answer.stderr)
ours = re.compile(re.escape(os.environb[b"RUNBOOK_HOME"]) + rb"(/|\\0)")
elsewhere, at = {{os.getpid()}}, int(os.environ.get("RUNBOOK_SSH", 0))
while at > 1:  # the ssh that brought us here, and who called it, are on the operator's machine
    elsewhere.add(at)
    with open(f"/proc/{{at}}/stat") as file:
        at = int(file.read().rpartition(")")[2].split()[1])
hit = 0
for pid in map(int, answer.stdout.split()):
    try:
        with open(f"/proc/{{pid}}/environ", "rb") as file:
            mine = ours.search(file.read())
        if mine and pid not in elsewhere:
            os.kill(pid, number)
            hit += 1
    except OSError:
        pass  # it has gone, or is somebody else's
sys.exit(answer.returncode if answer.returncode > 1 else not hit)
"""

SSH = """#!/bin/bash
while [[ $1 == -* ]]; do case $1 in -[opilF]) shift 2 ;; *) shift ;; esac; done
host=$1; shift
box="$RUNBOOK_FLEET/$host/environment"
if [ -f "$box" ]; then  # another box: nothing of this shell goes along
  for name in $(compgen -e); do unset "$name"; done
  set -a; . "$box"; set +a
fi
cd "$HOME" || exit 255
RUNBOOK_SSH=$$ "$BASH" -c "$*" 2>&1 | cat
status=${PIPESTATUS[0]}
(( status > 128 )) && exit 255
exit "$status"
"""

CLOCK = '''"""Sets this process's clocks back by the seconds in a file; for the node of a runbook scene."""
import os
import time

_file, _now, _clock = os.environ.get("RUNBOOK_CLOCK"), time.time_ns, time.clock_gettime_ns


def _back():
    try:
        with open(_file) as file:
            return int(float(file.read()) * 1e9)
    except (OSError, ValueError):
        return _back.last


_back.last = 0
if _file:
    time.time_ns = lambda: _now() - _back()
    time.time = lambda: time.time_ns() / 1e9
    time.clock_gettime_ns = lambda clock: _clock(clock) - (_back() if clock == time.CLOCK_BOOTTIME else 0)
'''

QUIET = {
    "node_id": NODE_ID,
    "host": "127.0.0.1",
    "queue": {"lease_seconds": 10, "heartbeat_seconds": 0.1},
    "reaper": {"interval_seconds": 600, "stuck_job_threshold_seconds": 1e6, "stale_job_threshold_seconds": 1e6},
    "populator": {"enabled": False},
    "health": {"interval_seconds": 0.2},
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a block ended, and what it printed."""

    status: int
    output: str

    def check(self, block: Block) -> Outcome:
        assert self.status == 0, (
            f"line {block.line}, in {block.section!r}: exit status {self.status}\n{block.text}---\n{self.output}"
        )
        return self


class Deployment:
    """See the module's docstring. `home` is a folder of its own; nothing is started yet."""

    def __init__(self, home: Path, *, name: str = NODE_ID, flags: Sequence[str] = (), **settings: Any) -> None:
        self.home, self.project, self.name, self.flags = home, home / "p2p-orchestrator", name, " ".join(flags)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.settings: dict[str, Any] = {**QUIET, "node_id": name, "port": self.port}
        for section, values in settings.items():
            self.settings[section] = (
                {**self.settings.get(section, {}), **values} if isinstance(values, dict) else values
            )
        self.clock = home / "clock"
        self.environment = {
            "HOME": str(home),
            "RUNBOOK_HOME": str(home),
            "PATH": f"{home}/bin:{os.environ['PATH']}",
            "P2P_URL": self.url,
            "LANG": "C.UTF-8",
            "WATCH_SECONDS": "1",
        }
        self.token: str | None = None
        self._blocks = 0
        self._lay_out()

    def _lay_out(self) -> None:
        project, pgrep = self.project, _which("pgrep")
        for folder in ("bin", "site"):
            (self.home / folder).mkdir(parents=True)
        for folder in ("logs", "config", ".venv/bin"):
            (project / folder).mkdir(parents=True)
        for name in ("scripts", "p2p", "coordination", "app.py"):
            (project / name).symlink_to(ROOT / name)
        for path in (ROOT / "config").glob("*.py"):
            (project / "config" / path.name).symlink_to(path)
        (project / "config/jobs.yaml").write_text(yaml.safe_dump(_cheap_kinds()))
        self.write_settings()
        for path, text in (
            (self.home / "bin/python", PYTHON_STAND_IN.format(python=sys.executable, flags=self.flags)),
            (self.home / "bin/p2pctl", P2PCTL.format(python=sys.executable)),
            (self.home / "bin/pkill", PKILL.format(python=sys.executable, pgrep=pgrep)),
            (self.home / "bin/ssh", SSH),
            (project / ".venv/bin/python", PYTHON_STAND_IN.format(python=sys.executable, flags=self.flags)),
        ):
            path.write_text(text)
            path.chmod(0o755)
        (project / ".venv/bin/activate").write_text(f'export VIRTUAL_ENV="{project}/.venv"\n')
        (self.home / "site/sitecustomize.py").write_text(CLOCK)

    def write_settings(self) -> None:
        (self.project / "config/cluster.yaml").write_text(yaml.safe_dump(self.settings))

    # -- the node -------------------------------------------------------------------------------------------------

    def start(self, *, ago: float = 0.0) -> None:
        """Starts the node as a person does; `ago` seconds before now, by its own clocks."""
        self.clock.write_text(str(ago))
        command = "nohup python scripts/p2p_orchestrator.py > logs/p2p.log 2>&1 &"
        clock = {"PYTHONPATH": str(self.home / "site"), "RUNBOOK_CLOCK": str(self.clock)}
        subprocess.run(["bash", "-c", command], cwd=self.project, env=self.environment | clock, check=True)
        wait_until(self.ready, seconds=30)

    def pass_time(self, left: float = 0.0) -> None:
        """The time until `left` seconds before now passes at once for the node, which beats on meanwhile."""
        staged = self.clock.with_suffix(".new")
        staged.write_text(str(left))
        staged.replace(self.clock)

    def ready(self) -> bool:
        try:
            return self.request("GET", "/ready")[0] == 200
        except OSError:
            return False

    @property
    def node_pid(self) -> int:
        return int((self.project / "data" / self.name / "node.lock").read_text())

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, JSON body)."""
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        data = json.dumps({} if body is None else body).encode() if method == "POST" else None
        asked = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=20) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def ask(self, path: str) -> Any:
        status, answer = self.request("GET", path)
        assert status == 200, answer
        return answer

    def order(self, path: str, **body: Any) -> Any:
        status, answer = self.request("POST", path, body)
        assert status < 300, answer
        return answer

    def queue(self) -> dict[str, Any]:
        status: dict[str, Any] = self.ask("/work_queue_status")
        return status

    def submit(self, *command: str, **fields: Any) -> str:
        return str(self.order("/jobs", command=list(command), **fields)["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        record: dict[str, Any] = self.ask(f"/jobs/{job_id}")
        return record

    def wait_for(self, job_id: str, *states: str) -> dict[str, Any]:
        """The job's record once it is in one of these states."""

        def there() -> dict[str, Any] | None:
            record = self.job(job_id)
            return record if record["state"] in states else None

        record: dict[str, Any] = wait_until(there, seconds=30)
        return record

    # -- blocks ---------------------------------------------------------------------------------------------------

    def run(self, block: Block) -> Outcome:
        """Runs a block from the project's folder. Shell blocks as an argument of bash, the way that a pkill can hit."""
        if block.language == SETTINGS:
            return self._apply(block.text)
        if block.language == PYTHON:
            self._blocks += 1
            file = self.home / f"block-{self._blocks}.py"
            file.write_text(block.text)
            command = ["python", str(Path(__file__).with_name("repl.py")), str(file)]
        else:
            assert block.language == SHELL
            command = ["bash", "-e", "-o", "pipefail", "-c", block.text]
        return self._run(command)

    def _apply(self, text: str) -> Outcome:
        """Settings: valid in the file of a node that starts with them and says so."""
        self.settings |= yaml.safe_load(text)
        self.write_settings()
        check = "import sys; from config.settings import load; print(load(sys.argv[1:]))"
        return self._run(["python", "-c", check, "--config", "config/cluster.yaml"])

    def _run(self, command: list[str]) -> Outcome:
        with subprocess.Popen(
            command,
            cwd=self.project,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=BLOCK_SECONDS)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                output = process.communicate()[0] + f"\n(not done within {BLOCK_SECONDS:g} s)".encode()
        return Outcome(process.returncode, output.decode(errors="replace"))

    # -- the end --------------------------------------------------------------------------------------------------

    def processes(self) -> Iterator[int]:
        """Everything that has this home in its environment: the node, its runner, jobs, shells of blocks."""
        mine = str(self.home).encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environment = (folder / "environ").read_bytes()
                if mine + b"/" in environment or mine + b"\0" in environment:
                    yield int(folder.name)

    def destroy(self) -> None:
        """Ends all of it, whatever state it is in; a killed one may still be starting another."""
        deadline = time.monotonic() + 10
        while found := list(self.processes()):
            assert time.monotonic() < deadline, f"these do not die: {found}"
            for pid in found:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def _cheap_kinds() -> dict[str, Any]:
    """The shipped kinds, with the same rules, whose jobs take a moment and no computing."""
    body: dict[str, Any] = yaml.safe_load((ROOT / "config/jobs.yaml").read_text())
    for kind in body["kinds"].values():
        if "command" in kind:
            kind["command"] = ["sleep", "0.3"]
    return body


def _which(program: str) -> str:
    import shutil

    found = shutil.which(program)
    assert found is not None, f"these tests need {program}, as the runbook does"
    return found
