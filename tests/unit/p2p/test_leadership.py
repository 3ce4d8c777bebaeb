"""What a node believes of who leads, and what ends when that changes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from p2p import leadership
from p2p.ids import NodeId, Term
from p2p.leadership import NOBODY, AskerGone, Deposed, Leader, Leadership


def led(term: int, node: str | None, address: str | None = "there:1") -> Leader:
    return Leader(Term(term), NodeId(node) if node is not None else None, address if node is not None else None)


NEWS = [
    pytest.param(NOBODY, led(1, "a"), led(1, "a"), id="the first"),
    pytest.param(led(1, "a"), led(2, "b"), led(2, "b"), id="a later term"),
    pytest.param(led(2, "b"), led(1, "a"), None, id="an earlier term"),
    pytest.param(led(2, None), led(1, "a"), None, id="an earlier term, while nobody leads"),
    pytest.param(led(2, "b"), led(2, None), None, id="none does not beat a name"),
    pytest.param(led(2, None), led(2, "b"), led(2, "b"), id="a name beats none"),
    pytest.param(led(2, "b"), led(3, None), led(3, None), id="a later term in which nobody leads yet"),
    pytest.param(led(2, "b"), led(2, "b"), None, id="the same again"),
    pytest.param(led(2, "b", None), led(2, "b", "x:1"), led(2, "b", "x:1"), id="its address becomes known"),
    pytest.param(led(2, "b", "x:1"), led(2, "b", "y:1"), led(2, "b", "y:1"), id="its address changes"),
    pytest.param(led(2, "b", "x:1"), led(2, "b", None), None, id="no address does not beat one"),
    pytest.param(led(2, "b", "x:1"), led(3, "b", None), led(3, "b", None), id="of a later term it does"),
]


@pytest.mark.parametrize(("known", "news", "then"), NEWS)
async def test_what_is_news(known: Leader, news: Leader, then: Leader | None) -> None:
    told = Leadership()
    told.leader = known
    assert told.learn(news) is (then is not None)
    assert told.leader == (then or known)


@pytest.mark.parametrize(
    ("known", "term", "then"),
    [
        pytest.param(led(2, "b"), 2, led(2, None), id="its leader is lost"),
        pytest.param(led(2, "b"), 3, led(3, None), id="by a later term"),
        pytest.param(led(3, "b"), 2, None, id="gossip knew of a later one"),
        pytest.param(led(2, None), 2, None, id="nobody led anyway"),
        pytest.param(NOBODY, 0, None, id="nobody ever led"),
    ],
)
async def test_what_the_replica_gives_up(known: Leader, term: int, then: Leader | None) -> None:
    told = Leadership()
    told.leader = known
    assert told.lost(Term(term)) is (then is not None)
    assert told.leader == (then or known)


async def test_whoever_waits_is_woken_by_any_change_and_by_a_desk_that_opens() -> None:
    told = Leadership()
    for change in (lambda: told.learn(led(1, "a")), lambda: told.lost(Term(1)), told.opened):
        waiting = [asyncio.create_task(told.change(60.0)) for _ in range(3)]
        await asyncio.sleep(0)
        change()
        assert await asyncio.gather(*waiting) == [True] * 3
    assert not await told.change(0.0)


class Request:
    """Something that is asked of the leader."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.given_up = False

    async def ask(self) -> str:
        try:
            return await asyncio.shield(self.answer)
        except asyncio.CancelledError:
            self.given_up = True
            raise


async def asked(told: Leadership, request: Request, **how: Any) -> asyncio.Task[str]:
    task = asyncio.create_task(told.unless_deposed(request.ask(), **how))
    for _ in range(3):
        await asyncio.sleep(0)
    return task


async def test_an_answer_is_an_answer_whatever_else_changes() -> None:
    told = Leadership()
    told.learn(led(1, "a"))
    request = Request()
    task = await asked(told, request)
    told.lost(Term(1))  # nobody else leads yet
    told.learn(led(1, "a"))  # heard of it again
    told.learn(led(1, "a", "there:2"))
    await asyncio.sleep(0)
    request.answer.set_result("yes")
    assert await task == "yes"


@pytest.mark.parametrize("next_", [led(2, "b"), led(2, "a")], ids=["another", "the same in another term"])
async def test_a_request_ends_when_somebody_else_leads(next_: Leader) -> None:
    told = Leadership()
    told.learn(led(1, "a"))
    request = Request()
    task = await asked(told, request)
    told.learn(next_)
    with pytest.raises(Deposed, match="a does not lead"):
        await task
    assert request.given_up


async def test_whoever_is_deposed_may_have_a_last_word() -> None:
    told = Leadership()
    told.learn(led(1, "a"))
    request = Request()
    task = await asked(told, request, last_word=60.0)
    told.learn(led(2, "b"))
    await asyncio.sleep(0)
    request.answer.set_result("not done")
    assert await task == "not done"
    silent = await asked(told, Request(), last_word=0.01)
    told.learn(led(3, "c"))
    with pytest.raises(Deposed):
        await silent


async def test_a_request_ends_soon_after_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leadership, "LISTEN_SECONDS", 0.001)
    told = Leadership()
    told.learn(led(1, "a"))
    request = Request()
    task = await asked(told, request, gone=lambda: True)
    with pytest.raises(AskerGone):
        await task
    assert request.given_up


async def test_a_failure_of_the_request_is_its_own() -> None:
    told = Leadership()
    request = Request()
    task = await asked(told, request)
    request.answer.set_exception(OSError("gone"))
    with pytest.raises(OSError, match="gone"):
        await task


async def test_a_caller_that_is_cancelled_leaves_nothing_behind() -> None:
    told = Leadership()
    request = Request()
    task = await asked(told, request)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert request.given_up
    assert len(asyncio.all_tasks()) == 1
