"""Publishes the transactions of a file, as a payment system would."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
from confluent_kafka import KafkaException, Producer
from google.protobuf.timestamp_pb2 import Timestamp
from tally.sources import find
from tally.v1 import events_pb2

from features import CardKey
from ingest.dates import DateOrder, FileDates
from ingest.events import Format
from ingest.files import read_file, rereads
from ingest.kaggle import TRANSACTION_ID_CHARS_MAX, convert
from stores.arrow import to_ms
from stores.errors import StoreError, StoreUnavailableError
from stream_job.dead_letters import LETTER_BYTES_MAX
from stream_job.kafka import client_settings
from stream_job.settings import StreamSettings
from stream_job.topics import Why

LINGER_MS = 1
QUEUE_MESSAGES_MAX = 200_000
FLUSH_TIMEOUT_S = 60.0
NOT_TAKEN = "it does not take events"


@dataclass(slots=True)
class Published:
    """What publishing came to."""

    events: int = 0
    """Transactions published."""
    labels: int = 0
    """Labels published."""
    unreadable: int = 0
    """Rows of the file that are no transactions."""
    seconds: float = 0.0
    is_cut_short: bool = False
    """Whether it was interrupted: what was counted is there."""


@dataclass(frozen=True, slots=True)
class Event:
    """One message to publish."""

    topic: str
    key: bytes
    value: bytes
    event_ms: int


class Pace:
    """Holds publishing back to a rate, or to the events' own pace; the clock is injected."""

    def __init__(
        self,
        rate: float | None,
        speedup: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Takes events a second, or how many times faster than they happened; or neither."""
        self._rate, self._speedup = rate, speedup
        self._clock, self._sleep = clock, sleep
        self._began_s: float | None = None
        self._first_ms = 0
        self._count = 0

    def wait(self, event_ms: int) -> None:
        """Returns when the next event, which happened at event_ms, is due."""
        now_s = self._clock()
        if self._began_s is None:
            self._began_s, self._first_ms = now_s, event_ms
        if self._rate:
            due_s = self._began_s + self._count / self._rate
        elif self._speedup:
            due_s = self._began_s + (event_ms - self._first_ms) / 1000 / self._speedup
        else:
            return
        self._count += 1
        if due_s > now_s:
            self._sleep(due_s - now_s)


class Publisher:
    """Publishes files to the topics."""

    def __init__(self, settings: StreamSettings, card_key: CardKey) -> None:
        self._settings = settings
        self._card_key = card_key
        self._failed: str | None = None
        self._why = Why()
        self._producer = Producer(
            client_settings(settings)
            | {
                "linger.ms": LINGER_MS,
                "queue.buffering.max.messages": QUEUE_MESSAGES_MAX,
                "enable.idempotence": True,
                "message.max.bytes": LETTER_BYTES_MAX,  # of what a dead letter keeps, to publish it again
                "error_cb": self._why,
            }
        )

    def publish(
        self,
        path: Path,
        pace: Pace,
        *,
        separator: str = ",",
        shift_to_now: bool = False,
        date_order: DateOrder | None = None,
        advance: Callable[[int], None] = lambda bytes_read: None,
    ) -> Published:
        """Publishes a file's rows in their order, each with its label where it has one.

        Args:
            path: CSV or Parquet in Kaggle's format.
            pace: how fast.
            separator: of columns, where it is CSV.
            shift_to_now: moves all times so that the newest row happens now, and gives the
                transactions ids of their own, since they are others then.
            date_order: of dates such as 08/02/2024; by default the rows of the file must settle it.
            advance: told how many bytes of the file were taken since last told.

        Raises:
            FileFormatError, SourceError, OSError: the file cannot be read; what comes before is published.
            StoreUnavailableError: Kafka did not take everything.
        """
        began_s = time.monotonic()
        published = Published()
        dates = FileDates(date_order, rereads(find(path)[0], separator))
        newest_ms = self._newest_ms(path, separator, dates) if shift_to_now else 0
        shift_ms = time.time_ns() // 1_000_000 - newest_ms if shift_to_now else 0
        try:
            for batch in read_file(path, separator):
                facts = convert(batch.table, self._card_key.card_id, datetime.now(UTC), dates)
                published.unreadable += len(facts.problems) + len(batch.bad_lines)
                for event in events_of(facts.transactions, self._settings, shift_ms):
                    pace.wait(event.event_ms)
                    self.send_soon(event.topic, event.key, event.value)
                    if event.topic == self._settings.labels_topic:
                        published.labels += 1
                    else:
                        published.events += 1
                advance(batch.bytes_read)
        except KeyboardInterrupt:
            published.is_cut_short = True
        finally:
            self._flush()
        published.seconds = round(time.monotonic() - began_s, 3)
        return published

    def _newest_ms(self, path: Path, separator: str, dates: FileDates) -> int:
        """When the newest row of a file happened; now, where it has none."""
        newest = -1
        for batch in read_file(path, separator):
            facts = convert(batch.table, self._card_key.card_id, datetime.now(UTC), dates)
            if len(facts.transactions):
                newest = max(newest, int(to_ms(facts.transactions["event_time"]).max()))
        return newest if newest >= 0 else time.time_ns() // 1_000_000

    def send(self, topic: str, key: bytes, value: bytes | None) -> None:
        """Sends one message and waits until it is there.

        Raises:
            StoreUnavailableError: Kafka did not take it.
        """
        self.send_soon(topic, key, value)
        self._flush()

    def send_soon(self, topic: str, key: bytes, value: bytes | None) -> None:
        """Hands one message over; its fate is told by the next call that waits. Waits itself where
        too many are on their way.

        Raises:
            StoreUnavailableError: Kafka does not take any.
            StoreError: it does not take this one.
        """
        deadline_s = time.monotonic() + FLUSH_TIMEOUT_S
        while True:
            try:
                self._producer.produce(topic, value, key, on_delivery=self._on_delivery)
            except BufferError:
                self._producer.poll(0.1)
                if time.monotonic() > deadline_s:
                    raise StoreUnavailableError("kafka", self._why.text or NOT_TAKEN) from None
            except KafkaException as error:
                raise StoreError(f"kafka refuses a message: {error.args[0].str()}") from error
            else:
                self._producer.poll(0)
                return

    def _flush(self) -> None:
        """Waits until all that was sent is there.

        Raises:
            StoreUnavailableError: some of it is not; that is said once.
        """
        left = self._producer.flush(FLUSH_TIMEOUT_S)
        failed, self._failed = self._failed, None
        if left or failed:
            raise StoreUnavailableError("kafka", self._why.text or failed or NOT_TAKEN)

    def _on_delivery(self, error: Any, message: Any) -> None:
        if error is not None:
            self._failed = str(error)


def shifted_id(transaction_id: str, shift_ms: int) -> str:
    """The id of a transaction that is made to happen at another time: another transaction's."""
    if not shift_ms:
        return transaction_id
    suffix = f"~{shift_ms:x}"
    if len(transaction_id) + len(suffix) > TRANSACTION_ID_CHARS_MAX:
        transaction_id = blake2b(transaction_id.encode(), digest_size=16).hexdigest()
    return transaction_id + suffix


def events_of(
    transactions: pa.Table, settings: StreamSettings, shift_ms: int = 0
) -> Iterator[Event]:
    """The messages of transactions (as of ingest.kaggle.Facts): each, then its label.

    Args:
        transactions: in the order to publish.
        settings: their topics and format.
        shift_ms: is added to all times; ids are then `shifted_id`.
    """
    times_ms = (to_ms(transactions["event_time"]) + shift_ms).tolist()
    labelled = transactions["label_time"]
    label_times = [None if t is None else round(t.timestamp() * 1000) for t in labelled.to_pylist()]
    write = _WRITERS[settings.stream_format]
    columns = transactions.drop_columns(["event_time", "label_time", "record"]).to_pylist()
    for row, event_ms, label_ms in zip(columns, times_ms, label_times, strict=True):
        key = row["card_id"]
        row["transaction_id"] = shifted_id(row["transaction_id"], shift_ms)
        transaction, label = write(row, event_ms, label_ms and label_ms + shift_ms)
        yield Event(settings.transactions_topic, key, transaction, event_ms)
        if label is not None:
            yield Event(settings.labels_topic, row["transaction_id"].encode(), label, event_ms)


def _iso(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds")


def _protobuf(
    row: dict[str, Any], event_ms: int, label_ms: int | None
) -> tuple[bytes, bytes | None]:
    transaction = events_pb2.Transaction(
        transaction_id=row["transaction_id"],
        card_id=row["card_id"],
        event_time_ms=event_ms,
        amount_minor=row["amount_minor"],
        merchant=row["merchant"],
        category=row["category"],
        merchant_latitude=row["merchant_latitude"],
        merchant_longitude=row["merchant_longitude"],
    ).SerializeToString()
    if label_ms is None:
        return transaction, None
    time = Timestamp()
    time.FromMilliseconds(label_ms)
    label = events_pb2.Label(
        transaction_id=row["transaction_id"], is_fraud=row["is_fraud"], label_time=time
    )
    return transaction, label.SerializeToString()


def _tally(row: dict[str, Any], event_ms: int, label_ms: int | None) -> tuple[bytes, bytes | None]:
    document = {
        "transaction_id": row["transaction_id"],
        "card_id": row["card_id"].hex(),
        "event_time": _iso(event_ms),
        "amount": row["amount_minor"] / 100,
        "merchant": row["merchant"],
        "category": row["category"],
        "merchant_latitude": row["merchant_latitude"],
        "merchant_longitude": row["merchant_longitude"],
    }
    return orjson.dumps(document), _json_label(row, label_ms)


def _kaggle(row: dict[str, Any], event_ms: int, label_ms: int | None) -> tuple[bytes, bytes | None]:
    document = {
        "trans_num": row["transaction_id"],
        "card_id": row["card_id"].hex(),
        "trans_date_trans_time": _iso(event_ms),
        "amt": row["amount_minor"] / 100,
        "merchant": f"fraud_{row['merchant']}",
        "category": row["category"],
        "merch_lat": row["merchant_latitude"],
        "merch_long": row["merchant_longitude"],
    }
    return orjson.dumps(document), _json_label(row, label_ms)


def _json_label(row: dict[str, Any], label_ms: int | None) -> bytes | None:
    if label_ms is None:
        return None
    return orjson.dumps(
        {
            "transaction_id": row["transaction_id"],
            "is_fraud": row["is_fraud"],
            "label_time": _iso(label_ms),
        }
    )


def write_transaction(form: Format, row: dict[str, Any], event_ms: int) -> bytes:
    """The message of a transaction: a row of TRANSACTIONS without its time, which is event_ms."""
    return _WRITERS[form](row, event_ms, None)[0]


_WRITERS: dict[Format, Callable[[dict[str, Any], int, int | None], tuple[bytes, bytes | None]]] = {
    Format.PROTOBUF: _protobuf,
    Format.TALLY: _tally,
    Format.KAGGLE: _kaggle,
}
