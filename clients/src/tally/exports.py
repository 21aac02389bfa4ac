"""Exports: everything of a kind as one snapshot saw it, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC
from typing import TYPE_CHECKING, Literal

from tally import taking
from tally.errors import CorruptedError
from tally.historical import read_batch
from tally.instants import TimeRange
from tally.v1 import feature_service_pb2 as pb

if TYPE_CHECKING:
    import pyarrow as pa

What = Literal["transactions", "labels", "features", "ledgers"]

_KINDS: dict[str, pb.ExportKind.ValueType] = {
    "transactions": pb.EXPORT_KIND_TRANSACTIONS,
    "labels": pb.EXPORT_KIND_LABELS,
    "features": pb.EXPORT_KIND_FEATURES,
    "ledgers": pb.EXPORT_KIND_LEDGERS,
}


def export_request(
    what: What,
    event_time: TimeRange | None = None,
    card_ids: Sequence[bytes] = (),
    *,
    zstd: bool = False,
    batch_rows: int | None = None,
) -> pb.ExportRequest:
    """The request for a new export; `batch_rows` bounds what comes together, 16,384 by default.

    Raises:
        TypeError: an argument of another type.
        ValueError: no such kind.
    """
    if what not in _KINDS:
        raise ValueError(f"what is one of {', '.join(_KINDS)}, not {what!r}")
    if not isinstance(event_time, TimeRange | None):
        raise taking.refused("event_time", "a tally.TimeRange", event_time)
    spec = pb.ExportSpec(
        kind=_KINDS[what],
        event_time=None if event_time is None else event_time.to_message(),
        card_ids=taking.card_ids(card_ids),
        compression=pb.EXPORT_COMPRESSION_ZSTD if zstd else pb.EXPORT_COMPRESSION_UNSPECIFIED,
        batch_rows=batch_rows,
    )
    return pb.ExportRequest(spec=spec)


class Export:
    """One call's rows: iterate over (record batch, cursor behind it)."""

    def __init__(self, responses: Iterator[pb.ExportResponse]) -> None:
        """Waits for the header.

        Raises:
            TallyError: the call is refused, or the cursor has expired.
        """
        import pyarrow as pa

        self._responses = responses
        header = next(responses).header
        self.schema: pa.Schema = pa.ipc.read_schema(pa.py_buffer(header.schema))
        """Of all batches."""
        self.snapshot = header.snapshot
        """Names the snapshot: the same in every call of one export."""
        self.catalog_fingerprint = header.catalog_fingerprint
        """Of the definitions that features follow."""
        self.complete_through_ms = header.complete_through_ms
        """The instant through which the snapshot is complete; -1 where the store cannot say."""
        self.expire_time = header.expire_time.ToDatetime(tzinfo=UTC)
        """Until then a cursor can be gone on with, at least."""
        self.row_count: int | None = None
        """Rows of the whole export, once its end has come."""

    def __iter__(self) -> Iterator[tuple[pa.RecordBatch, bytes]]:
        for number, response in enumerate(self._responses):
            if response.WhichOneof("message") == "summary":
                self.row_count = response.summary.row_count
                return
            batch = response.batch
            yield read_batch(batch.batch, self.schema, number), batch.cursor
        raise CorruptedError("the export ended without its summary: go on with the last cursor")
