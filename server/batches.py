"""What streams of Arrow batches have in common: a batch with its checksum, ranges of instants."""

from __future__ import annotations

import struct
from typing import Any

import google_crc32c
import pyarrow as pa
from google.protobuf.timestamp_pb2 import Timestamp
from tally.v1 import feature_service_pb2 as pb

from features.points import EVENT_TIME_MS_MAX
from server.errors import Violation, invalid
from server.query import TIME_RULE
from server.response import field_head
from stores.conditions import Range

Pieces = list[Any]
"""Parts of a message on the wire: bytes, or what can be read as bytes."""

_ZSTD = pa.ipc.IpcWriteOptions(compression="zstd")


def arrow_batch(rows: pa.RecordBatch, *, zstd: bool = False) -> Pieces:
    """Rows as an ArrowBatch on the wire. In pieces, which are joined once for a whole message: rows are
    megabytes, and message objects copy them three times more."""
    data = _compressed(rows) if zstd else rows.serialize()
    rest = pb.ArrowBatch(row_count=len(rows), crc32c=google_crc32c.value(data))
    return [*nested(pb.ArrowBatch.DATA_FIELD_NUMBER, [data]), rest.SerializeToString()]


def nested(number: int, content: Pieces) -> Pieces:
    """A field of this number with this content."""
    return [field_head(number, sum(map(len, content))), *content]


def _compressed(rows: pa.RecordBatch) -> pa.Buffer:
    """A record batch message with compressed buffers: the second of a stream, behind the schema."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema, options=_ZSTD) as writer:
        writer.write_batch(rows)
    messages = pa.ipc.MessageReader.open_stream(sink.getvalue())
    messages.read_next_message()
    return messages.read_next_message().serialize()


def is_compressed(message: bytes) -> bool:
    """Whether a record batch message has compressed buffers: a small one may be of any size then.

    By the layout of flatbuffers, and of Arrow's Message.fbs: field 2 of a Message is its header, of a
    RecordBatch field 3 is how it is compressed.

    Raises:
        pa.ArrowException: it is no message.
    """
    metadata = memoryview(pa.ipc.read_message(pa.py_buffer(message)).metadata)
    try:
        root = struct.unpack_from("<I", metadata)[0]
        header = _field(metadata, root, 2)
        if header is None:
            return False
        record_batch = header + struct.unpack_from("<I", metadata, header)[0]
        return _field(metadata, record_batch, 3) is not None
    except struct.error:
        raise pa.ArrowInvalid("its metadata are cut off") from None


def _field(metadata: memoryview, table: int, number: int) -> int | None:
    """Where a field of a flatbuffers table is; None where it is not there."""
    vtable = table - struct.unpack_from("<i", metadata, table)[0]
    size = struct.unpack_from("<H", metadata, vtable)[0]
    entry = 4 + 2 * number
    offset = struct.unpack_from("<H", metadata, vtable + entry)[0] if entry < size else 0
    return table + offset if offset else None


def parse_range(message: pb.TimeRange, field: str) -> Range:
    """A range of instants, its ends rounded up to the millisecond.

    Raises:
        CallError: INVALID_REQUEST.
    """
    start_ms, end_ms = (
        -(-parse_time_us(getattr(message, name), f"{field}.{name}") // 1000)
        if message.HasField(name)
        else None
        for name in ("start_time", "end_time")
    )
    if start_ms is not None and end_ms is not None and end_ms < start_ms:
        raise invalid([Violation(f"{field}.end_time", "must not be before start_time")])
    return start_ms, end_ms


def parse_time_us(time: Timestamp, field: str) -> int:
    """An instant in microseconds since 1970-01-01 UTC.

    Raises:
        CallError: it is not from 1970 to 2100.
    """
    if not (0 <= time.seconds <= EVENT_TIME_MS_MAX // 1000 and 0 <= time.nanos < 10**9):
        raise invalid([Violation(field, TIME_RULE)])
    return int(time.seconds * 1_000_000 + time.nanos // 1_000)
