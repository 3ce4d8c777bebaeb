"""Job arrays: which indexes one has, and the books that the queue keeps of each. `queue_state` makes the members.

An array is one row and a template. Its members are ordinary jobs, ``<array's id>.<index>``, whose numbers (`seq`) are
set aside when the array is submitted, so that they take their place in line from then on; their rows are made a window
at a time, as earlier members start (`MOST_AHEAD`) or end (``%K``: at most K at once, as Slurm writes it). So 100,000
members cost the journal one entry of the size of one job, and no entry makes or cancels more than `MOST_AT_ONCE`.

What is to be made or cancelled next follows from the rows alone, never from how entries were cut into batches.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import msgpack

from coordination.commands import NewJob

MAX_MEMBERS = 100_000
MAX_INDEX = 9_999_999
MAX_ARRAY_BYTES = 512 << 20  # of what all members carry together
MOST_AHEAD = 1_000  # members that are made and have not started
MOST_AT_ONCE = 500  # members made or cancelled by one entry
CACHED = 1_000  # finished arrays kept in memory
PLACEHOLDER = "{array_index}"
_PART = re.compile(r"([0-9]{1,8})(?:-([0-9]{1,8})(?::([0-9]{1,8}))?)?")
UNSTARTED, UNFINISHED = ("waiting", "pending"), ("waiting", "pending", "claimed", "running")
STATES = (*UNFINISHED, "completed", "failed", "cancelled")


class Indexes(NamedTuple):
    """The members of an array in order; `at_once` of them may be in progress together, 0 = any number."""

    spans: tuple[range, ...]
    at_once: int

    @property
    def size(self) -> int:
        return sum(map(len, self.spans))

    def at(self, position: int) -> int:
        """The index of the member at this position."""
        for span in self.spans:
            if position < len(span):
                return span[position]
            position -= len(span)
        raise IndexError("there are not so many members")

    def position(self, index: int) -> int | None:
        """Where the member of this index is; None if there is none."""
        before = 0
        for span in self.spans:
            if index in span:
                return before + span.index(index)
            before += len(span)
        return None


def parse(text: str) -> Indexes:
    """``"1-1000"``, ``"1-1000:10"``, ``"1,5,9-20"``, each with ``%K`` behind it. Raises ValueError with a sentence."""
    listed, throttled, most = text.replace(" ", "").partition("%")
    if throttled and not (most.isascii() and most.isdigit() and len(most) <= 6 and int(most) > 0):
        raise ValueError(f"what follows % must be how many may run at once, not {most[:20]!r}")
    spans = []
    for part in listed.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(
                f"{part[:20]!r} is neither an index nor a range; write '1-1000', '1-1000:10' or '1,5,9-20'"
            )
        first, step = int(match[1]), int(match[3] or 1)
        last = int(match[2] or first)
        if last > MAX_INDEX:
            raise ValueError(f"{last} is larger than the largest index there is, {MAX_INDEX}")
        if last < first or step < 1:
            raise ValueError(f"{part[:20]!r} has no members")
        spans.append(range(first, last + 1, step))
    indexes = Indexes(tuple(spans), int(most or 0))
    if indexes.size > MAX_MEMBERS:
        raise ValueError(f"at most {MAX_MEMBERS} members an array; these are {indexes.size}")
    seen: set[int] = set()
    for span in spans:
        both = seen.intersection(span)
        if both:
            raise ValueError(f"index {min(both)} is there twice")
        seen.update(span)
    return indexes


@dataclass(slots=True)
class Array:
    """One array's books. A state of "" means that it is not finished."""

    seq: int
    id: str
    size: int
    indexes: Indexes
    kind: str
    group: str
    unique_key: str | None
    state: str = ""
    reason: str | None = None
    finished_ms: int | None = None
    blockers: int = 0  # its unfinished dependencies
    closed: int = 0  # 1: no more members are made; 2: those there are are being cancelled
    made: int = 0
    parked: int = 0  # members retried by hand that wait for their turn
    pruned: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATES, 0))

    @property
    def to_come(self) -> int:
        """Members that are still to be made."""
        return 0 if self.closed or self.state else self.size - self.made

    @property
    def unfinished(self) -> int:
        return sum(self.counts[state] for state in UNFINISHED)

    @property
    def room(self) -> int:
        """How many more members may join those that wait to be placed."""
        room = MOST_AHEAD - sum(self.counts[state] for state in UNSTARTED) + self.parked
        if self.indexes.at_once:
            room = min(room, self.indexes.at_once - self.unfinished + self.parked)
        return max(room, 0)

    @property
    def wants(self) -> bool:
        """Whether the next entry has something to do here: members to make, to let go on, or to cancel."""
        if self.closed == 2 and self.unfinished:
            return True
        return bool(not self.state and not self.blockers and self.room and (self.parked or self.to_come))

    @property
    def is_over(self) -> bool:
        return not self.state and not self.unfinished and not self.to_come

    def outcome(self) -> str:
        """What it has come to, now that it is over."""
        if self.counts["failed"]:
            return "failed"
        return "cancelled" if self.counts["cancelled"] or self.made < self.size else "completed"


