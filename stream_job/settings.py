"""What an operator can set of the stream; `tally config` lists it. Units are in the names."""

from __future__ import annotations

from pydantic import Field

from ingest.events import Format
from stores.settings import OptionalAddress, SettingsError, StoreSettings


class StreamSettings(StoreSettings):
    """The stream's settings."""

    stream_off: bool = Field(False, description="Start a stack without Kafka and the stream job.")
    kafka_servers: str | None = Field(None, description="Kafka's bootstrap servers: host:port,...")
    stream_format: Format = Field(
        Format.PROTOBUF, description="How values are written: kaggle, tally or protobuf."
    )
    transactions_topic: str = Field("transactions", description="Topic of transactions.")
    labels_topic: str = Field("labels", description="Topic of labels.")
    dead_letter_topic: str = Field("dead-letter", description="Topic of what cannot be applied.")
    topic_partitions: int = Field(4, ge=1, le=1024, description="Partitions of topics it makes.")
    topic_retention_hours: int = Field(
        7 * 24, ge=1, le=10 * 365 * 24, description="How long topics keep events."
    )
    stream_parallelism: int = Field(2, ge=1, le=1024, description="Parallel instances of the job.")
    checkpoint_interval_ms: int = Field(
        5_000, ge=100, le=3_600_000, description="Time between checkpoints."
    )
    bundle_ms: int = Field(
        5, ge=1, le=60_000, description="Longest time events wait to be applied together."
    )
    batch_rows: int = Field(5_000, ge=1, le=65_536, description="Most events applied together.")
    probe_interval_ms: int = Field(
        1_000,
        ge=0,
        le=3_600_000,
        description="Time between freshness probes, events of no card; 0 for none.",
    )
    stream_metrics_listen: OptionalAddress = Field(
        "", description="Address of the stream's Prometheus port, which asks for no token."
    )

    def kafka(self) -> str:
        """Kafka's bootstrap servers.

        Raises:
            SettingsError: they are not set, and no stack runs in the data folder.
        """
        if self.kafka_servers is None:
            raise SettingsError(
                f"no stream runs in {self.data}, and TALLY_KAFKA_SERVERS is not set: "
                f"start one with `tally up --data {self.data}`"
            )
        return self.kafka_servers
