"""`make demo`: the main job on the embedded stack, from nothing, in a folder that is gone afterwards.

Starts the stack, generates and loads transactions, follows one card's velocity as it grows and
decays with nobody writing, meets a card that nobody knows, publishes payments through Kafka and Flink
and sees them in the next answer, and stops.
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import tally
from rich.console import Console
from rich.table import Table
from tally.cli.terminal import show_what_can_be_shown
from tally.v1 import events_pb2

from stores.settings import read_stack_file
from stream_job.publish import Publisher
from stream_job.settings import StreamSettings

ROWS = 50_000
BURST_PAYMENTS = 6
DAYS = 60
TABLE_WIDTH = 130
UNKNOWN_CARD = "4999999999999999"
LIVE_CARD = "4111222233334444"
LIVE_TIMEOUT_S = 60.0
"""Flink takes some seconds until its first event."""

TALLY = Path(sys.executable).parent / "tally"

console = Console(highlight=False)


class DemoError(Exception):
    """A step failed; its own output says why."""


def step(title: str) -> None:
    """Says what comes next."""
    console.print(f"\n[bold]{title}[/bold]")


def run(*arguments: str | Path, data: Path) -> None:
    """Runs a `tally` command, shown as a person would type it."""
    console.print("$ tally " + " ".join(map(str, arguments)), style="cyan", markup=False)
    if subprocess.run([TALLY, *arguments], env=os.environ | {"TALLY_DATA": str(data)}).returncode:
        raise DemoError(f"`tally {arguments[0]}` failed")


def latest_burst(path: Path) -> tuple[str, datetime]:
    """The card and the last instant of a burst of fraud, recent enough for its windows to be whole."""
    bursts: Counter[tuple[str, str]] = Counter()
    last: dict[tuple[str, str], str] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["is_fraud"] == "1":
                key = (row["cc_num"], row["trans_date_trans_time"][:13])
                bursts[key] += 1
                last[key] = row["trans_date_trans_time"]
    ends = sorted((last[key], key[0]) for key, count in bursts.items() if count >= BURST_PAYMENTS)
    if not ends:
        raise DemoError("the generated file has no burst")
    end, card = ends[-1]
    return card, datetime.fromisoformat(end).replace(tzinfo=UTC)


MOMENTS: tuple[tuple[str, timedelta], ...] = (
    ("20 min before", timedelta(minutes=-20)),
    ("5 min before", timedelta(minutes=-5)),
    ("right after", timedelta(milliseconds=1)),
    ("+5 min", timedelta(minutes=5)),
    ("+10 min", timedelta(minutes=10, milliseconds=1)),
    ("+1 h", timedelta(hours=1, milliseconds=1)),
    ("+1 d", timedelta(days=1)),
)


def show_decay(client: tally.Client, card: str, end: datetime) -> None:
    """One card at several instants around the end of a burst."""
    names = ["txn_count_last_10_min", "txn_count_last_1_hour", "sum_amt_last_1_hour"]
    names += ["max_amt_last_1_hour", "distinct_merchants_last_1_hour", "seconds_since_last_txn"]
    answer = client.online([tally.Row(card=card, at=end + after) for _, after in MOMENTS], names)
    table = Table("feature", title=f"the last payment was at {end:%d %b %Y %H:%M:%S} UTC")
    for moment, _ in MOMENTS:
        table.add_column(moment, justify="right")
    rows = answer.to_dicts()
    for name in names:
        values = [row[name] for row in rows]
        table.add_row(name, *("none" if value is None else f"{value:,.7g}" for value in values))
    Console(width=max(console.width, TABLE_WIDTH), highlight=False).print(table)


def show_stream(data: Path, address: str) -> None:
    """A card's answers while its payments are published."""
    settings = StreamSettings(data=data)
    publisher = Publisher(settings, settings.load_card_key())
    now_ms = time.time_ns() // 1_000_000
    names = ["txn_count_last_10_min", "txn_count_last_1_hour", "sum_amt_last_1_hour"]
    table = Table("published", *names, "visible after", title=f"card {LIVE_CARD[-4:]}")

    def payment(name: str, minutes_ago: float) -> events_pb2.Transaction:
        return events_pb2.Transaction(
            transaction_id=f"demo {name}",
            card=LIVE_CARD,
            event_time_ms=now_ms - int(minutes_ago * 60_000),
            amount_minor=2_500,
            merchant="a shop",
        )

    events = (
        ("a payment", payment("1", 2), 1),
        ("another", payment("2", 1), 2),
        ("one of half an hour ago, late", payment("3", 30), 3),
        ("the first one again", payment("1", 2), 3),
    )
    with tally.Client(address) as client:
        for what, event, count in events:
            began_s, sent_ms = time.perf_counter(), time.time_ns() // 1_000_000
            publisher.send(settings.transactions_topic, b"demo", event.SerializeToString())
            deadline = began_s + LIVE_TIMEOUT_S
            while True:
                answer = client.online([tally.Row(card=LIVE_CARD)], names)
                values = ["none" if v is None else f"{v:g}" for v in answer.to_dicts()[0].values()]
                # One that comes twice changes nothing: but the store says when it is applied.
                is_through = answer.complete_through_ms[0] >= sent_ms or not what.endswith("again")
                if values[1] == str(count) and is_through:
                    break
                if time.perf_counter() > deadline:
                    raise DemoError(f"{what}: not visible within {LIVE_TIMEOUT_S:.0f} s")
                time.sleep(0.002)
            table.add_row(what, *values, f"{(time.perf_counter() - began_s) * 1e3:.0f} ms")
    Console(width=max(console.width, TABLE_WIDTH), highlight=False).print(table)


