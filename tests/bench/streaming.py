"""The stream: events a second from Kafka into both stores, beside what a job takes that does less;
how fresh answers are; and how much memory it takes."""

from __future__ import annotations

import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import redis
import tally
from tally.v1 import events_pb2

from deploy import flink
from stores.redis_store import PROGRESS_KEY
from stores.settings import read_stack_file
from stream_job.publish import Publisher
from stream_job.settings import StreamSettings
from tests.bench.report import Report
from tests.conftest import Stack, running

EVENTS = 1_000_000
PARALLELISMS = (1, 2)
WARM_UP_EVENTS = 40_000
FRESH_RATE = 500
FRESH_SECONDS = 30
FRESH_WARM_UP_S = 3
APPLIED_WITHIN_S = 600.0
LOOK_INTERVAL_S = 0.001
"""Between looks at whether an event is in an answer: without it the looking takes a core of two."""


def applied(stack: Stack) -> int:
    """Events that are in both stores."""
    offline = stack.offline()
    try:
        return sum(offset for offset, _ in offline.stream_progress().values())
    finally:
        offline.close()


def published(stack: Stack, folder: Path, rows: int, seed: int) -> int:
    """Publishes transactions without labels; returns how many events are to be applied in all."""
    path = folder / "events.csv"
    made = stack.tally("synth", "-o", path, "--rows", str(rows), "--seed", str(seed))
    assert made.returncode == 0, made.stderr
    path.write_text(path.read_text().replace(",is_fraud\n", ",no_label\n", 1))
    before = applied(stack)
    outcome = stack.tally("publish", "--json", path)
    assert outcome.returncode == 0, outcome.stderr
    path.unlink()
    return before + rows


def wait_until_applied(stack: Stack, events: int) -> tuple[float, int]:
    """(seconds, events) from now until so many are applied in all."""
    at_first, began_s = applied(stack), time.perf_counter()
    while (done := applied(stack)) < events:
        assert time.perf_counter() - began_s < APPLIED_WITHIN_S
        time.sleep(0.05)
    return time.perf_counter() - began_s, done - at_first


def throughput(report: Report, stack: Stack, folder: Path, parallelism: int) -> float:
    """Publishes, and measures how fast the job goes once nothing else works on the machine."""
    wait_until_applied(stack, published(stack, folder, WARM_UP_EVENTS, seed=30 + parallelism))
    everything = published(stack, folder, EVENTS, seed=40 + parallelism)
    seconds, events = wait_until_applied(stack, everything)
    name = f"Kafka to both stores, of {EVENTS:,} events, parallelism {parallelism}"
    goal = ">= 25,000" if parallelism == PARALLELISMS[-1] else ""
    report.add(name, events / seconds, "events/s", goal)
    return events / seconds


def freshness(report: Report, stack: Stack) -> None:
    """From produce to visible in an answer, at FRESH_RATE events/s over many cards."""
    publisher = Publisher(StreamSettings(data=stack.data), stack.card_key)
    latencies_ms: list[float] = []
    with tally.Client(stack.address) as client:
        began_s = time.perf_counter()
        for number in range(FRESH_RATE * FRESH_SECONDS):
            due_s = began_s + number / FRESH_RATE
            card = f"5{number % 2_000:015}"
            event = events_pb2.Transaction(
                transaction_id=f"fresh {time.time_ns()}",
                card=card if number % 25 else f"59{number:014}",
                event_time_ms=time.time_ns() // 1_000_000 - 1,
                amount_minor=100,
                merchant="m",
            )
            probed = number % 25 == 0
            sent_s = time.perf_counter()
            publisher.send_soon("transactions", event.card.encode(), event.SerializeToString())
            if probed:
                row = tally.Row(card=event.card)
                deadline_s = sent_s + APPLIED_WITHIN_S
                while not client.online([row], features=["amt"]).known[0]:
                    assert time.perf_counter() < deadline_s
                    time.sleep(LOOK_INTERVAL_S)
                if sent_s - began_s > FRESH_WARM_UP_S:
                    latencies_ms.append((time.perf_counter() - sent_s) * 1e3)
            time.sleep(max(0.0, due_s - time.perf_counter()))
    latencies_ms.sort()
    n = len(latencies_ms)
    report.add(f"fresh after, p50 at {FRESH_RATE} events/s", latencies_ms[n // 2], "ms", "<= 50")
    report.add("fresh after, p99", latencies_ms[n * 99 // 100], "ms", "<= 100")


def shape(stack: Stack, name: str, database: int) -> float:
    """Events/s of a smaller job over EVENTS of those published, into an empty Redis database."""
    url = urlsplit(stack.settings.store_urls()[0])._replace(path=f"/{database}").geturl()
    settings = {
        "TALLY_REDIS_URL": url,
        "TALLY_STREAM_PARALLELISM": str(PARALLELISMS[-1]),
        "TALLY_CHECKPOINTS": str(stack.data / "flink" / name),
    }
    client = redis.Redis.from_url(url)
    client.set(PROGRESS_KEY, "bench")  # the database is not one that lost its data

    def count() -> int:
        return int(client.get("bench events") or 0)

    with (stack.data / "logs" / f"bench-{name}.log").open("ab") as log:
        began_s = time.perf_counter()
        job = flink.start(stack.data, log, ("tests.bench.shapes", name), **settings)
    try:
        while not (first := count()):
            assert time.perf_counter() - began_s < APPLIED_WITHIN_S
            time.sleep(0.01)
        first_s = time.perf_counter()
        while (last := count()) < EVENTS:
            assert time.perf_counter() - began_s < APPLIED_WITHIN_S
            time.sleep(0.05)
    finally:
        flink.stop(job, APPLIED_WITHIN_S)
        client.flushdb()
        client.close()
    return (last - first) / (time.perf_counter() - first_s)


def shapes(report: Report, stack: Stack, whole: float) -> None:
    """What the whole job could do if it did less."""
    into_redis = shape(stack, "redis", database=1)
    report.add("Kafka to Redis alone, with all features", into_redis, "events/s", ">= 40,000")
    parsed = shape(stack, "parse", database=2)
    report.add("a job that only parses", parsed, "events/s")
    report.add("the whole job, as a share of it", whole / parsed, "")


def memory(report: Report, stack: Stack) -> None:
    """What the broker and the job with its Java and Python take."""
    processes = read_stack_file(stack.data)["processes"]
    events = applied(stack)
    for name in ("kafka", "stream"):
        process = psutil.Process(processes[name])
        family = [process, *process.children(recursive=True)]
        used = sum(member.memory_info().rss for member in family)
        report.add(f"memory of {name} after {events / 1e6:.1f} M events", used / 1e6, "MB")


def run(report: Report, folder: Path) -> None:
    """Measures with one instance of the job, and then, in stores as empty, with two."""
    report.section(f"The stream, {EVENTS:,} events, all on this machine")
    rates = []
    for parallelism in PARALLELISMS:
        options = {
            "TALLY_STREAM_OFF": "false",
            "TALLY_STREAM_PARALLELISM": str(parallelism),
            "TALLY_PROBE_INTERVAL_MS": "0",  # events are counted
        }
        with running(folder / f"parallelism-{parallelism}", **options) as stack:
            rates.append(throughput(report, stack, folder, parallelism))
            if parallelism == PARALLELISMS[-1]:
                report.add("growth with the second instance", rates[-1] / rates[0], "")
                freshness(report, stack)
                shapes(report, stack, rates[-1])
                wait_until_applied(stack, published(stack, folder, EVENTS, seed=50))
                memory(report, stack)
