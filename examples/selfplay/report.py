"""What a step tells the orchestrator: two JSON files in its folder, and lines on stdout.

`progress.json` is replaced as games end (at most `PROGRESS_INTERVAL_SECONDS` apart), `result.json` is written once at
the end. Both are written aside and renamed, so a reader never sees half a file.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .errors import Stopped
from .stop import StopRequest

PROGRESS_INTERVAL_SECONDS = 0.5
MAX_LOG_LINES = 100
"""A long run prints every n-th game, so that its log stays readable."""


def job_folder() -> Path:
    """`$P2P_JOB_DIR`, the folder of this attempt; without it a new temporary one, so that nothing is overwritten."""
    given = os.environ.get("P2P_JOB_DIR")
    if not given:
        return Path(tempfile.mkdtemp(prefix="p2p-selfplay-"))
    folder = Path(given)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def default_seed() -> int:
    """A seed from `$P2P_JOB_ID`: jobs differ, and a retry of a job plays the same games again. 0 by hand."""
    return zlib.crc32(os.environ.get("P2P_JOB_ID", "").encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replaces `path` in one step (write, rename). NaN and infinity are refused, since JSON has neither."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    aside.replace(path)


class Report:
    """The progress of `total` games of one step, in `folder`.

    A context manager: leaving it, for whatever reason, writes the last progress, so a stopped run keeps its count.
    """

    def __init__(
        self,
        folder: Path,
        *,
        kind: str,
        game: str,
        total: int,
        stop: StopRequest,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.done = 0
        self._kind, self._game, self._total = kind, game, total
        self._stop = stop
        self._clock = clock
        self._started = clock()
        self._written = -PROGRESS_INTERVAL_SECONDS
        self._tally: Mapping[str, Any] = {}

    @property
    def seconds(self) -> float:
        return round(self._clock() - self._started, 3)

    def __enter__(self) -> Self:
        print(f"{self._kind}: {self._total} games of {self._game}", flush=True)
        self._write_progress(stopped=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._write_progress(stopped=isinstance(error, Stopped))

    def advance(self, sentence: str, tally: Mapping[str, Any]) -> None:
        """One more game has ended; `tally` is the result so far. Raises `Stopped` if a stop signal has come."""
        self.done += 1
        self._tally = tally
        if self._prints(self.done):
            print(f"game {self.done}/{self._total}: {sentence}", flush=True)
        if self._clock() - self._written >= PROGRESS_INTERVAL_SECONDS:
            self._write_progress(stopped=False)
        if self.done < self._total:
            self._stop.check()

    def finish(self, result: Mapping[str, Any], sentence: str) -> None:
        """Writes `result.json`; the step is complete."""
        write_json(self.folder / "result.json", result)
        print(f"{self._kind}: {sentence} ({self.seconds:.1f} s, {self.folder / 'result.json'})", flush=True)

    def _prints(self, done: int) -> bool:
        every = -(-self._total // MAX_LOG_LINES)
        return done % every == 0 or done in (1, self._total)

    def _write_progress(self, *, stopped: bool) -> None:
        self._written = self._clock()
        seconds = self.seconds
        left = self._total - self.done
        progress = {
            "kind": self._kind,
            "game": self._game,
            "done": self.done,
            "total": self._total,
            "percent": round(100 * self.done / self._total, 1),
            "elapsed_seconds": seconds,
            "eta_seconds": round(seconds / self.done * left, 1) if self.done else None,
            "stopped": stopped,
            **self._tally,
        }
        write_json(self.folder / "progress.json", progress)
