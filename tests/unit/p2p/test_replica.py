"""The replica as its driver sees it: what an order causes, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2p.effects import Apply, Config, HardState, Persist, ReadFailed, ReadReady, RoleChanged, Send
from p2p.election.rank import Timers
from p2p.ids import Index, Term, VoterId
from p2p.journal.log import LogStart
from p2p.messages import Append, AppendReply, PreVote, TimeoutNow, Vote, VoteReply
from p2p.replica import (
    MAX_READS,
    Applied,
    ConfigRefused,
    Found,
    NotLeader,
    Persisted,
    Propose,
    Read,
    Received,
    Reconfigure,
    Replica,
    ReplicaEvent,
    Tick,
    Transfer,
)
from tests.unit.p2p.interaction import Cluster, voter

A, B = VoterId("a@1"), VoterId("b@1")


def alone(term: int = 0, last: int = 0, applied: int = 0) -> Replica:
    """A cluster of one voter, with a log of entries of one term."""
    runs = ((Index(1), Term(max(term, 1))),) if last else ()
    start = LogStart(base_config=Config((A,)), last=Index(last), runs=runs)
    return Replica(A, HardState(Term(term), None), start, applied=Index(applied), now=0.0, draw=lambda: 0.0)


def leading(term: int = 0) -> Replica:
    """A voter alone that leads, with its no-op on disk and applied."""
    replica = alone(term)
    replica.step(Tick(), 0.0)
    replica.step(Persisted(1), 0.0)
    replica.step(Persisted(2), 0.0)
    replica.step(Applied(Index(1)), 0.0)
    return replica


# -- one voter, step by step -------------------------------------------------------------------------------------------


def test_a_candidacy_is_a_new_term_and_a_vote_for_itself_on_disk() -> None:
    replica = alone(term=4, last=9, applied=9)
    persist, role = replica.step(Tick(), 0.0)
    assert persist == Persist(1, (), HardState(Term(5), A), Index(9))
    assert isinstance(role, RoleChanged)
    assert (role.role, role.term, role.leader) == ("candidate", 5, None)


def test_a_leader_begins_with_a_no_op_of_its_term() -> None:
    replica = alone(term=4, last=9, applied=9)
    replica.step(Tick(), 0.0)
    persist, role = replica.step(Persisted(1), 0.0)
    assert isinstance(persist, Persist)
    assert [(e.index, e.term, e.body) for e in persist.entries] == [(10, 5, b"")]
    assert persist.hard_state is None
    assert role == RoleChanged("leader", Term(5), A, False, "elected")


def test_nothing_is_proposed_before_it_leads() -> None:
    replica = alone()
    with pytest.raises(NotLeader):
        replica.step(Propose((b"x",)), 0.0)
    replica.step(Tick(), 0.0)
    with pytest.raises(NotLeader):
        replica.step(Propose((b"x",)), 0.0)
    assert replica.journal.last_index == 0
    replica.step(Persisted(1), 0.0)
    assert replica.step(Propose((b"x",)), 0.0)


def test_the_no_op_commits_what_earlier_terms_left() -> None:
    """Raft §5.4.2: entries of earlier terms are never committed by counting, but along with one of this term."""
    replica = alone(term=2, last=8, applied=5)
    assert replica.journal.commit_index == 5
    replica.step(Tick(), 0.0)
    replica.step(Persisted(1), 0.0)
    assert not replica.established
    role, apply = replica.step(Persisted(2), 0.0)
    assert role == RoleChanged("leader", Term(3), A, True, "elected")
    assert apply == Apply(Index(9))


def test_a_proposal_is_applied_only_after_it_is_on_disk() -> None:
    replica = leading()
    (persist,) = replica.step(Propose((b"x", b"y")), 0.0)
    assert isinstance(persist, Persist)
    assert [e.body for e in persist.entries] == [b"x", b"y"]
    assert replica.journal.commit_index == 1
    assert replica.step(Persisted(persist.seq), 0.0) == [Apply(Index(3))]


def test_each_write_carries_the_floor_of_what_is_committed() -> None:
    """PROTOCOL §2.20: damage below it is never taken for a torn write."""
    replica = leading()
    (first,) = replica.step(Propose((b"x",)), 0.0)
    assert isinstance(first, Persist)
    replica.step(Persisted(first.seq), 0.0)
    (second,) = replica.step(Propose((b"y",)), 0.0)
    assert isinstance(second, Persist)
    assert (first.acked_floor, second.acked_floor) == (1, 2)


def test_one_report_may_tell_of_many_writes() -> None:
    replica = leading()
    writes = [replica.step(Propose((b"x",)), 0.0)[0] for _ in range(3)]
    assert isinstance(writes[-1], Persist)
    assert replica.step(Persisted(writes[-1].seq), 0.0) == [Apply(Index(4))]


def test_a_read_alone_is_answered_at_once() -> None:
    assert leading().step(Read(7), 0.0) == [ReadReady(7, Index(1))]


def test_a_founded_store_leads_at_once() -> None:
    """PROTOCOL §2.9: one voter, immediately."""
    blank = Replica(A, HardState(Term(0), None), LogStart(), applied=Index(0), now=0.0, draw=lambda: 0.0)
    assert blank.next_deadline() is None
    blank.step(Found(Config((A,))), 5.0)
    assert blank.next_deadline() == 5.0
    blank.step(Tick(), 5.0)
    blank.step(Persisted(1), 5.0)
    assert blank.leader == A


def test_a_store_in_no_configuration_waits_for_a_leader() -> None:
    blank = Replica(A, HardState(Term(0), None), LogStart(), applied=Index(0), now=0.0, draw=lambda: 0.0)
    assert blank.next_deadline() is None
    assert blank.step(Tick(), 99.0) == []
    assert blank.role == "follower"


# -- refusals change nothing -------------------------------------------------------------------------------------------


def members(voters: str, learners: str = "") -> Config:
    return Config(tuple(map(voter, voters.split())), tuple(map(voter, learners.split())))


ORDERS: dict[str, tuple[str, ReplicaEvent, type[Exception]]] = {
    "a proposal to a follower": ("n1", Propose((b"x",)), NotLeader),
    "a change ordered from a follower": ("n1", Reconfigure(members("n1 n2")), NotLeader),
    "a transfer ordered from a follower": ("n1", Transfer(voter("n2")), NotLeader),
    "no voters at all": ("n3", Reconfigure(members("")), ConfigRefused),
    "two voters less": ("n3", Reconfigure(members("n3", "n4")), ConfigRefused),
    "a voter that was no learner": ("n3", Reconfigure(members("n1 n2 n3 n9", "n4")), ConfigRefused),
    "a voter that is a learner too": ("n3", Reconfigure(members("n1 n2 n3", "n3 n4")), ConfigRefused),
    "a transfer to the leader itself": ("n3", Transfer(voter("n3")), ConfigRefused),
    "a transfer to a learner": ("n3", Transfer(voter("n4")), ConfigRefused),
    "a transfer to a stranger": ("n3", Transfer(voter("n9")), ConfigRefused),
}


def everything(replica: Replica) -> dict[str, Any]:
    """What a replica is, without what cannot be compared."""
    parts = copy.deepcopy({k: v for k, v in vars(replica).items() if k not in ("journal", "election")})
    parts |= {f"journal.{k}": copy.deepcopy(v) for k, v in vars(replica.journal).items() if k != "log"}
    parts |= {f"log.{k}": copy.deepcopy(v) for k, v in vars(replica.journal.log).items()}
    parts |= {f"election.{k}": copy.deepcopy(v) for k, v in vars(replica.election).items() if k != "_draw"}
    return parts


@pytest.mark.parametrize(("node", "order", "refusal"), ORDERS.values(), ids=ORDERS)
def test_an_order_that_is_refused_changes_nothing(node: str, order: ReplicaEvent, refusal: type[Exception]) -> None:
    cluster = Cluster(3, learners=1)
    cluster.elect("n3")
    cluster.run_to(cluster.now + 0.5)
    before = everything(cluster.nodes[node].replica)
    with pytest.raises(refusal):
        cluster.step(node, order)
    assert everything(cluster.nodes[node].replica) == before


def test_what_the_time_alone_changed_comes_with_the_next_step() -> None:
    """The order finds a leader that has just stopped being one."""
    cluster = Cluster(3)
    cluster.elect("n3")
    replica = cluster.nodes["n3"].replica
    replica.step(Read(7), cluster.now)
    with pytest.raises(NotLeader):
        replica.step(Propose((b"x",)), cluster.now + 9)
    effects = replica.step(Tick(), cluster.now + 9)
    assert ReadFailed(7) in effects
    assert any(isinstance(effect, RoleChanged) and effect.role == "follower" for effect in effects)


def test_a_change_to_what_is_so_already_is_done_already() -> None:
    cluster = Cluster(3)
    cluster.elect("n3")
    assert cluster.step("n3", Reconfigure(members("n3 n1 n2"))) == []


def test_what_waits_to_be_read_is_bounded() -> None:
    cluster = Cluster(3)
    cluster.elect("n3")
    replica = cluster.nodes["n3"].replica
    for context in range(MAX_READS):
        assert ReadFailed(context) not in replica.step(Read(context), cluster.now)
    assert ReadFailed(MAX_READS) in replica.step(Read(MAX_READS), cluster.now)


# -- what a peer may say -----------------------------------------------------------------------------------------------

NONSENSE = {
    "a vote that was not asked for": VoteReply(Term(1), True, ""),
    "an acknowledgement to one that does not lead": AppendReply(
        Term(1), True, Index(9), Term(0), Index(0), Index(9), 1, 0, True
    ),
    "an order to stand by one that does not lead": TimeoutNow(Term(1), Index(1)),
    "an append of a second leader of this term": Append(Term(1), Index(0), Term(0), (), Index(1), 1, ()),
}


@pytest.mark.parametrize("message", NONSENSE.values(), ids=NONSENSE)
def test_what_makes_no_sense_changes_nothing(message: Any) -> None:
    cluster = Cluster(3)
    cluster.elect("n3")
    replica = cluster.nodes["n1"].replica
    before = everything(replica)
    before.pop("dropped")
    assert cluster.step("n1", Received(voter("n2"), message)) == []
    after = everything(replica)
    after.pop("dropped")
    assert after == before


def test_a_second_leader_of_ones_own_term_is_dropped_and_counted() -> None:
    cluster = Cluster(3)
    cluster.elect("n3")
    assert cluster.step("n3", Received(voter("n2"), Append(Term(1), Index(0), Term(0), (), Index(0), 1, ()))) == []
    assert cluster.nodes["n3"].replica.dropped == 1
    assert cluster.nodes["n3"].replica.role == "leader"


def test_an_answer_to_what_was_never_sent_is_not_counted() -> None:
    """Its round is of the future: it would keep a leader that nobody follows."""
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.step("n3", Propose((b"x",)))
    cluster.sync("n3")
    replica = cluster.nodes["n3"].replica
    ahead = AppendReply(Term(1), True, Index(2), Term(0), Index(0), Index(2), replica._round + 1, 0, True)
    cluster.receive("n3", "n1", ahead)
    assert replica.journal.commit_index == 1
    cluster.receive("n3", "n1", ahead._replace(round=replica._round))
    assert replica.journal.commit_index == 2


def test_an_answer_of_an_earlier_term_is_not_counted() -> None:
    cluster = Cluster(3)
    cluster.elect("n3")
    cluster.crash("n3")
    cluster.restart("n3")
    cluster.elect("n3")
    cluster.step("n3", Propose((b"x",)))
    cluster.sync("n3")
    replica = cluster.nodes["n3"].replica
    old = AppendReply(Term(1), True, Index(3), Term(0), Index(0), Index(3), replica._round, 0, True)
    cluster.receive("n3", "n1", old)
    assert replica.journal.commit_index == 2


def test_a_later_term_in_any_answer_deposes() -> None:
    for message in [
        VoteReply(Term(9), False, "term"),
        AppendReply(Term(9), False, Index(0), Term(0), Index(0), Index(0), 0, 0, False),
        Append(Term(9), Index(0), Term(0), (), Index(0), 1, ()),
        Vote(Term(9), Index(9), Term(8), True),
    ]:
        cluster = Cluster(3)
        cluster.elect("n3")
        effects = cluster.step("n3", Received(voter("n1"), message))
        replica = cluster.nodes["n3"].replica
        assert (replica.role, replica.term) == ("follower", 9)
        assert any(isinstance(e, Persist) and e.hard_state and e.hard_state.term == 9 for e in effects)


def test_a_question_about_a_later_term_deposes_nobody() -> None:
    cluster = Cluster(3)
    cluster.elect("n3")
    ask = PreVote(Term(8), Term(9), Index(9), Term(8), 9)
    for name in ("n1", "n3"):
        (reply,) = cluster.step(name, Received(voter("n2"), ask))
        assert isinstance(reply, Send)
        assert reply.message[2:] == (False, "lease")
        assert cluster.nodes[name].replica.term == 1


# -- a voter alone, its disk, its machine ------------------------------------------------------------------------------


class OneVoter(RuleBasedStateMachine):
    """A voter that appends, syncs, applies and restarts with what its disk holds."""

    @initialize()
    def begin(self) -> None:
        self.hard = HardState(Term(0), None)
        self.runs: list[tuple[Index, Term]] = []
        self.disk_last = self.applied = self.acked = 0
        self.now = 0.0
        self.restart()

    @rule()
    def restart(self) -> None:
        start = LogStart(base_config=Config((A,)), last=Index(self.disk_last), runs=tuple(self.runs))
        self.voter = Replica(
            A, self.hard, start, applied=Index(self.applied), now=self.now, draw=lambda: 0.0, timers=Timers()
        )
        assert self.voter.term == self.hard.term
        self.pending: list[Persist] = []
        self.take(self.voter.step(Tick(), self.now))

    def take(self, effects: list[Any]) -> None:
        for effect in effects:
            if isinstance(effect, Persist):
                self.pending.append(effect)
            elif isinstance(effect, Apply):
                assert effect.upto <= self.disk_last
                self.acked = effect.upto

    @precondition(lambda self: self.voter.role == "leader")
    @rule(n=st.integers(1, 3))
    def propose(self, n: int) -> None:
        self.take(self.voter.step(Propose((b"x",) * n), self.now))

    @precondition(lambda self: self.pending)
    @rule()
    def sync(self) -> None:
        write = self.pending.pop(0)
        assert write.acked_floor <= self.disk_last
        assert write.truncate is None
        if write.hard_state is not None:
            assert write.hard_state.term > self.hard.term
            self.hard = write.hard_state
        for entry in write.entries:
            assert entry.index == self.disk_last + 1
            assert entry.term == self.hard.term
            if not self.runs or self.runs[-1][1] != entry.term:
                self.runs.append((entry.index, entry.term))
            self.disk_last = entry.index
        self.take(self.voter.step(Persisted(write.seq), self.now))

    @precondition(lambda self: self.acked > self.applied)
    @rule()
    def apply(self) -> None:
        if self.voter.journal.commit_index >= self.acked:
            self.applied = self.acked
            self.voter.step(Applied(Index(self.applied)), self.now)

    @rule(more=st.sampled_from([0.01, 0.1, 2.0]))
    def wait(self, more: float) -> None:
        self.now += more
        self.take(self.voter.step(Tick(), self.now))

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "voter"):
            self.voter.check_invariants()
            assert self.voter.journal.commit_index <= self.disk_last


TestOneVoter = OneVoter.TestCase
TestOneVoter.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
