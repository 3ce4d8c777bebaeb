"""What a leader sends its followers, and what it makes of their answers."""

from __future__ import annotations

import pytest

from p2p.effects import NO_MARK, Effect, Entry, Fetch, Mark, ReadReady
from p2p.ids import Index, Term
from p2p.journal.progress import BATCH_BYTES, BATCH_ENTRIES, PROBE, REPLICATE, SNAPSHOT
from p2p.messages import Append, AppendReply, BadMessage, decode, encode
from p2p.replica import FOLLOWER, LEADER, MARKS, Applied, Fetched, Propose, Read, Received, Tick, Transfer, Unreachable
from tests.unit.p2p.interaction import Cluster, voter


def appends(cluster: Cluster, sender: str, to: str) -> list[Append]:
    """What is on the wire, without the heartbeats."""
    return [m for m in cluster.wire.get((sender, to), ()) if isinstance(m, Append) and m.entries]


def long_log(entries: int = 6_000) -> Cluster:
    """Three voters that all hold a long log; n3 has compacted its beginning, and leads anew."""
    cluster = Cluster(3)
    cluster.elect("n3")
    while cluster.nodes["n3"].replica.journal.last_index < entries:
        cluster.step("n3", Propose((b"x",) * 500))
        cluster.stabilize()
    cluster.run_to(cluster.now + 0.3)
    cluster.compact("n3", 1_000)
    return cluster


def test_a_new_leader_goes_on_where_a_silent_follower_was() -> None:
    """It knows nothing of a follower yet, so it looks from the end of its log backwards; that the first probe got no
    answer tells nothing about where to look."""
    cluster = long_log()
    cluster.crash("n1")
    cluster.crash("n3")
    cluster.restart("n3")
    cluster.elect("n3")
    p = cluster.nodes["n3"].replica.progress[voter("n1")]
    probed_at = p.next
    cluster.run_to(cluster.now + 3)
    assert (p.state, p.next) == (PROBE, probed_at)
    cluster.step("n3", Unreachable(voter("n1")))
    assert (p.state, p.next) == (PROBE, probed_at)
    offers: list[str] = []
    cluster.say = lambda line: offers.append(line) if "snapshot" in line else None
    cluster.restart("n1")
    cluster.run_to(cluster.now + 2)
    assert p.state == REPLICATE
    assert offers == []
    assert cluster.log("n1") == cluster.log("n2")


def test_a_heartbeats_answer_does_not_end_the_search_for_a_match() -> None:
    """While the entries of a probe are read from the disk, nothing is under way; a heartbeat behind entry 0 is never
    refused, and says nothing about the rest of the log."""
    cluster = long_log()
    cluster.step("n3", Propose((b"y",) * 100))
    cluster.stabilize()  # n1 holds them, but has not heard that they are committed
    cluster.crash("n1")
    cluster.step("n3", Propose((b"z",)))
    cluster.stabilize()
    cluster.crash("n3")
    cluster.restart("n3")
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.8)
    cluster.nodes["n3"].chores_wait = True
    cluster.restart("n1")
    cluster.run_to(cluster.now + 0.7)
    leader = cluster.nodes["n3"].replica
    p = leader.progress[voter("n1")]
    assert p.fetching
    assert (p.state, p.match, p.next) == (PROBE, 6_001, 6_102)
    cluster.nodes["n3"].chores_wait = False
    cluster.run_to(cluster.now + 1)
    assert p.state == REPLICATE
    assert p.match == leader.journal.last_index


def test_one_refusal_of_many_is_enough() -> None:
    """Of four batches under way the first is lost: three refusals come back, and one probe goes out."""
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.3)
    for _ in range(4):
        cluster.step("n3", Propose((b"x",)))
    assert len(appends(cluster, "n3", "n1")) == 4
    cluster.wire["n3", "n1"].popleft()
    cluster.deliver("n3", "n1")
    cluster.sync("n1")
    refusals = [m for m in cluster.wire["n1", "n3"] if isinstance(m, AppendReply) and not m.ok]
    assert len(refusals) == 3
    cluster.deliver("n1", "n3")
    assert len(appends(cluster, "n3", "n1")) == 1
    cluster.stabilize()
    assert cluster.log("n1") == cluster.log("n3")


