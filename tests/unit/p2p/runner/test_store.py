"""The durable record, and what happens while the disk refuses."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import apsw
import pytest

from p2p.runner import recorder as recorder_module
from p2p.runner import store as store_module
from p2p.runner.attempts import EXITED, Attempt
from p2p.runner.protocol import StartSpec
from p2p.runner.recorder import Recorder
from p2p.runner.store import Store


def attempt(job: str, state: str = "starting") -> Attempt:
    spec = StartSpec(job=job, attempt=1, argv=["true"], env={}, directory="/tmp/x")
    made = Attempt.asked(spec, "boot")
    made.state = state
    return made


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    yield store
    store.close()


def commit(store, *, intents=(), changes=(), acks=()):
    return store.commit(intents=[a.row() for a in intents], changes=[a.row() for a in changes], acks=acks)


def test_record_survives_and_is_the_same(store, tmp_path):
    made = attempt("job")
    made.command = "caf\udce9"
    made.error = "caf\udce9"
    commit(store, intents=[made])
    (row,) = store.load()
    assert Attempt.recorded(row).row() == made.row()
    assert row[6] == "caf?", "for people; bytes that are not UTF-8 do not fit"


def test_acknowledged_attempt_is_gone_and_refused(store):
    commit(store, intents=[attempt("a"), attempt("b")])
    commit(store, changes=[attempt("a", EXITED)])
    assert commit(store, intents=[attempt("a"), attempt("c")], acks=[("a", 1)]) == {("a", 1)}
    assert [row[0] for row in store.load()] == ["b", "c"]


def test_memory_of_the_acknowledged_is_bounded_and_keeps_the_newest(store, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_FORGOTTEN", 10)
    for index in range(100):
        commit(store, acks=[(f"job{index}", 1)])
    asked = [attempt(f"job{index}") for index in range(100)]
    assert commit(store, intents=asked) == {(f"job{index}", 1) for index in range(90, 100)}


def test_file_stays_small_however_many_attempts_pass(store, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_FORGOTTEN", 1_000)
    for start in range(0, 20_000, 500):
        some = [attempt(f"job{index}", EXITED) for index in range(start, start + 500)]
        commit(store, changes=some)
        commit(store, acks=[a.key for a in some])
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10_000_000


def test_only_ends_wait_for_the_disk(store, monkeypatch):
    def synchronous() -> int:
        return store._db.execute("PRAGMA synchronous").fetchone()[0]

    commit(store, intents=[attempt("a")])
    assert synchronous() == 1
    commit(store, changes=[attempt("a", EXITED)])
    assert synchronous() == 2


class Consequences:
    def __init__(self) -> None:
        self.admitted: list[str] = []
        self.refused: list[tuple[str, str | None]] = []
        self.ended: list[str] = []
        self.all: list[Attempt] = []
        self.happened = asyncio.Event()

    def on_admitted(self, attempts):
        self.admitted += [a.job for a in attempts]
        self.happened.set()

    def on_refused(self, attempts, error):
        self.refused += [(a.job, error) for a in attempts]
        self.happened.set()

    def on_ended(self, attempts):
        self.ended += [a.job for a in attempts]
        self.happened.set()

    def every_attempt(self):
        return self.all

    async def until(self, holds):
        async with asyncio.timeout(10):
            while not holds():
                self.happened.clear()
                await self.happened.wait()


class FailingStore:
    """A disk that refuses a number of times, over a real store."""

    def __init__(self, store: Store, failures: list[Exception]) -> None:
        self._store, self._failures = store, failures

    def commit(self, **batch):
        if self._failures:
            raise self._failures.pop(0)
        return self._store.commit(**batch)

    def replace(self):
        self._store.replace()


@pytest.fixture
async def failing(store, monkeypatch):
    monkeypatch.setattr(recorder_module, "RETRY_SECONDS", 0.01)
    failures: list[Exception] = []
    then = Consequences()
    with ThreadPoolExecutor(1) as thread:
        made = Recorder(store=FailingStore(store, failures), thread=thread, consequences=then, log=lambda line: None)
        task = asyncio.create_task(made.run())
        yield made, then, failures
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_full_disk_refuses_starts_and_delays_ends(failing, store):
    recorder, then, failures = failing
    failures += [apsw.FullError("database or disk is full"), OverflowError("a defect"), apsw.BusyError("locked")]
    recorder.intend([attempt("new")])
    recorder.change(ended := attempt("old", EXITED))
    await then.until(lambda: then.ended == ["old"])
    assert then.refused[0][0] == "new" and "disk is full" in then.refused[0][1]
    assert then.admitted == [] and not failures and ended.durable
    assert [row[0] for row in store.load()] == ["old"]


async def test_record_that_breaks_in_use_is_begun_afresh_with_all_that_is_known(failing, store, tmp_path):
    recorder, then, failures = failing
    recorder.intend([attempt("before")])
    await then.until(lambda: then.admitted == ["before"])
    failures.append(apsw.CorruptError("database disk image is malformed"))
    then.all = [attempt("before", "running"), last := attempt("last", EXITED)]
    recorder.change(last)
    await then.until(lambda: then.ended == ["last"])
    assert [row[0] for row in store.load()] == ["before", "last"]
    assert (tmp_path / "runner.db.broken").exists()


async def test_end_is_told_only_when_it_is_on_disk(failing):
    recorder, then, failures = failing
    failures.append(apsw.IOError("disk I/O error"))
    made = attempt("job", EXITED)
    assert made.report().state == "running"
    recorder.change(made)
    await then.until(lambda: bool(then.ended))
    assert made.report().state == "exited"
