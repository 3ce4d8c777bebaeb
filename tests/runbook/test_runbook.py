"""Runs the whole runbook: every block, in order, in the trouble its section is about, on a real node."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.nodes import ROOT
from tests.runbook import blocks, scenes
from tests.runbook.blocks import OUTPUT, Block
from tests.runbook.deployment import Deployment

PAGE = ROOT / "docs/runbooks/WORK_QUEUE_STALLS.md"
TEXT = PAGE.read_text(encoding="utf-8")
ALL = blocks.read(PAGE)
SECTIONS = blocks.sections([block for block in ALL if block.language != OUTPUT])


@pytest.mark.parametrize("section", SECTIONS)
def test_the_section_does_what_it_says(section: str, tmp_path: Path) -> None:
    deployment = Deployment(tmp_path / "home", **scenes.SETTINGS[section])
    try:
        scene = scenes.SCENES[section](deployment)
        next(scene)
        left = list(SECTIONS[section])
        while left:
            block = left.pop(0)
            done = deployment.run(block).check(block)
            try:
                scene.send(done)
            except StopIteration:
                break
        else:
            pytest.fail(f"the scene of {section!r} expects more blocks than the page has")
        assert not left, f"the scene of {section!r} does not check the block on line {left[0].line}"
    finally:
        deployment.destroy()


def test_every_scene_has_its_section() -> None:
    assert set(scenes.SCENES) == set(SECTIONS)


def test_blocks_that_only_show_output_are_few() -> None:
    assert len([block for block in ALL if block.language == OUTPUT]) <= 2


def test_no_shell_block_names_the_orchestrator_plainly() -> None:
    """A shell that is given such a block as its argument would be hit by the block's own pkill."""
    assert not [block.line for block in ALL if block.language == "bash" and "p2p_orchestrator" in _unbracketed(block)]


def _unbracketed(block: Block) -> str:
    return block.text.replace("[p]2p_orchestrator", "")


def test_every_link_leads_to_a_heading() -> None:
    headings = re.findall(r"^#+ +(.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors


def _table() -> list[list[str]]:
    rows = TEXT.partition("## Quick reference")[2].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("|")][2:]


def test_every_line_of_the_quick_reference_works(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path / "home")
    try:
        deployment.start()
        imports = (
            "from coordination.alerts import clear_alert, emit_alert\n"
            "from coordination.daemon_manager import get_daemon_manager\n"
            "from coordination.unified_queue_populator import get_queue_populator\n"
            "from coordination.work_queue import get_work_queue\n"
            "q = get_work_queue()\n"
        )
        calls = [call for row in _table() for call in re.findall(r"`([^`]+)`", row[1])]
        assert len(calls) >= 12
        block = Block("python", imports + "".join(f"{call}\n" for call in calls), "Quick reference", 0)
        deployment.run(block).check(block)
        pages = {(page["method"], page["path"]) for page in deployment.ask("/")["pages"]}
        for row in _table():
            method, *paths = re.findall(r"^\w+|`(?:[^`]+)`", row[2])
            for path in (path.strip("`") for path in paths):
                if path.startswith("/"):
                    assert (method, path) in pages, (method, path)
    finally:
        deployment.destroy()
