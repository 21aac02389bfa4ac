"""`tally config`: every setting of the server and the stream, its value and what it does."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from server.settings import ServerSettings
from stores.settings import StoreSettings
from stream_job.settings import StreamSettings


def _value(settings: StoreSettings, name: str) -> Any:
    value = getattr(settings, name)
    # Secrets show as stars; URLs may hold a password and are secrets, too.
    return value if isinstance(value, bool | int | float | None) else str(value)


def config(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """List the settings of the server and the stream: environment name, value now, meaning."""
    parts: tuple[tuple[str, StoreSettings], ...] = (
        ("the stores and the server", ServerSettings()),
        ("the stream", StreamSettings()),
    )
    shown: dict[str, Any] = {}
    for title, settings in parts:
        table = Table("setting", "value", "what it is", title=f"Settings of {title}")
        for name, field in type(settings).model_fields.items():
            if name not in shown:
                shown[name] = _value(settings, name)
                meaning = field.description or ""
                table.add_row(f"TALLY_{name.upper()}", str(shown[name]), meaning)
        if not as_json:
            Console().print(table)
    if as_json:
        typer.echo(json.dumps(shown))