def test_what_a_voter_says_that_has_lost_its_disk_confirms_no_read() -> None:
    """PROTOCOL §2.10: it may have forgotten a vote for a later leader, too."""
    cluster = Cluster(5)
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.3)
    leader = cluster.nodes["n3"].replica
    cluster.step("n3", Read(7))
    forgetful = AppendReply(Term(1), False, Index(0), Term(0), Index(1), Index(0), leader._round, 0, True)
    cluster.step("n3", Received(voter("n1"), forgetful))
    assert leader.progress[voter("n1")].regressed
    faithful = forgetful._replace(ok=True, match=Index(1), last_index=Index(1))
    assert not reads_answered(cluster.step("n3", Received(voter("n2"), faithful)))
    assert reads_answered(cluster.step("n3", Received(voter("n4"), faithful))) == [7]


def reads_answered(effects: list[Effect]) -> list[int]:
    return [effect.context for effect in effects if isinstance(effect, ReadReady)]


def test_entries_that_go_back_in_term_are_dropped_before_anything_changes() -> None:
    """A log's terms never fall (Raft §5.3): such an Append is no leader's, and it is not our crash."""
    for entries in [((2, 0, b""), (1, 0, b"")), ((4, 0, b""),), ((0, 0, b""),)]:
        with pytest.raises(BadMessage, match="term"):
            decode(encode(Append(Term(3), Index(1), Term(1), entries, Index(0), 1, ())))


