"""Compares what an installation serves with what Postgres says: byte for byte, bit for bit.

For each card that is looked at: its ledger and its profile, encoded anew from Postgres, against the
bytes in Redis; the records that Postgres keeps of its transactions against its transactions; and all
features at random instants, computed from Postgres, against what the server answers. When every card
is looked at, so is whether Redis has ledgers of cards that Postgres does not know.

A payment may be in Postgres and not yet in Redis while the stream runs, so a card that differs is
looked at again, at last while nobody writes, before it is reported.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tally
from tally.results import status_name

from features import (
    CATALOG,
    RETENTION_MS,
    Ledgers,
    Merchants,
    Points,
    Profiles,
    Status,
    as_of,
)
from features.catalog import WINDOWS
from features.ledger import NEVER_DROPPED, Records, sort_unique_by_card
from features.points import EVENT_TIME_MS_MAX
from stores.arrow import (
    PROFILES,
    TRANSACTIONS,
    by_card,
    points_at,
    records_of,
    to_ms,
    to_records,
)
from stores.errors import LockedError, StoreError
from stores.history import History
from stores.merchants import FACTS_LOCK, online_facts, online_value
from stores.postgres import ONLINE_STORE_LOCK, OfflineStore
from stores.redis_store import (
    COMPLETE_THROUGH_UNKNOWN,
    OnlineStore,
    ledger_key,
    profile_key,
)
from stores.values import encoded_profiles, ledgers_of_histories

POINTS_PER_CARD = 4
CARDS_TOGETHER = 200
"""Cards that are looked at in one snapshot, and read from Redis by one command."""
ROWS_PER_CALL = 1_000
LOOKS = 5
"""How often a card is looked at beside everything else, before it is looked at alone."""
PAUSE_S = 0.5
"""Between looks at a card that differs: longer than a batch of the stream takes."""
ALONE_TIMEOUT_S = 5.0
"""How long the last look waits until nobody writes."""
EXAMPLES_MAX = 3
"""Differences of one kind that are reported one by one."""

_EDGES_MS = (
    *(0, 1, RETENTION_MS, RETENTION_MS - 1),
    *(window_ms + beside for _, window_ms in WINDOWS for beside in (0, 1)),
)

_TRANSACTIONS = f"""
SELECT {", ".join(TRANSACTIONS.names)}, record FROM transactions WHERE card_id IN ({{cards}})
ORDER BY card_id, event_time, transaction_id
"""
_PROFILES = f"""
SELECT {", ".join(PROFILES.names)} FROM profiles WHERE card_id IN ({{cards}}) ORDER BY card_id
"""

_DROPPED = "SELECT card_id, event_time FROM dropped WHERE card_id IN ({cards})"

Report = Callable[[int], None]
Values = dict[bytes, bytes]
"""By their keys in Redis."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Something of a card that is not what Postgres says."""

    what: str
    """A feature's name, or `ledger` or `profile` of Redis, or `record` of Postgres."""
    card_id: str
    """In hexadecimal digits."""
    event_time_ms: int | None = None
    """The instant asked about, of a feature."""
    served: str | None = None
    expected: str | None = None


@dataclass(slots=True)
class Verification:
    """What a verification came to."""

    seed: int
    """Chose the cards and the instants."""
    cards: int = 0
    points: int = 0
    values: int = 0
    looked_at_again: int = 0
    """Cards that differed at first and not later: events were on their way."""
    mismatches: dict[str, int] = field(default_factory=dict)
    """By what differs, as Difference has it; empty where all is equal."""
    examples: list[Difference] = field(default_factory=list)
    """Up to EXAMPLES_MAX of each."""
    seconds: float = 0.0

    def add(self, difference: Difference) -> None:
        """Counts a difference, and keeps the first of its kind."""
        count = self.mismatches.get(difference.what, 0)
        self.mismatches[difference.what] = count + 1
        if count < EXAMPLES_MAX:
            self.examples.append(difference)


