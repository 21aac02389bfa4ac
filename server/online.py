"""Answers to online questions: one read of Redis, and one `as_of` for each set of features asked for,
serve the calls that overlap.

Why gather. A read of Redis and a call of `as_of` cost nearly the same for one row as for twenty; the
framework hands calls over one at a time. So calls that are there at the same time share both.

When. A call waits until as many have come as came together last time, but no longer than
gather_wait; where the last one came alone, that is at once. Since calls that never wait never see
company, one batch in PROBE_BATCHES_MIN to PROBE_BATCHES_MAX waits its full time to look for it,
the rarer the longer none was found: a lone caller pays for one call in PROBE_BATCHES_MAX.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from features import (
    CATALOG,
    Answers,
    Feature,
    Ledgers,
    Merchants,
    Points,
    Population,
    Profiles,
    Status,
    as_of,
)
from features.merchants import MERCHANT_MISSING, NEVER, day_valid_from_ms
from server.errors import (
    RETRY_AFTER_MS,
    CallError,
    card_key_mismatch,
    overloaded,
    unavailable,
)
from server.query import OnlineQuery
from server.resp import RedisReader
from server.response import ResponseWriter
from stores.errors import StoreUnavailableError
from stores.redis_store import (
    COMPLETE_THROUGH_UNKNOWN,
    FORMAT,
    POPULATION_KEY,
    PROGRESS_KEY,
    Progress,
    ledger_key,
    merchant_redis_key,
    profile_key,
)

CARDS_PER_READ = 512
"""Cards read and computed together: bounds memory and how long the loop is busy."""
GATHERED_ROWS_ENOUGH = 64
"""Rows that are worth a read of their own: they wait neither for more nor for the batch before."""
QUIET_S = 0.1
LARGE_CALLS_MAX = 4
"""Calls of more than one read that are worked on at once: bounds memory."""
GATHERED_CALLS_MAX = GATHERED_ROWS_ENOUGH
PROBE_BATCHES_MIN, PROBE_BATCHES_MAX = 8, 256
"""How seldom a batch waits to see whether there is company."""


@dataclass(slots=True)
class _Call:
    query: OnlineQuery
    answer: asyncio.Future[bytes]

    def fail(self, error: Exception) -> None:
        """Ends the call with an error, unless it has ended already: its caller may be gone."""
        if not self.answer.done():
            self.answer.set_exception(error)


class OnlineAnswers:
    """Answers queries from Redis."""

    def __init__(
        self,
        redis: RedisReader,
        card_key_fingerprint: str,
        *,
        gather_wait_us: int,
        queued_calls_max: int,
    ) -> None:
        self._redis = redis
        self._card_key = card_key_fingerprint
        self._wait_s = gather_wait_us / 1e6
        self._queued_calls_max = queued_calls_max
        self._pending: list[_Call] = []
        self._pending_rows = 0
        self._present = 0
        """Calls that came and are not answered yet."""
        self._large = asyncio.Semaphore(LARGE_CALLS_MAX)
        self._unanswered = 0
        """Calls that were sent off and are not answered yet."""
        self._company = 1
        """Calls that came together last time."""
        self._probe_every = PROBE_BATCHES_MIN
        self._until_probe = PROBE_BATCHES_MIN
        """Batches; 0 while the one being gathered is a probe."""
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._progress_raw: bytes | None = None
        self._progress: Progress | None = None
        self._population_raw: bytes | None = None
        self._population = Population.none()

    async def answer(self, query: OnlineQuery) -> bytes:
        """The serialised GetOnlineFeaturesResponse.

        Raises:
            CallError: UNAVAILABLE, STALE, CARD_KEY_MISMATCH or OVERLOADED.
        """
        self.check_room()
        self._present += 1
        try:
            if len(query) > CARDS_PER_READ:
                async with self._large:
                    return await self._answer_alone(query)
            return await self._answer_gathered(query)
        finally:
            self._present -= 1

    def check_room(self) -> None:
        """Raises CallError, OVERLOADED, where as many calls wait as may."""
        if self._present >= self._queued_calls_max:
            message = f"{self._present:,} calls are waiting already"
            raise overloaded(message, self._queued_calls_max, RETRY_AFTER_MS)

    async def _answer_gathered(self, query: OnlineQuery) -> bytes:
        call = _Call(query, asyncio.get_running_loop().create_future())
        self._pending.append(call)
        self._pending_rows += len(query)
        self._consider()
        return await call.answer

    @staticmethod
    def warm_up() -> None:
        """Computes a row of an unknown card: what is loaded late is loaded before the first call."""
        query = OnlineQuery(CATALOG, [b""], [0], [0], [0], [0], [0], [b""])
        stored = _Stored({b"": 0}, [None], [None], {b"": 0}, [None], Population.none(), 0)
        answers = _compute([query], CATALOG, stored)
        ResponseWriter(CATALOG, answers, 0).write(0, query.time_ms)

    async def wait_until_quiet(self) -> None:
        """Returns once no call has been there for QUIET_S."""
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < QUIET_S:
            await asyncio.sleep(QUIET_S / 10)
            if self._present:
                quiet_since = time.monotonic()

    # --- gathering --------------------------------------------------------------------------

    def _consider(self) -> None:
        """Sends the pending calls off now, or sees to it that they go soon."""
        if not self._pending:
            return
        if self._pending_rows >= GATHERED_ROWS_ENOUGH:
            self._dispatch()
        elif self._unanswered:
            return  # they are looked at again when the batch that is under way is done
        elif self._until_probe > 0 and len(self._pending) >= self._company:
            self._dispatch()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._wait_s, self._dispatch)

    def _dispatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        calls, self._pending, self._pending_rows = self._pending, [], 0
        self._learn(len(calls))
        self._unanswered += len(calls)
        task = asyncio.get_running_loop().create_task(self._answer_calls(calls))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _learn(self, came: int) -> None:
        """Takes in how many calls came together, and plans the next probe."""
        if came > self._company:
            self._probe_every = PROBE_BATCHES_MIN
        elif self._until_probe == 0:
            self._probe_every = min(self._probe_every * 2, PROBE_BATCHES_MAX)
        self._until_probe = (self._until_probe or self._probe_every + 1) - 1
        self._company = min(max(came, self._company // 2), GATHERED_CALLS_MAX)

    async def _answer_calls(self, calls: list[_Call]) -> None:
        """Answers every one of these calls, whatever happens, and then looks at those that came."""
        try:
            stored = await self._read([call.query for call in calls])
            groups: dict[tuple[Feature, ...], list[_Call]] = defaultdict(list)
            for call in calls:
                groups[call.query.features].append(call)
            for features, group in groups.items():
                self._answer_group(features, group, stored)
        except Exception as error:  # noqa: BLE001 (it belongs to these calls, and goes to them)
            for call in calls:
                call.fail(error)
        finally:
            self._unanswered -= len(calls)
            self._consider()

    def _answer_group(
        self, features: tuple[Feature, ...], calls: list[_Call], stored: _Stored
    ) -> None:
        try:
            answers = _compute([call.query for call in calls], features, stored)
        except Exception as error:  # noqa: BLE001 (it belongs to one of these calls)
            # A ledger that cannot be read is its own caller's trouble alone.
            if len(calls) == 1:
                calls[0].fail(error)
            else:
                for call in calls:
                    self._answer_group(features, [call], stored)
            return
        writer = ResponseWriter(features, answers, stored.complete_through_ms)
        end = 0
        for call in calls:
            begin, end = end, end + len(call.query)
            if call.answer.done():  # cancelled or past its deadline
                continue
            try:
                _insist_on_freshness(call.query, stored.complete_through_ms)
            except CallError as error:
                call.fail(error)
            else:
                call.answer.set_result(writer.write(begin, call.query.time_ms))

    async def _answer_alone(self, query: OnlineQuery) -> bytes:
        """A large call, read and computed in parts; the loop is free in between."""
        parts = []
        through_ms: list[int] = []
        for begin in range(0, len(query), CARDS_PER_READ):
            part = _slice(query, slice(begin, begin + CARDS_PER_READ))
            stored = await self._read([part])
            parts.append(_compute([part], query.features, stored))
            through_ms.append(stored.complete_through_ms)
        through = min(through_ms)  # what is true of every part
        _insist_on_freshness(query, through)
        answers = Answers(
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.statuses for part in parts]),
            np.concatenate([part.known for part in parts]),
        )
        return ResponseWriter(query.features, answers, through).write(0, query.time_ms)

    # --- reading ----------------------------------------------------------------------------

    async def _read(self, queries: Sequence[OnlineQuery]) -> _Stored:
        """Reads what queries need, of their cards and merchants, and what the store says of itself, at
        one instant."""
        cards = list(dict.fromkeys(card_id for query in queries for card_id in query.card_ids))
        merchants = list(dict.fromkeys(m for q in queries for m in q.merchants if m is not None))
        keys = [PROGRESS_KEY]
        keys += map(ledger_key, cards)
        keys += map(profile_key, cards)
        if merchants:
            keys += map(merchant_redis_key, merchants)
            keys.append(POPULATION_KEY)
        values = await self._mget(keys)
        progress = self._heed(values[0])
        through = COMPLETE_THROUGH_UNKNOWN if progress is None else progress.complete_through_ms
        middle = 1 + len(cards)
        end = middle + len(cards)
        return _Stored(
            {card_id: number for number, card_id in enumerate(cards)},
            values[1:middle],
            values[middle:end],
            {merchant: number for number, merchant in enumerate(merchants)},
            values[end:-1] if merchants else [],
            # Of a store that has lost its data, merchants may be missing.
            self._known_population(values[-1]) if merchants and progress else Population.none(),
            through,
        )

    async def _mget(self, keys: list[bytes]) -> list[bytes | None]:
        try:
            return await self._redis.mget(keys)
        except StoreUnavailableError as error:
            raise unavailable(error.store, str(error)) from error

    def _known_population(self, raw: bytes | None) -> Population:
        """What is known of all merchants, which seldom changes."""
        if raw != self._population_raw:
            self._population_raw, self._population = raw, Population.from_bytes(raw)
        return self._population

    async def read_progress(self) -> Progress | None:
        """What the store says of itself now; None where it is not complete.

        Raises:
            CallError: UNAVAILABLE or CARD_KEY_MISMATCH.
        """
        await self._read([])
        return self._progress

    async def read_state(self) -> tuple[Progress | None, int]:
        """The same, and the last instant whose features of merchants are computed, in ms; -1 where there
        is none."""
        progress_raw, population_raw = await self._mget([PROGRESS_KEY, POPULATION_KEY])
        progress = self._heed(progress_raw)
        day = NEVER if progress is None else self._known_population(population_raw).through_day
        return progress, -1 if day == NEVER else day_valid_from_ms(day + 1) - 1

    def _heed(self, raw: bytes | None) -> Progress | None:
        """Takes in the progress that came with a read; insists on our card key."""
        if raw != self._progress_raw:
            self._progress_raw, self._progress = raw, Progress.parse(raw)
        progress = self._progress
        if progress is not None and progress.card_key != self._card_key:
            raise card_key_mismatch("redis")
        if progress is not None and progress.format != FORMAT:
            raise unavailable("redis", "what it holds is of another version's format")
        return progress


@dataclass(slots=True)
class _Stored:
    """What one read brought."""

    numbers: dict[bytes, int]
    """Card id -> position in the lists."""
    ledgers: list[bytes | None]
    profiles: list[bytes | None]
    merchant_numbers: dict[bytes, int]
    """Merchant key -> position in the list."""
    merchants: list[bytes | None]
    population: Population
    complete_through_ms: int


def _slice(query: OnlineQuery, part: slice) -> OnlineQuery:
    return OnlineQuery(
        query.features,
        query.card_ids[part],
        query.time_ms[part],
        query.amount_minor[part],
        query.category[part],
        query.latitude_udeg[part],
        query.longitude_udeg[part],
        query.merchants[part],
        query.at_least_ms,
    )


def _compute(queries: list[OnlineQuery], features: tuple[Feature, ...], stored: _Stored) -> Answers:
    """The features of all rows of queries, in order."""
    cards: dict[bytes, int] = {}
    rows = [cards.setdefault(card_id, len(cards)) for q in queries for card_id in q.card_ids]
    at = [stored.numbers[card_id] for card_id in cards]
    place_of = stored.merchant_numbers
    points = Points.at(
        rows,
        [t for q in queries for t in q.time_ms],
        amount_minor=[x for q in queries for x in q.amount_minor],
        category=[x for q in queries for x in q.category],
        latitude_udeg=[x for q in queries for x in q.latitude_udeg],
        longitude_udeg=[x for q in queries for x in q.longitude_udeg],
        merchant_index=[
            MERCHANT_MISSING if m is None else place_of[m] for q in queries for m in q.merchants
        ]
        if place_of
        else None,
    )
    answers = as_of(
        Ledgers.from_bytes([stored.ledgers[number] for number in at]),
        points,
        features,
        Profiles.from_bytes([stored.profiles[number] for number in at]),
        Merchants.from_bytes(stored.merchants, stored.population) if place_of else None,
    )
    if stored.complete_through_ms == COMPLETE_THROUGH_UNKNOWN:
        # The store does not say that it is complete: a card or a fact that it lacks may exist.
        statuses = answers.statuses
        lacking = (statuses == Status.UNKNOWN_CARD) | (statuses == Status.MISSING_FACT)
        statuses[lacking] = Status.STORE_INCOMPLETE
    return answers


def _insist_on_freshness(query: OnlineQuery, through: int) -> None:
    """Raises CallError where a call asks for more than the store is complete through."""
    if query.at_least_ms is not None and through < query.at_least_ms:
        raise CallError(
            grpc.StatusCode.FAILED_PRECONDITION,
            "STALE",
            f"the store is complete through {through} ms, not through {query.at_least_ms} ms"
            if through != COMPLETE_THROUGH_UNKNOWN
            else "the store cannot say through which instant it is complete",
            metadata={"complete_through_ms": str(through), "asked_ms": str(query.at_least_ms)},
        )
