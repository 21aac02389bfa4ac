"""`tally get`: features of cards."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tally.cli.arguments import parse_instant
from tally.cli.connection import AddressOption, DataOption, connect
from tally.results import OnlineFeatures, to_datetime
from tally.rows import Row


def masked(card: str) -> str:
    """A card number as people may see it: its last four digits."""
    return f"…{card[-4:]}"


def get(
    cards: Annotated[list[str], typer.Argument(metavar="CARD...", help="Card numbers.")],
    at: Annotated[
        str | None, typer.Option(help="Instant, ISO 8601, UTC by default.  [default: now]")
    ] = None,
    amount: Annotated[float | None, typer.Option(help="Amount of the payment.")] = None,
    merchant: Annotated[str | None, typer.Option(help="Its merchant.")] = None,
    category: Annotated[str | None, typer.Option(help="Its category.")] = None,
    merchant_lat: Annotated[float | None, typer.Option(help="Latitude of the merchant.")] = None,
    merchant_long: Annotated[float | None, typer.Option(help="Longitude of the merchant.")] = None,
    feature: Annotated[
        list[str] | None, typer.Option("--feature", "-f", help="Only these; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a row.")] = False,
    data: DataOption = None,
    address: AddressOption = None,
) -> None:
    """Show the features of cards as of an instant."""
    instant = parse_instant(at) if at else None
    rows = [
        Row(
            card=card,
            at=instant,
            amount=amount,
            merchant=merchant,
            category=category,
            merchant_latitude=merchant_lat,
            merchant_longitude=merchant_long,
        )
        for card in cards
    ]
    with connect(data, address) as client:
        answer = client.online(rows, feature or ())
    if as_json:
        for row in answer.to_json_rows(cards):
            typer.echo(json.dumps(row))
    else:
        Console().print(_table(cards, answer))


def _table(cards: list[str], answer: OnlineFeatures) -> Table:
    """Features down, cards across."""
    as_of = to_datetime(int(answer.as_of_ms[0]))
    through = to_datetime(int(answer.complete_through_ms[0]))
    table = Table(
        title=f"as of {as_of:%Y-%m-%d %H:%M:%S.%f} UTC" if as_of else None,
        caption=f"complete through {through:%Y-%m-%d %H:%M:%S} UTC"
        if through
        else "the store cannot say through which instant it is complete",
    )
    table.add_column("feature")
    for card, known in zip(cards, answer.known, strict=True):
        table.add_column(masked(card) + ("" if known else " (unknown)"), justify="right")
    exceptions = [answer.exceptions(i) for i in range(len(cards))]
    for column, name in enumerate(answer.names):
        cells = [
            f"[dim]{exceptions[i][name].lower()}[/dim]"
            if name in exceptions[i]
            else f"{answer.values[i, column]:,.6g}"
            for i in range(len(cards))
        ]
        table.add_row(name, *cells)
    return table
