"""Loads files into both stores: read, write to Postgres, write to Redis, three steps at a time.

    read a batch ──▶ Postgres accepts what is new ──▶ Redis appends what is true
     (main thread)    (two connections)                (one thread)

Postgres decides: a row whose id it knows with another content goes to the rejects. Every other row
goes on to Redis, known ones too, where appending again changes nothing. Hence a load that was
killed anywhere is simply run again, and ends with the same stores.
"""

from __future__ import annotations

import shlex
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import blake2b
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
from tally.sources import Place, Source, SourceError, find

from features import CardKey
from features.ledger import Records
from ingest.accept import Acceptance, Acceptors
from ingest.dates import DateOrder, FileDates
from ingest.files import TextBatch, read_source, rereads
from ingest.kaggle import Facts, convert
from ingest.kept_out import KeptOut
from ingest.masking import masked, masked_card, masked_digits
from ingest.profiles import profiles_of
from ingest.rejects import Reject, RejectsFile
from stores.arrow import by_card, bytes_by_card, records_of, to_ms, to_profile_records
from stores.postgres import OfflineStore
from stores.publishing import withdraw_merchants
from stores.redis_store import OnlineStore

BATCHES_IN_FLIGHT_MAX = 4
"""Batches between reading and the end of writing: bounds memory."""
APPEND_ROWS = 250_000
"""Rows that are gathered for Redis, about 60 bytes each: every append of a card costs the same,
whether it brings one row or ten."""
PROFILES_REMEMBERED_MAX = 500_000
"""Profiles known to be stored, so that they are not sent again; then all are forgotten."""
CARDS_REMEMBERED_MAX = 100_000
"""Card numbers whose ids are remembered while a file is loaded, about 20 MB; never written down."""
TIDY_ROWS = 100_000
"""New rows that are worth tidying up after."""


@dataclass(slots=True)
class Outcome:
    """What a load came to."""

    read: int = 0
    """Rows seen."""
    loaded: int = 0
    """Rows that were new."""
    duplicates: int = 0
    """Rows that were known already, with the same content."""
    rejected: int = 0
    """Rows that could not be read, or contradict what is known."""
    kept_out: int = 0
    """Rows of the past of erased cards, or older than what is kept: nothing of them stays."""
    rejects_file: str | None = None
    """Where the latter are; None where there are none."""
    seconds: float = 0.0
    """How long it took."""


class UnfinishedLoadError(SourceError):
    """A file that could not be read to its end: what was readable is loaded, and the load unfinished."""


def load_id(source: Source) -> str:
    """Names a load by its file: name, size and beginning. The same file again is the same load.

    Of a pipe the size is not known; that of a compressed file does not count, so that a whole one is the
    same load as one that was cut off.
    """
    size = None if source.codec else source.size_bytes
    text = f"{source.name}\0{'' if size is None else size}\0".encode()
    return blake2b(text + source.head, digest_size=8).hexdigest()


def described(source: Source) -> str:
    """What stores say of a load: its file's name, without a card number."""
    return masked_digits(source.name)


