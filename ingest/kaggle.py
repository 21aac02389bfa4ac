"""From the Kaggle format's text to facts. What can be read without guessing is repaired; what
cannot is rejected, with a reason.

Repaired: dates in numbers whose order the file settles (ingest.dates), amounts with a float's noise, the
`fraud_` in front of every merchant. Rejected: a card number or an id that went through a float, since
it may have lost digits; a card number in a text that is kept; what is no time, no amount, no
position; a time in the future.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.points import AMOUNT_MINOR_MAX, MINOR_ERROR_MAX, MINOR_ERROR_SHARE_MAX
from features.positions import POSITION_MISSING, UDEG_PER_DEGREE, to_udeg
from ingest.dates import FileDates, read_times
from ingest.masking import has_card_number
from stores.arrow import LABELS, TIME, TRANSACTIONS, with_records

LABEL_DELAY = timedelta(days=7)
"""When a fraud becomes known, after the event: the file does not say, so a week, as for
chargebacks."""
FUTURE_MAX = timedelta(days=1)
"""How far ahead of the clock a transaction may be."""

TRANSACTION_ID_CHARS_MAX = 64
MERCHANT_CHARS_MAX = 256
CATEGORY_CHARS_MAX = 64

MERCHANT_PREFIX = "fraud_"

HOLDER = ("gender", "job", "city", "state", "zip", "dob", "lat", "long", "city_pop")
"""Columns that speak of the card holder."""

CardId = Callable[[str], bytes]

CARD_ID = "card_id"
"""A column that no Kaggle file has: card ids, in place of card numbers."""
_CARD_ID = re.compile(r"[0-9a-fA-F]{32}\Z", re.ASCII)
_CARD = re.compile(r"[0-9]{8,19}\Z", re.ASCII)
_NUMBER_AS_FLOAT = re.compile(r"[+-]?([0-9]+[.,][0-9]*|[0-9][0-9.,]*[eE][+-]?[0-9]+)\Z", re.ASCII)
"""How floats are written: 4000000000000000.0, 4E+15, 4,00E+15."""
_ID_AS_FLOAT = r"^[0-9](\.[0-9]+)?[eE]\+[0-9]+$|^[0-9]{15,}\.0*$"
"""An id as spreadsheets and floats write it. An E without a sign may be a hex digit."""
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row of a batch was not taken."""

    row: int
    """Its position in the batch."""
    reason: str
    field: str
    detail: str


@dataclass(slots=True)
class Facts:
    """What a batch of text says."""

    transactions: pa.Table
    """Of TRANSACTIONS and LABELS, with RECORD_COLUMN: the rows that could be read."""
    rows: npt.NDArray[np.int64]
    """Their positions in the batch."""
    holders: dict[str, pa.Array]
    """What these rows say of the card holders: text columns, of HOLDER those that the file has."""
    problems: list[Problem]
    """The rows that could not."""

    def take(self, mask: npt.NDArray[np.bool_]) -> Facts:
        """The facts of the transactions where a mask holds."""
        chosen = pa.array(mask)
        return Facts(
            self.transactions.filter(chosen),
            self.rows[mask],
            {name: column.filter(chosen) for name, column in self.holders.items()},
            self.problems,
        )


class _Columns:
    """Conversion of one batch, column by column; a row is out at its first problem."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()
        self.problems: dict[int, Problem] = {}
        for name in self.table.column_names:
            nul = pc.match_substring(self.table[name], "\0")
            self.refuse_where(nul, "BAD_ENCODING", name, "it has a NUL character")

    def text(self, name: str) -> pa.Array:
        """A column's text, trimmed; all empty where the file lacks it."""
        if name not in self.table.column_names:
            return pa.array([""] * len(self.table), pa.string())
        column = self.table[name]
        column = column.chunk(0) if column.num_chunks else pa.array([], pa.string())
        return pc.utf8_trim_whitespace(column)

    def refuse(self, row: int, reason: str, field: str, detail: str) -> None:
        """Puts a row out."""
        self.problems.setdefault(row, Problem(row, reason, field, detail))

    def refuse_where(self, mask: Any, reason: str, field: str, detail: str) -> None:
        """Puts out every row where a mask (numpy or Arrow) holds."""
        flags = mask if isinstance(mask, np.ndarray) else pc.fill_null(mask, True).to_numpy(False)
        for row in np.flatnonzero(flags).tolist():
            self.refuse(row, reason, field, detail)


