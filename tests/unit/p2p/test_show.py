"""What `p2pctl voters list` makes of the leader's answer."""

from __future__ import annotations

from typing import Any

import pytest

from p2p.cli import show

ROW = {"node": "b", "disk": "d" * 32, "state": "alive", "leads": False, "match_index": 90, "contact_age_seconds": 0.1}


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"ready": True}, "alive "),
        ({"ready": False}, "alive, unfit"),
        ({"ready": False, "diverged": True}, "alive, another queue"),
        ({"ready": True, "diverged": True, "lost_entries": True}, "alive, lost entries"),
    ],
)
def test_what_is_wrong_with_a_voter_is_in_its_line(told: dict[str, Any], said: str) -> None:
    lines = show.voters(
        {
            "voters": [{**ROW, "node": "a", "leads": True}, ROW | told],
            "learners": [],
            "voter_target": 3,
            "term": 4,
            "last_index": 100,
            "autopilot": "nothing to do",
        }
    )
    (line,) = (line for line in lines if line.startswith("b "))
    assert said in line
    assert "10" in line.split()
    assert any("2 voters survive no more failures than 1" in line for line in lines)
