"""A runbook page: its sections, how one is played, and what must hold of every page."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Protocol, TypeVar

import pytest

from tests.runbook import blocks
from tests.runbook.blocks import OUTPUT, SHELL, Block
from tests.runbook.deployment import Outcome

Steps = Generator[None, Outcome, None]


class Place(Protocol):
    """Where blocks are run: one box, or a fleet."""

    def run(self, block: Block) -> Outcome: ...


P = TypeVar("P", bound=Place)


class Page:
    def __init__(self, path: Path) -> None:
        self.path, self.text = path, path.read_text(encoding="utf-8")
        self.all = blocks.read(path)
        self.sections = blocks.sections([block for block in self.all if block.language != OUTPUT])

    def play(self, section: str, scene: Callable[[P], Steps], place: P) -> None:
        """Sets the scene and runs the section's blocks there (of a fleet: on box-1), in order."""
        steps = scene(place)
        next(steps)
        left = list(self.sections[section])
        while left:
            block = left.pop(0)
            done = place.run(block).check(block)
            try:
                steps.send(done)
            except StopIteration:
                break
        else:
            pytest.fail(f"the scene of {section!r} expects more blocks than the page has")
        assert not left, f"the scene of {section!r} does not check the block on line {left[0].line}"

    def check(self) -> None:
        """Few blocks that are only looked at; no block that would kill its own shell; links that lead somewhere."""
        assert len([block for block in self.all if block.language == OUTPUT]) <= 2
        for block in self.all:
            plain = block.text.replace("[p]2p_orchestrator", "")
            assert block.language != SHELL or "p2p_orchestrator" not in plain, f"line {block.line}"
        for target, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", self.text):
            assert anchor in _anchors(self.path.parent / target if target else self.path), (target, anchor)
        for target in re.findall(r"\]\(([\w./-]+\.md)\)", self.text):
            assert (self.path.parent / target).exists(), target


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
