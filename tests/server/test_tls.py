"""TLS with client certificates: who has none is not let in, by the SDK and by the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tally
import typer
from tally.cli.connection import config_from_environment

from tests.batch_job.test_load import new_card
from tests.conftest import run_tally
from tests.server.certificates import Authority
from tests.server.own_server import OwnServer, own_server

TOKEN = "a-token-for-tests"


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(stack, authority, tmp_path_factory) -> Iterator[OwnServer]:
    certificate, key = authority.issue("server")
    with own_server(
        stack,
        tmp_path_factory.mktemp("tls"),
        TALLY_TOKEN=TOKEN,
        TALLY_TLS_CERTIFICATE_FILE=str(certificate),
        TALLY_TLS_KEY_FILE=str(key),
        TALLY_TLS_CLIENT_CA_FILE=str(authority.certificate_file),
    ) as server:
        yield server


def asked(server: OwnServer, tls: tally.TlsConfig | None, token: str | None = TOKEN) -> bool:
    config = tally.ClientConfig(tls=tls, token=token, deadline_ms=2_000)
    with tally.Client(server.address, config) as client:
        return bool(client.online([tally.Row(card=new_card())], ["amt"]).known[0])


def shown(authority: Authority, files: tuple[Path, Path] | None) -> tally.TlsConfig:
    certificate, key = (path.read_bytes() for path in files) if files else (None, None)
    return tally.TlsConfig(authority.certificate_file.read_bytes(), certificate, key)


def test_a_client_with_a_certificate_of_the_authority_and_the_token_is_answered(server, authority):
    tls = shown(authority, authority.issue("client"))
    assert asked(server, tls) is False  # nobody knows the card
    with pytest.raises(tally.UnauthenticatedError):
        asked(server, tls, token=None)


def test_clients_without_a_certificate_or_with_anothers_are_not_let_in(server, authority, tmp_path):
    other = Authority(tmp_path, "another")
    for files in (None, other.issue("stranger")):
        with pytest.raises((tally.UnavailableError, tally.DeadlineError)):
            asked(server, shown(authority, files))
    with pytest.raises((tally.UnavailableError, tally.DeadlineError)):
        asked(server, None)


def test_the_command_takes_its_certificate_from_the_environment(server, authority, stack):
    certificate, key = authority.issue("command")
    environment = {
        "TALLY_TOKEN": TOKEN,
        "TALLY_TLS_CA_FILE": str(authority.certificate_file),
        "TALLY_TLS_CLIENT_CERTIFICATE_FILE": str(certificate),
        "TALLY_TLS_CLIENT_KEY_FILE": str(key),
    }
    get = ("get", new_card(), "--address", server.address, "--json")
    done = run_tally(*get, data=stack.data, **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"CLIENT_CERTIFICATE": "a.pem"}, "go together"),
        ({"CLIENT_KEY": "a.pem"}, "go together"),
        ({"CA": "nowhere"}, "TALLY_TLS_CA_FILE=nowhere cannot be read: No such file"),
        ({"CLIENT_KEY": "nowhere"}, "TALLY_TLS_CLIENT_KEY_FILE=nowhere cannot be read"),
    ],
)
def test_the_command_says_which_file_of_tls_it_lacks(monkeypatch, tmp_path, given, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pem").touch()
    for name, path in given.items():
        monkeypatch.setenv(f"TALLY_TLS_{name}_FILE", path)
    with pytest.raises(typer.BadParameter, match=text):
        config_from_environment()
