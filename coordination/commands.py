"""The only ways to change the queue. Each command is one journal entry: bytes to `p2p`, meaning to `queue_state`.

Everything undetermined is decided before a command is made and travels inside it: the time (`at_ms`, unix
milliseconds), the ids, which job goes to which worker. Applying one is then the same computation on every voter.
Wire form: a msgpack array ``[version, name, field, field, …]`` in the order of the dataclass. A field that comes later
goes to the end and has a default, so that the entries of earlier builds can still be read.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import msgpack

COMMANDS_VERSION = 1
MAX_SCHEDULES = 1_000
UNSPENT = frozenset(
    {"preempted", "drained"}
)  # ends that were asked of a job for the sake of others: no attempt is spent


class UnknownCommand(Exception):
    """An entry of a kind or version this build does not know: a voter halts rather than skips (PROTOCOL §2.23)."""


class NewJob(NamedTuple):
    """A job as it enters the queue: the columns the queue decides by, then `spec`, the JSON it only carries."""

    id: str
    kind: str
    group: str
    priority: int
    requires: str  # canonical JSON, see Requires.shape
    max_attempts: int
    backoff_ms: int
    timeout_ms: int
    not_before_ms: int
    unique_key: str | None
    depends_on: tuple[str, ...]
    spec: bytes
    no_retry: str = ""  # exit codes that fail it at once, see `job.exit_codes`
    array: str = ""  # the indexes of an array, whose members are made of the rest, see `arrays.parse`


class Pick(NamedTuple):
    """One decision of placement: this job, on these GPUs of the claiming worker."""

    seq: int
    gpus: str | None  # JSON list of uuids


class Place(NamedTuple):
    """One member of a gang: its worker, and its GPUs there."""

    worker: str
    gpus: str | None  # JSON list of uuids


class AttemptDone(NamedTuple):
    """The end of one attempt as its worker reports it."""

    id: str
    attempt: int
    worker: str
    ok: bool
    result: bytes | None  # JSON
    error: str | None
    exit_code: int | None
    retryable: bool
    started_ms: int  # 0 when the process never started
    cause: str  # "exit", "timeout", "runner_lost", …: becomes part of the reason. See `UNSPENT`
    gpu_memory_mb: int = 0  # of the smallest GPU it had; 0 when it had none
    checkpoint: bytes | None = None  # JSON, for the attempt that follows


class Began(NamedTuple):
    """The process of one attempt has started."""

    id: str
    attempt: int
    started_ms: int


class Lapse(NamedTuple):
    """An attempt the leader has given up: its lease lapsed, its timeout passed, or it shows no sign of life."""

    id: str
    attempt: int
    cause: str
    worker: str = ""  # of a gang: whose member it is about


@dataclass(frozen=True, slots=True)
class Submit:
    """Adds jobs, all or none. `key` and `digest` make a repetition return the first answer."""

    at_ms: int
    jobs: tuple[NewJob, ...]
    key: str
    digest: str


@dataclass(frozen=True, slots=True)
class Claim:
    """Starts an attempt of each picked job on `worker`. A pick that is no longer pending is left out of the answer."""

    at_ms: int
    worker: str
    picks: tuple[Pick, ...]


@dataclass(frozen=True, slots=True)
class ClaimGang:
    """Starts one attempt of one job on several workers at once, in the order of their ranks, if it is pending."""

    at_ms: int
    seq: int
    members: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Begin:
    """claimed -> running."""

    at_ms: int
    worker: str
    items: tuple[Began, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """Ends attempts, well or badly. An item whose attempt is not the newest is refused and changes nothing."""

    at_ms: int
    items: tuple[AttemptDone, ...]


@dataclass(frozen=True, slots=True)
class Expire:
    """The leader's verdict on attempts that no worker answers for. Spends the attempt."""

    at_ms: int
    items: tuple[Lapse, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """An operator (or a returning worker) gives jobs back: pending again, the attempt fenced off, none spent."""

    at_ms: int
    ids: tuple[str, ...]
    reason: str
    key: str = ""


@dataclass(frozen=True, slots=True)
class Cancel:
    at_ms: int
    ids: tuple[str, ...]
    reason: str
    key: str = ""


@dataclass(frozen=True, slots=True)
class Retry:
    """A failed or cancelled job starts over with all its attempts."""

    at_ms: int
    id: str
    key: str = ""


@dataclass(frozen=True, slots=True)
class Wake:
    """waiting -> pending for what is due at `at_ms`, at most `limit` jobs."""

    at_ms: int
    limit: int


@dataclass(frozen=True, slots=True)
class Clear:
    """Cancels, in one bounded slice, what was submitted up to `upto_seq`. Repeated until it answers 0."""

    at_ms: int
    upto_seq: int
    include_running: bool
    limit: int


@dataclass(frozen=True, slots=True)
class Prune:
    """Forgets finished jobs (never others): those of `states` that ended before `before_ms`, and the oldest ones beyond
    `keep`. At most `limit` rows; repeated until it answers 0."""

    at_ms: int
    states: tuple[str, ...]
    before_ms: int
    keep: int
    limit: int


@dataclass(frozen=True, slots=True)
class ForgetWorkers:
    """Drops workers from the books and releases what they hold."""

    at_ms: int
    workers: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class MarkNode:
    """An operator, or the leader, says what may be placed on a node: nothing new while it is cordoned or draining. What
    runs there goes on, but ends by `deadline_ms` (0: whenever it likes) if it drains."""

    at_ms: int
    node: str
    cordoned: bool
    draining: bool
    deadline_ms: int
    reason: str


@dataclass(frozen=True, slots=True)
class RetryMany:
    """Those of these jobs that have failed start over with all their attempts; the others are passed over."""

    at_ms: int
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PutSchedule:
    """A recurring job, new or in place of the one of its name. Where only the job differs, its next due time stays."""

    at_ms: int
    name: str
    body: str  # JSON, see `schedules.Schedule`
    origin: str  # "file" or "api"
    due_ms: int  # its first due time, 0 = never


@dataclass(frozen=True, slots=True)
class DropSchedule:
    at_ms: int
    name: str
    origin: str  # of whoever drops it: what is in jobs.yaml goes when it is taken out there


@dataclass(frozen=True, slots=True)
class RunSchedule:
    """What a schedule is due for at `due_ms`, and when it is due next. Any other due time than its newest is stale, so
    each makes its job once, whoever leads. No job: this due time is passed over, and `note` says why."""

    at_ms: int
    name: str
    due_ms: int
    next_ms: int
    jobs: tuple[NewJob, ...]
    note: str


_COMMANDS = (
    Submit, Claim, Begin, Finish, Expire, Release, Cancel, Retry, Wake, Clear, Prune, ForgetWorkers,
    ClaimGang, MarkNode, RetryMany, PutSchedule, DropSchedule, RunSchedule,
)  # fmt: skip
Command = (
    Submit | Claim | Begin | Finish | Expire | Release | Cancel | Retry | Wake | Clear | Prune | ForgetWorkers
    | ClaimGang | MarkNode | RetryMany | PutSchedule | DropSchedule | RunSchedule
)  # fmt: skip
_TYPES: dict[str, type[Any]] = {kind.__name__: kind for kind in _COMMANDS}
_ITEMS: dict[str, tuple[int, type[Any]]] = {
    "Submit": (1, NewJob),
    "Claim": (2, Pick),
    "ClaimGang": (2, Place),
    "Begin": (2, Began),
    "Finish": (1, AttemptDone),
    "Expire": (1, Lapse),
    "RunSchedule": (4, NewJob),
}


def encode(command: Command) -> bytes:
    """The bytes of one journal entry."""
    name = type(command).__name__
    values = [getattr(command, field.name) for field in fields(command)]
    return bytes(msgpack.packb((COMMANDS_VERSION, name, *values)))


def decode(body: bytes) -> Command:
    """The command in one journal entry. Raises UnknownCommand for what this build cannot apply."""
    try:
        version, name, *values = msgpack.unpackb(body, use_list=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise UnknownCommand(f"a journal entry of {len(body)} bytes is no command: {error}") from None
    kind = _TYPES.get(name)
    if kind is None or version != COMMANDS_VERSION:
        raise UnknownCommand(f"journal entry {name!r} of version {version}: this build knows {COMMANDS_VERSION}")
    try:
        if name in _ITEMS:
            at, item = _ITEMS[name]
            values[at] = tuple(item(*value) for value in values[at])
        command: Command = kind(*values)
    except (TypeError, IndexError) as error:
        raise UnknownCommand(f"journal entry {name!r} has other fields than this build knows: {error}") from None
    return command
