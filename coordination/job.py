"""What a job is: its fields, limits and states. Decides nothing about when or where it runs.

`JobSpec` is the body of ``POST /jobs`` (DESIGN §5) and rejects everything it does not know: a misspelt field that is
silently ignored costs its author a night. Resolution against a kind is `coordination.kinds`; the life of a job once it
is accepted is `coordination.queue_state`.
"""

from __future__ import annotations

import re
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from coordination.arrays import parse

MAX_JOB_BYTES = 1 << 20
MAX_BATCH_JOBS = 10_000
MAX_ARGUMENT_BYTES = 131_071  # Linux MAX_ARG_STRLEN less its NUL: execve refuses longer ones
RESERVED_ENV = re.compile(r"^(P2P_|CUDA_VISIBLE_DEVICES$|RINGRIFT_CLUSTER_AUTH_TOKEN)")
ENV_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LITERALS = re.compile(r"\\.|\[\^?\]?[^\]]*\]")
_REPEATS = re.compile(r"[*+?{]")
MAX_REPEATS = 4
_EXIT_CODES = re.compile(r"([0-9]{1,3})(?:-([0-9]{1,3}))?")
WORD = r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$"


class JobState(StrEnum):
    """The states of DESIGN §5. The edges between them are `coordination.queue_state.EDGES`."""

    WAITING = "waiting"
    PENDING = "pending"
    CLAIMED = "claimed"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


IN_PROGRESS = (JobState.CLAIMED, JobState.RUNNING)
NOT_STARTED = (JobState.WAITING, JobState.PENDING)
FINISHED = (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)


