"""The store: where self-play leaves its games and the other steps find them.

One folder a game, one file a finished `play`. A file is named after everything that decides its games, so that a
retried job replaces its own file instead of counting its games twice. It appears whole (write aside, rename), so
readers and writers need no lock; the oldest files go when there are more than `MAX_FILES`.

Jobs have only their own folders, so the store is a folder of the machine: `--store`, else `$SELFPLAY_STORE`, else
`p2p-orchestrator/selfplay` in the user's data folder. Put it on a shared disk and a whole cluster has one.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import ExampleError
from .games import GameRecord

MAX_FILES = 200
"""Game files kept for each game."""
STALE_SECONDS = 3600
"""An unfinished copy this old was left by a process that was killed."""


def default_store() -> Path:
    """`$SELFPLAY_STORE`, else a folder in the user's data folder (`$XDG_DATA_HOME`). Raises `ExampleError`."""
    if given := os.environ.get("SELFPLAY_STORE"):
        return Path(given)
    if data := os.environ.get("XDG_DATA_HOME"):
        return Path(data) / "p2p-orchestrator" / "selfplay"
    try:
        return Path.home() / ".local" / "share" / "p2p-orchestrator" / "selfplay"
    except RuntimeError:
        raise ExampleError("--store: say where games are kept, since this user has no home folder") from None


class Store:
    """The games under `root`. Nothing is made before something is published."""

    def __init__(self, root: Path, *, max_files: int = MAX_FILES) -> None:
        self.root = root
        self._max_files = max_files

    def publish(self, game: str, source: Path, name: str) -> Path:
        """Copies `source` in as `name`, replacing its namesake, then prunes. Gives the path in the store."""
        folder = self.root / game
        folder.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=".", suffix=".part", dir=folder)
        try:
            with os.fdopen(handle, "wb") as copy, source.open("rb") as original:
                shutil.copyfileobj(original, copy)
            Path(aside).chmod(0o644)  # mkstemp's 0600 would hide the games from other users of a shared store
            target = Path(aside).replace(folder / name)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
        # From here on another writer may already have pruned the new file, so it is not touched again.
        self._prune(folder)
        return target

    def newest(self, game: str, count: int) -> list[Path]:
        """The paths of the `count` newest files, newest first."""
        return self._by_age(self.root / game)[:count]

    def records(self, game: str, count: int) -> tuple[list[GameRecord], int, int]:
        """(games of the `count` newest files, files read, files skipped).

        A file pruned since it was listed is no loss; one that is not a games file is skipped and counted, since one
        bad file must not stop every evaluation.
        """
        records: list[GameRecord] = []
        read = skipped = 0
        for path in self.newest(game, count):
            try:
                records.extend(list(read_games(path, game=game)))  # all of a file or none of it
                read += 1
            except FileNotFoundError:
                continue
            except ExampleError:
                skipped += 1
        return records, read, skipped

    def _prune(self, folder: Path) -> None:
        for path in self._by_age(folder)[self._max_files :]:
            path.unlink(missing_ok=True)  # another writer may prune at the same time
        for path in folder.glob(".*.part"):
            if time.time() - _modified(path) / 1e9 > STALE_SECONDS:
                path.unlink(missing_ok=True)

    def _by_age(self, folder: Path) -> list[Path]:
        aged = [(_modified(path), path.name, path) for path in folder.glob("*.jsonl") if not path.name.startswith(".")]
        return [path for modified, _name, path in sorted(aged, reverse=True) if modified]


def read_games(path: Path, *, game: str) -> Iterator[GameRecord]:
    """The games of a file. Raises `ExampleError` at a line that is not a record of `game`."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = GameRecord.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ExampleError(f"line {number} of {path} is not a game record ({error!r})") from error
            if record.game != game:
                raise ExampleError(f"line {number} of {path} is a game of {record.game}, not of {game}")
            yield record


def _modified(path: Path) -> int:
    """Nanoseconds since 1970; 0 for a file that has just gone."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
