"""What an operator can set of the stream; `tally config` lists it. Units are in the names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

from ingest.events import Format
from stores.settings import OptionalAddress, SettingsError, StoreSettings
from stream_job.kafka import Mechanism, Protocol, check

KAFKA_LOGIN = (
    *("kafka_security_protocol", "kafka_sasl_mechanism", "kafka_user", "kafka_password"),
    *("kafka_ca_file", "kafka_certificate_file", "kafka_key_file"),
)
"""Settings of how to log in: they belong to the servers that were set with them, and to no others."""


class StreamSettings(StoreSettings):
    """The stream's settings."""

    stream_off: bool = Field(False, description="Start a stack without Kafka and the stream job.")
    kafka_servers: str | None = Field(None, description="Kafka's bootstrap servers: host:port,...")
    kafka_security_protocol: Protocol = Field(
        Protocol.PLAINTEXT,
        description="How your own Kafka is reached: PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL.",
    )
    kafka_sasl_mechanism: Mechanism = Field(
        Mechanism.SCRAM_SHA_512,
        description="How it takes passwords: SCRAM-SHA-512, SCRAM-SHA-256 or PLAIN.",
    )
    kafka_user: str | None = Field(None, min_length=1, description="The user it knows us by.")
    kafka_password: SecretStr | None = Field(
        None, min_length=1, description="That user's password."
    )
    kafka_ca_file: Path | None = Field(
        None, description="PEM file of who signs its certificate; empty for the system's list."
    )
    kafka_certificate_file: Path | None = Field(
        None, description="PEM file of our own certificate, where it asks for one."
    )
    kafka_key_file: Path | None = Field(
        None, description="PEM file of that certificate's key, in PKCS 8 and not encrypted."
    )
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

    def __init__(self, **given: Any) -> None:
        """Takes settings by name, before what is set elsewhere.

        Raises:
            SettingsError: one is missing, cannot be used, or contradicts another.
        """
        super().__init__(**given)
        check(self)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The order of stores.settings. The login of the stack's own Kafka is not shown to another
        Kafka that is set, nor is another's login tried on the stack's.

        Raises:
            SettingsError: a login is set, and no servers.
        """
        *chosen, of_stack = super().settings_customise_sources(
            settings_cls, init_settings, env_settings, dotenv_settings, file_secret_settings
        )
        given = [source() for source in chosen]
        names = {name for one in given for name in one}
        servers = next((one["kafka_servers"] for one in given if "kafka_servers" in one), None)
        stack = of_stack()
        if servers is not None:
            if servers != stack.get("kafka_servers"):
                stack = {name: value for name, value in stack.items() if name not in KAFKA_LOGIN}
                of_stack = InitSettingsSource(settings_cls, stack)
        elif without := sorted(names.intersection(KAFKA_LOGIN)):
            raise SettingsError(
                f"TALLY_{without[0].upper()} is set, and TALLY_KAFKA_SERVERS is not: it is for a "
                "Kafka of your own; the stack makes the login of its own"
            )
        return (*chosen, of_stack)

    def kafka_login(self) -> dict[str, str]:
        """The settings of how to log in, in the clear, for a process that is to do the same."""
        login: dict[str, str] = {}
        for name in KAFKA_LOGIN:
            value = getattr(self, name)
            if value is not None:
                is_secret = isinstance(value, SecretStr)
                login[name] = value.get_secret_value() if is_secret else str(value)
        return login

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
