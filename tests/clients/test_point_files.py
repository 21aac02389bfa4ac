"""Points from files: what means nothing here is text and comes back as it was; errors say where."""

from __future__ import annotations

import csv
import gzip
import io
import os
import threading
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tally.point_files import read_points
from tally.sources import SourceError

HEADER = "card,event_time,amount"
GOOD = "4000123412341234,2024-03-01T00:00:00Z,1.5"


def read(path: Path | str, separator: str = ",") -> pa.Table:
    schema, batches = read_points(path, separator)
    return pa.Table.from_batches(batches, schema)


def read_until_failure(path: Path) -> tuple[pa.Table, str]:
    """What could be read, and what was said then."""
    schema, batches = read_points(path)
    found: list[pa.RecordBatch] = []
    with pytest.raises(SourceError) as caught:
        found.extend(batches)
    return pa.Table.from_batches(found, schema), str(caught.value)


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


MANGLED = [
    "NA",
    "Null",
    "null",
    "12E4",
    "0012",
    "true",
    "2019-01-05",
    "",
    " x ",
    "1.0",
    "NaN",
    "-",
    "é…",
]


def test_columns_that_mean_nothing_are_text_as_it_was(tmp_path):
    lines = [f"{GOOD},{text},{text}" for text in MANGLED]
    table = read(written(tmp_path / "p.csv", f"{HEADER},a,b", *lines))
    assert table.schema.types[3:] == [pa.string()] * 2
    assert table["a"].to_pylist() == table["b"].to_pylist() == MANGLED
    assert table["a"].null_count == 0


def test_columns_that_mean_something_have_their_types_and_nulls(tmp_path):
    path = written(
        tmp_path / "p.csv",
        "card,event_time,amount,merchant,category,merchant_latitude,merchant_longitude,transaction_id",
        "0012345678,2024-03-01 00:00:00+01:00, 12 ,NA,null,,NaN,0042",
    )
    (row,) = read(path).to_pylist()
    assert row == {
        "card": "0012345678",
        "event_time": datetime(2024, 2, 29, 23, tzinfo=UTC),
        "amount": 12.0,
        "merchant": "NA",
        "category": "null",
        "merchant_latitude": None,
        "merchant_longitude": None,
        "transaction_id": "0042",
    }


