"""``python -m p2p``: the same as ``p2pctl``."""

import sys

from p2p.cli.main import main

sys.exit(main())
