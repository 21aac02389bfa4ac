"""Through which instant the store is complete, and when a job is stuck."""

from __future__ import annotations

import pytest

from stores.redis_store import META_KEY, PROGRESS_KEY, OnlineStore
from stream_job.watch import (
    CLOCK_SKEW_MS,
    STUCK_AFTER_S,
    Completeness,
    Movement,
    expired,
    lag,
    name_state,
)

NOW = 1_000_000
A, B = ("transactions", 0), ("transactions", 1)


@pytest.mark.parametrize(
    ("ends", "progress", "through"),
    [
        # Of no topic nothing is known.
        ({}, {}, -1),
        # More was applied than there is: it came from elsewhere.
        ({A: (0, 5)}, {A: (6, 10)}, -1),
        ({A: (0, 5)}, {A: (5, 10), B: (1, 10)}, -1),
        # All of both partitions is applied: complete now, whenever the last event came.
        ({A: (0, 5), B: (0, 0)}, {A: (5, 10)}, NOW),
        # One is behind: complete until just before its last applied event was appended.
        ({A: (0, 6), B: (0, 3)}, {A: (5, 10), B: (3, 99)}, 9),
        # Nothing of it was ever applied: nothing can be said.
        ({A: (0, 1)}, {}, -1),
        # What retention has removed from the topic is nobody's to apply.
        ({A: (7, 7)}, {A: (5, 10)}, NOW),
    ],
)
def test_complete_through(ends, progress, through):
    assert Completeness().through_ms(ends, progress, NOW) == through


def test_what_was_complete_stays_so():
    completeness = Completeness()
    ends, progress = {A: (0, 5), B: (0, 5)}, {A: (5, 10), B: (5, 20)}
    assert completeness.through_ms(ends, progress, 1_000) == 1_000
    # An event of A waits, whose last one is long past: all of the look before is there all the same.
    assert completeness.through_ms(ends | {A: (0, 6)}, progress, 2_000) == 1_000
    # So do two of B, which was still complete then.
    behind = {A: (0, 6), B: (0, 7)}
    assert completeness.through_ms(behind, progress, 3_000) == 1_000
    assert completeness.through_ms(behind, progress | {A: (6, 2_900)}, 3_100) == 2_000
    assert completeness.through_ms(behind, {A: (6, 2_900), B: (6, 2_500)}, 3_200) == 2_499
    # A Postgres that was set back, and a clock.
    back = completeness.through_ms(behind, {A: (3, 500), B: (6, 2_500)}, 3_300)
    assert back == 499
    ends, progress = {A: (0, 5)}, {A: (5, 10)}
    assert completeness.through_ms(ends, progress, 3_400) == 3_400
    assert completeness.through_ms(ends, progress, 3_350) == 3_350
    # Topics that were made anew: of those nothing is known.
    assert completeness.through_ms({A: (0, 1)}, {A: (6, 2_900)}, 4_000) == -1
    assert completeness.through_ms({A: (0, 7)}, {A: (6, 2_900)}, 5_000) == 2_899


def test_of_a_clock_that_was_ahead_nothing_is_concluded_once_it_is_corrected():
    completeness = Completeness()
    hour = 3_600_000
    ends, progress = {A: (0, 5), B: (0, 5)}, {A: (5, 10), B: (5, 20)}
    assert completeness.through_ms(ends, progress, NOW + hour) == NOW + hour
    # An event of A, appended by the clock that is ahead, is applied; another one waits.
    ends, progress = {A: (0, 7), B: (0, 5)}, {A: (6, NOW + hour), B: (5, 20)}
    assert completeness.through_ms(ends, progress, NOW + hour + 10) == NOW + hour
    # The clock is corrected: what is known is from the other clock, and an event waits.
    assert completeness.through_ms(ends, progress, NOW) == -1
    assert completeness.through_ms(ends, progress, NOW + 100) == -1
    # All is applied: complete by the clock that is right.
    progress = {A: (7, NOW + 150), B: (5, 20)}
    assert completeness.through_ms(ends, progress, NOW + 200) == NOW + 200
    # Clocks of two machines differ a little: that is no jump.
    ends = {A: (0, 9), B: (0, 5)}
    progress = {A: (8, NOW + 300 + CLOCK_SKEW_MS // 2), B: (5, 20)}
    assert completeness.through_ms(ends, progress, NOW + 300) == NOW + 300


def test_the_store_takes_back_what_a_clock_that_was_ahead_said(stack, tmp_path):
    """The online store of a folder of its own: the shared one has no stream."""
    url = stack.settings.store_urls()[0]
    online = OnlineStore(url.replace("/0", "/7"))
    try:
        online.redis.flushdb()
        online.install()
        online.redis.hset(META_KEY, mapping={"card_key": "k", "format": "1"})
        online.redis.set(PROGRESS_KEY, "k -1 1")

        def said(through_ms: int, latest_ms: int) -> int | None:
            online.advance_stream(through_ms, latest_ms)
            through = online.stream_through_ms()
            assert (online.redis.get(PROGRESS_KEY) or b"").split()[1] == str(through).encode()
            return through

        assert said(1_000, 3_000) == 1_000
        assert said(900, 3_000) == 1_000  # it never goes back while the clock goes on
        assert said(9_000, 11_000) == 9_000  # the clock is ahead
        assert said(-1, 3_100) == -1  # it is corrected, and events wait
        assert said(1_100, 3_100) == 1_100
    finally:
        online.redis.flushdb()
        online.close()


def test_lag_counts_what_can_still_be_applied():
    assert lag({A: (4, 9), B: (0, 2)}, {A: (2, 0), B: (2, 0)}) == 5


def test_what_retention_removed_unapplied_is_counted():
    assert expired({A: (7, 9), B: (0, 2)}, {A: (5, 0)}) == 2


def test_a_job_is_stuck_when_events_of_a_partition_wait_and_none_is_applied():
    movement = Movement()

    def state(a: int, b: int, now_s: float) -> str:
        ends, progress = {A: (0, 10), B: (0, 10)}, {A: (a, 0), B: (b, 0)}
        return name_state(ends, progress, movement.unmoved_s(ends, progress, now_s))

    assert state(10, 10, 0.0) == "running"
    assert state(7, 7, 1.0) == "behind"
    assert state(8, 7, 2.0) == "behind"
    # One partition goes on, the other does not.
    assert state(9, 7, 1.0 + STUCK_AFTER_S) == "stuck"
    assert state(9, 8, 1.1 + STUCK_AFTER_S) == "behind"
    assert state(10, 10, 9.0) == "running"
    assert state(11, 10, 9.1) == "ahead"
