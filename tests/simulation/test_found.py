"""What the simulator has found in the cores, in as few steps as show it. How each showed itself is in tests/seeds."""

from __future__ import annotations

from typing import Any

from p2p.effects import Config, HardState, Persist, Send, SnapshotMeta
from p2p.ids import Index, Term, VoterId
from p2p.journal.log import LogStart
from p2p.messages import Append, AppendReply, PreVoteReply, VoteReply
from p2p.replica import CANDIDATE, FOLLOWER, Installed, Persisted, Received, Replica, Tick

A, B, C, D, E = FIVE = tuple(VoterId(f"n{n}@d") for n in range(1, 6))


def replica(start: LogStart | None = None, state: HardState | None = None, applied: int = 0) -> Replica:
    start = start or LogStart(base_config=Config(FIVE))
    blank = HardState(Term(0), None)
    return Replica(A, state or blank, start, applied=Index(applied), now=1_000.0, draw=lambda: 0.5)


def go(one: Replica, event: Any, now: float) -> list[Any]:
    """The effects of an event on a voter whose disk answers at once."""
    effects = one.step(event, now)
    for effect in list(effects):
        if isinstance(effect, Persist):
            effects += go(one, Persisted(effect.seq), now)
    one.check_invariants()
    return effects


def stand(one: Replica, now: float = 0.0) -> float:
    """Ticks until it asks for votes or pre-votes; answers when."""
    for _ in range(3):
        now = max(now, one.next_deadline() or 0.0) + 0.001
        if any(isinstance(effect, Send) for effect in go(one, Tick(), now)):
            return now
    raise AssertionError("it does not stand")


def append(term: int, prev: int, prev_term: int, bodies: list[bytes], commit: int, round: int) -> Append:
    entries = tuple((Term(term), 0, body) for body in bodies)
    return Append(Term(term), Index(prev), Term(prev_term), entries, Index(commit), round, (), 0)


def test_candidate_whose_round_failed_does_not_acknowledge_to_the_next_leader_what_the_last_one_had() -> None:
    one = replica()
    go(one, Received(B, append(1, 0, 0, [b"", b"x", b"y"], 0, 1)), 1_000.1)
    now = stand(one)
    for voter in (C, D):
        go(one, Received(voter, PreVoteReply(Term(1), Term(2), True, "")), now)
    assert (one.role, one.term) == (CANDIDATE, 2)
    now = stand(one, now)
    assert (one.role, one.term) == (FOLLOWER, 2)
    # C leads term 2, without y; its heartbeat says that it has committed an entry of its own where x is here.
    effects = go(one, Received(C, append(2, 0, 0, [], 2, 2)), now)
    told = [effect.message for effect in effects if isinstance(effect, Send)]
    assert [(reply.ok, reply.match) for reply in told if isinstance(reply, AppendReply)] == [(True, 0)]
    assert one.journal.commit_index == 0


def test_voter_is_never_in_an_earlier_term_than_its_log() -> None:
    """The state and the log were replaced by a snapshot of term 3; the term itself was not written before the crash."""
    start = LogStart(base=Index(80), base_term=Term(3), base_config=Config(FIVE), last=Index(80))
    one = replica(start, HardState(Term(1), B), applied=80)
    assert (one.term, one.voted_for) == (3, None)


def test_unasked_word_of_an_installed_snapshot_is_no_slow_answer() -> None:
    one = replica()
    now = stand(one)
    for voter in (B, C):
        go(one, Received(voter, PreVoteReply(Term(0), Term(1), True, "")), now)
    for voter in (B, C):
        go(one, Received(voter, VoteReply(Term(1), True, "")), now)
    assert one.role == "leader"
    told = AppendReply(Term(1), True, Index(0), Term(0), Index(0), Index(0), 0, 0, True)
    go(one, Received(B, told), now)
    assert not one.progress[B].answers


def test_follower_tells_of_an_installed_snapshot() -> None:
    one = replica()
    go(one, Received(B, append(1, 0, 0, [b""], 0, 1)), 1_000.1)
    meta = SnapshotMeta(Index(9), Term(1), Config(FIVE), b"", "s", 1, "")
    effects = go(one, Installed(B, meta), 1_000.2)
    assert [effect.message.match for effect in effects if isinstance(effect, Send)] == [9]


def test_two_voters_wait_for_different_times_after_a_failed_round() -> None:
    """Those that split the votes once would split them for ever."""
    deadlines = set()
    for draw in (0.0, 0.5, 0.9):
        one = Replica(
            A,
            HardState(Term(0), None),
            LogStart(base_config=Config(FIVE)),
            applied=Index(0),
            now=0.0,
            draw=lambda draw=draw: draw,
        )
        one.election.asked(10.0)
        deadlines.add(one.election.deadline)
    assert len(deadlines) == 3
