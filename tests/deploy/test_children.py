"""When a child is started, and when it is given up: states and instants, without a process."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.children import PAUSE_S_FIRST, PAUSE_S_MAX, STEADY_S, Life, Phase, Readiness
from deploy.processes import START_TIMEOUT_S
from deploy.tasks import Task


def up(now_s: float = 0.0) -> Life:
    life = Life()
    life.started(now_s)
    life.looked_at(Readiness.READY, now_s)
    return life


def test_a_child_that_ends_is_started_again_at_once_and_then_after_pauses_that_grow():
    #   up ─ ends ─ 0 s ─ ends ─ 1 s ─ ends ─ 2 s ─ ends ─ 4 s ...
    life, pauses, now_s = up(), [], 1.0
    for _ in range(9):
        life.ended(now_s)
        pauses.append(life.start_at_s - now_s)
        assert not life.may_start(life.start_at_s - 0.001) or not pauses[-1]
        assert life.may_start(life.start_at_s)
        now_s = life.start_at_s
        life.started(now_s)
        life.looked_at(Readiness.READY, now_s)
    assert pauses == [0.0, *(PAUSE_S_FIRST * 2**n for n in range(5)), *[PAUSE_S_MAX] * 3]


def test_a_child_that_was_up_for_long_is_started_again_at_once():
    life = up()
    for now_s in (1.0, 2.0, 3.0):
        life.ended(now_s)
        life.started(now_s)
        life.looked_at(Readiness.READY, now_s)
    life.ended(3.0 + STEADY_S)
    assert life.may_start(3.0 + STEADY_S)


def test_a_start_that_fails_is_tried_again_after_a_pause():
    life = Life()
    assert life.may_start(0.0)
    life.ended(0.0)
    assert life.phase is Phase.DOWN
    assert not life.may_start(PAUSE_S_FIRST - 0.001)
    assert life.may_start(PAUSE_S_FIRST)


def test_a_start_is_overdue_after_its_time_unless_the_child_says_that_it_recovers():
    life = Life()
    life.started(0.0)
    life.looked_at(Readiness.NOT_YET, START_TIMEOUT_S - 1)
    assert life.is_overdue(START_TIMEOUT_S)
    life.looked_at(Readiness.RECOVERING, START_TIMEOUT_S - 1)
    assert not life.is_overdue(START_TIMEOUT_S)
    assert life.is_overdue(2 * START_TIMEOUT_S)
    life.looked_at(Readiness.READY, 2 * START_TIMEOUT_S)
    assert not life.is_overdue(9 * START_TIMEOUT_S)


def test_a_child_that_is_up_or_starting_is_not_started():
    life = Life()
    life.started(0.0)
    assert not life.may_start(1e9)
    life.looked_at(Readiness.READY, 1.0)
    assert not life.may_start(1e9)


@given(st.lists(st.sampled_from(["start", "ready", "recovering", "end"]), max_size=3_000))
def test_no_run_of_events_has_a_child_wait_longer_than_the_longest_pause(events):
    life, now_s = Life(), 0.0
    for event in events:
        now_s += 0.01
        if event == "start" and life.may_start(now_s):
            life.started(now_s)
        elif event == "end":
            life.ended(now_s)
        elif life.phase is Phase.STARTING:
            life.looked_at(Readiness.READY if event == "ready" else Readiness.RECOVERING, now_s)
        assert life.start_at_s - now_s <= PAUSE_S_MAX


def test_a_task_holds_nobody_up_and_gives_its_result_or_its_error():
    let_go = threading.Event()
    slow = Task(lambda: let_go.wait(30))
    assert not slow.is_done()
    let_go.set()
    assert slow.is_done(30)
    assert slow.result() is True
    failed = Task(lambda: 1 // 0)
    assert failed.is_done(30)
    with pytest.raises(ZeroDivisionError):
        failed.result()
