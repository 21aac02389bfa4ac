"""Bounds the logs of the stack's processes.

They are written by the processes themselves, through descriptors that they keep: so nobody's writing
waits for anyone else. A log that is full is copied beside itself and emptied; its writers append, and go
on at its beginning. A line that is written between the two may be lost.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

LOG_BYTES_MAX = 16 << 20
LOGS_KEPT = 2
"""Full ones that are kept of each process: name.log.1 is the newest."""


def rotate(folder: Path, bytes_max: int = LOG_BYTES_MAX) -> None:
    """Sets aside the logs of a folder that are full; on a full disk, what is in them is dropped."""
    for path in folder.glob("*.log"):
        with suppress(OSError):
            if path.stat().st_size > bytes_max:
                _set_aside(path)


def _set_aside(path: Path) -> None:
    numbered = [path.with_name(f"{path.name}.{n}") for n in range(1, LOGS_KEPT + 1)]
    with suppress(OSError):
        for older, newer in zip(numbered[::-1], numbered[-2::-1], strict=False):
            if newer.exists():
                newer.replace(older)
        try:
            with path.open("rb") as source, numbered[0].open("wb") as target:
                shutil.copyfileobj(source, target)
        except OSError:
            numbered[0].unlink(missing_ok=True)
    os.truncate(path, 0)
