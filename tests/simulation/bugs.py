"""Classic mistakes, planted into the real classes one at a time: a simulator that does not find them proves nothing.

A bug is a replacement in the source of one method or more, so that each is as small as the slip of the pen that it
stands for. If the code has changed so that the place is not found any more, that is an error, not a bug found.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from p2p.election.core import ElectionCore
from p2p.journal.core import JournalCore
from p2p.journal.log import Log
from p2p.replica import Replica
from tests.simulation.desk import Desk
from tests.simulation.model import Model
from tests.simulation.nemesis import Nemesis
from tests.simulation.node import Node


class Slip(NamedTuple):
    owner: type[Any]
    method: str
    right: str
    wrong: str


class Bug(NamedTuple):
    """`why` it is one. `faults` are those under which it shows soonest, `profile` what else helps. A `rare` one takes
    thousands of seeds, so that only its stored seed in tests/seeds is tried."""

    why: str
    slips: tuple[Slip, ...]
    faults: tuple[str, ...] = ()
    profile: dict[str, Any] | None = None
    rare: bool = False


def _replica(method: str, right: str, wrong: str) -> Slip:
    return Slip(Replica, method, right, wrong)


BUGS: dict[str, Bug] = {
    "vote not persisted": Bug(
        "it votes again after a restart",
        (_replica("_persist", "HardState(self.term, self.voted_for)", "HardState(self.term, None)"),),
    ),
    "vote told before fsync": Bug(
        "a crash between the two makes it vote twice",
        (
            _replica("_on_vote", "if self._dirty:", "if False:"),
            _replica("_on_vote", "elif self.journal.write_began is not None:", "elif False:"),
        ),
    ),
    "repeated vote told before fsync": Bug(
        "the second answer overtakes the write that the first one waits for",
        (_replica("_on_vote", "elif self.journal.write_began is not None:", "elif False:"),),
        ("duplicate", "reorder", "disk_slow", "transfer", "kill"),
    ),
    "term not persisted": Bug(
        "it comes back in an earlier term than it has voted in",
        (_replica("_persist", "if self._dirty else None", "if False else None"),),
    ),
    "term of an installed snapshot forgotten": Bug(
        "it comes back in an earlier term than its log",
        (_replica("__init__", "if self.journal.log.last_term > self.term:", "if False:"),),
        ("wipe", "disk_full", "disk_slow", "kill"),
        {"small": True},
        rare=True,
    ),
    "ack before fsync": Bug(
        "what is acknowledged is lost with the power",
        (_replica("_acknowledgement", "min(journal.verified, journal.stable_index)", "journal.verified"),),
    ),
    "priority refuses a real vote": Bug(
        "whoever is highest and mute keeps everybody from leading",
        (
            _replica(
                "_on_vote",
                "granted = not behind and",
                "granted = not behind and self.election.priority < 2 and",
            ),
        ),
    ),
    "old term committed by count": Bug(
        "Raft's figure 8: it can be overwritten all the same",
        (Slip(JournalCore, "commit_by", " or index < self.term_start", ""),),
    ),
    "config before the term's no-op": Bug(
        "Ongaro's bug of 2015: two leaders' majorities need not meet",
        (_replica("_on_reconfigure", "if not seat.established:", "if False:"),),
        ("members", "kill", "transfer", "disk_slow"),
    ),
    "two changes of voters at once": Bug(
        "majorities of the first and the third need not meet",
        (_replica("_on_reconfigure", "if self.journal.log.config_index > self.journal.commit_index:", "if False:"),),
        ("members", "disk_slow"),
    ),
    "two voters added at once": Bug(
        "majorities of the old and the new need not meet",
        (_replica("_on_reconfigure", "if len(set(old.voters) ^ set(config.voters)) > 1:", "if False:"),),
        ("members",),
    ),
    "new voter that is not caught up": Bug(
        "it counts for the majority and holds nothing",
        (_replica("_on_reconfigure", "voter not in old.learners or p is None or ", "p is not None and "),),
        ("members",),
        {"spares": 2},
    ),
    "removed voter never told": Bug(
        "it was down when it was removed, and believes for ever that it votes",
        (_replica("_bid_farewell", "if seat is None or", "if True or"),),
        ("members", "kill"),
    ),
    "config not rolled back": Bug(
        "it counts by voters that nobody agreed on",
        (Slip(Log, "truncate", "while self.configs and self.configs[-1][0] >= first:", "while False:"),),
        ("members", "isolate", "split"),
    ),
    "read without a round": Bug(
        "a leader that is none any more answers from the past",
        (_replica("_on_read", "if not others:", "if True:"),),
        (),
        {"exam": "stale"},
    ),
    "read confirmed by an earlier round": Bug(
        "what was sent before the read came proves nothing about it",
        (_replica("_on_read", "self.journal.commit_index, self._round)", "self.journal.commit_index, 0)"),),
        (),
        {"exam": "stale"},
    ),
    "read before the term's no-op": Bug(
        "a new leader does not know yet what the last one committed",
        (_replica("_on_read", "seat is None or not seat.established or", "seat is None or"),),
        ("kill", "transfer"),
    ),
    "disk id ignored": Bug(
        "an emptied disk votes as the one it was",
        (Slip(Nemesis, "_new_disk", 'return DiskId(f"{self._disks}d")', "return node.disk.id"),),
        ("wipe", "kill"),
    ),
    "every append truncates": Bug(
        "a late one cuts off what was acknowledged since",
        (Slip(JournalCore, "accept", "while known < len(new) and", "while False and"),),
        ("reorder", "duplicate"),
    ),
    "truncation not persisted": Bug(
        "the disk holds another log than the memory",
        (_replica("_persist", "self.journal.commit_index, truncate)", "self.journal.commit_index, None)"),),
        ("isolate", "split"),
    ),
    "commit beyond what is verified": Bug(
        "it commits its own entries on another's word",
        (Slip(JournalCore, "commit_upto", "min(leader_commit, self.verified)", "min(leader_commit, self.log.last)"),),
        ("isolate", "split"),
    ),
    "verified survives the term": Bug(
        "it acknowledges to the new leader what only the old one had",
        (_replica("_set_term", "if term > self.term:", "if False:"),),
        ("split", "one_way", "loss", "slow_link", "kill"),
        {"voters": 5, "ranks": False, "clients": 3, "think": 0.03, "delay": 0.03, "jitter": 0.06, "fsync": 0.03},
        rare=True,
    ),
    "votes asked for in step": Bug(
        "two that have split the votes split them again, for ever (found by this simulator)",
        (Slip(ElectionCore, "asked", " * (1 + 0.25 * self._draw())", ""),),
        ("members", "isolate", "split"),
        {"voters": 3, "spares": 0, "ranks": False, "exam": "", "jitter": 0.0005},
        rare=True,
    ),
    "leader counts itself too early": Bug(
        "its own disk does not have it yet",
        (Slip(JournalCore, "commit_by", "self.stable_index if voter == self.me", "self.log.last if voter == self.me"),),
        ("disk_slow",),
    ),
    "append of an old term accepted": Bug(
        "a deposed leader overwrites its successor's entries",
        (_replica("_heard_leader", "if term < self.term:", "if False:"),),
        ("reorder", "duplicate", "transfer"),
        {"exam": "handover", "think": 0.03},
    ),
    "longer log wins": Bug(
        "entries of dead terms beat acknowledged ones",
        (
            _replica(
                "_on_vote",
                "(ask.last_term, ask.last_index) < self.journal.last",
                "ask.last_index < self.journal.last_index",
            ),
            Slip(ElectionCore, "judge", "theirs < last:", "theirs[1] < last[1]:"),
        ),
        (),
        {"exam": "suffix"},
    ),
    "two votes in a term": Bug(
        "two leaders in a term",
        (_replica("_on_vote", "self.voted_for in (None, sender) and ", ""),),
        ("loss", "transfer", "slow_link", "one_way"),
        {"ranks": False},
    ),
    "no lease for votes": Bug(
        "whoever was cut off for a while deposes a leader that everybody hears",
        (
            _replica("_on_vote", "not ask.transfer and ask.term > self.term", "False"),
            Slip(ElectionCore, "judge", "if self.in_lease(now):", "if False:"),
        ),
        (),
        {"voters": 3, "spares": 0, "exam": "partial"},
    ),
    "no pre-vote": Bug(
        "whoever was cut off comes back with a later term",
        (_replica("_on_tick", "self._ask_for_votes(now)", "self._campaign(now, transfer=False)"),),
    ),
    "no check of the quorum": Bug(
        "a leader that nobody answers leads on",
        (_replica("_keep_seat", "elif now - self._seat.answered", "elif False and now - self._seat.answered"),),
        (),
        {"exam": "deaf"},
    ),
    "hung disk leads on": Bug(
        "heartbeats go out and nothing is committed",
        (_replica("_keep_seat", "now - began >= self.timers.disk_stall", "False"),),
    ),
    "uncommitted entries applied": Bug(
        "they may be overwritten",
        (
            _replica(
                "_finish", "min(self.journal.commit_index, self.journal.stable_index)", "self.journal.stable_index"
            ),
        ),
    ),
    "entries applied before fsync": Bug(
        "the state is ahead of the log after a crash",
        (
            _replica(
                "_finish", "min(self.journal.commit_index, self.journal.stable_index)", "self.journal.commit_index"
            ),
        ),
        ("kill", "power", "disk_slow"),
    ),
    "voters left out of the snapshot": Bug(
        "whoever installs it goes by voters of long ago",
        (_replica("_on_installed", "snapshot.config)", "journal.log.config)"),),
        ("members", "kill", "isolate"),
        {"small": True, "snapshot_every": 8, "trailing": 0, "spares": 1},
    ),
    "keys left out of the snapshot": Bug(
        "whoever installs it does again what a client repeats",
        (Slip(Model, "copy", "self.jobs.copy(), self.keys.copy()", "self.jobs.copy(), {}"),),
        ("kill", "isolate"),
        {"snapshot_every": 15, "trailing": 0},
    ),
    "compaction past what is durable": Bug(
        "after a power cut neither the log nor the state has it",
        (
            Slip(Node, "take_snapshot", "self.kept = self.machine.copy()", "pass"),
            Slip(Node, "_snapshot_made", "min(at - self.world.profile.trailing, self.kept.applied_index)", "at"),
        ),
        ("power",),
        {"snapshot_every": 15},
    ),
    "regressed follower counts": Bug(
        "what it has lost is taken for a copy",
        (_replica("_on_append_reply", "p.regressed = True", "pass"),),
        ("restore", "restore"),
        {"voters": 5, "chaos": 12.0},
    ),
    "token from the wall clock": Bug(
        "it goes back with the clock",
        (
            Slip(Model, "_claim", "index, command.worker, job.key)", "command.at_ms, command.worker, job.key)"),
            Slip(
                Model,
                "_claim",
                "return (command.job, job.attempt + 1, index)",
                "return (command.job, job.attempt + 1, command.at_ms)",
            ),
        ),
        (),
        {"workers": 2},
    ),
    "apply is not deterministic": Bug(
        "the voters' states drift apart",
        (Slip(Model, "_claim", "command.worker, job.key)", "command.worker, job.key + (id(self) >> 6) % 2)"),),
        (),
        {"workers": 2},
    ),
    "stale attempt accepted": Bug(
        "a worker that was given up finishes what another one does",
        (
            Slip(
                Model,
                "_finish",
                "job.attempt != command.attempt or job.worker != command.worker or job.state",
                "job.state",
            ),
        ),
        ("freeze", "isolate"),
        {"workers": 2},
    ),
    "expiry without the log": Bug(
        "the leader gives up an attempt and tells only itself",
        (
            Slip(
                Desk,
                "_round",
                "node.propose(Order(model.Expire(node.wall(), job, attempt)))",
                "node.machine.jobs[job] = node.machine.jobs[job]._replace(state=0)",
            ),
        ),
        ("kill", "isolate"),
        {"workers": 2, "chaos": 12.0},
    ),
    "no grace from a new leader": Bug(
        "every attempt is given up at a change of leaders",
        (
            Slip(
                Desk,
                "_open",
                "self.leases.grant(job, attempt, worker, now)",
                "self.leases.grant(job, attempt, worker, now - 60)",
            ),
        ),
        ("kill", "transfer"),
        {"workers": 2},
    ),
}


def _mutated(owner: type[Any], method: str, slips: list[Slip]) -> Any:
    known = owner.__dict__[method]
    plain = known.__func__ if isinstance(known, staticmethod) else known
    source = textwrap.dedent(inspect.getsource(plain))
    for slip in slips:
        if slip.right not in source:
            raise LookupError(
                f"{owner.__name__}.{method} has no {slip.right!r} any more: mend tests/simulation/bugs.py"
            )
        source = source.replace(slip.right, slip.wrong)
    made: dict[str, Any] = {}
    exec(compile(source, f"<{owner.__name__}.{method} with a bug>", "exec"), vars(sys.modules[owner.__module__]), made)
    return made[method]


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The bug is there inside, and gone outside. An empty name plants nothing."""
    by_method: dict[tuple[type[Any], str], list[Slip]] = {}
    for slip in BUGS[name].slips if name else ():
        by_method.setdefault((slip.owner, slip.method), []).append(slip)
    with ExitStack() as stack:
        for (owner, method), slips in by_method.items():
            stack.enter_context(patch.object(owner, method, _mutated(owner, method, slips)))
        yield
