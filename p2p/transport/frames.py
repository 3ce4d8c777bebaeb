"""Several payloads in one WebSocket message: each behind its length, four bytes, big-endian. Decides nothing else."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from p2p.transport import TransportError

_LENGTH = struct.Struct(">I")


class BadFrame(TransportError):
    """A message that does not end where its lengths say."""


def pack(payloads: Sequence[bytes]) -> bytes:
    """One message."""
    if len(payloads) == 1:
        return _LENGTH.pack(len(payloads[0])) + payloads[0]
    parts: list[bytes] = []
    for payload in payloads:
        parts += (_LENGTH.pack(len(payload)), payload)
    return b"".join(parts)


def unpack(frame: bytes) -> list[bytes]:
    """The payloads of a message. Raises BadFrame."""
    payloads = []
    at, end = 0, len(frame)
    while at < end:
        start = at + 4
        if start > end:
            raise BadFrame("a message ends within a length")
        at = start + _LENGTH.unpack_from(frame, at)[0]
        payloads.append(frame[start:at])
    if at != end:
        raise BadFrame("a message ends within a payload")
    return payloads