def convert(
    table: pa.Table, card_id: CardId, now: datetime, dates: FileDates | None = None
) -> Facts:
    """The facts in a batch of text columns.

    Args:
        table: text columns under Kaggle's names, the empty text for nothing.
        card_id: gives the id of a card number.
        now: the clock, for times in the future.
        dates: of the file that these are rows of; None for events, each of which stands alone.
    """
    columns = _Columns(table)
    ids = columns.text("trans_num")
    length = pc.utf8_length(ids)
    columns.refuse_where(pc.equal(length, 0), "MISSING_FIELD", "trans_num", "it is empty")
    columns.refuse_where(
        pc.match_substring_regex(ids, _ID_AS_FLOAT),
        "BAD_TRANSACTION_ID",
        "trans_num",
        "an id that went through a float may have lost digits: write it as text",
    )
    columns.refuse_where(
        pc.greater(length, TRANSACTION_ID_CHARS_MAX),
        "BAD_TRANSACTION_ID",
        "trans_num",
        f"it has more than {TRANSACTION_ID_CHARS_MAX} characters",
    )
    cards = _cards(columns, card_id)
    times = _times(columns, now, dates)
    amounts = _amounts(columns)
    merchants = _merchants(columns)
    category = columns.text("category")
    columns.refuse_where(
        pc.greater(pc.utf8_length(category), CATEGORY_CHARS_MAX),
        "BAD_CATEGORY",
        "category",
        f"it has more than {CATEGORY_CHARS_MAX} characters",
    )
    latitude = _degrees(columns, "merch_lat", 90)
    longitude = _degrees(columns, "merch_long", 180)
    frauds = _frauds(columns)
    _refuse_card_numbers(columns)

    whole = pa.table(
        [
            cards,
            times,
            ids,
            pa.array(amounts),
            merchants,
            or_null(category),
            latitude,
            longitude,
            frauds,
            pc.if_else(
                pc.is_valid(frauds), pc.add(times, pa.scalar(LABEL_DELAY, pa.duration("us"))), None
            ),
        ],
        names=[*TRANSACTIONS.names, *LABELS.names],
    )
    out = np.zeros(len(table), dtype=bool)
    out[list(columns.problems)] = True
    rows = np.flatnonzero(~out)
    taken = whole.filter(pa.array(~out)) if out.any() else whole
    return Facts(
        with_records(taken.cast(pa.schema([*TRANSACTIONS, *LABELS]))),
        rows,
        {name: columns.text(name).take(rows) for name in HOLDER if name in table.column_names},
        [columns.problems[row] for row in sorted(columns.problems)],
    )


def or_null(texts: pa.Array) -> pa.Array:
    """Texts, null for the empty one."""
    return pc.if_else(pc.equal(texts, ""), None, texts)


def _map_texts(texts: pa.Array, convert_text: Callable[[str], Any], kind: pa.DataType) -> pa.Array:
    """Converts each distinct text once."""
    encoded = pc.dictionary_encode(texts)
    values = [convert_text(text) for text in encoded.dictionary.to_pylist()]
    return pa.array(values, kind).take(encoded.indices)


def _cards(columns: _Columns, card_id: CardId) -> pa.Array:
    """Card ids; null where the number is none."""

    def identify(text: str) -> bytes | None:
        return card_id(text) if _CARD.match(text) else None

    texts = columns.text("cc_num")
    ids = _map_texts(texts, identify, pa.binary())
    if CARD_ID in columns.table.column_names:
        ids = pc.coalesce(_given_card_ids(columns), ids)
    for row in np.flatnonzero(ids.is_null().to_numpy(False)).tolist():
        text = texts[row].as_py()
        if not text:
            columns.refuse(row, "MISSING_FIELD", "cc_num", "it is empty")
        elif _NUMBER_AS_FLOAT.match(text):
            # 4000000000000000.0 is exact as a float, and what 4E+15 becomes: every card of a bank.
            detail = (
                "a card number that went through a float may have lost digits: write it as text"
            )
            columns.refuse(row, "CARD_PRECISION_LOST", "cc_num", detail)
        else:
            columns.refuse(row, "BAD_CARD", "cc_num", "a card number is 8 to 19 digits")
    return ids


