"""`tally export`: everything of a kind into a folder of Parquet files."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tally.cli.arguments import parse_card_id, parse_instant
from tally.cli.connection import AddressOption, DataOption, JsonOption, connect
from tally.export_folder import PART_ROWS, FolderExport
from tally.exports import export_request
from tally.instants import TimeRange


class Kind(StrEnum):
    """What can be exported."""

    TRANSACTIONS = "transactions"
    LABELS = "labels"
    FEATURES = "features"
    LEDGERS = "ledgers"


def export(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    what: Annotated[Kind, typer.Option(help="What to export.")] = Kind.TRANSACTIONS,
    start: Annotated[
        str | None, typer.Option("--from", help="Only event times from this instant on.")
    ] = None,
    end: Annotated[str | None, typer.Option("--to", help="And before this one.")] = None,
    card_id: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Only this card, by its id in hex; may be repeated."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the export that is in the folder.")
    ] = False,
    zstd: Annotated[bool, typer.Option("--zstd", help="Compress what is sent.")] = False,
    part_rows: Annotated[int, typer.Option(min=1, help="Rows in a file, about.")] = PART_ROWS,
    batch_rows: Annotated[
        int | None, typer.Option(min=1, max=65_536, help="Rows that come together, at the most.")
    ] = None,
    as_json: JsonOption = False,
    data: DataOption = None,
    address: AddressOption = None,
) -> None:
    """Export everything of a kind, as one snapshot sees it, into Parquet files.

    Every checksum is checked. Files are complete or not there; manifest.json, which comes last, has
    their hashes. What was killed goes on with --resume, in the same snapshot. Instants are ISO 8601,
    UTC by default.
    """
    within = None
    if start or end:
        within = TimeRange(start and parse_instant(start), end and parse_instant(end))  # type: ignore[arg-type]
    request = export_request(
        what.value,
        within,
        tuple(parse_card_id(text) for text in card_id or ()),
        zstd=zstd,
        batch_rows=batch_rows,
    )
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn())
    with (
        connect(data, address) as client,
        Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress,
    ):
        task = progress.add_task(what.value, total=None)
        manifest = FolderExport(
            *(client, output, request, what.value),
            resume=resume,
            part_rows=part_rows,
            report=lambda rows: progress.update(task, completed=rows),
        ).run()
    content = json.loads(manifest.read_text(encoding="utf-8"))
    if as_json:
        typer.echo(json.dumps(content))
    else:
        console.print(
            f"{output}: {content['rows']:,} rows in {len(content['parts'])} files, "
            f"snapshot {content['snapshot']}",
            highlight=False,
        )
