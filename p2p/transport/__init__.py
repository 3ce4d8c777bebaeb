"""How voters' messages travel. Decides which socket carries what and what is dropped; not what a message means.

Twins: `links.Links` (WebSockets on the node's one HTTP port) and `memory.Hub` (one event loop, with loss and cuts).
Both pass tests/conformance/test_transport.py. In reading order:

- `frames`, `hello`, `outbox`: what is on the wire, who speaks, what waits (no I/O).
- `table`: which link carries what to whom, and what the coming and going of links says about a node (no I/O).
- `link`: one open socket, from hello to its end. `dialer`: when to dial, and when to dial again.
- `handshake`: how a connection becomes a link (`greeting`: its frames; `clones`: whether a voter is there twice).
- `links`: all of a node's links. `tunnel`: HTTP to a node that nobody can dial, over a link that it holds open
  (`streams`: one request and its answer; `headers`: what of theirs travels).

```
             n1                                     n2
   send ──> outbox ══ n1's control link ══════> on_receive     heartbeats, votes, read index
   send ──> outbox ══ n1's log link ══════════> on_receive     entries: 4 MB here never waits before a heartbeat
 receive <═══════════ n2's own links ══════════ outbox <── send
```

Each side dials its own pair and sends on it; to a node that cannot be dialled the answers go back on the links that
it has opened (PROTOCOL §2.13). What is promised: a payload arrives whole, at most once, from the voter it says, at the
disk it was meant for, and in order with what was sent before it on the same link. Nothing else: whatever is not
connected, or slower than what is sent to it, loses payloads, and Raft sends again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from p2p.ids import NodeId, VoterId

Channel = Literal["control", "log"]
MAX_FRAME_BYTES = 20 * 1024 * 1024  # one WebSocket message; the largest entry is a batch of 16 MiB
MAX_PAYLOAD_BYTES = MAX_FRAME_BYTES - 4  # one payload in it, behind its length

OnReceive = Callable[[VoterId, bytes], None]  # who sent it, what
OnLink = Callable[[NodeId, bool], None]  # True: a link stands. False: the last one broke or was refused; never proof


class TransportError(Exception):
    """Base of what can go wrong between nodes; the message says what."""


class PayloadTooLarge(TransportError):
    """A payload larger than MAX_PAYLOAD_BYTES; whoever made it must cut it."""


class Transport(Protocol):
    """Everything is called, and calls back, on one event loop; no callback runs inside `send`.

    `on_receive` must be quick and must not raise. `on_link` is told once per change.
    """

    on_receive: OnReceive
    on_link: OnLink

    async def start(self) -> None: ...

    async def stop(self) -> None:
        """Sends what is queued if that takes no time, then closes everything. May be called twice."""

    def send(self, to: VoterId, channel: Channel, payload: bytes) -> None:
        """Never blocks; drops what cannot be sent. Raises PayloadTooLarge."""


def ignore(*_: object) -> None:
    """What a callback is until somebody listens."""


def check_size(payload: bytes) -> None:
    """Raises PayloadTooLarge."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise PayloadTooLarge(f"a payload of {len(payload)} bytes; a link carries {MAX_PAYLOAD_BYTES}")
