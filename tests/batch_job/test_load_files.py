"""Files as they come: compressed, piped, in folders, with other separators; and how a load of them ends."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import tally
import typer
from hypothesis import given
from hypothesis import strategies as st
from tally.sources import SourceError
from typer.testing import CliRunner, Result

import batch_job.cli
from batch_job.load import UnfinishedLoadError
from batch_job.reject_limit import RejectLimit
from ingest.files import FileFormatError, read_file
from tests.batch_job.kaggle_rows import row, write
from tests.batch_job.test_load import new_card, new_id, rejects, stored
from tests.clients.test_point_files import through_fifo, zstd
from tests.commands import TALLY
from tests.conftest import Stack


def rows_of(card: str, n: int, **values: object) -> list[dict[str, str]]:
    return [row(cc_num=card, trans_num=new_id(), **values) for _ in range(n)]


def table_of(path: Path, separator: str = ",") -> pa.Table:
    return pa.concat_tables(batch.table for batch in read_file(path, separator))


APP = typer.Typer()
APP.command()(batch_job.cli.load)


def command(where: Stack | Path, *arguments: str | Path) -> Result:
    """Runs `tally load` in this process, which has imported already what takes longest."""
    data = where.data if isinstance(where, Stack) else where
    given = [*map(str, arguments), "--data", str(data)]
    return CliRunner().invoke(APP, given, env={"COLUMNS": "500"})


def loaded(stack: Stack, path: Path) -> dict:
    result = command(stack, path, "--json")
    assert result.exit_code == 0, result.stderr
    outcome: dict = json.loads(result.stdout)
    return outcome


def piped(stack: Stack, data: bytes, *arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    """Loads what comes through standard input."""
    return subprocess.run(
        [str(TALLY), "load", "-", "--json", "--data", str(stack.data), *map(str, arguments)],
        input=data,
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
def test_compressed_files_are_told_by_their_first_bytes(tmp_path, pack):
    path = write(tmp_path / "a.csv", rows_of("4000123412341234", 40_000, merchant="fraud_é, x"))
    want = table_of(path)
    path.write_bytes(pack(path.read_bytes()))
    batches = list(read_file(path))
    assert pa.concat_tables(batch.table for batch in batches) == want
    assert sum(batch.bytes_read for batch in batches) == path.stat().st_size


@given(st.integers(1, 500), st.integers(0, 3))
def test_what_is_read_of_a_file_that_is_cut_off_are_its_first_rows(tmp_path_factory, at, piece):
    path = write(tmp_path_factory.mktemp("cut") / "a.csv", rows_of("4000123412341234", 20))
    whole, packed = table_of(path), gzip.compress(path.read_bytes(), piece)
    at = len(packed) * at // 501
    path.write_bytes(packed[:at])
    found: list[pa.Table] = []
    with pytest.raises((SourceError, FileFormatError)):
        found.extend(batch.table for batch in read_file(path))
    if found:
        table = pa.concat_tables(found)
        assert table == whole.slice(0, len(table))


def test_a_file_that_is_cut_off_is_loaded_until_there_and_unfinished_until_it_is_whole(
    stack, tmp_path
):
    card, name = new_card(), f"{new_id()}.csv.gz"
    path = write(tmp_path / name, rows_of(card, 3_000))
    whole = gzip.compress(path.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    done = command(stack, path)
    said = str(done.exception)
    assert isinstance(done.exception, UnfinishedLoadError)
    assert f"{path}: the file is cut off: its gzip stream has no end" in said
    assert f"tally load --abandon {name}" in said
    n = len(stored(stack, card))
    assert 500 < n < 2_500
    assert f"{n:,} were loaded" in said
    with tally.Client(stack.address) as client:
        assert client.status().unfinished_loads == [name]
        assert client.status().complete_through_ms == -1
        path.write_bytes(whole)
        assert loaded(stack, path)["duplicates"] == n
        assert client.status().unfinished_loads == []
    assert len(stored(stack, card)) == 3_000


def test_standard_input_is_loaded_and_again_without_effect(stack, tmp_path):
    card = new_card()
    data = write(tmp_path / "a.csv", rows_of(card, 5)).read_bytes()
    for packed, want in ((data, (5, 0)), (gzip.compress(data), (0, 5))):
        done = piped(stack, packed)
        assert done.returncode == 0, done.stderr
        outcome = json.loads(done.stdout)
        assert (outcome["loaded"], outcome["duplicates"]) == want
    assert len(stored(stack, card)) == 5


def test_what_was_cut_off_in_a_pipe_is_named_stdin_and_ends_when_it_comes_again(stack, tmp_path):
    data = gzip.compress(write(tmp_path / "a.csv", rows_of(new_card(), 3_000)).read_bytes())
    done = piped(stack, data[:-9])
    assert done.returncode == 1
    assert b"tally load --abandon stdin" in done.stderr
    with tally.Client(stack.address) as client:
        assert client.status().unfinished_loads == ["stdin"]
        assert piped(stack, data).returncode == 0
        assert client.status().unfinished_loads == []


def test_a_pipe_with_a_name_is_opened_once(stack, tmp_path):
    card = new_card()
    data = write(tmp_path / "a.csv", rows_of(card, 5)).read_bytes()
    assert loaded(stack, through_fifo(tmp_path, data))["loaded"] == 5
    assert len(stored(stack, card)) == 5


def test_parquet_from_standard_input_is_read_where_it_is_a_file_and_refused_where_it_is_a_pipe(
    stack, tmp_path
):
    path = tmp_path / "a.parquet"
    (text,) = rows_of(new_card(), 1)
    pq.write_table(pa.Table.from_pylist([text]), path)
    with path.open("rb") as file:
        done = subprocess.run(
            [str(TALLY), "load", "-", "--json", "--data", str(stack.data)],
            stdin=file,
            capture_output=True,
            timeout=60,
            check=False,
        )
    assert json.loads(done.stdout)["loaded"] == 1
    done = piped(stack, path.read_bytes())
    assert done.returncode == 1
    assert b"stdin: Parquet has its index at its end" in done.stderr


def partitioned(folder: Path, card: str) -> list[dict[str, str]]:
    """Rows in folders by category and label, as Spark writes them, and the same rows."""
    rows = []
    for category in ("travel", "misc%5Fnet", "__HIVE_DEFAULT_PARTITION__"):
        for is_fraud in ("0", "1"):
            (found,) = rows_of(card, 1)
            rows.append(
                found
                | {"category": {"travel": "travel", "misc%5Fnet": "misc_net"}.get(category, "")}
                | {"is_fraud": is_fraud}
            )
            there = folder / f"category={category}" / f"is_fraud={is_fraud}"
            there.mkdir(parents=True)
            inside = {k: v for k, v in rows[-1].items() if k not in ("category", "is_fraud")}
            pq.write_table(pa.Table.from_pylist([inside]), there / "part-0.parquet")
    (folder / "_SUCCESS").touch()
    (folder / ".part.crc").touch()
    return rows


@pytest.mark.parametrize("pattern", ["", "**/*.parquet", "category=*"])
def test_folders_and_patterns_have_the_columns_that_they_name(stack, tmp_path, pattern):
    card = new_card()
    rows = partitioned(tmp_path / "day", card)
    outcome = loaded(stack, tmp_path / "day" / pattern)
    assert (outcome["loaded"], outcome["rejected"]) == (6, 0)
    want = {r["trans_num"]: (r["category"] or None, r["is_fraud"] == "1") for r in rows}
    found = stored(stack, card)
    assert {r["transaction_id"]: (r["category"], r["is_fraud"]) for r in found} == want


def test_a_column_that_is_not_read_may_be_of_any_encoding(tmp_path):
    path = write(tmp_path / "a.csv", rows_of(new_card(), 3, street="rue de la Liberté"))
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xe9"))
    (batch,) = read_file(path)
    assert (len(batch.table), batch.bad_lines) == (3, [])


def test_files_of_one_name_in_a_folder_are_loads_of_their_own(stack, tmp_path):
    for day in ("day=1", "day=2"):
        (tmp_path / "days" / day).mkdir(parents=True)
        write(tmp_path / "days" / day / "a.csv", rows_of(new_card(), 2, amt="x"))
    done = command(stack, tmp_path / "days")
    assert done.exit_code == 1
    files = [line.split("rejects: ")[1] for line in done.stderr.splitlines() if "rejects: " in line]
    assert len(set(files)) == 2
    assert [len(Path(file).read_text().splitlines()) for file in files] == [2, 2]
    each = json.loads(command(stack, tmp_path / "days", "--json").stdout)["files"]
    assert [one["rejected"] for one in each] == [2, 2]
    assert len({one["rejects_file"] for one in each}) == len({one["name"] for one in each}) == 2


def test_what_is_not_there_is_wrong_usage(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, what in (
        ("none.csv", "No such file"),
        ("*.pq", "fits this"),
        ("empty", "has no file"),
    ):
        done = command(tmp_path, tmp_path / path)
        assert done.exit_code == 2
        assert what in done.stderr


SEPARATORS = {";": "';'", "\t": "tab", "|": "'|'"}


@pytest.mark.parametrize("separator", SEPARATORS)
def test_another_separator_is_named_and_taken(tmp_path, separator):
    path = write(tmp_path / "a.csv", rows_of("4000123412341234", 3, merchant="fraud_Rippin, Kub"))
    want = table_of(path)
    options = pacsv.WriteOptions(delimiter=separator)
    text = pacsv.read_csv(path, convert_options=pacsv.ConvertOptions(column_types=want.schema))
    pacsv.write_csv(text, path, options)
    with pytest.raises(FileFormatError) as caught:
        table_of(path)
    name = SEPARATORS[separator]
    assert str(caught.value) == (
        f"{path}: its columns are separated by {name}: give --separator {name}"
    )
    assert table_of(path, separator) == want


def test_a_file_with_semicolons_and_decimal_commas_says_so_row_by_row(stack, tmp_path):
    card = new_card()
    path = write(tmp_path / "a.csv", [*rows_of(card, 1), *rows_of(card, 1, amt="12;34")])
    lines = [line.replace(",", "\t") for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines).replace(";", ",") + "\n")
    result = command(stack, path)
    assert "give --separator tab" in str(result.exception)
    result = command(stack, path, "--json", "--separator", "tab")
    outcome = json.loads(result.stdout)
    assert (result.exit_code, outcome["loaded"], outcome["rejected"]) == (0, 1, 1)
    (reject,) = rejects(outcome)
    assert (reject["reason"], reject["field"]) == ("BAD_AMOUNT", "amt")
    assert "decimal comma" in reject["detail"]


def test_a_separator_that_is_none_is_wrong_usage(tmp_path):
    path = write(tmp_path / "a.csv", rows_of("4000123412341234", 1))
    done = command(tmp_path, path, "--separator", "x")
    assert done.exit_code == 2
    assert "no separator of columns: one of ',', ';', tab, '|'" in done.stderr


def test_a_load_of_which_no_row_was_taken_fails(stack, tmp_path):
    good, bad = rows_of(new_card(), 2), rows_of(new_card(), 2, amt="x")
    taken = write(tmp_path / "taken.csv", good)
    none = write(tmp_path / "none.csv", bad)
    empty = write(tmp_path / "empty.csv", [])
    assert command(stack, taken).exit_code == 0
    assert command(stack, taken).exit_code == 0, "all its rows are known"
    assert command(stack, empty).exit_code == 0, "it has no rows"
    done = command(stack, none, taken)
    assert done.exit_code == 1
    assert "tally: none.csv: no row of 2 was taken" in done.stderr
    assert "taken.csv: 2 rows read" in done.stderr, "the other file is loaded"


@pytest.mark.parametrize(
    ("limit", "code"),
    [("2", 0), ("1", 1), ("0", 1), ("20%", 0), ("19.9%", 1), ("0%", 1), ("100%", 0)],
)
def test_more_rejects_than_allowed_fail_a_command_that_loaded_the_rest(
    stack, tmp_path, limit, code
):
    card = new_card()
    path = write(tmp_path / "a.csv", [*rows_of(card, 8), *rows_of(card, 2, amt="x")])
    done = command(stack, path, "--json", "--max-rejects", limit)
    assert done.exit_code == code, done.stderr
    assert json.loads(done.stdout)["loaded"] == 8
    said = f"2 of 10 rows were rejected, more than --max-rejects {limit}"
    assert (said in done.stderr) == bool(code)
    assert len(stored(stack, card)) == 8


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 100_000))
def test_a_limit_of_rejects_is_exact(rejected, read, thousandths):
    limit = RejectLimit.parse(f"{thousandths / 1000:.3f}%")
    assert limit.allows(rejected, read) == (rejected * 100_000 <= thousandths * read)
    assert RejectLimit.parse(str(read)).allows(rejected, 0) == (rejected <= read)


@pytest.mark.parametrize("text", ["", "-1", "1.5", "101%", "%", "1e3", "5 %", "nan%"])
def test_what_is_no_limit_of_rejects_is_wrong_usage(tmp_path, text):
    path = write(tmp_path / "a.csv", rows_of("4000123412341234", 1))
    done = command(tmp_path, path, f"--max-rejects={text}")
    assert done.exit_code == 2
    assert "is no limit of rejects" in done.stderr


def test_a_damaged_parquet_file_is_read_until_there(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    rows = rows_of("4000123412341234", 60)
    with pq.ParquetWriter(path, pa.Table.from_pylist(rows[:1]).schema) as writer:
        for row_group in (rows[:30], rows[30:]):
            writer.write_table(pa.Table.from_pylist(row_group))
    where = pq.ParquetFile(path).metadata.row_group(1).column(1)
    damaged = bytearray(path.read_bytes())
    begin = where.dictionary_page_offset or where.data_page_offset
    damaged[begin : begin + 60] = b"\xff" * 60
    path.write_bytes(damaged)
    monkeypatch.setattr("ingest.files.PARQUET_BATCH_ROWS", 30)
    found: list[int] = []
    with pytest.raises(SourceError, match="the file is damaged"):
        found.extend(len(batch.table) for batch in read_file(path))
    assert found == [30]


def dated(tmp_path: Path, card: str) -> bytes:
    """Rows of which only the last says that days stand first; compressed."""
    days = ("08/02/2024 09:05", "09/02/2024 09:05", "13/02/2024 09:05")
    rows = [row(cc_num=card, trans_num=new_id(), trans_date_trans_time=day) for day in days]
    return gzip.compress(write(tmp_path / "dated.csv", rows).read_bytes())


def test_the_order_of_dates_is_settled_for_a_compressed_file_by_all_of_it(stack, tmp_path):
    card = new_card()
    path = tmp_path / "a.csv.gz"
    path.write_bytes(dated(tmp_path, card))
    assert loaded(stack, path)["loaded"] == 3
    assert [kept["event_time"].month for kept in stored(stack, card)] == [2, 2, 2]


def test_the_order_of_dates_in_a_pipe_is_named_or_known_by_unix_time(stack, tmp_path):
    card = new_card()
    data = dated(tmp_path, card)
    path = through_fifo(tmp_path, data)
    done = command(stack, path, "--json")
    assert done.exit_code == 1
    found = rejects(json.loads(done.stdout))
    assert {reject["reason"] for reject in found} == {"AMBIGUOUS_DATE"}
    assert all("a pipe is read once" in reject["detail"] for reject in found)
    path.unlink()
    done = command(stack, through_fifo(tmp_path, data), "--json", "--date-order", "day-first")
    assert json.loads(done.stdout)["loaded"] == 3