class Loader:
    """Loads files, one after the other."""

    def __init__(
        self,
        offline: OfflineStore,
        online: OnlineStore,
        card_key: CardKey,
        rejects_folder: Path,
        *,
        date_order: DateOrder | None = None,
        advance: Callable[[int], None] = lambda bytes_read: None,
    ) -> None:
        """Takes open stores.

        Args:
            offline: Postgres.
            online: Redis, initialised.
            card_key: replaces card numbers.
            rejects_folder: where rejects files go.
            date_order: of dates such as 08/02/2024; by default each file must settle it.
            advance: told how many bytes of the file were read since last told.
        """
        self._offline = offline
        self._online = online
        self._card_id = lru_cache(maxsize=CARDS_REMEMBERED_MAX)(card_key.card_id)
        self._card_key = card_key
        self._rejects_folder = rejects_folder
        self._date_order = date_order
        self._advance = advance
        self._profiles_stored: dict[tuple[bytes, bytes], int] = {}
        self._gathered: list[tuple[pa.ChunkedArray, Records]] = []

    def load(self, where: Path | Place, separator: str = ",") -> Outcome:
        """Loads one file.

        Args:
            where: the file.
            separator: of its columns, where it is CSV.

        Raises:
            FileFormatError, SourceError, OSError: the file cannot be read; nothing was begun.
            UnfinishedLoadError: it cannot be read to its end.
            StoreError: a store failed; run the load again.
        """
        place = where if isinstance(where, Place) else find(where)[0]
        with Source(place) as source:
            return self._load(source, separator)

    def _load(self, source: Source, separator: str) -> Outcome:
        begin, begin_ms = time.perf_counter(), time.time_ns() // 1_000_000
        batches = _begun(read_source(source, separator))
        name = load_id(source)
        outcome = Outcome()
        stem = Path(source.place.path.name).stem if source.size_bytes is not None else source.name
        rejects = RejectsFile(self._rejects_folder / f"{masked_digits(stem)}-{name}.jsonl")
        self._offline.begin_load(name, described(source))
        self._online.begin_load(name, described(source))
        dates = FileDates(self._date_order, rereads(source.place, separator))
        read = (masked_digits(source.label), batches, dates)
        newest_ms, failure = self._write_all(*read, outcome, rejects)
        newest_ms = min(newest_ms, begin_ms)  # a row of tomorrow claims nothing of tomorrow
        outcome.rejected = rejects.count
        outcome.rejects_file = str(rejects.path) if rejects.count else None
        outcome.seconds = round(time.perf_counter() - begin, 3)
        if failure is not None:
            raise UnfinishedLoadError(_what_to_do(failure, described(source), outcome)) from failure
        counts = {key: value for key, value in asdict(outcome).items() if isinstance(value, int)}
        withdraw_merchants(self._offline, self._online)
        self._offline.end_load(name, newest_ms, counts)
        self._online.end_load(name, newest_ms)
        if outcome.loaded >= TIDY_ROWS:
            self._offline.tidy()
        return outcome

    def _write_all(
        self,
        path: str,
        batches: Iterator[TextBatch],
        dates: FileDates,
        outcome: Outcome,
        rejects: RejectsFile,
    ) -> tuple[int, SourceError | None]:
        """Takes every batch through the three steps. Returns the newest event time, -1 if none, and why
        the file could not be read further, None if it was read to its end."""
        newest_ms, failures = -1, list[SourceError]()
        with Acceptors(self._offline.url) as postgres, ThreadPoolExecutor(1, "redis") as redis:
            in_flight: deque[tuple[TextBatch, Facts, Future[Acceptance], Future[None]]] = deque()

            def finish() -> None:
                nonlocal newest_ms
                batch, facts, accepted, appended = in_flight.popleft()
                appended.result()
                self._account(path, batch, facts, accepted.result(), outcome, rejects)
                times_ms = to_ms(facts.transactions["event_time"])
                true_ms = np.delete(times_ms, accepted.result().conflicts)
                newest_ms = max(newest_ms, int(true_ms.max(initial=-1)))
                self._advance(batch.bytes_read)

            kept_out = KeptOut(self._offline, self._card_key)  # for as long as the lock is held
            for batch in _until_cut_off(batches, failures):
                facts = convert(batch.table, self._card_id, datetime.now(UTC), dates)
                stays_out = kept_out.transactions(facts.transactions)
                if stays_out is not None:
                    outcome.kept_out += int(stays_out.sum())
                    facts = facts.take(~stays_out)
                accepted = postgres.submit(facts.transactions)
                appended = redis.submit(self._append, facts, accepted)
                in_flight.append((batch, facts, accepted, appended))
                if len(in_flight) >= BATCHES_IN_FLIGHT_MAX:
                    finish()
            while in_flight:
                finish()
            redis.submit(self._flush).result()
        return newest_ms, failures[0] if failures else None

    # --- profiles ---------------------------------------------------------------------------

    def _put_profiles(self, profiles: pa.Table) -> None:
        """Writes to both stores the profiles that this load has not written yet."""
        fresh = self._unstored(profiles)
        if len(fresh):
            self._offline.put_profiles(fresh)
            records = to_profile_records(fresh)
            self._online.put_profiles(
                (card_id, records[row].tobytes())
                for row, card_id in enumerate(fresh["card_id"].to_pylist())
            )

    def _unstored(self, profiles: pa.Table) -> pa.Table:
        """The profiles that are not known to be stored from this instant on."""
        if len(self._profiles_stored) > PROFILES_REMEMBERED_MAX:
            self._profiles_stored.clear()
        keys = list(
            zip(profiles["card_id"].to_pylist(), profiles["content"].to_pylist(), strict=True)
        )
        since = to_ms(profiles["valid_from"]).tolist() if keys else []
        fresh = []
        for row, (key, valid_from_ms) in enumerate(zip(keys, since, strict=True)):
            if valid_from_ms < self._profiles_stored.get(key, 2**62):
                self._profiles_stored[key] = valid_from_ms
                fresh.append(row)
        return profiles.take(pa.array(fresh, pa.int64())) if len(fresh) < len(keys) else profiles

    # --- transactions -----------------------------------------------------------------------

    def _append(self, facts: Facts, accepted: Future[Acceptance]) -> None:
        """Gathers for Redis what Postgres holds true of a batch."""
        transactions = facts.transactions
        if not len(transactions):
            return
        records, cards = records_of(transactions["record"]), transactions["card_id"]
        written = accepted.result()
        if len(written.conflicts):
            records = np.delete(records, written.conflicts)
            kept = np.delete(np.arange(len(cards)), written.conflicts)
            cards = cards.take(pa.array(kept))
        self._gathered.append((cards, records))
        if sum(len(part) for _, part in self._gathered) >= APPEND_ROWS:
            self._flush()
        self._put_profiles(profiles_of(facts, written.conflicts))

    def _flush(self) -> None:
        """Appends what was gathered."""
        gathered, self._gathered = self._gathered, []
        if not gathered:
            return
        numbers, ids = by_card(
            pa.chunked_array([c for cards, _ in gathered for c in cards.chunks], pa.binary())
        )
        records = np.concatenate([part for _, part in gathered])
        self._online.append(bytes_by_card(numbers, records, ids))

    # --- the account ------------------------------------------------------------------------

    def _account(
        self,
        path: str,
        batch: TextBatch,
        facts: Facts,
        accepted: Acceptance,
        outcome: Outcome,
        rejects: RejectsFile,
    ) -> None:
        """Counts a batch's rows, and keeps the rejected ones."""
        outcome.read += len(batch.table) + len(batch.bad_lines)
        outcome.loaded += accepted.written
        outcome.duplicates += len(facts.transactions) - accepted.written - len(accepted.conflicts)
        found = [
            Reject(path, bad.line, bad.reason, "", bad.detail, masked_digits(bad.raw))
            for bad in batch.bad_lines
        ]
        found += [
            Reject(
                path,
                int(batch.lines[problem.row]),
                problem.reason,
                problem.field,
                problem.detail,
                _raw(batch, problem.row),
            )
            for problem in facts.problems
        ]
        for position in accepted.conflicts.tolist():
            row = int(facts.rows[position])
            found.append(
                Reject(
                    path,
                    int(batch.lines[row]),
                    "CONFLICT",
                    "trans_num",
                    "this id is known with another content; the first content stays",
                    _raw(batch, row),
                )
            )
        for reject in sorted(found, key=lambda r: r.line):
            rejects.add(reject)


def _raw(batch: TextBatch, row: int) -> str:
    """The text of a row, without its card number."""
    card = batch.table["cc_num"][row].as_py()
    return masked(batch.raw(row).replace(card, masked_card(card)) if card else batch.raw(row))


def _until_cut_off(
    batches: Iterator[TextBatch], failures: list[SourceError]
) -> Iterator[TextBatch]:
    """The batches that can be read; why there are no more, if that is a fault, goes to `failures`."""
    try:
        yield from batches
    except SourceError as error:
        failures.append(error)


def _begun(batches: Iterator[TextBatch]) -> Iterator[TextBatch]:
    """The same batches, the first one read already: a file of no known format fails here."""
    first = next(batches, None)
    return chain([] if first is None else [first], batches)


def _what_to_do(failure: SourceError, name: str, outcome: Outcome) -> str:
    """Says of a file that was read in part how far it came, and how the load ends."""
    return (
        f"{failure}. Of {outcome.read:,} rows that could be read, {outcome.loaded:,} were loaded, "
        f"{outcome.duplicates:,} were known already and {outcome.rejected:,} were rejected. The store is not "
        f"complete until the whole file is loaded under the same name ({name}), or the load is given up: "
        f"tally load --abandon {shlex.quote(name)}"
    )
