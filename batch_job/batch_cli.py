"""`tally batch`: exact features of every transaction, in Postgres."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tally.cli.arguments import parse_instant
from tally.cli.connection import DataOption, JsonOption

from batch_job.engines import Engine, LocalEngine
from batch_job.run import RunOutcome, run
from stores.postgres import ONLINE_STORE_LOCK, OfflineStore, migrate
from stores.prepare import opened_stores
from stores.publishing import publish_merchants
from stores.redis_store import COMPLETE_THROUGH_UNKNOWN, OnlineStore
from stores.retention import Pruned, prune
from stores.runs import BatchRuns, RunRecord
from stores.settings import StoreSettings
from stores.sync import Syncer

batch = typer.Typer(
    help="Compute exact features of every transaction, in place of those on arrival.",
    no_args_is_help=True,
)
RUNS_SHOWN = 20
PRUNE_TIMEOUT_S = 60.0
"""How long it is waited until nobody writes."""
END = datetime(2100, 1, 1, tzinfo=UTC)


class EngineName(StrEnum):
    """Where features are computed."""

    LOCAL = "local"
    SPARK = "spark"


def _engine(name: EngineName, workers: int | None, master: str | None) -> Engine:
    if name is EngineName.LOCAL:
        if master:
            raise typer.BadParameter("--master goes with --engine spark")
        return LocalEngine(workers)
    if workers:
        raise typer.BadParameter("--workers goes with --engine local; --master says local[N]")
    from batch_job.spark import SparkEngine

    return SparkEngine(master)


@batch.command("run")
def run_command(
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="First day, ISO 8601.  [default: the first that something came in of since the "
            "last run]",
        ),
    ] = None,
    end: Annotated[
        str | None, typer.Option("--to", help="Behind the last day.  [default: behind the newest]")
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="Where to compute.")] = EngineName.LOCAL,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes.  [default: one for each core]")
    ] = None,
    master: Annotated[
        str | None,
        typer.Option(help="Spark's master.  [default: a Spark of its own, on all cores]"),
    ] = None,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Compute the features of the transactions of some days from whole histories.

    The daily facts of merchants are brought up to date first, whatever days are named, and handed to the
    online store. Rows that are missing are written, and those replaced that late events have changed. What was
    killed is run again, and goes on with what is missing; running again changes nothing.
    """
    if end and not start:
        raise typer.BadParameter("--to goes with --from")
    days = None
    if start:
        days = parse_instant(start), parse_instant(end) if end else END
        if days[1] <= days[0]:
            raise typer.BadParameter("--to must be behind --from")
    settings = StoreSettings(data=data.absolute()) if data else StoreSettings()
    _, postgres_url = settings.store_urls()
    chosen = _engine(engine, workers, master)
    migrate(postgres_url)
    today = _today(settings)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("parts", total=None)
        outcome = run(
            postgres_url,
            chosen,
            today,
            days,
            lambda done, parts, rows: progress.update(
                task, completed=done, total=parts, description=f"{rows:,} rows, parts"
            ),
            lambda done, months: progress.update(
                task, completed=done, total=months, description="merchants, months"
            ),
            lambda: _publish(settings),
        )
    if as_json:
        typer.echo(json.dumps(None if outcome is None else asdict(outcome), default=_text))
    else:
        console.print(_sentence(outcome), highlight=False)
        console.print(_of_facts(today), highlight=False)
    if settings.history_days is not None:
        console.print(_pruned(_prune(settings, _horizon(settings))), highlight=False)


def _today(settings: StoreSettings) -> date | None:
    """The day before which everything has come in: where a stream is behind, the day that it has come to."""
    today = datetime.now(UTC).date()
    redis_url, postgres_url = settings.store_urls()
    with OnlineStore(redis_url) as online, OfflineStore(postgres_url) as offline:
        through_ms = online.stream_through_ms()
        progress = online.progress()
        had_stream = bool(offline.stream_progress())
    if through_ms is None:
        # Of a stream a Redis that has lost its data does not know, until the watcher has looked.
        claims = progress is not None and progress.complete_through_ms != COMPLETE_THROUGH_UNKNOWN
        return today if claims or not had_stream else None
    if through_ms < 0:
        return None
    return min(today, datetime.fromtimestamp(through_ms / 1000, UTC).date())


def _publish(settings: StoreSettings) -> None:
    """Brings the facts of merchants in the online store up to date; one that has lost its data gets them
    when it is rebuilt."""
    redis_url, postgres_url = settings.store_urls()
    fingerprint = settings.load_card_key().fingerprint
    with OfflineStore(postgres_url) as offline, OnlineStore(redis_url) as online:
        offline.check_card_key(fingerprint)
        online.check_card_key(fingerprint)
        if online.is_initialised:
            publish_merchants(offline, online)


