"""Numbers that lost digits, and card numbers where none belong, are found however they come."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features import CardKey
from ingest.events import Format, decode_transactions
from ingest.files import FileFormatError, read_file
from ingest.kaggle import Facts, convert
from ingest.masking import has_card_number
from tests.batch_job.kaggle_rows import row, write

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CARD_ID = CardKey(b"a secret of some length" * 2).card_id


def facts_of(path: Path) -> Facts:
    (batch,) = read_file(path)
    return convert(batch.table, CARD_ID, NOW)


def reasons(facts: Facts) -> list[tuple[str, str]]:
    return [(problem.reason, problem.field) for problem in facts.problems]


FLOATS = [
    "4000000000000000.0",
    "4000010000000000.",
    "2703186189652095.0",
    "4E+15",
    "4.00e15",
    "4,00E+15",
]


@pytest.mark.parametrize("text", FLOATS)
def test_a_card_number_that_came_as_a_float_is_rejected_in_csv(tmp_path, text):
    path = write(tmp_path / "a.csv", [row(cc_num=text)])
    assert reasons(facts_of(path)) == [("CARD_PRECISION_LOST", "cc_num")]


@pytest.mark.parametrize("number", [4e15, 2703186189652095.0, 4.1e18, 630423337322.0])
@pytest.mark.parametrize("kind", [pa.float64(), pa.float32()])
def test_a_card_number_that_came_as_a_float_is_rejected_in_parquet(tmp_path, number, kind):
    columns = {name: [text] for name, text in row().items() if name}
    table = pa.table(columns | {"cc_num": pa.array([np.float64(number)]).cast(kind, safe=False)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert reasons(facts_of(tmp_path / "a.parquet")) == [("CARD_PRECISION_LOST", "cc_num")]


@pytest.mark.parametrize("form", [Format.KAGGLE, Format.TALLY])
def test_a_card_number_that_came_as_a_float_is_rejected_in_json(form):
    names = {
        "transaction_id": "t",
        "event_time": "2024-03-01T10:00:00Z",
        "amount": 1,
        "merchant": "m",
    }
    if form is Format.KAGGLE:
        names = {"trans_num": "t", "trans_date_trans_time": "2024-03-01", "amt": 1, "merchant": "m"}
    card = "cc_num" if form is Format.KAGGLE else "card"
    _, (refusal,) = decode_transactions(
        [json.dumps(names | {card: 4e15}).encode()], form, CARD_ID, NOW
    )
    assert refusal.reason == "CARD_PRECISION_LOST"


@pytest.mark.parametrize("text", ["1.2E+17", "9007199254740994.0", "4e+30"])
def test_an_id_that_came_as_a_float_is_rejected(tmp_path, text):
    path = write(tmp_path / "a.csv", [row(trans_num=text)])
    assert reasons(facts_of(path)) == [("BAD_TRANSACTION_ID", "trans_num")]


@pytest.mark.parametrize(
    "text", ["12e45", "0b242abb623afc578575680df30655b9", "1001.0", "123456789012345678"]
)
def test_an_id_that_only_looks_like_a_float_is_taken(tmp_path, text):
    facts = facts_of(write(tmp_path / "a.csv", [row(trans_num=text)]))
    assert facts.transactions["transaction_id"].to_pylist() == [text]


@pytest.mark.parametrize("column", ["amt", "trans_num"])
@pytest.mark.parametrize("kind", [pa.float32(), pa.float16()])
def test_a_column_of_small_floats_is_refused_once_and_named(tmp_path, column, kind):
    columns = {name: [text] for name, text in row().items() if name}
    small = pa.array([np.float16(12)], pa.float16()).cast(kind)
    pq.write_table(pa.table(columns | {column: small}), tmp_path / "a.parquet")
    with pytest.raises(FileFormatError, match=rf"column {column} is float(32|16), which has lost"):
        list(read_file(tmp_path / "a.parquet"))


def test_an_amount_that_was_a_float32_says_so(tmp_path):
    path = write(tmp_path / "a.csv", [row(amt=repr(float(np.float32(12.34))))])
    (problem,) = facts_of(path).problems
    assert (problem.reason, "float32" in problem.detail) == ("AMOUNT_NOT_MINOR", True)


PRINTED = [
    "4111111111111111",
    "4111 1111 1111 1111",
    "card 4111-1111-1111-1111 used",
    "378282246310005",
    "4111111111111111 12/25",
    "4111 1111 1111 1111 123",
]


@pytest.mark.parametrize("text", PRINTED)
@pytest.mark.parametrize("column", ["category", "merchant", "job", "city", "state", "zip"])
def test_a_card_number_in_a_text_that_is_kept_is_refused(tmp_path, column, text):
    facts = facts_of(write(tmp_path / "a.csv", [row(**{column: text}), row(trans_num="t1")]))
    assert reasons(facts) == [("CARD_NUMBER_IN_TEXT", column)]
    assert all("1111" not in problem.detail for problem in facts.problems)
    assert len(facts.transactions) == 1


@pytest.mark.parametrize("around", ["{}", "{}-17", "x{}"])
def test_an_id_that_holds_the_card_number_is_refused(tmp_path, around):
    card = "4000123412341234"  # its check digit is wrong: it counts all the same
    facts = facts_of(write(tmp_path / "a.csv", [row(cc_num=card, trans_num=around.format(card))]))
    assert reasons(facts) == [("CARD_NUMBER_IN_TEXT", "trans_num")]


def luhn_by_the_book(digits: str) -> bool:
    """From the right, every second digit doubled, the digits of all products added."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        product = int(digit) * (2 if place % 2 else 1)
        total += product // 10 + product % 10
    return total % 10 == 0


@given(st.from_regex(r"[1-9][0-9]{9,20}", fullmatch=True))
def test_a_number_is_a_card_number_where_its_length_and_check_digit_say_so(digits):
    expected = 13 <= len(digits) <= 19 and luhn_by_the_book(digits)
    assert has_card_number(digits) == expected
    assert has_card_number(f"see {digits}.") == expected
