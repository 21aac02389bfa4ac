"""GetHistoricalFeatures: streams of points, answered exactly as of each point's instant.

Points are answered in windows: whatever has arrived, up to WINDOW_ROWS. A window's cards are read from
one snapshot of Postgres, some at a time, so that memory is bounded however many rows a call has and
however long histories are. A caller who sends points in order of their cards has each card read once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import google_crc32c
import grpc
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tally.v1 import feature_service_pb2 as pb

from features import CATALOG_FINGERPRINT, CardKey, Feature, Points, as_of
from server.errors import CallError, Violation, invalid
from server.interceptors import Context, Unreadable
from server.online import OnlineAnswers
from server.points import PointsSchema, points, subjects
from server.query import parse_features
from stores.arrow import by_card
from stores.history import History

WINDOW_ROWS = 131_072
"""Points that are answered together: 44 features of them take 52 MB."""
QUEUED_BATCHES_MAX = 4
"""Batches that have arrived and wait; then the caller does."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """One batch of points."""

    rows: pa.RecordBatch
    card_ids: pa.Array
    points: Points


class HistoricalCall:
    """One call: its header, and from windows of batches to answers. Blocking; one thread at a time."""

    def __init__(self, header: pb.HistoricalHeader, card_key: CardKey) -> None:
        """Takes the header in.

        Raises:
            CallError: it breaks a rule of the contract, or asks for what is not served yet.
        """
        if header.WhichOneof("source") != "schema":
            raise _not_served("a range of transactions for points")
        if header.HasField("labels_as_of"):
            raise _not_served("labels")
        self.features: tuple[Feature, ...] = parse_features(tuple(header.features))
        self.schema = PointsSchema.parse(header.schema, self.features)
        self._card_key = card_key
        self._read = 0

    def read(self, data: bytes) -> _Batch:
        """Takes a batch of points in.

        Raises:
            CallError: it cannot be read, or rows break a rule of the contract.
        """
        number, self._read = self._read, self._read + 1
        rows = self.schema.read(data, number)
        return _Batch(rows, subjects(rows, number, self._card_key), points(rows, number))

    def answer(
        self, history: History, window: list[_Batch]
    ) -> list[pb.GetHistoricalFeaturesResponse]:
        """The answers to some batches, one to each.

        Raises:
            StoreError: Postgres does not answer.
        """
        numbers, cards = by_card(pa.chunked_array([b.card_ids.cast(pa.binary()) for b in window]))
        asked = Points(
            *(np.concatenate(c) for c in zip(*(b.points.columns for b in window), strict=True))
        )
        n = len(asked)
        values = np.empty((n, len(self.features)))
        statuses = np.empty((n, len(self.features)), np.uint8)
        known = np.empty(n, np.bool_)
        order = np.lexsort((asked.time_ms, numbers))
        bounds = np.searchsorted(numbers[order], np.arange(len(cards) + 1))
        for begin, end, ledgers, profiles in history.read(cards):
            rows = order[bounds[begin] : bounds[end]]
            part = asked.take(rows)
            part.card_index[:] = numbers[rows] - begin
            found = as_of(ledgers, part, self.features, profiles)
            values[rows], statuses[rows], known[rows] = found.values, found.statuses, found.known
        answers, at = [], 0
        for batch in window:
            here = slice(at, at + len(batch.rows))
            answers.append(self._message(batch, values[here], statuses[here], known[here]))
            at = here.stop
        return answers

    def _message(
        self,
        batch: _Batch,
        values: npt.NDArray[np.float64],
        statuses: npt.NDArray[np.uint8],
        known: npt.NDArray[np.bool_],
    ) -> pb.GetHistoricalFeaturesResponse:
        columns = [
            batch.card_ids if name == "card" else batch.rows.column(i)
            for i, name in enumerate(batch.rows.schema.names)
        ]
        by_feature = np.ascontiguousarray(values.T)
        columns += [pa.array(column) for column in by_feature]
        columns.append(
            pa.FixedSizeListArray.from_arrays(pa.array(statuses.reshape(-1)), len(self.features))
        )
        columns.append(pa.array(known))
        answer = pa.RecordBatch.from_arrays(columns, schema=self.schema.answers)
        data = answer.serialize().to_pybytes()
        return pb.GetHistoricalFeaturesResponse(
            batch=pb.ArrowBatch(data=data, row_count=len(answer), crc32c=google_crc32c.value(data))
        )


def _not_served(what: str) -> CallError:
    return CallError(
        grpc.StatusCode.UNIMPLEMENTED,
        "NOT_SERVED",
        f"GetHistoricalFeatures is served for points; {what} is specified, and not served yet",
        metadata={"method": "GetHistoricalFeatures"},
    )


class HistoricalAnswers:
    """Serves calls."""

    def __init__(self, postgres_url: str, card_key: CardKey, online: OnlineAnswers) -> None:
        self._url = postgres_url
        self._card_key = card_key
        self._online = online

    async def serve(
        self, requests: AsyncIterator[Any], context: Context
    ) -> AsyncIterator[pb.GetHistoricalFeaturesResponse]:
        """One call, from its header to the answer to its last batch.

        Raises:
            CallError: the caller is at fault.
            StoreError: Postgres does not answer.
        """
        call = HistoricalCall(await _header(requests), self._card_key)
        progress = await self._online.read_progress()
        history = await asyncio.to_thread(History, self._url)
        queue: asyncio.Queue[_Batch | Exception | None] = asyncio.Queue(QUEUED_BATCHES_MAX)
        reader = asyncio.create_task(_take_in(requests, call, queue))
        under_way: asyncio.Task[list[pb.GetHistoricalFeaturesResponse]] | None = None
        try:
            yield pb.GetHistoricalFeaturesResponse(
                header=pb.HistoricalResponseHeader(
                    schema=call.schema.answers.serialize().to_pybytes(),
                    catalog_fingerprint=CATALOG_FINGERPRINT,
                    complete_through_ms=progress.complete_through_ms if progress else -1,
                )
            )
            async for window in _windows(queue):
                under_way = asyncio.create_task(asyncio.to_thread(call.answer, history, window))
                for response in await asyncio.shield(under_way):
                    yield response
        finally:
            reader.cancel()
            # A caller may be gone while a thread still reads: it ends before its connection does.
            await asyncio.wait({reader, *({under_way} if under_way else ())})
            await asyncio.to_thread(history.close)


async def _header(requests: AsyncIterator[Any]) -> pb.HistoricalHeader:
    request = await anext(requests, None)
    if isinstance(request, Unreadable):
        raise request.error
    if request is None or request.WhichOneof("message") != "header":
        raise invalid([Violation("header", "must be the first message of the stream")])
    header: pb.HistoricalHeader = request.header
    return header


async def _take_in(
    requests: AsyncIterator[Any],
    call: HistoricalCall,
    queue: asyncio.Queue[_Batch | Exception | None],
) -> None:
    """Reads requests as they come; an error is told in its place, behind all that was good."""
    try:
        async for request in requests:
            if isinstance(request, Unreadable):
                raise request.error
            if request.WhichOneof("message") != "points":
                raise invalid([Violation("points", "must follow the header, and nothing else")])
            await queue.put(await asyncio.to_thread(call.read, request.points))
    except Exception as error:  # noqa: BLE001 (whoever waits for the next batch is told)
        await queue.put(error)
    else:
        await queue.put(None)


async def _windows(
    queue: asyncio.Queue[_Batch | Exception | None],
) -> AsyncIterator[list[_Batch]]:
    """What has arrived, up to WINDOW_ROWS at a time, until the caller's end or fault."""
    is_open = True
    while is_open:
        taken = [await queue.get()]
        while not queue.empty() and sum(len(b.rows) for b in taken if isinstance(b, _Batch)) < (
            WINDOW_ROWS
        ):
            taken.append(queue.get_nowait())
        window = [batch for batch in taken if isinstance(batch, _Batch)]
        if window:
            yield window
        last = taken[-1]
        if isinstance(last, Exception):
            raise last
        is_open = last is not None
