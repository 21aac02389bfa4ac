"""The order in which points are sent, and how their answers come back to the order in which they were.

The server reads a card's history once where the card's points follow one another, and again where they
come again later. Points as they happened, by time, would have it read everything for each batch: so they
are put in order by card, ROWS_TOGETHER at a time.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tally.errors import CorruptedError, InvalidRequestError, Violation

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

ROWS_TOGETHER = 500_000
"""Their answers take about 300 MB where all features are asked for; the points themselves, and columns that
are passed through, come to that twice."""
BYTES_TOGETHER = 1 << 30
"""Points of more bytes are not put in order together: a column of texts holds 2 GiB at the most."""
BATCH_ROWS = 16_384
"""The contract takes 65,536; what is smaller is answered while the next is on its way."""
BATCH_BYTES_MAX = 3 << 20
"""The contract takes 4 MiB in a batch; this leaves room for what frames it."""
STATUSES = "statuses"
"""The column of an answer that has a status for each feature."""
_FIELD = re.compile(r"points\[(\d+)\]\.(.+)\[(\d+)\]")
"""A value, as the server names it: number of the message, column, row."""


@dataclass
class _Part:
    """Points that were put in order together. Its messages are added by whoever sends, at any time."""

    first_row: int
    """Of all points, the number of its first."""
    n_rows: int
    places: npt.NDArray[np.int64] | None
    """(n_rows,): where in the part each row is that was sent; None where they are in order."""
    first_message: int
    begins: list[int] = field(default_factory=list)
    """Of each message that was sent, its first row in the order of what is sent."""

    def row(self, message: int, row: int) -> int | None:
        """Of all points, the number of the one that is this row of a message; None where the message is
        not of this part."""
        number = message - self.first_message
        if not 0 <= number < len(self.begins):
            return None
        sent = self.begins[number] + row
        return self.first_row + (sent if self.places is None else int(self.places[sent]))


class Ordering:
    """The points of one call on their way to the server. One thread may send while another places."""

    def __init__(
        self, schema: pa.Schema, batches: Iterator[pa.RecordBatch], rows_together: int
    ) -> None:
        """Takes points.

        Args:
            schema: of all batches.
            batches: the points.
            rows_together: how many are put in order together, about.
        """
        self._schema, self._batches, self._rows_together = schema, batches, rows_together
        self.unanswered: deque[_Part] = deque()
        """What was sent, or is about to be, and is not wholly answered yet. The one thread adds to its
        end, the other takes from its beginning."""
        self._n_rows = self._n_messages = 0

    def sent(self) -> Iterator[pa.RecordBatch]:
        """The points as they are sent, in batches that the contract takes; what cannot be read ends
        them behind all that could be."""
        held: list[pa.RecordBatch] = []
        n_held = n_bytes = 0
        failure: Exception | None = None
        try:
            for batch in self._batches:
                held.append(batch)
                n_held += len(batch)
                n_bytes += batch.nbytes
                if n_held >= self._rows_together or n_bytes >= BYTES_TOGETHER:
                    yield from self._part(held)
                    n_held = n_bytes = 0
        except Exception as error:  # noqa: BLE001 (whatever it is, it is raised below)
            failure = error
        yield from self._part(held)
        if failure is not None:
            raise failure

    def _part(self, held: list[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Sends what is held, and holds it no longer."""
        import pyarrow as pa

        table, places = in_order_of_cards(pa.Table.from_batches(held, self._schema))
        held.clear()
        if not len(table):
            return
        part = _Part(self._n_rows, len(table), places, self._n_messages)
        self._n_rows += len(table)
        self.unanswered.append(part)
        begin = 0
        for batch in table.to_batches(BATCH_ROWS):
            for piece in _cut(batch):
                part.begins.append(begin)
                self._n_messages += 1
                begin += len(piece)
                yield piece

    def of_points(self, error: InvalidRequestError) -> InvalidRequestError:
        """A refusal that names values by column and row of the points, counted from 0: card[7]."""
        message, told = str(error), []
        for violation in error.violations:
            name = self._named(violation.field)
            message = message.replace(violation.field, name)
            told.append(Violation(name, violation.description))
        return InvalidRequestError(
            message,
            code=error.code,
            reason=error.reason,
            metadata=error.metadata,
            violations=tuple(told),
            retry_after_ms=error.retry_after_ms,
        )

    def _named(self, path: str) -> str:
        found = _FIELD.fullmatch(path)
        if found is None:
            return path
        for part in tuple(self.unanswered):
            row = part.row(int(found[1]), int(found[3]))
            if row is not None:
                return f"{found[2]}[{row}]"
        return path


