"""The Flink job: read top to bottom, it only wires. `python -m stream_job.pipeline`.

    events        (topic, partition, offset, append_time, value)    from Kafka: two topics, raw bytes
      └▶ apply    one call for each Arrow batch: both stores, and the letter of what is refused
           └▶ dead_letters  (letter)                                to Kafka

The only state is how far the topics were read. A checkpoint waits until all that was read before it
is applied, so that nothing is lost, and what comes twice changes nothing (stream_job.applier).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from pyflink.common import Configuration
from pyflink.table import DataTypes, EnvironmentSettings, TableEnvironment
from pyflink.table.udf import ScalarFunction, udf

from stream_job import gateway
from stream_job.dead_letters import LETTER_BYTES_MAX
from stream_job.kafka import connector_settings
from stream_job.settings import StreamSettings
from stream_job.worker import ApplyEvents

FUNCTION = "apply_events"
CONSUMER_GROUP = "tally"
CHECKPOINTS_KEPT = 3
RESTART_DELAY_MS_MIN, RESTART_DELAY_MS_MAX = 500, 10_000
FAILED_CHECKPOINTS_MAX = str(10**6)
"""As many as there will be: a checkpoint that fails is followed by another."""
CHECKPOINT_TIMEOUT_MS = 600_000
"""A checkpoint waits as long as the stores are away."""

EVENTS = """
CREATE TABLE events (
    `topic` STRING NOT NULL METADATA VIRTUAL,
    `partition` INT NOT NULL METADATA VIRTUAL,
    `offset` BIGINT NOT NULL METADATA VIRTUAL,
    `append_time` TIMESTAMP_LTZ(3) NOT NULL METADATA FROM 'timestamp' VIRTUAL,
    `value` BYTES
) WITH (
    'connector' = 'kafka',
    'topic' = '{transactions};{labels}',
    {kafka},
    'properties.group.id' = '{group}',
    'scan.startup.mode' = 'group-offsets',
    'properties.auto.offset.reset' = 'earliest',
    'properties.isolation.level' = 'read_committed',
    'properties.client.id.prefix' = 'tally',
    'format' = 'raw'
)
"""

DEAD_LETTERS = """
CREATE TABLE dead_letters (`letter` STRING) WITH (
    'connector' = 'kafka',
    'topic' = '{dead_letters}',
    {kafka},
    'properties.max.request.size' = '{letter_bytes_max}',
    'sink.delivery-guarantee' = 'at-least-once',
    'format' = 'raw'
)
"""

WIRING = """
INSERT INTO dead_letters
SELECT letter FROM (
    SELECT apply_events(`topic`, `partition`, `offset`, `append_time`, `value`) AS letter
    FROM events
) WHERE letter IS NOT NULL
"""


def configuration(settings: StreamSettings) -> dict[str, str]:
    """How any Flink runs the job. What is not here is the cluster's to say: where checkpoints are
    kept, and from which one to go on."""
    return {
        "pipeline.name": "tally",
        "parallelism.default": str(settings.stream_parallelism),
        "table.local-time-zone": "UTC",
        # Names of operators that do not depend on anything but the wiring above.
        "table.exec.uid.generation": "ALWAYS",
        "execution.checkpointing.interval": f"{settings.checkpoint_interval_ms} ms",
        "execution.checkpointing.timeout": f"{CHECKPOINT_TIMEOUT_MS} ms",
        "execution.checkpointing.tolerable-failed-checkpoints": FAILED_CHECKPOINTS_MAX,
        "execution.checkpointing.mode": "AT_LEAST_ONCE",
        "execution.checkpointing.num-retained": str(CHECKPOINTS_KEPT),
        "execution.checkpointing.externalized-checkpoint-retention": "RETAIN_ON_CANCELLATION",
        "restart-strategy.type": "exponential-delay",
        "restart-strategy.exponential-delay.initial-backoff": f"{RESTART_DELAY_MS_MIN} ms",
        "restart-strategy.exponential-delay.max-backoff": f"{RESTART_DELAY_MS_MAX} ms",
        "python.fn-execution.bundle.time": str(settings.bundle_ms),
        "python.fn-execution.bundle.size": str(settings.batch_rows),
        "python.fn-execution.arrow.batch.size": str(settings.batch_rows),
    }


@dataclass(frozen=True, slots=True)
class Own:
    """What a start of the stack gives its mini-cluster (deploy.flink), by the environment."""

    checkpoints: Path
    """Folder."""
    jars: tuple[Path, ...]
    classes: Path
    """Folder of classes that come before those in jars."""
    keystore: Path
    keystore_password: str

    @classmethod
    def given(cls) -> Own | None:
        """None where a cluster runs the job."""
        if "TALLY_CHECKPOINTS" not in os.environ:
            return None
        return cls(
            checkpoints=Path(os.environ["TALLY_CHECKPOINTS"]),
            jars=tuple(map(Path, os.environ["TALLY_FLINK_JARS"].split(":"))),
            classes=Path(os.environ["TALLY_FLINK_CLASSES"]),
            keystore=Path(os.environ["TALLY_FLINK_KEYSTORE"]),
            keystore_password=os.environ["TALLY_FLINK_KEYSTORE_PASSWORD"],
        )


def mini_cluster(own: Own) -> dict[str, str]:
    """What a Flink needs besides that lives and dies with this process."""
    options = {
        "pipeline.jars": ";".join(jar.absolute().as_uri() for jar in own.jars),
        "execution.checkpointing.dir": flink_path(own.checkpoints),
        "python.executable": sys.executable,
        "python.client.executable": sys.executable,
        "rest.bind-address": "127.0.0.1",
        "rest.address": "127.0.0.1",
        "rest.bind-port": "0",
        "jobmanager.bind-host": "127.0.0.1",
        "taskmanager.bind-host": "127.0.0.1",
        "web.submit.enable": "false",
        "web.cancel.enable": "false",
        "web.rescale.enable": "false",
        # What listens speaks to a certificate that this start alone has the key of.
        "security.ssl.internal.enabled": "true",
        "security.ssl.rest.enabled": "true",
        "security.ssl.rest.authentication-enabled": "true",
        "security.ssl.algorithms": "TLS_AES_128_GCM_SHA256",
        "security.ssl.protocol": "TLSv1.3",
    }
    for store in ("keystore", "truststore"):
        options[f"security.ssl.{store}"] = str(own.keystore)
        options[f"security.ssl.{store}-password"] = own.keystore_password
    options["security.ssl.key-password"] = own.keystore_password
    latest = latest_checkpoint(own.checkpoints)
    if latest is not None:
        options["execution.state-recovery.path"] = flink_path(latest)
    return options


def flink_path(folder: Path) -> str:
    """A folder as Flink takes it: of a URI it reads no escapes, and would make a folder named a%20b."""
    return f"file://{folder.absolute()}"


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder; None where there is none."""
    whole = [path.parent for path in folder.glob("*/chk-*/_metadata")]
    return max(whole, key=lambda path: (path / "_metadata").stat().st_mtime, default=None)


