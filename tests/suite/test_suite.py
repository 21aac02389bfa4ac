"""The suite itself: budgets are held, slices can be repeated, changed tests are found, nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import flaky, slices
from tests.conftest import ROOT

SHORT_BUDGET = """
import pytest
from tests import budgets
pytest_plugins = ["tests.budgets"]
budgets.BUDGET_S = 0.2
budgets.contention = lambda: 1.0

def pytest_configure(config):
    config.addinivalue_line("markers", "budget(seconds, reason): more time")
"""
SLOW_AND_FAST = """
import time
import pytest

def wait_s(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)

@pytest.fixture(scope="module")
def shared():
    wait_s(1)

@pytest.fixture
def its_own():
    wait_s(1)

def test_fast(): pass
def test_with_what_others_share(shared): pass
def test_a_little_slow(): wait_s(0.3)
def test_slow(): wait_s(1)
def test_slow_to_set_up(its_own): pass
@pytest.mark.budget(2, "it waits")
def test_slow_with_a_reason(): wait_s(1)
"""


def session(folder: Path, *options: str, **files: str) -> subprocess.Popen[str]:
    """A pytest session of files in a folder, which are given by their names without .py."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *options, folder]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DEBUG_TEMPROOT": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_test_fails_that_takes_much_longer_than_its_budget(tmp_path):
    run = session(tmp_path, conftest=SHORT_BUDGET, test_it=SLOW_AND_FAST)
    said, _ = run.communicate(timeout=60)
    outcomes = {
        name.rpartition("::")[2]: word
        for word, name, *_ in (line.split() for line in said.splitlines() if "::" in line)
        if word in ("PASSED", "FAILED")
    }
    assert outcomes == {
        "test_fast": "PASSED",
        "test_with_what_others_share": "PASSED",
        "test_a_little_slow": "PASSED",
        "test_slow": "FAILED",
        "test_slow_to_set_up": "FAILED",
        "test_slow_with_a_reason": "PASSED",
    }
    listed = said.partition("beyond their budgets")[2]
    assert "test_a_little_slow" in listed
    assert "test_fast" not in listed.partition("short test summary")[0]


def test_a_budget_needs_a_reason_and_a_need(tmp_path):
    for marker in ('(30, "")', '(0.1, "it is fast")'):
        text = f"import pytest\n@pytest.mark.budget{marker}\ndef test_it(): pass\n"
        run = session(tmp_path, conftest=SHORT_BUDGET, test_it=text)
        said, _ = run.communicate(timeout=60)
        assert run.returncode != 0
        assert "AssertionError" in said


def test_a_slice_is_the_same_for_one_commit_and_another_for_another(monkeypatch):
    def slice_of(commit: str) -> list[int]:
        monkeypatch.setenv(slices.SEED, commit)
        slices.seed.cache_clear()
        return slices.some("a test", 1_000, 20)

    monkeypatch.setattr(slices, "IS_WHOLE", False)
    assert slice_of("one") == slice_of("one") != slice_of("another")
    assert len(set(slice_of("one"))) == 20
    monkeypatch.setattr(slices, "IS_WHOLE", True)
    assert slice_of("one") == list(range(1_000))
    slices.seed.cache_clear()


MODULE = '''"""Tests."""

import pytest

SIZE = 3


@pytest.mark.parametrize("n", [1])
def test_first(n):
    assert n


def test_second():
    assert SIZE
'''


@pytest.mark.parametrize(
    ("diff", "tests"),
    [
        ("@@ -9 +9 @@", ["test_first"]),
        ("@@ -8 +8 @@", ["test_first"]),  # its decorator
        ("@@ -12,0 +13,2 @@", ["test_second"]),
        ("@@ -9 +9 @@\n@@ -13 +13 @@", ["test_first", "test_second"]),
        ("@@ -5 +5 @@", ["test_first", "test_second"]),  # what both may use
        ("@@ -10,2 +9,0 @@", ["test_first"]),  # taken away
        ("@@ -11 +11 @@", []),  # an empty line
    ],
)
def test_changed_tests_are_found(diff, tests):
    assert flaky.chosen_of(MODULE, flaky.changed_lines(diff)) == tests


LEFT = """
import os, signal
from tests.conftest import running

def test_it(tmp_path):
    with running(tmp_path / "data") as stack:
        print(stack.data)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.budget(20, "a stack starts, and stops after its session has died")
def test_a_session_that_is_killed_leaves_no_stack_behind(tmp_path):
    conftest = "from tests.conftest import *\nfrom tests.conftest import pytest_configure\n"
    run = session(tmp_path, "-s", conftest=conftest, test_it=LEFT)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == -signal.SIGKILL
    (data,) = {Path(word) for word in said.split() if word.endswith("/data")}
    assert (data / "logs" / "supervisor.log").exists()
    assert wait_until(lambda: not list(data.glob("postgres*")))
    assert not [p.pid for p in psutil.process_iter(["cmdline"]) if str(data) in _command_of(p)]


def _command_of(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or ())


def wait_until(holds, within_s: float = 60.0) -> bool:
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
