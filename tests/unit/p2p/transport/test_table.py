"""Which link carries what, and what is news."""

from __future__ import annotations

from dataclasses import dataclass

from p2p.ids import NodeId, VoterId, node_of
from p2p.transport.table import LinkTable

B = VoterId("b@1")
NODE = NodeId("b")


@dataclass(eq=False)
class Fake:
    voter: VoterId = B
    channel: str = "control"
    dialed: bool = False
    boot: str = "boot"

    @property
    def node(self) -> NodeId:
        return node_of(self.voter)


def table(*links: Fake) -> LinkTable[Fake]:
    made: LinkTable[Fake] = LinkTable()
    for link in links:
        made.add(link)
    return made


def test_the_link_we_dialled_goes_first() -> None:
    ours, older, newer = Fake(dialed=True), Fake(), Fake()
    made = table(older, ours, newer)
    assert made.best[B, "control"] is ours
    made.remove(ours, broken=True)
    assert made.best[B, "control"] is newer
    made.remove(newer, broken=True)
    assert made.best[B, "control"] is older
    made.remove(older, broken=True)
    assert made.best == {}


def test_channels_and_disks_do_not_mix() -> None:
    control, log, other = Fake(), Fake(channel="log"), Fake(voter=VoterId("b@2"))
    made = table(control, log, other)
    assert made.best == {(B, "control"): control, (B, "log"): log, (VoterId("b@2"), "control"): other}


def test_the_first_control_link_is_news_and_so_is_the_loss_of_the_last() -> None:
    made: LinkTable[Fake] = LinkTable()
    first, second, log = Fake(), Fake(dialed=True), Fake(channel="log")
    assert [made.add(log), made.add(first), made.add(second)] == [False, True, False]
    assert [made.remove(link, broken=True) for link in (first, log, second)] == [False, False, True]


def test_a_refused_dial_is_news_once_and_only_if_nothing_stands() -> None:
    made: LinkTable[Fake] = LinkTable()
    assert [made.refused(NODE), made.refused(NODE)] == [True, False]
    link = Fake()
    assert made.add(link)
    assert not made.refused(NODE)
    assert made.remove(link, broken=True)
    assert not made.refused(NODE)


def test_a_link_closed_on_purpose_is_no_news_but_the_next_failure_is() -> None:
    made: LinkTable[Fake] = LinkTable()
    link = Fake()
    made.add(link)
    assert not made.remove(link, broken=False)
    assert made.refused(NODE)


def test_rivals_are_other_starts_of_the_same_voter() -> None:
    old, new, other = Fake(boot="1"), Fake(boot="2"), Fake(voter=VoterId("c@1"), boot="1")
    made = table(old, new, other)
    assert made.rivals(B, "2") == [old]
    assert made.rivals(VoterId("b@2"), "9") == []


def test_the_newest_link_with_a_node_whatever_its_disk() -> None:
    old, new = Fake(), Fake(voter=VoterId("b@2"))
    made = table(old, new, Fake(channel="log"))
    assert made.newest(NODE, "control") is new
    assert made.newest(NodeId("x"), "control") is None
    assert (len(made), old in made, Fake() in made) == (3, True, False)
