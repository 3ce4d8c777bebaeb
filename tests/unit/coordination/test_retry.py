"""Backoff: doubled, capped, jittered down by at most a half, and the same on every voter."""

from __future__ import annotations

import pytest

from coordination.retry import MAX_BACKOFF_MS, backoff_ms


@pytest.mark.parametrize(
    ("base", "failures", "full"),
    [
        (10_000, 1, 10_000),
        (10_000, 2, 20_000),
        (10_000, 5, 160_000),
        (10_000, 7, MAX_BACKOFF_MS),
        (10_000, 100, MAX_BACKOFF_MS),
        (600_000, 1, MAX_BACKOFF_MS),
        (1, 31, MAX_BACKOFF_MS),
    ],
)
def test_wait_doubles_up_to_ten_minutes_less_at_most_a_half(base: int, failures: int, full: int) -> None:
    waits = [backoff_ms(base, failures, f"job{n}") for n in range(500)]
    assert all(full / 2 < wait <= full for wait in waits)
    if full > 1_000:
        assert max(waits) - min(waits) > 0.4 * full, "a crowd is spread over the whole range"


@pytest.mark.parametrize("base", [0, -1])
def test_no_backoff_asked_for_is_no_wait(base: int) -> None:
    assert backoff_ms(base, 3, "a") == 0


def test_wait_is_a_number_every_voter_computes() -> None:
    assert [backoff_ms(10_000, n, "01hzy3") for n in (1, 2, 3)] == [5965, 13710, 29380]
    assert backoff_ms(10_000, 1, "other") != backoff_ms(10_000, 1, "01hzy3")
