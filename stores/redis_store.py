"""The online store: one ledger and one profile per card in Redis, written by Redis Functions.

Keys, with <id> the 16 bytes of the card id:

    {c<id>}l      the card's ledger        (features/ledger.py)
    {c<id>}p      the card's profile       (features/profile.py)
    {m<key>}d     a merchant's days        (features/merchants.py, stores/publishing.py)

    {tally}merchants what is known of all merchants together, and through which day
    {tally}meta   hash: card_key, format, complete_through_ms of loads, stream_through_ms
    {tally}loads  hash: load id -> what it loads, while unfinished
    {tally}now    what every read takes along: card key and completeness
    {tally}rebuild who rebuilds the store, while it is incomplete
    {tally}stream what is known of the stream, as JSON, for STREAM_STATE_S

The braces put a card's keys into one slot of a Redis Cluster. Redis is a cache: without {tally}now
it has lost its data or never had any, and says so instead of answering zeros.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from importlib import resources
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar, cast

import hiredis
import numpy as np
import numpy.typing as npt
import redis

from features import LEDGER_RECORDS_MAX, RECORD, RETENTION_MS, Merchants, Population
from features.keys import CARD_ID_BYTES, merchant_key_bytes
from features.ledger import HEADER, LEDGER_VERSION, RECORD_FORMAT
from features.merchants import MERCHANT_FORMAT
from features.profile import PROFILE_RECORD, PROFILE_RECORDS_MAX, PROFILE_VERSION
from stores.closing import Closing
from stores.errors import CardKeyMismatchError, NotReadyError, StoreError, StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

META_KEY = b"{tally}meta"
LOADS_KEY = b"{tally}loads"
PROGRESS_KEY = b"{tally}now"
REBUILD_KEY = b"{tally}rebuild"
POPULATION_KEY = b"{tally}merchants"
STREAM_KEY = b"{tally}stream"
STREAM_STATE_S = 5
"""How long what was said of the stream holds; who says it may be gone."""
_STATE_KEYS = (META_KEY, LOADS_KEY, PROGRESS_KEY)

FORMAT = blake2b(
    repr(
        (
            *(RECORD_FORMAT, PROFILE_VERSION, PROFILE_RECORD.descr),
            *(RETENTION_MS, LEDGER_RECORDS_MAX, PROFILE_RECORDS_MAX),
            *MERCHANT_FORMAT,
        )
    ).encode(),
    digest_size=8,
).hexdigest()
"""What the stored bytes mean: a store of another format is rebuilt."""
COMPLETE_THROUGH_UNKNOWN = -1

PIPELINE_COMMANDS_MAX = 2_000
"""Commands sent before their replies are read."""
SCAN_COUNT = 1_000
"""Keys that one step of a scan looks at."""
SOCKET_TIMEOUT_S = 30.0
LOST_HINT = ": the online store has lost its data; load again when it is rebuilt"


def ledger_key(card_id: bytes) -> bytes:
    """Where a card's ledger is."""
    return b"{c%b}l" % card_id


def profile_key(card_id: bytes) -> bytes:
    """Where a card's profile is."""
    return b"{c%b}p" % card_id


def merchant_redis_key(merchant_key: bytes) -> bytes:
    """Where a merchant's days are; its key as records have it."""
    return b"{m%b}d" % merchant_key


def card_of_key(key: bytes) -> bytes:
    """The card whose ledger or profile is at a key."""
    return key[2:-2]


def is_ledger_key(key: bytes) -> bool:
    """Whether a card's ledger is at a key, and not its profile."""
    return key.endswith(b"l")


@dataclass(frozen=True, slots=True)
class Progress:
    """What the online store says of itself with every read."""

    card_key: str
    """Fingerprint of the card key that it was written under."""
    complete_through_ms: int
    """The instant through which all that was published is applied; -1 if it cannot say."""
    format: str
    """What its bytes mean: FORMAT, of this version."""

    @classmethod
    def parse(cls, value: bytes | None) -> Progress | None:
        """The value of PROGRESS_KEY; None where the store is not complete."""
        if value is None:
            return None
        card_key, through, *rest = value.decode("ascii").split(" ")
        return cls(card_key, int(through), rest[0] if rest else "")


