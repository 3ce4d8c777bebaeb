"""``p2p.main``: parse the settings, run a node, exit with a code that says what happened.

Exit codes: 0 stopped as asked; 1 could not start (the reason is on stderr, without a traceback); 2 a setting is wrong;
70 the disk or the state failed and the process ended itself to protect the data.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence

from config.settings import Settings, SettingsError, load
from coordination.errors import CoordinationError
from p2p.node import Node, StartError, version
from p2p.resources import ResourcesError
from p2p.storage import StorageError

log = logging.getLogger("p2p")
SWITCH_SECONDS = 0.001  # how long a thread of ours may hold the interpreter while the event loop waits


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts a node and returns its exit code when it has stopped."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        settings = load(sys.argv[1:] if arguments is None else arguments)
    except SettingsError as error:
        print(f"p2p_orchestrator: {error}", file=sys.stderr)  # noqa: T201 - a person's terminal
        return 2
    try:
        asyncio.run(_run(settings))
    except (StartError, StorageError, CoordinationError, ResourcesError) as error:
        print(f"p2p_orchestrator: cannot start: {error}", file=sys.stderr)  # noqa: T201 - a person's terminal
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


async def _run(settings: Settings) -> None:
    def ready(node: Node) -> None:
        log.info(
            "node %s (version %s) listens on %s:%d; curl %s/status",
            settings.node_id,
            version(),
            settings.host,
            node.port,
            node.url,
        )

    await Node(settings).run(ready=ready)