def _given_card_ids(columns: _Columns) -> pa.Array:
    """Card ids that the source gives itself, as hex digits; null where it gives none."""

    def read(text: str) -> bytes | None:
        return bytes.fromhex(text) if _CARD_ID.match(text) else None

    texts = columns.text(CARD_ID)
    ids = _map_texts(texts, read, pa.binary())
    wrong = pc.and_(ids.is_null(), pc.not_equal(texts, ""))
    columns.refuse_where(wrong, "BAD_CARD", CARD_ID, "a card id is 32 hex digits")
    return ids


def _times(columns: _Columns, now: datetime, dates: FileDates | None) -> pa.Array:
    """Event times; null where they cannot be read."""
    texts = columns.text("trans_date_trans_time")
    try:
        times = texts.cast(TIME_LOCAL)
    except pa.ArrowInvalid:
        read, unsettled, why = read_times(texts, columns.text("unix_time"), dates)
        times = pa.array(read, TIME_LOCAL)
        columns.refuse_where(unsettled, "AMBIGUOUS_DATE", "trans_date_trans_time", why)
        detail = "it is no time such as 2020-06-21 12:14:25"
        columns.refuse_where(times.is_null(), "BAD_TIME", "trans_date_trans_time", detail)
    times = pc.assume_timezone(times, "UTC")
    earliest = pa.scalar(datetime(1970, 1, 1, tzinfo=UTC), TIME)
    latest = pa.scalar(now + FUTURE_MAX, TIME)
    outside = pc.fill_null(pc.or_(pc.less(times, earliest), pc.greater(times, latest)), False)
    detail = "it is before 1970 or in the future"
    columns.refuse_where(outside, "TIME_OUT_OF_RANGE", "trans_date_trans_time", detail)
    # The ledger counts in milliseconds: finer times would fall together there and not here.
    return pc.floor_temporal(times, unit="millisecond")


TIME_LOCAL = pa.timestamp("us")


def _numbers(columns: _Columns, name: str) -> tuple[npt.NDArray[np.float64], pa.Array]:
    """A column as float64, NaN where it is no number, and its text."""
    texts = columns.text(name)
    return floats(texts), texts


def floats(texts: pa.Array) -> npt.NDArray[np.float64]:
    """Texts as float64 (n,), NaN where one is no number."""
    try:
        filled: npt.NDArray[np.float64] = (
            pc.if_else(pc.equal(texts, ""), "nan", texts).cast(pa.float64()).to_numpy()
        )
        return filled
    except pa.ArrowInvalid:
        return np.array([_number(text) for text in texts.to_pylist()])


def _number(text: str) -> float:
    return float(text) if _DECIMAL.match(text) else float("nan")


_WAS_FLOAT32 = (
    "it is no whole number of hundredths, but looks like a float32, which cannot hold them: write "
    "amounts as float64, as decimals or as texts"
)
_COMMA = "it has a decimal comma, or commas between thousands: write 1234.56"


def _has_comma(texts: pa.Array) -> pa.Array:
    return pc.match_substring_regex(texts, r"^[+-]?[0-9.]*[0-9],[0-9.,]+$")


_TOO_LARGE = "it is beyond 10,000,000,000"