def test_a_batch_is_bounded_in_bytes() -> None:
    """A heartbeat must not wait behind megabytes (PROTOCOL §2.16)."""
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.3)
    cluster.step("n3", Propose((b"x" * (BATCH_BYTES // 2),) * 5))
    sizes = [[len(body) for _, _, body in batch.entries] for batch in appends(cluster, "n3", "n1")]
    assert sizes == [[BATCH_BYTES // 2] * 2, [BATCH_BYTES // 2] * 2, [BATCH_BYTES // 2]]


def test_a_batch_is_bounded_in_entries() -> None:
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.3)
    cluster.step("n3", Propose((b"x",) * (BATCH_ENTRIES * 2 + 1)))
    assert [len(batch.entries) for batch in appends(cluster, "n3", "n1")] == [BATCH_ENTRIES, BATCH_ENTRIES, 1]


def fetching() -> tuple[Cluster, Index]:
    """n3 leads anew and reads from its disk what n1 lacks; where that begins."""
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.3)
    cluster.crash("n1")
    cluster.step("n3", Propose((b"x",) * 3))
    cluster.run_to(cluster.now + 0.3)
    cluster.crash("n3")
    cluster.restart("n3")
    cluster.nodes["n3"].chores_wait = True
    cluster.elect("n3")
    cluster.restart("n1")
    cluster.run_to(cluster.now + 0.8)
    (fetch,) = [chore for chore in cluster.nodes["n3"].chores if isinstance(chore, Fetch)]
    assert (fetch.to, fetch.first) == (voter("n1"), 2)
    return cluster, fetch.first


def entries(first: int, *terms: int) -> tuple[Entry, ...]:
    return tuple(Entry(Index(at), Term(term), b"x") for at, term in enumerate(terms, first))


def test_what_was_read_is_sent() -> None:
    cluster, first = fetching()
    cluster.step("n3", Fetched(voter("n1"), entries(first, 1, 1, 1)))
    (batch,) = appends(cluster, "n3", "n1")
    assert (batch.prev_index, len(batch.entries)) == (1, 3)
    assert not cluster.nodes["n3"].replica.progress[voter("n1")].fetching


STALE = {
    "nothing was found": (),
    "it begins elsewhere": entries(3, 1, 1),
    "it is of another term than the log is now": entries(2, 1, 1, 9),
    "it goes beyond the log": entries(2, 1, 1, 1, 2, 2),
}


@pytest.mark.parametrize("found", STALE.values(), ids=STALE)
def test_what_was_read_and_does_not_fit_any_more_is_not_sent(found: tuple[Entry, ...]) -> None:
    """The disk answered a question of an earlier seat. The next beat asks again."""
    cluster, first = fetching()
    cluster.step("n3", Fetched(voter("n1"), found))
    assert appends(cluster, "n3", "n1") == []
    cluster.now += 0.1
    assert Fetch(voter("n1"), first, BATCH_ENTRIES, BATCH_BYTES) in cluster.step("n3", Tick())


def test_what_was_read_for_nobody_is_dropped() -> None:
    cluster, first = fetching()
    assert cluster.step("n3", Fetched(voter("n2"), entries(first, 1))) == []
    assert cluster.step("n3", Fetched(voter("n9"), entries(first, 1))) == []
    assert cluster.step("n2", Fetched(voter("n1"), entries(first, 1))) == []


# -- states that differ ------------------------------------------------------------------------------------------------


def test_a_follower_whose_state_differs_at_the_same_entry_is_noticed() -> None:
    """PROTOCOL §2.23: nondeterminism or a broken disk, after which equal journals tell nothing."""
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.3)
    leader = cluster.nodes["n3"].replica
    for index in range(1024, 1024 * (MARKS + 3), 1024):
        cluster.step("n3", Applied(leader.journal.applied_index, Mark(index, index + 7)))
    newest = 1024 * (MARKS + 2)
    assert len(leader.marks) == MARKS

    def told(name: str, mark: Mark) -> bool | None:
        reply = leader_reply(cluster, name)._replace(mark_index=mark.index, digest=mark.digest)
        cluster.step("n3", Received(voter(name), reply))
        return leader.progress[voter(name)].agrees

    assert told("n1", NO_MARK) is None
    assert told("n1", Mark(newest + 1024, 5)) is None  # the leader is not there yet
    assert told("n1", Mark(1024, 5)) is None  # forgotten
    assert told("n1", Mark(newest, 1 << 32 | 5)) is None  # made by other rules
    assert told("n1", Mark(newest, newest + 7)) is True
    assert told("n1", Mark(newest - 1024, 5)) is False
    assert told("n1", Mark(newest, newest + 7)) is False  # it stays so
    assert leader.progress[voter("n2")].agrees is None


def test_a_voter_tells_its_newest_mark() -> None:
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.3)
    cluster.step("n1", Applied(Index(1), Mark(1024, 99)))
    cluster.step("n1", Applied(Index(1)))
    reply = leader_reply(cluster, "n1")
    assert (reply.mark_index, reply.digest) == (1024, 99)
    assert decode(encode(reply)) == reply


def leader_reply(cluster: Cluster, name: str) -> AppendReply:
    """What the follower answers to a heartbeat; taken off the wire."""
    cluster.run_to(cluster.now + 0.05)
    cluster.now += 0.1
    cluster.tick("n3")
    return leader_answers(cluster, name)


def leader_answers(cluster: Cluster, name: str) -> AppendReply:
    """The same, to the heartbeat that is on the wire."""
    cluster.deliver("n3", name)
    reply = cluster.wire[name, "n3"].pop()
    assert isinstance(reply, AppendReply)
    return reply


# -- answers that can wait ---------------------------------------------------------------------------------------------


def test_a_leader_is_calm_when_no_answer_can_move_anything() -> None:
    cluster = Cluster(3)
    cluster.elect("n3")
    leader = cluster.nodes["n3"].replica
    assert leader.established
    cluster.run_to(cluster.now + 0.3)
    assert leader.calm
    assert not cluster.nodes["n1"].replica.calm  # it does not lead
    cluster.step("n3", Read(7))
    assert not leader.calm
    cluster.stabilize()
    assert leader.calm
    cluster.step("n3", Propose((b"x",)))
    assert not leader.calm
    cluster.stabilize()
    assert leader.calm
    cluster.crash("n1")
    cluster.step("n3", Propose((b"y",)))
    cluster.stabilize()
    assert leader.journal.commit_index == leader.journal.last_index
    assert not leader.calm  # n1 is to be brought up to date


def test_an_answer_that_lay_here_while_the_leader_was_held_up_keeps_it_in_its_seat() -> None:
    """Nothing reads the answers to a calm leader's beat before the next one. If that comes late, what lies there tells
    that a majority was there a heartbeat later than what was known before (PROTOCOL §2.15)."""
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.3)
    leader = cluster.nodes["n3"].replica
    cluster.now = leader.next_deadline() or 0
    cluster.tick("n3")
    known, beaten = max(p.contact for p in leader.progress.values()), cluster.now
    answers = [(name, leader_answers(cluster, name)) for name in ("n1", "n2")]
    cluster.now = known + leader.election.timeout + 0.01
    assert cluster.now < beaten + leader.election.timeout
    for name, answer in answers:
        cluster.step("n3", Received(voter(name), answer, beaten + 0.002))
    cluster.tick("n3")
    assert leader.role == LEADER
    cluster.now = beaten + leader.election.timeout + 0.01
    cluster.step("n3", Received(voter("n1"), answers[0][1], beaten + 0.002))
    cluster.tick("n3")
    assert leader.role == FOLLOWER  # old answers are worth no more than they were


def test_a_leader_that_hands_its_seat_over_is_not_calm() -> None:
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.3)
    cluster.step("n3", Transfer(voter("n2")))
    assert not cluster.nodes["n3"].replica.calm


