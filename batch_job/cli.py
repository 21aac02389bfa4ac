"""`tally load`: files into both stores. `tally verify`: whether what is served is right."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from tally.cli.arguments import SeparatorOption, places_of, separator_of
from tally.cli.connection import AddressOption, DataOption, JsonOption, connect
from tally.cli.exit_codes import FAILED
from tally.sources import Place

from batch_job.load import Loader, Outcome
from batch_job.reject_limit import RejectLimit
from features import CardKey
from ingest.dates import DateOrder
from ingest.masking import masked_digits
from stores.postgres import OfflineStore
from stores.prepare import opened_stores
from stores.publishing import withdraw_merchants
from stores.redis_store import COMPLETE_THROUGH_UNKNOWN, OnlineStore
from stores.settings import StoreSettings

if TYPE_CHECKING:
    from batch_job.verify import Verification

REJECTS_FOLDER = "rejects"
SAMPLE = 1_000
"""Cards that `tally verify` looks at."""


def load(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE...",
            allow_dash=True,
            help="CSV (also as .gz or .zst, or `-` for standard input) or Parquet; folders and patterns.",
        ),
    ] = None,
    separator: SeparatorOption = ",",
    max_rejects: Annotated[
        str | None,
        typer.Option(
            metavar="N|N%",
            help="End with exit code 1 if more rows, or more of all rows, are rejected.  "
            "[default: any number, but not all of a file]",
        ),
    ] = None,
    abandon: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Give up the unfinished load of a file of this name, which keeps the store from "
            "being complete; what it wrote stays.",
        ),
    ] = None,
    date_order: Annotated[
        DateOrder | None,
        typer.Option(
            parser=DateOrder.parse,
            metavar="day-first|month-first",
            help="Of dates such as 08/02/2024; by default the rows of the file must settle it.",
        ),
    ] = None,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Load transactions in Kaggle format into Postgres and Redis.

    Loading again, or after a kill, changes nothing but what was missing. Rows that cannot be read
    without guessing go to a rejects file. Everything that can be loaded is loaded; then the exit code is 1
    if of some file that has rows none was taken, or if --max-rejects was exceeded.
    """
    if bool(files) == bool(abandon):
        raise typer.BadParameter("name files to load, or one load to --abandon")
    places = places_of(files or ())
    try:
        limit = RejectLimit.parse(max_rejects) if max_rejects is not None else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    columns_by = separator_of(separator)
    settings = StoreSettings(data=data.absolute()) if data else StoreSettings()
    console = Console(stderr=True)
    outcomes: list[tuple[str, Outcome]] = []
    redis_url, postgres_url = settings.store_urls()
    card_key = settings.load_card_key()
    with opened_stores(redis_url, postgres_url, card_key.fingerprint, console.print) as stores:
        if abandon:
            _abandon(abandon, *stores)
        loading = _Loading(stores, card_key, settings.data / REJECTS_FOLDER, columns_by, date_order)
        for name, outcome in loading.load_all(places, console):
            outcomes.append((name, outcome))
            if not as_json:
                console.print(_sentence(name, outcome), markup=False)
    total = _total([outcome for _, outcome in outcomes])
    if as_json:
        each = [{"name": name, **asdict(outcome)} for name, outcome in outcomes]
        typer.echo(json.dumps(asdict(total) | {"files": each}))
    faults = _faults(outcomes, total, limit)
    for fault in faults:
        console.print(f"tally: {fault}", markup=False, highlight=False, soft_wrap=True)
    if faults:
        raise typer.Exit(FAILED)


@dataclass(frozen=True, slots=True)
class _Loading:
    """What all files of a command share."""

    stores: tuple[OfflineStore, OnlineStore]
    card_key: CardKey
    rejects_folder: Path
    separator: str
    date_order: DateOrder | None

    def load_all(self, places: Sequence[Place], console: Console) -> Iterator[tuple[str, Outcome]]:
        """Loads files in their order; yields the name and the outcome of each."""
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            for place in places:
                task = progress.add_task(place.name, total=place.size_bytes)
                loader = Loader(
                    *self.stores,
                    self.card_key,
                    self.rejects_folder,
                    date_order=self.date_order,
                    advance=lambda count, task=task: progress.advance(task, count),  # type: ignore[misc]
                )
                yield place.name, loader.load(place, self.separator)


def _total(outcomes: Sequence[Outcome]) -> Outcome:
    total = Outcome()
    for outcome in outcomes:
        for name in ("read", "loaded", "duplicates", "rejected", "kept_out", "seconds"):
            setattr(total, name, getattr(total, name) + getattr(outcome, name))
        total.rejects_file = outcome.rejects_file or total.rejects_file
    total.seconds = round(total.seconds, 3)
    return total


