"""What the orchestrator and the runner say to each other, and the limits on it.

A frame is a 4-byte big-endian length and a msgpack map with a ``kind``.  The client opens with ``hello`` and gets a
``hello`` and the ``known`` attempts back.  After that it sends ``start``, ``stop``, ``ack``, ``sample`` and
``shutdown``, and the runner sends ``reports`` whenever something changed.  Anything else is a ``ProtocolError``: the
connection is closed, the runner and its jobs go on.

Decides: framing, message shapes, limits, errors.  Does not decide: what happens then (``daemon.py``, ``client.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import msgpack

PROTOCOL = 1  # raised when an old peer could misunderstand a new one
VERSION = "0.2.0"  # of the runner's code; the orchestrator may replace an idle runner whose version is not its own

MAX_FRAME_BYTES = 32 * 1024 * 1024
MAX_REPORTS_PER_FRAME = 1_000  # with 5 KB of error each, 5 MB: far below a frame
MAX_START_BYTES_PER_FRAME = 8 * 1024 * 1024  # the client splits larger batches
MAX_KNOWN_ATTEMPTS = 20_000  # running, or ended and not yet acknowledged
MAX_FORGOTTEN = 10_000  # acknowledged attempts whose late duplicate start is still refused
MAX_NAME_CHARACTERS = 512

Key = tuple[str, int]  # (job, attempt)


class RunnerError(Exception):
    """The runner could not do what was asked."""


class ProtocolError(RunnerError):
    """The peer sent something this protocol does not allow."""


class RunnerUnavailable(RunnerError):
    """No runner answers, or the connection to it was lost."""


class RunnerBusy(RunnerError):
    """The runner will not shut down while jobs run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartSpec:
    """One attempt to run. ``env`` is the process's whole environment: nothing is added, nothing is inherited."""

    job: str
    attempt: int
    argv: list[str]
    env: dict[str, str]
    directory: str  # absolute; made if missing; gets stdout and stderr
    cwd: str | None = None  # absolute; None: the directory
    timeout_seconds: float | None = None  # running time; None: no limit
    grace_seconds: float = 30.0  # between SIGTERM and SIGKILL
    log_cap_bytes: int = 16 * 1024 * 1024  # kept per stream
    memory_limit_mb: int = 0  # MiB, of all its processes together; 0: no limit
    memory_kill: bool = True  # what has more is ended; False: it is only told, in the report's usage
    memory_group: bool = True  # a cgroup may be made for it; False: it is watched

    @property
    def key(self) -> Key:
        return (self.job, self.attempt)

    def to_wire(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SPEC_FIELDS}

    @classmethod
    def from_wire(cls, item: Mapping[str, Any]) -> Self:
        """Raises ``ProtocolError`` for a shape that no client of ours sends."""
        _check(isinstance(item, dict), "a start is a map")
        _check_key(item.get("job"), item.get("attempt"))
        argv, env = item.get("argv"), item.get("env")
        _check(isinstance(argv, list) and argv and all(isinstance(a, str) for a in argv), "argv: a list of strings")
        _check(isinstance(env, dict) and all(isinstance(t, str) for pair in env.items() for t in pair), "env: strings")
        _check(isinstance(item.get("directory"), str), "directory: a path")
        _check(isinstance(item.get("cwd"), str | None), "cwd: a path or nothing")
        _check(_is_seconds(item.get("timeout_seconds"), optional=True), "timeout_seconds: a number >= 0 or nothing")
        _check(_is_seconds(item.get("grace_seconds")), "grace_seconds: a number >= 0")
        cap = item.get("log_cap_bytes")
        _check(isinstance(cap, int) and 0 <= cap < 2**53, "log_cap_bytes: an integer >= 0")
        limit = item.get("memory_limit_mb", 0)  # from here on: fields that an older client does not know
        _check(type(limit) is int and 0 <= limit < 2**40, "memory_limit_mb: an integer >= 0")
        for name in ("memory_kill", "memory_group"):
            _check(isinstance(item.get(name, True), bool), f"{name}: true or false")
        return cls(**{name: item[name] for name in _SPEC_FIELDS if name in item})


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptReport:
    """What the runner knows of one attempt.

    ``state``: starting, running, exited, or forgotten (it ended, was acknowledged, and will not run again).
    ``reason`` of an end: exit, timeout, memory_limit (it had more than its own), out_of_memory (the kernel says so),
    spawn_failed, runner_lost, machine_restarted, runner_stopped, or the reason given to ``stop``.  ``exit_code`` and
    ``signal`` are both None when the status is unknown.  ``max_rss_mb`` is never below the runner's own 20 MB: the
    kernel counts what a child shares with its parent before its exec.
    """

    job: str
    attempt: int
    state: str
    pid: int | None = None
    started_ms: int | None = None  # wall clock
    ended_ms: int | None = None
    exit_code: int | None = None  # 0-255
    signal: int | None = None
    reason: str = ""
    error: str | None = None  # a sentence and the last lines of stderr; None after success
    usage: dict[str, float] = field(default_factory=dict)  # user_seconds, system_seconds, max_rss_mb, over_memory_mb

    @property
    def key(self) -> Key:
        return (self.job, self.attempt)

    def to_wire(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _REPORT_FIELDS}

    @classmethod
    def from_wire(cls, item: Mapping[str, Any]) -> Self:
        return cls(**{name: item[name] for name in _REPORT_FIELDS if name in item})


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivitySample:
    """Signs of life of one running attempt: stuck is when none of them moves, not when it is old."""

    job: str
    attempt: int
    cpu_seconds: float  # of all its processes, with the children they waited for, wherever they have moved to
    rss_mb: float
    stdout_bytes: int  # ever written, also what the log cap dropped since
    stderr_bytes: int
    progress_mtime_ms: int  # of progress.json; 0: there is none
    over_memory_mb: float = 0.0  # the most it was seen to have, if that was more than its limit

    def to_wire(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SAMPLE_FIELDS}

    @classmethod
    def from_wire(cls, item: Mapping[str, Any]) -> Self:
        return cls(**{name: item[name] for name in _SAMPLE_FIELDS if name in item})


