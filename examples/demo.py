"""The demo: one node, real games, live progress, and a table read back from the job results.

It starts a node as a person would, lets the populator fill the queue from ``config/jobs.yaml`` up to the demo's
targets, watches over HTTP, and ends when they are met. Ctrl-C drains the node and stops; a second start goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"selfplay": 80, "evaluation": 6, "tournament": 4}
FOLDER = ROOT / "data" / "demo"
START_SECONDS = 60.0
DRAIN_SECONDS = 60.0
LOOK_SECONDS = 1.0
PLAIN_LINE_SECONDS = 5.0
Json = dict[str, Any]


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


@dataclass(slots=True)
class Node:
    """The node the demo runs, as a separate process of its own session: Ctrl-C reaches the demo alone."""

    process: subprocess.Popen[bytes]
    url: str

    def get(self, path: str) -> Json:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:  # noqa: S310 - our own node
            told: Json = json.load(answer)
            return told

    def post(self, path: str) -> None:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data=b"{}", headers=headers, method="POST")  # noqa: S310
        urllib.request.urlopen(request, timeout=10).close()  # noqa: S310 - our own node


def free_port(preferred: int = 8770) -> int:
    """The usual port, or any free one if somebody has it."""
    for port in (preferred, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise DemoError("no free port on 127.0.0.1")


def end_leftover() -> None:
    """A demo that was killed leaves its node: that one is asked to stop, and the new one waits for its data."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((FOLDER / "node" / "node.lock").read_text(encoding="ascii"))
        if str(FOLDER) in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8"):
            os.kill(pid, signal.SIGTERM)


def launch_node() -> Node:
    """Starts the node's process."""
    end_leftover()
    FOLDER.mkdir(parents=True, exist_ok=True)
    settings = {"populator": {"totals": TARGETS, "interval_seconds": 1}}
    (FOLDER / "cluster.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    port = free_port()
    command = [
        sys.executable,
        str(ROOT / "scripts" / "p2p_orchestrator.py"),
        *("--node-id", "demo", "--port", str(port), "--config", str(FOLDER / "cluster.yaml")),
        *("--data-dir", str(FOLDER / "node"), "--log-dir", str(FOLDER / "logs")),
        *("--jobs-file", str(ROOT / "config" / "jobs.yaml")),
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("P2P_", "RINGRIFT_"))}
    # The store is the games' own, not the node's: every job of the demo reads and adds to it.
    env["SELFPLAY_STORE"] = str(FOLDER / "games")
    with (FOLDER / "p2p.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env, start_new_session=True, cwd=FOLDER
        )
    return Node(process, f"http://127.0.0.1:{port}")


