"""Loading files: traps repaired, the rest rejected and kept, any repetition without effect."""

from __future__ import annotations

import json
import secrets
import signal
import string
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import tally

from batch_job.verify import Verifier
from features import transaction_key
from features.ledger import HEADER, RECORD
from ingest.files import FileFormatError, read_file
from stores.redis_store import ledger_key, profile_key
from tests import slices
from tests.batch_job.kaggle_rows import line, row, write
from tests.commands import TALLY
from tests.conftest import Stack


def new_card() -> str:
    return f"4{secrets.randbelow(10**15):015}"  # hypothesis seeds `random`


def new_id() -> str:
    """Of letters: digits in a row would be masked in what is said of it."""
    return "".join(secrets.choice(string.ascii_lowercase) for _ in range(16))


def load(stack: Stack, *arguments: str | Path) -> dict:
    result = stack.tally("load", "--json", *arguments)
    outcome: dict = json.loads(result.stdout or "null")
    assert outcome, result.stderr
    nothing = outcome["read"] > 0 and outcome["rejected"] == outcome["read"]
    assert result.returncode == (1 if nothing else 0), result.stderr
    return outcome


def rejects(outcome: dict) -> list[dict]:
    return [json.loads(text) for text in Path(outcome["rejects_file"]).read_text().splitlines()]


def stored(stack: Stack, card: str) -> list[dict]:
    """What Postgres has of a card."""
    offline = stack.offline()
    try:
        cursor = offline.sql.execute(
            "SELECT t.*, l.is_fraud, l.label_time FROM transactions t "
            "LEFT JOIN labels l USING (transaction_id) WHERE card_id = %s "
            "ORDER BY event_time, transaction_id",
            (stack.card_key.card_id(card),),
        )
        names = [column.name for column in cursor.description or ()]
        return [dict(zip(names, values, strict=True)) for values in cursor.fetchall()]
    finally:
        offline.close()


def ledger(stack: Stack, card: str) -> bytes | None:
    online = stack.online()
    try:
        return online.read([ledger_key(stack.card_key.card_id(card))])[0]
    finally:
        online.close()


def test_a_row_ends_in_both_stores(stack, tmp_path):
    card, name = new_card(), new_id()
    outcome = load(stack, write(tmp_path / "a.csv", [row(cc_num=card, trans_num=name, is_fraud=1)]))
    assert (outcome["read"], outcome["loaded"], outcome["rejected"]) == (1, 1, 0)
    (kept,) = stored(stack, card)
    assert kept["event_time"] == datetime(2024, 3, 1, 10, tzinfo=UTC)
    assert kept["amount_minor"] == 286
    assert kept["merchant"] == "Kirlin and Sons"
    assert kept["is_fraud"] is True
    assert kept["label_time"] == kept["event_time"] + timedelta(days=7)
    online = ledger(stack, card)
    assert online is not None
    assert len(online) == HEADER.size + RECORD.itemsize
    assert transaction_key(name).to_bytes(8, "little") in online


REPAIRED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a spreadsheet's date": (
        {"trans_date_trans_time": "3/1/24 10:00", "unix_time": 1709287200 - 2557 * 86400},
        {},
    ),
    "a spreadsheet's date with a long year": (
        {"trans_date_trans_time": "1/3/2024 10:00", "unix_time": 1709287200 - 2557 * 86400},
        {},
    ),
    "seconds lost, kept by unix_time": (
        {"trans_date_trans_time": "3/1/24 10:00", "unix_time": 1709287225 - 2557 * 86400},
        {"event_time": datetime(2024, 3, 1, 10, 0, 25, tzinfo=UTC)},
    ),
    "an ISO time": ({"trans_date_trans_time": "2024-03-01T10:00:00Z"}, {}),
    "an amount with a float's noise": ({"amt": "2.8600000000000003"}, {}),
    "a refund": ({"amt": "-2.86"}, {"amount_minor": -286}),
    "no fraud_ in front": ({"merchant": "Kirlin and Sons"}, {}),
    "no category": ({"category": ""}, {"category": None}),
    "no position": ({"merch_lat": ""}, {"merchant_latitude": None}),
    "no label": ({"is_fraud": ""}, {"is_fraud": None}),
    "a comma in the merchant": ({"merchant": "fraud_Rippin, Kub"}, {"merchant": "Rippin, Kub"}),
}


