"""GetHistoricalFeatures: streams of points, answered exactly as of each point's instant.

    batches of points ──▶ window ──▶ histories of its cards ──▶ answers, batch by batch
     (event loop)          (whatever has come)  (thread, one snapshot)    (thread)

A window is whatever has arrived, within bounds. Its cards are read from Postgres together, while the
window before is being answered. So memory is bounded however many rows a call has and however long
histories are, and a caller who sends points in order of their cards has each card read about once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tally.v1 import feature_service_pb2 as pb

from features import (
    CATALOG_FINGERPRINT,
    Answers,
    CardKey,
    Feature,
    Ledgers,
    Merchants,
    Points,
    Profiles,
    as_of,
)
from features.merchants import MERCHANT_MISSING
from server.batches import arrow_batch, nested, parse_range, parse_time_us
from server.errors import Violation, invalid
from server.interceptors import Context
from server.online import OnlineAnswers
from server.points import (
    TRANSACTION_ID,
    PointsSchema,
    check_ids,
    merchant_keys,
    points,
    rows_of,
    subjects,
)
from server.query import parse_features, wants_merchants
from server.threads import a_step_ahead, in_thread, threaded
from stores.arrow import LABELS, answer_columns, by_card, with_points
from stores.conditions import Range
from stores.history import RECORDS_TOGETHER, History

WINDOW_POINTS = 98_304
"""Points that wait, and that are looked up together; then the caller waits."""
WINDOW_BYTES = 48 << 20
"""The same in bytes of what arrived."""
QUIET_S = 0.01
"""How long nothing must have come before what has is looked up."""
RANGE_BATCH_ROWS = 16_384
"""Rows in a batch of a range of transactions."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch of points."""

    rows: pa.RecordBatch
    card_ids: pa.Array
    points: Points
    """`card_index` counts into whatever cards are looked up together, `merchant_index` likewise."""
    merchants: tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]] | None = None
    """The key of each one's merchant, and whether it has one; None where they are to be found already, or
    nobody asks for them."""


Parts = Iterator[tuple[int, int, Ledgers, Profiles]]
"""Histories of cards, some at a time: as History.read gives them."""


@dataclass(frozen=True, slots=True)
class Answerable:
    """A batch of points, and what there is to know about it."""

    batch: Batch
    compute: Callable[[], Answers]
    labels: pa.Table | None
    """Of LABELS; None where they are not asked for."""


