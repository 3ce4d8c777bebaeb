"""The daemon's side of one connection: who may connect, what a legal conversation is.

Decides: whether a frame is legal, and turns it into a call.  Does not decide: what the call does (``daemon.py``).
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

from p2p.runner.protocol import (
    MAX_REPORTS_PER_FRAME,
    PROTOCOL,
    VERSION,
    ActivitySample,
    AttemptReport,
    FrameReader,
    Key,
    ProtocolError,
    StartSpec,
    check_keys,
    pack,
)

MAX_UNSENT_BYTES = 256 * 1024 * 1024  # twice what 20,000 failed attempts have to say; who reads nothing is dropped


class Host(Protocol):
    """What a session needs of the daemon."""

    def on_hello(self, session: Session) -> list[AttemptReport]: ...
    def on_gone(self, session: Session) -> None: ...
    def on_start(self, specs: Iterable[StartSpec]) -> None: ...
    def on_stop(self, key: Key, *, reason: str, grace_seconds: float) -> None: ...
    def on_ack(self, keys: Iterable[Key]) -> None: ...
    def on_sample(self, session: Session, number: Any) -> None: ...
    def on_shutdown(self) -> int: ...
    def log(self, line: str) -> None: ...


class Session(asyncio.Protocol):
    """Closed at the first illegal frame."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._reader = FrameReader()
        self._greeted = False
        self._transport: asyncio.Transport

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        user = _peer_user(transport.get_extra_info("socket"))
        if user not in (0, os.getuid()):
            self._host.log(f"refused a connection of user {user}")
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                if self._transport.is_closing():
                    return
                self._dispatch(message)
        except ProtocolError as error:
            self._host.log(f"closed a connection: {error}")
            self._send("error", message=str(error))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._host.on_gone(self)

    # -- in

    def _dispatch(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind != "hello" and not self._greeted:
            raise ProtocolError("the first message is hello")
        handler = self._HANDLERS.get(kind)
        if handler is None:
            raise ProtocolError(f"unknown kind {kind[:50]!r}")
        handler(self, message)

    def _on_hello(self, message: dict[str, Any]) -> None:
        self._send("hello", protocol=PROTOCOL, version=VERSION, pid=os.getpid())
        if message.get("protocol") != PROTOCOL:
            raise ProtocolError(f"this runner speaks protocol {PROTOCOL}, the client {message.get('protocol')!r}")
        self._greeted = True
        self.send_reports("known", self._host.on_hello(self))
        self._send("known", items=[], last=True)

    def _on_start(self, message: dict[str, Any]) -> None:
        items = message.get("specs")
        if not isinstance(items, list):
            raise ProtocolError("specs: a list")
        self._host.on_start([StartSpec.from_wire(item) for item in items])

    def _on_stop(self, message: dict[str, Any]) -> None:
        (key,) = check_keys([message.get("key")])
        reason, grace = message.get("reason"), message.get("grace_seconds")
        if not isinstance(reason, str) or not isinstance(grace, int | float) or not 0 <= grace < 1e9:
            raise ProtocolError("stop: a reason and grace_seconds >= 0")
        self._host.on_stop(key, reason=reason, grace_seconds=grace)

    def _on_ack(self, message: dict[str, Any]) -> None:
        self._host.on_ack(check_keys(message.get("items")))

    def _on_sample(self, message: dict[str, Any]) -> None:
        self._host.on_sample(self, message.get("number"))

    def _on_shutdown(self, message: dict[str, Any]) -> None:
        self._send("shutdown", unfinished=self._host.on_shutdown())

    _HANDLERS = {  # noqa: RUF012  (never changed)
        "hello": _on_hello,
        "start": _on_start,
        "stop": _on_stop,
        "ack": _on_ack,
        "sample": _on_sample,
        "shutdown": _on_shutdown,
    }

    # -- out

    def send_reports(self, kind: str, reports: Sequence[AttemptReport]) -> None:
        for start in range(0, len(reports), MAX_REPORTS_PER_FRAME):
            some = reports[start : start + MAX_REPORTS_PER_FRAME]
            self._send(kind, items=[report.to_wire() for report in some])

    def send_sample(self, number: Any, samples: Sequence[ActivitySample]) -> None:
        self._send("sample", number=number, items=[sample.to_wire() for sample in samples])

    def displace(self) -> None:
        """A newer client has come."""
        self._send("displaced")
        self.close()

    def close(self) -> None:
        self._transport.close()

    def _send(self, kind: str, **body: Any) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(pack(kind, **body))
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._host.log("dropped a client that does not read")
            self._transport.abort()


def _peer_user(connection: socket.socket) -> int:
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)
