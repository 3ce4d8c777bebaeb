"""Which node is found out, and which is not: it may be the jobs."""

from __future__ import annotations

import random
import time

import pytest

from coordination.trouble import JOBS, OTHERS_FAIL_AT_MOST, REMEMBERED, WINDOW_MS, Trouble


def fails(trouble: Trouble, node: str, *jobs: str, now: int = 0) -> bool:
    return [trouble.note(node, job, False, now) for job in jobs][-1]


FIVE = [f"j{n}" for n in range(JOBS)]


def test_a_node_on_which_different_jobs_fail_in_a_row_is_found_out() -> None:
    trouble = Trouble()
    trouble.note("good", "x", True, 0)
    assert not fails(trouble, "bad", *FIVE[1:])
    assert fails(trouble, "bad", FIVE[0])


@pytest.mark.parametrize("case", ["one job", "a success between", "long ago", "others fail too", "no other node"])
def test_what_may_not_be_the_nodes_fault_is_not_held_against_it(case: str) -> None:
    trouble, now = Trouble(), 0
    if case != "no other node":
        trouble.note("other", "x", case != "others fail too", WINDOW_MS)
    if case == "long ago":
        fails(trouble, "n", *FIVE[:-1], now=0)
        now = WINDOW_MS + 1
        assert not fails(trouble, "n", FIVE[-1], now=now)
        return
    if case == "a success between":
        fails(trouble, "n", *FIVE[:-1])
        trouble.note("n", "fine", True, 0)
        assert not fails(trouble, "n", FIVE[-1])
        return
    assert not fails(trouble, "n", *(["same"] * 50 if case == "one job" else FIVE))


def test_what_is_counted_as_it_comes_is_what_counting_anew_would_tell() -> None:
    draw, trouble, told, now = random.Random(7), Trouble(), list[tuple[int, str, str, bool]](), 0
    for n in range(4_000):
        now += draw.randrange(2_000)
        node, job, ok = f"n{draw.randrange(3)}", f"j{n % 7}", draw.random() < (0.9 if n % 500 < 250 else 0.2)
        told.append((now, node, job, ok))
        found = trouble.note(node, job, ok, now)
        mine = [t for t in told if t[1] == node][-REMEMBERED:]
        streak: set[str] = set()
        for at, _, name, fine in reversed(mine):
            if fine or at < now - WINDOW_MS:
                break
            streak.add(name)
        rest = [t for other in {t[1] for t in told} - {node} for t in [t for t in told if t[1] == other][-REMEMBERED:]]
        ends = [fine for at, _, _, fine in rest if at >= now - WINDOW_MS]
        others_fine = bool(ends) and ends.count(False) <= OTHERS_FAIL_AT_MOST * len(ends)
        assert found == (not ok and len(streak) >= JOBS and others_fine), n
        if n % 100 == 0:
            trouble.forget_old(now)


def test_a_bad_batch_on_a_large_cluster_does_not_stop_the_leader() -> None:
    """Each failure looked at everything that had ended on every node."""
    trouble = Trouble()
    for n in range(500):
        for k in range(REMEMBERED):
            trouble.note(f"n{n}", f"j{k}", k >= REMEMBERED - JOBS, 0)
    began = time.process_time()
    for k in range(100):
        trouble.note("n0", f"j{k}", False, 0)
    assert time.process_time() - began < 0.1


def test_nothing_is_kept_of_nodes_that_are_gone() -> None:
    trouble = Trouble()
    fails(trouble, "gone", *FIVE)
    trouble.forget_old(WINDOW_MS + 1)
    assert trouble._nodes == {}


def test_a_node_that_ate_everything_first_is_found_out_once_others_have_ended_something() -> None:
    trouble = Trouble()
    assert not any(trouble.note("sick", f"j{n}", False, n) for n in range(JOBS + 3)), "it may be the jobs"
    assert trouble.black_holes(JOBS + 3) == []
    trouble.note("well", "j0", True, JOBS + 4)
    assert trouble.black_holes(JOBS + 4) == ["sick"]
    trouble.forget("sick")
    assert trouble.black_holes(JOBS + 5) == []
