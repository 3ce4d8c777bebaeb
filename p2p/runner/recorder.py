"""The one writer: gathers what changed, commits it as a group, and only then lets it have consequences.

An intent is on record before its process is spawned; an end is on disk before it is told.  While one commit waits for
the disk the next group gathers.  A disk that refuses (full, failing) delays ends, which stay in memory and are tried
again every second; new starts are refused meanwhile, with the reason.

Decides: the order record -> consequence.  Does not decide: what is written how (``store.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from functools import partial
from typing import Protocol

from p2p.runner.attempts import EXITED, Attempt
from p2p.runner.protocol import Key
from p2p.runner.store import Store, StoreCorrupt, StoreError

RETRY_SECONDS = 1.0


class Consequences(Protocol):
    """What follows from a commit."""

    def on_admitted(self, attempts: list[Attempt]) -> None: ...
    def on_refused(self, attempts: list[Attempt], error: str | None) -> None: ...
    def on_ended(self, attempts: list[Attempt]) -> None: ...
    def every_attempt(self) -> Iterable[Attempt]: ...


class Recorder:
    """``intend``, ``change`` and ``ack`` gather; ``run`` commits."""

    def __init__(
        self, *, store: Store, thread: Executor, consequences: Consequences, log: Callable[[str], None]
    ) -> None:
        self._store = store
        self._thread = thread
        self._then = consequences
        self._log = log
        self._intents: list[Attempt] = []
        self._changes: dict[Key, Attempt] = {}
        self._acks: list[Key] = []
        self._wake = asyncio.Event()
        self._busy = False

    @property
    def idle(self) -> bool:
        return not (self._busy or self._intents or self._changes or self._acks)

    def intend(self, attempts: Iterable[Attempt]) -> None:
        self._intents += attempts
        self._wake.set()

    def change(self, attempt: Attempt) -> None:
        self._changes[attempt.key] = attempt
        self._wake.set()

    def ack(self, keys: Iterable[Key]) -> None:
        self._acks += keys
        self._wake.set()

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._busy = True
            await self._commit()
            self._busy = False

    async def _commit(self) -> None:
        intents, self._intents = self._intents, []
        changes, self._changes = list(self._changes.values()), {}
        acks, self._acks = self._acks, []
        ended = [attempt for attempt in changes if attempt.state == EXITED]
        commit = partial(
            self._store.commit,
            intents=[attempt.row() for attempt in intents],
            changes=[attempt.row() for attempt in changes],
            acks=acks,
        )
        try:
            refused = await asyncio.get_running_loop().run_in_executor(self._thread, commit)
        except Exception as error:  # the disk's, or a defect: neither may cost an end that is known
            self._log(f"cannot record: {type(error).__name__}: {error}")
            self._acks = acks + self._acks
            self._changes = {attempt.key: attempt for attempt in changes} | self._changes
            self._then.on_refused(intents, f"the runner cannot record it: {error}")
            await self._recover(error)
            self._wake.set()
            return
        for attempt in ended:
            attempt.durable = True
        self._then.on_ended(ended)
        self._then.on_refused([attempt for attempt in intents if attempt.key in refused], None)
        self._then.on_admitted([attempt for attempt in intents if attempt.key not in refused])

    async def _recover(self, error: Exception) -> None:
        if not isinstance(error, StoreCorrupt):
            await asyncio.sleep(RETRY_SECONDS)
            return
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._store.replace)
        except (StoreError, OSError) as second:
            self._log(f"cannot begin a fresh record: {second}")
            await asyncio.sleep(RETRY_SECONDS)
            return
        self._log("the record was broken; it was moved aside and begun afresh")
        self._changes = {attempt.key: attempt for attempt in self._then.every_attempt()}
