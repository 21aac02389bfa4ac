"""A seeded generator of card transactions in the Kaggle file format, of our own making.

Cards live somewhere, have habits (how often, how much, at which hours, in which categories) and
shop near home. Fraud comes in four families, one for each kind of feature to catch:

    burst       many payments within minutes, at night       counts and sums of short windows
    jump        one payment far above the card's own mean    z-score
    compromise  payments at a merchant that leaked           merchant risk
    travel      a payment hundreds of km away within minutes speed, distance

The same arguments give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

HEADER = (
    ",trans_date_trans_time,cc_num,merchant,category,amt,first,last,gender,street,city,state,zip,"
    "lat,long,city_pop,job,dob,trans_num,unix_time,merch_lat,merch_long,is_fraud\n"
)

UNIX_TIME_LAG_S = 2_557 * 86_400
"""The Kaggle file's unix_time is this far behind its trans_date_trans_time."""

MERCHANTS = 700
COMPROMISED_MERCHANTS = 12
CHUNK_ROWS = 50_000
NEAR_DEGREES = 0.6
HOUR_WEIGHTS = np.array(
    [2, 1, 1, 1, 1, 2, 4, 6, 8, 9, 9, 10, 11, 10, 9, 9, 9, 10, 11, 10, 8, 6, 4, 3], dtype=float
)

# Category: share of payments, median amount in currency units, spread of its logarithm.
CATEGORIES: dict[str, tuple[float, float, float]] = {
    "entertainment": (7, 45, 0.8),
    "food_dining": (8, 38, 0.7),
    "gas_transport": (11, 58, 0.35),
    "grocery_net": (4, 48, 0.5),
    "grocery_pos": (10, 96, 0.5),
    "health_fitness": (7, 40, 0.7),
    "home": (9, 46, 0.7),
    "kids_pets": (9, 44, 0.7),
    "misc_net": (5, 26, 1.2),
    "misc_pos": (6, 22, 1.2),
    "personal_care": (7, 30, 0.8),
    "shopping_net": (8, 24, 1.4),
    "shopping_pos": (9, 20, 1.4),
    "travel": (3, 16, 1.5),
}

