"""Rebuilds the online store from the offline one, to the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from features import encode_ledger, encode_profile
from features.ledger import Records, sort_unique_by_card
from stores.arrow import PROFILES, Column, by_card, records_of, runs_of_cards, to_profile_records
from stores.postgres import OfflineStore
from stores.redis_store import OnlineStore, ledger_key, profile_key

_RECORDS = """
SELECT card_id, record FROM transactions ORDER BY card_id
"""

_PROFILES = f"""
SELECT {", ".join(PROFILES.names)} FROM profiles ORDER BY card_id
"""


def rebuild_online_store(
    offline: OfflineStore,
    online: OnlineStore,
    card_key_fingerprint: str,
    report: Callable[[int], None] = lambda cards: None,
) -> int:
    """Writes every card's ledger and profile anew, and declares the online store complete.

    For an online store that lost its data, while nothing else writes to it. Until the end it says
    that it is not complete. Started again after a stop, it begins anew and ends the same.

    Args:
        offline: what is true.
        online: what is rebuilt; its functions are installed.
        card_key_fingerprint: of the key that both are written under.
        report: told how many cards have been written so far.

    Returns:
        How many cards were written.
    """
    cards = 0
    online.declare_incomplete()
    for recorded in runs_of_cards(offline.read(_RECORDS)):
        ledgers = list(encoded_ledgers(recorded["card_id"], records_of(recorded["record"])))
        online.put_whole(ledgers)
        cards += len(ledgers)
        report(cards)
    for profiles in runs_of_cards(offline.read(_PROFILES)):
        online.put_whole(encoded_profiles(profiles))
    # Where there is a stream, it says how complete the store is, as soon as it is looked at.
    newest_ms = -1 if offline.stream_progress() else offline.newest_finished_ms()
    online.initialise(card_key_fingerprint, newest_ms, offline.unfinished_loads())
    return cards


def encoded_ledgers(card_ids: Column, records: Records) -> Iterator[tuple[bytes, bytes]]:
    """(key, ledger) of each card, whose records (n,) are all given, in any order."""
    numbers, cards = by_card(card_ids)
    ordered, offsets = sort_unique_by_card(numbers, records, len(cards))
    for number, card_id in enumerate(cards):
        yield ledger_key(card_id), encode_ledger(ordered[offsets[number] : offsets[number + 1]])


def encoded_profiles(profiles: pa.Table) -> Iterator[tuple[bytes, bytes]]:
    """(key, profile) of each card in a table of whole cards."""
    numbers, cards = by_card(profiles["card_id"])
    order = np.argsort(numbers, kind="stable")
    records = to_profile_records(profiles)[order]
    bounds = np.searchsorted(numbers[order], np.arange(len(cards) + 1))
    for number, card_id in enumerate(cards):
        yield (
            profile_key(card_id),
            encode_profile(records[bounds[number] : bounds[number + 1]]),
        )
