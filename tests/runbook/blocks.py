"""Reads a runbook's fenced blocks, each with the section it stands in. Decides nothing about running them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

PYTHON, SHELL, SETTINGS, OUTPUT = "python", "bash", "yaml", "text"
LANGUAGES = {"python": PYTHON, "bash": SHELL, "sh": SHELL, "yaml": SETTINGS, "text": OUTPUT}
_HEADING = re.compile(r"^(#{1,6}) +(.*)$")


@dataclass(frozen=True, slots=True)
class Block:
    language: str
    text: str
    section: str
    line: int  # of the opening fence, from 1


def read(path: Path) -> list[Block]:
    """Every block, in order. Raises ValueError for a fence without a language, with an unknown one, or left open."""
    found: list[Block] = []
    section, language, opened, body = "", "", 0, list[str]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fence = line.strip()
        if not opened and fence.startswith("```"):
            language, opened, body = fence[3:].strip(), number, []
            if language not in LANGUAGES:
                raise ValueError(f"{path.name}:{number}: a block is one of {', '.join(LANGUAGES)}, not {language!r}")
        elif opened and fence == "```":
            found.append(Block(LANGUAGES[language], "\n".join(body) + "\n", section, opened))
            opened = 0
        elif opened:
            body.append(line)
        elif heading := _HEADING.match(line):
            section = heading[2].strip()
    if opened:
        raise ValueError(f"{path.name}:{opened}: this block is never closed")
    return found


def sections(blocks: list[Block]) -> dict[str, list[Block]]:
    """Section -> its blocks. Raises ValueError if two sections with blocks have one name."""
    grouped: dict[str, list[Block]] = {}
    for name, members in groupby(blocks, key=lambda block: block.section):
        if name in grouped:
            raise ValueError(f"two sections are called {name!r}")
        grouped[name] = list(members)
    return grouped