def environment(settings: StreamSettings, group: str = CONSUMER_GROUP) -> TableEnvironment:
    """An environment that knows the tables; a mini-cluster where TALLY_CHECKPOINTS names a folder,
    which goes on from the latest checkpoint there, and otherwise the cluster that it is run on."""
    options = configuration(settings)
    own = Own.given()
    if own is not None:
        gateway.start(own.classes)
        options |= mini_cluster(own)
    made = Configuration()
    for name, value in options.items():
        made.set_string(name, value)
    table = TableEnvironment.create(
        EnvironmentSettings.new_instance().in_streaming_mode().with_configuration(made).build()
    )
    login = connector_settings(settings)
    names = {
        "kafka": ",\n    ".join(f"'properties.{n}' = {sql_text(v)}" for n, v in login.items()),
        "group": group,
        "transactions": settings.transactions_topic,
        "labels": settings.labels_topic,
        "dead_letters": settings.dead_letter_topic,
        "letter_bytes_max": LETTER_BYTES_MAX,
    }
    table.execute_sql(EVENTS.format(**names))
    table.execute_sql(DEAD_LETTERS.format(**names))
    return table


def sql_text(value: str) -> str:
    """A value as SQL writes it."""
    return "'" + value.replace("'", "''") + "'"


def run(table: TableEnvironment, function: ScalarFunction) -> None:
    """Has `function` applied to the events until the job is cancelled; returns at once where a
    cluster runs it."""
    applied = udf(function, result_type=DataTypes.STRING(), func_type="pandas")
    table.create_temporary_function(FUNCTION, applied)
    job = table.execute_sql(WIRING)
    if Own.given() is not None:
        job.wait()  # the mini-cluster ends with this process


if __name__ == "__main__":
    run(environment(StreamSettings()), ApplyEvents())
