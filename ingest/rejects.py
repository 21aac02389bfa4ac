"""Rows that could not be read: kept in a file, one JSON object a line, with where and why.

The raw text is kept but for card numbers, of which the last four digits stay: the line number
leads back to the source.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

_CARD_DIGITS_MIN = 8
_LONG_NUMBER = re.compile(r"(?<![\w.])\d{8,19}(?![\w])")
_ANY_DIGITS = re.compile(r"\d(?:[ .-]?\d){7,}")


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


def masked(text: str) -> str:
    """The text with every number of 8 to 19 digits cut to its last four."""
    return _LONG_NUMBER.sub(lambda m: "*" * (len(m[0]) - 4) + m[0][-4:], text)


def masked_card(text: str) -> str:
    """A card column's text, however mangled, with all digits but the last four blotted out."""
    digits = sum(character.isdigit() for character in text)
    if digits < _CARD_DIGITS_MIN:
        return text
    hidden = iter(range(digits - 4))
    return "".join(
        "*" if character.isdigit() and next(hidden, None) is not None else character
        for character in text
    )


def masked_digits(text: str) -> str:
    """A text without columns: whatever could be a card number in any spelling is cut."""
    return _ANY_DIGITS.sub(lambda m: masked_card(m[0]), text)


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
        with os.fdopen(handle, "a") as file:
            file.write(json.dumps(asdict(reject)) + "\n")
        self.count += 1
