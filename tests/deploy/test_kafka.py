"""The embedded broker's storage and its passwords, and a Kafka of one's own behind TLS."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from deploy import flink, kafka
from deploy.jars import jars, java
from deploy.processes import START_TIMEOUT_S, STOP_TIMEOUT_S, free_port, listens, stop
from features import CardKey
from stores.errors import StoreError
from stores.settings import SettingsError
from stream_job import topics
from stream_job.kafka import Mechanism, client_settings, connector_settings
from stream_job.publish import Publisher
from stream_job.settings import KAFKA_LOGIN, StreamSettings
from stream_job.topics import TopicEnds, make_topics
from tests.commands import JAVA_VARIABLE, OF_JAVA
from tests.deploy.certificates import Certificates, make_certificates
from tests.stream_job.watching import wait_for

SECRET = 'the stack\'s "secret" \\ {and} $more'
BROKERS = "of-the-broker"
ANSWER_S = 5.0
REFUSED_AFTER_S = (1.0, 4.0, 16.0)
PLAINTEXT = """
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
sasl.mechanism.inter.broker.protocol=GSSAPI
"""
"""What made a broker that asked for no password, before there were any."""
TLS = """
listeners=CLIENTS://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller},LOGIN://127.0.0.1:{login},CERT://127.0.0.1:{certificate}
advertised.listeners=CLIENTS://127.0.0.1:{port},LOGIN://localhost:{login},CERT://localhost:{certificate}
listener.security.protocol.map=CONTROLLER:SASL_PLAINTEXT,CLIENTS:SASL_PLAINTEXT,LOGIN:SASL_SSL,CERT:SSL
listener.name.login.sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.login.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.cert.ssl.client.auth=required
ssl.keystore.type=PEM
ssl.keystore.location={keystore}
ssl.truststore.type=PEM
ssl.truststore.location={ca}
"""
"""Two listeners as others have them: a password over TLS, and a certificate."""


def test_an_id_that_looks_like_an_option_is_not_used(monkeypatch):
    drawn = iter([uuid.UUID(int=0xF8 << 120), uuid.UUID(int=0xFB << 120), uuid.UUID(int=1)])
    monkeypatch.setattr(uuid, "uuid4", lambda: next(drawn))
    assert kafka.cluster_id() == "AAAAAAAAAAAAAAAAAAAAAQ"


@dataclass(frozen=True)
class Broker:
    """A running broker."""

    folder: Path
    log: Path
    port: int
    controller: int
    login: int
    certificate: int
    process: subprocess.Popen[bytes]
    certificates: Certificates

    def own_kafka(self, port: int, **changed: Any) -> StreamSettings:
        """Settings for a Kafka of one's own, behind TLS."""
        given = {
            "data": self.folder,
            "kafka_servers": f"localhost:{port}",
            "kafka_ca_file": self.certificates.ca,
            "dead_letter_topic": f"letters-{port}",
            "transactions_topic": f"transactions-{port}",
            "labels_topic": f"labels-{port}",
        }
        return StreamSettings(**given | changed)