def _plain(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain a NUL character")
    if _SURROGATE.search(text):
        raise ValueError("must not contain a lone surrogate: no process could be given it")
    return text


def _fits_64_bits(value: Any) -> Any:
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ValueError("must be a whole number of at most 64 bits; give a longer one as a string")
    return value


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _argument(text: str) -> str:
    if len(text.encode("utf-8", "surrogatepass")) > MAX_ARGUMENT_BYTES:
        raise ValueError(f"must be at most {MAX_ARGUMENT_BYTES} bytes (the kernel's limit for one argument)")
    return _plain(text)


def _command(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError('must be a list of arguments; for a shell line give ["sh", "-c", "…"]')
    return value


def _regex(text: str) -> str:
    """A pattern that cannot run away: it is searched by the thread that applies the journal, so (a+)+ would stop it."""
    if "(?" in text:
        raise ValueError("must not contain (?: groups, comments and flags of that kind are not needed here")
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a pattern: {error}") from None
    bare = _LITERALS.sub("x", text)
    if re.search(r"\)[*+{]", bare) or len(_REPEATS.findall(bare)) > MAX_REPEATS:
        raise ValueError(f"repeats too much; no group may be repeated, and at most {MAX_REPEATS} of * + ? {{ are taken")
    return text


def _unix_seconds(value: Any) -> Any:
    """Accepts unix seconds or an ISO 8601 time with an offset, as people write it."""
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError("must be unix seconds or an ISO 8601 time such as 2026-01-31T08:00:00+00:00") from None
        if moment.tzinfo is None:
            raise ValueError("needs a UTC offset, such as 2026-01-31T08:00:00+00:00")
        return moment.timestamp()
    return value


Text = Annotated[str, AfterValidator(_plain)]
Argument = Annotated[str, AfterValidator(_argument)]
Whole = Annotated[int, BeforeValidator(_not_bool)]
Number = Annotated[float, BeforeValidator(_not_bool)]
ShortWord = Annotated[str, Field(min_length=1, max_length=64, pattern=WORD)]
Scalar = Annotated[Annotated[Text, Field(max_length=10_000)] | bool | int | float, AfterValidator(_fits_64_bits)]


def exit_codes(codes: list[int | str]) -> str:
    """``[2, "64-78"]`` as the queue keeps it: ``"2,64-78"``, in order. Raises ValueError with a sentence."""
    spans = []
    for code in codes:
        text = str(code).strip()
        match = _EXIT_CODES.fullmatch(text)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high <= 255:
            raise ValueError(f"{text[:20]!r} is neither an exit code (1 to 255) nor a range of them such as '64-78'")
        spans.append((low, high))
    return ",".join(f"{low}-{high}" if low < high else str(low) for low, high in sorted(set(spans)))


def is_exit_code_of(codes: str, exit_code: int | None) -> bool:
    """Whether `exit_code` is one of those that `exit_codes` has written."""
    if not codes or exit_code is None:
        return False
    spans = (span.partition("-") for span in codes.split(","))
    return any(int(low) <= exit_code <= int(high or low) for low, _, high in spans)


def _exit_codes(value: list[int | str]) -> list[int | str]:
    exit_codes(value)
    return value


ExitCodes = Annotated[list[Whole | str], Field(max_length=64), AfterValidator(_exit_codes)]


def _indexes(text: str) -> str:
    parse(text)
    return text.replace(" ", "")


class Closed(BaseModel):
    """Base of every body we accept: strict types, unknown fields refused, infinities refused, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Requires(Closed):
    """What a job needs of one node; absent means no demand. Equal requirements are one *shape* to placement."""

    gpus: Whole = Field(0, ge=0, le=64, description="whole GPUs; 0 = none")
    gpu_memory_mb: Whole = Field(0, ge=0, le=10_000_000, description="free VRAM on each GPU, MiB")
    gpu_model: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_regex)] | None = Field(
        None, description="pattern searched in the GPU's model name; A|B = any of"
    )
    gpu_share: Number = Field(1.0, gt=0, le=1, description="fraction of one GPU; below 1 only with gpus: 1")
    min_compute_capability: Annotated[str, Field(pattern=r"^\d{1,2}\.\d{1,2}$")] | None = Field(
        None, description='CUDA compute capability, "8.0"'
    )
    cpus: Number = Field(1.0, ge=0, le=10_000, description="CPU cores; fractions allowed")
    memory_mb: Whole = Field(0, ge=0, le=100_000_000, description="RAM, MiB")
    disk_mb: Whole = Field(0, ge=0, le=1_000_000_000, description="free disk under the data dir, MiB")
    labels: dict[ShortWord, Annotated[str, Field(max_length=200)]] = Field(
        default_factory=dict, max_length=32, description="labels the node must carry"
    )
    node: ShortWord | None = Field(None, description="the id of the only node that may run it")
    not_labels: dict[ShortWord, Annotated[str, Field(max_length=200)]] = Field(
        default_factory=dict, max_length=32, description="labels the node must not carry with these values"
    )
    anti_affinity: ShortWord | None = Field(None, description="at most one job in progress with this word on a node")

    @model_validator(mode="after")
    def _share_is_of_one_gpu(self) -> Requires:
        if self.gpu_share < 1 and self.gpus != 1:
            raise ValueError("gpu_share: below 1 it needs gpus: 1")
        for name, value in self.not_labels.items():
            if self.labels.get(name) == value:
                raise ValueError(f"not_labels: {name}={value} is asked for in labels as well: no node could have it")
        return self

    def demands(self) -> dict[str, Any]:
        """These requirements, defaults left out."""
        return self.model_dump(exclude_defaults=True)


class JobSpec(Closed):
    """One job as its author writes it (DESIGN §5). ``None`` means: take the kind's default."""

    kind: ShortWord = "command"
    command: Annotated[list[Argument], BeforeValidator(_command), Field(min_length=1, max_length=1000)] | None = None
    params: dict[ShortWord, Scalar] = Field(default_factory=dict, max_length=100)
    requires: Requires | None = None
    priority: Annotated[Whole, Field(ge=0, le=100)] | None = None
    group: ShortWord = "default"
    timeout_seconds: Annotated[Number, Field(gt=0, le=30 * 86_400)] | None = None
    max_attempts: Annotated[Whole, Field(ge=1, le=100)] | None = None
    retry_backoff_seconds: Annotated[Number, Field(ge=0, le=600)] | None = None
    depends_on: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field(default_factory=list, max_length=1000)
    unique_key: Annotated[Text, Field(min_length=1, max_length=200)] | None = None
    not_before: Annotated[Number, BeforeValidator(_unix_seconds), Field(ge=0, le=32_503_680_000)] | None = None
    nodes: Whole = Field(1, ge=1, le=1000)
    env: dict[str, Argument] = Field(default_factory=dict, max_length=200)
    cwd: Annotated[Text, Field(min_length=1, max_length=4096)] | None = None
    grace_seconds: Annotated[Number, Field(ge=0, le=3600)] | None = None
    fence: Literal["attempt", "strict"] = "attempt"
    preemptible: bool | None = None
    no_retry_exit_codes: ExitCodes | None = None
    array: Annotated[str, Field(max_length=1_000), AfterValidator(_indexes)] | None = None

    @model_validator(mode="after")
    def _check_names(self) -> JobSpec:
        for name in self.env:
            if not ENV_NAME.fullmatch(name):
                raise ValueError(f"env: {name[:40]!r} is not an environment variable's name")
            if RESERVED_ENV.match(name):
                raise ValueError(f"env: {name[:40]!r} is set by the node and cannot be given")
        if self.cwd is not None and not self.cwd.startswith("/"):
            raise ValueError("cwd: must be an absolute path")
        if self.array is not None and "array_index" in self.params:
            raise ValueError("params: array_index is set by the array and cannot be given")
        if self.kind == "command" and self.command is None:
            raise ValueError("command: a job of kind 'command' needs a command")
        return self
