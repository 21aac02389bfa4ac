"""A certificate authority of a test's own, and what it signed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Certificates:
    """PEM files."""

    ca: Path
    server_pem: Path
    """Key and certificate in one, of localhost."""
    client: Path
    client_key: Path


def make_certificates(folder: Path) -> Certificates:
    """Makes an authority, and a server's and a client's certificate that are valid for a day."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = _certificate("authority", ca_key, None)
    made = Certificates(
        *(folder / name for name in ("ca.pem", "server.pem", "client.pem", "key.pem"))
    )
    made.ca.write_bytes(_pem(ca))
    for name, certificate, key in (
        ("localhost", made.server_pem, made.server_pem),
        ("client", made.client, made.client_key),
    ):
        own_key = ec.generate_private_key(ec.SECP256R1())
        own = _certificate(name, own_key, (ca, ca_key))
        key.write_bytes(own_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        with certificate.open("ab") as file:
            file.write(_pem(own))
    return made


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer[0].subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .sign(key if issuer is None else issuer[1], SHA256())
    )
