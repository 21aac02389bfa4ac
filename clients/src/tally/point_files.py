"""Points from files. A column of CSV that means something has its type; any other is text, as it is there.

A line number counts the lines of the file from 1, the header among them.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tally.ordering import BATCH_ROWS
from tally.sources import Source, SourceError, find, other_separator

if TYPE_CHECKING:
    import pyarrow as pa

TEXTS = ("card", "transaction_id", "merchant", "category")
"""Columns that mean something, and are text: a card number loses digits as a number."""
NUMBERS = ("amount", "merchant_latitude", "merchant_longitude")
TIME = "event_time"
BLOCK_BYTES = 1 << 20
"""Text that is parsed together."""
LINE_BYTES_MAX = 16 << 20
_BOM = b"\xef\xbb\xbf"
_SPREADSHEETS = (".xls", ".xlsx", ".xlsm", ".xlsb", ".ods")
_COMMA = re.compile(r"[+-]?[0-9.]*[0-9],[0-9.,]+\Z", re.ASCII)


def meant_type(name: str) -> pa.DataType | None:
    """The type of a column that means something, as it is read from text; None of any other."""
    import pyarrow as pa

    if name == TIME:
        return pa.timestamp("us", "UTC")
    if name in NUMBERS:
        return pa.float64()
    return pa.string() if name in TEXTS else None


def read_points(
    path: str | Path, separator: str = ","
) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema of the points of files, and their rows, in the order of the files' paths.

    Args:
        path: what tally.sources.find takes: CSV, also compressed or piped, and Parquet, also in folders.
        separator: of columns, where it is CSV.

    Raises:
        SourceError: a file that cannot be read; from the iterator, behind all that could be.
        OSError: it cannot be opened.
    """
    if Path(path).suffix.lower() in _SPREADSHEETS:
        raise SourceError(f"{path}: points are read from .csv and .parquet: save it as CSV")
    first, *others = find(path)
    schema, batches = _read(Source(first), separator)

    def rest() -> Iterator[pa.RecordBatch]:
        for place in others:
            its_schema, its_batches = _read(Source(place), separator)
            yield from _as_first(its_batches, its_schema, schema, str(place.path))

    return schema, chain(batches, rest())


