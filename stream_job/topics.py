"""Kafka's topics: made with explicit partitions and retention, and how far they reach."""

from __future__ import annotations

from concurrent.futures import Future

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from stores.errors import StoreUnavailableError
from stream_job.dead_letters import LETTER_BYTES_MAX
from stream_job.settings import StreamSettings

TIMEOUT_S = 5.0
MS_PER_HOUR = 3_600_000


def make_topics(settings: StreamSettings) -> None:
    """Makes the topics that are not there.

    Raises:
        StoreUnavailableError: Kafka does not answer.
    """
    options = {
        "retention.ms": str(settings.topic_retention_hours * MS_PER_HOUR),
        # The broker's clock: it never goes back within a partition, as a producer's may.
        "message.timestamp.type": "LogAppendTime",
    }
    events = (settings.transactions_topic, settings.labels_topic)
    wanted = [NewTopic(name, settings.topic_partitions, 1, config=options) for name in events]
    letters = options | {"max.message.bytes": str(LETTER_BYTES_MAX)}
    wanted.append(NewTopic(settings.dead_letter_topic, 1, 1, config=letters))
    client = AdminClient({"bootstrap.servers": settings.kafka(), "log_level": 0})
    made: dict[str, Future[None]] = client.create_topics(wanted, operation_timeout=TIMEOUT_S)
    for future in made.values():
        try:
            future.result(TIMEOUT_S)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise StoreUnavailableError("kafka", str(error.args[0].str())) from error


class Ends:
    """How far topics reach, asked again and again."""

    def __init__(self, servers: str) -> None:
        self._consumer = Consumer(
            {
                "bootstrap.servers": servers,
                "group.id": "tally-watch",
                "enable.auto.commit": False,
                "log_level": 0,
            }
        )

    def of(self, topics: tuple[str, ...]) -> dict[tuple[str, int], tuple[int, int]]:
        """(topic, partition) -> (first offset kept, offset behind the last event).

        Raises:
            StoreUnavailableError: Kafka does not answer.
        """
        try:
            ends = {}
            for topic in topics:
                known = self._consumer.list_topics(topic, timeout=TIMEOUT_S).topics[topic]
                for partition in known.partitions:
                    where = TopicPartition(topic, partition)
                    ends[topic, partition] = self._consumer.get_watermark_offsets(
                        where, timeout=TIMEOUT_S
                    )
        except KafkaException as error:
            raise StoreUnavailableError("kafka", str(error.args[0].str())) from error
        return ends

    def close(self) -> None:
        """Gives the connection back."""
        self._consumer.close()
