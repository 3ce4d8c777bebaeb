"""Who has had how much: fair share between groups, floors between kinds. Pure: time is an argument.

A group's use is the part of the cluster its running jobs hold now (of the resource they hold most of: dominant resource
fairness, Ghodsi et al., NSDI 2011) plus the part it held lately, an average that halves every `half_life_ms`. The
memory is what makes the shares come out where only one job can run at a time: when its slot falls free nobody holds
anything. The group that has had least for its weight goes first, so one that has had nothing is never passed over.

A kind whose part of all use is below its floor goes before the other kinds of its group, whatever their priorities: of
an endless stream of urgent work something is always left for the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

HALF_LIFE_MS = 600_000
FLOOR = 0.05


@dataclass(slots=True)
class _Use:
    now: float = 0.0  # held at this moment
    lately: float = 0.0
    at: int = 0

    def upto(self, now: int, half_life_ms: float) -> float:
        """Carries the average on to `now`; the use that counts."""
        if now > self.at:
            kept = 0.5 ** ((now - self.at) / half_life_ms)
            self.lately = self.lately * kept + self.now * (1 - kept)
            self.at = now
        return self.now + self.lately


class Shares:
    """Use by group and by kind, in parts of the cluster. `weights` and `floors` name the exceptions to 1 and FLOOR."""

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        floors: Mapping[str, float] | None = None,
        half_life_ms: int = HALF_LIFE_MS,
    ) -> None:
        self.weights, self.floors, self._half_life_ms = dict(weights or {}), dict(floors or {}), half_life_ms
        self._groups: defaultdict[str, _Use] = defaultdict(_Use)
        self._kinds: defaultdict[str, _Use] = defaultdict(_Use)

    def add(self, group: str, kind: str, part: float, now: int) -> None:
        """A job of this group and kind holds so much of the cluster from now on (or, if negative, no more)."""
        for use in (self._groups[group], self._kinds[kind]):
            if now > use.at:
                use.upto(now, self._half_life_ms)
            held = use.now + part
            use.now = held if held > 0.0 else 0.0

    def of_group(self, group: str, now: int, less: float = 0.0) -> float:
        """What the group has had for its weight; `less`: but for this part that it holds now."""
        return (self._groups[group].upto(now, self._half_life_ms) - less) / max(self.weights.get(group, 1.0), 1e-9)

    def kinds_below_floor(self, kinds: set[str], now: int) -> set[str]:
        """Those of `kinds`, and of the kinds that have had anything, that have had less than their floor of all use."""
        uses = {kind: use.upto(now, self._half_life_ms) for kind, use in self._kinds.items()}
        total = sum(uses.values())
        return {kind for kind in kinds | uses.keys() if uses.get(kind, 0.0) < self.floors.get(kind, FLOOR) * total}

    def groups(self, now: int) -> dict[str, float]:
        """Each group's part of all use, for people."""
        uses = {group: use.upto(now, self._half_life_ms) for group, use in self._groups.items()}
        total = sum(uses.values())
        return {group: use / total for group, use in uses.items()} if total > 0 else {}

    def forget_idle(self, now: int) -> None:
        """Drops groups and kinds that have long had nothing: their names are the caller's to make up."""
        for book in (self._groups, self._kinds):
            for name in [name for name, use in book.items() if use.upto(now, self._half_life_ms) < 1e-6]:
                del book[name]
