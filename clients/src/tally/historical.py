"""Training sets: features of many points, each exactly as of its own instant.

Points are a pyarrow Table, a pandas DataFrame, or the path of a CSV or Parquet file, with the columns
of the contract's HistoricalHeader: `card` or `card_id`, `event_time`, request columns, and whatever
else is to be passed through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tally.errors import CorruptedError
from tally.v1 import feature_service_pb2 as pb

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Points: TypeAlias = "pa.Table | pd.DataFrame | str | Path"

BATCH_ROWS_MAX = 65_536
BATCH_BYTES_MAX = 3 << 20
"""The contract takes 4 MiB in a batch; this leaves room for what frames it."""
READ_ROWS = 65_536


def batches_of(points: Points) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema of points, and their rows in batches that the contract takes.

    Raises:
        ValueError: a file that is neither CSV nor Parquet.
        OSError: it cannot be read.
    """
    import pyarrow as pa

    if isinstance(points, str | Path):
        schema, batches = _read(Path(points))
    else:
        table = (
            points
            if isinstance(points, pa.Table)
            else pa.Table.from_pandas(points, preserve_index=False)
        )
        schema, batches = table.schema, iter(table.to_batches(BATCH_ROWS_MAX))
    plain = pa.schema([_plain(field) for field in schema])
    return plain, (part for batch in batches for part in _cut(batch.cast(plain)))


def _plain(field: pa.Field) -> pa.Field:
    """The field without a dictionary, which the contract does not take, and without metadata."""
    import pyarrow as pa

    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    return pa.field(field.name, kind, field.nullable)


def _read(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    import pyarrow as pa
    import pyarrow.csv as csv
    import pyarrow.parquet as pq

    match path.suffix.lower():
        case ".parquet":
            file = pq.ParquetFile(path)
            return file.schema_arrow, file.iter_batches(READ_ROWS)
        case ".csv":
            # A card number is text: as a number it loses digits.
            text = {"card": pa.string(), "transaction_id": pa.string()}
            times = {"event_time": pa.timestamp("us", "UTC")}
            options = csv.ConvertOptions(column_types=text | times)
            reader = csv.open_csv(path, convert_options=options)
            return reader.schema, iter(reader)
    raise ValueError(f"{path}: points are read from .csv and .parquet")


def _cut(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Parts of a batch, none of more rows or bytes than the contract takes."""
    if not len(batch):
        return
    if len(batch) > 1 and (len(batch) > BATCH_ROWS_MAX or batch.nbytes > BATCH_BYTES_MAX):
        half = len(batch) // 2
        yield from _cut(batch.slice(0, half))
        yield from _cut(batch.slice(half))
    else:
        yield batch


def requests(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch], features: Sequence[str]
) -> Iterator[pb.GetHistoricalFeaturesRequest]:
    """The messages of a call."""
    header = pb.HistoricalHeader(schema=schema.serialize().to_pybytes(), features=features)
    yield pb.GetHistoricalFeaturesRequest(header=header)
    for batch in batches:
        yield pb.GetHistoricalFeaturesRequest(points=batch.serialize().to_pybytes())


class Answers:
    """The answers to a call, in the order of its points: iterate over record batches."""

    def __init__(self, responses: Iterator[pb.GetHistoricalFeaturesResponse]) -> None:
        """Waits for the header.

        Raises:
            TallyError: the call is refused.
        """
        import pyarrow as pa

        self._responses = responses
        header = next(responses).header
        metadata = {
            "tally.catalog_fingerprint": header.catalog_fingerprint,
            "tally.complete_through_ms": str(header.complete_through_ms),
        }
        plain = pa.ipc.read_schema(pa.py_buffer(header.schema))
        self._plain = plain
        self.schema: pa.Schema = plain.with_metadata(metadata)
        """Of all batches; its metadata say which definitions the values follow, and through which
        instant the store is complete."""

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        import google_crc32c
        import pyarrow as pa

        for number, response in enumerate(self._responses):
            data = response.batch.data
            if google_crc32c.value(data) != response.batch.crc32c:
                raise CorruptedError(
                    f"batch {number} of the answer was damaged on its way: ask again"
                )
            yield pa.ipc.read_record_batch(pa.py_buffer(data), self._plain)


def in_order_of_cards(table: pa.Table) -> tuple[pa.Table, Any]:
    """A table's rows by card and time, and where each of its rows has gone to.

    The server reads each card's history once when a card's points follow one another.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    name = "card" if "card" in table.schema.names else "card_id"
    if len(table) <= BATCH_ROWS_MAX or name not in table.schema.names:
        return table, None
    codes = pc.dictionary_encode(table[name]).combine_chunks()
    codes = codes.chunk(0) if isinstance(codes, pa.ChunkedArray) else codes
    numbers = pc.fill_null(codes.indices, -1).to_numpy(False)
    order = np.argsort(numbers, kind="stable")
    back = np.empty(len(order), dtype=np.int64)
    back[order] = np.arange(len(order))
    return table.take(pa.array(order)), pa.array(back)
