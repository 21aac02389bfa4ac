"""Brings the two stores in line: Redis to what Postgres says, while events are applied to both.

Postgres is written first, Redis afterwards. Hence, whatever Redis holds of a card at one moment,
Postgres has from that moment on; and what Postgres has and Redis lacks may be on its way. A value is
therefore never simply set. Of each card, in this order:

    read from Postgres      what Redis should hold
    read from Redis         the same: done
                            nothing: set, unless somebody was faster
                            something else: look again, the other way round
    ── again ──
    read from Redis         what it holds
    read from Postgres      what it should hold; all that is in the former is in it
    append                  where it only lacks something
    swap                    where it holds something else, and still what was read; or look again

No lock is held, and nothing newer is overwritten: whoever appends in between makes a swap fail.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import structlog

from features import RECORD
from features.ledger import HEADER, NEVER_DROPPED, Records, decode_header, is_ledger
from stores.conditions import IDS_END, of_cards
from stores.errors import NotReadyError
from stores.history import History
from stores.postgres import OfflineStore
from stores.publishing import publish_merchants
from stores.redis_store import (
    OnlineStore,
    card_of_key,
    is_ledger_key,
    ledger_key,
    profile_key,
)
from stores.values import encoded_profiles, ledgers_of_histories

CARDS_TOGETHER = 500
"""Cards that are looked at again, or looked for, together."""
LOOKS_MAX = 50
"""How often a card is looked at again that changes all the time."""
PAUSE_S = 0.02
DRY_LOOKS, DRY_PAUSE_S = 4, 0.5
"""How often, and how far apart, cards must differ to be counted when nothing is written: longer than a
batch of the stream takes from one store to the other."""
LOGGED_MAX = 100
"""Cards that are named in the log."""

log = structlog.get_logger()

Values = dict[bytes, bytes]
"""By their keys in Redis."""


@dataclass(frozen=True, slots=True)
class SyncProgress:
    """How far a run has come."""

    run_id: str
    cards_done: int = 0
    cards_total: int = 0
    """About; 0 while it is not known."""
    transactions_written: int = 0
    """Records in the ledgers that were written."""
    cards_differing: int = 0
    """Cards of which the two stores did not hold the same."""
    is_done: bool = False


Run = Generator[SyncProgress, None, None]


@dataclass(frozen=True, slots=True)
class _Look:
    """What Redis held of some cards, and what Postgres had right afterwards, by keys."""

    held: dict[bytes, bytes | None]
    wanted: Values
    histories: dict[bytes, Records]
    """All records of each card of which none was dropped, by its ledger's key."""

    @property
    def wrong(self) -> list[bytes]:
        """The keys whose values are not the same."""
        return [key for key, value in self.held.items() if value != self.wanted.get(key)]

    def only_lacks(self, key: bytes) -> bool:
        """Whether a ledger has nothing that it should not have. Then what it lacks is added, which
        nobody who appends meanwhile can make fail."""
        ledger = self.held[key]
        if key not in self.histories or key not in self.wanted:
            return False
        # What an append finds dropped stays so: it is not put right by one.
        return ledger is None or (
            is_ledger(ledger)
            and decode_header(ledger) <= decode_header(self.wanted[key])
            and not has_strangers(ledger, self.histories[key])
        )


