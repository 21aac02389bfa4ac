"""Long tests in slices: what CI proves of them with each commit, and how to run the whole.

A test that is long by its nature, such as a kill at each of many places, takes a part of its cases, drawn by the
commit: different cases with each commit, the same for everybody who has it. The seed is printed; TALLY_TEST_SEED
sets another, and TALLY_TEST_WHOLE=true takes all cases, as `make chaos` and `make parity` do.
"""

from __future__ import annotations

import os
import random
import subprocess
from functools import cache
from pathlib import Path

SEED, WHOLE = "TALLY_TEST_SEED", "TALLY_TEST_WHOLE"
IS_WHOLE = os.environ.get(WHOLE, "").lower() in ("1", "true")


@cache
def seed() -> str:
    """What slices are drawn by: TALLY_TEST_SEED, or the commit."""
    if chosen := os.environ.get(SEED):
        return chosen
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "no commit"
    return done.stdout.strip()


def drawn(name: str) -> random.Random:
    """Random numbers of a test, by the commit: of its cases, and of what happens in them."""
    return random.Random(f"{seed()} {name}")


def of(whole: int, part: int) -> int:
    """How many cases of a test are run: a part, or the whole."""
    return whole if IS_WHOLE else part


def some(name: str, whole: int, part: int) -> list[int]:
    """Which of the cases 0 … whole - 1 are run, for `parametrize`."""
    return sorted(drawn(name).sample(range(whole), of(whole, part)))


def pytest_report_header() -> str:
    if IS_WHOLE:
        return f"long tests: whole, seed {seed()} ({SEED})"
    return f"long tests: a slice of each, by {SEED}={seed()}; all of it with {WHOLE}=true"
