"""Kills parts of a running stream at random instants, under load, and compares what both stores then
hold with a run without faults. `make chaos`, or `python -m tests.stream_job.chaos --rounds 3`."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from ingest.files import read_file
from ingest.kaggle import convert
from stores.settings import StoreSettings
from stream_job.applier import Applier, Batch
from stream_job.publish import events_of
from stream_job.settings import StreamSettings
from tests.commands import TALLY
from tests.conftest import Stack, run_tally, started
from tests.contents import contents
from tests.stream_job.watching import is_applied, processes, wait_for

VICTIMS = ("worker", "stream", "kafka", "valkey", "postgres")
"""The job's Python worker, the whole job, the broker, Redis (which comes back empty), Postgres."""
ROWS = 3_000
RATE = 500.0
DAYS = 0.9
"""Less than what a ledger keeps beyond its longest window: a backlog applied at once, or again, must
find the whole past of each payment, so that features on arrival are the same whatever happens."""
KILLS_MAX = 3
PAUSE_S = (0.5, 4.0)
"""Between kills: within the load, and within what the kill before has set going."""
VICTIM_WITHIN_S = 30.0
REFERENCE_BATCH = 1_000
STREAM = {"TALLY_STREAM_OFF": "false"}


@dataclass(frozen=True)
class Kill:
    """What is killed, and how long after the kill before it."""

    victim: str
    pause_s: float


@dataclass(frozen=True)
class Outcome:
    """What a round came to."""

    killed: list[str]
    events: int
    recovered_s: float
    """From the last event published until all were applied."""
    differences: list[str]
    """Of what both stores hold and what they would hold without faults; empty where they agree."""


class Chaos:
    """A stack to be harmed, and one beside it that is left alone."""

    def __init__(self, folder: Path, stack: Stack) -> None:
        """Takes a running stack with a stream."""
        self._folder = folder
        self._stack = stack

    def __enter__(self) -> Chaos:
        secret = str(StoreSettings(data=self._stack.data).card_key_file)
        self._unharmed = started(self._folder / "unharmed", TALLY_CARD_KEY_FILE=secret)
        return self

    def __exit__(self, *_: Any) -> None:
        run_tally("down", data=self._folder / "unharmed")

    @staticmethod
    def random_kills(seed: int, victims: Sequence[str] | None = None) -> list[Kill]:
        """Up to KILLS_MAX of the victims, or all that are named, in any order."""
        rng = random.Random(seed)
        chosen = rng.choices(VICTIMS, k=rng.randint(1, KILLS_MAX)) if victims is None else victims
        return [Kill(name, rng.uniform(*PAUSE_S)) for name in rng.sample(chosen, len(chosen))]

    def round(self, seed: int, rows: int, rate: float, kills: Sequence[Kill]) -> Outcome:
        """Publishes new payments, kills, waits until all is applied, and compares."""
        path = self._folder / f"{seed}.csv"
        size = ("--rows", str(rows), "--seed", str(seed), "--days", str(DAYS))
        made = self._stack.tally("synth", "-o", path, *size)
        assert made.returncode == 0, made.stderr
        transactions = self._transactions(path)
        publishing = subprocess.Popen(
            [TALLY, "publish", path, "--rate", str(rate)],
            env=os.environ | {"TALLY_DATA": str(self._stack.data)},
            stderr=subprocess.DEVNULL,
        )
        killed = [self._kill(kill) for kill in kills]
        assert publishing.wait(10 * rows / rate + 60) == 0
        published_s = time.time()
        wait_for("applied", lambda: is_applied(self._stack, published_s))
        recovered_s = time.time() - published_s
        self._apply_without_faults(transactions)
        cards = set(transactions["card_id"].to_pylist())
        differences = contents(self._unharmed, cards).differences(contents(self._stack, cards))
        return Outcome(killed, len(transactions), round(recovered_s, 1), differences)

    def _kill(self, kill: Kill) -> str:
        time.sleep(kill.pause_s)
        deadline = time.monotonic() + VICTIM_WITHIN_S
        while (victim := processes(self._stack).get(kill.victim)) is None:
            # It is about to be started again: it can be killed when it is there.
            assert time.monotonic() < deadline, f"{kill.victim} is not there"
            time.sleep(0.05)
        if kill.victim == "stream":  # the whole job: its client, Java and the workers
            os.killpg(victim.pid, signal.SIGKILL)
        else:
            victim.send_signal(signal.SIGKILL)
        return kill.victim

    def _transactions(self, path: Path) -> pa.Table:
        key = self._stack.card_key
        parts = [convert(b.table, key.card_id, datetime.now(UTC)) for b in read_file(path)]
        return pa.concat_tables([part.transactions for part in parts])

    def _apply_without_faults(self, transactions: pa.Table) -> None:
        settings = StreamSettings(data=self._unharmed.data)
        events = list(events_of(transactions, settings))
        applier = Applier(settings)
        for begin in range(0, len(events), REFERENCE_BATCH):
            some = events[begin : begin + REFERENCE_BATCH]
            n = len(some)
            topics, values = [e.topic for e in some], [e.value for e in some]
            letters = applier.apply(
                Batch(topics, [0] * n, range(begin, begin + n), [0] * n, values)
            )
            assert letters == [None] * n
        applier.close()


def main() -> int:
    """Runs rounds, says what each came to; exits 1 when any differs, and keeps what is there then."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    chosen = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    folder = Path(tempfile.mkdtemp(prefix="tally-chaos-"))
    data = folder / "harmed"
    equal = 0
    try:
        with Chaos(folder, started(data, **STREAM)) as chaos:
            for seed in range(chosen.seed, chosen.seed + chosen.rounds):
                kills = Chaos.random_kills(seed)
                said = ", ".join(f"{kill.victim} after {kill.pause_s:.1f} s" for kill in kills)
                try:
                    outcome = chaos.round(seed, ROWS, RATE, kills)
                except AssertionError as error:
                    console.print(f"round {seed}: killed {said}: {error}")
                    break
                equal += not outcome.differences
                console.print(
                    f"round {seed}: killed {said}; {outcome.events:,} payments and their labels, "
                    f"all applied {outcome.recovered_s} s after the last: "
                    + ("; ".join(outcome.differences) or "equal, nothing lost")
                )
    finally:
        run_tally("down", data=data)
    console.print(f"{equal} of {chosen.rounds} rounds equal the run without faults")
    if equal < chosen.rounds:
        console.print(f"what is there is kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