class ArrayBook:
    """The table ``arrays`` on the state machine's connection. Sums are written by `flush`; what a later statement reads
    (its end, whether it is closed) is written at once."""

    def __init__(self, run: Callable[..., Any], statements: dict[str, str]) -> None:
        self._run, self._q = run, statements
        self._sizes: dict[int, int] = dict(run("SELECT seq, size FROM arrays").fetchall())
        self._seqs = sorted(self._sizes)
        self._known: dict[int, Array] = {}
        self._dirty: dict[int, Array] = {}
        self._templates: dict[int, NewJob] = {}
        self.touched: dict[int, Array] = {}  # by the entry in hand
        self.wanting: list[int] = []  # those that want something of the next entry, the oldest first
        self.to_come = 0  # members that are still to be made, of all arrays
        for (seq,) in run("SELECT seq FROM arrays WHERE finished_ms IS NULL").fetchall():
            array = self.at(seq)
            self.to_come += array.to_come
            self.note_wants(array)

    def __contains__(self, seq: int) -> bool:
        return seq in self._sizes

    def of(self, seq: int) -> Array | None:
        """The array that job number `seq` is a member of."""
        if not self._seqs:
            return None
        at = bisect_right(self._seqs, seq) - 1
        if at < 0 or not self._seqs[at] < seq <= self._seqs[at] + self._sizes[self._seqs[at]]:
            return None
        return self.at(self._seqs[at])

    def at(self, seq: int) -> Array:
        """The array of this number."""
        array = self._known.get(seq)
        if array is None:
            row = self._run(self._q["array_row"], (seq,)).fetchone()
            assert row is not None, f"array number {seq} is gone"
            array = self._known[seq] = _read(row)
        return array

    def by_id(self, id: str) -> Array | None:
        row = self._run("SELECT seq FROM arrays WHERE id = ?", (id,)).fetchone() if self._seqs else None
        return self.at(cast(int, row[0])) if row else None

    def unmade(self, job_id: str) -> Array | None:
        """The array one of whose members this id is, if that member is still to be made."""
        id, dot, index = job_id.rpartition(".")
        if not dot or not (index.isascii() and index.isdigit() and len(index) <= 8):
            return None
        array = self.by_id(id)
        position = array.indexes.position(int(index)) if array is not None else None
        return array if array is not None and position is not None and position >= array.made else None

    def add(self, seq: int, job: NewJob, now_ms: int) -> Array:
        """A new array; its row is written at once."""
        indexes = parse(job.array)
        array = Array(seq, job.id, indexes.size, indexes, job.kind, job.group, job.unique_key)
        member = job._replace(depends_on=(), unique_key=None, array="")
        self._run(
            self._q["insert_array"],
            (seq, job.id, array.size, job.array, job.kind, job.group, job.unique_key, now_ms, msgpack.packb(member)),
        )
        insort(self._seqs, seq)
        self._sizes[seq] = array.size
        self._known[seq] = array
        self.to_come += array.to_come
        self.touch(array)
        return array

    def touch(self, array: Array) -> None:
        """Its books have changed."""
        self._dirty[array.seq] = self.touched[array.seq] = array

    def save(self, array: Array) -> None:
        """Writes its books now."""
        self._dirty.pop(array.seq, None)
        self._run(
            self._q["save_array"],
            (
                array.state,
                array.reason,
                array.finished_ms,
                array.blockers,
                array.closed,
                array.made,
                array.parked,
                array.pruned,
                *(array.counts[state] for state in STATES),
                array.seq,
            ),
        )

    def flush(self) -> None:
        for array in list(self._dirty.values()):
            self.save(array)
        if len(self._known) > CACHED:
            keep = self.touched
            self._known = {seq: array for seq, array in self._known.items() if not array.state or seq in keep}
        if len(self._templates) > CACHED:
            self._templates.clear()

    def forget(self, array: Array) -> None:
        """None of its members is left."""
        self._run("DELETE FROM arrays WHERE seq = ?", (array.seq,))
        del self._sizes[array.seq]
        self._seqs.remove(array.seq)
        for kept in (self._known, self._dirty, self.touched, self._templates):
            kept.pop(array.seq, None)
        self.note_wants(array, gone=True)

    def note_wants(self, array: Array, *, gone: bool = False) -> None:
        """Puts it among those that want something, or takes it out."""
        at = bisect_left(self.wanting, array.seq)
        there = self.wanting[at : at + 1] == [array.seq]
        if array.wants and not gone:
            if not there:
                self.wanting.insert(at, array.seq)
        elif there:
            del self.wanting[at]

    def moved(self, seq: int, old: str | None, new: str) -> None:
        """A job's state has changed: if it is a member, that is noted."""
        array = self.of(seq)
        if array is None:
            return
        if old is not None:
            array.counts[old] -= 1
        array.counts[new] += 1
        self.touch(array)

    def next_member(self, array: Array) -> tuple[int, NewJob]:
        """The member to be made next: its number and the job. Equal for equal books."""
        template = self._templates.get(array.seq)
        if template is None:
            (packed,) = self._run("SELECT template FROM arrays WHERE seq = ?", (array.seq,)).fetchone()
            template = self._templates[array.seq] = NewJob(*msgpack.unpackb(packed, use_list=False))
        index = array.indexes.at(array.made)
        array.made += 1
        self.to_come -= 1
        spec = template.spec.replace(PLACEHOLDER.encode(), str(index).encode())
        told = f',"array":{{"id":"{array.id}","index":{index},"size":{array.size}}}}}'.encode()
        return array.seq + array.made, template._replace(id=f"{array.id}.{index}", spec=spec[:-1] + told)

    def close(self, array: Array, *, cancel: bool, reason: str) -> int:
        """No more members are made; with `cancel` those there are are cancelled. Answers how many never will be."""
        left = array.to_come
        self.to_come -= left
        array.closed = 2 if cancel else max(array.closed, 1)
        array.reason = array.reason or reason
        self.touch(array)
        self.save(array)
        return left

    def reopen(self, array: Array) -> None:
        """A member of it is tried again."""
        array.state, array.finished_ms = "", None
        array.closed = min(array.closed, 1)
        self.touch(array)
        self.save(array)

    def waiting_for_their_turn(self, array: Array, limit: int) -> Iterator[int]:
        for (seq,) in self._run(
            "SELECT seq FROM deps WHERE dep = ? ORDER BY seq LIMIT ?", (-array.seq, limit)
        ).fetchall():
            yield cast(int, seq)


def _read(row: Any) -> Array:
    (seq, id, size, text, kind, group, unique_key, *rest) = row
    (state, reason, finished_ms, blockers, closed, made, parked, pruned, *counts) = rest
    return Array(
        seq, id, size, parse(text), kind, group, unique_key, state, reason, finished_ms, blockers, closed, made, parked,
        pruned, dict(zip(STATES, counts, strict=True)),
    )  # fmt: skip
