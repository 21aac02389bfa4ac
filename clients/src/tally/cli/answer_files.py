"""Answers to points written to a file as they come: Parquet, or CSV."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tally.ordering import STATUSES
from tally.results import status_name

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET, CSV = ".parquet", ".csv"


def check_ending(path: Path) -> None:
    """Refuses a file whose ending does not say how it is written.

    Raises:
        typer.BadParameter: it is neither of the two.
    """
    if path.suffix.lower() not in (PARQUET, CSV):
        raise typer.BadParameter(f"{path}: answers are written as {PARQUET} or {CSV}")


@contextmanager
def writer(
    path: Path, draft: Path, schema: pa.Schema
) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """Writes a draft in the format that the path's ending names; call what it gives with each batch.

    CSV has texts for what is none there: card ids and other bytes as hexadecimal digits, and in `statuses` the
    name of each feature's status, with a space between them. A value that is not there is an empty cell.

    Raises:
        typer.BadParameter: CSV, and a column that has no text, such as lists of the points' own.
    """
    import pyarrow.csv as pacsv
    import pyarrow.parquet as pq

    # Arrow opens no file whose name is no text: it gets an open one.
    if path.suffix.lower() == PARQUET:
        with (
            draft.open("wb") as file,
            pq.ParquetWriter(file, schema, compression="zstd") as parquet,
        ):
            yield parquet.write_batch
        return
    texts = _text_schema(schema, path)
    # A text that is empty is written as "", and one that is not there as nothing.
    with draft.open("wb") as file, pacsv.CSVWriter(file, texts) as lines:
        yield lambda batch: lines.write_batch(_as_text(batch, texts))


def _text_schema(schema: pa.Schema, path: Path) -> pa.Schema:
    import pyarrow as pa

    fields = []
    for field in schema:
        kind = field.type
        if field.name == STATUSES or _is_bytes(kind) or pa.types.is_decimal(kind):
            kind = pa.string()
        elif pa.types.is_nested(kind):
            raise typer.BadParameter(
                f"{path}: CSV cannot hold column {field.name} ({kind}): write {PARQUET}"
            )
        fields.append(pa.field(field.name, kind))
    return pa.schema(fields)


def _is_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _as_text(batch: pa.RecordBatch, texts: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa
    import pyarrow.compute as pc

    columns: list[Any] = []
    for name, column, kind in zip(batch.schema.names, batch.columns, texts.types, strict=True):
        if name == STATUSES:
            column = _statuses(column)
        elif _is_bytes(column.type):
            values = [None if value is None else value.hex() for value in column.to_pylist()]
            column = pa.array(values, pa.string())
        elif pa.types.is_floating(column.type):
            column = pc.if_else(pc.is_nan(column), None, column)
        columns.append(column.cast(kind))
    return pa.RecordBatch.from_arrays(columns, schema=texts)


def _statuses(column: pa.Array) -> pa.Array:
    import pyarrow as pa

    names = [status_name(status) for status in range(256)]
    rows = [" ".join(names[status] for status in row) for row in column.to_pylist()]
    return pa.array(rows, pa.string())
