"""Compiles functions of this package to machine code, by numba, when the package is imported.

What was compiled once is loaded from a cache. numba's own cache heeds the file that a function is
in and no other, so that a changed constant or helper of another file would leave old code in use.
Here the cache's folder is named by a digest of every file of this package. It lies beside the
sources or, where these cannot be written to, in the user's cache; where nothing can be written,
every process compiles for itself.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

Function = TypeVar("Function", bound=Callable[..., Any])

_HERE = Path(__file__).parent

integer = cast("Callable[[Any], int]", np.int64)
"""What int() is not in machine code: always of 64 bits and signed."""


def _cache_folder() -> Path | None:
    """A folder for this version of the code that can be written to; None where there is none."""
    digest = hashlib.sha256(f"{numba.__version__} {np.__version__}".encode())
    sources = sorted(_HERE.glob("*.py"))
    if not sources:
        return None  # within an archive: nothing would tell one version from another
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for parent in (_HERE / "__pycache__", Path(home) / "tally"):
        folder = parent / f"compiled-{digest.hexdigest()[:16]}"
        probe = folder / f"probe-{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError:
            continue
        return folder
    return None


_CACHE_FOLDER = _cache_folder()


def array_type(dtype: npt.DTypeLike, dimensions: int = 1, *, readonly: bool = True) -> Any:
    """numba's type of a contiguous array; one that is readonly takes any."""
    item = numba.from_dtype(np.dtype(dtype))
    return numba.types.Array(item, dimensions, "C", readonly=readonly)


def compiled(signature: object = None, *, inline: bool = False) -> Callable[[Function], Function]:
    """Makes a function machine code, at once for a signature, or for each kind of arguments.

    IEEE 754 arithmetic is kept to the letter: no reordering, no fused operations, a division by
    zero gives infinity or NaN. The function holds no interpreter lock while it runs. It checks no
    bounds: whoever calls it does.

    Args:
        signature: of numba, or its text, such as "float64(int64, int64)".
        inline: whether callers that are compiled take the function's body in.
    """

    def decorate(function: Function) -> Function:
        try:
            return cast("Function", _compile(function, signature, inline))
        except (EOFError, pickle.UnpicklingError):
            # The cache is damaged. Whatever of it is in use by now is in memory.
            assert _CACHE_FOLDER is not None
            for damaged in _CACHE_FOLDER.iterdir():
                shutil.rmtree(damaged, ignore_errors=True)
            return cast("Function", _compile(function, signature, inline))

    return decorate


def _compile(function: Callable[..., Any], signature: object, inline: bool) -> Any:
    config: Any = numba.config
    configured = config.CACHE_DIR
    try:
        config.CACHE_DIR = str(_CACHE_FOLDER or configured)
        return numba.njit(
            signature,
            cache=_CACHE_FOLDER is not None,
            error_model="numpy",
            nogil=True,
            inline="always" if inline else "never",
        )(function)
    finally:
        config.CACHE_DIR = configured
