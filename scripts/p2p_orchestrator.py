#!/usr/bin/env python3
"""Start a node: ``nohup python scripts/p2p_orchestrator.py > logs/p2p.log 2>&1 &``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from p2p.main import main  # the tree must be importable first, from any working directory

if __name__ == "__main__":
    sys.exit(main())
