"""The kinds of jobs a cluster knows, from ``config/jobs.yaml``: templates, defaults, and how full to keep the queue.

Decides what a `JobSpec` that names a kind becomes. What the populator adds is `coordination.population`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError

from coordination.arrays import PLACEHOLDER
from coordination.commands import MAX_SCHEDULES
from coordination.errors import InvalidInput
from coordination.job import Argument, Closed, ExitCodes, JobSpec, Number, Requires, Scalar, ShortWord, Whole
from coordination.schedules import Schedule
from coordination.validation import first_problem

MAX_TIMEOUT_SECONDS = 3650 * 86_400  # ten years: long enough for "never", and milliseconds of it fit a database
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


class Populate(Closed):
    """How the populator keeps one kind stocked."""

    pending: Whole = Field(..., ge=0, le=100_000, description="unfinished jobs of this kind to keep in the queue")
    total: Whole | None = Field(None, ge=0, description="stop after this many were ever submitted; absent = for ever")
    every_seconds: Number = Field(0.0, ge=0, description="at least this long between two fillings of this kind")
    vary: dict[ShortWord, Annotated[list[Scalar], Field(min_length=1)]] = Field(
        default_factory=dict, description="params cycled through, job by job"
    )
    seed_param: ShortWord | None = Field(None, description="param that gets a new whole number in each job")


class Kind(Closed):
    """One kind: the template of its command and the defaults of its jobs."""

    description: str = ""
    aliases: list[ShortWord] = Field(default_factory=list)
    command: list[Argument] | None = None
    params: dict[ShortWord, Scalar] = Field(default_factory=dict)
    requires: Requires = Requires()
    priority: Annotated[Whole, Field(ge=0, le=100)] = 50
    timeout_seconds: Annotated[Number, Field(gt=0, le=MAX_TIMEOUT_SECONDS)] | None = None
    max_attempts: Annotated[Whole, Field(ge=1, le=100)] = 3
    retry_backoff_seconds: Annotated[Number, Field(ge=0, le=600)] = 10.0
    grace_seconds: Annotated[Number, Field(ge=0, le=3600)] = 30.0
    env: dict[str, Argument] = Field(default_factory=dict)
    prefer: Literal["gpus", "memory"] | None = Field(
        None, description="nodes its jobs go to first: gpus = those with GPUs, memory = those with the most memory"
    )
    floor: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="part of all use below which this kind goes before the others of its group"
    )
    preemptible: bool = Field(True, description="whether more urgent work may take its place; it is asked to end first")
    no_retry_exit_codes: ExitCodes = Field(
        default_factory=list,
        description="exit codes that fail a job at once, whatever attempts are left; a-b = a range",
    )
    populate: Populate | None = None


class Catalogue(Closed):
    """``config/jobs.yaml`` as a whole."""

    kinds: dict[ShortWord, Kind]
    schedules: dict[ShortWord, Schedule] = Field(default_factory=dict, max_length=MAX_SCHEDULES)


class Kinds:
    """Looks kinds up by name or alias and fills their templates."""

    def __init__(
        self,
        kinds: Mapping[str, Kind],
        environment: Mapping[str, str] | None = None,
        schedules: Mapping[str, Schedule] | None = None,
    ) -> None:
        self.by_name = dict(kinds)
        self.schedules = dict(schedules or {})
        self.by_name.setdefault("command", Kind(description="any command line"))
        self._environment = os.environ if environment is None else environment
        self._names = {name: name for name in self.by_name}
        for name, kind in self.by_name.items():
            for alias in kind.aliases:
                if alias in self._names:
                    raise InvalidInput(f"kinds.{name}.aliases", f"{alias!r} is already the name of a kind")
                self._names[alias] = name
            self.timeout_seconds(name)  # a bad override is told at start, not at the first job

    @classmethod
    def load(cls, path: Path | None, environment: Mapping[str, str] | None = None) -> Kinds:
        """Reads a jobs.yaml; None means no kinds but `command`. Raises InvalidInput naming the field and the file."""
        if path is None:
            return cls({}, environment)
        try:
            body = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidInput(str(path), f"cannot be read: {error.strerror}") from None
        except yaml.YAMLError as error:
            raise InvalidInput(str(path), f"is not YAML: {error}") from None
        try:
            catalogue = Catalogue.model_validate(body)
            return cls(catalogue.kinds, environment, catalogue.schedules)
        except ValidationError as error:
            field, detail = first_problem(error, Catalogue)
            raise InvalidInput(f"{path}: {field}", detail) from None

    def canonical(self, name: str) -> str:
        """The kind's own name. Raises InvalidInput with the nearest known one."""
        found = self._names.get(name)
        if found is None:
            near = difflib.get_close_matches(name, self._names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known kinds: {', '.join(sorted(self.by_name))}"
            raise InvalidInput("kind", f"there is no kind {name!r}{hint}")
        return found

    def timeout_seconds(self, name: str) -> float | None:
        """The kind's default timeout; ``RINGRIFT_<KIND>_TIMEOUT`` (seconds) overrides it, under the kind's own name or
        one of its aliases, in that order."""
        names = (name, *self.by_name[name].aliases)
        variables = [f"RINGRIFT_{re.sub(r'[^A-Za-z0-9]', '_', each).upper()}_TIMEOUT" for each in names]
        variable = next((each for each in variables if each in self._environment), None)
        if variable is None:
            return self.by_name[name].timeout_seconds
        text = self._environment[variable]
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds <= MAX_TIMEOUT_SECONDS:
            most = f"at most {MAX_TIMEOUT_SECONDS}"
            raise InvalidInput(variable, f"must be a positive number of seconds, {most}, not {text!r}")
        return seconds

    def command(self, spec: JobSpec, name: str) -> list[str]:
        """The argument list of a job: its own or its kind's template, with ``{param}`` filled in.

        In a kind's template every placeholder must be filled and every param must be used or have a default; in a
        job's own command only the params it gives are replaced, so that braces in JSON arguments stay as they are.
        ``{array_index}`` of an array is filled when its members are made.
        """
        kind = self.by_name[name]
        if spec.command is not None:
            own = {key: _text(value) for key, value in spec.params.items()}
            return [_PLACEHOLDER.sub(lambda m: own.get(m[1], m[0]), part) for part in spec.command]
        if kind.command is None:
            raise InvalidInput("command", f"kind {name!r} has no command of its own, so the job must give one")
        placeholders = {m for part in kind.command for m in _PLACEHOLDER.findall(part)}
        known = placeholders | set(kind.params)
        for key in spec.params:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(sorted(known)) or 'none'}"
                raise InvalidInput(f"params.{key}", f"kind {name!r} has no such param{hint}")
        values = {**kind.params, **spec.params}
        if spec.array is not None:
            values["array_index"] = PLACEHOLDER  # it stays one until a member is made
        for key in sorted(placeholders):
            if key not in values:
                raise InvalidInput(f"params.{key}", f"kind {name!r} needs it")
        return [_PLACEHOLDER.sub(lambda m: _text(values[m[1]]), part) for part in kind.command]


def _text(value: str | bool | int | float) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