class HistoricalCall:
    """One call: its header, and from batches to answers. Blocking; one thread at a time."""

    def __init__(self, header: pb.HistoricalHeader, card_key: CardKey) -> None:
        """Takes the header in.

        Raises:
            CallError: it breaks a rule of the contract.
        """
        self.features: tuple[Feature, ...] = parse_features(tuple(header.features))
        self._known_by_us = (
            parse_time_us(header.labels_as_of, "header.labels_as_of")
            if header.HasField("labels_as_of")
            else None
        )
        with_labels = self._known_by_us is not None
        self.schema: PointsSchema
        self.time_range: Range | None = None
        """Of the transactions that are asked for; None where points are."""
        match header.WhichOneof("source"):
            case "schema":
                self.schema = PointsSchema.parse(
                    header.schema,
                    self.features,
                    with_labels=with_labels,
                    are_named=bool(header.features),
                )
                self.features = self.schema.features
            case "transactions":
                self.schema = PointsSchema.of_transactions(self.features, with_labels=with_labels)
                self.time_range = parse_range(header.transactions, "header.transactions")
            case _:
                raise invalid([Violation("header.source", "must be given: schema or transactions")])
        self._wants_merchants = wants_merchants(self.features)
        self._card_key = card_key
        self._read = 0

    def read(self, data: bytes) -> Batch:
        """Takes a batch of points in.

        Raises:
            CallError: it cannot be read, or rows break a rule of the contract.
        """
        number, self._read = self._read, self._read + 1
        rows = self.schema.read(data, number)
        cards = subjects(rows, number, self._card_key)
        if self._known_by_us is not None:
            check_ids(rows, number)
        merchants = merchant_keys(rows) if self._wants_merchants else None
        return Batch(rows, cards, points(rows, number), merchants)

    # --- what there is to know --------------------------------------------------------------

    def look_up(
        self, history: History, window: list[Batch]
    ) -> Generator[list[Answerable], None, None]:
        """Reads what is needed to answer batches, as many together as memory allows.

        Raises:
            StoreError: Postgres does not answer.
        """
        numbers, cards = by_card(pa.chunked_array([b.card_ids.cast(pa.binary()) for b in window]))
        bounds = np.cumsum([0, *(len(batch.rows) for batch in window)]).tolist()
        # Cards are numbered as they appear: so many are in this batch and those before it.
        cards_by_then = [int(numbers[:end].max(initial=-1)) + 1 for end in bounds[1:]]
        n = sum(count * history.mean_records <= RECORDS_TOGETHER for count in cards_by_then)
        parts = history.read(cards) if cards else iter([_NO_CARDS])  # batches may be empty
        first = next(parts, None) if n == len(window) or len(window) == 1 else None
        if len(window) > 1 and (first is None or first[1] < len(cards)):
            n = min(max(n, 1), len(window) - 1)
            yield from self.look_up(history, window[:n])
            yield from self.look_up(history, window[n:])
            return
        assert first is not None
        labels = self._labels(history, window)
        merchants, places = self._merchants(history, window)
        answerable = []
        for batch, begin, end in zip(window, bounds, bounds[1:], strict=False):
            asked = replace(
                batch.points, card_index=numbers[begin:end], merchant_index=places[begin:end]
            )
            compute: Callable[[], Answers]
            if first[1] == len(cards):
                compute = partial(as_of, first[2], asked, self.features, first[3], merchants)
            else:
                # Now, and not when it is sent: by then the connection serves the next window.
                compute = partial(
                    _same, self._answer_in_parts(asked, chain([first], parts), merchants)
                )
            known = None if labels is None else labels.slice(begin, end - begin)
            answerable.append(Answerable(batch, compute, known))
        yield answerable

    def look_up_range(self, history: History) -> Generator[list[Answerable], None, None]:
        """The same for all transactions of the range that is asked for.

        Raises:
            StoreError: Postgres does not answer.
        """
        assert self.time_range is not None
        for span in history.spans(before_ms=self.time_range[1]):
            profiles = history.profiles_of(span)
            found = history.transactions_of(span.where, self.time_range)
            answerable = []
            find = history.merchants.of if self._wants_merchants else _no_merchants
            for transactions, asked, merchants in with_points(
                found, span.card_ids, RANGE_BATCH_ROWS, find
            ):
                rows = rows_of(transactions)
                batch = Batch(rows, rows.column("card_id"), asked)
                compute = partial(as_of, span.ledgers, asked, self.features, profiles, merchants)
                answerable.append(Answerable(batch, compute, self._labels(history, [batch])))
            yield answerable

    def _merchants(
        self, history: History, window: list[Batch]
    ) -> tuple[Merchants, npt.NDArray[np.int64]]:
        """The facts of the merchants of batches, and which of them each point is at."""
        found = [batch.merchants for batch in window if batch.merchants is not None]
        if not found:
            return _no_merchants(np.zeros(sum(len(batch.rows) for batch in window), np.uint64))
        keys, is_given = (np.concatenate(columns) for columns in zip(*found, strict=True))
        places = np.full(len(keys), MERCHANT_MISSING, np.int64)
        merchants, places[is_given] = history.merchants.of(keys[is_given])
        return merchants, places

    def _answer_in_parts(
        self,
        asked: Points,
        parts: Parts,
        merchants: Merchants,
    ) -> Answers:
        """The answers to points of more cards than are read together."""
        shape = (len(asked), len(self.features))
        found = Answers(np.empty(shape), np.empty(shape, np.uint8), np.empty(len(asked), np.bool_))
        order = np.argsort(asked.card_index, kind="stable")
        ordered = asked.card_index[order]
        for begin, end, ledgers, profiles in parts:
            rows = order[slice(*np.searchsorted(ordered, [begin, end]))]
            part = asked.take(rows)
            part = replace(part, card_index=part.card_index - begin)
            answers = as_of(ledgers, part, self.features, profiles, merchants)
            found.values[rows] = answers.values
            found.statuses[rows] = answers.statuses
            found.known[rows] = answers.known
        return found

    def _labels(self, history: History, window: list[Batch]) -> pa.Table | None:
        if self._known_by_us is None:
            return None
        ids = [batch.rows.column(TRANSACTION_ID).cast(pa.string()) for batch in window]
        return history.labels(pa.chunked_array(ids), self._known_by_us)

    # --- answers ----------------------------------------------------------------------------

    def answer(self, of: Answerable) -> bytes:
        """The answer to a batch, a GetHistoricalFeaturesResponse on the wire."""
        rows = of.batch.rows
        columns = [
            of.batch.card_ids if name == "card" else rows.column(i)
            for i, name in enumerate(rows.schema.names)
        ]
        columns += answer_columns(of.compute())
        if of.labels is not None:
            columns += [of.labels[name].combine_chunks() for name in LABELS.names]
        answer = pa.RecordBatch.from_arrays(columns, schema=self.schema.answers)
        number = pb.GetHistoricalFeaturesResponse.BATCH_FIELD_NUMBER
        return b"".join(nested(number, arrow_batch(answer)))


def _no_merchants(
    keys: npt.NDArray[np.uint64],
) -> tuple[Merchants, npt.NDArray[np.int64]]:
    """What is found where nobody asks for it."""
    return _NOBODY, np.full(len(keys), MERCHANT_MISSING, np.int64)


_NOBODY = Merchants.none()
_NO_CARDS = (0, 0, Ledgers.from_bytes([]), Profiles.empty(0))


def _same(answers: Answers) -> Answers:
    return answers


