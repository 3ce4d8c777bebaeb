"""Where this node is found, and where it found the others."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from urllib.parse import urlsplit

from config.settings import Settings, is_address, is_loopback
from p2p.ids import NodeId


class AddressBook:
    """Where the members were last, in a file: after a restart of everybody the voters must find each other, and a node
    that was the first of its cluster was never told of anybody."""

    KEPT = 1_000

    def __init__(self, path: Path) -> None:
        self._path = path
        self.addresses: dict[NodeId, str] = {}
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            self.addresses = {NodeId(str(n)): str(a) for n, a in known.items() if is_address(str(a))}
        except (OSError, ValueError, AttributeError):
            pass  # the first start, or nothing that can be used: --peers and gossip tell the rest

    def knows(self, here: dict[NodeId, str]) -> bool:
        """Whether all of this is written down."""
        return here.items() <= self.addresses.items()

    def note(self, here: dict[NodeId, str]) -> None:
        """Remembers who is there now, beside those that may come back: for what it does not know yet. Blocks."""
        known = {**self.addresses, **here}
        for node in [node for node in known if node not in here][: max(len(known) - self.KEPT, 0)]:
            del known[node]
        self.addresses = known
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(known), encoding="utf-8")
        unfinished.replace(self._path)


def own_address(settings: Settings, port: int) -> str | None:
    """What peers dial: as told, else the address by which this machine reaches its peers; None: nobody can."""
    if settings.advertise == "none":
        return None
    if settings.advertise is not None:
        return settings.advertise
    host = settings.host
    if host in ("0.0.0.0", "::"):  # noqa: S104 - a listen address
        host = _outward_address(settings.peers)
    elif is_loopback(host) and host == "localhost":
        host = "127.0.0.1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _outward_address(peers: tuple[str, ...]) -> str:
    """The source address that packets to the first peer would have. Nothing is sent."""
    target = urlsplit(f"//{peers[0]}").hostname if peers else None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target or "192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
