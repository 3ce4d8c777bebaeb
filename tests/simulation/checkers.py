"""What must never be true, each a small class that is told plain facts and raises Violation. They know no simulator, so
hand-made histories can be fed to them (test_checkers.py), and none trusts the core's own counting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from p2p.effects import Config, Entry, HardState
from tests.simulation import model
from tests.simulation.world import Violation

TermAt = Callable[[int], int | None]


def majority_of(holders: int, voters: int) -> bool:
    return 2 * holders > voters


class ElectionSafety:
    """I1: at most one leader a term; and it was elected by the disks of a majority."""

    def __init__(self) -> None:
        self.leaders: dict[int, str] = {}

    def elected(self, voter: str, term: int, voted: int, voters: int) -> None:
        """`voted`: how many of `voters` have, on disk, voted for it in this term, or are in a later one."""
        first = self.leaders.setdefault(term, voter)
        if first != voter:
            raise Violation("election safety", f"{first} and {voter} both lead term {term}")
        if not majority_of(voted, voters):
            raise Violation("votes", f"{voter} leads term {term} by {voted} votes on disk of {voters}")


class OneVote:
    """§3 I1, I6, I13: one vote a term, durable before it is told, never for a shorter log."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, int], str] = {}

    def granted(self, voter: str, term: int, candidate: str, disk: HardState) -> None:
        first = self._told.setdefault((voter, term), candidate)
        if first != candidate:
            raise Violation("one vote", f"{voter} votes for {first} and {candidate} in term {term}")
        if disk.term < term or (disk.term == term and disk.voted_for != candidate):
            raise Violation("durable vote", f"{voter} tells its vote in term {term}; its disk knows {disk}")

    @staticmethod
    def judged(
        voter: str, candidate: str, theirs: tuple[int, int], mine: tuple[int, int], granted: bool, free: bool
    ) -> None:
        """`theirs` and `mine` are (last term, last index). `free`: no vote, no lease and no seat forbids the vote."""
        if granted and theirs < mine:
            raise Violation("up to date", f"{voter} at {mine} votes for {candidate} at {theirs}")
        if free and theirs >= mine and not granted:
            raise Violation("priority", f"{voter} refuses its vote to {candidate} without a reason")


class LogMatching:
    """I2, I3: entries of equal index and term are equal, and so is everything before them; a leader cuts nothing."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[int | None, bytes, int]] = {}

    def wrote(
        self, voter: str, leads: bool, truncate: int | None, entries: Sequence[Entry], before: int | None
    ) -> None:
        """`before` is the term of the entry before the first; None if it is no longer known."""
        if leads and truncate is not None:
            raise Violation("leader append-only", f"{voter} leads and cuts off its log at {truncate}")
        for entry in entries:
            mine = (before, entry.body, entry.kind)
            known = self._known.setdefault((entry.index, entry.term), mine)
            if known != mine and (None not in (known[0], before) or known[1:] != mine[1:]):
                raise Violation(
                    "log matching", f"{voter} has {mine} at {entry.index} of term {entry.term}, not {known}"
                )
            before = entry.term


class Commits:
    """I4, I8 and the heart of it all: what is committed, by whoever was first; a majority's disks had it then; nobody
    commits anything else; every later leader has it."""

    def __init__(self) -> None:
        self.terms: list[int] = [0]  # by index
        self._in: list[int] = [0]  # by index: the term in which it became committed, which may be a later one

    @property
    def index(self) -> int:
        return len(self.terms) - 1

    def committed(self, voter: str, leads: bool, in_term: int, old: int, new: int, term_at: TermAt) -> None:
        """The commit index of `voter`, which is in `in_term`, rose from `old` to `new`."""
        if new < old:
            raise Violation("monotonic", f"the commit index of {voter} went from {old} back to {new}")
        terms = self.terms
        for index in range(old + 1, new + 1):
            term = term_at(index)
            if index < len(terms):
                if term is not None and terms[index] != term:
                    raise Violation(
                        "commit", f"{voter} commits {index} of term {term}; term {terms[index]} is committed there"
                    )
            elif not leads:
                raise Violation("commit", f"{voter} commits {index} before any leader did")
            else:
                assert term is not None
                terms.append(term)
                self._in.append(in_term)

    def holders(self, index: int, term: int, held: int, voters: int) -> None:
        """`held`: how many of the voters' disks hold the newly committed entry."""
        if not majority_of(held, voters):
            raise Violation("durability", f"entry {index} of term {term} is committed on {held} disks of {voters}")

    def own_term(self, index: int, term: int, leader_term: int) -> None:
        """Raft §5.4.2: only an entry of the leader's own term commits by counting."""
        if term != leader_term:
            raise Violation(
                "own term", f"the leader of term {leader_term} counts entry {index} of term {term} committed"
            )

    def elected(self, voter: str, term: int, base: int, term_at: TermAt) -> None:
        for index in range(max(base, 1), len(self.terms)):
            found = term_at(index)
            if self._in[index] < term and found != self.terms[index] and not (index == base and found is None):
                raise Violation("leader completeness", f"{voter} leads term {term} without {index} (has {found})")


