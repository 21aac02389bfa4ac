"""What Redis holds of cards, made from what Postgres has: values by their keys, to the same bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from features import Ledgers, encode_ledger, encode_profile
from features.ledger import NEVER_DROPPED
from stores.arrow import by_card, to_profile_records
from stores.redis_store import profile_key


def ledgers_of_histories(
    card_ids: Sequence[bytes], histories: Ledgers
) -> Iterator[tuple[bytes, bytes]]:
    """(card id, ledger) of each card that has a history, by the ledger's own rules."""
    bounds = histories.offsets.tolist()
    dropped = histories.dropped_ms.tolist()
    for card_id, begin, end, dropped_ms in zip(card_ids, bounds, bounds[1:], dropped, strict=False):
        if begin < end or dropped_ms != NEVER_DROPPED:
            yield card_id, encode_ledger(histories.records[begin:end], dropped_ms)


def encoded_profiles(profiles: pa.Table) -> Iterator[tuple[bytes, bytes]]:
    """(key, profile) of each card in a table of whole cards, of PROFILES."""
    numbers, cards = by_card(profiles["card_id"])
    order = np.argsort(numbers, kind="stable")
    records = to_profile_records(profiles)[order]
    bounds = np.searchsorted(numbers[order], np.arange(len(cards) + 1))
    for number, card_id in enumerate(cards):
        yield (
            profile_key(card_id),
            encode_profile(records[bounds[number] : bounds[number + 1]]),
        )
