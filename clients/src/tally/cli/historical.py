"""`tally historical`: a training set from a file of points."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tally.cli.connection import AddressOption, DataOption, connect


def historical(
    points: Annotated[
        Path,
        typer.Argument(metavar="POINTS", exists=True, dir_okay=False, help="CSV or Parquet."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Parquet file to write.")],
    feature: Annotated[
        list[str] | None, typer.Option("--feature", "-f", help="Only these; may be repeated.")
    ] = None,
    data: DataOption = None,
    address: AddressOption = None,
) -> None:
    """Compute features of many points, each exactly as of its instant, for training.

    POINTS has a column `card` or `card_id`, a column `event_time`, where features need them `amount`,
    `merchant`, `category`, `merchant_latitude` and `merchant_longitude`, and any others, which are
    passed through. The rows of the output are those of POINTS in their order.
    """
    import pyarrow.parquet as pq

    console = Console(stderr=True)
    unfinished = output.with_name(f"{output.name}.part")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn())
    try:
        with (
            connect(data, address) as client,
            Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress,
        ):
            task = progress.add_task("points", total=None)
            answers = client.historical_batches(points, feature or ())
            with pq.ParquetWriter(unfinished, answers.schema, compression="zstd") as writer:
                for batch in answers:
                    writer.write_batch(batch)
                    progress.advance(task, len(batch))
            rows = int(progress.tasks[0].completed)
        os.replace(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)
    console.print(f"{output}: {rows:,} points", highlight=False)
