"""Which change of voters is due now: at most one, and never one that could cost a majority (DESIGN §3). Pure.

Order of the rules: finish what is under way (promote a learner that has caught up, drop one that has died); replace
what is broken (a voter with another disk, one that lost what it had acknowledged, one dead for long); then grow to
`target`. A dead voter is removed first and replaced after (PROTOCOL §2.24), but only if those that are left are a
majority and somebody is there to take its place. Voters that are well are never taken away: that is an operator's
order.

Two voters survive no failure, and there are two ways to have one (PROTOCOL §2.12): an even number of voters is passed
through only when the next one stands ready. A cluster of two boxes has one voter and one learner, which holds a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from p2p.effects import Config
from p2p.ids import VoterId, node_of
from p2p.quorum import majority

CATCH_UP_SECONDS = 0.6  # a learner is promoted when its last round of replication took less than an election timeout
LEARNER_GAP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Seconds. See `config.settings.ClusterSettings`."""

    target: int = 3
    steady: float = 30.0
    young_steady: float = 5.0
    replace_dead_after: float = 600.0
    round_seconds: float = CATCH_UP_SECONDS


class Member(NamedTuple):
    """A member as gossip knows it. `alive_for` is 0 while it is not alive, `dead_for` while it is."""

    voter: VoterId
    alive_for: float
    dead_for: float
    dialable: bool
    wish: bool | None  # True: asks to vote; False: never votes
    priority: int
    zone: str


class Follower(NamedTuple):
    """A voter or learner as the leader knows it."""

    voter: VoterId
    gap: int  # entries it lacks
    contact_age: float
    round_seconds: float
    regressed: bool


class Change(NamedTuple):
    """The next configuration, and why in a sentence."""

    config: Config
    why: str


def decide(
    me: VoterId, config: Config, members: Sequence[Member], followers: Sequence[Follower], policy: Policy
) -> Change | None:
    """The leader's next change of voters, or None. `followers` does not hold the leader itself."""
    known = {member.voter: member for member in members}
    seen = {follower.voter: follower for follower in followers}
    return (
        _finish_learners(config, known, seen, policy)
        or _remove_broken(me, config, known, seen, policy)
        or _grow(config, known, policy)
    )


def _finish_learners(
    config: Config, known: dict[VoterId, Member], seen: dict[VoterId, Follower], policy: Policy
) -> Change | None:
    ready: list[VoterId] = []
    for learner in config.learners:
        member, follower = known.get(learner), seen.get(learner)
        if member is not None and member.wish is False:
            return Change(_without(config, learner), f"{node_of(learner)} is not to vote any more")
        gone = member is None or member.alive_for <= 0
        if _other_disk(learner, known) or (gone and (follower is None or follower.contact_age > policy.young_steady)):
            return Change(_without(config, learner), f"{node_of(learner)} is gone before it had caught up")
        if follower is None or follower.regressed or gone:
            continue
        if follower.gap <= LEARNER_GAP and follower.round_seconds < policy.round_seconds:
            ready.append(learner)
    odd = len(config.voters) % 2 == 0
    asked = [learner for learner in ready if known[learner].wish is True]
    if not ready or len(config.voters) >= _wanted(config, known, policy) or not (odd or len(ready) > 1 or asked):
        return None
    first = (asked or ready)[0]
    voters = tuple(sorted((*config.voters, first)))
    return Change(Config(voters, tuple(v for v in config.learners if v != first)), f"{node_of(first)} has caught up")


def _remove_broken(
    me: VoterId, config: Config, known: dict[VoterId, Member], seen: dict[VoterId, Follower], policy: Policy
) -> Change | None:
    for voter in sorted(config.voters, key=lambda v: v == me):  # the leader last: it goes with its own removal
        member, follower = known.get(voter), seen.get(voter)
        if voter == me and (member is None or member.wish is not False):
            continue
        if follower is not None and follower.regressed:
            why = "has lost entries that it had acknowledged"
        elif _other_disk(voter, known):
            why = "came back with another disk"
        elif member is not None and member.wish is False:
            why = "is not to vote any more"
        elif _dead_for(member, follower) >= policy.replace_dead_after and _candidates(config, known, policy):
            why = f"has been dead for {_dead_for(member, follower):.0f} s"
        else:
            continue
        left = [v for v in config.voters if v != voter]
        well = sum(v == me or (v in seen and seen[v].contact_age < policy.young_steady) for v in left)
        if left and well >= majority(len(left)):
            return Change(_without(config, voter), f"{node_of(voter)} {why}")
    return None


def _dead_for(member: Member | None, follower: Follower | None) -> float:
    """Both gossip and the journal must have missed it for that long; a member long forgotten is dead for ever."""
    silent = follower.contact_age if follower is not None else float("inf")
    return min(silent, member.dead_for if member is not None else float("inf"))


def _wanted(config: Config, known: dict[VoterId, Member], policy: Policy) -> int:
    """How many voters there shall be: the target, or as many as ask to vote, an odd number and at most seven."""
    asking = min(sum(m.wish is True and (m.alive_for > 0 or v in config.voters) for v, m in known.items()), 7)
    return max(policy.target, asking if asking % 2 else asking - 1)


def _grow(config: Config, known: dict[VoterId, Member], policy: Policy) -> Change | None:
    found = _candidates(config, known, policy)
    if not found or len(config.everyone) >= _wanted(config, known, policy):
        return None
    zones = {known[v].zone for v in config.everyone if v in known and known[v].zone}
    best = max(found, key=lambda m: (m.wish is True, bool(m.zone) and m.zone not in zones, m.priority, m.alive_for))
    learners = tuple(sorted((*config.learners, best.voter)))
    return Change(Config(config.voters, learners), f"{node_of(best.voter)} is to become a voter")


def _candidates(config: Config, known: dict[VoterId, Member], policy: Policy) -> list[Member]:
    """Steady members that may become voters. At most one voter may be undiallable (PROTOCOL §2.13)."""
    steady = policy.young_steady if len(config.voters) < policy.target else policy.steady
    hidden = any(not known[v].dialable for v in config.everyone if v in known)
    return [
        member
        for voter, member in known.items()
        if voter not in config.everyone
        and member.wish is not False
        and member.alive_for >= steady
        and (member.dialable or (member.wish is True and not hidden))
    ]


def _other_disk(voter: VoterId, known: dict[VoterId, Member]) -> bool:
    """Whether the node is alive under another disk id: the old one is gone for good."""
    if voter in known:
        return False
    return any(node_of(v) == node_of(voter) and member.alive_for > 0 for v, member in known.items())


def _without(config: Config, voter: VoterId) -> Config:
    return Config(tuple(v for v in config.voters if v != voter), tuple(v for v in config.learners if v != voter))
