"""`tally config`: every setting of the server, its value and what it does."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from server.settings import ServerSettings


def _value(settings: ServerSettings, name: str) -> Any:
    value = getattr(settings, name)
    # Secrets show as stars; URLs may hold a password and are secrets, too.
    return value if isinstance(value, bool | int | float | None) else str(value)


def config(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """List the server's settings: environment name, value now, meaning."""
    settings = ServerSettings()
    if as_json:
        values = {name: _value(settings, name) for name in ServerSettings.model_fields}
        typer.echo(json.dumps(values))
        return
    table = Table("setting", "value", "what it is", title="Settings of the server")
    for name, field in ServerSettings.model_fields.items():
        table.add_row(f"TALLY_{name.upper()}", str(_value(settings, name)), field.description or "")
    Console().print(table)
