"""Share 0 of the planted bugs: each must be found. See bugs.py."""

from __future__ import annotations

import pytest

from tests.simulation.seeds import bugs_of, catch


@pytest.mark.parametrize("bug", bugs_of(0))
def test_planted_bug_is_found(bug: str) -> None:
    catch(bug)
