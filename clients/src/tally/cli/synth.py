"""`tally synth`: a file of generated transactions."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from tally.cli.arguments import draft_of, parse_instant
from tally.generator import HEADER, Generator, default_plan


def synth(
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    rows: Annotated[int, typer.Option(min=1, help="Transactions.")] = 200_000,
    cards: Annotated[
        int | None, typer.Option(min=1, help="Cards.  [default: one for every 100 rows]")
    ] = None,
    days: Annotated[float, typer.Option(min=0.001, help="Days they are spread over.")] = 60.0,
    start: Annotated[str, typer.Option(help="The first instant, ISO 8601.")] = "2024-01-01",
    fraud_share: Annotated[float, typer.Option(min=0, max=0.5, help="Share of fraud.")] = 0.005,
    seed: Annotated[int, typer.Option(help="The same seed gives the same file.")] = 0,
) -> None:
    """Write card transactions in Kaggle format, with fraud that each feature family can catch."""
    plan = dataclasses.replace(
        default_plan(rows, seed, start=parse_instant(start)),
        days=days,
        fraud_share=fraud_share,
    )
    if cards:
        plan = dataclasses.replace(plan, cards=cards)
    console = Console(stderr=True)
    begin = time.perf_counter()
    draft = draft_of(output)
    try:
        with (
            draft.open("w", encoding="utf-8") as file,
            Progress(console=console, transient=True) as progress,
        ):
            task = progress.add_task("writing", total=rows)
            file.write(HEADER)
            for text, count in Generator(plan).chunks():
                file.write(text)
                progress.advance(task, count)
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)
    seconds = time.perf_counter() - begin
    console.print(
        f"{output}: {rows:,} transactions of {plan.cards:,} cards in {seconds:.1f} s "
        f"({rows / seconds:,.0f} rows/s)"
    )