def _cut(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Parts of a batch, none of more bytes than the contract takes."""
    if len(batch) > 1 and batch.nbytes > BATCH_BYTES_MAX:
        half = len(batch) // 2
        yield from _cut(batch.slice(0, half))
        yield from _cut(batch.slice(half))
    elif len(batch):
        yield batch


def in_order_of_cards(table: pa.Table) -> tuple[pa.Table, npt.NDArray[np.int64] | None]:
    """A table's rows by card, and where in the table each of these is; None where they are as they
    were, since they are few, or in order, or of a kind that the library cannot put in another."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    name = "card" if "card" in table.schema.names else "card_id"
    if len(table) <= BATCH_ROWS or name not in table.schema.names:
        return table, None
    try:
        codes = pc.dictionary_encode(table[name]).combine_chunks()
    except pa.ArrowNotImplementedError:  # no card: the server says so
        return table, None
    codes = codes.chunk(0) if isinstance(codes, pa.ChunkedArray) else codes
    numbers = pc.fill_null(codes.indices, -1).to_numpy(False)
    if (numbers[1:] >= numbers[:-1]).all():
        return table, None
    order = np.argsort(numbers, kind="stable")
    try:
        return table.take(pa.array(order)), order
    except pa.ArrowNotImplementedError:
        return table, None


def placing(
    ordering: Ordering | None, schema: pa.Schema
) -> Callable[[pa.RecordBatch], Iterator[pa.RecordBatch]]:
    """What is to be called with each batch of answers, and returns those whose turn it is. It raises
    CorruptedError where there are more answers than points.

    Args:
        ordering: of the points; None for what comes in its order.
        schema: of the answers.
    """
    if ordering is None:
        return lambda batch: iter([batch])
    placed: _Placed | None = None

    def place(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        nonlocal placed
        while len(batch):
            if not ordering.unanswered:
                raise CorruptedError("there are more answers than points: ask again")
            part = ordering.unanswered[0]
            placed = placed or _Placed(part, schema)
            rest = part.n_rows - placed.n_rows
            yield from placed.add(batch.slice(0, rest))
            batch = batch.slice(rest)
            if placed.n_rows == part.n_rows:
                ordering.unanswered.popleft()
                whole, placed = placed, None
                yield from whole.rows()

    return place


class _Placed:
    """The answers to a part. Each is put where it belongs as it comes: what is waited for is computed
    meanwhile."""

    def __init__(self, part: _Part, schema: pa.Schema) -> None:
        import numpy as np
        import pyarrow as pa

        self.n_rows = 0
        self._places, self._schema = part.places, schema
        self._numbers: dict[int, npt.NDArray[np.generic]] = {}
        if part.places is None:
            return
        self._statuses = schema.get_field_index(STATUSES)
        self._numbers = {
            i: np.empty(part.n_rows, field.type.to_pandas_dtype())
            for i, field in enumerate(schema)
            if pa.types.is_floating(field.type) and not field.nullable
        }
        shape = part.n_rows, schema.types[self._statuses].list_size
        self._numbers[self._statuses] = np.empty(shape, np.uint8)
        self._others: dict[int, list[pa.Array]] = {
            i: [] for i in range(len(schema)) if i not in self._numbers
        }

    def add(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """Takes the next answers; yields them at once where they are in order."""
        begin, self.n_rows = self.n_rows, self.n_rows + len(batch)
        if self._places is None:
            yield batch
            return
        there = self._places[begin : self.n_rows]
        for i, values in self._numbers.items():
            column = batch.column(i)
            flat = column.flatten() if i == self._statuses else column
            values[there] = flat.to_numpy().reshape(len(batch), *values.shape[1:])
        for i, parts in self._others.items():
            parts.append(batch.column(i))

    def rows(self) -> Iterator[pa.RecordBatch]:
        """All answers of the part, once they are there; none where they were in order."""
        import numpy as np
        import pyarrow as pa

        if self._places is None:
            return
        back = np.empty(self.n_rows, dtype=np.int64)
        back[self._places] = np.arange(self.n_rows)
        columns = []
        for i, kind in enumerate(self._schema.types):
            if i == self._statuses:
                flat = pa.array(self._numbers[i].reshape(-1))
                columns.append(pa.FixedSizeListArray.from_arrays(flat, type=kind))
            elif i in self._numbers:
                columns.append(pa.array(self._numbers[i]))
            else:
                columns.append(pa.chunked_array(self._others[i], kind).take(pa.array(back)))
        yield from pa.table(columns, schema=self._schema).to_batches(BATCH_ROWS)