def test_an_answer_that_waited_for_its_turn_was_not_slow() -> None:
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.3)
    leader = cluster.nodes["n3"].replica
    cluster.now += 0.1
    cluster.tick("n3")
    beaten = cluster.now
    cluster.deliver("n3", "n1")
    answer = cluster.wire["n1", "n3"].popleft()
    cluster.now += 0.09
    cluster.step("n3", Received(voter("n1"), answer, beaten + 0.002))
    p = leader.progress[voter("n1")]
    assert p.answers[-1] == pytest.approx(0.002, abs=1e-4)
    assert p.contact == pytest.approx(beaten, abs=1e-4)


# -- what answers say --------------------------------------------------------------------------------------------------


def three() -> Cluster:
    """n3 leads, and both others hold entry 1."""
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.3)
    return cluster


def test_an_answer_that_was_overtaken_does_not_look_like_a_lost_disk() -> None:
    """It tells an end of the log that was true when it was sent."""
    cluster = three()
    for body in (b"a", b"b"):
        cluster.step("n3", Propose((body,)))
        cluster.deliver("n3", "n1")
        cluster.sync("n1")
    answers = cluster.wire["n1", "n3"]
    answers.rotate(1)
    cluster.deliver("n1", "n3")
    progress = cluster.nodes["n3"].replica.progress[voter("n1")]
    assert (progress.match, progress.regressed) == (3, False)


def refusal(cluster: Cluster, first: int, last: int, *, term: int = 0) -> AppendReply:
    round = cluster.nodes["n3"].replica._round
    return AppendReply(Term(1), False, Index(0), Term(term), Index(first), Index(last), round, 0, True)


def test_a_refusal_of_what_is_known_to_be_held_changes_nothing() -> None:
    cluster = three()
    progress = cluster.nodes["n3"].replica.progress[voter("n1")]
    cluster.receive("n3", "n1", refusal(cluster, 1, 5))
    assert (progress.state, progress.match, progress.next) == (REPLICATE, 1, 2)


def test_a_refusal_while_a_snapshot_is_installed_changes_nothing() -> None:
    cluster = three()
    progress = cluster.nodes["n3"].replica.progress[voter("n1")]
    progress.state = SNAPSHOT
    cluster.receive("n3", "n1", refusal(cluster, 2, 1))
    assert progress.state == SNAPSHOT


def test_what_a_lost_disk_held_commits_nothing() -> None:
    """n1 had acknowledged entry 2, and came back without it before the leader's own disk held it."""
    cluster = three()
    cluster.crash("n2")
    cluster.nodes["n3"].disk_hangs = True
    cluster.step("n3", Propose((b"x",)))
    cluster.stabilize()
    leader = cluster.nodes["n3"].replica
    assert leader.progress[voter("n1")].match == 2
    cluster.crash("n1")
    cluster.forget("n1", 1)
    cluster.now += 0.1
    cluster.tick("n3")
    cluster.stabilize()
    assert leader.progress[voter("n1")].regressed
    cluster.sync("n3")
    assert leader.journal.commit_index == 1