def before_passwords(folder: Path, log: Path) -> None:
    """Leaves a folder as a broker does that was made before there were passwords, with an event."""
    port, controller = free_port(), free_port()
    path = kafka.write_settings(folder, port, controller, "none")
    kept = [line for line in path.read_text().splitlines() if "sasl" not in line]
    text = "\n".join(kept) + PLAINTEXT.format(port=port, controller=controller)
    path.write_text(text.replace("sasl.mechanism.controller.protocol=PLAIN\n", ""))
    kafka.prepare(path)
    with log.open("ab") as file:
        process = kafka.start(path, file)
    client = AdminClient({"bootstrap.servers": f"127.0.0.1:{port}", "log_level": 0})

    def answers() -> bool:
        try:
            return bool(listens(process.pid, port) and client.list_topics(timeout=1).brokers)
        except KafkaException:
            return False

    wait_for(f"kafka, see {log}", answers, START_TIMEOUT_S)
    client.create_topics([NewTopic("before", 1, 1)])["before"].result(ANSWER_S)
    producer = Producer({"bootstrap.servers": f"127.0.0.1:{port}", "log_level": 0})
    producer.produce("before", b"an event")
    assert producer.flush(ANSWER_S) == 0
    stop(process, kafka.STOP_SIGNAL, STOP_TIMEOUT_S)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker as the stack starts it, in a folder from before there were passwords, with two listeners
    more, behind TLS."""
    folder = tmp_path_factory.mktemp("broker") / "kafka"
    log = folder.parent / "kafka.log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(JAVA_VARIABLE, OF_JAVA[JAVA_VARIABLE])
        yield from started_broker(folder, log)


def started_broker(folder: Path, log: Path) -> Iterator[Broker]:
    before_passwords(folder, log)
    certificates = make_certificates(folder.parent)
    ports = [free_port() for _ in range(4)]
    names = dict(zip(("port", "controller", "login", "certificate"), ports, strict=True))
    path = kafka.write_settings(folder, names["port"], names["controller"], BROKERS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keystore = certificates.server_pem
    path.write_text(path.read_text() + TLS.format(keystore=keystore, ca=certificates.ca, **names))
    kafka.prepare(path)
    with log.open("ab") as file:
        process = kafka.start(path, file)
    try:
        wait_for(
            f"kafka, see {log}",
            lambda: kafka.is_ready(process, names["port"], BROKERS, SECRET),
            START_TIMEOUT_S,
        )
        yield Broker(folder, log, **names, process=process, certificates=certificates)
    finally:
        stop(process, signal.SIGKILL, STOP_TIMEOUT_S)


def stack_settings(broker: Broker, **changed: Any) -> StreamSettings:
    """Settings as the stack has them."""
    given = {"data": broker.folder, "kafka_servers": f"127.0.0.1:{broker.port}"}
    return StreamSettings(**given | kafka.login(SECRET) | changed)


@pytest.mark.budget(
    60, "the first test here: a broker is started twice, each time for some six seconds"
)
def test_a_folder_from_before_there_were_passwords_keeps_its_events_and_asks_for_one(broker):
    login = client_settings(stack_settings(broker)) | {"group.id": "g"}
    consumer = Consumer(login)
    consumer.assign([TopicPartition("before", 0, 0)])
    message = consumer.poll(ANSWER_S)
    consumer.close()
    assert message is not None
    assert message.value() == b"an event"


RIGHT = {"sasl.mechanism": "SCRAM-SHA-512", "sasl.username": "tally", "sasl.password": SECRET}
BROKERS_OWN = {"sasl.mechanism": "PLAIN", "sasl.username": "broker", "sasl.password": BROKERS}
WRONG = (
    {"security.protocol": "PLAINTEXT"},
    RIGHT | {"sasl.password": "another"},
    BROKERS_OWN | {"sasl.mechanism": "SCRAM-SHA-512"},
    BROKERS_OWN | {"sasl.password": "another"},
    RIGHT | {"sasl.mechanism": "PLAIN"},  # what would go over the wire in the clear is not taken
)


@pytest.mark.parametrize(("listener", "right"), [("port", RIGHT), ("controller", None)])
def test_it_answers_none_but_who_knows_the_secret(broker, listener, right):
    servers: dict[str, Any] = {
        "bootstrap.servers": f"127.0.0.1:{getattr(broker, listener)}",
        "log_level": 0,
        "security.protocol": "SASL_PLAINTEXT",
    }

    def lets_in(login: dict[str, Any]) -> bool:
        try:
            return bool(AdminClient(servers | login).list_topics(timeout=ANSWER_S / 2).brokers)
        except KafkaException:
            return False

    with ThreadPoolExecutor(len(WRONG)) as pool:
        assert not any(pool.map(lets_in, WRONG))
    assert right is None or lets_in(right)


def test_a_password_is_shown_to_no_process_but_the_broker(broker):
    assert listens(broker.process.pid, broker.port)
    assert not listens(psutil.Process().pid, broker.port)


def test_passwords_are_on_no_command_line_in_no_environment_and_in_no_log(broker):
    process = psutil.Process(broker.process.pid)
    seen = [*process.cmdline(), *process.environ().values(), broker.log.read_text()]
    seen += [path.read_text(errors="replace") for path in (broker.folder / "topics").glob("*.log")]
    for secret in (SECRET, BROKERS):
        assert not [text for text in seen if secret in text]


def uses_everything(settings: StreamSettings, card_key: CardKey) -> None:
    """Makes topics, publishes, and asks how far the topics reach."""
    make_topics(settings)
    Publisher(settings, card_key).send(settings.labels_topic, b"key", b"value")
    ends = TopicEnds(settings)
    reached = ends.of((settings.labels_topic,))
    ends.close()
    assert sum(end for _, end in reached.values()) == 1


@pytest.mark.budget(30, "a Java of its own logs in by Flink's connector, too")
@pytest.mark.parametrize("how", ["password", "password over TLS", "certificate"])
def test_every_client_of_ours_and_flinks_logs_in(broker, how):
    settings = {
        "password": lambda: stack_settings(broker),
        "password over TLS": lambda: broker.own_kafka(
            broker.login,
            kafka_security_protocol="SASL_SSL",
            kafka_user=kafka.CLIENT,
            kafka_password=SECRET,
        ),
        "certificate": lambda: broker.own_kafka(
            broker.certificate,
            kafka_security_protocol="SSL",
            kafka_certificate_file=broker.certificates.client,
            kafka_key_file=broker.certificates.client_key,
        ),
    }[how]()
    uses_everything(settings, CardKey(b"k" * 40))
    assert connects_in_java(settings)


def test_a_kafka_that_asks_for_a_certificate_takes_no_client_without(broker, monkeypatch):
    monkeypatch.setattr(topics, "TIMEOUT_S", ANSWER_S / 2)
    with pytest.raises(StoreError, match="kafka cannot be reached"):
        make_topics(broker.own_kafka(broker.certificate, kafka_security_protocol="SSL"))


IN_JAVA = """
import json, sys
from py4j.java_gateway import JavaGateway

