"""Clusters of replicas as scripts: tests/data/raft holds them, with what happened when they were last looked at.

``P2P_REGENERATE=1`` writes what happens now; the difference is then to be reviewed like code. How a script reads is
told in `tests.unit.p2p.scripts`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.p2p.scripts import Script, transcript

FOLDER = Path(__file__).parents[2] / "data" / "raft"
SCRIPTS = sorted(FOLDER.glob("*.txt"))
REGENERATE = os.environ.get("P2P_REGENERATE") == "1"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_script_causes_is_what_its_transcript_says(path: Path) -> None:
    before, now = transcript(path)
    if REGENERATE:
        path.write_text(now, encoding="utf-8")
    else:
        assert now == before


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 60


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_says_why_and_expects_something(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert any(line.startswith("expect ") for line in lines)


WRONG = {
    "another leader": ("cluster 3\nelect n2\nexpect n3 leader\n", "n3 leader"),
    "an order too early": ("cluster 3\nelect n3\ndeliver n1->n2\n", "nothing from n1 to n2"),
    "a log that differs": ("cluster 2\npast n1 1 1\nexpect n1 log 1 2\n", "n1 log"),
    "no agreement": ("cluster 3\npast n1 1\nexpect agreement\n", "logs end differently"),
}


@pytest.mark.parametrize(("text", "why"), WRONG.values(), ids=WRONG)
def test_an_expectation_that_does_not_hold_fails(text: str, why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        Script().run(text)


def test_two_leaders_of_one_term_fail_whatever_a_script_expects() -> None:
    script = Script()
    script.run("cluster 3\nelect n3\n")
    script.cluster.leaders[2] = "n1"
    with pytest.raises(AssertionError, match="two leaders of term 2"):
        script.run("crash n3\nelect n2\n")