def _sentence(outcome: RunOutcome | None) -> str:
    if outcome is None:
        return "nothing came in since the last run; the facts of merchants are up to date"
    rate = outcome.rows_computed / outcome.seconds if outcome.seconds else 0.0
    return (
        f"{outcome.rows_computed:,} transactions from {_text(outcome.from_time)} to "
        f"{_text(outcome.to_time)}: {outcome.rows_new:,} new, {outcome.rows_repaired:,} repaired, in "
        f"{outcome.seconds:.1f} s ({rate:,.0f} rows/s, {outcome.engine})"
    )


def _of_facts(today: date | None) -> str:
    if today is None:
        return (
            "no further day of merchants became valid: redis does not know how far the stream has come; "
            "run again when `tally status` says so"
        )
    return f"features of merchants are valid through {today}"


@batch.command("prune")
def prune_command(
    before: Annotated[
        str | None,
        typer.Option(
            help="Instant, ISO 8601: months that were over before it are dropped.  [default: "
            "TALLY_HISTORY_DAYS ago]"
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Drop months of transactions and features that are older than what is kept.

    Answers that would need them are flagged BEFORE_HISTORY from then on. What is brought again of
    them stays out. `tally batch run` does so by itself where TALLY_HISTORY_DAYS is set.
    """
    settings = StoreSettings(data=data.absolute()) if data else StoreSettings()
    if before is None and settings.history_days is None:
        raise typer.BadParameter("give --before, or set TALLY_HISTORY_DAYS")
    instant = parse_instant(before) if before else _horizon(settings)
    if not yes:
        typer.confirm(
            f"Drop the months that were over before {_text(instant)}?", abort=True, err=True
        )
    outcome = _prune(settings, instant)
    if as_json:
        typer.echo(json.dumps({"months": outcome.months, "transactions": outcome.transactions}))
    else:
        Console(stderr=True).print(_pruned(outcome), highlight=False)


def _horizon(settings: StoreSettings) -> datetime:
    return datetime.now(UTC) - timedelta(days=settings.history_days or 0)


def _prune(settings: StoreSettings, before: datetime) -> Pruned:
    """Drops months, and brings the ledgers of their cards in line."""
    card_key = settings.load_card_key()
    stores = opened_stores(
        *settings.store_urls(), card_key.fingerprint, lambda text: None, shared=False
    )
    with stores as (offline, online):
        with offline.locked(ONLINE_STORE_LOCK, shared=False, timeout_s=PRUNE_TIMEOUT_S):
            outcome = prune(offline, before)
            syncer = Syncer(offline, online, card_key_fingerprint=card_key.fingerprint)
            for _ in syncer.some(outcome.cards):
                pass
        # Not alone: it may have to wait for a batch run that computes facts.
        publish_merchants(offline, online)
    return outcome


def _pruned(outcome: Pruned) -> str:
    if not outcome.months:
        return "no month is older than what is kept"
    return f"dropped {outcome.months} months with {outcome.transactions:,} transactions"


@batch.command("list")
def list_command(as_json: JsonOption = False, data: DataOption = None) -> None:
    """List the latest runs."""
    settings = StoreSettings(data=data.absolute()) if data else StoreSettings()
    with BatchRuns(settings.store_urls()[1]) as runs:
        records = runs.latest(RUNS_SHOWN)
    if as_json:
        typer.echo(json.dumps([asdict(record) for record in records], default=_text))
        return
    table = Table("run", "engine", "from", "to", "began", "rows", "new", "repaired", "seconds")
    for record in records:
        table.add_row(*_cells(record))
    Console().print(table)


def _cells(record: RunRecord) -> tuple[str, ...]:
    counts = (record.rows_computed, record.rows_new, record.rows_repaired)
    seconds = "" if record.seconds is None else f"{record.seconds:.1f}"
    return (
        *(record.run_id, record.engine, _text(record.from_time), _text(record.to_time)),
        _text(record.started_at),
        *("unfinished" if count is None else f"{count:,}" for count in counts),
        seconds,
    )


def _text(time: datetime) -> str:
    """An instant as people read it: a day where it is one."""
    time = time.astimezone(UTC)
    is_day = (time.hour, time.minute, time.second, time.microsecond) == (0, 0, 0, 0)
    return f"{time:%Y-%m-%d}" if is_day else time.isoformat(timespec="seconds")
