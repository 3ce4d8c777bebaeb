"""Leases: who is silent, who is overdue, who is stuck, and who is merely old."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from coordination.leases import Held, LeaseTable, Notice, Signs

HOUR = 3_600_000
LEASE = 30_000
CLAIMED = 1_700_000_000_000  # unix ms of every claim here
BEGAN = 5_000_000  # monotonic ms of the same moment


def held(job: str = "j", **changes: Any) -> Held:
    fields: dict[str, Any] = {
        "attempt": 1, "worker": "w", "kind": "training", "timeout_ms": 0, "claimed_ms": CLAIMED,
        "started_ms": CLAIMED, "renewed_at": BEGAN, "alive_at": BEGAN,
    }  # fmt: skip
    return Held(job=job, **{**fields, **changes})


def table(*attempts: Held) -> LeaseTable:
    leases = LeaseTable(lease_ms=LEASE)
    for attempt in attempts or (held(),):
        leases.grant(attempt)
    return leases


def causes(verdicts: list[Any]) -> list[tuple[str, str]]:
    return [(verdict.held.job, verdict.cause) for verdict in verdicts]


@pytest.mark.parametrize(("silent", "lapsed"), [(0, False), (LEASE - 1, False), (LEASE, True)])
def test_lease_lapses_after_exactly_its_length_of_silence(silent: int, lapsed: bool) -> None:
    assert causes(table().lapsed(BEGAN + silent)) == ([("j", "lease_lapsed")] if lapsed else [])


def test_heartbeat_renews_what_it_lists_and_nothing_else() -> None:
    leases = table(held("a"), held("b"), held("c", worker="other"))
    leases.renew("w", [Signs("a", 1), Signs("c", 1)], BEGAN + 20_000)
    assert causes(leases.lapsed(BEGAN + LEASE)) == [("b", "lease_lapsed"), ("c", "lease_lapsed")]


def test_heartbeat_of_an_older_attempt_is_stale_and_renews_nothing() -> None:
    leases = table(held(attempt=2))
    assert leases.renew("w", [Signs("j", 1), Signs("gone", 1)], BEGAN + 1) == (["j", "gone"], [])
    assert leases.by_job["j"].renewed_at == BEGAN


def test_heartbeat_of_another_worker_renews_nothing() -> None:
    leases = table()
    assert leases.renew("impostor", [Signs("j", 1)], BEGAN + 1) == (["j"], [])
    assert leases.by_job["j"].renewed_at == BEGAN


def test_cancelled_attempt_is_told_apart_from_a_stale_one() -> None:
    leases = table()
    leases.drop("j", tell=True)
    assert leases.renew("w", [Signs("j", 1)], BEGAN + 1) == ([], ["j"])


def test_notice_is_given_once_and_repeated_as_stale_while_the_worker_lists_it() -> None:
    leases = table(held("b"), held("a"))
    leases.drop("b", tell=True)
    leases.drop("a", tell=True)
    assert leases.take_notices("w", BEGAN) == [Notice("a", 1), Notice("b", 1)]
    assert leases.take_notices("w", BEGAN) == []
    assert leases.renew("w", [Signs("a", 1)], BEGAN + 1) == (["a"], [])


def test_attempt_that_ended_by_itself_makes_no_notice() -> None:
    leases = table()
    leases.drop("j")
    assert leases.take_notices("w", BEGAN) == []


def test_new_attempt_takes_the_place_of_the_old_on_both_sides() -> None:
    leases = table()
    leases.grant(held(attempt=2, worker="v"))
    assert leases.by_job["j"].attempt == 2
    assert {worker: list(jobs) for worker, jobs in leases.by_worker.items()} == {"v": ["j"]}


def test_nothing_is_kept_of_what_is_over() -> None:
    leases = table()
    leases.heard("w", BEGAN, CLAIMED)
    leases.drop("j", tell=True)
    leases.forget("w")
    assert not (leases.by_job or leases.by_worker or leases.seen_at or leases.seen_ms or leases.notices)


@pytest.mark.parametrize(("past", "overdue"), [(-1, False), (0, True)])
def test_attempt_is_overdue_after_its_timeout_and_the_slack(past: int, overdue: bool) -> None:
    leases = table(held(timeout_ms=7_200_000))
    now_ms = CLAIMED + 7_200_000 + 60_000 + past
    assert causes(leases.overdue(now_ms, 60_000)) == ([("j", "timeout")] if overdue else [])


def test_timeout_is_of_running_time_and_may_be_absent() -> None:
    leases = table(held("waits", timeout_ms=1_000, started_ms=None), held("endless", timeout_ms=0))
    assert leases.overdue(CLAIMED + 99 * HOUR, 0) == []


@pytest.mark.parametrize(("age", "given_up"), [(1_799_999, False), (1_800_000, True)])
def test_attempt_that_never_started_is_given_up_after_the_threshold(age: int, given_up: bool) -> None:
    leases = table(held("claimed", started_ms=None), held("running"))
    expected = [("claimed", "never_started")] if given_up else []
    assert causes(leases.never_started(CLAIMED + age, 1_800_000)) == expected


def test_start_that_is_reported_counts() -> None:
    leases = table(held(started_ms=None))
    leases.started("j", 9, CLAIMED, BEGAN)
    assert leases.by_job["j"].started_ms is None, "another attempt's start"
    leases.started("j", 1, CLAIMED + 5, BEGAN + 5)
    assert (leases.by_job["j"].started_ms, leases.by_job["j"].alive_at) == (CLAIMED + 5, BEGAN + 5)


def test_new_leader_gives_up_nothing_it_has_known_for_less_than_a_lease() -> None:
    """After an hour without a leader everything looks overdue; the workers have not had a chance to speak yet."""
    leases = table(
        held("long", timeout_ms=1_000, grace_until_ms=CLAIMED + HOUR + LEASE),
        held("new", started_ms=None, grace_until_ms=CLAIMED + HOUR + LEASE),
    )
    for attempt in leases.by_job.values():
        attempt.renewed_at = attempt.alive_at = BEGAN + HOUR
    early, late = CLAIMED + HOUR + LEASE - 1, CLAIMED + HOUR + LEASE
    mono = BEGAN + HOUR + LEASE - 1
    assert leases.lapsed(mono) == leases.overdue(early, 0) == leases.never_started(early, 1_000) == []
    assert leases.stuck(mono, early, 1_000_000) == []
    assert causes(leases.overdue(late, 0)) == [("long", "timeout")]
    assert causes(leases.never_started(late, 1_000)) == [("new", "never_started")]


# -- stuck -----------------------------------------------------------------------------------------------------------


def run(leases: LeaseTable, seconds: int, signs: Any, *, every: int = 5) -> tuple[int, int]:
    """Heartbeats for that long, each made by ``signs(second)``; answers the (monotonic, unix) ms of the end."""
    for second in range(every, seconds + 1, every):
        leases.renew("w", [signs(second)], BEGAN + second * 1_000)
    return BEGAN + seconds * 1_000, CLAIMED + seconds * 1_000


@pytest.mark.parametrize(
    "signs",
    [
        pytest.param(lambda s: Signs("j", 1, cpu_seconds=s * 0.02), id="cpu"),
        pytest.param(lambda s: Signs("j", 1, output_bytes=s // 1_000), id="a line now and then"),
        pytest.param(lambda s: Signs("j", 1, progress_mtime_ms=s // 2_000), id="progress file touched"),
        pytest.param(lambda s: Signs("j", 1, progress=str(s // 3_000).encode()), id="progress said"),
        pytest.param(lambda s: Signs("j", 1, busy=s % 3_000 == 0), id="its GPU works now and then"),
    ],
)
def test_healthy_twenty_hour_run_is_never_stuck(signs: Any) -> None:
    leases = table()
    for hour in range(1, 21):
        for second in range((hour - 1) * 3600 + 60, hour * 3600 + 1, 60):
            leases.renew("w", [signs(second)], BEGAN + second * 1_000)
            assert leases.stuck(BEGAN + second * 1_000, CLAIMED + second * 1_000, HOUR) == []


def test_run_without_any_sign_of_life_is_stuck_after_the_threshold() -> None:
    leases = table()
    now, now_ms = run(leases, 3_604, lambda s: Signs("j", 1, cpu_seconds=0.0, output_bytes=0))
    assert leases.stuck(now, now_ms, HOUR) == [], "its first heartbeat, at 5 s, is a sign: there was output to count"
    now, now_ms = run(leases, 3_605, lambda s: Signs("j", 1, cpu_seconds=0.0, output_bytes=0))
    (verdict,) = leases.stuck(now, now_ms, HOUR)
    assert verdict.cause == "no_sign_of_life"
    assert verdict.reason == "no output, progress, CPU or GPU use for 3600 s"


def test_polling_is_not_a_sign_of_life() -> None:
    """A hung process that wakes to look at a lock burns a few milliseconds a second."""
    leases = table()
    now, now_ms = run(leases, 4_000, lambda s: Signs("j", 1, cpu_seconds=s * 0.005, output_bytes=0))
    assert causes(leases.stuck(now, now_ms, HOUR)) == [("j", "no_sign_of_life")]


def test_cpu_counts_again_after_its_counter_fell() -> None:
    """A helper process that ended took its CPU time out of the sum; what is left works on."""
    leases = table()
    leases.renew("w", [Signs("j", 1, cpu_seconds=10_000.0)], BEGAN + 5_000)
    now, now_ms = run(leases, 8_000, lambda s: Signs("j", 1, cpu_seconds=float(s)))
    assert leases.stuck(now, now_ms, HOUR) == []


def test_old_attempt_whose_lease_lapsed_is_stuck_for_that_reason() -> None:
    leases = table(held(renewed_at=BEGAN + HOUR - LEASE, alive_at=BEGAN + HOUR - LEASE))
    assert causes(leases.stuck(BEGAN + HOUR, CLAIMED + HOUR, HOUR)) == [("j", "lease_lapsed")]


def test_old_attempt_past_its_timeout_is_stuck_for_that_reason() -> None:
    leases = table(held(timeout_ms=1_000, renewed_at=BEGAN + HOUR, alive_at=BEGAN + HOUR))
    assert causes(leases.stuck(BEGAN + HOUR, CLAIMED + HOUR, HOUR)) == [("j", "timeout")]


def test_reason_without_age_is_not_stuck() -> None:
    leases = table(held(timeout_ms=1_000))
    assert leases.stuck(BEGAN + HOUR - 1, CLAIMED + HOUR - 1, HOUR) == []


def test_stuck_are_listed_longest_in_progress_first() -> None:
    leases = table(held("b"), held("a"), held("c", claimed_ms=CLAIMED - 1))
    assert [v.held.job for v in leases.stuck(BEGAN + HOUR, CLAIMED + HOUR, HOUR)] == ["c", "a", "b"]


def test_sign_of_life_ends_a_stall() -> None:
    leases = table(held(stalled=True, output_bytes=5))
    leases.renew("w", [Signs("j", 1, output_bytes=5)], BEGAN + 5_000)
    assert leases.by_job["j"].stalled
    leases.renew("w", [Signs("j", 1, output_bytes=6)], BEGAN + 10_000)
    assert not leases.by_job["j"].stalled


def test_verdicts_can_be_asked_for_while_attempts_come_and_go() -> None:
    """The operators' API asks from threads of its own."""
    leases = table(*(held(f"j{n}") for n in range(500)))
    failures: list[BaseException] = []
    done = threading.Event()

    def ask() -> None:
        try:
            while not done.is_set():
                leases.stuck(BEGAN + HOUR, CLAIMED + HOUR, HOUR)
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    for n in range(20_000):
        leases.grant(held(f"x{n}"))
        leases.drop(f"x{n}")
    done.set()
    thread.join()
    assert failures == []


def test_a_leader_that_was_deaf_holds_nobodys_silence_against_them() -> None:
    leases = table(held("a"), held("b"))
    woke = BEGAN + 2 * HOUR
    assert len(leases.lapsed(woke)) == 2
    leases.was_deaf(woke)
    assert leases.lapsed(woke + LEASE - 1) == []
    assert leases.stuck(woke + LEASE - 1, CLAIMED + 3 * HOUR, HOUR) == []
    assert len(leases.lapsed(woke + LEASE)) == 2


def test_an_attempt_has_its_grace_before_it_is_overdue() -> None:
    leases = table(held(timeout_ms=60_000, grace_ms=120_000))
    assert leases.overdue(CLAIMED + 179_999, 0) == []
    assert causes(leases.overdue(CLAIMED + 180_000, 0)) == [("j", "timeout")]
