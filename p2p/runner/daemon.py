"""The runner's wiring: one socket, one client, and what each message and each commit leads to.

Reads next: ``supervisor.py`` (processes), ``recorder.py`` (durability), ``session.py`` (the connection).
Decides: what a message does, what is told to whom, when this process may end.  Does not decide: anything about a job.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from p2p.runner.address import LOG_NAME, SocketAddress
from p2p.runner.attempts import EXITED, Attempt
from p2p.runner.chores import Chores
from p2p.runner.groups import Groups, Unusable
from p2p.runner.kernel_log import KernelLog
from p2p.runner.logs import StreamCap
from p2p.runner.orphans import Orphans
from p2p.runner.protocol import MAX_KNOWN_ATTEMPTS, AttemptReport, Key, StartSpec
from p2p.runner.recorder import Recorder
from p2p.runner.session import Session
from p2p.runner.spawn import NOT_RUNNABLE, Spawner
from p2p.runner.store import Store
from p2p.runner.supervisor import Supervisor

SPAWNS_PER_TURN = 16  # then deaths and messages get their turn
OWN_LOG_BYTES = 1024 * 1024

STOPPED = "the runner was told to end while this job ran"


class Daemon:
    """Wires the parts.  Lives from the lock to the last job."""

    def __init__(self, directory: Path, store: Store) -> None:
        self._directory = directory
        self._own_log = StreamCap(str(directory / LOG_NAME), OWN_LOG_BYTES, holes=False)
        self._store = store
        self._store_thread = ThreadPoolExecutor(1, "store")
        self._recorder = Recorder(store=store, thread=self._store_thread, consequences=self, log=self.log)
        home_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._supervisor = Supervisor(
            spawner=Spawner(home_fd),
            changed=self._on_changed,
            log=self.log,
            find_groups=self._find_groups,
            kernel_log=KernelLog.open(),
        )
        self._chores = Chores(supervisor=self._supervisor, orphans=Orphans(self._load()), log=self.log)
        self._to_spawn: deque[Attempt] = deque()
        self._session: Session | None = None
        self._news: list[AttemptReport] = []
        self._ended = asyncio.Event()
        self._ending = False

    # -- starting and ending

    async def run(self, ready: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._supervisor.reap)
        loop.add_signal_handler(signal.SIGTERM, self._on_sigterm)
        self._explain_lost_records()
        listener = SocketAddress(self._directory).bind()
        server = await loop.create_unix_server(lambda: Session(self), sock=listener)
        self.log(f"ready, pid {os.getpid()}, {len(self._supervisor.attempts)} attempts on record")
        ready()
        chores = self._chores
        works = (
            self._recorder.run,
            chores.cap_logs,
            chores.end_orphans,
            chores.answer_samples,
            chores.watch_memory,
            partial(chores.go_round, self._on_round),
        )
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(chores.keep(work)) for work in works]
            await self._ended.wait()
            server.close()
            for task in tasks:
                task.cancel()
        if self._session is not None:
            self._session.close()
        if self._supervisor.groups is not None:
            self._supervisor.groups.close()
        self._store_thread.submit(self._store.close)
        self._store_thread.shutdown()
        self.log("ended")

    def _find_groups(self) -> Groups | None:
        """The reason why there are none is told once."""
        try:
            groups = Groups.find(self._directory, self.log)
        except Unusable as reason:
            self.log(f"memory limits are watched, not held by cgroups: {reason}")
            return None
        self.log(f"memory limits are held by cgroups below {groups.base}")
        return groups

    def _load(self) -> list[Attempt]:
        attempts = [Attempt.recorded(row) for row in self._store.load()]
        self._supervisor.attempts.update((attempt.key, attempt) for attempt in attempts)
        return [attempt for attempt in attempts if attempt.state != EXITED]

    def _explain_lost_records(self) -> None:
        if self._store.lost_records is None:
            return
        self.log(self._store.lost_records)
        for attempt in self._chores.find_unrecorded(self._directory.parent):
            self._supervisor.attempts[attempt.key] = attempt
            self._on_changed(attempt)

    def _on_round(self) -> None:
        self._own_log.enforce()
        if self._supervisor.groups is not None:
            self._supervisor.groups.tidy()
        self._end_if_idle()

    def _on_sigterm(self) -> None:
        self.log("SIGTERM: ending all jobs")
        self._ending = True
        for attempt in self._unfinished():
            self._supervisor.stop(attempt, reason="runner_stopped", grace_seconds=attempt.grace_seconds, error=STOPPED)
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._ending and self._recorder.idle and not self._unfinished():
            self._ended.set()

    def _unfinished(self) -> list[Attempt]:
        return [attempt for attempt in self._supervisor.attempts.values() if attempt.state != EXITED]

    # -- messages

    def on_hello(self, session: Session) -> list[AttemptReport]:
        """The newest connection is the orchestrator; the one before it is told so and closed."""
        if self._session is not None:
            self._session.displace()
        self._session = session
        self._news.clear()
        return [attempt.report() for attempt in self._supervisor.attempts.values()]

    def on_gone(self, session: Session) -> None:
        if self._session is session:
            self._session = None
            self._news.clear()

    def on_start(self, specs: Iterable[StartSpec]) -> None:
        """Known attempts are answered, not run again."""
        intents = []
        for spec in specs:
            known = self._supervisor.attempts.get(spec.key)
            if known is not None:
                self._tell(known.report())
            elif self._ending:
                self._refuse(Attempt.asked(spec, ""), "the runner is ending")
            elif len(self._supervisor.attempts) >= MAX_KNOWN_ATTEMPTS:
                self._refuse(Attempt.asked(spec, ""), f"the runner already holds {MAX_KNOWN_ATTEMPTS} attempts")
            else:
                attempt = self._supervisor.attempts[spec.key] = Attempt.asked(spec, self._supervisor.boot_id)
                intents.append(attempt)
        if intents:
            self._recorder.intend(intents)

    def on_stop(self, key: Key, *, reason: str, grace_seconds: float) -> None:
        attempt = self._supervisor.attempts.get(key)
        if attempt is not None:
            self._supervisor.stop(attempt, reason=reason, grace_seconds=grace_seconds)

    def on_ack(self, keys: Iterable[Key]) -> None:
        """Only an end that has been told can be acknowledged."""
        known = self._supervisor.attempts
        told = [key for key in keys if (attempt := known.get(key)) is not None and attempt.durable]
        for key in told:
            del known[key]
        if told:
            self._recorder.ack(told)

    def on_sample(self, session: Session, number: Any) -> None:
        self._chores.ask_sample(session, number)

    def on_shutdown(self) -> int:
        """How many jobs forbid it; at 0 the process ends as soon as its records are on disk."""
        unfinished = len(self._unfinished())
        if not unfinished:
            self._ending = True
            asyncio.get_running_loop().call_soon(self._end_if_idle)
        return unfinished

    # -- consequences of commits (see recorder.py)

    def on_admitted(self, attempts: list[Attempt]) -> None:
        if not self._to_spawn and attempts:
            asyncio.get_running_loop().call_soon(self._spawn_some)
        self._to_spawn.extend(attempts)

    def on_refused(self, attempts: list[Attempt], error: str | None) -> None:
        for attempt in attempts:
            self._supervisor.attempts.pop(attempt.key, None)
            if error is None:
                self._tell(AttemptReport(job=attempt.job, attempt=attempt.attempt, state="forgotten"))
            else:
                self._refuse(attempt, error)

    def on_ended(self, attempts: list[Attempt]) -> None:
        for attempt in attempts:
            self._tell(attempt.report())
        if self._ending:
            asyncio.get_running_loop().call_soon(self._end_if_idle)

    def every_attempt(self) -> Iterable[Attempt]:
        return self._supervisor.attempts.values()

    def _on_changed(self, attempt: Attempt) -> None:
        self._recorder.change(attempt)
        if attempt.state != EXITED:
            self._tell(attempt.report())

    def _refuse(self, attempt: Attempt, error: str) -> None:
        """It never ran, so there is nothing to keep a record of."""
        self._tell(
            AttemptReport(
                job=attempt.job,
                attempt=attempt.attempt,
                state=EXITED,
                exit_code=NOT_RUNNABLE,
                reason="spawn_failed",
                error=error,
            )
        )

    def _tell(self, report: AttemptReport) -> None:
        """What changes in one turn of the loop goes out together."""
        if self._session is None:
            return
        if not self._news:
            asyncio.get_running_loop().call_soon(self._send_news)
        self._news.append(report)

    def _send_news(self) -> None:
        news, self._news = self._news, []
        if self._session is not None:
            self._session.send_reports("reports", news)

    def _spawn_some(self) -> None:
        for _ in range(min(SPAWNS_PER_TURN, len(self._to_spawn))):
            self._supervisor.spawn(self._to_spawn.popleft())
        if self._to_spawn:
            asyncio.get_running_loop().call_soon(self._spawn_some)

    def log(self, line: str) -> None:
        self._own_log.enforce()
        write_log(line)


def write_log(line: str) -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    os.write(2, f"{stamp} {line}\n".encode(errors="replace"))