def wait_ready(node: Node) -> None:
    """Returns once the node takes work. Raises DemoError."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if node.process.poll() is not None:
            raise DemoError(f"the node ended with {node.process.returncode}; see {FOLDER / 'p2p.log'}")
        with contextlib.suppress(OSError):
            node.get("/ready")
            return
        time.sleep(0.1)
    raise DemoError(f"the node was not ready within {START_SECONDS:g} s; see {FOLDER / 'p2p.log'}")


@dataclass(slots=True)
class View:
    """One look at the node."""

    ended: dict[str, dict[str, int]] = field(default_factory=dict)  # kind -> state -> jobs
    running: list[Json] = field(default_factory=list)
    healthy: str = ""

    def done(self, kind: str) -> int:
        """Jobs of a kind that have ended for good."""
        states = self.ended.get(kind, {})
        return sum(states.get(state, 0) for state in ("completed", "failed", "cancelled"))

    @property
    def finished(self) -> bool:
        return all(self.done(kind) >= target for kind, target in TARGETS.items())


def look(node: Node) -> View:
    """Asks the node how far it is."""
    status = node.get("/work_queue_status")
    running = node.get("/jobs?state=running&limit=10")["jobs"]
    return View(status["by_kind"], running, status["health"]["message"])


def _percent(job: Json) -> str:
    progress = job.get("progress") or {}
    return f"{progress['percent']:.0f} %" if "percent" in progress else "…"


def picture(view: View, node: Node, left: float) -> RenderableType:
    """What a person sees on a terminal."""
    kinds = Table(box=None, pad_edge=False)
    for column in ("kind", "ended", "", "running", "pending", "failed"):
        kinds.add_column(column)
    for kind, target in TARGETS.items():
        states = view.ended.get(kind, {})
        done = view.done(kind)
        kinds.add_row(
            kind,
            f"{done}/{target}",
            ProgressBar(total=target, completed=min(done, target), width=30),
            str(states.get("running", 0) + states.get("claimed", 0)),
            str(states.get("pending", 0) + states.get("waiting", 0)),
            str(states.get("failed", 0)),
        )
    jobs = Table(box=None, pad_edge=False)
    for column in ("running now", "kind", "game", "progress"):
        jobs.add_column(column)
    for job in view.running:
        jobs.add_row(job["id"], job["kind"], str(job["params"].get("game", "")), _percent(job))
    urls = Text(
        f"look at  {node.url}/status   {node.url}/work_queue_status   {node.url}/jobs?state=running\n"
        f"queue {view.healthy}; at most {left / 60:.1f} min left; Ctrl-C stops"
    )
    return Group(kinds, Text(), jobs, Text(), urls)


def plain(view: View) -> str:
    """The same in one line, for a log."""
    kinds = ", ".join(f"{kind} {view.done(kind)}/{target}" for kind, target in TARGETS.items())
    return f"{kinds}; running {len(view.running)}; queue {view.healthy}"


def watch(node: Node, console: Console, deadline: float) -> bool:
    """Shows progress until the targets are met (True) or the time is up (False)."""
    live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
    said = 0.0
    with live or contextlib.nullcontext():
        while True:
            view = look(node)
            now = time.monotonic()
            if live is not None:
                live.update(picture(view, node, deadline - now))
            elif now - said >= PLAIN_LINE_SECONDS:
                said = now
                console.print(plain(view), highlight=False)
            if view.finished:
                return True
            if now >= deadline:
                return False
            time.sleep(LOOK_SECONDS)


def drain(node: Node, console: Console) -> None:
    """Lets the running games end and be recorded."""
    node.post("/nodes/demo/drain")
    deadline = time.monotonic() + DRAIN_SECONDS
    said = 0
    while (running := node.get("/work_queue_status")["in_progress"]) and time.monotonic() < deadline:
        if running != said:
            console.print(f"waiting for {running} running job(s) to end; Ctrl-C again leaves them", highlight=False)
            said = running
        time.sleep(LOOK_SECONDS / 2)


def stop_node(node: Node) -> None:
    """Ends the node cleanly; jobs that still run go on under its runner."""
    node.process.send_signal(signal.SIGTERM)
    try:
        node.process.wait(20)
    except subprocess.TimeoutExpired:
        node.process.kill()  # its next start recovers


def completed(node: Node, kind: str) -> Iterator[Json]:
    """The results of every completed job of a kind, newest first."""
    cursor = ""
    while True:
        page = node.get(f"/jobs?state=completed&kind={kind}&limit=500{cursor}")
        for job in page["jobs"]:
            if job["result"] is not None:
                yield job["result"]
        if page["cursor"] is None:
            return
        cursor = f"&cursor={page['cursor']}"


def games_table(node: Node) -> Table:
    """Games played and how they ended, from the results of the self-play jobs."""
    sums: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for result in completed(node, "selfplay"):
        for key in ("games", "first_player_wins", "second_player_wins", "draws", "moves", "seconds"):
            sums[result["game"]][key] += result[key]
    table = Table(title="Self-play")
    for column in ("game", "games", "first wins", "second wins", "draws", "mean length", "CPU seconds"):
        table.add_column(column, justify="left" if column == "game" else "right")
    for game, total in sorted(sums.items()):
        table.add_row(
            game,
            *(f"{total[key]:.0f}" for key in ("games", "first_player_wins", "second_player_wins", "draws")),
            f"{total['moves'] / max(total['games'], 1):.1f}",
            f"{total['seconds']:.0f}",
        )
    return table


def gauntlet_table(node: Node) -> Table:
    """The newest player against the baseline, one row an evaluation."""
    table = Table(title="Evaluations: newest against plain search")
    for column in ("game", "simulations", "games", "wins", "draws", "losses", "Elo difference", "games in its book"):
        table.add_column(column, justify="left" if column == "game" else "right")
    for result in completed(node, "evaluation"):
        table.add_row(
            result["game"],
            *(str(result[key]) for key in ("simulations", "games", "wins", "draws", "losses")),
            f"{result['elo_difference']:+.0f} ± {result['elo_error']:.0f}",
            str(result["book"]["games"]),
        )
    return table


def elo_tables(node: Node) -> Iterator[Table]:
    """The newest tournament of each game."""
    seen = set()
    for result in completed(node, "tournament"):
        if result["game"] in seen:
            continue
        seen.add(result["game"])
        table = Table(title=f"Tournament: {result['game']}")
        for column in ("player", "Elo", "games", "wins", "draws", "losses"):
            table.add_column(column, justify="left" if column == "player" else "right")
        for row in result["table"]:
            table.add_row(
                row["player"],
                f"{row['elo']:.0f} ± {row['error']:.0f}",
                *(str(row[key]) for key in ("games", "wins", "draws", "losses")),
            )
        yield table


def minutes_allowed() -> float:
    """``P2P_DEMO_MINUTES``, or ten. Raises DemoError."""
    text = os.environ.get("P2P_DEMO_MINUTES") or "10"
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise DemoError(f"P2P_DEMO_MINUTES must be a positive number of minutes, not {text!r}")
    return minutes


def show(node: Node, console: Console) -> None:
    """The tables, read back from the job results."""
    for table in (games_table(node), gauntlet_table(node), *elo_tables(node)):
        console.print(table)


def play(node: Node, console: Console, minutes: float) -> None:
    """Watches until the targets are met, the time is up or a person stops it; then shows what came of it."""
    try:
        met = watch(node, console, time.monotonic() + minutes * 60)
        again = "scripts/demo --fresh starts over" if met else "scripts/demo goes on from here"
        console.print(f"{'the targets are met' if met else 'the time is up'}; {again}", highlight=False)
    except KeyboardInterrupt:
        console.print("stopping; a second start goes on from here", highlight=False)
    try:
        drain(node, console)
    except KeyboardInterrupt:
        console.print("left the running jobs to the runner; the next start takes them up", highlight=False)
    show(node, console)


def arguments() -> argparse.Namespace:
    flags = argparse.ArgumentParser(
        prog="scripts/demo", description="Plays real games on one node and shows how it goes."
    )
    flags.add_argument("--fresh", action="store_true", help="forget what an earlier demo played and start over")
    return flags.parse_args()


def main() -> int:
    """Exit code 0 when the targets were met, the time was up or a person stopped it; 1 if something went wrong."""
    # A log or a pipe has no width of its own; a table squeezed into 80 columns is hard to read.
    console = Console(width=None if sys.stdout.isatty() else 120)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    node: Node | None = None
    code = 0
    try:
        asked = arguments()
        minutes = minutes_allowed()
        if asked.fresh:
            end_leftover()
            shutil.rmtree(FOLDER, ignore_errors=True)
        node = launch_node()
        wait_ready(node)
        console.print(f"a node runs at {node.url}; its files are under {FOLDER}", highlight=False)
        play(node, console, minutes)
    except KeyboardInterrupt:
        console.print("stopped", highlight=False)
    except DemoError as error:
        console.print(f"demo: {error}", highlight=False)
        code = 1
    except (OSError, KeyError) as error:
        console.print(f"demo: the node could not be asked: {error}; see {FOLDER / 'p2p.log'}", highlight=False)
        code = 1
    finally:
        if node is not None:
            stop_node(node)
    return code


if __name__ == "__main__":
    sys.exit(main())
