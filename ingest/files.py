"""Reads files into batches of text columns, in bounded memory: Kaggle-format CSV and Parquet, and the
Handbook's Parquet. CSV may be compressed, or come through a pipe; columns that folders name (category=misc)
are columns of their files.

CSV is read in blocks of whole lines by Arrow's parser. A line that it refuses is looked at alone:
one wrapped in quotes as a whole, as spreadsheets do, is unwrapped; any other is a reject. A block
that it refuses altogether, for an encoding, or in which a quote swallows the end of a line, is taken
line by line: a row is a line here.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from tally.sources import Place, Source, SourceError, find, other_separator

from ingest.dates import Dated, dated_rows
from ingest.handbook import COLUMNS as HANDBOOK
from ingest.handbook import as_kaggle, is_handbook

BLOCK_BYTES = 8 << 20
"""Text that is read and worked on together, about 30,000 rows."""
LINE_BYTES_MAX = 1 << 20
"""A longer line is no row of this format."""
PARQUET_BATCH_ROWS = 32_768

BOM = b"\xef\xbb\xbf"

REQUIRED = ("trans_date_trans_time", "cc_num", "merchant", "amt", "trans_num")
COLUMNS = (
    *REQUIRED,
    *("category", "merch_lat", "merch_long", "is_fraud", "unix_time"),
    *("gender", "city", "state", "zip", "lat", "long", "city_pop", "job", "dob"),
)
"""What is read of a file; other columns, the holder's name and street among them, are not."""


class FileFormatError(ValueError):
    """A file that is not of a format known here; the message says why."""


@dataclass(slots=True)
class BadLine:
    """A line that has no columns to speak of."""

    line: int
    reason: str
    detail: str
    raw: str


@dataclass(slots=True)
class TextBatch:
    """Some rows of a file, as text."""

    table: pa.Table
    """String columns, of COLUMNS those that the file has; the empty text stands for nothing."""
    lines: npt.NDArray[np.int64]
    """(n,) where each row is in the file, from 1."""
    raw: Callable[[int], str]
    """The text of row i of this batch."""
    bad_lines: list[BadLine] = field(default_factory=list)
    bytes_read: int = 0
    """How much of the file this batch took."""


def read_file(path: Path, separator: str = ",") -> Iterator[TextBatch]:
    """The batches of a file, told by its first bytes.

    Args:
        path: the file.
        separator: of columns, where it is CSV.

    Raises:
        FileFormatError: it has no header of ours, or lacks columns.
        SourceError: it is damaged or cut off, behind all batches that could be read.
        OSError: it cannot be read.
    """
    (place,) = find(path)
    with Source(place) as source:
        yield from read_source(source, separator)


def read_source(source: Source, separator: str = ",") -> Iterator[TextBatch]:
    """The same of a file that is open."""
    partitions = {name: value or "" for name, value in source.place.partitions}
    if source.is_parquet:
        return _read_parquet(source, partitions)
    return _read_csv(source, separator, partitions)


def rereads(place: Place, separator: str) -> Callable[[], Dated] | None:
    """What reads the dates of a file before it is loaded, as far as it can be read; None for a pipe, which is
    read once."""
    if place.size_bytes is None:
        return None

    def reread() -> Dated:
        with Source(place) as again, suppress(SourceError):
            yield from dated_rows(read_source(again, separator))

    return reread


def _chosen(names: list[str], path: str) -> list[str]:
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        # Names that are not known here may be a first row: they are not said.
        known = ", ".join(name for name in COLUMNS if name in names) or "none of those known here"
        raise FileFormatError(
            f"{path}: the header lacks {', '.join(missing)}; of {len(names)} columns it names "
            f"{known}; is there a header?"
        )
    twice = [name for name in COLUMNS if names.count(name) > 1]
    if twice:
        raise FileFormatError(f"{path}: the header has {', '.join(twice)} more than once")
    return [name for name in COLUMNS if name in names]


def _partitioned(table: pa.Table, partitions: dict[str, str], names: list[str]) -> pa.Table:
    """A table with the columns that folders name, of those that are wanted; a file's own column wins."""
    for name, value in partitions.items():
        if name in names and name not in table.column_names:
            table = table.append_column(name, pa.array([value] * len(table), pa.string()))
    return table


# --- CSV ------------------------------------------------------------------------------------


def _unwrapped(line: str) -> str | None:
    """The line inside one pair of quotes, where it is wrapped as a whole; otherwise None."""
    if len(line) > 1 and line[0] == line[-1] == '"':
        cells = next(csv.reader([line]), [])
        if len(cells) == 1:
            return cells[0]
    return None


def _cells(line: str, separator: str = ",") -> list[str]:
    return next(csv.reader([line], strict=True, delimiter=separator), [])


