"""How long a suspect has to refute: Lifeguard's suspicion that shortens with every independent confirmation (§IV-B).

Without confirmation it lasts `most`; with `needed` confirmations, `least`; between them it falls with the logarithm of
their number, because the first confirmation says most.
"""

from __future__ import annotations

from math import log, log10

from p2p.ids import NodeId
from p2p.membership.figures import Figures


def least_seconds(members: int, figures: Figures) -> float:
    """The shortest suspicion among `members`: long enough for gossip to reach the suspect and come back."""
    return figures.suspicion_mult * max(1.0, log10(max(members, 1))) * figures.probe_interval_seconds


def remaining_share(confirmations: int, needed: int) -> float:
    """1 with no confirmation, 0 with all that are needed (memberlist's ``remainingSuspicionTime``)."""
    return 1.0 - log(confirmations + 1) / log(needed + 1) if needed else 0.0


class Suspicion:
    """One suspect's clock. `deadline` is when it is declared dead unless it refutes."""

    __slots__ = ("_accusers", "_began", "_least", "_most", "_needed")

    def __init__(self, accuser: NodeId, now: float, members: int, figures: Figures) -> None:
        needed = max(int(figures.suspicion_mult) - 2, 0)
        if not figures.lifeguard or members - 2 < needed:
            needed = 0  # too few others to confirm anything: waiting for them would only delay
        self._began = now
        self._needed = needed
        self._least = least_seconds(members, figures)
        self._most = self._least * figures.suspicion_max_mult
        self._accusers = {accuser}

    def confirm(self, accuser: NodeId) -> bool:
        """Counts another accuser; True if it is a new one that still shortens the clock (and is worth passing on)."""
        if accuser in self._accusers or self.confirmations >= self._needed:
            return False
        self._accusers.add(accuser)
        return True

    def postpone(self, seconds: float) -> None:
        """Gives the suspect time that this node itself was not there to listen."""
        self._began += seconds

    @property
    def confirmations(self) -> int:
        return len(self._accusers) - 1

    @property
    def deadline(self) -> float:
        share = remaining_share(self.confirmations, self._needed)
        return self._began + max(self._least, self._least + share * (self._most - self._least))
