"""Rows that could not be read: kept in a file, one JSON object a line, with where and why.

The raw text is kept but for card numbers, of which the last four digits stay: the line number
leads back to the source.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Reject:
    """One row that was not loaded."""

    file: str
    """The file it is in."""
    line: int
    """Its line (CSV) or row (Parquet) there, from 1."""
    reason: str
    """A code, such as CARD_PRECISION_LOST."""
    field: str
    """The column at fault; empty for the row as a whole."""
    detail: str
    """What is wrong, for a person."""
    raw: str
    """The row's text, card numbers masked."""


class RejectsFile:
    """Appends rejects to a file that is made with the first of them."""

    def __init__(self, path: Path) -> None:
        """Takes the path; an earlier file of the same load is replaced."""
        self.path = path
        self.count = 0
        path.unlink(missing_ok=True)

    def add(self, reject: Reject) -> None:
        """Writes one reject, through to the file."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        with os.fdopen(handle, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(reject)) + "\n")
        self.count += 1
