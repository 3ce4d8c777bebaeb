"""Runs docs/runbooks/CLUSTER_GPU_STUCK.md: every block, in its section's trouble, on a real node with recorded GPUs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from p2p.gpus import FATAL_XIDS
from tests.nodes import ROOT
from tests.runbook import pages
from tests.runbook.deployment import Deployment
from tests.runbook.scenes_gpu import SCENES, SETTINGS, begin

PAGE = pages.Page(ROOT / "docs/runbooks/CLUSTER_GPU_STUCK.md")


@pytest.mark.parametrize("section", PAGE.sections)
def test_the_section_does_what_it_says(section: str, tmp_path: Path) -> None:
    deployment = Deployment(tmp_path / "home", **SETTINGS)
    try:
        PAGE.play(section, SCENES[section], deployment)
    finally:
        deployment.destroy()


def test_every_scene_has_its_section() -> None:
    assert set(SCENES) == set(PAGE.sections)


def test_the_page_is_sound() -> None:
    PAGE.check()


def test_the_page_knows_every_fatal_xid_and_no_other() -> None:
    table = PAGE.text.partition("| why | it means |")[2].partition("\n\n")[0]
    named = {int(number) for row in table.splitlines() for number in re.findall(r"(?<!\d)(\d{2,3})(?!\d)", row)}
    assert named == set(FATAL_XIDS)


def test_the_quick_reference_names_what_there_is(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path / "home", **SETTINGS)
    try:
        begin(deployment)
        paths = set(re.findall(r"`GET (/[\w/]+)`", PAGE.text.partition("## Quick reference")[2]))
        assert paths >= {"/nodes", "/status", "/work_queue/stuck"}
        assert paths <= {page["path"] for page in deployment.ask("/")["pages"]}
        assert "GpuWatchLoop" in json.dumps(deployment.ask("/status")["loops"])
        assert "gpu_watch" in deployment.ask("/daemons")
    finally:
        deployment.destroy()