@pytest.mark.parametrize("what", REPAIRED)
def test_what_can_be_read_without_guessing_is_repaired(stack, tmp_path, what):
    given, expected = REPAIRED[what]
    card = new_card()
    path = write(tmp_path / "a.csv", [row(cc_num=card, trans_num=new_id(), **given)])
    assert load(stack, path)["loaded"] == 1
    (kept,) = stored(stack, card)
    normal = {
        "event_time": datetime(2024, 3, 1, 10, tzinfo=UTC),
        "amount_minor": 286,
        "merchant": "Kirlin and Sons",
        "category": "personal_care",
    }
    for name, value in (normal | expected).items():
        assert kept[name] == value, name


REJECTED = {
    "CARD_PRECISION_LOST": {"cc_num": "2.29E+15"},
    "BAD_CARD": {"cc_num": "4000-1234-1234-1234"},
    "BAD_TIME": {"trans_date_trans_time": "yesterday"},
    "AMBIGUOUS_DATE": {"trans_date_trans_time": "08/02/2024 09:05"},
    "TIME_OUT_OF_RANGE": {"trans_date_trans_time": "2100-01-01 00:00:00"},
    "BAD_AMOUNT": {"amt": "NaN"},
    "AMOUNT_NOT_MINOR": {"amt": "1.234"},
    "AMOUNT_OUT_OF_RANGE": {"amt": "1e15"},
    "BAD_POSITION": {"merch_lat": "91"},
    "BAD_LABEL": {"is_fraud": "maybe"},
    "CARD_NUMBER_IN_TEXT": {"category": "4111111111111111"},
    "MISSING_FIELD": {"trans_num": ""},
    "BAD_TRANSACTION_ID": {"trans_num": "x" * 65},
}

CARD_SPELLINGS = [
    "4000123412341234",
    "4000-1234-1234-1234",
    "4000 1234 1234 1234",
    "4.000123412341234e+15",
    "x4000123412341234",
    "40001234123412341234",
]


def test_what_cannot_be_read_is_rejected_with_line_reason_and_text_and_the_rest_goes_on(
    stack, tmp_path
):
    good = [row(cc_num=new_card(), trans_num=new_id()) for _ in range(3)]
    bad = [row(**({"trans_num": new_id()} | given)) for given in REJECTED.values()]
    path = write(tmp_path / "a.csv", [good[0], *bad, *good[1:]])
    with path.open("ab") as file:
        file.write(b"too,few,columns\n\xff\xfe,not utf-8\n")
    outcome = load(stack, path)
    assert (outcome["loaded"], outcome["rejected"]) == (3, len(bad) + 2)
    found = rejects(outcome)
    assert [r["reason"] for r in found] == [*REJECTED, "MALFORMED_ROW", "BAD_ENCODING"]
    assert [r["line"] for r in found] == [
        *range(3, 3 + len(bad)),
        3 + len(bad) + 2,
        3 + len(bad) + 3,
    ]
    lines = path.read_bytes().split(b"\n")
    for reject in found:
        assert reject["raw"][-10:] in lines[reject["line"] - 1].decode(errors="replace")


def test_rejects_show_no_card_number(stack, tmp_path):
    card = new_card()
    outcome = load(
        stack, write(tmp_path / "a.csv", [row(cc_num=card, trans_num=new_id(), amt="x")])
    )
    text = Path(outcome["rejects_file"]).read_text()
    assert card not in text
    assert card[-4:] in text
    assert Path(outcome["rejects_file"]).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("card", CARD_SPELLINGS)
def test_rejects_show_no_card_number_however_it_is_spelled(stack, tmp_path, card):
    path = write(tmp_path / "a.csv", [row(cc_num=card, trans_num=new_id(), amt="x")])
    with path.open("a") as file:
        file.write(f"too few columns,{card}\n")
    outcome = load(stack, path)
    assert outcome["rejected"] == 2
    for reject in rejects(outcome):
        digits = "".join(filter(str.isdigit, reject["raw"]))
        assert "0001234123" not in digits