def _read(source: Source, separator: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    try:
        if source.is_parquet:
            schema, batches = _read_parquet(source)
        else:
            file = _CsvFile(source, separator)
            schema, batches = file.schema, file.batches()
    except BaseException:
        source.close()
        raise
    return _with_partitions(source, schema, batches)


def _as_first(
    batches: Iterator[pa.RecordBatch], schema: pa.Schema, first: pa.Schema, label: str
) -> Iterator[pa.RecordBatch]:
    """Batches as those of the first file: its columns in its order.

    Raises:
        SourceError: the columns are others, or have types that do not become the first file's.
    """
    import pyarrow as pa

    if sorted(schema.names) != sorted(first.names):
        others = ", ".join(sorted({*schema.names} ^ {*first.names})) or "some, twice"
        raise SourceError(f"{label}: its columns are not those of the first file: {others}")
    for batch in batches:
        try:
            yield batch.select(first.names).cast(first)
        except (pa.ArrowException, ValueError) as error:
            raise SourceError(
                f"{label}: its columns are not as in the first file: {error}"
            ) from None


def _with_partitions(
    source: Source, schema: pa.Schema, batches: Iterator[pa.RecordBatch]
) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Adds the columns that folders above a file name; a column of the file's own wins. Closes the file
    behind its last batch."""
    import pyarrow as pa

    added = [(name, value) for name, value in source.place.partitions if name not in schema.names]
    constants = []
    for name, value in added:
        texts = pa.array([value], pa.string())
        kind = meant_type(name)
        if kind is not None and (fault := _fault_of(texts, kind)):
            raise SourceError(f"{source.label}: column {name} of its folder: {fault}")
        constants.append(texts if kind is None else _converted(texts, kind))
    for (name, _), constant in zip(added, constants, strict=True):
        schema = schema.append(pa.field(name, constant.type))

    def whole() -> Iterator[pa.RecordBatch]:
        with source:
            for batch in batches:
                here = pa.array([0] * len(batch), pa.int32())
                columns = [*batch.columns, *(constant.take(here) for constant in constants)]
                yield pa.RecordBatch.from_arrays(columns, schema=schema)

    return schema, whole()


# --- Parquet --------------------------------------------------------------------------------


def _read_parquet(source: Source) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def damaged(error: Exception) -> SourceError:
        return SourceError(f"{source.label}: the file is damaged: {error}")

    try:
        file = pq.ParquetFile(pa.PythonFile(source.file, mode="r"))
        schema = file.schema_arrow.remove_metadata()
    except (pa.ArrowException, OSError) as error:
        raise damaged(error) from None

    def batches() -> Iterator[pa.RecordBatch]:
        with file:
            try:
                for batch in file.iter_batches(BATCH_ROWS):
                    yield batch.replace_schema_metadata(None)
            except (pa.ArrowException, OSError) as error:
                raise damaged(error) from None

    return schema, batches()


# --- CSV ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Texts:
    """Some rows, as text."""

    columns: list[pa.Array]
    """(n,) each, in the order of the header."""
    line: Callable[[int], int]
    """The line of row i in the file."""


class _CsvFile:
    """One file of CSV.

    Blocks without a quote are parsed by Arrow: there a row is a line. From the first quote on, in which
    lines may end, and where Arrow refuses a block, Python's parser reads, which says where.
    """

    def __init__(self, source: Source, separator: str) -> None:
        """Reads the header.

        Raises:
            SourceError: it cannot be read.
        """
        import pyarrow as pa

        self._source, self._separator = source, separator
        end = source.head.find(b"\n") + 1
        head = source.read(end or len(source.head))
        try:
            text = head.removeprefix(_BOM).decode().rstrip("\r\n")
            self._names = next(csv.reader([text], strict=True, delimiter=separator), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise SourceError(f"{source.label}: the header cannot be read: {error}") from None
        if not self._names:
            raise SourceError(f"{source.label}: it has no header")
        hint = other_separator(text, separator)
        if hint and TIME not in self._names:
            raise SourceError(f"{source.label}: {hint}")
        self.schema = pa.schema(
            [(name, pa.string() if (t := meant_type(name)) is None else t) for name in self._names]
        )

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows.

        Raises:
            SourceError: one of them cannot be read; behind all that come before it.
        """
        for texts in self._texts():
            yield from self._typed(texts)

    def _fault(self, line: int, what: str) -> SourceError:
        return SourceError(f"{self._source.label}: line {line}{what}")

    # --- from bytes to text -----------------------------------------------------------------

    def _texts(self) -> Iterator[_Texts]:
        line, rest = 2, b""
        while block := self._source.read(BLOCK_BYTES):
            cut = block.rfind(b"\n") + 1
            if cut == 0:
                rest = self._grown(rest, block, line)
                continue
            whole, rest = rest + block[:cut], block[cut:]
            if b'"' in whole or b'"' in rest:
                yield from self._parsed_lines(self._lines(whole + rest, line), line)
                return
            yield from self._parsed(whole, line)
            line += whole.count(b"\n")
        if rest:
            yield from self._parsed_lines(_split(rest), line)

    def _grown(self, rest: bytes, block: bytes, line: int) -> bytes:
        """The beginning of a line and what comes behind it.

        Raises:
            SourceError: no line is so long.
        """
        if len(rest) > LINE_BYTES_MAX:
            raise self._fault(line, f" has more than {LINE_BYTES_MAX:,} bytes")
        return rest + block

    def _lines(self, begin: bytes, line: int) -> Iterator[bytes]:
        """All lines from here, the `line`th, to the end of the file, with what ends them."""
        rest = begin
        while True:
            cut = rest.rfind(b"\n") + 1
            yield from _split(rest[:cut])
            line += rest.count(b"\n", 0, cut)
            rest = rest[cut:]
            block = self._source.read(BLOCK_BYTES)
            if not block:
                break
            rest = self._grown(rest, block, line)
        yield from _split(rest)

    def _parsed(self, block: bytes, first_line: int) -> Iterator[_Texts]:
        """The rows of a block of whole lines without a quote."""
        import pyarrow as pa
        import pyarrow.csv as pacsv

        # Arrow wants each name once; the server says so of those that are there twice.
        numbers = [str(i) for i in range(len(self._names))]
        try:
            table = pacsv.read_csv(
                pa.BufferReader(block),
                pacsv.ReadOptions(
                    use_threads=False, column_names=numbers, block_size=len(block) + 1
                ),
                pacsv.ParseOptions(delimiter=self._separator, quote_char=False),
                pacsv.ConvertOptions(
                    column_types=dict.fromkeys(numbers, pa.string()), strings_can_be_null=False
                ),
            ).combine_chunks()
        except (pa.ArrowException, UnicodeDecodeError):
            table = None
        blank = block.startswith((b"\n", b"\r\n")) or b"\n\n" in block or b"\n\r\n" in block
        if table is None or blank or len(table) != block.count(b"\n"):
            yield from self._parsed_lines(_split(block), first_line)
            return
        for batch in table.to_batches(BATCH_ROWS):
            yield _Texts(batch.columns, first_line.__add__)
            first_line += len(batch)

    def _parsed_lines(self, lines: Iterator[bytes], first_line: int) -> Iterator[_Texts]:
        """The rows of lines; a quote may hold the end of one."""
        rows: list[list[str]] = []
        numbers: list[int] = []
        failure: SourceError | None = None
        try:
            for number, cells in self._rows(lines, first_line):
                rows.append(cells)
                numbers.append(number)
                if len(rows) == BATCH_ROWS:
                    yield self._of_rows(rows, numbers)
                    rows, numbers = [], []
        except SourceError as error:
            failure = error
        if rows:
            yield self._of_rows(rows, numbers)
        if failure is not None:
            raise failure

    def _rows(self, lines: Iterator[bytes], first_line: int) -> Iterator[tuple[int, list[str]]]:
        """(line, cells) of each row.

        Raises:
            SourceError: a line that is no row of this file.
        """
        reader = csv.reader(map(bytes.decode, lines), strict=True, delimiter=self._separator)
        while True:
            number = first_line + reader.line_num
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise self._fault(number, f" is no CSV: {error}") from None
            except UnicodeDecodeError:
                raise self._fault(first_line + reader.line_num, " is not UTF-8") from None
            if cells is None:
                return
            if not cells:  # a blank line
                continue
            if len(cells) != len(self._names):
                what = f" has {len(cells)} columns, the header {len(self._names)}"
                raise self._fault(number, what)
            yield number, cells

    def _of_rows(self, rows: list[list[str]], numbers: list[int]) -> _Texts:
        import pyarrow as pa

        columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
        return _Texts(columns, numbers.__getitem__)

    # --- from text to types -----------------------------------------------------------------

    def _typed(self, texts: _Texts) -> Iterator[pa.RecordBatch]:
        """The rows of texts as a batch; up to the first value that is none of its column's type."""
        import pyarrow as pa

        good, fault = len(texts.columns[0]), ""
        columns: list[Any] = []
        for name, kind, column in zip(self._names, self.schema.types, texts.columns, strict=True):
            converted = column if kind == pa.string() else _converted(column, kind)
            if converted is None:
                row, why = _first_fault(column[:good], kind) or (good, "")
                if row < good:
                    good, fault = row, f", column {name}: {why}"
                converted = _converted(column[:good], kind)
            columns.append(converted)
        if good:
            yield pa.RecordBatch.from_arrays([c[:good] for c in columns], schema=self.schema)
        if fault:
            raise self._fault(texts.line(good), fault)


def _split(block: bytes) -> Iterator[bytes]:
    """Lines with what ends them."""
    begin = 0
    while begin < len(block):
        end = block.find(b"\n", begin) + 1 or len(block)
        yield block[begin:end]
        begin = end


def _converted(texts: Any, kind: pa.DataType) -> Any:
    """Texts as a type, null for what Arrow calls a null; None where one of them is none of that type."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv as pacsv

    if kind == pa.string():
        return texts
    trimmed = pc.utf8_trim_whitespace(texts)
    is_null = pc.is_in(trimmed, pa.array(pacsv.ConvertOptions().null_values))
    try:
        return pc.if_else(is_null, None, trimmed).cast(kind)
    except pa.ArrowInvalid:
        return None


def _first_fault(texts: Any, kind: pa.DataType) -> tuple[int, str] | None:
    """The first text that is none of a type, and what is wrong with it."""
    for row in range(len(texts)):
        if fault := _fault_of(texts[row : row + 1], kind):
            return row, fault
    return None


def _fault_of(text: Any, kind: pa.DataType) -> str:
    """What is wrong with one text, (1,), as a value of a type; empty where nothing is. It is not quoted:
    in a file whose columns are not what they say it may be anything."""
    import pyarrow as pa

    if _converted(text, kind) is not None:
        return ""
    if pa.types.is_timestamp(kind):
        return "it is no time with its offset, to the microsecond, such as 2019-01-05T00:00:00Z"
    if _COMMA.match(text[0].as_py().strip()):
        return "it has a decimal comma, or commas between thousands: write 1234.56"
    return "it is no number"