class StateMachineSafety:
    """I5: the same index, the same operation and the same state, everywhere."""

    def __init__(self) -> None:
        self._applied: dict[int, tuple[int, bytes, int]] = {}
        self._contents: dict[int, int] = {}

    def applied(self, voter: str, entry: Entry, digest: int) -> None:
        mine = (entry.term, entry.body, digest)
        known = self._applied.setdefault(entry.index, mine)
        if known != mine:
            raise Violation("state machine safety", f"{voter} applies {mine} as {entry.index}; another {known}")

    def adopted(self, voter: str, index: int, digest: int, content: int) -> None:
        """A snapshot was made or installed: `content` is a hash of all that the state holds."""
        known = self._applied.get(index)
        if known is not None and known[2] != digest:
            raise Violation("state machine safety", f"{voter}: the snapshot of {index} is another state")
        first = self._contents.setdefault(index, content)
        if first != content:
            raise Violation("state machine safety", f"{voter}: the snapshot of {index} lacks or adds something")


class Acknowledgements:
    """I8: a follower says only what its disk holds."""

    @staticmethod
    def told(voter: str, match: int, last_on_disk: int) -> None:
        if match > last_on_disk:
            raise Violation("durability", f"{voter} acknowledges {match}; its disk ends at {last_on_disk}")


class Monotonic:
    """I6: by disk, term and vote only go forward."""

    def __init__(self) -> None:
        self._seen: dict[str, HardState] = {}

    def saw(self, voter: str, state: HardState) -> None:
        known = self._seen.get(voter)
        if known is not None and (
            state.term < known.term
            or (state.term == known.term and known.voted_for is not None and state.voted_for != known.voted_for)
        ):
            raise Violation("monotonic", f"{voter} goes from {known} back to {state}")
        self._seen[voter] = state

    def forgive(self, voter: str) -> None:
        """It starts again: from what its disk holds, which `started` judges."""
        self._seen.pop(voter, None)

    @staticmethod
    def started(voter: str, term: int, told_term: int, log_term: int) -> None:
        """`told_term`: the highest term in which it has voted; `log_term`: that of its last entry."""
        if term < log_term:
            raise Violation("monotonic", f"{voter} starts in term {term} with an entry of term {log_term}")
        if term < told_term:
            raise Violation("monotonic", f"{voter} starts in term {term}, but has spoken in term {told_term}")


class Keys:
    """I7: an acknowledged key is done, once, by the answer that was given first, for ever."""

    def __init__(self) -> None:
        self.acked: dict[int, int] = {}

    def told(self, key: int, job: int) -> None:
        first = self.acked.setdefault(key, job)
        if first != job:
            raise Violation("exactly once", f"key {key} was answered with job {first} and with {job}")

    def state(self, voter: str, jobs_by_key: dict[int, list[int]], keys: Iterable[int] | None = None) -> None:
        """The state of a voter that has applied everything."""
        for key, job in self.acked.items():
            found = jobs_by_key.get(key, [])
            if job not in found:
                raise Violation("acknowledged", f"{voter} has lost job {job} of key {key}")
        for key, jobs in jobs_by_key.items():
            if len(jobs) > 1:
                raise Violation("exactly once", f"{voter} has jobs {jobs} of key {key}")


class Attempts:
    """I9: told every command once, in order, it keeps its own books: tokens increase, one attempt is current, only that
    one finishes, and once."""

    def __init__(self) -> None:
        self._current: dict[int, tuple[int, int]] = {}  # job -> attempt, worker
        self._token: dict[int, int] = {}
        self._attempt: dict[int, int] = {}
        self.finished: dict[int, int] = {}
        self._released: set[int] = set()

    def applied(self, index: int, command: model.Command, result: tuple[int, ...]) -> None:
        done = result not in (model.REFUSED, ())
        if isinstance(command, model.Claim) and done:
            job, attempt, token = result
            if job in self._current or job in self.finished:
                raise Violation("one claim", f"job {job} is claimed while {self._current.get(job)} holds it")
            if token <= self._token.get(job, 0) or token != index:
                raise Violation("token", f"attempt {attempt} of job {job} got token {token} in entry {index}")
            if attempt <= self._attempt.get(job, 0):
                raise Violation("token", f"attempt {attempt} of job {job} follows {self._attempt[job]}")
            self._token[job], self._attempt[job] = token, attempt
            self._current[job] = (attempt, command.worker)
        elif isinstance(command, model.Finish) and done:
            told = (command.attempt, command.worker)
            if self._current.get(command.job) == told:
                del self._current[command.job]
                self.finished[command.job] = command.attempt
            elif self.finished.get(command.job) != command.attempt:
                raise Violation("stale attempt", f"{command} was accepted; {self._current.get(command.job)} is current")
        elif isinstance(command, model.Expire) and done:
            current = self._current.pop(command.job, None)
            if current is None or current[0] != command.attempt:
                raise Violation("stale attempt", f"{command} was accepted; {current} is current")
        elif isinstance(command, model.Release) and done and command.key not in self._released:
            self._released.add(command.key)
            self._current.pop(command.job, None)

    def began(self, job: int, attempt: int, worker: int) -> None:
        """A worker was told that it holds this attempt."""
        if self._attempt.get(job, 0) < attempt:
            raise Violation(
                "one claim", f"worker {worker} was given attempt {attempt} of job {job}, which nobody logged"
            )


