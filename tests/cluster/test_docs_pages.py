"""Every example of docs/jobs.md and docs/placement.md, run as it stands in one shell, against a real node."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from config.settings import ROOT
from tests.nodes import node_offering

SAID = {
    "jobs": ('"count":20', "code64isnotretried", "havingbegunthistimeat15", '"dropped":"nightly"', '"retried":'),
    "placement": (
        "fitsonnoneof1node,evenwhenidle:needs4096cores;thelargestnodehas8on",
        '"cordoned":true',
        '"drained":',
        '"jobs_left":',
    ),
}


@pytest.mark.parametrize("page", SAID)
def test_examples_run_as_they_stand(tmp_path: Path, page: str) -> None:
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    (tmp_path / "node").mkdir()
    with node_offering(tmp_path / "node", {"cpus": 8, "memory_mb": 8_000}) as node:
        script = "set -euo pipefail\n" + "\n".join(blocks).replace("localhost:8770", node.address)
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, f"{done.stdout[-2_000:]}\n{done.stderr[-2_000:]}"
    said = done.stdout.replace(" ", "")
    for words in SAID[page]:
        assert words in said
