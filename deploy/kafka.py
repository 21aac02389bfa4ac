"""One Kafka broker, from jars: its own controller (KRaft), on loopback, behind passwords.

Clients log in as CLIENT with the stack's secret, which SCRAM proves and does not send: a process that
took the port while the broker is away learns nothing. SCRAM's users are kept in the cluster itself, so the
first one is written by another: BROKER, a user of PLAIN, whose password stands in the settings file and is
new at every start. The broker uses it towards itself, and the supervisor once, when the broker has its
port, to write CLIENT's password. It does so at every start: a cluster that was made without passwords then
has them.
"""

from __future__ import annotations

import signal
import subprocess
import uuid
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import IO

from confluent_kafka import KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # they are exported
    AdminClient,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from deploy.jars import jars, java
from deploy.processes import StackError, listens, spawn
from deploy.stack import write_private
from stream_job.kafka import Mechanism, Protocol, jaas

STOP_SIGNAL = signal.SIGTERM
SETTINGS_FILE = "server.properties"
HEAP_MB_MAX = 512
MESSAGE_BYTES_MAX = 2 << 20
"""Larger values never reach a topic; the job bounds what it takes by itself."""
BROKER, CLIENT = "broker", "tally"
SCRAM_ITERATIONS = 4096
"""Kafka's least: the secret is random, and cannot be guessed from its hash."""
ANSWER_TIMEOUT_S = 5.0


def login(secret: str) -> dict[str, str]:
    """The settings (stream_job.settings) that let a client in."""
    return {
        "kafka_security_protocol": str(Protocol.SASL_PLAINTEXT),
        "kafka_sasl_mechanism": str(Mechanism.SCRAM_SHA_512),
        "kafka_user": CLIENT,
        "kafka_password": secret,
    }


def write_settings(folder: Path, port: int, controller_port: int, password: str) -> Path:
    """Writes the settings file, readable by its owner only.

    Args:
        folder: the broker's own.
        port: for clients.
        controller_port: for the broker itself.
        password: of BROKER. Ports and password are new at every start.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / SETTINGS_FILE
    own = jaas(Mechanism.PLAIN, username=BROKER, password=password, **{f"user_{BROKER}": password})
    settings = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        "controller.listener.names": "CONTROLLER",
        "listeners": f"CLIENTS://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": f"CLIENTS://127.0.0.1:{port}",
        "inter.broker.listener.name": "CLIENTS",
        "listener.security.protocol.map": "CONTROLLER:SASL_PLAINTEXT,CLIENTS:SASL_PLAINTEXT",
        "sasl.mechanism.inter.broker.protocol": Mechanism.PLAIN,
        "sasl.mechanism.controller.protocol": Mechanism.PLAIN,
        "listener.name.clients.sasl.enabled.mechanisms": f"{Mechanism.SCRAM_SHA_512},{Mechanism.PLAIN}",
        "listener.name.clients.scram-sha-512.sasl.jaas.config": jaas(Mechanism.SCRAM_SHA_512),
        "listener.name.clients.plain.sasl.jaas.config": own,
        "listener.name.controller.sasl.enabled.mechanisms": Mechanism.PLAIN,
        "listener.name.controller.plain.sasl.jaas.config": own,
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
    write_private(path, "".join(f"{name}={_escaped(value)}\n" for name, value in settings.items()))
    return path


def _escaped(value: object) -> str:
    """A value as a file of Java's properties has it."""
    return str(value).replace("\\", "\\\\")


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


def is_ready(child: subprocess.Popen[bytes], port: int, password: str, secret: str) -> bool:
    """Whether the broker answers, and clients can log in with the stack's secret.

    Args:
        child: its process. A password is shown to no other that may listen on the port.
        port: for clients.
        password: BROKER's.
        secret: the stack's.
    """
    return listens(child.pid, port) and _set_client_password(port, password, secret)


def _set_client_password(port: int, password: str, secret: str) -> bool:
    """Writes CLIENT's password; returns whether CLIENT can log in already."""
    own = _admin(port, Mechanism.PLAIN, BROKER, password)
    client = _admin(port, Mechanism.SCRAM_SHA_512, CLIENT, secret)
    iterated = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, SCRAM_ITERATIONS)
    written = UserScramCredentialUpsertion(CLIENT, iterated, secret.encode())
    try:
        made = own.alter_user_scram_credentials([written], request_timeout=ANSWER_TIMEOUT_S)
        made[CLIENT].result(ANSWER_TIMEOUT_S)
        return bool(client.list_topics(timeout=1).brokers)
    except (KafkaException, TimeoutError):
        return False


def _admin(port: int, mechanism: Mechanism, user: str, password: str) -> AdminClient:
    return AdminClient(
        {
            "bootstrap.servers": f"127.0.0.1:{port}",
            "log_level": 0,
            "security.protocol": str(Protocol.SASL_PLAINTEXT),
            "sasl.mechanism": str(mechanism),
            "sasl.username": user,
            "sasl.password": password,
        }
    )
