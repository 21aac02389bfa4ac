"""Conditions in SQL of which rows to read, for the bulk connections, which take no parameters.

Whatever goes into them is a number or bytes, and is written down as such.
"""

from __future__ import annotations

from collections.abc import Sequence

from features.keys import CARD_ID_BYTES

IDS_END = 1 << (8 * CARD_ID_BYTES)
"""Behind the last card id, as a number."""

Range = tuple[int | None, int | None]
"""The first instant of a range, and the first one behind it, in ms; None where it is open."""


def during(within: Range) -> str:
    """A range of event times, as a further condition."""
    from_ms, before_ms = within
    where = ""
    if from_ms is not None:
        where += f" AND event_time >= {instant(from_ms * 1000)}"
    if before_ms is not None:
        where += f" AND event_time < {instant(before_ms * 1000)}"
    return where


def of_cards(card_ids: Sequence[bytes]) -> str:
    """Some cards, at least one."""
    return f"card_id IN ({', '.join(map(_literal, card_ids))})"


def with_merchants(keys: Sequence[bytes]) -> str:
    """Some merchants, at least one."""
    return f"merchant_key IN ({', '.join(map(_literal, keys))})"


def with_ids(begin: int, end: int) -> str:
    """All cards whose ids, as numbers, are from `begin` to before `end`."""
    where = f"card_id >= {_literal(begin.to_bytes(CARD_ID_BYTES, 'big'))}"
    if end < IDS_END:
        where += f" AND card_id < {_literal(end.to_bytes(CARD_ID_BYTES, 'big'))}"
    return where


def seen_by(snapshot: str) -> str:
    """Whether a row was written by what a snapshot, of pg_current_snapshot(), saw."""
    oldest = snapshot.partition(":")[0]
    # Nearly all rows are older than whatever was under way then: the first is quickly said.
    return (
        f"(ingested_xid < '{oldest}'::xid8 "
        f"OR pg_visible_in_snapshot(ingested_xid, '{snapshot}'::pg_snapshot))"
    )


def instant(time_us: int) -> str:
    """An instant, exactly: arithmetic of intervals is that of integers."""
    return f"(timestamptz 'epoch' + interval '{time_us} microseconds')"


def _literal(value: bytes) -> str:
    return f"'\\x{value.hex()}'"
