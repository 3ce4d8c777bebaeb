"""``python -m p2p.runner``: become the daemon of ``$P2P_RUNNER_DIR``.  ``--list DIR``: print a runner's records.

The first process waits until its forked child listens, and exits with 0, or with 1 if it never did.  The fork comes
before the imports: a process forks safely while it is small and has no threads.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> int:
    if sys.argv[1:2] == ["--list"] and len(sys.argv) == 3:
        return list_records(Path(sys.argv[2]))
    directory = os.environ.pop("P2P_RUNNER_DIR", None)
    if directory is None:
        sys.stderr.write("P2P_RUNNER_DIR is not set; the orchestrator starts the runner, people need not\n")
        return 2
    ready_fd, child_fd = os.pipe()
    if os.fork():
        os.close(child_fd)
        return 0 if os.read(ready_fd, 1) else 1
    os.close(ready_fd)

    # asyncio imports ssl if there is one, for 4 MB of memory that a Unix socket has no use for; it can do without.
    sys.modules["ssl"] = None  # type: ignore[assignment]
    from p2p.runner.serve import run

    def ready() -> None:
        os.write(child_fd, b"1")
        os.close(child_fd)

    return run(Path(directory), ready)


def list_records(directory: Path) -> int:
    """For a person with a shell: one line for each attempt that runs, or ended and is not acknowledged."""
    import apsw

    from p2p.runner.store import FILE_NAME

    columns = "job, attempt, state, pid, exit_code, signal, reason, command"
    database = apsw.Connection(str(directory / FILE_NAME), flags=apsw.SQLITE_OPEN_READONLY)
    sys.stdout.write(columns.replace(", ", "\t") + "\n")
    for row in database.execute(f"SELECT {columns} FROM attempts ORDER BY job, attempt"):  # noqa: S608
        sys.stdout.write("\t".join("" if value is None else str(value) for value in row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
