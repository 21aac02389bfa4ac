"""`tally load`: files into both stores."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from batch_job.load import Loader, Outcome
from stores.postgres import OfflineStore
from stores.prepare import opened_stores
from stores.redis_store import COMPLETE_THROUGH_UNKNOWN, OnlineStore
from stores.settings import StoreSettings

REJECTS_FOLDER = "rejects"


def load(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE...", exists=True, dir_okay=False, help="CSV or Parquet."),
    ] = None,
    abandon: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Give up the unfinished load of a file of this name, which keeps the store from "
            "being complete; what it wrote stays.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Data folder of the running stack.  [default: $TALLY_DATA or .tally]"
        ),
    ] = None,
) -> None:
    """Load transactions in Kaggle format into Postgres and Redis.

    Loading again, or after a kill, changes nothing but what was missing. Rows that cannot be read
    without guessing go to a rejects file.
    """
    if bool(files) == bool(abandon):
        raise typer.BadParameter("name files to load, or one load to --abandon")
    settings = StoreSettings(data=data.absolute()) if data else StoreSettings()
    redis_url, postgres_url = settings.store_urls()
    card_key = settings.load_card_key()
    console = Console(stderr=True)
    total = Outcome()
    with (
        opened_stores(redis_url, postgres_url, card_key.fingerprint, console.print) as stores,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        ) as progress,
    ):
        if abandon:
            _abandon(abandon, *stores)
        for path in files or ():
            task = progress.add_task(path.name, total=path.stat().st_size)
            loader = Loader(
                *stores,
                card_key,
                settings.data / REJECTS_FOLDER,
                advance=lambda count, task=task: progress.advance(task, count),  # type: ignore[misc]
            )
            outcome = loader.load(path)
            if not as_json:
                console.print(_sentence(path.name, outcome))
            for name in ("read", "loaded", "duplicates", "rejected", "seconds"):
                setattr(total, name, getattr(total, name) + getattr(outcome, name))
            total.rejects_file = outcome.rejects_file or total.rejects_file
    if as_json:
        total.seconds = round(total.seconds, 3)
        typer.echo(json.dumps(asdict(total)))


def _abandon(name: str, offline: OfflineStore, online: OnlineStore) -> None:
    """Forgets the unfinished loads of a file name in both stores."""
    load_ids = offline.abandon_loads(name)
    if not load_ids:
        names = ", ".join(sorted({known for _, known in offline.unfinished_loads()})) or "none"
        raise typer.BadParameter(f"no load of {name!r} is unfinished; unfinished: {names}")
    for load_id in load_ids:
        online.end_load(load_id, COMPLETE_THROUGH_UNKNOWN)


def _sentence(name: str, outcome: Outcome) -> str:
    rate = outcome.read / outcome.seconds if outcome.seconds else 0.0
    text = (
        f"{name}: {outcome.read:,} rows read, {outcome.loaded:,} loaded, {outcome.duplicates:,} "
        f"known already, {outcome.rejected:,} rejected, in {outcome.seconds:.1f} s ({rate:,.0f} rows/s)"
    )
    return f"{text}\n  rejects: {outcome.rejects_file}" if outcome.rejects_file else text
