"""From the body of ``POST /jobs`` to the jobs of a Submit command. Pure but for the ids and the time it is given.

Decides whether a submission is acceptable as it stands; what only the queue can know (does a dependency exist, is a
unique key taken) is decided by `queue_state` when the command is applied.
"""

from __future__ import annotations

import json
import secrets
import struct
from typing import Any

from pydantic import ValidationError

from coordination.arrays import MAX_ARRAY_BYTES, parse
from coordination.commands import NewJob
from coordination.errors import InvalidInput
from coordination.job import MAX_BATCH_JOBS, MAX_JOB_BYTES, JobSpec, exit_codes
from coordination.kinds import Kinds
from coordination.lane import LaneKey, lane_text
from coordination.validation import first_problem, join

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u to misread over the phone


def new_id(now_ms: int, random_bits: int | None = None) -> str:
    """A job id: 9 characters of time (so ids sort by age and index well), then 60 random bits, base 32."""
    number = (now_ms << 60) | (secrets.randbits(60) if random_bits is None else random_bits)
    return "".join(_ALPHABET[(number >> shift) & 31] for shift in range(100, -1, -5))


class Submission:
    """One request's jobs on their way in. Use: `add` each body, then `finish`."""

    def __init__(self, kinds: Kinds, now_ms: int, *, batch: bool) -> None:
        self._kinds = kinds
        self._now_ms = now_ms
        self._batch = batch
        self._jobs: list[NewJob] = []
        self._bits: list[int] = []

    def _random_bits(self) -> int:
        """60 of them. Drawn for as many jobs as have come so far: a system call for each id was a quarter of what the
        leader spent on a job."""
        if not self._bits:
            many = min(max(len(self._jobs), 1), 512)
            self._bits = [word >> 4 for (word,) in struct.iter_unpack("<Q", secrets.token_bytes(8 * many))]
        return self._bits.pop()

    def add(self, body: Any) -> None:
        """Validates one job. Raises InvalidInput; its field is prefixed with ``jobs[n]`` in a batch."""
        n = len(self._jobs)
        prefix = join("jobs", n) if self._batch else ""
        if n >= MAX_BATCH_JOBS:
            raise InvalidInput("jobs", f"at most {MAX_BATCH_JOBS} jobs a batch")
        try:
            spec = JobSpec.model_validate(body)
        except ValidationError as error:
            raise InvalidInput(*first_problem(error, JobSpec, prefix=prefix)) from None
        try:
            self._jobs.append(self._resolve(spec))
        except InvalidInput as error:
            raise InvalidInput(join(prefix, error.field), error.detail) from None

    def _resolve(self, spec: JobSpec) -> NewJob:
        kinds = self._kinds
        name = kinds.canonical(spec.kind)
        kind = kinds.by_name[name]
        default_timeout = kinds.timeout_seconds(name)
        timeout = spec.timeout_seconds if spec.timeout_seconds is not None else default_timeout
        requires = spec.requires if spec.requires is not None else kind.requires
        backoff = spec.retry_backoff_seconds
        carried: dict[str, Any] = {"command": kinds.command(spec, name)}
        if spec.params:
            carried["params"] = spec.params
        if kind.env or spec.env:
            carried["env"] = {**kind.env, **spec.env}
        if spec.cwd is not None:
            carried["cwd"] = spec.cwd
        carried["grace_seconds"] = spec.grace_seconds if spec.grace_seconds is not None else kind.grace_seconds
        if spec.depends_on:
            carried["depends_on"] = spec.depends_on
        if spec.fence != "attempt":
            carried["fence"] = spec.fence
        preemptible = spec.preemptible if spec.preemptible is not None else kind.preemptible
        if not preemptible:
            carried["preemptible"] = False
        if spec.nodes > 1:
            carried["nodes"] = spec.nodes
        timeout_ms = max(round(timeout * 1000), 1) if timeout is not None else 0  # 0 means: none
        bound_ms = timeout_ms + round(carried["grace_seconds"] * 1000) if timeout_ms else 0
        key = LaneKey(spec.group, name, bound_ms, preemptible)
        shape = lane_text(requires.demands(), key, nodes=spec.nodes, prefer=kind.prefer)
        encoded = json.dumps(carried, separators=(",", ":")).encode()
        if len(encoded) > MAX_JOB_BYTES:
            raise InvalidInput("", f"a job is at most {MAX_JOB_BYTES} bytes; this one is {len(encoded)}")
        if spec.array is not None:
            size = parse(spec.array).size
            if size * len(encoded) > MAX_ARRAY_BYTES:
                raise InvalidInput(
                    "array",
                    f"{size} members may carry {MAX_ARRAY_BYTES // size} bytes each; this one's carry {len(encoded)}: "
                    "put long data into a file that they read",
                )
        return NewJob(
            id=new_id(self._now_ms, self._random_bits()),
            kind=name,
            group=spec.group,
            priority=spec.priority if spec.priority is not None else kind.priority,
            requires=shape,
            max_attempts=spec.max_attempts if spec.max_attempts is not None else kind.max_attempts,
            backoff_ms=round((backoff if backoff is not None else kind.retry_backoff_seconds) * 1000),
            timeout_ms=timeout_ms,
            not_before_ms=round(spec.not_before * 1000) if spec.not_before is not None else 0,
            unique_key=spec.unique_key,
            depends_on=tuple(spec.depends_on),
            spec=encoded,
            no_retry=exit_codes(
                spec.no_retry_exit_codes if spec.no_retry_exit_codes is not None else kind.no_retry_exit_codes
            ),
            array=spec.array or "",
        )

    def finish(self) -> tuple[NewJob, ...]:
        """The jobs in the order given, dependencies by id.

        Within a batch ``"#3"`` names the batch's job number 3, which must come before the one that names it: any
        acyclic graph can be written so, and no cyclic one can. Raises InvalidInput otherwise.
        """
        return tuple(self._with_ids(n, job) if job.depends_on else job for n, job in enumerate(self._jobs))

    def _with_ids(self, n: int, job: NewJob) -> NewJob:
        deps = tuple(
            self._jobs[self._earlier(n, at, dep)].id if dep.startswith("#") else dep
            for at, dep in enumerate(job.depends_on)
        )
        if deps == job.depends_on:
            return job
        carried = {**json.loads(job.spec), "depends_on": deps}
        return job._replace(depends_on=deps, spec=json.dumps(carried, separators=(",", ":")).encode())

    def _earlier(self, n: int, at: int, dep: str) -> int:
        """The number in ``"#3"``, checked."""
        field = join(*(("jobs", n) if self._batch else ()), "depends_on", at)
        if not self._batch:
            raise InvalidInput(field, '"#n" names another job of the same batch; this is a single job')
        digits = dep[1:]
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 6) or int(digits) >= len(self._jobs):
            raise InvalidInput(field, f"{dep[:20]!r} is not a job of this batch (#0 to #{len(self._jobs) - 1})")
        if int(digits) == n:
            raise InvalidInput(field, f"job #{n} depends on itself: a cycle")
        if int(digits) > n:
            raise InvalidInput(field, f"{dep} comes after job #{n}; name earlier jobs only, which keeps cycles out")
        return int(digits)
