"""The exchange before a link stands. Decides what counts as an answer; whom we speak with is `hello`'s to decide."""

from __future__ import annotations

import asyncio
import os

import aiohttp
from aiohttp import WSMsgType

from p2p.transport.hello import Hello, Refused, decode, refusal
from p2p.transport.link import Socket


async def receive_hello(ws: Socket) -> Hello:
    """The other side's hello; proves to it meanwhile that we live. Raises Refused (by either side), ConnectionError."""
    while True:
        message = await ws.receive()
        if message.type is WSMsgType.BINARY:
            return decode(message.data)
        if message.type is WSMsgType.PING:
            await ws.pong(bytes(message.data))
        elif message.type is WSMsgType.PONG:
            continue
        elif message.type is WSMsgType.CLOSE and message.data >= 4000:
            raise refusal(str(message.extra))
        elif message.type is WSMsgType.TEXT:
            raise Refused("hello", "this is not a hello: a text frame")
        else:
            raise ConnectionResetError("the connection ended before the hello")


async def answers(ws: Socket, timeout: float) -> bool:
    """Whether whoever said hello is still there: one that has died since then leaves its hello in our buffers."""
    nonce = os.urandom(8)
    try:
        async with asyncio.timeout(timeout):
            await ws.ping(nonce)
            while True:
                message = await ws.receive()
                if message.type is WSMsgType.PONG and bytes(message.data) == nonce:
                    return True
                if message.type not in (WSMsgType.PING, WSMsgType.PONG):
                    return False
    except (OSError, aiohttp.ClientError):
        return False


async def close(ws: Socket, timeout: float, *, code: int, reason: bytes) -> None:
    """Closes; a peer that does not read is not waited for."""
    try:
        async with asyncio.timeout(timeout):
            await ws.close(code=code, message=reason)
    except (OSError, aiohttp.ClientError):
        pass  # it is gone, or does not answer
