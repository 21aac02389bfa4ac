"""Every test has a budget of time: what it may take by itself, without what others share with it.

    BUDGET_S                               unless it says another: @pytest.mark.budget(25, "why it must")
    counted                                the test, and fixtures that are made for it alone
    not counted                            fixtures of a module or a session, and what ends afterwards
    beyond its budget                      listed at the end of the run
    beyond TOLERANCE times its budget      failed, with what it took
    beyond HANG_TIMES its budget           ended by pytest-timeout, with every thread's stack

Two cores that others use, too, make a test slow by chance; what fails for that costs a day. So a test only
fails far beyond its budget, and further where more processes than cores want to run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from typing import Any

import pytest

BUDGET_S = 10.0
TOLERANCE = 3.0
HANG_TIMES = 12
HANG_S_MIN = 300.0

_SHARED_S = pytest.StashKey[float]()
"""Seconds of a test's set-up that went into fixtures it shares."""
_OWN_S = pytest.StashKey[float]()
"""Seconds that its own fixtures took."""
_PROPERTY = "seconds beyond budget"


def budget_of(item: pytest.Item) -> float:
    """Seconds that a test may take."""
    marker = item.get_closest_marker("budget")
    if marker is None:
        return BUDGET_S
    seconds, reason = marker.args
    assert seconds > BUDGET_S, f"{item.nodeid}: a budget of {BUDGET_S:.0f} s needs no marker"
    assert reason.strip(), f"{item.nodeid}: say why it must take longer"
    return float(seconds)


def contention() -> float:
    """How many times slower than alone a process is now, about: runnable processes for each core."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        budget_s = budget_of(item)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(max(HANG_S_MIN, HANG_TIMES * budget_s)))


_fixture_depth = 0
_shared_s = 0.0


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Counts what goes into shared fixtures; one that asks for another is counted once."""
    global _fixture_depth, _shared_s
    if fixturedef.scope == "function":
        return (yield)
    begin = time.monotonic()
    _fixture_depth += 1
    try:
        return (yield)
    finally:
        _fixture_depth -= 1
        if not _fixture_depth:
            _shared_s += time.monotonic() - begin


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    global _shared_s
    _shared_s = 0.0
    begin = time.monotonic()
    try:
        return (yield)
    finally:
        item.stash[_OWN_S] = time.monotonic() - begin - _shared_s


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when != "call" or report.outcome == "skipped":
        return report
    taken_s, budget_s = item.stash.get(_OWN_S, 0.0) + call.duration, budget_of(item)
    if taken_s <= budget_s:
        return report
    report.user_properties.append((_PROPERTY, f"{taken_s:.1f} s of {budget_s:.0f} s"))
    limit_s = TOLERANCE * budget_s * contention()
    if report.passed and taken_s > limit_s:
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} took {taken_s:.1f} s; its budget is {budget_s:.0f} s, and beyond "
            f"{limit_s:.0f} s it fails. Make it faster, or give it @pytest.mark.budget(seconds, reason)."
        )
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Lists the tests beyond their budgets."""
    beyond = [
        (report.nodeid, value)
        for name in ("passed", "failed")
        for report in terminalreporter.stats.get(name, [])
        for key, value in getattr(report, "user_properties", [])
        if key == _PROPERTY
    ]
    if beyond:
        terminalreporter.section("beyond their budgets")
        for nodeid, value in beyond:
            terminalreporter.write_line(f"{value}  {nodeid}")
