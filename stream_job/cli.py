"""`tally prepare`, `tally publish` and `tally dead-letters`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from confluent_kafka import Consumer, KafkaException, TopicPartition
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tally.cli.arguments import SeparatorOption, places_of, separator_of
from tally.cli.connection import DataOption, JsonOption
from tally.cli.exit_codes import FAILED

from ingest.dates import DateOrder
from ingest.masking import masked_digits
from stores.errors import StoreError, StoreUnavailableError
from stores.prepare import opened_stores
from stream_job.dead_letters import DeadLetter, Sealer, read_letter
from stream_job.kafka import client_settings
from stream_job.publish import Pace, Published, Publisher
from stream_job.settings import StreamSettings
from stream_job.topics import make_topics

POLL_TIMEOUT_S = 5.0


def _settings(data: Path | None) -> StreamSettings:
    return StreamSettings(data=data.absolute()) if data else StreamSettings()


def prepare(data: DataOption = None) -> None:
    """Make both stores and the topics ready: schema, functions, topics; Redis rebuilt if it was lost.

    A stack does so by itself. For Redis, Postgres and Kafka of your own, before the stream job runs.
    """
    settings = _settings(data)
    redis_url, postgres_url = settings.store_urls()
    console = Console(stderr=True, highlight=False)
    fingerprint = settings.load_card_key().fingerprint
    with opened_stores(redis_url, postgres_url, fingerprint, console.print):
        console.print("both stores are ready")
    if settings.kafka_servers is not None:
        make_topics(settings)
        console.print("the topics are ready")


def publish(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            allow_dash=True,
            help="CSV (also as .gz or .zst, or `-` for standard input) or Parquet.",
        ),
    ],
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Events a second.  [default: all at once]")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(min=0.001, help="So many times faster than it happened.")
    ] = None,
    loop: Annotated[
        bool, typer.Option("--loop", help="Begin again at the end, until Ctrl-C.")
    ] = False,
    shift_to_now: Annotated[
        bool,
        typer.Option(
            "--shift-to-now",
            help="Move all times so that the newest row happens now, as other transactions.",
        ),
    ] = False,
    date_order: Annotated[
        DateOrder | None,
        typer.Option(
            parser=DateOrder.parse,
            metavar="day-first|month-first",
            help="Of dates such as 08/02/2024; by default the rows of the file must settle it.",
        ),
    ] = None,
    separator: SeparatorOption = ",",
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Publish a file's transactions and labels to Kafka, as a payment system would.

    Card numbers are replaced by card ids before they are published.
    """
    if rate and speedup:
        raise typer.BadParameter("either --rate or --speedup")
    columns_by = separator_of(separator)
    place, *others = places_of([file])
    if others:
        raise typer.BadParameter(f"{file} is more than one file: publish one after the other")
    if place.size_bytes is None and (loop or shift_to_now):
        raise typer.BadParameter("--loop and --shift-to-now read a file twice, and not from a pipe")
    settings = _settings(data)
    publisher = Publisher(settings, settings.load_card_key())
    console = Console(stderr=True)
    total = Published()
    bar = (
        TextColumn("{task.description}"),
        *(BarColumn(), DownloadColumn(), TimeRemainingColumn()),
    )
    with Progress(*bar, console=console, transient=True) as progress:
        while True:
            task = progress.add_task(place.name, total=place.size_bytes)
            outcome = publisher.publish(
                place.path,
                Pace(rate, speedup),
                separator=columns_by,
                shift_to_now=shift_to_now,
                date_order=date_order,
                advance=lambda count, task=task: progress.advance(task, count),  # type: ignore[misc]
            )
            for name in ("events", "labels", "unreadable", "seconds"):
                setattr(total, name, getattr(total, name) + getattr(outcome, name))
            total.is_cut_short = outcome.is_cut_short
            if not loop or outcome.is_cut_short:
                break
            progress.remove_task(task)
    if as_json:
        typer.echo(json.dumps(asdict(total)))
        return
    speed = total.events / total.seconds if total.seconds else 0.0
    console.print(
        ("interrupted; " if total.is_cut_short else "")
        + f"{place.name}: {total.events:,} transactions and {total.labels:,} labels published in "
        f"{total.seconds:.1f} s ({speed:,.0f} transactions/s), {total.unreadable:,} rows unreadable"
    )


