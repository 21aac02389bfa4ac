"""How Kafka's clients log in: the same settings for librdkafka (Python) and for Flink's connector (Java)."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stores.settings import SettingsError

if TYPE_CHECKING:
    from stream_job.settings import StreamSettings

_LOGIN_MODULES = "org.apache.kafka.common.security"
_CONNECTOR_SHADING = "org.apache.flink.kafka.shaded."
"""Where Flink's connector keeps its copy of Kafka's client."""


class Protocol(StrEnum):
    """How Kafka is reached, by Kafka's own names."""

    PLAINTEXT = "PLAINTEXT"
    SSL = "SSL"
    SASL_PLAINTEXT = "SASL_PLAINTEXT"
    SASL_SSL = "SASL_SSL"

    @property
    def is_sasl(self) -> bool:
        """Whether clients log in with a name and a password."""
        return self.startswith("SASL_")

    @property
    def is_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.endswith("SSL")


class Mechanism(StrEnum):
    """How a password is shown to Kafka. SCRAM proves it, PLAIN sends it."""

    PLAIN = "PLAIN"
    SCRAM_SHA_256 = "SCRAM-SHA-256"
    SCRAM_SHA_512 = "SCRAM-SHA-512"


def jaas(mechanism: Mechanism, shading: str = "", **options: str) -> str:
    """A login in the syntax of Java's JAAS: of a client, or what a broker's listener takes.

    Args:
        mechanism: chooses the login module.
        shading: the prefix of Kafka's packages, where they were renamed.
        options: username and password, and for a listener user_<name>.
    """
    module = "plain.Plain" if mechanism is Mechanism.PLAIN else "scram.Scram"
    quoted = "".join(f' {name}="{_escaped(value)}"' for name, value in options.items())
    return f"{shading}{_LOGIN_MODULES}.{module}LoginModule required{quoted};"


def _escaped(text: str) -> str:
    """Text between JAAS's double quotes."""
    return text.replace("\\", "\\\\").replace('"', '\\"')


def check(settings: StreamSettings) -> None:
    """Refuses settings of which some would be without effect, or are missing.

    Raises:
        SettingsError: says which.
    """
    protocol = settings.kafka_security_protocol
    login = {"USER": settings.kafka_user, "PASSWORD": settings.kafka_password}
    pair = {
        "CERTIFICATE_FILE": settings.kafka_certificate_file,
        "KEY_FILE": settings.kafka_key_file,
    }
    tls = pair | {"CA_FILE": settings.kafka_ca_file}
    for name, value in login.items():
        if (value is not None) != protocol.is_sasl:
            raise SettingsError(_contradiction(name, protocol, is_missing=value is None))
    for name, path in tls.items():
        if path is not None and not protocol.is_tls:
            raise SettingsError(_contradiction(name, protocol, is_missing=False))
    if len({path is None for path in pair.values()}) > 1:
        raise SettingsError("TALLY_KAFKA_CERTIFICATE_FILE and TALLY_KAFKA_KEY_FILE go together")
    for name, path in tls.items():
        if path is not None and not path.is_file():
            raise SettingsError(f"TALLY_KAFKA_{name}={path} is no file")


def _contradiction(name: str, protocol: Protocol, *, is_missing: bool) -> str:
    chosen = f"TALLY_KAFKA_SECURITY_PROTOCOL={protocol}"
    if is_missing:
        return f"{chosen} needs TALLY_KAFKA_{name}"
    kind = "SASL_PLAINTEXT or SASL_SSL" if name in ("USER", "PASSWORD") else "SSL or SASL_SSL"
    return f"TALLY_KAFKA_{name} is set, but {chosen} does not use it: set {kind}"


def client_settings(settings: StreamSettings) -> dict[str, Any]:
    """Where Kafka is and how to log in, for a client of librdkafka.

    Raises:
        SettingsError: no servers are set, and no stack runs in the data folder.
    """
    made: dict[str, Any] = {
        "bootstrap.servers": settings.kafka(),
        "security.protocol": str(settings.kafka_security_protocol),
        "log_level": 0,
    }
    if settings.kafka_user is not None and settings.kafka_password is not None:
        made["sasl.mechanism"] = str(settings.kafka_sasl_mechanism)
        made["sasl.username"] = settings.kafka_user
        made["sasl.password"] = settings.kafka_password.get_secret_value()
    if settings.kafka_ca_file is not None:
        made["ssl.ca.location"] = str(settings.kafka_ca_file)
    if settings.kafka_certificate_file is not None:
        made["ssl.certificate.location"] = str(settings.kafka_certificate_file)
        made["ssl.key.location"] = str(settings.kafka_key_file)
    return made


def connector_settings(settings: StreamSettings) -> dict[str, str]:
    """The same for Flink's Kafka connector.

    Raises:
        SettingsError: no servers are set, or a file cannot be read.
    """
    made = {
        "bootstrap.servers": settings.kafka(),
        "security.protocol": str(settings.kafka_security_protocol),
    }
    if settings.kafka_user is not None and settings.kafka_password is not None:
        mechanism = settings.kafka_sasl_mechanism
        made["sasl.mechanism"] = str(mechanism)
        made["sasl.jaas.config"] = jaas(
            mechanism,
            _CONNECTOR_SHADING,
            username=settings.kafka_user,
            password=settings.kafka_password.get_secret_value(),
        )
    # The texts and not the paths: the files need not be on every node of a cluster.
    if settings.kafka_ca_file is not None:
        made["ssl.truststore.type"] = "PEM"
        made["ssl.truststore.certificates"] = _read(settings.kafka_ca_file)
    if settings.kafka_certificate_file is not None and settings.kafka_key_file is not None:
        made["ssl.keystore.type"] = "PEM"
        made["ssl.keystore.certificate.chain"] = _read(settings.kafka_certificate_file)
        made["ssl.keystore.key"] = _read(settings.kafka_key_file)
    return made


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None
