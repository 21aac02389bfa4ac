"""Kafka's topics: made with explicit partitions and retention, and how far they reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # they are exported
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
)
from confluent_kafka.cimpl import NewTopic

from stores.errors import StoreError, StoreUnavailableError
from stream_job.dead_letters import LETTER_BYTES_MAX
from stream_job.kafka import client_settings
from stream_job.settings import StreamSettings

TIMEOUT_S = 5.0
MS_PER_HOUR = 3_600_000
TIMESTAMPS, APPENDED = "message.timestamp.type", "LogAppendTime"
VALUE_BYTES = "max.message.bytes"


def make_topics(settings: StreamSettings) -> None:
    """Makes the topics that are not there, and sees that those that are can be used.

    Raises:
        StoreUnavailableError: Kafka does not answer.
        StoreError: a topic that is there keeps its producers' times instead of its own.
    """
    options = {
        "retention.ms": str(settings.topic_retention_hours * MS_PER_HOUR),
        # The broker's clock: a producer's may say anything.
        TIMESTAMPS: APPENDED,
    }
    events = (settings.transactions_topic, settings.labels_topic)
    wanted = [NewTopic(name, settings.topic_partitions, 1, config=options) for name in events]
    letters = options | {VALUE_BYTES: str(LETTER_BYTES_MAX)}
    wanted.append(NewTopic(settings.dead_letter_topic, 1, 1, config=letters))
    why = Why()
    client = AdminClient(client_settings(settings) | {"error_cb": why})
    with _reported(client, why):
        made: dict[str, Future[None]] = client.create_topics(
            wanted, operation_timeout=TIMEOUT_S, request_timeout=TIMEOUT_S
        )
        known = [name for name, future in made.items() if not _is_new(future)]
        _adapt(client, settings, known)


def _is_new(future: Future[None]) -> bool:
    """Whether a topic was made; False where it was there."""
    try:
        future.result(TIMEOUT_S)
    except KafkaException as error:
        if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise
        return False
    return True


def _adapt(client: AdminClient, settings: StreamSettings, topics: Sequence[str]) -> None:
    """Has the topic of dead letters take large ones, and refuses topics with producers' times."""
    asked = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in topics]
    found = client.describe_configs(asked, request_timeout=TIMEOUT_S) if asked else {}
    for resource, future in found.items():
        options = {name: entry.value for name, entry in future.result(TIMEOUT_S).items()}
        if resource.name == settings.dead_letter_topic:
            if int(options[VALUE_BYTES]) < LETTER_BYTES_MAX:
                larger = ConfigEntry(
                    VALUE_BYTES,
                    str(LETTER_BYTES_MAX),
                    incremental_operation=AlterConfigOpType.SET,
                )
                resource.add_incremental_config(larger)
                altered = client.incremental_alter_configs([resource], request_timeout=TIMEOUT_S)
                altered[resource].result(TIMEOUT_S)
        elif options[TIMESTAMPS] != APPENDED:
            raise StoreError(
                f"the topic {resource.name} has {TIMESTAMPS}={options[TIMESTAMPS]}: how complete the "
                f"store is can only be told from {APPENDED}; alter it with kafka-configs"
            )


class Why:
    """Why a client does not get in: it says so beside its calls, which say that they failed."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self, error: KafkaError) -> None:
        """What the client calls."""
        if error.code() in (KafkaError._AUTHENTICATION, KafkaError._SSL, KafkaError._RESOLVE):
            self.text = str(error.str())


@contextmanager
def _reported(client: AdminClient | Consumer, why: Why) -> Iterator[None]:
    """Turns the client's errors into ours."""
    try:
        yield
    except KafkaException as error:
        client.poll(0)  # it calls `why` now
        raise StoreUnavailableError("kafka", why.text or str(error.args[0].str())) from error
    except FutureTimeoutError as error:
        client.poll(0)
        detail = why.text or f"no answer within {TIMEOUT_S:.0f} s"
        raise StoreUnavailableError("kafka", detail) from error


class TopicEnds:
    """How far topics reach, asked again and again."""

    def __init__(self, settings: StreamSettings) -> None:
        """Connects when first asked."""
        self._why = Why()
        own = {
            "group.id": "tally-watch",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
            "error_cb": self._why,
        }
        try:
            self._consumer = Consumer(client_settings(settings) | own)
        except KafkaException as error:
            raise StoreUnavailableError("kafka", str(error.args[0].str())) from error

    def of(self, topics: tuple[str, ...]) -> dict[tuple[str, int], tuple[int, int]]:
        """(topic, partition) -> (first offset kept, offset behind the last event).

        Raises:
            StoreUnavailableError: Kafka does not answer for all partitions of all topics.
        """
        ends = {}
        with _reported(self._consumer, self._why):
            for topic in topics:
                known = self._consumer.list_topics(topic, timeout=TIMEOUT_S).topics[topic]
                if known.error is not None or not known.partitions:
                    detail = str(known.error) if known.error else "it has no partitions"
                    raise StoreUnavailableError("kafka", f"topic {topic}: {detail}")
                for partition in known.partitions:
                    where = TopicPartition(topic, partition)
                    ends[topic, partition] = self._consumer.get_watermark_offsets(
                        where, timeout=TIMEOUT_S
                    )
        return ends

    def is_nothing_behind(self, topic: str, partition: int, offset: int) -> bool:
        """Whether from an offset on there are no events, but only what transactions leave: marks of
        their ends, and events that were taken back.

        Raises:
            StoreUnavailableError: Kafka does not answer.
        """
        with _reported(self._consumer, self._why):
            self._consumer.assign([TopicPartition(topic, partition, offset)])
            try:
                message = self._consumer.poll(TIMEOUT_S)
            finally:
                self._consumer.unassign()
        if message is None:
            return False
        error = message.error()
        return error is not None and error.code() == KafkaError._PARTITION_EOF

    def close(self) -> None:
        """Gives the connection back."""
        self._consumer.close()
