"""Counting one round of votes. Decides nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from p2p.ids import Term, VoterId
from p2p.quorum import majority


class Ballot:
    """One question asked of all voters: `term` is the term stood for; `real` tells a vote from a pre-vote. Only the
    voters that were asked count, each once."""

    def __init__(self, term: Term, voters: Sequence[VoterId], *, real: bool) -> None:
        self.term, self.voters, self.real = term, tuple(voters), real
        self.granted: set[VoterId] = set()
        self.refused: dict[VoterId, str] = {}

    def count(self, voter: VoterId, granted: bool, reason: str = "") -> None:
        if voter not in self.voters:
            return
        if granted:
            self.granted.add(voter)
            self.refused.pop(voter, None)
        elif voter not in self.granted:
            self.refused[voter] = reason

    @property
    def won(self) -> bool:
        return len(self.granted) >= majority(len(self.voters))

    @property
    def lost(self) -> bool:
        """Even if all who are silent granted, it would be no majority."""
        return len(self.voters) - len(self.refused) < majority(len(self.voters))