def test_rejects_show_no_card_number_in_whatever_column_it_stands(stack, tmp_path):
    texts = ["4111111111111111", "4111 1111 1111 1111 123", "card 4111-1111-1111-1111, 12/25"]
    rows = [row(trans_num=new_id(), merchant=text) for text in texts]
    outcome = load(stack, write(tmp_path / "a.csv", rows))
    found = rejects(outcome)
    assert [reject["reason"] for reject in found] == ["CARD_NUMBER_IN_TEXT"] * len(texts)
    for reject in found:
        assert not any(text[:12] in reject["raw"] for text in ("4111111111111111", *texts[1:]))
        assert "4111-1111" not in reject["raw"]


def test_a_file_without_a_header_does_not_show_its_first_row(stack, tmp_path):
    card = new_card()
    path = tmp_path / "a.csv"
    path.write_text(line(row(cc_num=card)) + "\n")
    result = stack.tally("load", path)
    assert result.returncode != 0
    assert "is there a header?" in result.stderr
    for cell in (card, "Elm", "Columbia", "Doe", "personal_care"):
        assert cell not in result.stderr


def test_a_quote_that_is_not_closed_costs_its_own_line_alone(stack, tmp_path):
    rows = [row(cc_num=new_card(), trans_num=new_id()) for _ in range(8)]
    path = write(tmp_path / "a.csv", rows)
    lines = path.read_text().splitlines()
    cells = lines[3].split(",")
    cells[-1] = '"' + cells[-1]
    lines[3] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")
    outcome = load(stack, path)
    assert (outcome["read"], outcome["loaded"], outcome["rejected"]) == (8, 7, 1)
    assert [(r["line"], r["reason"]) for r in rejects(outcome)] == [(4, "MALFORMED_ROW")]


def test_a_nul_character_is_rejected(stack, tmp_path):
    rows = [row(cc_num=new_card(), trans_num=new_id(), category="a\0b"), row(trans_num=new_id())]
    outcome = load(stack, write(tmp_path / "a.csv", rows))
    assert (outcome["loaded"], outcome["rejected"]) == (1, 1)
    assert rejects(outcome)[0]["reason"] == "BAD_ENCODING"


def test_two_spellings_of_one_profile_are_one(stack, tmp_path):
    card = new_card()
    rows = [
        row(cc_num=card, trans_num=new_id(), lat=latitude) for latitude in ("33.9659", "33.96590")
    ]
    assert load(stack, write(tmp_path / "a.csv", rows))["loaded"] == 2


def test_a_changed_label_is_a_conflict(stack, tmp_path):
    first = row(cc_num=new_card(), trans_num=new_id(), is_fraud="0")
    load(stack, write(tmp_path / "a.csv", [first]))
    outcome = load(stack, write(tmp_path / "b.csv", [first | {"is_fraud": "1"}]))
    assert (outcome["duplicates"], outcome["rejected"]) == (0, 1)
    assert rejects(outcome)[0]["reason"] == "CONFLICT"


def mangled(tmp_path: Path, rows: list[dict[str, str]], how: str) -> Path:
    path = write(tmp_path / f"{how}.csv", rows)
    text = path.read_text()
    if how == "byte-order mark":
        path.write_text("\ufeff" + text)
    elif how == "CRLF and no last newline":
        path.write_bytes(text.rstrip("\n").replace("\n", "\r\n").encode())
    elif how == "no unnamed column":
        write(path, rows, without=("",))
    elif how == "no label column":
        write(path, rows, without=("is_fraud",))
    elif how == "lines in quotes":
        quoted = ['"' + one.replace('"', '""') + '"' for one in text.splitlines()]
        path.write_text("\n".join(quoted) + "\n")
    elif how == "some lines in quotes":
        quoted = [
            '"' + one.replace('"', '""') + '"' if i % 2 else one
            for i, one in enumerate(text.splitlines())
        ]
        path.write_text("\n".join(quoted) + "\n\n")
    elif how == "parquet":
        table = pacsv.read_csv(path)
        path = path.with_suffix(".parquet")
        pq.write_table(table.rename_columns(["index", *table.column_names[1:]]), path)
    return path


