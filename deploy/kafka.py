"""One Kafka broker, from jars: its own controller (KRaft), on loopback."""

from __future__ import annotations

import signal
import subprocess
import uuid
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import IO

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from deploy.jars import jars, java
from deploy.processes import StackError, spawn

STOP_SIGNAL = signal.SIGTERM
SETTINGS_FILE = "server.properties"
HEAP_MB_MAX = 512
MESSAGE_BYTES_MAX = 2 << 20
"""Larger values never reach a topic; the job bounds what it takes by itself."""


def write_settings(folder: Path, port: int, controller_port: int) -> Path:
    """Writes the settings file; the ports are new at every start."""
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / SETTINGS_FILE
    settings = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        "controller.listener.names": "CONTROLLER",
        "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
        # Where it is started: the format has escapes, and commas between paths, of its own.
        "log.dirs": "topics",
        "auto.create.topics.enable": "false",
        "message.max.bytes": MESSAGE_BYTES_MAX,
        # One broker, hence one copy of everything.
        "offsets.topic.replication.factor": 1,
        "offsets.topic.num.partitions": 4,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.num.partitions": 4,
        "transaction.state.log.min.isr": 1,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
        "group.initial.rebalance.delay.ms": 0,
        # A broker that is killed keeps what the operating system has; this bounds the rest.
        "log.flush.scheduler.interval.ms": 1000,
    }
    path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    return path


def _command(main: str, *arguments: str | Path) -> list[str | Path]:
    classpath = ":".join(map(str, jars("kafka")))
    return [java(), f"-Xmx{HEAP_MB_MAX}m", "-XX:+UseSerialGC", "-cp", classpath, main, *arguments]


def cluster_id() -> str:
    """A new cluster's id as Kafka's own tool makes it: never one that begins with a dash, which that tool
    would take for an option."""
    while True:
        made = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if not made.startswith("-"):
            return made


def prepare(settings: Path) -> None:
    """Makes the storage folder, once.

    Raises:
        StackError: it cannot be made.
    """
    if (settings.parent / "topics" / "meta.properties").exists():
        return
    command = _command("kafka.tools.StorageTool", "format", "-t", cluster_id(), "-c", settings)
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=settings.parent
    )
    if result.returncode:
        raise StackError(f"Kafka's storage cannot be made: {result.stderr.strip()[-2000:]}")


def start(settings: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts the broker's process, at home in its folder."""
    return spawn(
        _command("kafka.Kafka", settings),
        log=log,
        on_parent_death=signal.SIGKILL,
        cwd=settings.parent,
    )


def is_ready(port: int) -> bool:
    """Whether the broker answers."""
    client = AdminClient({"bootstrap.servers": f"127.0.0.1:{port}", "log_level": 0})
    try:
        return bool(client.list_topics(timeout=1).brokers)
    except KafkaException:
        return False
