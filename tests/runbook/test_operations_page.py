"""Runs docs/runbooks/P2P_ORCHESTRATOR_OPERATIONS.md: every block, in its section's situation, on three real nodes."""

from __future__ import annotations

import pytest

from tests.nodes import ROOT
from tests.runbook import pages
from tests.runbook.fleet import Fleet, shared_fleet
from tests.runbook.scenes_operations import SCENES, UNHEALED

__all__ = ["shared_fleet"]

PAGE = pages.Page(ROOT / "docs/runbooks/P2P_ORCHESTRATOR_OPERATIONS.md")
ORDER = sorted(PAGE.sections, key=lambda section: section != "Start three boxes")  # which gives the others their fleet


@pytest.mark.parametrize("section", ORDER)
def test_the_section_does_what_it_says(section: str, shared_fleet: Fleet) -> None:
    PAGE.play(section, SCENES[section], shared_fleet if section in UNHEALED else shared_fleet.heal())


def test_every_scene_has_its_section() -> None:
    assert set(SCENES) == set(PAGE.sections)


def test_the_page_is_sound() -> None:
    PAGE.check()