@pytest.mark.parametrize(
    "how",
    [
        "as it is",
        "byte-order mark",
        "CRLF and no last newline",
        "no unnamed column",
        "no label column",
        "lines in quotes",
        "some lines in quotes",
        "parquet",
    ],
)
def test_a_mangled_file_leaves_the_same_stores(stack, tmp_path, how):
    card = new_card()
    rows = [
        row(
            cc_num=card,
            trans_num=new_id(),
            trans_date_trans_time=f"2024-03-01 10:00:0{i}",
            merchant="fraud_Rippin, Kub" if i == 1 else "fraud_Plain",
            amt=f"{i}.5{i}",
        )
        for i in range(4)
    ]
    path = mangled(tmp_path, rows, how)
    outcome = load(stack, path)
    assert (outcome["read"], outcome["loaded"], outcome["rejected"]) == (4, 4, 0)
    assert [kept["amount_minor"] for kept in stored(stack, card)] == [50, 151, 252, 353]
    assert stored(stack, card)[1]["merchant"] == "Rippin, Kub"
    online = ledger(stack, card)
    assert online is not None
    assert len(online) == HEADER.size + 4 * RECORD.itemsize


def test_parquet_card_numbers_keep_their_digits_or_are_rejected(stack, tmp_path):
    card = new_card()
    columns = {
        "trans_date_trans_time": pa.array([datetime(2024, 3, 1, tzinfo=UTC)]),
        "merchant": ["m"],
        "amt": [1.25],
    }
    paths = []
    for kind in (pa.int64(), pa.float64()):
        numbers = {"cc_num": pa.array([int(card)], kind), "trans_num": [new_id()]}
        paths.append(tmp_path / f"{kind}.parquet")
        pq.write_table(pa.table(columns | numbers), paths[-1])
    result = stack.tally("load", "--json", *paths)
    assert result.returncode == 1, "nothing of the second file was taken"
    outcome = json.loads(result.stdout)
    assert outcome["loaded"] == 1
    assert rejects(outcome)[0]["reason"] == "CARD_PRECISION_LOST"
    assert stored(stack, card)[0]["amount_minor"] == 125


def test_the_order_of_dates_may_be_given(stack, tmp_path):
    card = new_card()
    times = {"trans_date_trans_time": "08/02/2024 09:05", "unix_time": ""}
    path = write(tmp_path / "a.csv", [row(cc_num=card, trans_num=new_id(), **times)])
    load(stack, "--date-order", "day-first", path)
    assert stored(stack, card)[0]["event_time"] == datetime(2024, 2, 8, 9, 5, tzinfo=UTC)


def test_an_unknown_order_of_dates_is_refused(stack, tmp_path):
    path = write(tmp_path / "a.csv", [row()])
    result = stack.tally("load", "--date-order", "ymd", path)
    assert result.returncode == 2
    assert "--date-order" in result.stderr


def test_loading_twice_changes_nothing(stack, tmp_path):
    card = new_card()
    path = write(
        tmp_path / "a.csv", [row(cc_num=card, trans_num=new_id(), amt=i) for i in range(5)]
    )
    load(stack, path)
    before = stored(stack, card), ledger(stack, card)
    outcome = load(stack, path)
    assert (outcome["loaded"], outcome["duplicates"]) == (0, 5)
    assert (stored(stack, card), ledger(stack, card)) == before


def test_the_first_content_of_an_id_wins_wherever_the_second_claims_to_be(stack, tmp_path):
    card, other, name = new_card(), new_card(), new_id()
    first = row(cc_num=card, trans_num=name, amt="1.00")
    claims = [
        row(cc_num=card, trans_num=name, amt="2.00"),
        row(cc_num=other, trans_num=name, amt="1.00"),
        row(cc_num=card, trans_num=name, amt="1.00", trans_date_trans_time="2023-01-01 00:00:00"),
        first,
    ]
    outcome = load(stack, write(tmp_path / "a.csv", [first, *claims]))
    assert (outcome["loaded"], outcome["duplicates"], outcome["rejected"]) == (1, 1, 3)
    assert {r["reason"] for r in rejects(outcome)} == {"CONFLICT"}
    assert [kept["amount_minor"] for kept in stored(stack, card)] == [100]
    assert stored(stack, other) == []
    assert ledger(stack, other) is None
    online = stack.online()
    assert online.read([profile_key(stack.card_key.card_id(other))]) == [None]
    online.close()
    again = load(stack, write(tmp_path / "b.csv", claims))
    assert (again["loaded"], again["duplicates"], again["rejected"]) == (0, 1, 3)


