"""Share 0 of the default seeds: whole clusters under whatever their profile draws. See seeds.py."""

from __future__ import annotations

from tests.simulation.seeds import run_share


def test_nothing_that_must_never_happen_happens() -> None:
    run_share(0)