class HistoricalAnswers:
    """Serves calls."""

    def __init__(self, postgres_url: str, card_key: CardKey, online: OnlineAnswers) -> None:
        self._url = postgres_url
        self._card_key = card_key
        self._online = online

    async def serve(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[bytes]:
        """One call, from its header to the answer to its last batch: messages on the wire.

        Raises:
            CallError: the caller is at fault.
            StoreError: Postgres does not answer.
        """
        call = HistoricalCall(await _header(requests), self._card_key)
        progress = await self._online.read_progress()
        history = await in_thread(lambda: History(self._url))
        inbox = _Inbox()
        reader = asyncio.create_task(_take_in(requests, call, inbox))
        try:
            header = pb.HistoricalResponseHeader(
                schema=call.schema.answers.serialize().to_pybytes(),
                catalog_fingerprint=CATALOG_FINGERPRINT,
                complete_through_ms=progress.complete_through_ms if progress else -1,
            )
            yield pb.GetHistoricalFeaturesResponse(header=header).SerializeToString()
            looked_up = (
                _of_points(call, history, inbox)
                if call.time_range is None
                else _of_range(call, history, inbox)
            )
            answers = a_step_ahead(_answered(call, a_step_ahead(looked_up)))
            async with aclosing(answers):
                async for response in answers:
                    yield response
        finally:
            reader.cancel()
            await asyncio.wait({reader})
            await in_thread(history.close)


async def _of_points(
    call: HistoricalCall, history: History, inbox: _Inbox
) -> AsyncGenerator[list[Answerable], None]:
    while window := await inbox.take():
        # Closed whenever we are: its thread uses the connection, which is closed next.
        async with aclosing(threaded(call.look_up(history, window))) as looked_up:
            async for answerable in looked_up:
                yield answerable


async def _of_range(
    call: HistoricalCall, history: History, inbox: _Inbox
) -> AsyncGenerator[list[Answerable], None]:
    async with aclosing(threaded(call.look_up_range(history))) as looked_up:
        async for answerable in looked_up:
            inbox.raise_early()
            yield answerable


async def _answered(
    call: HistoricalCall, looked_up: AsyncGenerator[list[Answerable], None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(looked_up):
        async for some in looked_up:
            for answerable in some:
                yield await in_thread(partial(call.answer, answerable))


async def _header(requests: AsyncIterator[Any]) -> pb.HistoricalHeader:
    request = await anext(requests, None)
    if request is None or request.WhichOneof("message") != "header":
        raise invalid([Violation("header", "must be the first message of the stream")])
    header: pb.HistoricalHeader = request.header
    return header


async def _take_in(requests: AsyncIterator[Any], call: HistoricalCall, inbox: _Inbox) -> None:
    """Reads requests as they come; an error is told in its place, behind all that was good."""
    try:
        async for request in requests:
            if request.WhichOneof("message") != "points":
                raise invalid([Violation("points", "must follow the header, and nothing else")])
            if call.time_range is not None:
                raise invalid([Violation("points", "must not follow a range of transactions")])
            await inbox.put(await in_thread(partial(call.read, request.points)))
    except Exception as error:  # noqa: BLE001 (whoever waits for the next batch is told)
        inbox.end(error)
    else:
        inbox.end(None)


class _Inbox:
    """Batches that have arrived. Whoever brings more than a window waits."""

    def __init__(self) -> None:
        self._batches: deque[Batch] = deque()
        self._error: Exception | None = None
        self._is_over = False
        self._is_waited_for = False
        """Whether somebody brings more than there is room for."""
        self._changed = asyncio.Event()
        self._taken = asyncio.Event()

    async def put(self, batch: Batch) -> None:
        """Adds a batch, once there is room for it."""
        while self._batches and self._is_full(batch):
            self._is_waited_for = True
            self._changed.set()
            self._taken.clear()
            await self._taken.wait()
        self._is_waited_for = False
        self._batches.append(batch)
        self._changed.set()

    def _is_full(self, batch: Batch) -> bool:
        waiting = [batch.rows, *(b.rows for b in self._batches)]
        return (
            sum(map(len, waiting)) > WINDOW_POINTS
            or sum(rows.nbytes for rows in waiting) > WINDOW_BYTES
        )

    def end(self, error: Exception | None) -> None:
        """No more batches come; why, if it is a fault."""
        self._is_over, self._error = True, error
        self._changed.set()

    async def take(self) -> list[Batch]:
        """All batches that are there, at least one; none when no more come.

        While they follow one another closely, more are waited for: what is read once for all of them
        costs about the same.

        Raises:
            Exception: what `end` was told, once all that came before is taken.
        """
        while not self._is_over:
            self._changed.clear()
            try:
                async with asyncio.timeout(QUIET_S if self._batches else None):
                    await self._changed.wait()
            except TimeoutError:
                break
            if self._is_waited_for:
                break
        window = list(self._batches)
        self._batches.clear()
        self._taken.set()
        if not window:
            self.raise_early()
        return window

    def raise_early(self) -> None:
        """Raises what `end` was told, whatever came before."""
        if self._error is not None:
            raise self._error
