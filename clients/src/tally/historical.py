"""Training sets: features of many points, each exactly as of its own instant.

Points are a pyarrow Table, a pandas DataFrame, or the path of a CSV or Parquet file, with the columns
of the contract's HistoricalHeader: `card` or `card_id`, `event_time`, request columns, and whatever
else is to be passed through. Columns come back as they came, but for these: dictionaries and categories,
string and binary views, and run-end encoded columns come back plain, and columns of CSV that mean nothing
here as text.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tally import taking
from tally.errors import CorruptedError, InvalidRequestError
from tally.instants import Instant, TimeRange, to_timestamp
from tally.ordering import BATCH_ROWS, Ordering, placing
from tally.point_files import meant_type, read_points
from tally.sources import parse_separator
from tally.v1 import feature_service_pb2 as pb

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Points: TypeAlias = "pa.Table | pa.RecordBatch | pa.RecordBatchReader | pd.DataFrame | str | Path"

_ROWS = "a pyarrow Table, a pandas DataFrame, or the path of a CSV or Parquet file"


def batches_of(points: Points, separator: str = ",") -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema of points, and their rows in batches that the contract takes.

    Args:
        points: rows in memory, also of another library that has Arrow's C stream interface; or a path, as
            tally.sources.find takes it.
        separator: of columns, where that is CSV.

    Raises:
        TypeError: points of another kind, or a frame with a column of mixed types.
        SourceError: a file that is neither CSV nor Parquet, or damaged.
        OSError: it cannot be read.
    """
    import pyarrow as pa

    schema, batches = (
        read_points(points, parse_separator(separator))
        if isinstance(points, str | Path)
        else _in_memory(points)
    )
    plain = pa.schema([pa.field(f.name, _plain(f.type), f.nullable) for f in schema])
    return plain, (_as_plain(batch, plain) for batch in batches)


def _in_memory(points: Any) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    import pyarrow as pa

    if isinstance(points, pa.RecordBatchReader):
        return points.schema, iter(points)
    table = _table(points)
    if not len(table):
        table = _typed_nothing(table)
    return table.schema, iter(table.to_batches(BATCH_ROWS))


def _table(points: Any) -> pa.Table:
    import pyarrow as pa

    if isinstance(points, pa.Table):
        return points
    if isinstance(points, pa.RecordBatch):
        return pa.Table.from_batches([points])
    try:
        if isinstance(points, getattr(sys.modules.get("pandas"), "DataFrame", ())):
            return pa.Table.from_pandas(points, preserve_index=False)
        if hasattr(points, "__arrow_c_stream__"):
            return pa.table(points)
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        where = [str(part) for part in error.args if str(part).startswith("Conversion failed")]
        raise TypeError(
            f"points has a column of more than one type: {'; '.join(where) or error}"
        ) from None
    raise TypeError(f"points takes {_ROWS}, not {type(points).__name__}")