def _header(source: Source, separator: str) -> tuple[list[str], str]:
    """The names of a file's columns, and the line they are on; the source is behind it then.

    Raises:
        FileFormatError: it cannot be read.
    """
    end = source.head.find(b"\n") + 1
    head = source.read(end or len(source.head))
    try:
        text = head.removeprefix(BOM).decode().rstrip("\r\n")
        names = _cells(_unwrapped(text) or text, separator)
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileFormatError(f"{source.label}: the header cannot be read: {error}") from None
    return [name.strip() for name in names], text


def _read_csv(source: Source, separator: str, partitions: dict[str, str]) -> Iterator[TextBatch]:
    names, text = _header(source, separator)
    hint = other_separator(text, separator)
    if hint and not set(REQUIRED) <= {*names, *partitions}:
        raise FileFormatError(f"{source.label}: {hint}")
    wanted = _chosen([*names, *(name for name in partitions if name not in names)], source.label)
    # Arrow wants every column named, and each once.
    labels = [name or f"unnamed_{i}" for i, name in enumerate(names)]
    parser = _CsvParser(labels, [name for name in wanted if name in names], separator)

    def parse(block: bytes, line: int) -> TextBatch:
        batch = parser.parse(block, line)
        batch.table = _partitioned(batch.table, partitions, wanted)
        batch.bytes_read = source.taken_bytes()
        return batch

    line, rest = 2, b""
    while block := source.read(BLOCK_BYTES):
        cut = block.rfind(b"\n") + 1
        if cut == 0 and len(rest) < LINE_BYTES_MAX:
            rest += block
            continue
        whole, rest = rest + block[:cut], block[cut:]
        yield parse(whole, line)
        line += whole.count(b"\n")
    if rest:
        yield parse(rest, line)


def _lines(block: bytes) -> int:
    return block.count(b"\n") + (not block.endswith(b"\n"))


def _is_utf8(block: bytes) -> bool:
    try:
        block.decode()
    except UnicodeDecodeError:
        return False
    return True


class _CsvParser:
    """Parses blocks of whole lines under one header."""

    def __init__(self, names: list[str], chosen: list[str], separator: str) -> None:
        self._names = names
        self._chosen = chosen
        self._separator = separator

    def parse(self, block: bytes, first_line: int) -> TextBatch:
        """The rows of a block whose first line has number first_line."""
        refused: list[int] = []

        def refuse(row: Any) -> str:
            refused.append(row.number - 1)
            return "skip"

        lines_of_block: list[bytes] | None = None

        def line_of(offset: int) -> str:
            nonlocal lines_of_block
            if lines_of_block is None:
                lines_of_block = block.split(b"\n")
            return lines_of_block[offset].rstrip(b"\r").decode(errors="replace")

        try:
            table = pacsv.read_csv(
                pa.BufferReader(block),
                # One chunk: row numbers are only told when nothing runs in parallel.
                pacsv.ReadOptions(
                    use_threads=False, column_names=self._names, block_size=len(block) + 1
                ),
                pacsv.ParseOptions(
                    delimiter=self._separator,
                    # A row that is no UTF-8 cannot be handed over: Arrow would print a traceback.
                    invalid_row_handler=refuse if _is_utf8(block) else None,
                    ignore_empty_lines=False,
                ),
                pacsv.ConvertOptions(
                    include_columns=self._chosen,
                    column_types=dict.fromkeys(self._chosen, pa.string()),
                    strings_can_be_null=False,
                ),
            )
        except pa.ArrowInvalid:
            return self._parse_lines([(i, line_of(i)) for i in range(_lines(block))], first_line)
        total = len(table) + len(refused)
        if total != _lines(block):
            # A quote that is not closed on its line has swallowed the lines behind it.
            return self._parse_lines([(i, line_of(i)) for i in range(_lines(block))], first_line)
        offsets = np.arange(total, dtype=np.int64)
        if refused:
            offsets = np.delete(offsets, refused)
        required = [
            name for name in REQUIRED if name in self._chosen
        ] or self._chosen  # folders may name others
        empty = reduce(pc.and_, (pc.equal(table[name], "") for name in required))
        if pc.any(empty).as_py():  # Arrow reads a blank line as a row of nothing
            blank = np.array(
                [is_empty and not line_of(i).strip()
                 for i, is_empty in zip(offsets.tolist(), empty.to_pylist(), strict=True)]
            )  # fmt: skip
            table, offsets = table.filter(pa.array(~blank)), offsets[~blank]
        lines, bad_lines = offsets + first_line, []
        if refused:
            mended = self._parse_lines([(i, line_of(i)) for i in sorted(refused)], first_line)
            bad_lines = mended.bad_lines
            if len(mended.table):
                # In the order of the file: of rows that contradict each other the first wins.
                lines = np.concatenate((lines, mended.lines))
                order = np.argsort(lines, kind="stable")
                table = pa.concat_tables((table, mended.table)).take(order)
                lines = lines[order]
        # Not a method of the batch: a cycle would keep the block until the collector comes by.
        return TextBatch(table, lines, lambda row: line_of(int(lines[row]) - first_line), bad_lines)

    def _parse_lines(self, numbered: list[tuple[int, str]], first_line: int) -> TextBatch:
        """Takes lines one at a time."""
        positions = [self._names.index(name) for name in self._chosen]
        rows: list[list[str]] = []
        raw: list[str] = []
        lines: list[int] = []
        bad: list[BadLine] = []
        for offset, text in numbered:
            line = first_line + offset
            if not text.strip():
                continue
            if "\ufffd" in text:
                bad.append(BadLine(line, "BAD_ENCODING", "the line is not UTF-8", text))
                continue
            try:
                cells = _cells(_unwrapped(text) or text, self._separator)
            except csv.Error as error:
                bad.append(BadLine(line, "MALFORMED_ROW", f"the line is no CSV: {error}", text))
                continue
            if len(cells) != len(self._names):
                detail = f"the line has {len(cells)} columns, the header {len(self._names)}"
                bad.append(BadLine(line, "MALFORMED_ROW", detail, text))
                continue
            rows.append([cells[position] for position in positions])
            raw.append(text)
            lines.append(line)
        columns = zip(*rows, strict=True) if rows else [()] * len(self._chosen)
        table = pa.table(
            {
                name: pa.array(column, pa.string())
                for name, column in zip(self._chosen, columns, strict=True)
            }
        )
        return TextBatch(table, np.array(lines, dtype=np.int64), raw.__getitem__, bad)