def function_library() -> str:
    """The Redis Functions, with the core's numbers put in."""
    text = resources.files("stores").joinpath("tally.lua").read_text(encoding="utf-8")
    numbers = {
        "RETENTION_MS": RETENTION_MS,
        "LEDGER_RECORDS_MAX": LEDGER_RECORDS_MAX,
        "RECORD_BYTES": RECORD.itemsize,
        "HEADER_BYTES": HEADER.size,
        "LEDGER_VERSION": LEDGER_VERSION,
        "PROFILE_RECORD_BYTES": PROFILE_RECORD.itemsize,
        "PROFILE_RECORDS_MAX": PROFILE_RECORDS_MAX,
        "PROFILE_VERSION": PROFILE_VERSION,
    }
    for name, number in numbers.items():
        text = text.replace(f"@{name}@", str(number))
    return text


def _digest(value: bytes | None) -> str:
    """What Redis compares a value by, without its being sent again."""
    return "" if value is None else hashlib.sha1(value, usedforsecurity=False).hexdigest()


Item = TypeVar("Item")


def in_chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items, PIPELINE_COMMANDS_MAX at a time."""
    items = iter(items)
    while chunk := list(islice(items, PIPELINE_COMMANDS_MAX)):
        yield chunk


@contextmanager
def reported() -> Iterator[None]:
    """Turns the client's connection errors into ours."""
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise StoreUnavailableError("redis", str(error)) from error