@pytest.mark.sliced
@pytest.mark.budget(slices.of(60, 30), "a load is killed three times and ends, and all is verified")
def test_a_load_that_was_killed_and_run_again_leaves_the_same_stores(stack, tmp_path):
    rows = slices.of(300_000, 120_000)
    path = tmp_path / "a.csv"
    seed = str(slices.drawn("killed load").getrandbits(31))
    assert stack.tally("synth", "-o", path, "--rows", str(rows), "--seed", seed).returncode == 0
    offline = stack.offline()

    def known() -> int:
        row = offline.sql.execute("SELECT count(*) FROM transaction_ids").fetchone()
        return int(row[0])

    begin = known()
    with tally.Client(stack.address) as client:
        for share in (0.1, 0.3, 0.5):
            process = subprocess.Popen(
                [TALLY, "load", path, "--data", stack.data],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            while known() < begin + share * rows and process.poll() is None:
                time.sleep(0.02)
            process.kill()
            assert process.wait() == -signal.SIGKILL
            assert client.status().unfinished_loads == [path.name]
            assert client.status().complete_through_ms == -1
        outcome = load(stack, path)
        assert client.status().unfinished_loads == []
        assert client.status().complete_through_ms > 0
    assert 0 < outcome["loaded"] < rows
    assert outcome["loaded"] + outcome["duplicates"] == rows
    assert known() == begin + rows
    offline.close()
    assert_online_is_what_offline_says(stack)


def test_two_loads_of_one_file_at_once_leave_the_same_stores(stack, tmp_path):
    rows = 60_000
    path = tmp_path / "a.csv"
    assert stack.tally("synth", "-o", path, "--rows", str(rows), "--seed", "78").returncode == 0
    processes = [
        subprocess.Popen(
            [TALLY, "load", "--json", path, "--data", stack.data], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outcomes = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert sum(outcome["loaded"] for outcome in outcomes) == rows
    assert sum(outcome["duplicates"] for outcome in outcomes) == rows
    assert_online_is_what_offline_says(stack)


def assert_online_is_what_offline_says(stack: Stack) -> None:
    """Every card is served as Postgres has it, to the last bit, and Redis has no card besides."""
    offline, online = stack.offline(), stack.online()
    try:
        with tally.Client(stack.address) as client:
            outcome = Verifier(offline, online, client).verify(None, stack.card_key.probe_id)
    finally:
        offline.close()
        online.close()
    assert outcome.mismatches == {}, outcome.examples
    assert outcome.cards


def test_profiles_reach_the_online_store(stack, tmp_path):
    card = new_card()
    load(stack, write(tmp_path / "a.csv", [row(cc_num=card, trans_num=new_id())]))
    online = stack.online()
    profile = online.read([profile_key(stack.card_key.card_id(card))])[0]
    online.close()
    assert profile is not None
    assert len(profile) == 8 + 32


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "lacks trans_date_trans_time"),
        ("a,b,c\n1,2,3\n", "of 3 columns it names none of those known here"),
        ("cc_num,cc_num,trans_date_trans_time,merchant,amt,trans_num\n", "more than once"),
        ("PAR1 but no more", "Parquet"),
    ],
)
def test_a_file_of_another_format_is_refused_whole(tmp_path, text, what):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=what):
        list(read_file(path))


def test_blocks_do_not_change_what_is_read(tmp_path, monkeypatch):
    rows = [row(trans_num=f"t{i}", merchant=f"fraud_m, {i}") for i in range(200)]
    path = write(tmp_path / "a.csv", rows)
    with path.open("a") as file:
        file.write('"' + line(row(trans_num="last")).replace('"', '""') + '"')
    whole = list(read_file(path))
    monkeypatch.setattr("ingest.files.BLOCK_BYTES", 1_000)
    parts = list(read_file(path))
    assert len(parts) > 10
    assert len(whole) == 2  # the lines, and what follows the last line's end
    assert pa.concat_tables(p.table for p in parts) == pa.concat_tables(w.table for w in whole)
    assert [n for part in parts for n in part.lines] == list(range(2, 203))
    assert sum(part.bytes_read for part in parts) == path.stat().st_size
