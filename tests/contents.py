"""Everything that two installations hold, to be compared byte for byte and row for row."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from stores.redis_store import ledger_key, profile_key
from tests.conftest import Stack

_TABLES = {
    "transactions": """
        SELECT t.card_id, t.event_time, t.transaction_id, t.amount_minor, t.merchant, t.category,
               t.merchant_latitude, t.merchant_longitude
        FROM transactions t WHERE t.card_id = ANY(%s) ORDER BY t.transaction_id
    """,
    "labels": """
        SELECT l.transaction_id, l.is_fraud, l.label_time
        FROM labels l JOIN transactions t USING (transaction_id)
        WHERE t.card_id = ANY(%s) ORDER BY l.transaction_id
    """,
    "profiles": """
        SELECT card_id, content, min(valid_from), gender, birth_date, job, home_latitude,
               home_longitude, city, state, zip, city_pop
        FROM profiles WHERE card_id = ANY(%s)
        GROUP BY card_id, content, gender, birth_date, job, home_latitude, home_longitude, city,
                 state, zip, city_pop
    """,
    # Text, in which a float8 is written to its last bit, and NaN equals NaN.
    "features": """
        SELECT f.transaction_id, f.event_time, f.catalog_fingerprint, f.feature_values::text
        FROM features f JOIN transactions t USING (transaction_id)
        WHERE t.card_id = ANY(%s) ORDER BY f.transaction_id
    """,
}
_CARDS = """
SELECT card_id FROM transactions UNION SELECT card_id FROM profiles ORDER BY 1
"""


@dataclass(frozen=True)
class Contents:
    """What both stores hold of some cards."""

    ledgers: dict[bytes, bytes | None]
    profiles: dict[bytes, bytes | None]
    tables: dict[str, list[tuple[Any, ...]]]

    def differences(self, other: Contents, *, without: Collection[str] = ()) -> list[str]:
        """What of this is not the same there; names of tables and Redis values, with counts."""
        found = []
        for name, here, there in (
            ("ledgers in Redis", self.ledgers, other.ledgers),
            ("profiles in Redis", self.profiles, other.profiles),
        ):
            keys = {k for k in here.keys() | there.keys() if here.get(k) != there.get(k)}
            if keys and name not in without:
                found.append(f"{name}: {len(keys)} of {len(here)} differ")
        for name, rows in self.tables.items():
            if name in without:
                continue
            # Rows that are the same, however often: an id twice would be a difference of counts.
            unlike = set(rows) ^ set(other.tables[name])
            if unlike or len(rows) != len(other.tables[name]):
                found.append(
                    f"{name}: {len(rows)} rows and {len(other.tables[name])}, "
                    f"{len(unlike)} of them in one alone"
                )
        return found


def contents(stack: Stack, card_ids: Collection[bytes] | None = None) -> Contents:
    """What both stores of a stack hold of these cards, or of all."""
    offline, online = stack.offline(), stack.online()
    try:
        if card_ids is None:
            card_ids = [card_id for (card_id,) in offline.sql.execute(_CARDS)]
        cards = sorted(card_ids)
        return Contents(
            dict(zip(cards, online.read([ledger_key(card) for card in cards]), strict=True)),
            dict(zip(cards, online.read([profile_key(card) for card in cards]), strict=True)),
            {
                name: offline.sql.execute(query, (cards,)).fetchall()
                for name, query in _TABLES.items()
            },
        )
    finally:
        offline.close()
        online.close()