dead_letters = typer.Typer(
    help="Events that could not be applied: list them, look at one, publish them again.",
    no_args_is_help=True,
)


def _letters(settings: StreamSettings) -> Iterator[tuple[int, DeadLetter]]:
    """(number, letter) of all dead letters that there are now, in order.

    Raises:
        StoreUnavailableError: Kafka does not answer.
    """
    consumer = Consumer(
        client_settings(settings) | {"group.id": "tally-dead-letters", "enable.auto.commit": False}
    )
    try:
        where = TopicPartition(settings.dead_letter_topic, 0)
        first, end = consumer.get_watermark_offsets(where, timeout=POLL_TIMEOUT_S)
        where.offset = first
        consumer.assign([where])
        deadline = time.monotonic() + POLL_TIMEOUT_S
        at = first
        while at < end:
            message = consumer.poll(POLL_TIMEOUT_S)
            if message is None or message.error():
                if time.monotonic() > deadline:
                    raise StoreUnavailableError("kafka", "it does not give the dead letters")
                continue
            deadline = time.monotonic() + POLL_TIMEOUT_S
            number = message.offset()
            assert number is not None  # of a message that was read
            at = number + 1
            letter = read_letter(message.value())
            if letter is None:
                Console(stderr=True).print(
                    f"message {number} of the topic is no dead letter of ours"
                )
            else:
                yield number, letter
    except KafkaException as error:
        raise StoreUnavailableError("kafka", str(error.args[0].str())) from error
    finally:
        consumer.close()


@dead_letters.command("list")
def list_letters(as_json: JsonOption = False, data: DataOption = None) -> None:
    """List them, one a line."""
    table = Table("number", "refused at", "topic", "partition", "offset", "reason", "detail")
    for number, letter in _letters(_settings(data)):
        if as_json:
            shown = {name: v for name, v in asdict(letter).items() if name != "sealed"}
            typer.echo(json.dumps({"number": number, **shown}))
        else:
            where = (letter.topic, str(letter.partition), str(letter.offset))
            table.add_row(str(number), letter.time, *where, letter.reason, letter.detail)
    if not as_json:
        Console().print(table)


def _letter(settings: StreamSettings, number: int) -> DeadLetter:
    for at, letter in _letters(settings):
        if at == number:
            return letter
    raise typer.BadParameter(f"there is no dead letter {number}: `tally dead-letters list`")


@dead_letters.command()
def show(number: int, data: DataOption = None) -> None:
    """Show one with its bytes, card numbers masked."""
    settings = _settings(data)
    letter = _letter(settings, number)
    value = Sealer(settings.load_card_key()).open(letter)
    shown = {name: v for name, v in asdict(letter).items() if name != "sealed"}
    text = None if value is None else masked_digits(value.decode(errors="backslashreplace"))
    typer.echo(json.dumps({"number": number, **shown, "value": text}, indent=2))


@dead_letters.command()
def replay(
    number: Annotated[int | None, typer.Argument(help="Which one.")] = None,
    since: Annotated[
        int | None, typer.Option("--from", min=0, help="All from this number on.")
    ] = None,
    data: DataOption = None,
) -> None:
    """Publish one again, or all from one on, where they came from: once the cause is mended.

    What is refused again becomes another dead letter; what was applied meanwhile changes nothing.
    """
    if (number is None) == (since is None):
        raise typer.BadParameter("name one letter, or the first of them by --from")
    settings = _settings(data)
    card_key = settings.load_card_key()
    publisher, sealer = Publisher(settings, card_key), Sealer(card_key)
    chosen = (
        [(number, _letter(settings, number))]
        if number is not None
        else [(at, letter) for at, letter in _letters(settings) if since is None or at >= since]
    )
    console = Console(stderr=True, highlight=False)
    published = 0
    for at, letter in chosen:
        try:
            publisher.send(letter.topic, b"replay", sealer.open(letter))
            published += 1
        except StoreError as error:
            console.print(f"{at} is not published: {error}")
    console.print(f"{published:,} of {len(chosen):,} published again")
    if published < len(chosen):
        raise typer.Exit(FAILED)