def _amounts(columns: _Columns) -> npt.NDArray[np.int64]:
    """Amounts in minor units; 0 where they cannot be read."""
    amounts, texts = _numbers(columns, "amt")
    columns.refuse_where(_has_comma(texts), "BAD_AMOUNT", "amt", _COMMA)
    columns.refuse_where(~np.isfinite(amounts), "BAD_AMOUNT", "amt", "it is no finite number")
    columns.refuse_where(
        np.abs(amounts) > AMOUNT_MINOR_MAX, "AMOUNT_OUT_OF_RANGE", "amt", _TOO_LARGE
    )
    amounts = np.where(np.abs(amounts) <= AMOUNT_MINOR_MAX, amounts, 0.0)  # nor is NaN
    minor = np.rint(amounts * 100)
    large = np.abs(minor) > AMOUNT_MINOR_MAX
    columns.refuse_where(large, "AMOUNT_OUT_OF_RANGE", "amt", _TOO_LARGE)
    error = np.abs(amounts * 100 - minor)
    broken = error > MINOR_ERROR_MAX + MINOR_ERROR_SHARE_MAX * np.abs(minor)
    was_float32 = broken & (amounts == amounts.astype(np.float32)) & (error < np.abs(minor) * 1e-6)
    columns.refuse_where(was_float32, "AMOUNT_NOT_MINOR", "amt", _WAS_FLOAT32)
    columns.refuse_where(broken, "AMOUNT_NOT_MINOR", "amt", "it is no whole number of hundredths")
    return np.where(large, 0.0, minor).astype(np.int64)


def _merchants(columns: _Columns) -> pa.Array:
    names = _map_texts(
        columns.text("merchant"), lambda text: text.removeprefix(MERCHANT_PREFIX), pa.string()
    )
    length = pc.utf8_length(names)
    columns.refuse_where(pc.equal(length, 0), "MISSING_FIELD", "merchant", "it is empty")
    detail = f"it has more than {MERCHANT_CHARS_MAX} characters"
    columns.refuse_where(pc.greater(length, MERCHANT_CHARS_MAX), "BAD_MERCHANT", "merchant", detail)
    return names


def _degrees(columns: _Columns, name: str, limit: int) -> pa.Array:
    """Degrees to the micro-degree; null where the text is empty."""
    degrees, texts = _numbers(columns, name)
    given = pc.not_equal(texts, "").to_numpy(False)
    wrong = given & ~(np.abs(degrees) <= limit)
    columns.refuse_where(_has_comma(texts), "BAD_POSITION", name, _COMMA)
    columns.refuse_where(wrong, "BAD_POSITION", name, f"it is no number from -{limit} to {limit}")
    return to_micro(np.where(given & ~wrong, degrees, np.nan))


def to_micro(degrees: npt.NDArray[np.float64]) -> pa.Array:
    """Degrees (n,) to the micro-degree, null for NaN."""
    udeg = to_udeg(degrees)
    return pa.array(udeg / UDEG_PER_DEGREE, mask=udeg == POSITION_MISSING)


_KEPT_TEXTS = ("merchant", "category", "job", "city", "state", "zip")
"""Texts that are stored as they are."""


_LONG_NUMBER = r"[0-9]{8}"


def _refuse_card_numbers(columns: _Columns) -> None:
    """Puts out rows with a card number in a text that would be kept: mostly, their columns are shifted."""
    detail = (
        "it has a card number in it, and such a text would be stored: are the columns in order?"
    )
    for name in _KEPT_TEXTS:
        flags = _map_texts(columns.text(name), has_card_number, pa.bool_())
        columns.refuse_where(flags, "CARD_NUMBER_IN_TEXT", name, detail)
    # Ids are often long numbers, of which one in ten passes as a card number: only the row's own counts.
    ids, cards = columns.text("trans_num"), columns.text("cc_num")
    candidates = pc.match_substring_regex(ids, _LONG_NUMBER).to_numpy(False)
    for row in np.flatnonzero(candidates).tolist():
        card = cards[row].as_py()
        if card and card in ids[row].as_py():
            columns.refuse(
                row, "CARD_NUMBER_IN_TEXT", "trans_num", "it has the card's number in it"
            )


def _frauds(columns: _Columns) -> pa.Array:
    meaning = {"": None, "0": False, "1": True, "false": False, "true": True}
    meaning |= {"0.0": False, "1.0": True}

    def read(text: str) -> bool | None:
        return meaning.get(text.lower())

    texts = columns.text("is_fraud")
    frauds = _map_texts(texts, read, pa.bool_())
    wrong = pc.and_(frauds.is_null(), pc.not_equal(texts, ""))
    columns.refuse_where(wrong, "BAD_LABEL", "is_fraud", "it is neither 0 nor 1")
    return frauds
