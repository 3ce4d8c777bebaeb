"""The core does no I/O, reads no clock and draws no random numbers of its own."""

from __future__ import annotations

import ast
from pathlib import Path

import p2p.membership

FORBIDDEN = {"asyncio", "socket", "time", "random", "secrets", "uuid", "threading", "os", "sqlite3", "aiohttp"}
FILES = sorted(Path(str(p2p.membership.__file__)).parent.glob("*.py"))


def imported(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def test_no_file_of_the_core_imports_a_clock_a_socket_or_randomness() -> None:
    assert len(FILES) > 10
    assert {file.name: imported(file.read_text()) & FORBIDDEN for file in FILES} == {f.name: set() for f in FILES}
    assert imported("from time import monotonic\nimport os.path") == {"time", "os"}, "the check itself can fail"
