"""Runs docs/runbooks/P2P_LEADER_FAILOVER.md: every block, in its section's situation, on three real nodes."""

from __future__ import annotations

import pytest

from tests.nodes import ROOT
from tests.runbook import pages, scenes_failover
from tests.runbook.fleet import Fleet, shared_fleet

__all__ = ["shared_fleet"]

PAGE = pages.Page(ROOT / "docs/runbooks/P2P_LEADER_FAILOVER.md")


@pytest.mark.parametrize("section", PAGE.sections)
def test_the_section_does_what_it_says(section: str, shared_fleet: Fleet) -> None:
    PAGE.play(section, scenes_failover.SCENES[section], shared_fleet.heal())


def test_every_scene_has_its_section() -> None:
    assert set(scenes_failover.SCENES) == set(PAGE.sections)


def test_the_page_is_sound() -> None:
    PAGE.check()