def _typed_nothing(table: pa.Table) -> pa.Table:
    """A table without rows, whose columns have the types that they mean: a frame without rows has others."""
    import pyarrow as pa

    for i, name in enumerate(table.schema.names):
        kind = pa.binary() if name == "card_id" else meant_type(name)
        if kind is not None:
            table = table.set_column(i, pa.field(name, kind), pa.array([], kind))
    return table


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries, which the contract does not take, and without views and runs, which
    cannot be put in another order."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _plain(kind.value_type)
    if types.is_string_view(kind):
        return pa.string()
    if types.is_binary_view(kind):
        return pa.binary()
    if types.is_struct(kind):
        return pa.struct([pa.field(f.name, _plain(f.type), f.nullable) for f in kind.fields])
    if types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field), kind.list_size)
    if types.is_large_list(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if types.is_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    return kind


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(_plain(field.type))


def _as_plain(batch: pa.RecordBatch, plain: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = []
    for column, kind in zip(batch.columns, plain.types, strict=True):
        if pa.types.is_run_end_encoded(column.type):
            column = pc.run_end_decode(column)
        columns.append(column if column.type == kind else column.cast(kind))
    return pa.RecordBatch.from_arrays(columns, schema=plain)


@dataclass
class Question:
    """A call for features of points, or of the transactions of a range."""

    header: pb.HistoricalHeader
    ordering: Ordering | None
    """Of points."""
    failure: Exception | None = None
    """Why points could not be read to their end. What could be read is answered all the same."""
    _is_over: bool = False
    _busy: threading.Lock = field(default_factory=threading.Lock)
    """Held while a message is made."""

    @classmethod
    def about(
        cls,
        asked: Points | TimeRange,
        features: Sequence[str],
        labels_as_of: Instant | None,
        rows_together: int,
        separator: str = ",",
    ) -> Question:
        """Looks at what is asked.

        Args:
            asked: the points, or the range.
            features: names; none for the whole catalogue.
            labels_as_of: add labels as they were known then.
            rows_together: as for Ordering.
            separator: of columns, where points are of CSV.

        Raises:
            TypeError, ValueError, OSError: as `batches_of`.
        """
        header = pb.HistoricalHeader(features=taking.names("features", features))
        if labels_as_of is not None:
            header.labels_as_of.CopyFrom(to_timestamp(labels_as_of, "labels_as_of"))
        if isinstance(asked, TimeRange):
            header.transactions.CopyFrom(asked.to_message())
            return cls(header, None)
        schema, batches = batches_of(asked, separator)
        header.schema = schema.serialize().to_pybytes()
        return cls(header, Ordering(schema, batches, rows_together))

    def messages(self) -> Iterator[pb.GetHistoricalFeaturesRequest]:
        """What is sent, once."""
        yield pb.GetHistoricalFeaturesRequest(header=self.header)
        if self.ordering is not None:
            batches = self.ordering.sent()
            while (message := self._next(batches)) is not None:
                yield message

    def _next(self, batches: Iterator[pa.RecordBatch]) -> pb.GetHistoricalFeaturesRequest | None:
        with self._busy:
            try:
                batch = None if self._is_over else next(batches, None)
                if batch is None:
                    return None
                return pb.GetHistoricalFeaturesRequest(points=batch.serialize().to_pybytes())
            except Exception as error:  # noqa: BLE001 (whatever it is, `finish` raises it)
                # The library that asks for messages, in a thread of its own, would hide what it is.
                self.failure = error
                return None

    def close(self) -> None:
        """No more messages are made, and none is being made: a thread that is in Arrow's code when the
        process ends takes it down."""
        self._is_over = True
        with self._busy:
            pass

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Has errors name the rows of the points, and not of the messages."""
        try:
            yield
        except InvalidRequestError as error:
            if self.ordering is None:
                raise
            raise self.ordering.of_points(error) from error.__cause__

    async def messages_later(self) -> AsyncIterator[pb.GetHistoricalFeaturesRequest]:
        """The same on an event loop, which does not wait while points are read and put in order."""
        messages = self.messages()
        while (message := await asyncio.to_thread(next, messages, None)) is not None:
            yield message

    def finish(self) -> None:
        """To be called behind the last answer.

        Raises:
            CorruptedError: there are points without one.
            Exception: `failure`.
        """
        if self.failure is not None:
            raise self.failure
        if self.ordering is not None and self.ordering.unanswered:
            raise CorruptedError("the answer ended before its last point: ask again")


class _Reader:
    """From messages to record batches."""

    def __init__(self, header: pb.HistoricalResponseHeader) -> None:
        import pyarrow as pa

        metadata = {
            "tally.catalog_fingerprint": header.catalog_fingerprint,
            "tally.complete_through_ms": str(header.complete_through_ms),
        }
        self._plain = pa.ipc.read_schema(pa.py_buffer(header.schema))
        self.schema: pa.Schema = self._plain.with_metadata(metadata)
        self._read = 0

    def batch(self, message: pb.ArrowBatch) -> pa.RecordBatch:
        """The rows of the next batch.

        Raises:
            CorruptedError: they are not what was sent.
        """
        number, self._read = self._read, self._read + 1
        return read_batch(message, self._plain, number)


def read_batch(message: pb.ArrowBatch, schema: pa.Schema, number: int) -> pa.RecordBatch:
    """The rows of a batch, the `number`th of its answer.

    Raises:
        CorruptedError: they are not what was sent.
    """
    import google_crc32c
    import pyarrow as pa

    data = message.data
    if google_crc32c.value(data) != message.crc32c:
        raise CorruptedError(f"batch {number} of the answer was damaged on its way: ask again")
    rows = pa.ipc.read_record_batch(pa.py_buffer(data), schema)
    if len(rows) != message.row_count:
        raise CorruptedError(f"batch {number} has {len(rows)} rows, not {message.row_count}")
    return rows


def _listed(
    place: Callable[[pa.RecordBatch], Iterator[pa.RecordBatch]], batch: pa.RecordBatch
) -> list[pa.RecordBatch]:
    return list(place(batch))


# Not methods of what has them: an answer that nobody wants any more is to end at once, and not when cycles
# of references are looked for.


def _in_their_order(
    question: Question, responses: Iterator[pb.GetHistoricalFeaturesResponse], reader: _Reader
) -> Iterator[pa.RecordBatch]:
    place = placing(question.ordering, reader.schema)
    try:
        with question.errors():
            for response in responses:
                yield from place(reader.batch(response.batch))
    finally:
        question.close()
    question.finish()


async def _in_their_order_later(
    question: Question, responses: AsyncIterator[pb.GetHistoricalFeaturesResponse], reader: _Reader
) -> AsyncIterator[pa.RecordBatch]:
    place = placing(question.ordering, reader.schema)
    try:
        with question.errors():
            async for response in responses:
                batch = reader.batch(response.batch)
                for placed in await asyncio.to_thread(_listed, place, batch):
                    yield placed
    finally:
        await asyncio.to_thread(question.close)
    question.finish()


class Answers:
    """The answers to a call, in the order of its points: iterate over record batches."""

    def __init__(
        self, question: Question, responses: Iterator[pb.GetHistoricalFeaturesResponse]
    ) -> None:
        """Waits for the header.

        Raises:
            TallyError: the call is refused.
        """
        try:
            with question.errors():
                reader = _Reader(next(responses).header)
        except BaseException:
            question.close()
            raise
        self.schema: pa.Schema = reader.schema
        """Of all batches; its metadata say which definitions the values follow, and through which
        instant the store is complete."""
        self._rest = _in_their_order(question, responses, reader)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """What has not been taken yet."""
        return self._rest


class AsyncAnswers:
    """The same, for `async for`."""

    def __init__(
        self,
        question: Question,
        responses: AsyncIterator[pb.GetHistoricalFeaturesResponse],
        header: pb.HistoricalResponseHeader,
    ) -> None:
        reader = _Reader(header)
        self.schema: pa.Schema = reader.schema
        """As that of Answers."""
        self._rest = _in_their_order_later(question, responses, reader)

    def __aiter__(self) -> AsyncIterator[pa.RecordBatch]:
        """What has not been taken yet."""
        return self._rest
