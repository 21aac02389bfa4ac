"""The cache of machine code: never stale, and never needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import features
from tests import slices

SOURCES = Path(features.__file__).parent
BYTES_LEFT = [0, 40, 1000]
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


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A package of one short function, compiled as the features are: in a second instead of twelve."""
    folder = tmp_path / "features"
    folder.mkdir()
    shutil.copy2(SOURCES / "compiled.py", folder)
    (folder / "__init__.py").touch()
    (folder / "factor.py").write_text("FACTOR = 2\n")
    (folder / "product.py").write_text(PRODUCT)
    return tmp_path


PRODUCT = """
from features.compiled import compiled
from features.factor import FACTOR

@compiled("int64(int64)")
def product(number):
    return FACTOR * number
"""


def said(copy: Path, code: str) -> str:
    """What code prints that imports a copy."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "HOME": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def is_night(copy: Path) -> str:
    return said(copy, NIGHT)


def product_of_21(copy: Path) -> str:
    return said(copy, "from features.product import product; print(product(21))")


def damage(copy: Path, pattern: str, bytes_left: int) -> None:
    damaged = sorted((copy / "features").rglob(pattern))
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:bytes_left])


@pytest.mark.sliced
@pytest.mark.budget(30, "all features are compiled, which takes twelve seconds")
@pytest.mark.parametrize("case", slices.some("compiled features", 1 + len(BYTES_LEFT), 1))
def test_features_are_compiled_anew_where_their_cache_does_not_hold(copy, case):
    """A slice of it: the tests below show the same of one function."""
    assert is_night(copy) == "[[0.]]"
    if case < len(BYTES_LEFT):
        damage(copy, "sweep.sweep*", BYTES_LEFT[case])
        assert is_night(copy) == "[[0.]]"
        return
    catalog = copy / "features" / "catalog.py"
    catalog.write_text(
        catalog.read_text().replace("NIGHT_BEGINS_HOUR = 22", "NIGHT_BEGINS_HOUR = 20")
    )
    assert is_night(copy) == "[[1.]]"


def test_a_changed_factor_of_another_file_never_meets_old_code(small):
    assert product_of_21(small) == "42"
    (small / "features" / "factor.py").write_text("FACTOR = 3\n")
    assert product_of_21(small) == "63"


@pytest.mark.parametrize("bytes_left", BYTES_LEFT)
def test_a_damaged_cache_of_one_function_is_made_anew(small, bytes_left):
    assert product_of_21(small) == "42"
    damage(small, "product.product*", bytes_left)
    assert product_of_21(small) == "42"