TOLD_IN_SECONDS = 0.001  # the real lease table counts whole milliseconds


class Grace:
    """A new leader gives every attempt a whole lease from when it began to lead (PROTOCOL §1, worker leases)."""

    @staticmethod
    def gave_up(voter: str, job: int, led_for: float, lease: float) -> None:
        if led_for + TOLD_IN_SECONDS <= lease:
            raise Violation("grace", f"{voter} gives up job {job} after leading for {led_for:.2f} s")


class Reads:
    """I12: a linearizable read sees everything that was committed when it was asked."""

    @staticmethod
    def ready(voter: str, index: int, floor: int) -> None:
        if index < floor:
            raise Violation("read index", f"{voter} reads at {index}; {floor} was committed when it was asked")


class Configurations:
    """I10: one voter at a time, one uncommitted change at a time, none before the term has committed an entry."""

    @staticmethod
    def appended(voter: str, old: Config, new: Config, old_index: int, commit: int, own_term_committed: bool) -> None:
        if len(set(old.voters) ^ set(new.voters)) > 1:
            raise Violation("configuration", f"{voter} goes from {old.voters} to {new.voters} at once")
        if old_index > commit:
            raise Violation("configuration", f"{voter} changes voters while the change in {old_index} is uncommitted")
        if not own_term_committed:
            raise Violation("configuration", f"{voter} changes voters before its term has committed anything")

    @staticmethod
    def active(voter: str, believed: Config, in_log: Config) -> None:
        """What a voter counts by must be the newest configuration in its log."""
        if believed != in_log:
            raise Violation("configuration", f"{voter} counts by {believed}, but its log says {in_log}")

    @staticmethod
    def promoted(voter: str, new: str, held: int, commit: int, close: int) -> None:
        """A voter is added only when its disk holds nearly all that is committed."""
        if held + close < commit:
            raise Violation("catching up", f"{voter} makes {new} a voter at {held}; {commit} is committed")


class Compaction:
    """I14: what is forgotten is in a durable state."""

    @staticmethod
    def compacted(voter: str, upto: int, durable: int) -> None:
        if upto > durable:
            raise Violation("compaction", f"{voter} forgets up to {upto}; its state is durable up to {durable}")


class Frozen:
    """A leader that slept through its lease commits and answers nothing more in that term."""

    def __init__(self) -> None:
        self._over: dict[str, int] = {}

    def thawed(self, voter: str, term: int) -> None:
        """It led `term` and was frozen for longer than an election timeout."""
        self._over[voter] = term

    def acted(self, voter: str, term: int, what: str) -> None:
        if self._over.get(voter, -1) >= term:
            raise Violation("frozen leader", f"{voter} {what} in term {term}, which it slept through")


class Changes:
    """L3, L4: how often the leader changed, and whether anything excuses it."""

    def __init__(self) -> None:
        self.at: list[tuple[float, str, int]] = []

    def elected(self, now: float, voter: str, term: int) -> None:
        self.at.append((now, voter, term))

    def calm(self, since: float, until: float, allowed: int = 0) -> None:
        changes = [change for change in self.at if since <= change[0] <= until]
        if len(changes) > allowed:
            raise Violation("calm", f"{len(changes)} changes of leader without a reason: {changes}")

    def terms_still(self, before: int, after: int) -> None:
        if after > before:
            raise Violation("calm", f"the term rose from {before} to {after} without a reason")


class Deadlines:
    """L1, L2: what must come, comes in time."""

    @staticmethod
    def within(what: str, took: float | None, bound: float) -> None:
        if took is None or took > bound:
            raise Violation(
                "liveness", f"{what}: {'never' if took is None else f'{took:.2f} s'}, allowed {bound:.2f} s"
            )
