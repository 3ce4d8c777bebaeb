"""When to stand, whom to grant, and how often leaders change. Sans-IO: `now` is seconds of a monotonic clock that runs
through suspend, `draw` a uniform random number in [0, 1).

Everything here is about *liveness* but two rules: a vote is refused to a candidate whose log is behind, and inside a
leader's lease. The term and the vote that must survive a crash are `p2p.replica`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from p2p.election.ballot import Ballot
from p2p.election.rank import Timers, order, rank
from p2p.ids import Term, VoterId
from p2p.messages import PreVote

REMEMBERED_CHANGES = 16
MOST_ROUNDS = 64  # beyond it the pause between two rounds grows no more
CHANGES_SECONDS = 3_600.0


class ElectionCore:
    """One voter's view of the election. `contact` is when a leader was last heard; `deadline` when to stand."""

    def __init__(self, me: VoterId, timers: Timers, draw: Callable[[], float], now: float) -> None:
        self.me, self.timers, self._draw = me, timers, draw
        self.priority = 0
        self.timeout = timers.election  # E as this leader, or this network, needs it: never less than the usual one
        self.contact = now  # a voter that has just started may have heard a leader a moment before
        self.heirs: tuple[VoterId, ...] = ()
        self.ballot: Ballot | None = None
        self.deadline = now
        self._rounds = 0
        self._asked_at = float("-inf")  # when the newest ballot was opened
        self._excused_at = float("-inf")
        self._yielded_at = float("-inf")  # when somebody higher last told this candidate to wait
        self._refused_higher: dict[VoterId, float] = {}
        self._changes: list[float] = []
        self._changed_in = Term(0)  # the term of the newest of them

    # -- when to stand -----------------------------------------------------------------------------------------

    def heard(self, now: float, heirs: Sequence[VoterId], voters: Sequence[VoterId], timeout: float = 0.0) -> None:
        """A leader lives, and asks for this election timeout."""
        self.contact = now
        self.set_timeout(timeout)
        self.heirs = tuple(heirs)
        self._rounds = 0
        self.ballot = None
        self.rest(now, voters)

    def rest(self, now: float, voters: Sequence[VoterId]) -> None:
        """Wait a whole election timeout, and then for those that should stand first."""
        t = self.timers
        turn = rank(self.me, self.heirs, voters)
        self.deadline = now + self.timeout + t.guard + t.jitter * self._draw() + t.rank_delay * turn

    def set_timeout(self, seconds: float) -> None:
        """The election timeout from now on, within its bounds (PROTOCOL §1: adaptive, only upwards)."""
        self.timeout = min(max(seconds, self.timers.election), self.timers.longest_election)

    def excuse(self, now: float) -> bool:
        """Whether the deadline that has passed is to be forgiven: this node itself was asleep, and what was sent to it
        meanwhile may still lie unread (PROTOCOL §2.15). At most once per election timeout."""
        late = now - self.deadline
        if late <= self.timers.excuse or now - self._excused_at < self.timeout:
            return False
        self._excused_at = now
        self.deadline = now + min(late, self.timeout)
        return True

    def stand(self, term: Term, voters: Sequence[VoterId], now: float, *, real: bool) -> Ballot:
        """Opens a ballot; until it is decided, or for a time that grows with every round, nothing more is tried."""
        self.ballot = Ballot(term, voters, real=real)
        if real:
            self.asked(now)
        else:
            self._asked_at = now
            self._rounds = min(self._rounds + 1, MOST_ROUNDS)
            self.deadline = now + max(self._patience() * self._draw(), self.timers.round_timeout / 2)
        return self.ballot

    def asked(self, now: float) -> None:
        """The votes of a real ballot have been asked for only now: its time begins. It differs from voter to voter:
        two that have split the votes must not ask again at the same moment (Raft §5.2)."""
        self._asked_at = now
        self.deadline = now + min(self._patience() * (1 + 0.25 * self._draw()), self.timers.longest_backoff)

    def hurry(self, now: float) -> None:
        """Somebody stands who lacks what this voter holds, and so cannot win. Others can be reached again, then: a wait
        that has grown over rounds that nobody answered is cut short."""
        t = self.timers
        earliest = max(now, self._asked_at + t.round_timeout) + t.guard + t.jitter * self._draw()
        self.deadline = min(self.deadline, earliest)

    def _patience(self) -> float:
        """How long a round may take: longer each time, so that slow disks elect a leader too."""
        t = self.timers
        least = max(t.round_timeout, self.timeout / 2)
        return float(min(least * t.backoff ** max(self._rounds - 1, 0), t.longest_backoff))

    def told_to_wait(self, now: float) -> None:
        """Somebody higher is there: give it one step of time, then stand regardless (PROTOCOL §1, Election)."""
        if now - self._yielded_at >= 2 * self.timers.rank_delay:
            self._yielded_at = now
            self.deadline = now + self.timers.rank_delay
            self.ballot = None

    # -- whom to grant -----------------------------------------------------------------------------------------

    def in_lease(self, now: float) -> bool:
        """A leader was heard less than an election timeout ago: nobody is to disturb it."""
        return now - self.contact < self.timeout

    def judge(self, asker: VoterId, ask: PreVote, *, term: Term, last: tuple[Term, int], now: float, fit: bool) -> str:
        """Why a pre-vote is refused; empty if it is granted. `last` is this voter's (last term, last index); `fit`
        whether it could stand itself."""
        if ask.next_term <= term:
            return "term"
        if self.in_lease(now):
            return "lease"
        theirs = (ask.last_term, ask.last_index)
        if theirs < last:
            return "log"
        if fit and theirs <= last and order(self.priority, self.me) > order(ask.priority, asker):
            before = self._refused_higher.get(asker, float("-inf"))
            again = 2 * self.timers.rank_delay
            if now - before > again:
                recent = {voter: at for voter, at in self._refused_higher.items() if now - at <= again}
                self._refused_higher = {**recent, asker: now}
                return "higher"
        return ""

    # -- how often the leader changed --------------------------------------------------------------------------

    def changed(self, now: float, term: Term) -> None:
        """The leader of `term` was seen; if that is news, it is a change."""
        if term == self._changed_in:
            return
        self._changed_in = term
        self._rounds = 0
        self._changes = [at for at in self._changes if now - at < CHANGES_SECONDS][-REMEMBERED_CHANGES:]
        self._changes.append(now)

    def preempt_after(self, now: float) -> float:
        """For how long a preferred voter must have been well before it is given the seat: doubles with every change of
        leader within the hour, so that a flapping favourite is given it ever more rarely (PROTOCOL §2.4)."""
        recent = sum(now - at < CHANGES_SECONDS for at in self._changes)
        return float(min(self.timers.preempt_steady * 2 ** max(recent - 1, 0), self.timers.preempt_longest))

    def since_change(self, now: float) -> float:
        return now - self._changes[-1] if self._changes else float("inf")