# --- Parquet --------------------------------------------------------------------------------


def _read_parquet(source: Source, partitions: dict[str, str]) -> Iterator[TextBatch]:
    path = source.label
    try:
        file = pq.ParquetFile(pa.PythonFile(source.file, mode="r"))
    except pa.ArrowInvalid as error:
        raise FileFormatError(f"{path}: {error}") from None
    with file:
        own = file.schema_arrow.names
        names = [*own, *(name for name in partitions if name not in own)]
        of_handbook = is_handbook(names)
        chosen = list(HANDBOOK) if of_handbook else _chosen(names, path)
        _refuse_small_floats(file.schema_arrow, path)
        size, rows = source.size_bytes or 0, max(1, file.metadata.num_rows)
        line = 1
        read = [name for name in chosen if name in own]
        for record_batch in _whole(file.iter_batches(PARQUET_BATCH_ROWS, columns=read), path):
            table = pa.table({name: _as_text(record_batch, name, path) for name in read})
            table = _partitioned(table, partitions, chosen).select(chosen)
            if of_handbook:
                table = as_kaggle(table)
            lines = np.arange(line, line + len(table), dtype=np.int64)
            line += len(table)
            yield TextBatch(
                table,
                lines,
                partial(_row_text, table),
                bytes_read=size * len(table) // rows,
            )


_EXACT = ("amt", "trans_num", "TX_AMOUNT", "TRANSACTION_ID")
"""Columns that a float32 does not hold."""


def _refuse_small_floats(schema: pa.Schema, path: str) -> None:
    """Raises FileFormatError where amounts or ids have lost digits.

    All of the file, once: row by row the amounts that a float32 happens to hold, mostly whole ones, would
    be taken and the others not.
    """
    for field_ in schema:
        small = pa.types.is_float32(field_.type) or pa.types.is_float16(field_.type)
        if small and field_.name in _EXACT:
            kind = "float32" if pa.types.is_float32(field_.type) else "float16"
            raise FileFormatError(
                f"{path}: column {field_.name} is {kind}, which has lost digits of amounts and ids: "
                "write it as float64, as decimals or as text, from where it was exact"
            )


def _whole(batches: Iterator[pa.RecordBatch], path: str) -> Iterator[pa.RecordBatch]:
    """Batches of a file. Raises SourceError where it is damaged."""
    try:
        yield from batches
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path}: the file is damaged: {error}") from None


def _row_text(table: pa.Table, row: int) -> str:
    return ",".join(map(str, table.slice(row, 1).to_pylist()[0].values()))


def _as_text(record_batch: pa.RecordBatch, name: str, path: str) -> pa.Array:
    """A typed column as the text that a CSV would have."""
    column = record_batch.column(name)
    try:
        if name == "cc_num" and pa.types.is_floating(column.type):
            # In a float's own spelling, so that it is rejected as what has gone through one.
            return pa.array(["" if v is None else repr(v) for v in column.to_pylist()], pa.string())
        return _cast_to_text(column)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError):
        # Not Arrow's own message: it quotes values.
        raise FileFormatError(
            f"{path}: column {name} ({column.type}) cannot be read as text"
        ) from None


def _cast_to_text(column: pa.Array) -> pa.Array:
    if pa.types.is_floating(column.type):
        return pa.array([_float_text(value) for value in column.to_pylist()], pa.string())
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.string()).fill_null("")


def _float_text(value: float | None) -> str:
    """A float as text: whole numbers in full while a float64 holds them exactly."""
    if value is None:
        return ""
    if value.is_integer() and abs(value) <= 2**53:
        return str(int(value))
    return repr(value)