def _faults(
    outcomes: Sequence[tuple[str, Outcome]], total: Outcome, limit: RejectLimit | None
) -> list[str]:
    """Why a command that loaded what it could failed all the same; none where it did not."""
    faults = [
        f"{name}: no row of {outcome.read:,} was taken"
        for name, outcome in outcomes
        if outcome.read and outcome.rejected == outcome.read
    ]
    if limit is not None and not limit.allows(total.rejected, total.read):
        faults.append(
            f"{total.rejected:,} of {total.read:,} rows were rejected, more than "
            f"--max-rejects {limit.text}; the others are loaded"
        )
    return faults


def _abandon(name: str, offline: OfflineStore, online: OnlineStore) -> None:
    """Forgets the unfinished loads of a file name in both stores."""
    load_ids = offline.abandon_loads(masked_digits(name))
    if not load_ids:
        names = ", ".join(sorted({known for _, known in offline.unfinished_loads()})) or "none"
        raise typer.BadParameter(f"no load of {name!r} is unfinished; unfinished: {names}")
    withdraw_merchants(offline, online)  # some of its rows may be there
    for load_id in load_ids:
        online.end_load(load_id, COMPLETE_THROUGH_UNKNOWN)


def _sentence(name: str, outcome: Outcome) -> str:
    rate = outcome.read / outcome.seconds if outcome.seconds else 0.0
    text = (
        f"{name}: {outcome.read:,} rows read, {outcome.loaded:,} loaded, {outcome.duplicates:,} "
        f"known already, {outcome.rejected:,} rejected, in {outcome.seconds:.1f} s ({rate:,.0f} rows/s)"
    )
    if outcome.kept_out:
        text += (
            f"\n  {outcome.kept_out:,} rows of erased cards, or too old to be kept, were left out"
        )
    return f"{text}\n  rejects: {outcome.rejects_file}" if outcome.rejects_file else text


def verify(
    sample: Annotated[
        int | None,
        typer.Option(min=1, help=f"Cards to look at, chosen at random.  [default: {SAMPLE}]"),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Look at every card.")] = False,
    seed: Annotated[
        int | None, typer.Option(help="Chooses the same cards and instants again.")
    ] = None,
    as_json: JsonOption = False,
    data: DataOption = None,
    address: AddressOption = None,
) -> None:
    """Recompute features from Postgres and compare them with what is served.

    Ledgers and profiles are compared byte for byte, features at random instants bit for bit. Safe
    beside everything else; changes nothing. Exits 1 when something differs.
    """
    from batch_job.verify import Verifier  # loads machine code: `tally load` starts without

    if everything and sample:
        raise typer.BadParameter("either --sample or --all")
    cards = None if everything else sample or SAMPLE
    settings = StoreSettings(data=data.absolute()) if data else StoreSettings()
    redis_url, postgres_url = settings.store_urls()
    card_key = settings.load_card_key()
    offline, online = OfflineStore(postgres_url), OnlineStore(redis_url)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        for store in (offline, online):
            store.check_card_key(card_key.fingerprint)
        with connect(data, address) as client, Progress(*columns, console=console) as progress:
            client.status()  # it is there, even if there is no card to ask it about
            task = progress.add_task("cards", total=cards)
            outcome = Verifier(offline, online, client, seed=seed).verify(
                cards, card_key.probe_id, lambda count: progress.advance(task, count)
            )
            progress.update(task, total=outcome.cards)
    finally:
        online.close()
        offline.close()
    if as_json:
        typer.echo(json.dumps(asdict(outcome)))
    else:
        _print_verification(console, outcome)
    if outcome.mismatches:
        raise typer.Exit(FAILED)


def _print_verification(console: Console, outcome: Verification) -> None:
    """Says what a verification came to."""
    if not outcome.cards:
        console.print("there is no card to look at: `tally load` or `tally publish` brings some")
        return
    console.print(
        f"{outcome.cards:,} cards, {outcome.points:,} instants, {outcome.values:,} values "
        f"compared in {outcome.seconds:.1f} s (--seed {outcome.seed}): "
        + ("some differ" if outcome.mismatches else "all equal"),
        highlight=False,
    )
    if outcome.looked_at_again:
        console.print(
            f"{outcome.looked_at_again:,} cards were looked at again: events were on their way"
        )
    if outcome.mismatches:
        table = Table("what differs", "times", "for example card", "at", "served", "expected")
        for what, count in sorted(outcome.mismatches.items()):
            example = next(e for e in outcome.examples if e.what == what)
            at = "" if example.event_time_ms is None else str(example.event_time_ms)
            values = (example.served or "", example.expected or "")
            table.add_row(what, f"{count:,}", example.card_id, at, *values)
        Console(width=max(console.width, 150)).print(table)