class Syncer:
    """One run. It is begun by iterating over what its methods return."""

    def __init__(
        self,
        offline: OfflineStore,
        online: OnlineStore,
        *,
        card_key_fingerprint: str,
        probe_id: bytes | None = None,
        dry_run: bool = False,
        alone: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Takes the stores, both of the same card key.

        Args:
            offline: what is true.
            online: what is brought in line.
            card_key_fingerprint: of the key that both are written under.
            probe_id: the card of freshness probes, of which Postgres has nothing.
            dry_run: compare and count, and write nothing.
            alone: nobody else writes: values are set without being compared first.
            sleep: waits between looks.
        """
        self._offline, self._online = offline, online
        self._fingerprint, self._probe = card_key_fingerprint, probe_id
        self._dry_run, self._alone, self._sleep = dry_run, alone, sleep
        self._progress = SyncProgress(secrets.token_hex(8))

    # --- Postgres to Redis ------------------------------------------------------------------

    def everything(self) -> Run:
        """Every card; a store that had lost its data is then complete.

        Raises:
            StoreError: a store does not answer, or Redis lost its data meanwhile.
        """
        was_complete = self._online.is_initialised
        token = None if was_complete or self._dry_run else self._online.begin_rebuild()
        with History(self._offline.url) as history:
            for span in history.spans():
                values = {
                    ledger_key(card_id): ledger
                    for card_id, ledger in ledgers_of_histories(span.card_ids, span.ledgers)
                }
                values.update(encoded_profiles(history.profile_rows(span.where)))
                self._bring(values)
                done = self._progress.cards_done + len(span.card_ids)
                total = round(done * IDS_END / span.end)
                self._progress = replace(self._progress, cards_done=done, cards_total=total)
                yield self._progress
        for cards in _chunks(self._online.cards_with_values()):
            known = set(self._offline.known_cards(cards))
            strangers = [card for card in cards if card not in known and card != self._probe]
            if strangers:
                self._look_again(strangers)
                yield self._progress
        if not self._dry_run:
            publish_merchants(self._offline, self._online)
        if token is not None:
            self._declare_complete(token)
        yield self._end()

    def _declare_complete(self, token: str) -> None:
        # Where there is a stream, it says how complete the store is, as soon as it is looked at.
        has_stream = bool(self._offline.stream_progress())
        newest_ms = -1 if has_stream else self._offline.newest_finished_ms()
        self._online.initialise(
            self._fingerprint, newest_ms, self._offline.unfinished_loads(), token=token
        )

    def some(self, cards: Iterable[bytes]) -> Run:
        """Some cards alone.

        Raises:
            StoreError: a store does not answer.
        """
        chosen = sorted(set(cards))
        self._progress = replace(self._progress, cards_total=len(chosen))
        for chunk in _chunks(chosen):
            self._look_again(chunk)
            done = self._progress.cards_done + len(chunk)
            self._progress = replace(self._progress, cards_done=done)
            yield self._progress
        yield self._end()

    def _end(self) -> SyncProgress:
        self._progress = replace(
            self._progress, is_done=True, cards_total=self._progress.cards_done
        )
        return self._progress

    def _bring(self, values: Values) -> None:
        """Brings values in line that were read from Postgres a moment ago."""
        if self._alone:
            self._online.put_whole(values.items())
            self._count(values, {card_of_key(key) for key in values})
            return
        keys = list(values)
        held = dict(zip(keys, self._online.read(keys), strict=True))
        missing = [key for key in keys if held[key] is None]
        differing = {card_of_key(key) for key in keys if held[key] not in (None, values[key])}
        if self._dry_run:
            # Of what is missing, something may be on its way.
            self._look_again(sorted(differing | {card_of_key(key) for key in missing}))
            return
        was_set = self._online.put_missing((key, values[key]) for key in missing)
        done = {key for key, is_set in zip(missing, was_set, strict=True) if is_set}
        differing |= {card_of_key(key) for key in missing if key not in done}
        self._count({key: values[key] for key in done}, {card_of_key(key) for key in done})
        if differing:
            self._look_again(sorted(differing))

    def _look_again(self, cards: Sequence[bytes]) -> None:
        """Brings cards in line, reading Redis first."""
        if self._dry_run:
            self._count({}, self._still_differing(cards))
            return
        open_cards, differing = list(cards), set[bytes]()
        with History(self._offline.url) as history:
            for _ in range(LOOKS_MAX):
                look = self._look(history, open_cards)
                lacking = [key for key in look.wrong if look.only_lacks(key)]
                self._online.append(
                    (card_of_key(key), look.histories[key].tobytes()) for key in lacking
                )
                rest = [key for key in look.wrong if key not in set(lacking)]
                swapped = self._online.swap(
                    (key, look.held[key], look.wanted.get(key)) for key in rest
                )
                done = {key for key, is_done in zip(rest, swapped, strict=True) if is_done}
                done.update(lacking)
                changed = {card_of_key(key) for key in done} - differing
                differing |= changed
                written = {key: look.wanted[key] for key in done if key in look.wanted}
                self._count(written, changed)
                open_cards = sorted({card_of_key(key) for key in look.wrong if key not in done})
                if not open_cards:
                    return
                self._sleep(PAUSE_S)
        text = f"{len(open_cards)} cards change faster than they can be looked at: try again later"
        raise NotReadyError("redis", text)

    def _still_differing(self, cards: Sequence[bytes]) -> set[bytes]:
        """Those that differ for longer than anything is on its way."""
        differing = set(cards)
        with History(self._offline.url) as history:
            for _ in range(DRY_LOOKS):
                look = self._look(history, sorted(differing))
                differing = {card_of_key(key) for key in look.wrong}
                if not differing:
                    break
                self._sleep(DRY_PAUSE_S)
        return differing

    def _look(self, history: History, cards: Sequence[bytes]) -> _Look:
        """What Redis holds of cards, and what it should, read in this order."""
        keys = [key for card in cards for key in (ledger_key(card), profile_key(card))]
        held = dict(zip(keys, self._online.read(keys), strict=True))
        history.renew()
        wanted: Values = {}
        histories: dict[bytes, Records] = {}
        for begin, end, ledgers, _ in history.read(cards):
            some = cards[begin:end]
            found = ledgers_of_histories(some, ledgers)
            wanted.update((ledger_key(card_id), ledger) for card_id, ledger in found)
            wanted.update(encoded_profiles(history.profile_rows(of_cards(some))))
            for number, card in enumerate(some):
                part = slice(ledgers.offsets[number], ledgers.offsets[number + 1])
                if ledgers.dropped_ms[number] == NEVER_DROPPED:
                    histories[ledger_key(card)] = ledgers.records[part]
        return _Look(held, wanted, histories)

    def _count(self, written: Values, cards: set[bytes]) -> None:
        """Counts what was written, and the cards that did not hold the same."""
        progress = self._progress
        self._progress = replace(
            progress,
            transactions_written=progress.transactions_written
            + sum(_records(value) for key, value in written.items() if is_ledger_key(key)),
            cards_differing=progress.cards_differing + len(cards),
        )

    # --- Redis to Postgres ------------------------------------------------------------------

    def audit(self, cards: Iterable[bytes] | None = None) -> Run:
        """Counts the cards of which Redis holds transactions that Postgres lacks.

        Args:
            cards: these; all of which Redis has a ledger where that is None.

        Raises:
            StoreError: a store does not answer.
        """
        differing: set[bytes] = set()
        for chunk in _chunks(self._online.cards_with_ledgers() if cards is None else cards):
            looked_at = [card for card in chunk if card != self._probe]
            held = self._online.read([ledger_key(card) for card in looked_at])
            with History(self._offline.url) as history:
                for begin, end, histories, _ in history.read(looked_at):
                    for number, card in enumerate(looked_at[begin:end]):
                        ledger = held[begin + number]
                        part = slice(histories.offsets[number], histories.offsets[number + 1])
                        if ledger is not None and (
                            not is_ledger(ledger) or has_strangers(ledger, histories.records[part])
                        ):
                            differing.add(card)
            done = self._progress.cards_done + len(chunk)
            self._progress = replace(
                self._progress, cards_done=done, cards_differing=len(differing)
            )
            yield self._progress
        for card in sorted(differing)[:LOGGED_MAX]:
            log.warning("redis holds transactions that postgres lacks", card_id=card.hex())
        yield self._end()


def has_strangers(ledger: bytes, records: Records) -> bool:
    """Whether a ledger has a record that is not among these."""
    size = RECORD.itemsize
    held = np.frombuffer(ledger, f"V{size}", offset=HEADER.size).tolist()
    return not set(held) <= set(records.view(f"V{size}").tolist())


def _records(ledger: bytes) -> int:
    return (len(ledger) - HEADER.size) // RECORD.itemsize


def _chunks(cards: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Cards, CARDS_TOGETHER at a time, each once."""
    chunk: dict[bytes, None] = {}
    for card in cards:
        chunk[card] = None
        if len(chunk) == CARDS_TOGETHER:
            yield list(chunk)
            chunk = {}
    if chunk:
        yield list(chunk)
