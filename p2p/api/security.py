"""Who may ask what (DESIGN §4, Auth). One middleware decides before any handler runs.

With a token everything but ``/health`` needs it; GETs from loopback are open. Without one the node listens on loopback
only and takes writes only from its own user or root, told by the owner of the connecting socket, as PostgreSQL's
``peer`` method does. Pages of other sites never reach it: a foreign Host is how DNS rebinding arrives, a foreign Origin
or Sec-Fetch-Site is a page of somebody else's (both ran commands on other systems of this kind).
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import socket
import struct
import weakref
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from p2p.api.errors import Problem

OPEN_PATHS = frozenset({"/health"})
PEER_PATHS = "/peer/"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_ESTABLISHED = 0x01


class Gate:
    """The rules for one node. `names` are the host names this node answers to, beside IP addresses."""

    def __init__(self, token: str | None, names: set[str]) -> None:
        self._token = token.encode() if token is not None else None
        self._names = {name.lower() for name in names} | {"localhost"}
        self._owners: weakref.WeakKeyDictionary[Any, int | None] = weakref.WeakKeyDictionary()

    async def check(self, request: web.Request) -> None:
        """Raises Problem 400, 401 or 403."""
        self._check_host(request)
        self._check_origin(request)
        if request.path in OPEN_PATHS:
            return
        # What nodes ask of each other is not for everybody who has an account here, and a node with the wrong token
        # must be told so even on the same machine.
        reading = request.method in SAFE_METHODS and not request.path.startswith(PEER_PATHS)
        if self._token is not None:
            if not (reading and self._from_loopback(request)):
                self._check_token(request)
        elif not reading:
            await self._check_owner(request)

    def _check_host(self, request: web.Request) -> None:
        hosts = request.headers.getall("Host", [])
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            raise Problem(403, "this node does not answer to that host name; use its address", field="Host")

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name.lower() in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True  # an address cannot be rebound by DNS

    def _check_origin(self, request: web.Request) -> None:
        origin = request.headers.get("Origin")
        if origin is not None and _authority(origin) != request.headers["Host"]:
            raise Problem(403, "requests from pages of other sites are refused", field="Origin")
        site = request.headers.get("Sec-Fetch-Site")
        if site not in (None, "same-origin", "none"):
            raise Problem(403, "requests from pages of other sites are refused", field="Sec-Fetch-Site")

    @staticmethod
    def _from_loopback(request: web.Request) -> bool:
        peer = request.transport.get_extra_info("peername") if request.transport else None
        if not peer:
            return False
        address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        return bool((mapped or address).is_loopback)

    def _check_token(self, request: web.Request) -> None:
        assert self._token is not None
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._token)
        if scheme.lower() != "bearer" or not right:
            raise Problem(
                401,
                "this needs the cluster's token: Authorization: Bearer …",
                field="Authorization",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _check_owner(self, request: web.Request) -> None:
        connection = request.transport
        if connection is None:
            raise Problem(401, "the connection is gone")
        if connection not in self._owners:
            ends = (connection.get_extra_info("peername"), connection.get_extra_info("sockname"))
            self._owners[connection] = await asyncio.to_thread(socket_owner, *ends)
        if self._owners[connection] not in (os.getuid(), 0):
            raise Problem(
                401,
                f"without a token writes are taken only from the user this node runs as (uid {os.getuid()}) or root; "
                "start the node with --auth-token-file to write as somebody else",
                field="Authorization",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _authority(origin: str) -> str:
    """Host and port of an Origin; empty, which is nobody's, for what is not one."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def socket_owner(peer: Any, ours: Any) -> int | None:
    """The uid that owns the socket at `peer` connected to `ours`, both on this machine; None if it cannot be told.

    Only an established socket with an inode counts: the kernel shows an orphaned one (closed by its process while data
    is in flight) as root's, which would let anybody write by hanging up early.
    """
    if not peer or not ours:
        return None
    for table, width in (("/proc/net/tcp", 1), ("/proc/net/tcp6", 4)):
        wanted = (_proc_address(peer, width), _proc_address(ours, width))
        if None in wanted:
            continue
        try:
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            columns = line.split()
            if (columns[1], columns[2]) == wanted and int(columns[3], 16) == _ESTABLISHED and columns[9] != "0":
                return int(columns[7])
    return None


def _proc_address(end: Any, words: int) -> str | None:
    """An address as ``/proc/net/tcp`` (1 word) or ``tcp6`` (4) writes it: host-order words in hexadecimal."""
    address = ipaddress.ip_address(str(end[0]).partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    plain = mapped or address
    if words == 1:
        if plain.version != 4:
            return None
        packed = plain.packed
    else:
        packed = plain.packed if plain.version == 6 else ipaddress.ip_address(f"::ffff:{plain}").packed
    text = "".join(f"{word:08X}" for word in struct.unpack(f"={words}I", packed))
    return f"{text}:{end[1]:04X}"


def host_names(advertise: str | None) -> set[str]:
    """The names by which this node is reached."""
    names = {socket.gethostname()}
    if advertise and advertise != "none":
        names.add(urlsplit(f"//{advertise}").hostname or "")
    return names - {""}
