"""The cache of machine code: never stale, and never needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import features

SOURCES = Path(features.__file__).parent
NIGHT = """
from features import CATALOG_BY_NAME, Ledgers, Points, as_of
nine_in_the_evening = Points.at([0], [21 * 3_600_000])
print(as_of(Ledgers.from_bytes([None]), nine_in_the_evening, [CATALOG_BY_NAME["is_night"]]).values)
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, with its cache where there is one."""
    shutil.copytree(SOURCES, tmp_path / "features")
    return tmp_path


def is_night(copy: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", NIGHT],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "HOME": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_changed_constant_of_another_file_never_meets_old_code(copy):
    assert is_night(copy) == "[[0.]]"
    catalog = copy / "features" / "catalog.py"
    catalog.write_text(
        catalog.read_text().replace("NIGHT_BEGINS_HOUR = 22", "NIGHT_BEGINS_HOUR = 20")
    )
    assert is_night(copy) == "[[1.]]"


@pytest.mark.parametrize("bytes_left", [0, 40, 1000])
def test_a_damaged_cache_is_made_anew(copy, bytes_left):
    assert is_night(copy) == "[[0.]]"
    damaged = sorted((copy / "features").rglob("sweep.sweep*"))
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:bytes_left])
    assert is_night(copy) == "[[0.]]"
