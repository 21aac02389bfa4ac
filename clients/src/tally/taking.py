"""Takes arguments as callers have them, or says by name what an argument takes.

numpy's and pandas' own numbers and instants are taken where Python's are. Nothing is taken that would have
to be guessed: no truth value for a number, no text for a time.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np

CARD_ID_BYTES = 16
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_INSTANT = "a datetime with a time zone, or whole milliseconds since 1970-01-01 UTC (int)"


def refused(field: str, takes: str, value: object, hint: str = "") -> TypeError:
    """The error of an argument of a wrong type."""
    said = f"{field} takes {takes}, not {type(value).__name__}"
    return TypeError(f"{said}: {hint}" if hint else said)


def card(value: Any) -> str | None:
    """A card number."""
    if value is None or isinstance(value, str):
        return value
    takes = "the card number as text (str)"
    if isinstance(value, bool | np.bool_ | bytes):
        raise refused("card", takes, value)
    if isinstance(value, Integral):
        hint = "19 digits do not fit the numbers of most tools, and leading zeros none; str(card) where it is whole"
        raise refused("card", takes, value, hint)
    if isinstance(value, Real | Decimal):
        hint = "a card number that went through a float has lost its digits (CARD_PRECISION_LOST); read it as text"
        raise refused("card", takes, value, hint)
    raise refused("card", takes, value)


def card_id(value: Any, field: str = "card_id") -> bytes | None:
    """A card id."""
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    hint = "bytes.fromhex(text) for hexadecimal digits" if isinstance(value, str) else ""
    raise refused(field, f"{CARD_ID_BYTES} bytes (bytes)", value, hint)


def text(field: str, value: Any) -> str | None:
    """A text."""
    if value is None or isinstance(value, str):
        return value
    hint = "None where there is none" if value != value else ""
    raise refused(field, "text (str)", value, hint)


def number(field: str, value: Any) -> float | None:
    """A number as float.

    Raises:
        TypeError: it is none; a truth value is none.
    """
    if value is None or type(value) is float:
        return value
    if isinstance(value, Real | Decimal) and not isinstance(value, bool | np.bool_):
        return float(value)
    hint = "float(text)" if isinstance(value, str) else ""
    raise refused(field, "a number (float, int or Decimal)", value, hint)


def amount(value: Any) -> float | None:
    """An amount of money. A Decimal is taken exactly: the server reads the same hundredths from the float.

    Raises:
        TypeError: it is no number, or one of 32 or 16 bits, which has lost digits.
        ValueError: a Decimal that is no whole number of hundredths.
    """
    if isinstance(value, np.float32 | np.float16):
        hint = (
            "it has lost digits of an amount; take them from where they came, as float64 or Decimal"
        )
        raise refused("amount", "a float of 64 bits, an int or a Decimal", value, hint)
    if isinstance(value, Decimal):
        if not value.is_finite() or (minor := value * 100) != minor.to_integral_value():
            raise ValueError("amount must be a whole number of hundredths")
        return int(minor) / 100
    return number("amount", value)


def micros(field: str, instant: Any) -> int:
    """An instant as microseconds since 1970-01-01 UTC, rounded down.

    Raises:
        TypeError: it is neither a datetime nor a whole number of milliseconds.
        ValueError: a datetime without a time zone, which could mean any instant of a day; or no time.
    """
    if type(instant) is int:
        return instant * 1_000
    if isinstance(instant, np.datetime64):  # which is UTC by numpy's own definition
        if np.isnat(instant):
            raise ValueError(f"{field} is NaT, not a time")
        return int(instant.astype("datetime64[us]").astype(np.int64))
    if isinstance(instant, dt.datetime):
        if instant != instant:
            raise ValueError(f"{field} is NaT, not a time")
        if instant.tzinfo is None:
            raise ValueError(
                f"{field}: {instant.isoformat()} has no time zone; use datetime(..., tzinfo=UTC)"
            )
        since = instant - _EPOCH
        return since.days * 86_400_000_000 + since.seconds * 1_000_000 + since.microseconds
    if isinstance(instant, Integral) and not isinstance(instant, bool | np.bool_):
        return int(instant) * 1_000
    hint = "datetime.fromisoformat(text)" if isinstance(instant, str) else ""
    raise refused(field, _INSTANT, instant, hint)


def names(field: str, values: Any) -> tuple[str, ...]:
    """Names.

    Raises:
        TypeError: one text in place of several, or something that is no text among them.
    """
    takes = "a sequence of names (str)"
    if isinstance(values, str | bytes):
        raise refused(field, takes, values, f"[{values!r}]" if isinstance(values, str) else "")
    if not isinstance(values, Iterable):
        raise refused(field, takes, values)
    found = tuple(values)
    for i, value in enumerate(found):
        if not isinstance(value, str):
            raise refused(f"{field}[{i}]", "a name (str)", value)
    return found


def card_ids(values: Any) -> tuple[bytes, ...]:
    """Card ids.

    Raises:
        TypeError: one in place of several, or something that is no card id among them.
    """
    takes = f"a sequence of card ids ({CARD_ID_BYTES} bytes each)"
    if isinstance(values, str | bytes | bytearray) or not isinstance(values, Iterable):
        raise refused("card_ids", takes, values)
    found = []
    for i, value in enumerate(values):
        taken = card_id(value, f"card_ids[{i}]")
        if taken is None:
            raise refused(f"card_ids[{i}]", f"{CARD_ID_BYTES} bytes (bytes)", value)
        found.append(taken)
    return tuple(found)