_SPEC_FIELDS = tuple(StartSpec.__dataclass_fields__)
_REPORT_FIELDS = tuple(AttemptReport.__dataclass_fields__)
_SAMPLE_FIELDS = tuple(ActivitySample.__dataclass_fields__)


def pack(kind: str, **body: Any) -> bytes:
    """One frame.  Strings keep bytes that are not UTF-8 (argv and environments may have them)."""
    payload: bytes = msgpack.packb({"kind": kind, **body}, unicode_errors="surrogateescape")
    if len(payload) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a {kind} frame of {len(payload)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return len(payload).to_bytes(4, "big") + payload


class FrameReader:
    """Cuts a byte stream into messages; keeps at most one frame's worth of bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterable[dict[str, Any]]:
        """Yields each complete message.  Raises ``ProtocolError`` at the first illegal one."""
        self._buffer += data
        while len(self._buffer) >= 4:
            length = int.from_bytes(self._buffer[:4], "big")
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
            if len(self._buffer) < 4 + length:
                return
            payload = bytes(self._buffer[4 : 4 + length])
            del self._buffer[: 4 + length]
            yield _unpack(payload)


def _unpack(payload: bytes) -> dict[str, Any]:
    try:
        message = msgpack.unpackb(payload, unicode_errors="surrogateescape", strict_map_key=True)
    except (ValueError, TypeError, RecursionError) as error:  # msgpack's own errors are ValueErrors
        raise ProtocolError(f"a frame is not msgpack: {type(error).__name__}") from error
    _check(isinstance(message, dict) and isinstance(message.get("kind"), str), "a frame is a map with a kind")
    result: dict[str, Any] = message
    return result


def check_keys(items: Any) -> list[Key]:
    """``[[job, attempt], …]`` as keys.  Raises ``ProtocolError``."""
    _check(isinstance(items, list), "items: a list")
    for item in items:
        _check(isinstance(item, list) and len(item) == 2, "an item is [job, attempt]")
        _check_key(item[0], item[1])
    return [(item[0], item[1]) for item in items]


def _check_key(job: Any, attempt: Any) -> None:
    named = isinstance(job, str) and job.isprintable() and 0 < len(job) <= MAX_NAME_CHARACTERS
    _check(named, f"job: 1 to {MAX_NAME_CHARACTERS} printable characters")
    _check(type(attempt) is int and 0 <= attempt < 2**53, "attempt: an integer >= 0")


def _is_seconds(value: Any, *, optional: bool = False) -> bool:
    if value is None:
        return optional
    return isinstance(value, int | float) and 0 <= value < 1e9  # a NaN compares false


def _check(holds: object, what: str) -> None:
    if not holds:
        raise ProtocolError(f"illegal message: {what}")
