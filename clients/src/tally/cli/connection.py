"""Where the running stack is, as a client sees it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from tally.client import Client
from tally.config import ClientConfig, TlsConfig

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
    """A client of the given address, or of the stack in a data folder.

    TALLY_TOKEN gives the bearer token, TALLY_TLS_CA_FILE the authority for TLS.

    Raises:
        click.ClickException: no stack runs there.
    """
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
    ca_file = os.environ.get("TALLY_TLS_CA_FILE")
    tls = TlsConfig(server_root_ca=Path(ca_file).read_bytes()) if ca_file else None
    return Client(address, ClientConfig(tls=tls, token=os.environ.get("TALLY_TOKEN")))
