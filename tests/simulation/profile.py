"""What one schedule is made of: drawn from its seed, each fault in or out by the toss of a coin (Groce et al., "Swarm
Testing", ISSTA 2012: a random subset of features finds more than all of them at once).
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field, replace
from typing import Any

# kind -> (mean seconds between two of them, at intensity 1). See nemesis.py for what each does.
FAULTS: dict[str, float] = {
    "kill": 2.5,
    "power": 3.0,
    "freeze": 2.5,
    "slow_loop": 3.0,
    "clock_rate": 3.0,
    "wall_jump": 2.0,
    "disk_slow": 2.5,
    "disk_hang": 2.5,
    "disk_full": 6.0,
    "wipe": 5.0,
    "restore": 6.0,
    "isolate": 2.5,
    "split": 2.5,
    "one_way": 2.0,
    "bridge": 3.0,
    "partial": 2.5,
    "loss": 2.5,
    "duplicate": 2.5,
    "reorder": 2.5,
    "slow_link": 2.0,
    "reset": 1.0,
    "transfer": 2.0,
    "unfit": 3.0,
    "members": 1.5,
    "bad_install": 2.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Times are virtual seconds. `faults` gives the intensity by kind."""

    voters: int = 3
    spares: int = 0  # nodes that are no voters at first
    chaos: float = 8.0  # how long faults happen
    faults: dict[str, float] = field(default_factory=dict)
    clients: int = 2
    workers: int = 2
    think: float = 0.05  # mean seconds between a client's requests
    reads: float = 0.3  # the share of them that are reads
    delay: float = 0.001  # one way, at least
    jitter: float = 0.002
    fsync: float = 0.002
    apply: float = 0.0  # how long the state machine takes, at most
    snapshot_every: int = 60
    trailing: int = 10
    small: bool = False  # tiny buffers and batches, so that their edges are met
    ranks: bool = True  # priorities differ
    real_queue: bool = False
    exam: str = "any"  # one exact disturbance after the healing, see exams.py; empty: none
    torn: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Profile:
        return Profile(**values)

    def without(self, kind: str) -> Profile:
        return replace(self, faults={k: v for k, v in self.faults.items() if k != kind})


def draw(seed: int) -> Profile:
    """The profile of a seed."""
    rng = random.Random(f"profile {seed}")
    voters = rng.choice((1, 2, 3, 3, 3, 3, 3, 4, 5, 5, 5, 7))
    kinds = sorted(FAULTS)
    some = rng.sample(kinds, rng.choice((0, 1, 1, 2, 3, 4, 5, 6, 8, 10)))
    if voters == 1:
        some = [kind for kind in some if kind not in ("wipe", "restore")]
    return Profile(
        voters=voters,
        spares=rng.choice((0, 0, 1, 2)) if voters < 7 else 0,
        chaos=rng.choice((4.0, 6.0, 6.0, 8.0, 8.0, 12.0)),
        faults={kind: rng.choice((0.5, 1.0, 1.0, 2.0, 4.0)) for kind in sorted(some)},
        clients=rng.randint(1, 3),
        workers=rng.randint(0, 2),
        think=rng.choice((0.03, 0.06, 0.1, 0.2)),
        reads=rng.choice((0.1, 0.3, 0.3, 0.6)),
        delay=rng.choice((0.0005, 0.001, 0.001, 0.01, 0.03)),
        jitter=rng.choice((0.0005, 0.002, 0.005, 0.02)),
        fsync=rng.choice((0.0005, 0.002, 0.005, 0.03)),
        apply=rng.choice((0.0, 0.0, 0.0, 0.01, 0.1)),
        snapshot_every=rng.choice((15, 40, 80, 1_000)),
        trailing=rng.choice((0, 5, 20, 40)),
        small=rng.random() < 0.4,
        ranks=rng.random() < 0.7,
        real_queue=seed % 25 == 24,
        torn=rng.random() < 0.7,
    )
