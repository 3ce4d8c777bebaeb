"""One voter under crashes at every point: the real replica and the real queue over a disk that loses and tears writes.

A schedule is a seed. A step proposes a batch of commands, persists it, applies it and answers; a crash can come before
the append, in the middle of it (the disk then holds a prefix, its last entry perhaps torn), between append and apply,
between two slices of an apply, and after the apply before the answers. A power cut also takes the queue's file back to
its last checkpoint, as PROTOCOL §2.21 says it may.

Checked after every restart: every acknowledged command is in the log, in order, once; every acknowledged submit's jobs
are in the queue, once; the queue equals a replay from nothing; term and entries never go back; and no command that a
client repeated was done twice. P2P_CAMPAIGN=N runs N seeds; a failing one is printed.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import apsw
import pytest

from coordination import commands as c
from coordination.errors import Refused
from coordination.queue_state import QueueState
from p2p.effects import Apply, Entry, Persist
from p2p.ids import Index, NodeId
from p2p.replica import Applied, Campaign, Persisted, Propose, Replica
from p2p.storage.memory import MemoryLog, PowerCut
from tests.simulation.workload import Workload, dump, replayed

SEEDS = int(os.environ.get("P2P_CAMPAIGN", "0")) or 300
STEPS = 25
NODE = NodeId("n1")
CRASHES = ("before the append", "in the append", "before the apply", "in the apply", "before the answer")


class Crash(Exception):
    """The process is gone."""


class Node:
    """Carries out the replica's effects as `p2p.driver` does, one step at a time, with a place to crash between any
    two of them. What it remembers beside its disks is lost with it."""

    def __init__(self, log: MemoryLog, path: Path, again: int) -> None:
        self.log = log.reopened(NODE)
        self.state = QueueState(str(path))
        self.state._db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)  # a crash writes nothing
        self.loaded = self.log.load(applied=Index(self.state.applied_index))
        assert self.state.applied_index + 1 >= self.loaded.first, "the log was compacted beyond the state"
        self.replica = Replica(
            NODE, self.loaded.hard_state, last=self.loaded.last, applied=Index(self.state.applied_index)
        )
        # An applied entry may be handed over again; the queue must know that it has it.
        self.handed = max(self.state.applied_index - again, self.loaded.first - 1, 0)

    def step(self, event: Any, crash: str | None, rng: random.Random) -> dict[int, Any]:
        """Answers by index: what the client was told. Raises Crash or PowerCut."""
        answers: dict[int, Any] = {}
        (persist,) = self.replica.step(event)
        self.replica.check_invariants()
        assert isinstance(persist, Persist)
        if crash == "before the append":
            raise Crash
        if crash == "in the append":
            self.log.cut_next_append, self.log.tear = rng.randint(0, len(persist.entries)), rng.random() < 0.5
        self.log.append(persist.entries, persist.hard_state, persist.acked_floor)
        for apply in self.replica.step(Persisted(persist.entries[-1].index)):
            self.replica.check_invariants()
            assert isinstance(apply, Apply)
            if crash == "before the apply":
                raise Crash
            answers |= self._apply(apply.upto, crash, rng)
        if crash is not None:
            raise Crash
        return answers

    def _apply(self, upto: Index, crash: str | None, rng: random.Random) -> dict[int, Any]:
        todo = self.log.read(Index(self.handed + 1), upto)
        self.handed = upto
        answers: dict[int, Any] = {}
        while todo:
            n = rng.randint(1, 4)
            some, todo = todo[:n], todo[n:]
            told = self.state.apply_batch([(e.index, e.term, e.body) for e in some])
            answers |= {e.index: result for e, (result, _) in zip(some, told, strict=True)}
            if crash == "in the apply":
                raise Crash
        self.replica.step(Applied(Index(self.state.applied_index)))
        self.replica.check_invariants()
        return answers


class Schedule:
    """One seed's story, and what is known to be true of it."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.rng = random.Random(seed)
        self.workload = Workload(random.Random(seed + 1_000_000))
        self.path, self.checkpoint_path = folder / "state.db", folder / "checkpoint.db"
        self.log = MemoryLog(NODE)
        self.acked: dict[int, bytes] = {}
        self.answers: dict[int, Any] = {}
        self.seen: dict[int, Entry] = {}  # the log as it grew; compaction does not forget here
        self.term = 0
        self.restarts = 0
        self.node: Node | None = None

    def run(self) -> None:
        for _ in range(STEPS):
            crash = self.rng.choice(CRASHES) if self.rng.random() < 0.25 else None
            try:
                if self.node is None:
                    self._start(crash)
                else:
                    self._work(self.node, crash)
            except (Crash, PowerCut) as end:
                self._crashed(isinstance(end, PowerCut) or self.rng.random() < 0.4)
        if self.node is None:
            self._start(None)

    def _start(self, crash: str | None) -> None:
        self.restarts += 1
        self.node = Node(self.log, self.path, self.rng.randint(0, 5))
        assert self.node.replica.term >= self.term, "the term went back"
        assert self.node.loaded.last >= max(self.acked, default=0), "an acknowledged entry is gone"
        self.node.step(Campaign(), crash, self.rng)
        self.term = self.node.replica.term
        self._check(self.node)

    def _work(self, node: Node, crash: str | None) -> None:
        commands = [self.workload.next(node.state) for _ in range(self.rng.randint(1, 4))]
        bodies = tuple(c.encode(command) for command in commands)
        for index, answer in node.step(Propose(bodies), crash, self.rng).items():
            self.acked[index] = node.log.read(Index(index), Index(index))[0].body
            self.answers[index] = answer
        if self.rng.random() < 0.2:
            self._checkpoint(node)

    def _checkpoint(self, node: Node) -> None:
        self._note_log()
        durable = node.state.checkpoint()
        shutil.copyfile(self.path, self.checkpoint_path)
        if self.rng.random() < 0.5:
            node.log.compact(Index(self.rng.randint(0, durable)))

    def _note_log(self) -> None:
        self.seen |= {entry.index: entry for entry, _, _ in self.log.records}

    def _crashed(self, power_cut: bool) -> None:
        if self.node is not None:
            self.node.state._db.close(True)
        self.node = None
        if power_cut:
            for side in ("", "-wal", "-shm"):
                Path(f"{self.path}{side}").unlink(missing_ok=True)
            if self.checkpoint_path.exists():
                shutil.copyfile(self.checkpoint_path, self.path)

    def _check(self, node: Node) -> None:
        for index in [index for index in self.seen if index > node.loaded.last]:
            del self.seen[index]  # torn off: then nobody was told
            assert index not in self.acked
        self._note_log()
        whole = [self.seen[index] for index in range(1, node.state.applied_index + 1)]
        for index, body in self.acked.items():
            assert self.seen[index].body == body, f"acknowledged entry {index} is another one now"
        assert dump(node.state._db) == replayed([(e.index, e.term, e.body) for e in whole])
        assert [e.term for e in whole] == sorted(e.term for e in whole)
        self._check_effects(node.state)

    def _check_effects(self, state: QueueState) -> None:
        for index, answer in self.answers.items():
            command = c.decode(self.acked[index]) if self.acked[index] else None
            if isinstance(command, c.Submit) and not isinstance(answer, Refused):
                found = state._run("SELECT id FROM jobs WHERE grp = ? ORDER BY seq", (command.key,)).fetchall()
                assert [row[0] for row in found] == answer["ids"], f"entry {index}: {command.key}"
            if isinstance(command, c.Finish) and answer == [None] and command.items[0].ok:
                done = state._run(
                    "SELECT count(*) FROM history h JOIN jobs j USING (seq) WHERE j.id = ? AND h.state = 'completed'",
                    (command.items[0].id,),
                ).fetchone()
                assert done == (1,), f"entry {index}: {command.items[0].id} was completed {done} times"
            if isinstance(command, c.Cancel) and not isinstance(answer, Refused):
                (job_id,) = answer
                row = state._run("SELECT state FROM jobs WHERE id = ?", (job_id,)).fetchone()
                assert row == ("cancelled",), f"entry {index}: {job_id} is {row}"


def run_seed(seed: int, folder: Path) -> Schedule:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    schedule = Schedule(seed, folder)
    try:
        schedule.run()
    except BaseException:
        print(f"seed {seed} failed; again: run_seed({seed}, folder)")
        raise
    finally:
        if schedule.node is not None:
            schedule.node.state._db.close(True)
    return schedule


@pytest.mark.parametrize("part", range(10))
def test_nothing_acknowledged_is_lost_and_nothing_is_done_twice(tmp_path: Path, part: int) -> None:
    restarts = acked = 0
    for seed in range(part, SEEDS, 10):
        schedule = run_seed(seed, tmp_path / "node")
        restarts += schedule.restarts
        acked += len(schedule.acked)
    assert restarts > SEEDS // 10
    assert acked > SEEDS // 10


def test_a_seed_is_a_story_that_can_be_told_again(tmp_path: Path) -> None:
    first, second = run_seed(7, tmp_path / "a"), run_seed(7, tmp_path / "b")
    assert first.acked == second.acked
    assert first.restarts == second.restarts
