"""Which headers of a request or an answer travel through a tunnel.

What belongs to a connection ends with it (RFC 9110 §7.6.1). What the node that was asked has judged already (Origin,
cookies, a token) ends there: at the other node the same header would be judged against another name and refused.
"""

from __future__ import annotations

from collections.abc import Iterable

Headers = tuple[tuple[str, str], ...]

HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
})  # fmt: skip
_OF_A_REQUEST = HOP_BY_HOP | {
    "host", "content-length", "expect", "authorization", "cookie", "origin", "referer", "sec-fetch-site",
    "sec-fetch-mode", "sec-fetch-dest", "sec-fetch-user",
}  # fmt: skip


def of_request(headers: Iterable[tuple[str, str]]) -> Headers:
    """Those that travel to the node."""
    return without(headers, _OF_A_REQUEST)


def of_answer(headers: Iterable[tuple[str, str]]) -> Headers:
    """Those that travel back."""
    return without(headers, HOP_BY_HOP)


def without(headers: Iterable[tuple[str, str]], stay: frozenset[str]) -> Headers:
    """Those that travel where `stay` (in lower case) and whatever the Connection header names do not."""
    pairs = list(headers)
    named = {
        token.strip().lower() for name, value in pairs if name.lower() == "connection" for token in value.split(",")
    }
    return tuple((name, value) for name, value in pairs if name.lower() not in stay and name.lower() not in named)
