"""What waits, and what is dropped."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2p.transport.outbox import BATCH_BYTES, BATCH_COUNT, Limits, Outbox


def drain(outbox: Outbox) -> list[bytes]:
    found = []
    while batch := outbox.take():
        found += batch
    return found


def test_a_full_control_queue_drops_its_oldest() -> None:
    outbox = Outbox(Limits(count=3, bytes=100, drop="oldest"))
    assert all(outbox.put(b"%d" % n) for n in range(5))
    assert (drain(outbox), outbox.dropped) == ([b"2", b"3", b"4"], 2)


def test_a_full_log_queue_drops_the_newcomer() -> None:
    outbox = Outbox(Limits(count=3, bytes=100, drop="newest"))
    assert [outbox.put(b"%d" % n) for n in range(5)] == [True, True, True, False, False]
    assert (drain(outbox), outbox.dropped) == ([b"0", b"1", b"2"], 2)


def test_one_payload_always_fits_into_an_empty_queue() -> None:
    for drop in ("oldest", "newest"):
        outbox = Outbox(Limits(count=3, bytes=10, drop=drop))  # type: ignore[arg-type]
        assert outbox.put(bytes(1000))
        assert drain(outbox) == [bytes(1000)]


def test_a_batch_is_bounded_and_a_large_payload_travels_alone() -> None:
    outbox = Outbox(Limits(count=10_000, bytes=100 * BATCH_BYTES, drop="newest"))
    outbox.put(bytes(2 * BATCH_BYTES))
    for _ in range(BATCH_COUNT + 1):
        outbox.put(b"small")
    outbox.put(bytes(BATCH_BYTES // 2))
    outbox.put(bytes(BATCH_BYTES // 2))
    assert [len(outbox.take()) for _ in range(5)] == [1, BATCH_COUNT, 2, 1, 0]


SIZES = st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=60)


@given(SIZES, st.sampled_from(["oldest", "newest"]))
def test_the_bounds_hold_and_everything_is_accounted_for(steps: list[tuple[int, bool]], drop: str) -> None:
    outbox = Outbox(Limits(count=5, bytes=60, drop=drop))  # type: ignore[arg-type]
    offered, taken = 0, 0
    for size, take in steps:
        outbox.put(bytes(size))
        offered += 1
        assert len(outbox) <= 5
        assert outbox.bytes <= 60
        if take:
            taken += len(outbox.take())
    held = len(outbox)
    assert offered == taken + held + outbox.dropped
    assert sum(map(len, drain(outbox))) >= 0
    assert outbox.bytes == 0


def test_clearing_counts_what_it_drops() -> None:
    outbox = Outbox(Limits(count=5, bytes=60, drop="newest"))
    for _ in range(3):
        outbox.put(b"x")
    outbox.clear()
    assert (len(outbox), outbox.bytes, outbox.dropped, outbox.take()) == (0, 0, 3, [])
