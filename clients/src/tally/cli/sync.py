"""`tally sync`: brings Redis in line with Postgres, or looks whether Postgres lacks anything."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tally.cli.arguments import parse_card_id, parse_instant
from tally.cli.connection import AddressOption, DataOption, JsonOption, connect
from tally.cli.exit_codes import FAILED


def sync(
    audit: Annotated[
        bool,
        typer.Option(
            "--audit",
            help="The other way: count cards of which Redis holds what Postgres lacks.",
        ),
    ] = False,
    card_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Only this card, by its id in hex.")
    ] = None,
    changed_since: Annotated[
        str | None,
        typer.Option(help="Only cards with a transaction ingested since this instant, ISO 8601."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compare and count, and write nothing.")
    ] = False,
    as_json: JsonOption = False,
    data: DataOption = None,
    address: AddressOption = None,
) -> None:
    """Write to Redis what Postgres says, beside everything else.

    Redis that lost its data is complete again afterwards. Safe while events are applied: nothing newer
    is overwritten. What was cut off is started again. With --audit, exits 1 when Postgres lacks
    something.
    """
    if card_id and changed_since:
        raise typer.BadParameter("either --card-id or --changed-since")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        connect(data, address) as client,
        Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress,
    ):
        task = progress.add_task("cards", total=None)
        for latest in client.sync(
            "redis" if audit else "postgres",
            card_id=parse_card_id(card_id) if card_id else None,
            changed_since=parse_instant(changed_since) if changed_since else None,
            dry_run=dry_run,
        ):
            progress.update(task, completed=latest.cards_done, total=latest.cards_total or None)
    if as_json:
        names = ("run_id", "cards_done", "cards_differing", "transactions_written")
        typer.echo(json.dumps({name: getattr(latest, name) for name in names}))
    else:
        console.print(
            f"{latest.cards_done:,} cards, {latest.cards_differing:,} differed, "
            f"{latest.transactions_written:,} transactions written",
            highlight=False,
        )
    if audit and latest.cards_differing:
        raise typer.Exit(FAILED)
