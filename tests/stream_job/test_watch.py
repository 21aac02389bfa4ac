"""Through which instant the store is complete, and when a job is stuck."""

from __future__ import annotations

import pytest

from stream_job.watch import STUCK_AFTER_S, Movement, complete_through, lag

NOW = 1_000_000
A, B = ("transactions", 0), ("transactions", 1)


@pytest.mark.parametrize(
    ("ends", "progress", "through"),
    [
        ({}, {}, NOW),
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
    assert complete_through(ends, progress, NOW) == through


def test_lag_counts_what_can_still_be_applied():
    assert lag({A: (4, 9), B: (0, 2)}, {A: (2, 0), B: (2, 0)}) == 5


def test_a_job_is_stuck_when_events_wait_and_none_is_applied():
    movement = Movement()
    assert movement.judge(10, 0, 0.0) == ("running", 0.0)
    assert movement.judge(10, 3, 1.0)[0] == "behind"
    assert movement.judge(11, 3, 2.0)[0] == "behind"
    assert movement.judge(11, 3, 2.0 + STUCK_AFTER_S) == ("stuck", STUCK_AFTER_S)
    assert movement.judge(14, 0, 9.0) == ("running", 0.0)
