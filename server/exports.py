"""Export: tables as one snapshot saw them, batch by batch, each with a cursor that leads on.

    Postgres ──▶ rows ──▶ message ──▶ caller
             (thread)   (thread)   (event loop)

Nothing of an export is kept here: what a cursor says, and the export's row in Postgres, are enough for
any worker to go on. A cursor is sealed under the card key, so that only what was sent is accepted.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from functools import partial

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from tally.v1 import feature_service_pb2 as pb

from features import CATALOG_FINGERPRINT, CardKey
from features.keys import CARD_ID_BYTES
from server.batches import arrow_batch, nested, parse_range
from server.errors import CallError, Violation, invalid
from server.interceptors import Context
from server.online import OnlineAnswers
from server.points import malformed
from server.response import field
from server.settings import CARDS_MAX
from server.threads import a_step_ahead, in_thread, threaded
from stores.conditions import Range
from stores.exports import Export, ExportExpiredError, Exports, Kind, Position

BATCH_ROWS_DEFAULT = 16_384
BATCH_ROWS_MAX = 65_536
BATCHES_AHEAD = 4
"""Batches that are read before they are sent."""

_KINDS = {
    pb.EXPORT_KIND_TRANSACTIONS: Kind.TRANSACTIONS,
    pb.EXPORT_KIND_LABELS: Kind.LABELS,
    pb.EXPORT_KIND_FEATURES: Kind.FEATURES,
    pb.EXPORT_KIND_LEDGERS: Kind.LEDGERS,
}
_CURSOR = struct.Struct("<B8sIQQQQ")
"""Version, export id, part, place (two halves), rows of the piece, rows of the export."""
_CURSOR_VERSION = 1
_SEAL_BYTES = 16
_HALF = 1 << 64


class CursorSealer:
    """Writes and reads cursors."""

    def __init__(self, card_key: CardKey) -> None:
        self._key = card_key.derive("export cursors")

    def seal(self, export_id: str, position: Position) -> bytes:
        """The cursor behind a position."""
        upper, lower = divmod(position.at, _HALF)
        body = _CURSOR.pack(
            *(_CURSOR_VERSION, bytes.fromhex(export_id), position.part, upper, lower),
            *(position.skip, position.rows),
        )
        return body + self._seal(body)

    def open(self, cursor: bytes) -> tuple[str, Position]:
        """The export's id and the position that a cursor names.

        Raises:
            CallError: MALFORMED_PAYLOAD: it is none of ours.
        """
        body, seal = cursor[:-_SEAL_BYTES], cursor[-_SEAL_BYTES:]
        if len(body) != _CURSOR.size or not hmac.compare_digest(seal, self._seal(body)):
            raise malformed("cursor", "it is no cursor of this installation")
        version, export_id, part, upper, lower, skip, rows = _CURSOR.unpack(body)
        if version != _CURSOR_VERSION:
            raise malformed("cursor", "it is a cursor of another version: begin a new export")
        return export_id.hex(), Position(part, upper * _HALF + lower, skip, rows)

    def _seal(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, "sha256")[:_SEAL_BYTES]


class ExportAnswers:
    """Serves calls."""

    def __init__(self, postgres_url: str, card_key: CardKey, online: OnlineAnswers) -> None:
        self._url = postgres_url
        self._cursors = CursorSealer(card_key)
        self._online = online

    async def serve(self, request: pb.ExportRequest, context: Context) -> AsyncIterator[bytes]:
        """One call, from the header to the summary: messages on the wire.

        Raises:
            CallError: the caller is at fault, or the export has expired.
            StoreError: Postgres does not answer.
        """
        through_ms = -1
        if request.WhichOneof("begin") == "spec":
            progress = await self._online.read_progress()
            through_ms = progress.complete_through_ms if progress else -1
        exports = await in_thread(lambda: Exports(self._url))
        try:
            export, position = await in_thread(partial(self._open, exports, request, through_ms))
            spec = pb.ExportSpec.FromString(export.spec)
            yield _header(export)
            found = threaded(exports.read(export, position, _batch_rows(spec)), BATCHES_AHEAD)
            messages = a_step_ahead(self._messages(export, spec, found, position))
            async with aclosing(messages):
                async for message in messages:
                    yield message
        except ExportExpiredError as error:
            raise CallError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "CURSOR_EXPIRED",
                str(error),
                metadata={"snapshot": error.export_id},
            ) from None
        finally:
            await in_thread(exports.close)

    def _open(
        self, exports: Exports, request: pb.ExportRequest, through_ms: int
    ) -> tuple[Export, Position]:
        """Begins an export, or takes one up."""
        if request.WhichOneof("begin") == "spec":
            spec = request.spec
            kind, within, card_ids = _selection(spec)
            stored = spec.SerializeToString(deterministic=True)
            return exports.begin(kind, within, card_ids, stored, through_ms), Position()
        export_id, position = self._cursors.open(request.cursor)
        spec = pb.ExportSpec.FromString(exports.spec_of(export_id))
        return exports.resume(export_id, *_selection(spec)), position

    async def _messages(
        self,
        export: Export,
        spec: pb.ExportSpec,
        found: AsyncGenerator[tuple[object, Position], None],
        position: Position,
    ) -> AsyncGenerator[bytes, None]:
        zstd = spec.compression == pb.EXPORT_COMPRESSION_ZSTD
        rows = position.rows
        async with aclosing(found):
            async for batch, behind in found:
                rows = behind.rows
                yield await in_thread(partial(self._message, export, batch, behind, zstd))
        summary = pb.ExportSummary(row_count=rows)
        yield pb.ExportResponse(summary=summary).SerializeToString()

    def _message(self, export: Export, batch: object, behind: Position, zstd: bool) -> bytes:
        content = [
            *nested(pb.ExportBatch.BATCH_FIELD_NUMBER, arrow_batch(batch, zstd=zstd)),
            field(pb.ExportBatch.CURSOR_FIELD_NUMBER, self._cursors.seal(export.export_id, behind)),
        ]
        return b"".join(nested(pb.ExportResponse.BATCH_FIELD_NUMBER, content))


def _header(export: Export) -> bytes:
    expire_time = Timestamp()
    expire_time.FromDatetime(export.expires_at)
    header = pb.ExportHeader(
        schema=export.schema.serialize().to_pybytes(),
        snapshot=export.export_id,
        catalog_fingerprint=CATALOG_FINGERPRINT,
        complete_through_ms=export.complete_through_ms,
        expire_time=expire_time,
    )
    return pb.ExportResponse(header=header).SerializeToString()


def _batch_rows(spec: pb.ExportSpec) -> int:
    return spec.batch_rows if spec.HasField("batch_rows") else BATCH_ROWS_DEFAULT


def _selection(spec: pb.ExportSpec) -> tuple[Kind, Range, tuple[bytes, ...]]:
    within = parse_range(spec.event_time, "spec.event_time")
    return _KINDS[spec.kind], within, tuple(sorted(set(spec.card_ids)))


def validate_export(request: pb.ExportRequest) -> pb.ExportRequest:
    """The request, which keeps the rules of the contract.

    Raises:
        CallError: INVALID_REQUEST, with every field at fault.
    """
    match request.WhichOneof("begin"):
        case "spec":
            _validate(request.spec)
        case None:
            raise invalid([Violation("begin", "must be given: spec or cursor")])
    return request


def _validate(spec: pb.ExportSpec) -> None:
    violations = []
    if spec.kind not in _KINDS:
        violations.append(Violation("spec.kind", "must be one of the kinds"))
    if spec.compression not in pb.ExportCompression.values():
        violations.append(Violation("spec.compression", "must be one of the compressions"))
    if not 1 <= _batch_rows(spec) <= BATCH_ROWS_MAX:
        violations.append(Violation("spec.batch_rows", f"must be 1 to {BATCH_ROWS_MAX:,}"))
    if len(spec.card_ids) > CARDS_MAX:
        rule = f"must have at most {CARDS_MAX:,} ids; it has {len(spec.card_ids):,}"
        violations.append(Violation("spec.card_ids", rule))
    violations += [
        Violation(f"spec.card_ids[{i}]", f"must be {CARD_ID_BYTES} bytes")
        for i, card_id in enumerate(spec.card_ids)
        if len(card_id) != CARD_ID_BYTES
    ]
    if violations:
        raise invalid(violations)
    parse_range(spec.event_time, "spec.event_time")
