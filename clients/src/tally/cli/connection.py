"""Where the running stack is, as a client sees it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tally.client import Client
    from tally.config import ClientConfig

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Data folder of the running stack.  [default: $TALLY_DATA or .tally]"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON, for machines.")]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", help="host:port of a server, instead of the stack's own."),
]


def connect(data: Path | None, address: str | None) -> Client:
    """A client of the given address, or of the stack in a data folder; how, the environment says.

    Raises:
        click.ClickException: no stack runs there, or a file of TLS cannot be read.
    """
    from tally.client import Client  # loads gRPC, which not every command with these options needs

    folder = (data or Path(os.environ.get("TALLY_DATA", ".tally"))).absolute()
    address = address or os.environ.get("TALLY_ADDRESS")
    if address is None:
        try:
            address = json.loads((folder / "stack.json").read_text(encoding="utf-8"))["grpc"]
        except (OSError, ValueError, KeyError):
            raise typer.BadParameter(
                f"no stack runs in {folder}: start one with `tally up --data {folder}`, "
                "or give --address"
            ) from None
    return Client(address, config_from_environment())


def config_from_environment() -> ClientConfig:
    """How to connect: TALLY_TOKEN is the bearer token, TALLY_TLS=true speaks TLS by the system's
    authorities, TALLY_TLS_CA_FILE names the authority of the server's certificate, TALLY_TLS_CLIENT_CERTIFICATE_FILE and TALLY_TLS_CLIENT_KEY_FILE this client's own.

    Raises:
        click.ClickException: a file cannot be read, or one is missing.
    """
    from tally.config import ClientConfig, TlsConfig

    authority, certificate, key = (
        _file_in_environment(f"TALLY_TLS_{name}_FILE")
        for name in ("CA", "CLIENT_CERTIFICATE", "CLIENT_KEY")
    )
    if (certificate is None) != (key is None):
        raise typer.BadParameter(
            "TALLY_TLS_CLIENT_CERTIFICATE_FILE and TALLY_TLS_CLIENT_KEY_FILE go together"
        )
    is_tls = authority or certificate or os.environ.get("TALLY_TLS", "").lower() in ("1", "true")
    tls = TlsConfig(authority, certificate, key) if is_tls else None
    return ClientConfig(tls=tls, token=os.environ.get("TALLY_TOKEN"))


def _file_in_environment(name: str) -> bytes | None:
    path = os.environ.get(name)
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{name}={path} cannot be read: {error.strerror}") from None
