"""`tally erase`: takes a card out of everything, and checks that it stays out."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from tally.cli.connection import DataOption, JsonOption
from tally.cli.exit_codes import FAILED

from features.keys import CARD_DIGITS
from stores.erasure import Eraser, Receipt
from stores.prepare import opened_stores
from stores.settings import StoreSettings


def erase(
    card: Annotated[
        str | None,
        typer.Argument(metavar="[CARD]", help="The card's number; - reads it from standard input."),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="RECEIPT",
            help="Instead: look through everything for what a receipt says is gone.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Remove a card from Redis and Postgres, and keep its past out when it is brought again.

    Prints a receipt, which names no card: keep it. With --check, exits 1 when something is left.
    """
    if (card is None) == (check is None):
        raise typer.BadParameter("either CARD, or --check RECEIPT")
    settings = StoreSettings(data=data.absolute()) if data else StoreSettings()
    card_key = settings.load_card_key()
    number = sys.stdin.readline().strip() if card == "-" else card
    if number is not None and not CARD_DIGITS.match(number):
        raise typer.BadParameter("a card number is 8 to 19 digits")
    if number is not None and not yes:
        typer.confirm(f"Remove everything of the card …{number[-4:]}?", abort=True, err=True)
    console = Console(stderr=True)
    stores = opened_stores(
        *settings.store_urls(), card_key.fingerprint, console.print, shared=False
    )
    with stores as (offline, online):
        eraser = Eraser(offline, online, card_key)
        if number is not None:
            receipt = eraser.erase(card_key.card_id(number))
            typer.echo(json.dumps(asdict(receipt), indent=None if as_json else 2))
            return
        assert check is not None
        _check(eraser, Receipt.read(check.read_text(encoding="utf-8"), card_key), console, as_json)


def _check(eraser: Eraser, receipt: Receipt, console: Console, as_json: bool) -> None:
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("looking")
        looks = eraser.check(receipt)
        while (look := next(looks, None)) is not None:
            looked_at, wrong = look
            progress.update(task, description=f"looked at {looked_at:,}")
    if as_json:
        typer.echo(json.dumps({"looked_at": looked_at, "wrong": wrong}))
    else:
        console.print(f"looked at {looked_at:,} rows and values", highlight=False)
        for sentence in wrong or ["nothing of the card is left, and its past stays out"]:
            console.print(sentence, highlight=False)
    if wrong:
        raise typer.Exit(FAILED)
