"""Instrumented twins around a real driver: a log and a state machine that write down when they were asked, and that
can be made to wait or to fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

from p2p.driver import Driver, boot_seconds
from p2p.effects import Config, Entry, HardState
from p2p.ids import ClusterId, Index, NodeId
from p2p.replica import Replica
from p2p.storage.memory import MemoryLog

SECONDS = 20.0  # how long a test waits for what takes a millisecond
NODE = NodeId("n1")
Story = list[tuple[str, int]]


class Gate:
    """Lets everybody through until it is shut; then `arrived` tells that somebody waits."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._arrived = threading.Event()

    def shut(self) -> None:
        self._arrived.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def arrived(self) -> None:
        assert self._arrived.wait(SECONDS), "nobody came"

    def passing(self) -> None:
        if not self._open.is_set():
            self._arrived.set()
            assert self._open.wait(SECONDS), "the gate stayed shut"


class WatchedLog(MemoryLog):
    """Tells the story ("persisted", index) when an append returns."""

    def __init__(self, story: Story) -> None:
        super().__init__(NODE)
        self.found(ClusterId("c"), Config((self.identity.voter,)))
        self.story, self.gate, self.closed = story, Gate(), False
        self.batches: list[int] = []

    def append(
        self,
        entries: Sequence[Entry],
        hard_state: HardState | None,
        acked_floor: Index,
        truncate: Index | None = None,
    ) -> None:
        self.gate.passing()
        super().append(entries, hard_state, acked_floor, truncate)
        if entries:
            self.batches.append(len(entries))
        self.story.extend(("persisted", entry.index) for entry in entries)

    def close(self) -> None:
        self.closed = True


class WatchedMachine:
    """Answers each body with its index and itself; one event for each body."""

    def __init__(self, story: Story, applied: int = 0) -> None:
        self.story, self.gate, self.closed = story, Gate(), False
        self.applied_index, self.mark = applied, (0, 0)
        self.bodies: list[bytes] = []
        self.poison: bytes | None = None

    def apply_batch(self, entries: Iterable[tuple[int, int, bytes]]) -> list[tuple[Any, list[Any]]]:
        self.gate.passing()
        answers: list[tuple[Any, list[Any]]] = []
        for index, _, body in entries:
            assert index == self.applied_index + 1, f"{index} after {self.applied_index}"
            if body == self.poison:
                raise RuntimeError("database disk image is malformed")
            self.applied_index = index
            self.story.append(("applied", index))
            if body:
                self.bodies.append(body)
            answers.append(((index, body), [body] if body else []))
        return answers

    def checkpoint(self) -> int:
        return self.applied_index

    def replace(self, install: Callable[[], None]) -> None:
        install()

    def close(self) -> None:
        self.closed = True


class Rig:
    """A driver over a watched log and machine; `restarted` makes the next one over the same log."""

    def __init__(self, log: WatchedLog | None = None, machine: WatchedMachine | None = None, **settings: Any) -> None:
        self.story: Story = log.story if log is not None else []
        self.log = log or WatchedLog(self.story)
        self.machine = machine or WatchedMachine(self.story)
        self.fatal: list[str] = []
        self.died = threading.Event()
        self.events: list[bytes] = []
        loaded = self.log.load(applied=Index(self.machine.applied_index))
        self.replica = Replica(
            loaded.identity.voter,
            loaded.hard_state,
            loaded.start,
            applied=Index(self.machine.applied_index),
            now=boot_seconds(),
            draw=lambda: 0.5,
        )
        self.driver = Driver(
            self.replica,
            self.log,
            self.machine,
            on_events=self._on_events,
            on_fatal=self._on_fatal,
            **settings,
        )

    def start(self) -> Rig:
        self.elected = self.driver.start()
        self.elected.result(SECONDS)
        return self

    def propose(self, body: bytes) -> Future[Any]:
        future = self.driver.propose(body)
        future.add_done_callback(lambda done: done.exception() or self.story.append(("answered", done.result()[0])))
        return future

    def proposed(self, *bodies: bytes) -> list[Any]:
        return [future.result(SECONDS) for future in [self.propose(body) for body in bodies]]

    def open_gates(self) -> None:
        self.log.gate.open()
        self.machine.gate.open()

    def stop(self) -> None:
        self.open_gates()
        self.driver.stop()

    def _on_events(self, events: list[Any]) -> None:
        self.events.extend(events)
        self.story.extend(("told", int(event)) for event in events if event.isdigit())

    def _on_fatal(self, why: str) -> None:
        self.fatal.append(why)
        self.died.set()


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
