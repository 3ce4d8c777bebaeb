"""Boxes as the cluster's runbooks assume them: each a home with the project in it, all reached by ``ssh`` under their
names, one cluster with a token. `Deployment` says what is not the real thing.

A page's blocks run on box-1. One fleet serves a whole page: `heal` brings it back to three voters before each section.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import wait_until
from tests.runbook.blocks import SETTINGS, Block
from tests.runbook.deployment import TOKEN, Deployment, Outcome

CONTENT = {"peers": [], "auth_token_file": "config/token"}
QUICK = {"young_steady_seconds": 0.3, "steady_seconds": 0.3}
OWN = ("node_id", "host", "port")  # what the stand-in for python says instead of the file
START = "nohup .venv/bin/python scripts/p2p_orchestrator.py >> logs/p2p.log 2>&1 &"
VOTERS = ("box-1", "box-2", "box-3")


class Box(Deployment):
    """One of a fleet. Nothing of it is started yet."""

    def __init__(self, fleet: Path, name: str) -> None:
        super().__init__(
            fleet / name, name=name, flags=("--node-id", name, "--host", "127.0.0.1", "--port", "$P2P_PORT")
        )
        for key in OWN:
            del self.settings[key]
        self.settings["cluster"] = dict(QUICK)
        self.environment |= {"RUNBOOK_FLEET": str(fleet), "P2P_PORT": str(self.port)}
        lines = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        (self.home / "environment").write_text("\n".join(lines) + "\n")
        self.write_settings()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def data(self) -> Path:
        return self.project / "data" / self.name

    def log(self) -> str:
        with contextlib.suppress(OSError):
            return (self.project / "logs/p2p.log").read_text()
        return ""

    def put_token(self) -> None:
        assert self.token is not None
        file = self.project / "config/token"
        file.write_text(self.token)
        file.chmod(0o600)

    def launch(self, *flags: str) -> None:
        command = START.replace(".py", " ".join([".py", *map(shlex.quote, flags)]), 1) if flags else START
        subprocess.run(["bash", "-c", command], cwd=self.project, env=self.environment, check=True)

    @property
    def running(self) -> bool:
        try:
            return (
                Path(f"/proc/{self.node_pid}").exists()
                and b"p2p_orchestrator" in Path(f"/proc/{self.node_pid}/cmdline").read_bytes()
            )
        except (OSError, ValueError):
            return False

    def kill(self, number: int = signal.SIGKILL) -> None:
        pid = self.node_pid
        os.kill(pid, number)
        wait_until(lambda: not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/cmdline").read_bytes() == b"")

    def shell(self, command: str) -> None:
        subprocess.run(["bash", "-e", "-c", command], cwd=self.project, env=self.environment, check=True)

    def page(self, path: str) -> bytes:
        """Empty if it is refused."""
        asked = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.token}"})
        try:
            with urllib.request.urlopen(asked, timeout=20) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return b""

    def status(self) -> dict[str, Any]:
        """Empty if it does not answer."""
        with contextlib.suppress(OSError, ValueError):
            code, told = self.request("GET", "/status?consistency=stale")
            if code == 200:
                return dict(told)
        return {}


class Fleet:
    """`boxes` box-1 to box-4; the first three are the cluster, the fourth is there for whoever needs one more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.boxes = {name: Box(folder, name) for name in (*VOTERS, "box-4")}
        self.here = self.boxes["box-1"]
        self.use_token(TOKEN)
        self.here.environment |= {
            "RINGRIFT_CLUSTER_AUTH_TOKEN_FILE": "config/token",
            "CURL_HOME": str(self.here.home / ".p2p"),
        }

    def __getitem__(self, name: str) -> Box:
        return self.boxes[name]

    def use_token(self, token: str) -> None:
        """For every request from now on, by the tests and by curl."""
        for box in self.boxes.values():
            box.token = token
        file = self.here.home / ".p2p/.curlrc"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'header = "Authorization: Bearer {token}"\n')

    def wipe(self, *names: str) -> None:
        """Stopped, and nothing left of their data."""
        for name in names:
            box = self[name]
            if box.running:
                box.kill()
            box.destroy()
            for folder in (box.project / "data", box.project / "logs"):
                shutil.rmtree(folder, ignore_errors=True)
            (box.project / "logs").mkdir()
            box.home.mkdir(exist_ok=True)

    def quick(self) -> None:
        """As at the beginning, whatever a page's settings were."""
        for box in self.boxes.values():
            box.settings["cluster"] = dict(QUICK)
            box.settings["priority"] = 0
            box.write_settings()

    def settle(self, *names: str, peers: tuple[str, ...] = VOTERS, **settings: Any) -> None:
        """The file that the page has on every box, with addresses that can be dialled here."""
        for box in [self[name] for name in names] or self.boxes.values():
            box.settings |= {**CONTENT, "peers": [self[peer].address for peer in peers], **settings}
            box.write_settings()
            box.put_token()

    def heal(self) -> Fleet:
        """Three voters, all well; a fourth box is not part of it any more."""
        for box in self.alive():
            os.kill(box.node_pid, signal.SIGCONT)
        spare = self["box-4"]
        if spare.running:
            spare.kill(signal.SIGTERM)
        self.settle(*VOTERS)
        for name in VOTERS:
            if not self[name].running:
                self[name].launch()
        return self.wait_voters(*VOTERS)

    def wait_voters(self, *names: str, seconds: float = 30.0) -> Fleet:
        """Waits until these are the voters, by the word of each of them, and all follow one leader."""

        def agreed() -> bool:
            said = [self[name].status() for name in names]
            return all(status.get("voters") == sorted(names) for status in said) and (
                len({status["leader_id"] for status in said} | {None}) == 2
            )

        wait_until(agreed, seconds=seconds, every=0.1)
        wait_until(lambda: all(self[name].ready() for name in names), seconds=seconds, every=0.1)
        return self

    @property
    def leader(self) -> Box:
        found = wait_until(
            lambda: next((s["leader_id"] for b in self.alive() if (s := b.status()).get("leader_id")), None)
        )
        return self[str(found)]

    def alive(self) -> list[Box]:
        return [box for box in self.boxes.values() if box.running]

    def lead(self, name: str) -> None:
        """Has this box lead."""

        def handed_over() -> bool:
            """A leader that has just been elected does not know yet that the other is well."""
            return self.leader.name == name or (
                self.here.request("POST", "/admin/leadership/transfer", {"to": name})[0] == 200
            )

        wait_until(handed_over)
        wait_until(lambda: all(box.status().get("leader_id") == name for box in self.alive()))

    def signal(self, name: str, number: int) -> None:
        os.kill(self[name].node_pid, number)

    def run(self, block: Block, on: str = "box-1") -> Outcome:
        done = self[on].run(block)
        if block.language == SETTINGS:
            self.settle(*VOTERS)
        return done

    def events(self) -> str:
        """coordination.log of every box."""
        logs = [box.project / "logs/coordination.log" for box in self.boxes.values()]
        return "".join(log.read_text() for log in logs if log.exists())

    def destroy(self) -> None:
        for box in self.boxes.values():
            box.destroy()


@contextlib.contextmanager
def fleet_in(folder: Path) -> Iterator[Fleet]:
    fleet = Fleet(folder)
    try:
        yield fleet
    finally:
        fleet.destroy()


@pytest.fixture(scope="module")
def shared_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Started once, by the first `heal`."""
    with fleet_in(tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet
