"""What one value is worth."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """The status of one value; the numbers are those of `tally.v1.FeatureStatus`.

    Values whose status is not PRESENT are NaN.
    """

    PRESENT = 1
    EMPTY_WINDOW = 2
    UNKNOWN_CARD = 3
    BEFORE_HISTORY = 4
    MISSING_INPUT = 5
    UNDEFINED = 6
    UNKNOWN_CATEGORY = 7
    STORE_INCOMPLETE = 8
    MISSING_FACT = 9
    NOT_COMPUTED = 10