_GIVEN = [
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Elif",
    "Femi",
    "Gus",
    "Hana",
    "Ivo",
    "June",
    "Kofi",
    "Lena",
    "Milo",
    "Nora",
    "Omar",
    "Pia",
    "Quin",
    "Rosa",
    "Sam",
    "Tess",
]
_FAMILY = [
    "Adler",
    "Baum",
    "Castro",
    "Dubois",
    "Ekman",
    "Fischer",
    "Gallo",
    "Hughes",
    "Ito",
    "Jansen",
    "Kovacs",
    "Lopez",
    "Meyer",
    "Novak",
    "Okoye",
    "Park",
]
_STREETS = [
    "Birch",
    "Cedar",
    "Dover",
    "Elm",
    "Fern",
    "Grove",
    "Harbor",
    "Iris",
    "Juniper",
    "Kings",
    "Linden",
    "Maple",
]
_JOBS = ("Nurse", "Teacher", "Welder", "Engineer, civil", "Chef", "Pilot", "Clerk", "Farmer")
_FIRMS = [
    "Anchor",
    "Beacon",
    "Compass",
    "Dune",
    "Ember",
    "Falcon",
    "Gable",
    "Harvest",
    "Indigo",
    "Jade",
    "Keystone",
    "Lantern",
]
_ENDINGS = ("and Sons", "Group", "Ltd", "PLC", "Brothers", "Inc", "LLC", "& Co, Retail")
_STATES = [
    "CA",
    "TX",
    "NY",
    "FL",
    "WA",
    "CO",
    "IL",
    "GA",
    "OH",
    "PA",
    "AZ",
    "MN",
    "NC",
    "OR",
    "VA",
    "TN",
    "UT",
    "LA",
]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to generate."""

    rows: int
    """Transactions in all."""
    cards: int
    """Cards among which they are spread."""
    start: datetime
    """Instant of the earliest possible transaction."""
    days: float
    """Length of the time they are spread over."""
    fraud_share: float
    """Share of the rows that are fraud, roughly."""
    seed: int
    """The same seed gives the same bytes."""


@dataclass(slots=True)
class _Payments:
    """(n,) columns."""

    card: npt.NDArray[np.int64]
    time_s: npt.NDArray[np.int64]
    merchant: npt.NDArray[np.int64]
    amount_cents: npt.NDArray[np.int64]
    latitude: npt.NDArray[np.float64]
    longitude: npt.NDArray[np.float64]
    is_fraud: npt.NDArray[np.bool_]


class Generator:
    """One generated world and its payments."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._rng = np.random.default_rng(plan.seed)
        rng, n = self._rng, plan.cards
        self._latitude = rng.uniform(30.0, 46.0, n).round(4)
        self._longitude = rng.uniform(-120.0, -75.0, n).round(4)
        self._spend = np.exp(rng.normal(0.0, 0.35, n))
        share, median, sigma = np.array(list(CATEGORIES.values())).T
        self._merchant_category = np.concatenate(
            (
                np.arange(len(CATEGORIES)),
                rng.choice(len(CATEGORIES), MERCHANTS - len(CATEGORIES), p=share / share.sum()),
            )
        )
        self._median, self._sigma = median, sigma
        self._compromised = rng.choice(MERCHANTS, COMPROMISED_MERCHANTS, replace=False)
        self._cards = [self._card_text(i) for i in range(n)]
        self._numbers = self._card_numbers()
        names = list(CATEGORIES)
        self._merchants = [
            self._merchant_text(i, names[category])
            for i, category in enumerate(self._merchant_category.tolist())
        ]

    def _card_numbers(self) -> list[str]:
        """Distinct numbers of 12 to 19 digits, most of 16."""
        rng, n = self._rng, self._plan.cards
        digits = rng.choice([12, 13, 15, 16, 19], n, p=[0.05, 0.05, 0.1, 0.7, 0.1]).tolist()
        # Odd and not a multiple of 5, hence distinct for 10**8 cards.
        tails = (np.arange(n) * 61_803_399 + int(rng.integers(10**8))) % 10**8
        heads = rng.integers(10**10, 10**11, n).tolist()
        return [
            f"4{head}"[: count - 8] + f"{tail:08}"
            for count, head, tail in zip(digits, heads, tails.tolist(), strict=True)
        ]

    def _card_text(self, i: int) -> str:
        """The columns from first to dob, which are the card holder's."""
        rng = self._rng
        pick = rng.integers(0, 10_000, 6).tolist()
        state = _STATES[pick[0] % len(_STATES)]
        born = np.datetime64("1940-01-01") + int(rng.integers(0, 23_000))
        job = _JOBS[pick[1] % len(_JOBS)]
        job = f'"{job}"' if "," in job else job
        return (
            f"{_GIVEN[pick[2] % len(_GIVEN)]},{_FAMILY[pick[3] % len(_FAMILY)]},"
            f"{'FM'[pick[4] % 2]},{pick[5]} {_STREETS[pick[5] % len(_STREETS)]} Street,"
            f"{_STREETS[pick[3] % len(_STREETS)]}ville,{state},{(pick[0] * 7 + 501) % 100_000:05},"
            f"{self._latitude[i]:.4f},{self._longitude[i]:.4f},"
            f"{int(np.exp(rng.uniform(4, 14)))},{job},{born}"
        )

    def _merchant_text(self, i: int, category: str) -> str:
        firm, second = _FIRMS[i % len(_FIRMS)], _FAMILY[i // len(_FIRMS) % len(_FAMILY)]
        ending = _ENDINGS[i // (len(_FIRMS) * len(_FAMILY)) % len(_ENDINGS)]
        name = f"fraud_{firm} {second} {ending}"
        return f'"{name}",{category}' if "," in name else f"{name},{category}"

    # --- payments ---------------------------------------------------------------------------

    def payments(self) -> _Payments:
        """Every payment, in order of time."""
        plan = self._plan
        families = (self._burst, self._jump, self._compromise, self._travel)
        target = int(plan.rows * plan.fraud_share / len(families))
        parts = [family(target) for family in families] if target else []
        frauds = sum(len(part.card) for part in parts)
        parts.append(self._honest(max(0, plan.rows - frauds)))
        merged = _Payments(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in _Payments.__slots__
            )
        )
        order = np.argsort(merged.time_s, kind="stable")[: plan.rows]
        return _Payments(*(getattr(merged, name)[order] for name in _Payments.__slots__))

    def _times(self, n: int, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Instants over all days, by weights of the hour."""
        rng = self._rng
        day = rng.integers(0, max(1, round(self._plan.days)), n)
        hour = rng.choice(24, n, p=weights / weights.sum())
        start = int(self._plan.start.timestamp())
        midnight = start - start % 86_400
        time_s = midnight + day * 86_400 + hour * 3_600 + rng.integers(0, 3_600, n)
        span = max(1, int(self._plan.days * 86_400))
        return start + (time_s - start) % span

    def _amounts(
        self, card: npt.NDArray[np.int64], merchant: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        category = self._merchant_category[merchant]
        logarithm = self._rng.normal(0.0, 1.0, len(card)) * self._sigma[category]
        amount = self._median[category] * self._spend[card] * np.exp(logarithm)
        cents: npt.NDArray[np.int64] = np.clip(np.rint(amount * 100), 100, 3_000_000).astype(
            np.int64
        )
        return cents

    def _near(
        self, card: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        offsets = self._rng.uniform(-NEAR_DEGREES, NEAR_DEGREES, (2, len(card)))
        return self._latitude[card] + offsets[0], self._longitude[card] + offsets[1]

    def _make(
        self,
        card: npt.NDArray[np.int64],
        time_s: npt.NDArray[np.int64],
        merchant: npt.NDArray[np.int64],
        *,
        fraud: bool,
    ) -> _Payments:
        return _Payments(
            card,
            time_s,
            merchant,
            self._amounts(card, merchant),
            *self._near(card),
            np.full(len(card), fraud),
        )

    def _honest(self, n: int) -> _Payments:
        rng = self._rng
        weight = np.exp(rng.normal(0.0, 0.6, self._plan.cards))
        card = rng.choice(self._plan.cards, n, p=weight / weight.sum())
        merchant = rng.integers(0, MERCHANTS, n)
        return self._make(card, self._times(n, HOUR_WEIGHTS), merchant, fraud=False)

    def _burst(self, n: int) -> _Payments:
        """Six to twelve payments within twenty minutes of the night."""
        rng = self._rng
        events = max(1, n // 9)
        size = rng.integers(6, 13, events)
        night = np.where(np.arange(24) < 5, 1.0, 0.0)
        begin = np.repeat(self._times(events, night), size)
        card = np.repeat(rng.integers(0, self._plan.cards, events), size)
        time_s = begin + rng.integers(0, 1_200, len(card))
        return self._make(card, time_s, rng.integers(0, MERCHANTS, len(card)), fraud=True)

    def _jump(self, n: int) -> _Payments:
        """One payment of eight to twenty times the usual."""
        rng = self._rng
        card = rng.integers(0, self._plan.cards, n)
        made = self._make(
            card, self._times(n, HOUR_WEIGHTS), rng.integers(0, MERCHANTS, n), fraud=True
        )
        made.amount_cents = (made.amount_cents + 5_000) * rng.integers(8, 21, n)
        return made

    def _compromise(self, n: int) -> _Payments:
        """Payments at merchants that leaked, inconspicuous otherwise."""
        rng = self._rng
        merchant = rng.choice(self._compromised, n)
        card = rng.integers(0, self._plan.cards, n)
        return self._make(card, self._times(n, HOUR_WEIGHTS), merchant, fraud=True)

    def _travel(self, n: int) -> _Payments:
        """An honest payment near home, and minutes later one far away."""
        rng = self._rng
        pairs = max(1, n)
        card = rng.integers(0, self._plan.cards, pairs)
        time_s = self._times(pairs, HOUR_WEIGHTS)
        home = self._make(card, time_s, rng.integers(0, MERCHANTS, pairs), fraud=False)
        away = self._make(
            card,
            time_s + rng.integers(300, 2_400, pairs),
            rng.integers(0, MERCHANTS, pairs),
            fraud=True,
        )
        away.latitude = np.clip(away.latitude + rng.uniform(5, 10, pairs), -85, 85)
        away.longitude = away.longitude + rng.uniform(10, 30, pairs)
        return _Payments(
            *(
                np.concatenate((getattr(home, name), getattr(away, name)))
                for name in _Payments.__slots__
            )
        )

    # --- text -------------------------------------------------------------------------------

    def chunks(self) -> Iterator[tuple[str, int]]:
        """The file's text behind its header, in pieces, and how many rows are in each."""
        made = self.payments()
        for begin in range(0, len(made.card), CHUNK_ROWS):
            part = slice(begin, begin + CHUNK_ROWS)
            n = len(made.card[part])
            ids = self._rng.bytes(16 * n).hex()
            times = np.datetime_as_string(made.time_s[part].astype("datetime64[s]")).tolist()
            columns = zip(
                range(begin, begin + n),
                times,
                made.card[part].tolist(),
                made.merchant[part].tolist(),
                made.amount_cents[part].tolist(),
                made.time_s[part].tolist(),
                made.latitude[part].tolist(),
                made.longitude[part].tolist(),
                made.is_fraud[part].tolist(),
                strict=True,
            )
            lines = [
                f"{i},{time[:10]} {time[11:]},{self._numbers[card]},{self._merchants[merchant]},"
                f"{cents // 100}.{cents % 100:02},{self._cards[card]},"
                f"{ids[32 * (i - begin) : 32 * (i - begin) + 32]},{time_s - UNIX_TIME_LAG_S},"
                f"{latitude:.6f},{longitude:.6f},{fraud:d}\n"
                for i, time, card, merchant, cents, time_s, latitude, longitude, fraud in columns
            ]
            yield "".join(lines), n


def default_plan(rows: int, seed: int = 0, *, start: datetime | None = None) -> Plan:
    """About 100 payments a card over 60 days, half a percent of them fraud."""
    return Plan(
        rows=rows,
        cards=max(1, rows // 100),
        start=start or datetime(2024, 1, 1, tzinfo=UTC),
        days=60.0,
        fraud_share=0.005,
        seed=seed,
    )
