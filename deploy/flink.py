"""The stream job on a Flink of its own: a mini-cluster in one JVM, with Python workers.

Nothing of it takes commands or events from others on the machine (ADR 24): Java's gateway has a token
(stream_job.gateway), what Flink opens asks for a certificate, and Beam's servers, by which Java and
Python workers exchange the events, are Unix sockets in a folder of ours.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO
from zipfile import BadZipFile, ZipFile

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption
from cryptography.hazmat.primitives.serialization.pkcs12 import serialize_key_and_certificates
from cryptography.x509.oid import NameOID

from deploy.classfile import ClassFileError, with_body_of
from deploy.jars import jars, java_home
from deploy.processes import StackError, spawn

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-stream"
"""PyFlink's pins want an environment of their own."""
HEAP_MB_MAX = 768
JAVA_OPTIONS = (
    f"-Xmx{HEAP_MB_MAX}m",
    "-XX:+UseSerialGC",
    # What Flink, Arrow and Kryo reach into; Flink's own settings have the same list.
    *(
        f"--add-opens=java.base/{package}=ALL-UNNAMED"
        for package in (
            *("java.lang", "java.lang.reflect", "java.net", "java.io", "java.nio", "java.text"),
            *("java.time", "java.util", "java.util.concurrent", "java.util.concurrent.atomic"),
            *("java.util.concurrent.locks", "sun.nio.ch"),
        )
    ),
    *(
        f"--add-exports={package}=ALL-UNNAMED"
        for package in ("java.rmi/sun.rmi.registry", "java.security.jgss/sun.security.krb5")
    ),
)


SERVERS = "org/apache/beam/sdk/fn/server/ServerFactory.class"
"""What chooses how Beam's servers listen: on every address of the machine, or on Unix sockets."""
JOB = ("stream_job.pipeline",)
CERTIFICATE_SLACK = timedelta(days=10 * 365)
"""A clock that is set back may be behind when the certificate was made."""
CERTIFICATE_LIFE = timedelta(days=100 * 365)
"""A job may run for long; the key is gone with it."""
LOG_SETTINGS = "log4j.properties"
NOT_APPENDING, APPENDING = "appender.file.append = false", "appender.file.append = true"
TEMPORARY = "temporary-"
"""How folders begin that are one start's own."""


def start(
    data: Path, log: IO[bytes], job: Sequence[str] = JOB, **settings: str
) -> subprocess.Popen[bytes]:
    """Starts the job's process, which starts Java, which starts Python workers.

    Args:
        data: the stack's folder.
        log: takes its output.
        job: the module to run, and its arguments.
        settings: of its environment, besides.

    Raises:
        StackError: Flink's environment is not here.
    """
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        raise StackError(f"{ENVIRONMENT} is not here: `make setup` makes it")
    checkpoints = data / "flink" / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    for left in (data / "flink").glob(f"{TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True)  # another's, which may not have died altogether
    temporary = tempfile.mkdtemp(prefix=TEMPORARY, dir=data / "flink")
    keystore, password = Path(temporary) / "keystore.p12", secrets.token_urlsafe(24)
    write_keystore(keystore, password)
    write_log_settings(Path(temporary))
    environment = os.environ | {
        "TALLY_DATA": str(data),
        "TALLY_FLINK_JARS": ":".join(map(str, jars("flink"))),
        "TALLY_FLINK_CLASSES": str(write_classes(Path(temporary) / "classes")),
        "TALLY_CHECKPOINTS": str(checkpoints),
        "TALLY_FLINK_KEYSTORE": str(keystore),
        "TALLY_FLINK_KEYSTORE_PASSWORD": password,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'clients' / 'src'}",
        "PATH": f"{python.parent}:{java_home() / 'bin'}:{os.environ.get('PATH', '')}",
        "JAVA_HOME": str(java_home()),
        "FLINK_ENV_JAVA_OPTS": " ".join(JAVA_OPTIONS),
        "FLINK_LOG_DIR": str(data / "logs"),
        # Flink leaves files behind, even where it ends in order: here they are found and deleted.
        # Java is given the same folder, by a name that its options take (stream_job.gateway).
        "TMPDIR": temporary,
        # Processes of their own, as on any other Flink, instead of threads of the job's client.
        "_python_worker_execution_mode": "process",
    }
    return spawn(
        [python, "-m", *job],
        log=log,
        on_parent_death=signal.SIGTERM,
        env=environment | settings,
        cwd=data,
    )


def write_log_settings(folder: Path) -> None:
    """Writes PyFlink's settings of Java's log, but for one: it appends. The log is emptied when it is full
    (deploy.logs), and a writer that does not append would go on behind a hole.

    Raises:
        StackError: PyFlink has no such settings.
    """
    found = sorted(ENVIRONMENT.glob("lib/python3*/site-packages/pyflink/conf/log4j-cli.properties"))
    text = found[0].read_text() if found else ""
    if NOT_APPENDING not in text:
        raise StackError(f"PyFlink's settings of its log in {ENVIRONMENT} are not those expected")
    (folder / LOG_SETTINGS).write_text(text.replace(NOT_APPENDING, APPENDING))


def write_classes(folder: Path) -> Path:
    """Writes Beam's ServerFactory as it is in PyFlink's jar, but for its default: Unix sockets, in
    Java's folder for temporary files. Returns the folder, for the class path.

    Raises:
        StackError: the jar is not there, or holds another class than it did.
    """
    found = sorted(ENVIRONMENT.glob("lib/python3*/site-packages/pyflink/opt/flink-python-*.jar"))
    if not found:
        raise StackError(f"PyFlink's jar is not in {ENVIRONMENT}: `make setup` puts it there")
    try:
        with ZipFile(found[0]) as jar:
            patched = with_body_of(jar.read(SERVERS), "createDefault", "createEpollDomainSocket")
    except (ClassFileError, KeyError, BadZipFile) as error:
        raise StackError(f"{found[0]} is not what `make setup` put there: {error}") from error
    path = folder / SERVERS
    path.parent.mkdir(parents=True)
    path.write_bytes(patched)
    return folder


def write_keystore(path: Path, password: str) -> None:
    """Writes a key, and a certificate by it, that what Flink opens shows and asks for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tally")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CERTIFICATE_SLACK)
        .not_valid_after(now + CERTIFICATE_LIFE)
        .sign(key, SHA256())
    )
    encryption = BestAvailableEncryption(password.encode())
    content = serialize_key_and_certificates(b"tally", key, certificate, None, encryption)
    path.touch(mode=0o600)
    path.write_bytes(content)


def stop(child: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Ends the job with all that belongs to it. Where it had come to is in its last checkpoint."""
    end_group(child, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        child.wait(timeout_s)
    end_group(child, signal.SIGKILL)
    child.wait()


def end_group(child: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """Sends a signal to a child and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, how)
