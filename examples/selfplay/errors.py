"""What can go wrong in a step, as a sentence for the person who reads the job's `error`."""

from __future__ import annotations


class ExampleError(Exception):
    """The step cannot run as asked; the message is the whole explanation and names what to change. Exit code 2."""


class Stopped(Exception):
    """The step was told to stop by a signal; what it had done is in `progress.json`. Exit code 128 + signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum
