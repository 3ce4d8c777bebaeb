"""What a core asks its driver to do. Cores return these; only `p2p.driver` carries them out, in this order:
persist, then (once durable) tell the core, then apply, then answer (the four duties of etcd-io/raft's ``doc.go``)."""

from __future__ import annotations

from dataclasses import dataclass

from p2p.ids import Index, NodeId, Term


@dataclass(frozen=True, slots=True)
class HardState:
    """What a voter must never forget: fsynced before any answer that depends on it (Raft §5.1)."""

    term: Term
    voted_for: NodeId | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One journal entry. `body` is opaque here; empty is a leader's no-op."""

    index: Index
    term: Term
    body: bytes


@dataclass(frozen=True, slots=True)
class Persist:
    """Write these durably, in one fsync. `acked_floor` is the highest index known to have been acknowledged."""

    entries: tuple[Entry, ...]
    hard_state: HardState | None
    acked_floor: Index


@dataclass(frozen=True, slots=True)
class Apply:
    """Everything up to `upto` is committed: apply it in order and answer those who proposed it."""

    upto: Index


Effect = Persist | Apply
