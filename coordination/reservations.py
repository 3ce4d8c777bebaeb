"""Room kept for jobs that fit nowhere yet: where and when each will start, and who may use the room until then. Pure.

A reservation is a promise. It is made once, behind those that its nodes have promised before, for the moment at which
what is in the way has ended by its limits. Until then others may use the room if they end in time by theirs, or if what
is promised fits beside them. This is backfilling (Lifka's EASY, JSSPP 1995) in its conservative form, in which every
reservation binds (Mu'alem and Feitelson, TPDS 2001); limits are enforced here, not guessed, so promises hold. Where
limits are missing the moment is unknown (`NEVER`), and only the second way is left.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from coordination.fleet import Candidate, Fleet
from coordination.occupancy import NEVER, Occupancy, Running
from coordination.placement import Need, Node


@dataclass(slots=True, kw_only=True, eq=False)
class Reservation:
    """Room for the head of a lane: by which GPUs (numbers) of which nodes, and after what."""

    lane: int
    seq: int
    need: Need
    members: dict[str, tuple[int, ...]]
    until_ms: int  # when it will fit at the latest; NEVER: nobody knows
    ends_ms: int = NEVER  # when its job will have ended
    awaited: set[Running]  # what must end first
    after: set[Reservation] = field(default_factory=set)  # what must have started and ended first
    preempts: bool = False
    looked_ms: int = 0  # when it was last looked whether this is still the place

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(self.members)


class Option(NamedTuple):
    """A node where a job will fit, after these have ended. The least is the best."""

    until_ms: int
    unknown: int  # how many must end whose end nobody knows
    elsewhere: bool  # not where the room is kept already
    name: str
    later: Node  # as it will be then
    awaited: list[Running]
    after: list[Reservation]


class Reservations:
    """By lane; on each node in the order in which they were made."""

    def __init__(self, fleet: Fleet, occupancy: Occupancy, places: dict[str, int]) -> None:
        self._fleet, self._occupancy, self._places = fleet, occupancy, places
        self.by_lane: dict[int, Reservation] = {}
        self.on: dict[str, list[Reservation]] = {}

    # -- made and dropped -------------------------------------------------------------------------------------------

    def keep(self, kept: Reservation, *, first: bool = False) -> None:
        """Instead of the lane's former one; in its place where that was on the same nodes."""
        former = self.by_lane.get(kept.lane)
        if former is not None and former.members.keys() == kept.members.keys() and not first:
            for name in kept.members:
                on = self.on[name]
                on[on.index(former)] = kept
                for other in on:
                    if former in other.after:
                        other.after.remove(former)
                        other.after.add(kept)
        else:
            self.drop(kept.lane)
            for name in kept.members:
                on = self.on.setdefault(name, [])
                on.insert(0 if first else len(on), kept)
        self.by_lane[kept.lane] = kept

    def drop(self, lane: int) -> None:
        kept = self.by_lane.pop(lane, None)
        if kept is None:
            return
        for name in kept.members:
            left = [other for other in self.on[name] if other is not kept]
            for other in left:
                other.after.discard(kept)
            if left:
                self.on[name] = left
            else:
                del self.on[name]

    def started(self, lane: int, attempts: Iterable[Running]) -> None:
        """The job that room was kept for runs: who waited for it to start and end waits for it to end."""
        kept = self.by_lane.get(lane)
        if kept is not None:
            for attempt in attempts:
                for other in self.on.get(attempt.node, ()):
                    if kept in other.after:
                        other.awaited.add(attempt)
            self.drop(lane)

    def ended(self, attempt: Running) -> None:
        for kept in self.on.get(attempt.node, ()):
            kept.awaited.discard(attempt)

    # -- where and when ---------------------------------------------------------------------------------------------

    def look(
        self, lane: int, seq: int, need: Need, bound_ms: int, now: int, *, behind: bool = False
    ) -> Reservation | None:
        """Room where the job will fit soonest, as things stand; None if it never will: what is in its way is not ours
        to wait for. A node is kept for one job at a time, so that whose turn is next is decided as late as it can be;
        `behind`: or for one more, after that."""
        own = self.by_lane.get(lane)
        best: list[Option] = []
        for node in self._fleet.nodes.values():
            on = self.on.get(node.name)
            if on is not None and not behind and on[0] is not own:
                continue
            if node.admits(need) is not None:
                full = len(best) == need.nodes
                option = self._soonest(node, need, now, best[-1].until_ms if full else NEVER, own)
                if option is not None:
                    insort(best, option, key=lambda option: option[:4])
                    del best[need.nodes :]
        if len(best) < need.nodes:
            return None
        until = max(option.until_ms for option in best)
        return Reservation(
            lane=lane,
            seq=seq,
            need=need,
            members={option.name: self._gpus(need, option.later) for option in best},
            until_ms=until,
            ends_ms=until + bound_ms if bound_ms and until < NEVER else NEVER,
            awaited={attempt for option in best for attempt in option.awaited},
            after={kept for option in best for kept in option.after},
            looked_ms=now,
        )

    @staticmethod
    def _enough_at(node: Node, need: Need, ending: list[Running], latest: int) -> bool:
        """Whether so much will have ended by `latest` that the sums would do: most nodes need no closer look."""
        cpu, memory, gpu = node.cpu_milli, node.memory_mb, sum(gpu.share for gpu in node.gpus)
        for attempt in ending:
            if attempt.ends_ms > latest:
                break
            theirs = attempt.need
            cpu, memory, gpu = cpu + theirs.cpu_milli, memory + theirs.memory_mb, gpu + theirs.gpus * theirs.share
        return cpu >= need.cpu_milli and memory >= need.memory_mb and gpu >= need.gpu_milli

    def _gpus(self, need: Need, node: Node) -> tuple[int, ...]:
        free = node.fitting(need)
        assert free is not None
        return self._fleet.score(need, node, free)[1]

    def _soonest(self, node: Node, need: Need, now: int, latest: int, own: Reservation | None) -> Option | None:
        """The node once enough has ended; None if that never happens, or after `latest`. What is promised to others
        counts as taken from now on until it will have ended, so that it stays where it is."""
        name = node.name
        others = self.on.get(name, [])
        mine = own is not None and name in own.members
        if mine and own is not None:
            others = others[: others.index(own)]
        places = self._places.get(name, 0) - len(others)
        if not others and places > 0 and node.fitting(need) is not None:
            return Option(now, 0, not mine, name, node, [], [])  # it is not open at this moment
        ending = self._occupancy.ending(name)
        if not others and not self._enough_at(node, need, ending, latest):
            return None
        later = node.copy()
        for kept in others:
            later.take(kept.need, kept.members[name])
        steps: list[Running | Reservation] = sorted([*ending, *others], key=lambda step: step.ends_ms)
        awaited: list[Running] = []
        after: list[Reservation] = []
        until, unknown = now, 0
        while later.fitting(need) is None or places <= 0:
            if not steps or steps[0].ends_ms > latest:
                return None
            step = steps.pop(0)
            if isinstance(step, Running):
                later.give(step.need, later.numbers(step.gpus))
                awaited.append(step)
            else:
                later.give(step.need, step.members[name])
                after.append(step)
            places += 1
            until = max(until, step.ends_ms)
            unknown += not now <= step.ends_ms < NEVER  # what should have ended may take any time
        return Option(until, unknown, not mine, name, later, awaited, after)

    # -- who may use the room until then ------------------------------------------------------------------------------

    def usable(
        self,
        candidate: Candidate,
        need: Need,
        lane: int,
        now: int,
        bound_ms: int,
        passes: Callable[[Reservation], bool],
    ) -> Candidate | None:
        """The candidate, perhaps with other GPUs, if serving the need there makes no reserved job later; None if it
        would. `passes` says whose promises do not count."""
        on = self.on.get(candidate.name)
        if on is None:
            return candidate
        own = self.by_lane.get(lane)
        before = on[: on.index(own)] if own is not None and own in on else on

        def ends_first(kept: Reservation) -> bool:
            return bool(bound_ms) and now + bound_ms <= kept.until_ms < NEVER

        binding = [kept for kept in before if not (ends_first(kept) or passes(kept))]
        if own is not None and own in on:
            # It may come early, but by other GPUs than were kept for it only if that makes nobody behind it late.
            behind = [kept for kept in on[len(before) + 1 :] if own not in kept.after and not ends_first(kept)]
            for gpus in (candidate.gpus, own.members[candidate.name]):
                if self._leaves_room(candidate.name, need, gpus, [*binding, *behind], own):
                    return candidate._replace(gpus=gpus)
            if now < own.until_ms:
                return None
        if self._leaves_room(candidate.name, need, candidate.gpus, binding, own):
            return candidate
        if not need.gpus:
            return None
        node, promised = (
            self._fleet.nodes[candidate.name],
            {n for kept in binding for n in kept.members[candidate.name]},
        )
        free = [n for n in node.fitting(need) or () if n not in promised]
        if len(free) < need.gpus:
            return None
        gpus = self._fleet.score(need, node, free)[1]
        return candidate._replace(gpus=gpus) if self._leaves_room(candidate.name, need, gpus, binding, own) else None

    def _leaves_room(
        self, name: str, need: Need, gpus: tuple[int, ...], binding: Iterable[Reservation], own: Reservation | None
    ) -> bool:
        node = self._fleet.nodes[name]
        free = node.fitting(need)
        if free is None or not set(gpus).issubset(free):
            return False
        for kept in binding:
            later, places = self._when_it_starts(kept, name, own)
            later.take(need, gpus)
            free = later.fitting(kept.need)
            if places < 2 or free is None or not set(kept.members[name]).issubset(free):
                return False
        return True

    def _when_it_starts(self, kept: Reservation, name: str, own: Reservation | None) -> tuple[Node, int]:
        """The node and its places then, but for the reserved job itself and for what `own` keeps."""
        node, places = self._fleet.nodes[name].copy(), self._places.get(name, 0)
        for attempt in self._occupancy.on(name):
            if attempt in kept.awaited or attempt.ends_ms <= kept.until_ms < NEVER:
                node.give(attempt.need, node.numbers(attempt.gpus))
                places += 1
        for earlier in self.on[name]:
            if earlier is kept:
                break
            if earlier is not own and earlier not in kept.after:
                node.take(earlier.need, earlier.members[name])
                places -= 1
        return node, places
