"""The errors of the work layer. Each one's message is a sentence its reader can act on."""

from __future__ import annotations


class CoordinationError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidInput(CoordinationError):
    """The input cannot be accepted; nothing was changed. `field` names what is wrong: ``jobs[3].requires.gpus``."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}" if field else detail)
        self.field = field
        self.detail = detail


class Refused(CoordinationError):
    """The state machine refused a command; nothing was changed.

    `status` is the HTTP status it travels as: 404 unknown, 409 not in a state that allows it, 422 not acceptable,
    429 the queue is full, 507 the disk is.
    """

    def __init__(self, status: int, detail: str, *, field: str = "") -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.field = field


class NodeUnreachable(CoordinationError, ConnectionError):
    """No node answered where the operators' API looked for one."""


class OutcomeUnknown(CoordinationError):
    """The command may or may not have been committed; ask again by its idempotency key."""
