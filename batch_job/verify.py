"""Compares what an installation serves with what Postgres says: byte for byte, bit for bit.

For each card that is looked at: its ledger and its profile, encoded anew from Postgres, against the
bytes in Redis; the records that Postgres keeps of its transactions against its transactions; and all features at random instants, computed from Postgres, against what the server
answers. A payment may be in Postgres and not yet in Redis while the stream runs, so a card that
differs is looked at again before it is reported.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tally
from tally.results import status_name

from features import CATALOG, RETENTION_MS, Ledgers, Points, Profiles, as_of
from features.catalog import WINDOWS
from features.ledger import record_categories, record_times_ms
from features.points import CATEGORY_MISSING, EVENT_TIME_MS_MAX
from stores.arrow import by_card, records_of, runs_of_cards, to_records
from stores.errors import StoreError
from stores.postgres import OfflineStore
from stores.rebuild import PROFILES, TRANSACTIONS, encoded_ledgers, encoded_profiles
from stores.redis_store import OnlineStore, ledger_key, profile_key

POINTS_PER_CARD = 4
CARDS_TOGETHER = 200
ROWS_PER_CALL = 1_000
LOOKS_MAX = 6
PAUSE_S = 0.5
"""Between looks at a card that differs: longer than a batch of the stream takes."""
EXAMPLES_MAX = 3

_EDGES_MS = (
    *(0, 1, RETENTION_MS, RETENTION_MS - 1),
    *(window_ms + beside for _, window_ms in WINDOWS for beside in (0, 1)),
)

Report = Callable[[int], None]


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

    cards: int = 0
    points: int = 0
    values: int = 0
    looked_at_again: int = 0
    """Cards that differed at first and not later: the stream was between the stores."""
    mismatches: dict[str, int] = field(default_factory=dict)
    """By what differs, as Difference has it; empty where all is equal."""
    examples: list[Difference] = field(default_factory=list)
    """Some of each."""
    seconds: float = 0.0

    def add(self, difference: Difference) -> None:
        """Counts a difference, and keeps the first of its kind."""
        count = self.mismatches.get(difference.what, 0)
        self.mismatches[difference.what] = count + 1
        if count < EXAMPLES_MAX:
            self.examples.append(difference)


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
        self._seed = secrets.randbits(64) if seed is None else seed
        self._sleep = sleep

    def verify(self, sample: int | None, report: Report = lambda cards: None) -> Verification:
        """Looks at `sample` cards chosen at random, or at all where that is None.

        Raises:
            StoreError: a store does not answer, or the online store says that it is not complete.
            tally.TallyError: the server does not answer.
        """
        progress = self._online.progress()
        if progress is None:
            raise StoreError(
                "the online store has lost its data, or is being rebuilt: it does not claim to be "
                "right; verify it when `tally status` says that it is serving"
            )
        began_s = time.monotonic()
        result = Verification()
        for chunk in self._chunks(sample):
            cards, differences = self._look(chunk, result)
            for _ in range(LOOKS_MAX - 1):
                suspects = {difference.card_id for difference in differences}
                if not suspects:
                    break
                self._sleep(PAUSE_S)
                _, differences = self._look(self._of_cards(map(bytes.fromhex, suspects)), result)
                result.looked_at_again += len(suspects - {d.card_id for d in differences})
            for difference in differences:
                result.add(difference)
            result.cards += cards
            report(cards)
        result.seconds = round(time.monotonic() - began_s, 3)
        return result

    # --- which cards ------------------------------------------------------------------------

    def _chunks(self, sample: int | None) -> Iterator[pa.Table]:
        """Tables of the transactions of whole cards."""
        if sample is None:
            yield from runs_of_cards(self._offline.read(TRANSACTIONS.format(where="true")))
            return
        chosen = self._choose(sample)
        for begin in range(0, len(chosen), CARDS_TOGETHER):
            yield self._of_cards(chosen[begin : begin + CARDS_TOGETHER])

    def _choose(self, n: int) -> list[bytes]:
        """Up to n cards at random: those that follow random ids. Ids are uniform, being HMACs."""
        rng = Random(self._seed)
        return self._offline.cards_following([rng.randbytes(16) for _ in range(n)])

    def _of_cards(self, card_ids: Sequence[bytes] | Iterator[bytes]) -> pa.Table:
        return self._read(TRANSACTIONS, card_ids)

    def _read(self, query: str, card_ids: Sequence[bytes] | Iterator[bytes]) -> pa.Table:
        ids = ", ".join(f"'\\x{card_id.hex()}'" for card_id in card_ids)
        return pa.Table.from_batches(
            list(self._offline.read(query.format(where=f"card_id IN ({ids})")))
        )

    # --- one look ---------------------------------------------------------------------------

    def _look(self, transactions: pa.Table, result: Verification) -> tuple[int, list[Difference]]:
        """Compares the cards of a table; returns how many, and what differs."""
        numbers, cards = by_card(transactions["card_id"])
        records = to_records(transactions)
        ledgers = dict(encoded_ledgers(transactions["card_id"], records))
        profiles = dict(encoded_profiles(self._read(PROFILES, cards)))
        kept = records_of(transactions["record"])
        differences = [
            *(
                Difference("record", cards[numbers[row]].hex())
                for row in np.flatnonzero(kept != records)
            ),
            *self._compare_bytes("ledger", [ledger_key(card) for card in cards], cards, ledgers),
            *self._compare_bytes("profile", [profile_key(card) for card in cards], cards, profiles),
        ]
        points, given = self._draw(transactions, numbers, cards)
        expected = as_of(
            Ledgers.from_bytes([ledgers[ledger_key(card)] for card in cards]),
            points,
            CATALOG,
            Profiles.from_bytes([profiles.get(profile_key(card)) for card in cards]),
        )
        values, statuses = self._ask(_questions(transactions, points, given, cards))
        equal = expected.values.view(np.int64) == values.view(np.int64)
        equal |= np.isnan(expected.values) & np.isnan(values)
        equal &= expected.statuses == statuses
        result.points += len(points)
        result.values += equal.size
        for row, column in zip(*np.nonzero(~equal), strict=True):
            differences.append(
                Difference(
                    CATALOG[column].name,
                    cards[points.card_index[row]].hex(),
                    int(points.time_ms[row]),
                    _said(values[row, column], statuses[row, column]),
                    _said(expected.values[row, column], expected.statuses[row, column]),
                )
            )
        return len(cards), differences

    def _ask(self, rows: list[tally.Row]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
        """Values and statuses (rows, features) of the whole catalogue, from the server."""
        names = [feature.name for feature in CATALOG]
        answers = [
            self._client.online(rows[begin : begin + ROWS_PER_CALL], names)
            for begin in range(0, len(rows), ROWS_PER_CALL)
        ]
        return (
            np.concatenate([answer.values for answer in answers]),
            np.concatenate([answer.statuses for answer in answers]),
        )

    def _compare_bytes(
        self, what: str, keys: list[bytes], cards: list[bytes], expected: dict[bytes, bytes]
    ) -> Iterator[Difference]:
        for key, card, value in zip(keys, cards, self._online.read(keys), strict=True):
            want = expected.get(key)
            if value != want:
                sizes = [f"{len(v):,} bytes" if v is not None else "nothing" for v in (value, want)]
                yield Difference(what, card.hex(), None, *sizes)

    def _draw(
        self, transactions: pa.Table, numbers: npt.NDArray[np.int64], cards: list[bytes]
    ) -> tuple[Points, npt.NDArray[np.int64]]:
        """Points right at payments and at the edges of windows behind them; and these payments."""
        order = np.argsort(numbers, kind="stable")
        bounds = np.searchsorted(numbers[order], np.arange(len(cards) + 1))
        chosen, shifts = [], []
        for number, card in enumerate(cards):
            rng = Random(f"{self._seed} {card.hex()}")
            rows = order[bounds[number] : bounds[number + 1]]
            chosen += [rows[rng.randrange(len(rows))] for _ in range(POINTS_PER_CARD)]
            shifts += [rng.choice(_EDGES_MS) for _ in range(POINTS_PER_CARD)]
        given = np.array(chosen)
        records = to_records(transactions.take(pa.array(given)))
        is_given = transactions["category"].combine_chunks().is_valid().to_numpy(False)[given]
        points = Points.at(
            numbers[given],
            np.minimum(record_times_ms(records) + np.array(shifts), EVENT_TIME_MS_MAX),
            amount_minor=records["amount_minor"],
            category=np.where(is_given, record_categories(records), CATEGORY_MISSING),
            latitude_udeg=records["latitude_udeg"],
            longitude_udeg=records["longitude_udeg"],
        )
        return points, given


def _questions(
    transactions: pa.Table,
    points: Points,
    given: npt.NDArray[np.int64],
    cards: list[bytes],
) -> list[tally.Row]:
    """The same points as questions to the server."""
    payments = transactions.take(pa.array(given)).to_pylist()
    return [
        tally.Row(
            card_id=cards[card],
            at=at,
            amount=payment["amount_minor"] / 100,
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
