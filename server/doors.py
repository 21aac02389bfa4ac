"""Who could come in, and how: what a server refuses to start with. Each refusal is one line that names
the setting and says what to do."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from server.settings import ServerSettings
from stores.settings import SettingsError

TOKEN_CHARS_MAX = 4_096
"""gRPC refuses metadata of more than 8 KiB by default."""
PORT_WAIT_S = 5.0
"""How long a port that is in use is waited for: a server that was killed may leave workers that drain."""
PORT_LOOK_INTERVAL_S = 0.1

_TOKEN = re.compile(r"[!-~]([ -~]*[!-~])?")
"""Printable ASCII; spaces at its ends would be lost on the way."""


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach host:port."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_doors(settings: ServerSettings, now: Callable[[], datetime] | None = None) -> None:
    """Refuses settings that would let others in or listen in, or that no client could come in by.

    Args:
        settings: the server's.
        now: the clock, by which certificates are valid; by default the machine's.

    Raises:
        SettingsError.
    """
    _check_token(settings)
    _check_tls(settings, now() if now else datetime.now(UTC))
    if is_loopback(settings.listen):
        return
    where = f"TALLY_LISTEN={settings.listen} can be reached from other machines"
    if settings.token is None and settings.tls_client_ca_file is None:
        raise SettingsError(f"{where}: set TALLY_TOKEN, or TALLY_TLS_CLIENT_CA_FILE beside TLS")
    if settings.tls_certificate_file is None and not settings.tls_terminated:
        raise SettingsError(
            f"{where}, and tokens and card numbers would cross the network as plain text: set "
            "TALLY_TLS_CERTIFICATE_FILE and TALLY_TLS_KEY_FILE, or TALLY_TLS_TERMINATED=true where "
            "something before the server encrypts"
        )


def _check_token(settings: ServerSettings) -> None:
    if settings.token is None:
        return
    token = settings.token.get_secret_value()
    if not _TOKEN.fullmatch(token):
        raise SettingsError(
            "TALLY_TOKEN has characters that a client cannot send: printable ASCII is taken, without "
            "spaces at its ends"
        )
    if len(token) > TOKEN_CHARS_MAX:
        raise SettingsError(
            f"TALLY_TOKEN has {len(token):,} characters: at most {TOKEN_CHARS_MAX:,} are taken"
        )


# --- TLS ------------------------------------------------------------------------------------


def _check_tls(settings: ServerSettings, now: datetime) -> None:
    certificate, key = settings.tls_certificate_file, settings.tls_key_file
    if (certificate is None) != (key is None):
        raise SettingsError("TLS needs both TALLY_TLS_CERTIFICATE_FILE and TALLY_TLS_KEY_FILE")
    if certificate is None or key is None:
        if settings.tls_client_ca_file is not None:
            raise SettingsError(
                "TALLY_TLS_CLIENT_CA_FILE needs TLS: set TALLY_TLS_CERTIFICATE_FILE and TALLY_TLS_KEY_FILE"
            )
        return
    chain = _certificates("TALLY_TLS_CERTIFICATE_FILE", certificate, now)
    if _spki(chain[0].public_key()) != _spki(_key("TALLY_TLS_KEY_FILE", key).public_key()):
        raise SettingsError(
            f"TALLY_TLS_KEY_FILE={key} is not the key of the first certificate in {certificate}"
        )
    if settings.tls_client_ca_file is not None:
        _certificates("TALLY_TLS_CLIENT_CA_FILE", settings.tls_client_ca_file, now)


def _spki(key: Any) -> bytes:
    """A public key of any kind, as bytes that can be compared."""
    encoded: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return encoded


def _certificates(name: str, path: Path, now: datetime) -> list[x509.Certificate]:
    """The certificates of a file, all of them valid now."""
    content = _read(name, path)
    try:
        found = x509.load_pem_x509_certificates(content)
    except ValueError:
        raise SettingsError(f"{name}={path} has no PEM certificate") from None
    for certificate in found:
        subject = certificate.subject.rfc4514_string()
        if certificate.not_valid_after_utc < now:
            raise SettingsError(
                f"{name}={path}: the certificate of {subject} expired on "
                f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
            )
        if certificate.not_valid_before_utc > now:
            raise SettingsError(
                f"{name}={path}: the certificate of {subject} is valid only from "
                f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on"
            )
    return found


def _key(name: str, path: Path) -> PrivateKeyTypes:
    content = _read(name, path)
    try:
        return serialization.load_pem_private_key(content, password=None)
    except TypeError:
        raise SettingsError(
            f"{name}={path} is protected by a passphrase, which is not taken"
        ) from None
    except ValueError:
        raise SettingsError(f"{name}={path} has no PEM private key") from None


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{name}={path} cannot be read: {error.strerror}") from None


# --- ports ----------------------------------------------------------------------------------


def hold_port(name: str, address: str) -> list[socket.socket]:
    """Takes a port for as long as the sockets that are returned are open: workers, who share it, can
    come and go, and no other server comes in between.

    Waits PORT_WAIT_S for one that is in use.

    Raises:
        SettingsError: it is in use, or cannot be listened on.
    """
    deadline = time.monotonic() + PORT_WAIT_S
    while True:
        try:
            return _held(address)
        except (socket.gaierror, UnicodeError) as error:
            problem = f"its host is not known: {getattr(error, 'strerror', None) or error}"
        except OSError as error:
            problem = _PROBLEMS.get(error.errno or 0) or str(error.strerror)
            if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                time.sleep(PORT_LOOK_INTERVAL_S)
                continue
        raise SettingsError(f"{name}={address} cannot be listened on: {problem}")


_PROBLEMS = {
    errno.EADDRINUSE: "another process listens there",
    errno.EADDRNOTAVAIL: "this machine has no such address",
    errno.EACCES: "this user may not take ports so low",
}


def _held(address: str) -> list[socket.socket]:
    host, _, port = address.rpartition(":")
    found = socket.getaddrinfo(
        host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    held: list[socket.socket] = []
    problem: OSError | None = None
    for family, kind, protocol, _, where in dict.fromkeys(found):
        try:
            # First alone: two servers that both share ports would share this one unawares.
            with socket.socket(family, kind, protocol) as alone:
                alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                alone.bind(where)
            shared = socket.socket(family, kind, protocol)
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            shared.bind(where)
            held.append(shared)
        except OSError as error:
            problem = error
            if error.errno == errno.EADDRINUSE:
                break
    if problem is not None and (not held or problem.errno == errno.EADDRINUSE):
        for taken in held:
            taken.close()
        raise problem
    return held