def test_a_column_may_change_its_kind_behind_the_first_megabyte(tmp_path):
    lines = [f"{GOOD},{i}" for i in range(60_000)]
    path = written(tmp_path / "p.csv", f"{HEADER},mine", *lines, f"{GOOD},no number", f"{GOOD},")
    assert path.stat().st_size > 2 << 20
    mine = read(path)["mine"].to_pylist()
    assert mine == [*map(str, range(60_000)), "no number", ""]


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@given(
    rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=30),
    separator=st.sampled_from(",;|\t"),
    ending=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    block_bytes=st.integers(1, 200),
)
@settings(max_examples=200)
def test_texts_of_any_kind_come_out_as_they_went_in(
    tmp_path_factory, rows, separator, ending, quoting, block_bytes
):
    buffer = io.StringIO(newline="")
    # Such a writer leaves a carriage return outside of quotes, where it is no text but the end of a line.
    assume(ending == "\r\n" or quoting == csv.QUOTE_ALL or "\r" not in "".join(map("".join, rows)))
    writer = csv.writer(buffer, delimiter=separator, lineterminator=ending, quoting=quoting)
    writer.writerow(["a", "event_time", "b"])
    writer.writerows((a, "2024-03-01T00:00:00Z", b) for a, b in rows)
    path = tmp_path_factory.mktemp("texts") / "p.csv"
    path.write_bytes(buffer.getvalue().encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tally.point_files.BLOCK_BYTES", block_bytes)
        table = read(path, separator)
    assert list(zip(table["a"].to_pylist(), table["b"].to_pylist(), strict=True)) == rows


@pytest.mark.parametrize(
    "quoted", ["", '"two\nlines",'], ids=["plain", "after a cell of two lines"]
)
@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ("4000123412341234,2024-03-01T00:00:00Z,1x", "column amount: it is no number"),
        ('4000123412341234,2024-03-01T00:00:00Z,"12,34"', "column amount: it has a decimal comma"),
        ("4000123412341234,2024-03-01,1", "column event_time: it is no time with its offset"),
        ("Erika,Mustermann,12 Example Street,x,y,z", "columns, the header"),
        ('4000123412341234,2024-03-01T00:00:00Z,"1"2', "is no CSV"),
        ("4000123412341234,2024-03-01T00:00:00Z,\udcff", "is not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_named_by_file_line_and_column_and_never_quoted(
    tmp_path, quoted, bad, what
):
    header = f"mine,{HEADER}" if quoted else HEADER
    empty = "," if quoted else ""
    lines = [header, quoted + GOOD, "", *[empty + GOOD] * 5, empty + bad, empty + GOOD]
    path = tmp_path / "p.csv"
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    table, said = read_until_failure(path)
    line = "\n".join(lines[:8]).count("\n") + 2
    assert said.startswith(f"{path}: line {line}")
    assert what in said
    assert "Mustermann" not in said
    assert "4000" not in said.removeprefix(str(path))
    assert len(table) == 6


def test_a_quote_that_is_not_closed_is_an_error_with_its_line(tmp_path):
    table, said = read_until_failure(written(tmp_path / "p.csv", HEADER, GOOD, f'"{GOOD}', GOOD))
    assert ": line 3 is no CSV" in said
    assert len(table) == 1


@pytest.mark.parametrize("quoted", [GOOD, f'{GOOD[:-3]}"1"'], ids=["plain", "behind a quote"])
def test_a_line_without_an_end_is_refused_and_not_held(tmp_path, monkeypatch, quoted):
    monkeypatch.setattr("tally.point_files.LINE_BYTES_MAX", 10_000)
    monkeypatch.setattr("tally.point_files.BLOCK_BYTES", 1_000)
    _, said = read_until_failure(written(tmp_path / "p.csv", HEADER, quoted, "x" * 100_000))
    assert said.endswith(": line 3 has more than 10,000 bytes")


def test_a_header_alone_is_points_without_rows(tmp_path):
    assert read(written(tmp_path / "p.csv", HEADER)).num_rows == 0
    with pytest.raises(SourceError, match="it has no header"):
        read(written(tmp_path / "empty.csv"))


def test_other_separators_are_named_and_taken(tmp_path):
    for separator, name in ((";", "';'"), ("\t", "tab"), ("|", "'|'")):
        lines = [text.replace(",", separator) for text in (f"{HEADER},mine", f"{GOOD},a")]
        path = written(tmp_path / "p.csv", *lines)
        with pytest.raises(SourceError, match=f"separated by {name.replace('|', '.')}: give --sep"):
            read(path)
        assert read(path, separator)["mine"].to_pylist() == ["a"]


@pytest.mark.parametrize(
    "pack", [gzip.compress, zstd, lambda data: zstd(data[:99]) + zstd(data[99:])]
)
def test_compressed_points_are_told_by_their_first_bytes(tmp_path, pack):
    text = "\n".join([f"{HEADER},mine", *(f"{GOOD},{i}" for i in range(50_000))]).encode()
    path = tmp_path / "points.csv"
    path.write_bytes(pack(text))
    assert read(path)["mine"].to_pylist() == list(map(str, range(50_000)))


@pytest.mark.parametrize(("codec", "pack"), [("gzip", gzip.compress), ("zstd", zstd)])
def test_a_compressed_file_that_is_cut_off_is_read_until_there(tmp_path, codec, pack):
    lines = [f"{GOOD},{os.urandom(8).hex()}" for i in range(50_000)]
    data = pack("\n".join([f"{HEADER},mine", *lines]).encode())
    path = tmp_path / "points.csv.gz"
    path.write_bytes(data[: len(data) // 2])
    table, said = read_until_failure(path)
    assert said == f"{path}: the file is cut off: its {codec} stream has no end"
    assert 15_000 < len(table) < 35_000
    assert table["mine"].to_pylist() == [line.rpartition(",")[2] for line in lines[: len(table)]]


def test_what_is_not_read_says_what_to_do(tmp_path):
    for begin, what in (
        (b"PK\x03\x04", "unpack it"),
        (b"BZh9", "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
        ("\ufeffcard".encode("utf-16-le"), "UTF-16"),
        (b"PAR1 but no more", "damaged"),
    ):
        path = tmp_path / "p.csv"
        path.write_bytes(begin)
        with pytest.raises(SourceError, match=what):
            read(path)
    pq.write_table(pa.table({"card": ["1"]}), tmp_path / "p.parquet")
    path.write_bytes(gzip.compress((tmp_path / "p.parquet").read_bytes()))
    with pytest.raises(SourceError, match="Parquet is not read out of gzip"):
        read(path)


def through_fifo(tmp_path: Path, data: bytes) -> Path:
    """A pipe with a name into which data goes, once."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    threading.Thread(target=path.write_bytes, args=(data,), daemon=True).start()
    return path


def test_a_pipe_is_opened_once(tmp_path):
    text = "\n".join([f"{HEADER},mine", *(f"{GOOD},{i}" for i in range(50_000))]).encode()
    assert len(read(through_fifo(tmp_path, gzip.compress(text)))) == 50_000


def test_parquet_through_a_pipe_is_refused(tmp_path):
    with pytest.raises(SourceError, match="not read from a pipe"):
        read(through_fifo(tmp_path, b"PAR1" + bytes(100)))


def test_folders_and_patterns_of_parquet_have_the_columns_of_their_folders(tmp_path):
    at = pa.array([0], pa.timestamp("ms", "UTC"))
    for year, month, merchant in (("2024", "01", "A%2FB"), ("2023", "12", "x")):
        folder = tmp_path / "points" / f"year={year}" / f"month={month}" / f"merchant={merchant}"
        folder.mkdir(parents=True)
        table = pa.table({"card": [f"{year}{month}00"], "event_time": at})
        pq.write_table(table, folder / "part-0.parquet")
        (folder / "_SUCCESS").touch()
    want = [("20231200", "2023", "12", "x"), ("20240100", "2024", "01", "A/B")]
    for path in (
        tmp_path / "points",
        tmp_path / "points" / "year=*",
        tmp_path / "**" / "*.parquet",
        tmp_path / "points" / "**",
    ):
        table = read(path)
        assert [
            (row["card"], row["year"], row["month"], row["merchant"]) for row in table.to_pylist()
        ] == want
    with pytest.raises(FileNotFoundError, match="no file fits"):
        read(tmp_path / "points" / "year=1*")
    (tmp_path / "none").mkdir()
    with pytest.raises(SourceError, match="no file that ends in"):
        read(tmp_path / "none")


def test_more_files_than_a_command_can_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tally.sources.FILES_MAX", 3)
    for i in range(4):
        written(tmp_path / f"{i}.csv", HEADER, GOOD)
    for path in (tmp_path, tmp_path / "*.csv"):
        with pytest.raises(SourceError, match="has more than 3 files"):
            read(path)


def test_a_file_of_other_columns_in_a_folder_is_named(tmp_path):
    written(tmp_path / "a.csv", HEADER, GOOD)
    written(tmp_path / "b.csv", f"{HEADER},mine", f"{GOOD},x")
    table, said = read_until_failure(tmp_path)
    assert said == f"{tmp_path / 'b.csv'}: its columns are not those of the first file: mine"
    assert len(table) == 1