@dataclass(frozen=True, slots=True)
class _Look:
    """Some cards as Postgres has them in one snapshot."""

    cards: list[bytes]
    transactions: pa.Table
    """Of TRANSACTIONS with RECORD_COLUMN, in order of card and time."""
    numbers: npt.NDArray[np.int64]
    """Whose each is, counting into cards."""
    records: Records
    """Computed from them anew."""
    profiles: pa.Table
    dropped_ms: npt.NDArray[np.int64]
    """(n_cards,) what retention has dropped of each."""


@dataclass(frozen=True, slots=True)
class _Served:
    """What the server answers."""

    values: npt.NDArray[np.float64]
    """(rows, features)."""
    statuses: npt.NDArray[np.uint8]
    """(rows, features)."""
    is_incomplete: npt.NDArray[np.bool_]
    """(rows,) whether the answer said that the store is not complete, as during a load."""


def _expect_incomplete(
    statuses: npt.NDArray[np.uint8], is_incomplete: npt.NDArray[np.bool_]
) -> None:
    """Sets the statuses (rows, features) that a store gives that is not complete: a card or a fact that it
    lacks may exist."""
    lacking = np.isin(statuses, (Status.UNKNOWN_CARD, Status.MISSING_FACT))
    statuses[lacking & is_incomplete[:, np.newaxis]] = Status.STORE_INCOMPLETE