class OnlineStore(Closing):
    """Writes to the online store, and reads it where latency does not matter."""

    def __init__(self, url: str) -> None:
        """Connects when first used.

        Args:
            url: redis://host:port/db, rediss://... or unix:///path.
        """
        self.redis = redis.Redis.from_url(
            url, socket_timeout=SOCKET_TIMEOUT_S, socket_connect_timeout=5.0
        )

    def close(self) -> None:
        """Gives the connections back."""
        self.redis.close()

    def install(self) -> None:
        """Loads the functions; safe beside a running installation.

        Raises:
            StoreUnavailableError: Redis cannot be reached.
        """
        with reported():
            self.redis.function_load(function_library(), replace=True)

    def check_card_key(self, fingerprint: str) -> None:
        """Raises CardKeyMismatchError where the store was written under another card key."""
        with reported():
            stored = cast("bytes | None", self.redis.hget(META_KEY, "card_key"))
        if stored is not None and stored.decode() != fingerprint:
            raise CardKeyMismatchError("redis", stored.decode(), fingerprint)

    @property
    def is_initialised(self) -> bool:
        """Whether the store holds what it was given, as far as it can tell, in this format."""
        with reported():
            stored = cast("bytes | None", self.redis.hget(META_KEY, "format"))
            return stored == FORMAT.encode() and bool(self.redis.exists(PROGRESS_KEY))

    def initialise(
        self,
        fingerprint: str,
        newest_ms: int,
        unfinished_loads: Sequence[tuple[str, str]],
        *,
        token: str,
    ) -> None:
        """Declares the store complete as it is: empty on a new installation, or just rebuilt.

        Args:
            fingerprint: of the card key.
            newest_ms: the newest event time of all that was loaded; -1 for nothing, and where a
                stream will say.
            unfinished_loads: (load id, description) of loads that have yet to be run again.
            token: what `begin_rebuild` returned.

        Raises:
            StoreError: the store lost its data again meanwhile, or somebody else rebuilds it.
        """
        meta: Any = {"card_key": fingerprint, "format": FORMAT, "complete_through_ms": newest_ms}
        through = COMPLETE_THROUGH_UNKNOWN if unfinished_loads else newest_ms
        with reported(), self.redis.pipeline(transaction=True) as pipeline:
            pipeline.watch(REBUILD_KEY)  # type: ignore[no-untyped-call]
            if cast("bytes | None", pipeline.get(REBUILD_KEY)) != token.encode():
                raise NotReadyError(
                    "redis",
                    "the online store lost its data again while it was rebuilt, or somebody else "
                    "rebuilds it: start anew",
                )
            pipeline.multi()
            pipeline.delete(*_STATE_KEYS, REBUILD_KEY)
            pipeline.hset(META_KEY, mapping=meta)
            if unfinished_loads:
                pipeline.hset(LOADS_KEY, mapping=dict(unfinished_loads))
            pipeline.set(PROGRESS_KEY, f"{fingerprint} {through} {FORMAT}")
            try:
                pipeline.execute()
            except redis.WatchError as error:
                raise NotReadyError(
                    "redis", "somebody else rebuilds the online store: start anew"
                ) from error

    def begin_rebuild(self) -> str:
        """Until `initialise`, the store does not claim anything. Returns the token for it, which is
        lost when the store loses its data."""
        token = secrets.token_hex(8)
        with reported():
            self.redis.delete(PROGRESS_KEY, POPULATION_KEY)
            self.redis.set(REBUILD_KEY, token)
        return token

    def begin_load(self, load_id: str, description: str) -> None:
        """From now until `end_load` the store does not claim to be complete."""
        self._fcall("tally_begin_load", load_id, description)

    def end_load(self, load_id: str, newest_ms: int) -> None:
        """Everything of this load is applied; its newest event was at newest_ms."""
        self._fcall("tally_end_load", load_id, newest_ms)

    def _fcall(self, function: str, *arguments: str | int) -> None:
        with reported():
            try:
                self.redis.fcall(function, 3, *_STATE_KEYS, *arguments)
            except redis.ResponseError as error:
                raise StoreError(f"redis refused: {error}") from error

    def progress(self) -> Progress | None:
        """What the store says of itself; None where it is not complete."""
        with reported():
            return Progress.parse(cast("bytes | None", self.redis.get(PROGRESS_KEY)))

    def unfinished_loads(self) -> list[str]:
        """Descriptions of loads that began and have not ended."""
        with reported():
            values = cast("list[bytes]", self.redis.hvals(LOADS_KEY))
        return sorted(value.decode() for value in values)

    def append(self, batches: Iterable[tuple[bytes, bytes]]) -> None:
        """Adds records to ledgers.

        Args:
            batches: (card id, records in ledger order and each once, as bytes), any card once.
        """
        self._send(
            ("FCALL", "tally_append", 1, ledger_key(card_id), records)
            for card_id, records in batches
        )

    def append_and_read(
        self, batches: Sequence[tuple[bytes, bytes]]
    ) -> tuple[list[bytes], list[bytes | None]]:
        """Adds records to ledgers, and gives these ledgers and their cards' profiles back: each
        ledger as it is before retention, with the past of every record that was added.

        Args:
            batches: as for `append`.

        Raises:
            StoreUnavailableError: Redis does not answer, or has lost its data: what it would give
                back were ledgers without their past. Records may have been added.
        """
        before, *replies, after = self._send(
            [
                ("GET", PROGRESS_KEY),
                *(
                    command
                    for card_id, records in batches
                    for command in (
                        ("FCALL", "tally_append", 1, ledger_key(card_id), records, "return"),
                        ("GET", profile_key(card_id)),
                    )
                ),
                ("GET", PROGRESS_KEY),
            ]
        )
        # Before and after: it may lose its data, and be given its functions again, in between.
        if before is None or after is None:
            raise StoreUnavailableError("redis", "it has lost its data and is yet to be rebuilt")
        return replies[::2], replies[1::2]

    def put_stream_state(self, state: str) -> None:
        """Keeps what is known of the stream, as JSON, for a few seconds: who watches it may be gone."""
        with reported():
            self.redis.set(STREAM_KEY, state, ex=STREAM_STATE_S)

    def stream_state(self) -> str | None:
        """What is known of the stream; None where nobody watches it."""
        with reported():
            value = cast("bytes | None", self.redis.get(STREAM_KEY))
        return None if value is None else value.decode()

    def advance_stream(self, through_ms: int, latest_ms: int) -> None:
        """All that was published through an instant is applied. From the first time on, this and no
        load says how complete the store is.

        Args:
            through_ms: the instant; -1 where none can be said. An earlier one than the store has said
                changes nothing,
            latest_ms: unless the store has said a later one than this: that came from a clock that was
                ahead.
        """
        self._fcall("tally_stream_through", through_ms, latest_ms)

    def stream_through_ms(self) -> int | None:
        """Through which instant all that was published is applied; None where there is no stream."""
        with reported():
            value = cast("bytes | None", self.redis.hget(META_KEY, "stream_through_ms"))
        return None if value is None else int(value)

    def forget_stream(self) -> None:
        """There is no stream any more: loads say how complete the store is."""
        with reported():
            self.redis.hdel(META_KEY, "stream_through_ms")

    def put_profiles(self, batches: Iterable[tuple[bytes, bytes]]) -> None:
        """Adds records to profiles: (card id, PROFILE_RECORDs as bytes)."""
        self._send(
            ("FCALL", "tally_profile", 1, profile_key(card_id), records)
            for card_id, records in batches
        )

    def put_whole(self, values: Iterable[tuple[bytes, bytes]]) -> None:
        """Sets whole values by key, whatever is there: of keys that nobody else writes meanwhile."""
        self._send(("SET", key, value) for key, value in values)

    def merchants(self, keys: npt.NDArray[np.uint64]) -> tuple[Merchants, npt.NDArray[np.int64]]:
        """The facts of merchants.

        Args:
            keys: (n,) as records have them.

        Returns:
            Facts, and where in them the merchant of each key is, (n,).
        """
        distinct, places = np.unique(keys, return_inverse=True)
        names = map(merchant_key_bytes, distinct.tolist())
        with reported():  # at one instant, however many they are
            *values, population = cast(
                "list[bytes | None]",
                self.redis.mget([*map(merchant_redis_key, names), POPULATION_KEY]),
            )
        return Merchants.from_bytes(values, Population.from_bytes(population)), places

    def put_missing(self, values: Iterable[tuple[bytes, bytes]]) -> list[bool]:
        """Sets whole values by key where there is none; says which were set."""
        return [reply is not None for reply in self._send(("SET", k, v, "NX") for k, v in values)]

    def swap(self, values: Iterable[tuple[bytes, bytes | None, bytes | None]]) -> list[bool]:
        """Sets values, or takes them away, where the key still holds what was read.

        Args:
            values: (key, what was read, what is to be there), None for nothing.

        Returns:
            Which were swapped.
        """
        return [
            reply == 1
            for reply in self._send(
                ("FCALL", "tally_swap", 1, key, _digest(held), wanted or b"")
                for key, held, wanted in values
            )
        ]

    def forget(self, keys: Iterable[bytes]) -> None:
        """Takes whole values away."""
        self._send(("UNLINK", key) for key in keys)

    def merchant_keys(self) -> Iterator[bytes]:
        """Where days of merchants are; some come twice while others write."""
        with reported():
            yield from self.redis.scan_iter(match=merchant_redis_key(b"*"), count=SCAN_COUNT)

    def cards_with_ledgers(self) -> Iterator[bytes]:
        """The ids of all cards that have a ledger; some may come twice while others write."""
        return self._cards_of(b"{c*}l")

    def cards_with_values(self) -> Iterator[bytes]:
        """The ids of all cards of which there is anything; some come twice."""
        return self._cards_of(b"{c*}?")

    def _cards_of(self, pattern: bytes) -> Iterator[bytes]:
        # Every byte of an id may be one that a pattern gives a meaning to: two ends are enough.
        with reported():
            for key in self.redis.scan_iter(match=pattern, count=SCAN_COUNT):
                if len(key) == len(ledger_key(bytes(CARD_ID_BYTES))):
                    yield card_of_key(key)

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of keys; of up to PIPELINE_COMMANDS_MAX, at one instant. Of more, others are
        served in between."""
        values: list[bytes | None] = []
        with reported():
            for some in in_chunks(keys):
                values += cast("list[bytes | None]", self.redis.mget(some))
        return values

    def _send(self, commands: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Pipelines commands; returns the replies, or raises the first error among them."""
        replies = []
        with reported():
            for chunk in in_chunks(commands):
                replies += self._send_together(chunk)
        return replies

    def _send_together(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        """Packs and sends commands, then reads their replies.

        On a bare connection: the client's own pipeline takes longer than all else of a load.
        """
        packed = b"".join(map(hiredis.pack_command, commands))
        connection: Any = self.redis.connection_pool.get_connection()
        errors, replies = [], []
        try:
            connection.send_packed_command([packed])
            for _ in commands:
                try:
                    replies.append(connection.read_response())
                except redis.ResponseError as error:
                    errors.append(error)
        finally:
            self.redis.connection_pool.release(connection)
        if errors:
            hint = LOST_HINT if "not found" in str(errors[0]) else ""
            raise StoreError(f"redis refused a write: {errors[0]}{hint}") from errors[0]
        return replies
