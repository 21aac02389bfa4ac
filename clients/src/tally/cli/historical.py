"""`tally historical`: a training set from a file of points."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tally.cli.answer_files import check_ending, writer
from tally.cli.arguments import SeparatorOption, draft_of, parse_instant, places_of, separator_of
from tally.cli.connection import AddressOption, DataOption, connect
from tally.instants import TimeRange


def historical(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", dir_okay=False, help="File to write: .parquet or .csv."),
    ],
    points: Annotated[
        Path | None,
        typer.Argument(
            metavar="[POINTS]",
            allow_dash=True,
            help="CSV (also as .gz or .zst, or `-` for standard input) or Parquet; a folder or a pattern.",
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", help="Instead of POINTS: every transaction from this instant on."),
    ] = None,
    end: Annotated[str | None, typer.Option("--to", help="And before this one.")] = None,
    labels_as_of: Annotated[
        str | None,
        typer.Option(
            help="Add the label of each row's transaction_id as it was known at this instant."
        ),
    ] = None,
    feature: Annotated[
        list[str] | None, typer.Option("--feature", "-f", help="Only these; may be repeated.")
    ] = None,
    separator: SeparatorOption = ",",
    data: DataOption = None,
    address: AddressOption = None,
) -> None:
    """Compute features of many points, each exactly as of its instant, for training.

    Instants are ISO 8601, UTC by default. POINTS has a column `card` or `card_id`, a column `event_time`, where features need them `amount`,
    `merchant`, `category`, `merchant_latitude` and `merchant_longitude`, and any others, which are
    passed through. The rows of the output are those of POINTS in their order.
    """
    check_ending(output)
    if (points is None) == (start is None and end is None):
        raise typer.BadParameter("either POINTS, or a range: --from, --to or both")
    if points is not None:
        places_of([points])
    columns_by = separator_of(separator)
    asked = points or TimeRange(
        None if start is None else parse_instant(start), None if end is None else parse_instant(end)
    )
    known_by = None if labels_as_of is None else parse_instant(labels_as_of)
    console = Console(stderr=True)
    unfinished = draft_of(output)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn())
    try:
        with (
            connect(data, address) as client,
            Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress,
        ):
            task = progress.add_task("rows", total=None)
            answers = client.historical_batches(
                asked, feature or (), labels_as_of=known_by, separator=columns_by
            )
            with writer(output, unfinished, answers.schema) as write:
                for batch in answers:
                    write(batch)
                    progress.advance(task, len(batch))
            rows = int(progress.tasks[0].completed)
        os.replace(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)
    console.print(f"{output}: {rows:,} rows", highlight=False)
