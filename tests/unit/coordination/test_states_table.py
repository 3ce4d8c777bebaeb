"""The picture of a job's states in docs/architecture.md is drawn from the table the code obeys.

``P2P_REGENERATE=1`` redraws it.
"""

from __future__ import annotations

import os

from config.settings import ROOT
from coordination.job import FINISHED, JobState
from coordination.queue_state import EDGES

PAGE = ROOT / "docs/architecture.md"
BEGIN, END = "<!-- states:begin -->", "<!-- states:end -->"


def drawn() -> str:
    """A mermaid diagram, and the same as a table for those who read plain text."""
    arrows = [(str(old) if old else "[*]", str(new), why) for (old, new), why in EDGES.items()]
    diagram = ["```mermaid", "stateDiagram-v2", *(f"    {old} --> {new}: {why}" for old, new, why in arrows), "```"]
    table = ["| from | to | when |", "|---|---|---|"]
    table += [f"| {'(new)' if old == '[*]' else old} | {new} | {why} |" for old, new, why in arrows]
    return "\n".join([*diagram, "", *table])


def test_picture_in_the_docs_is_the_table_in_the_code() -> None:
    if not PAGE.exists():
        PAGE.write_text(f"# Architecture\n\n{BEGIN}\n{END}\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    before, _, rest = page.partition(BEGIN)
    found, _, after = rest.partition(END)
    if os.environ.get("P2P_REGENERATE"):
        PAGE.write_text(f"{before}{BEGIN}\n{drawn()}\n{END}{after}", encoding="utf-8")
        return
    assert found.strip() == drawn(), "redraw it with P2P_REGENERATE=1"


def test_every_state_is_reached_and_only_finished_ones_could_be_final() -> None:
    assert {new for _, new in EDGES} == set(JobState)
    left = {old for old, _ in EDGES if old is not None}
    assert set(JobState) - left == {JobState.COMPLETED}
    assert {old for old, new in EDGES if old in FINISHED} == {JobState.FAILED, JobState.CANCELLED}


def test_every_edge_says_why() -> None:
    assert all(EDGES.values())
