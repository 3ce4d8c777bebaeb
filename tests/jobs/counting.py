"""A job that can be interrupted: it counts, and after a SIGTERM another attempt counts on where it stopped.

    python counting.py STEPS [--seconds S] [--checkpoint FILE] [--ledger FILE] [--deaf]

`progress.json` says ``{"step": n}`` as it goes. SIGTERM has it write ``{"step": n}`` to the checkpoint, by default
``$P2P_JOB_DIR/checkpoint.json``, and exit with 143. (An attempt's folder is its own: whoever wants the next attempt to
find the checkpoint carries it over, or names a file elsewhere.) At its start it goes on from the checkpoint, if there
is one. At the end `result.json` says how far it came and where this attempt began. Each step is a line of the ledger: a
step that is lost or done twice shows there. ``--deaf`` ignores SIGTERM, for what follows then.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

INTERRUPTED = 128 + signal.SIGTERM


def write(path: Path, value: object) -> None:
    """Whole or not at all."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(json.dumps(value))
    draft.replace(path)


def main() -> int:
    flags = argparse.ArgumentParser()
    flags.add_argument("steps", type=int)
    flags.add_argument("--seconds", type=float, default=0.02, help="a step takes so long")
    flags.add_argument("--checkpoint", type=Path)
    flags.add_argument("--ledger", type=Path)
    flags.add_argument("--deaf", action="store_true")
    asked = flags.parse_args()
    folder = Path(os.environ["P2P_JOB_DIR"])
    checkpoint = asked.checkpoint or folder / "checkpoint.json"
    interrupted = False

    def on_sigterm(_: int, __: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = not asked.deaf

    signal.signal(signal.SIGTERM, on_sigterm)
    begin = step = json.loads(checkpoint.read_text())["step"] if checkpoint.exists() else 0
    print(f"begins at {begin}", flush=True)
    while step < asked.steps:
        if interrupted:
            write(checkpoint, {"step": step})
            print(f"interrupted at {step}", flush=True)
            return INTERRUPTED
        time.sleep(asked.seconds)
        step += 1
        if asked.ledger is not None:
            with asked.ledger.open("a") as ledger:
                ledger.write(f"{step} {os.environ.get('P2P_ATTEMPT', '?')}\n")
        write(folder / "progress.json", {"step": step})
    write(folder / "result.json", {"steps": step, "began_at": begin})
    print(f"ends at {step}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
