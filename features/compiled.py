"""Compiles functions of this package to machine code, by numba, when the package is imported.

What was compiled once is loaded from a cache. numba's own cache heeds the file that a function is
in and no other, so that a changed constant or helper of another file would leave old code in use.
Here the cache's folder is named by a digest of every file of this package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

_HERE = Path(__file__).parent


def _cache_folder() -> Path:
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(_HERE.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return _HERE / "__pycache__" / f"compiled-{digest.hexdigest()[:16]}"


_CACHE_FOLDER = _cache_folder()


def compiled(signature: object = None, *, inline: bool = False) -> Callable[[Function], Function]:
    """Makes a function machine code, at once for a signature, or for each kind of arguments.

    IEEE 754 arithmetic is kept to the letter: no reordering, no fused operations, a division by
    zero gives infinity or NaN. The function holds no interpreter lock while it runs.

    Args:
        signature: of numba, or its text, such as "float64(int64, int64)".
        inline: whether callers that are compiled take the function's body in.
    """

    def decorate(function: Function) -> Function:
        config: Any = numba.config
        configured = config.CACHE_DIR
        try:
            config.CACHE_DIR = str(_CACHE_FOLDER) if _is_writable() else configured
            made: Any = numba.njit(
                signature,
                cache=_is_writable(),
                error_model="numpy",
                nogil=True,
                inline="always" if inline else "never",
            )(function)
        finally:
            config.CACHE_DIR = configured
        return cast("Function", made)

    return decorate


def _is_writable() -> bool:
    """Whether code can be kept; where it cannot, each process compiles for itself."""
    try:
        _CACHE_FOLDER.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _CACHE_FOLDER.is_dir()
    return True