class Verifier:
    """Looks at cards."""

    def __init__(
        self,
        offline: OfflineStore,
        online: OnlineStore,
        client: tally.Client,
        *,
        seed: int | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Takes an installation.

        Args:
            offline: what is true.
            online: where the server reads.
            client: of the server.
            seed: of the choice of cards and instants; random by default.
            sleep: waits between looks.
        """
        self._offline, self._online, self._client = offline, online, client
        self._seed = secrets.randbits(32) if seed is None else seed
        self._sleep = sleep

    def verify(
        self, sample: int | None, reserved: bytes, report: Report = lambda cards: None
    ) -> Verification:
        """Looks at `sample` cards chosen at random, or at all where that is None.

        Args:
            sample: how many.
            reserved: the id of the card that Postgres need not know, of freshness probes.
            report: told how many cards were looked at since last told.

        Raises:
            StoreError: a store does not answer, does not claim to be right, or is being written to
                by a load while cards differ.
            tally.TallyError: the server does not answer.
        """
        self._check_claim()
        began_s = time.monotonic()
        result = Verification(self._seed)
        chosen = self._choose(sample) if sample is not None else self._offline.all_cards()
        for cards in _chunks(chosen):
            differences = self._compare(cards, result)
            if differences:
                differences = self._look_again(differences, result)
            for difference in differences:
                result.add(difference)
            result.cards += len(cards)
            report(len(cards))
        if sample is None:
            for difference in self._orphans(reserved):
                result.add(difference)
        self._check_claim()
        result.seconds = round(time.monotonic() - began_s, 3)
        return result

    def _check_claim(self) -> None:
        if self._online.progress() is None:
            raise StoreError(
                "the online store has lost its data, or is being rebuilt: it does not claim to be "
                "right; verify it when `tally status` says that it is serving"
            )
        if not self._offline.has_current_records:
            raise StoreError("postgres is of another version: `tally up` or `tally load` mends it")

    def _choose(self, n: int) -> list[bytes]:
        """Up to n cards at random: those that follow random ids. Ids are uniform, being HMACs."""
        rng = Random(self._seed)
        return self._offline.cards_following([rng.randbytes(16) for _ in range(n)])

    def _look_again(self, differences: list[Difference], result: Verification) -> list[Difference]:
        """Looks at cards that differ until they do not; what still differs while nobody writes."""
        suspects = {difference.card_id for difference in differences}
        for _ in range(LOOKS - 1):
            self._sleep(PAUSE_S)
            differences = self._compare([bytes.fromhex(card) for card in sorted(suspects)])
            settled = suspects - {difference.card_id for difference in differences}
            result.looked_at_again += len(settled)
            suspects -= settled
            if not suspects:
                return []
        try:
            # Neither events are applied then nor facts of merchants handed over.
            with (
                self._offline.locked(ONLINE_STORE_LOCK, shared=False, timeout_s=ALONE_TIMEOUT_S),
                self._offline.locked(FACTS_LOCK, shared=False, timeout_s=ALONE_TIMEOUT_S),
            ):
                differences = self._compare([bytes.fromhex(card) for card in sorted(suspects)])
        except LockedError as error:
            raise StoreError(
                f"{len(suspects)} cards differ, and {error}: verify again when `tally status` names "
                "no unfinished load"
            ) from None
        result.looked_at_again += len(suspects - {d.card_id for d in differences})
        return differences

    # --- one look ---------------------------------------------------------------------------

    def _compare(
        self, cards: Sequence[bytes], result: Verification | None = None
    ) -> list[Difference]:
        """What differs of cards; counted where a result is given."""
        look = self._read(cards)
        ledgers = self._encoded(look)
        profiles = dict(encoded_profiles(look.profiles))
        return [
            *self._compare_bytes(look, ledgers, profiles),
            *self._compare_features(look, ledgers, profiles, result),
        ]

    @staticmethod
    def _encoded(look: _Look) -> Values:
        """What Redis should hold of cards' ledgers."""
        ordered, offsets = sort_unique_by_card(look.numbers, look.records, len(look.cards))
        histories = Ledgers(ordered, offsets, look.dropped_ms)
        return {
            ledger_key(card_id): ledger
            for card_id, ledger in ledgers_of_histories(look.cards, histories)
        }

    def _read(self, cards: Sequence[bytes]) -> _Look:
        ids = ", ".join(f"'\\x{card_id.hex()}'" for card_id in cards)
        transactions, profiles, dropped = (
            self._offline.read_all(query.format(cards=ids))
            for query in (_TRANSACTIONS, _PROFILES, _DROPPED)
        )
        numbers, known = by_card(transactions["card_id"])
        times = dict(zip(dropped["card_id"].to_pylist(), to_ms(dropped["event_time"]), strict=True))
        dropped_ms = np.array([times.get(card, NEVER_DROPPED) for card in known], np.int64)
        records = to_records(transactions)
        return _Look(known, transactions, numbers, records, profiles, dropped_ms)

    def _compare_bytes(
        self, look: _Look, ledgers: Values, profiles: Values
    ) -> Iterator[Difference]:
        for row in np.flatnonzero(records_of(look.transactions["record"]) != look.records).tolist():
            yield Difference("record", look.cards[look.numbers[row]].hex())
        for what, key_of, expected in (
            ("ledger", ledger_key, ledgers),
            ("profile", profile_key, profiles),
        ):
            keys = [key_of(card) for card in look.cards]
            for card, key, value in zip(look.cards, keys, self._online.read(keys), strict=True):
                want = expected.get(key)
                if value != want:
                    yield Difference(what, card.hex(), None, _size(value), _size(want))

    def _compare_features(
        self, look: _Look, ledgers: Values, profiles: Values, result: Verification | None
    ) -> Iterator[Difference]:
        points, given = self._draw(look)
        merchants, places = self._merchants(look.records[given])
        points = replace(points, merchant_index=places)
        expected = as_of(
            Ledgers.from_bytes([ledgers[ledger_key(card)] for card in look.cards]),
            points,
            CATALOG,
            Profiles.from_bytes([profiles.get(profile_key(card)) for card in look.cards]),
            merchants,
        )
        served = self._ask(_questions(look, points, given))
        values, statuses = served.values, served.statuses
        _expect_incomplete(expected.statuses, served.is_incomplete)
        equal = expected.values.view(np.int64) == values.view(np.int64)
        equal |= np.isnan(expected.values) & np.isnan(values)
        equal &= expected.statuses == statuses
        if result is not None:
            result.points += len(points)
            result.values += equal.size
        for row, column in zip(*np.nonzero(~equal), strict=True):
            yield Difference(
                CATALOG[column].name,
                look.cards[points.card_index[row]].hex(),
                int(points.time_ms[row]),
                _said(values[row, column], statuses[row, column]),
                _said(expected.values[row, column], expected.statuses[row, column]),
            )

    def _merchants(self, records: Records) -> tuple[Merchants, npt.NDArray[np.int64]]:
        """The facts of the merchants of payments (n,) as Redis should hold them, and where in them each
        one's are."""
        with History(self._offline.url) as history:
            facts = online_facts(history.merchants)
            whole = history.merchants.population()
            known, places = history.merchants.of(np.ascontiguousarray(records["merchant"]))
        values = [
            online_value(known.records[begin:end], whole)
            for begin, end in pairwise(known.offsets.tolist())
        ]
        return Merchants.from_bytes(values, facts.population), places

    def _draw(self, look: _Look) -> tuple[Points, npt.NDArray[np.int64]]:
        """Points right at payments and at the edges of windows behind them; and these payments."""
        bounds = np.searchsorted(look.numbers, np.arange(len(look.cards) + 1))
        chosen, shifts = [], []
        for number, card in enumerate(look.cards):
            rng = Random(f"{self._seed} {card.hex()}")
            for _ in range(POINTS_PER_CARD):
                chosen.append(rng.randrange(bounds[number], bounds[number + 1]))
                shifts.append(rng.choice(_EDGES_MS))
        given = np.array(chosen, dtype=np.int64)
        records = look.records[given]
        points = points_at(records, look.numbers[given])
        times_ms = points.time_ms + np.array(shifts, np.int64)
        return replace(points, time_ms=np.minimum(times_ms, EVENT_TIME_MS_MAX)), given

    def _ask(self, rows: list[tally.Row]) -> _Served:
        """The whole catalogue of rows, from the server; status 0 of a row that it fails at, such as one of
        a card whose ledger is none."""
        names = [feature.name for feature in CATALOG]
        if len(rows) > ROWS_PER_CALL:
            return self._ask_halves(rows)
        try:
            answer = self._client.online(rows, names) if rows else None
        except tally.InternalError:
            if len(rows) > 1:
                return self._ask_halves(rows)
            answer = None
        if answer is None:
            shape = (len(rows), len(names))
            nothing = np.full(shape, np.nan), np.zeros(shape, np.uint8)
            return _Served(*nothing, np.zeros(len(rows), np.bool_))
        is_incomplete = answer.complete_through_ms == COMPLETE_THROUGH_UNKNOWN
        return _Served(answer.values, answer.statuses, is_incomplete)

    def _ask_halves(self, rows: list[tally.Row]) -> _Served:
        half = len(rows) // 2
        parts = [self._ask(rows[:half]), self._ask(rows[half:])]
        return _Served(
            np.concatenate([p.values for p in parts]),
            np.concatenate([p.statuses for p in parts]),
            np.concatenate([p.is_incomplete for p in parts]),
        )

    def _orphans(self, reserved: bytes) -> Iterator[Difference]:
        """Ledgers in Redis of cards that Postgres does not know."""
        found = (card for card in self._online.cards_with_ledgers() if card != reserved)
        for cards in _chunks(found):
            known = set(self._offline.known_cards(cards))
            for card in cards:
                if card not in known:
                    yield Difference("ledger", card.hex(), None, "a ledger", "nothing")


def _chunks(cards: Sequence[bytes] | Iterator[bytes]) -> Iterator[list[bytes]]:
    """Cards, CARDS_TOGETHER at a time."""
    chunk: list[bytes] = []
    for card in cards:
        chunk.append(card)
        if len(chunk) == CARDS_TOGETHER:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _questions(look: _Look, points: Points, given: npt.NDArray[np.int64]) -> list[tally.Row]:
    """Points as questions to the server; `given` are the payments that they were drawn from."""
    payments = look.transactions.take(pa.array(given)).to_pylist()
    return [
        tally.Row(
            card_id=look.cards[card],
            at=at,
            amount=payment["amount_minor"] / 100,
            merchant=payment["merchant"],
            category=payment["category"],
            merchant_latitude=payment["merchant_latitude"],
            merchant_longitude=payment["merchant_longitude"],
        )
        for payment, card, at in zip(
            payments, points.card_index.tolist(), points.time_ms.tolist(), strict=True
        )
    ]


def _said(value: float, status: int) -> str:
    """A value as a person reads it, to the last bit; or why there is none."""
    return status_name(int(status)) if np.isnan(value) else repr(float(value))


def _size(value: bytes | None) -> str:
    return "nothing" if value is None else f"{len(value):,} bytes"
