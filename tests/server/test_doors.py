"""What a server refuses to start with: said in one line that names the setting."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deploy.processes import free_port
from server import doors
from server.doors import TOKEN_CHARS_MAX, check_doors, hold_port, is_loopback
from server.settings import ServerSettings
from stores.settings import SettingsError
from stream_job.settings import StreamSettings
from tests.server.certificates import Authority

DAY = timedelta(days=1)
ANYWHERE: dict[str, Any] = {"listen": "0.0.0.0:7600"}
TOKEN: dict[str, Any] = {"token": "t" * 32}


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def refusal(**settings: Any) -> str:
    """What is said of settings that are refused: one line."""
    with pytest.raises(SettingsError) as caught:
        check_doors(ServerSettings(**settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_beyond_loopback_a_server_without_token_or_client_certificates_is_refused():
    assert "TALLY_TOKEN" in refusal(**ANYWHERE)
    assert "TALLY_TOKEN" in refusal(**ANYWHERE, tls_terminated=True)


def test_beyond_loopback_a_token_without_tls_is_refused_unless_something_else_encrypts(authority):
    assert "TALLY_TLS_TERMINATED" in refusal(**ANYWHERE, **TOKEN)
    check_doors(ServerSettings(**ANYWHERE, **TOKEN, tls_terminated=True))
    certificate, key = authority.issue("server")
    tls: dict[str, Any] = {"tls_certificate_file": certificate, "tls_key_file": key}
    check_doors(ServerSettings(**ANYWHERE, **TOKEN, **tls))
    assert "TALLY_TOKEN" in refusal(**ANYWHERE, **tls)
    check_doors(ServerSettings(**ANYWHERE, **tls, tls_client_ca_file=authority.certificate_file))


@pytest.mark.parametrize(
    ("address", "is_it"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.10:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example.com:1", False),
        ("127.0.0.1.example.com:1", False),
    ],
)
def test_only_loopback_is_loopback(address, is_it):
    assert is_loopback(address) is is_it


@pytest.mark.parametrize(
    "token",
    [
        "space behind ",
        " space before",
        "tab\t",
        "new\nline",
        "Schlüssel",
        "nul\0",
        "t" * 5_000,
        "\x7f",
    ],
)
def test_a_token_that_no_client_can_send_is_refused_and_not_told(token):
    text = refusal(token=token)
    assert text.startswith("TALLY_TOKEN has ")
    assert token not in text
    for sent in ("t" * TOKEN_CHARS_MAX, "t", "spaces are sent"):
        check_doors(ServerSettings(token=sent))


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:65536", "127.0.0.1:99999", "127.0.0.1:0", "127.0.0.1", ":7600", "7600", "::1:7600", "a:-1", "a:٣"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["listen", "metrics_listen", "stream_metrics_listen"])
def test_an_address_that_is_none_is_refused_by_its_name(name, address):
    settings = StreamSettings if name.startswith("stream") else ServerSettings
    with pytest.raises(SettingsError, match=f"TALLY_{name.upper()}=.*it must be|brackets"):
        settings(**{name: address})


# --- TLS ------------------------------------------------------------------------------------


def test_tls_files_that_cannot_be_used_are_refused_by_their_setting(authority, tmp_path):
    certificate, key = authority.issue("server")
    _, other_key = authority.issue("other")
    locked = authority.lock(key)
    no_file, no_pem = tmp_path / "nowhere.pem", tmp_path / "no.pem"
    no_pem.write_text("-----BEGIN NOTHING-----\n")

    def of(certificate: Path | None, key: Path | None, authority: Path | None = None) -> str:
        return refusal(
            tls_certificate_file=certificate, tls_key_file=key, tls_client_ca_file=authority
        )

    assert "needs both" in of(certificate, None)
    assert "needs both" in of(None, key)
    assert "TALLY_TLS_CLIENT_CA_FILE needs TLS" in of(None, None, certificate)
    for found, name in ((of(no_file, key), "CERTIFICATE"), (of(certificate, no_file), "KEY")):
        assert f"TALLY_TLS_{name}_FILE={no_file} cannot be read: No such file" in found
    assert "Is a directory" in of(tmp_path, key)
    assert "has no PEM certificate" in of(no_pem, key)
    assert "has no PEM private key" in of(certificate, no_pem)
    assert "passphrase" in of(certificate, locked)
    assert "is not the key of" in of(certificate, other_key)
    assert "TALLY_TLS_CLIENT_CA_FILE" in of(certificate, key, no_pem)
    assert f"TALLY_TLS_CLIENT_CA_FILE={no_file}" in of(certificate, key, no_file)


def test_certificates_that_are_not_valid_now_are_refused(authority):
    certificate, key = authority.issue("server", days=10)
    settings = ServerSettings(
        tls_certificate_file=certificate,
        tls_key_file=key,
        tls_client_ca_file=authority.certificate_file,
    )
    check_doors(settings)
    for later, text in ((11 * DAY, "expired on"), (-2 * DAY, "valid only from")):
        with pytest.raises(SettingsError, match=text):
            check_doors(settings, partial(_in, later))
    old = authority.issue("old", days=-1)[0]
    text = refusal(tls_certificate_file=certificate, tls_key_file=key, tls_client_ca_file=old)
    assert f"TALLY_TLS_CLIENT_CA_FILE={old}: the certificate of CN=old expired on" in text


def _in(time: timedelta) -> datetime:
    return datetime.now(UTC) + time


# --- ports ----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [None, socket.SO_REUSEADDR, socket.SO_REUSEPORT])
def test_a_port_that_another_listens_on_is_refused_even_if_it_would_share(monkeypatch, option):
    monkeypatch.setattr(doors, "PORT_WAIT_S", 0)
    with socket.socket() as other:
        if option is not None:
            other.setsockopt(socket.SOL_SOCKET, option, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(SettingsError, match=f"TALLY_LISTEN={address} .*another process"):
            hold_port("TALLY_LISTEN", address)


def test_a_port_that_is_held_is_kept_from_other_servers_and_open_to_workers(monkeypatch):
    monkeypatch.setattr(doors, "PORT_WAIT_S", 0)
    address = f"127.0.0.1:{free_port()}"
    (held,) = hold_port("TALLY_LISTEN", address)
    try:
        with pytest.raises(SettingsError, match="another process"):
            hold_port("TALLY_LISTEN", address)
        with socket.socket() as worker:
            worker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            worker.bind(held.getsockname())
            worker.listen()
            with socket.create_connection(held.getsockname(), timeout=5):
                worker.accept()[0].close()
    finally:
        held.close()


def test_a_port_that_becomes_free_is_waited_for():
    address = f"127.0.0.1:{free_port()}"
    (before,) = hold_port("TALLY_LISTEN", address)
    threading.Timer(0.5, before.close).start()
    (held,) = hold_port("TALLY_LISTEN", address)
    held.close()


def test_addresses_that_this_machine_does_not_have_are_refused():
    # 192.0.2.0/24 is for documents: no machine has it.
    with pytest.raises(SettingsError, match="no such address"):
        hold_port("TALLY_LISTEN", "192.0.2.1:7600")
    with pytest.raises(SettingsError, match="host is not known"):
        hold_port("TALLY_LISTEN", "no.such.host.invalid:7600")
    assert doors._PROBLEMS[errno.EACCES]


def test_a_refused_start_is_one_line_of_log_and_status_2(stack):
    process = subprocess.run(
        [sys.executable, "-m", "server"],
        env=os.environ | {"TALLY_DATA": str(stack.data), "TALLY_LISTEN": "0.0.0.0:7600"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert "can be reached from other machines" in process.stderr
