"""`tally catalog`: every feature's definition."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table

from tally.cli.connection import AddressOption, DataOption, connect


def catalog(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    data: DataOption = None,
    address: AddressOption = None,
) -> None:
    """List the features that the server knows."""
    with connect(data, address) as client:
        definition = client.catalog()
    if as_json:
        typer.echo(json.dumps(MessageToDict(definition, preserving_proto_field_name=True)))
        return
    table = Table("feature", "unit", "needs", "what it is", title="Features")
    for feature in definition.features:
        table.add_row(feature.name, feature.unit, ", ".join(feature.needs), feature.description)
    console = Console()
    console.print(table)
    console.print(f"{len(definition.features)} features, fingerprint {definition.fingerprint}")