login, jar, java = json.load(sys.stdin)
gateway = JavaGateway.launch_gateway(
    classpath=jar, java_path=java, die_on_exit=True, enable_auth=True
)
properties = gateway.jvm.java.util.Properties()
for name, value in login.items():
    properties.setProperty(name, value)
kafka = gateway.jvm.org.apache.flink.kafka.shaded.org.apache.kafka
names = kafka.clients.admin.Admin.create(properties).listTopics().names()
print(names.get(30, gateway.jvm.java.util.concurrent.TimeUnit.SECONDS).toString())
gateway.shutdown()
"""
"""Lists the topics by the client within Flink's connector."""


def connects_in_java(settings: StreamSettings) -> bool:
    """Whether Flink's connector gets in with what it is given."""
    # Flink has what it logs by; it is not in the connector.
    wanted = [*jars("flink"), *(jar for jar in jars("kafka") if jar.name.startswith("slf4j-api"))]
    result = subprocess.run(
        [flink.ENVIRONMENT / "bin" / "python", "-c", IN_JAVA],
        input=json.dumps([connector_settings(settings), ":".join(map(str, wanted)), str(java())]),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    print(result.stdout, result.stderr)
    return result.returncode == 0 and settings.labels_topic in result.stdout


def test_what_is_wrong_with_a_login_is_said(broker, monkeypatch):
    wrong = stack_settings(broker, kafka_password="another")
    assert says_so(lambda: make_topics(wrong), monkeypatch)
    assert says_so(lambda: TopicEnds(wrong).of(("before",)), monkeypatch)


def says_so(use: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the broker's refusal is in the error, with time enough for it to arrive."""
    for within_s in REFUSED_AFTER_S:
        monkeypatch.setattr(topics, "TIMEOUT_S", within_s)
        with pytest.raises(StoreError) as raised:
            use()
        if "Authentication failed" in str(raised.value):
            return True
    return False


PROTOCOL = "kafka_security_protocol"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({PROTOCOL: "SASL_SSL", "kafka_user": "u"}, "SASL_SSL needs TALLY_KAFKA_PASSWORD"),
        ({PROTOCOL: "SASL_PLAINTEXT"}, "SASL_PLAINTEXT needs TALLY_KAFKA_USER"),
        (
            {"kafka_user": "u", "kafka_password": "p"},
            "PLAINTEXT does not use it: set SASL_PLAINTEXT",
        ),
        (
            {PROTOCOL: "SSL", "kafka_user": "u"},
            "SSL does not use it: set SASL_PLAINTEXT or SASL_SSL",
        ),
        ({"kafka_ca_file": __file__}, "PLAINTEXT does not use it: set SSL or SASL_SSL"),
        ({PROTOCOL: "SSL", "kafka_ca_file": "/nowhere"}, "TALLY_KAFKA_CA_FILE=/nowhere is no file"),
        ({PROTOCOL: "SSL", "kafka_key_file": __file__}, "KAFKA_KEY_FILE go together"),
        ({PROTOCOL: "TLS"}, "TALLY_KAFKA_SECURITY_PROTOCOL=TLS"),
        ({"kafka_sasl_mechanism": "GSSAPI"}, "TALLY_KAFKA_SASL_MECHANISM=GSSAPI"),
    ],
)
def test_a_login_that_contradicts_itself_is_refused_by_name(tmp_path, given, message):
    with pytest.raises(SettingsError, match=message):
        StreamSettings(data=tmp_path, kafka_servers="kafka:9092", **given)


def test_the_stacks_login_is_not_tried_on_another_kafka_nor_the_other_way(tmp_path, monkeypatch):
    stack = {"kafka_servers": "127.0.0.1:1", **kafka.login(SECRET)}
    (tmp_path / "stack.json").write_text(json.dumps({"settings": stack}))
    own = StreamSettings(data=tmp_path)
    assert own.kafka_password is not None
    assert own.kafka_login() == kafka.login(SECRET)
    monkeypatch.setenv("TALLY_KAFKA_SERVERS", "127.0.0.1:1")
    assert StreamSettings(data=tmp_path).kafka_login() == kafka.login(SECRET)
    monkeypatch.setenv("TALLY_KAFKA_SERVERS", "kafka:9092")
    assert StreamSettings(data=tmp_path).kafka_password is None
    monkeypatch.delenv("TALLY_KAFKA_SERVERS")
    for name in KAFKA_LOGIN:
        monkeypatch.setenv(f"TALLY_{name.upper()}", "p")
        with pytest.raises(SettingsError, match="TALLY_KAFKA_SERVERS is not"):
            StreamSettings(data=tmp_path)
        monkeypatch.delenv(f"TALLY_{name.upper()}")


def test_a_login_for_flink_is_escaped_for_its_syntax(tmp_path):
    settings = StreamSettings(data=tmp_path, kafka_servers="k:1", **kafka.login(SECRET))
    assert connector_settings(settings)["sasl.jaas.config"].endswith(
        'username="tally" password="the stack\'s \\"secret\\" \\\\ {and} $more";'
    )
    assert settings.kafka_sasl_mechanism is Mechanism.SCRAM_SHA_512