def main() -> int:
    """Runs the demo; the stack is stopped whatever happens."""
    show_what_can_be_shown()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="tally-demo-") as folder:
        data = Path(folder) / "data"
        try:
            tell(data, Path(folder) / "transactions.csv")
        except DemoError as error:
            console.print(f"demo: {error}")
            return 1
        except KeyboardInterrupt:
            console.print("\nstopping")
            return 130
        finally:
            # A second Ctrl-C must not leave the stack running; the command inherits this.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if data.exists():
                run("down", data=data)
    step("Try next")
    console.print(
        "  make up                                a stack of your own in ./.tally\n"
        "  .venv/bin/tally synth -o sample.csv    transactions to load\n"
        "  .venv/bin/tally load sample.csv\n"
        "  .venv/bin/tally publish sample.csv     the same through Kafka and Flink\n"
        "  .venv/bin/tally get CARD --at 2024-02-01 --json\n"
        "  .venv/bin/tally catalog                  what there is to ask for\n"
        "  make down",
        markup=False,
    )
    return 0


def tell(data: Path, path: Path) -> None:
    """The demo itself."""
    step("Postgres, Redis, Kafka, Flink and the gRPC server, on free ports")
    run("up", data=data)
    step("Card transactions, with fraud in them")
    start = f"{datetime.now(UTC) - timedelta(days=DAYS):%Y-%m-%d}"
    run("synth", "-o", path, "--rows", str(ROWS), "--start", start, "--days", str(DAYS), data=data)
    run("load", path, data=data)
    step("A stolen card: its velocity at several instants, with no write in between")
    card, end = latest_burst(path)
    address = tally_address(data)
    with tally.Client(address) as client:
        show_decay(client, card, end)
        step("A card that nobody knows is not a card with zeros")
        answer = client.online([tally.Row(card=UNKNOWN_CARD)], ["txn_count_last_1_hour"])
        console.print(f"known: {bool(answer.known[0])}, statuses: {answer.exceptions(0)}")
    step("Live: payments through Kafka and Flink, then a late one, then one that comes twice")
    show_stream(data, address)
    step("All features of the payment that ends the burst")
    at = (end + timedelta(seconds=1)).isoformat()
    run(
        *("get", card, "--at", at, "--amount", "250", "--category", "shopping_net"),
        *("--merchant-lat", "40.7", "--merchant-long", "-74.0"),
        data=data,
    )


def tally_address(data: Path) -> str:
    """Where the server is."""
    return str(read_stack_file(data)["grpc"])


if __name__ == "__main__":
    sys.exit(main())
