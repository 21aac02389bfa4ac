"""`tally load` from CSV into both stores, beside a raw COPY of the same rows; and its memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import adbc_driver_postgresql.dbapi as adbc
import pyarrow as pa

from ingest.files import read_file
from ingest.kaggle import convert
from stores.arrow import TRANSACTIONS
from tests.bench.report import Report
from tests.commands import TALLY
from tests.conftest import Stack

ROWS = 2_000_000


def raw_copy_rows_per_s(stack: Stack, path: Path) -> float:
    """The same rows, read beforehand, by COPY into a bare table."""
    tables = [
        convert(batch.table, stack.card_key.card_id, datetime.now(UTC)).transactions.select(
            TRANSACTIONS.names
        )
        for batch, _ in zip(read_file(path), range(20), strict=False)
    ]
    table = pa.concat_tables(tables)
    url = stack.settings.store_urls()[1]
    with adbc.connect(url) as connection, connection.cursor() as cursor:
        begin = time.perf_counter()
        cursor.adbc_ingest("raw_copy", table, mode="create")
        connection.commit()
        seconds = time.perf_counter() - begin
        cursor.execute("DROP TABLE raw_copy")
        connection.commit()
    return len(table) / seconds


def run(report: Report, stack: Stack, folder: Path) -> None:
    """Measures."""
    report.section(f"tally load of {ROWS:,} rows, into Postgres and Redis")
    path = folder / "rows.csv"
    begin = time.perf_counter()
    made = stack.tally("synth", "-o", path, "--rows", str(ROWS), "--seed", "3")
    assert made.returncode == 0, made.stderr
    report.add("tally synth", ROWS / (time.perf_counter() - begin), "rows/s", ">= 20,000")
    raw = raw_copy_rows_per_s(stack, path)
    # A shell of its own, so that its children's peak memory is this load's.
    program = (
        "import json,resource,subprocess,sys;"
        "out=subprocess.run(sys.argv[1:],capture_output=True,text=True);"
        "sys.stderr.write(out.stderr);"
        "peak=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss;"
        "print(json.dumps({'peak_kb':peak,**json.loads(out.stdout)}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(TALLY), "load", "--json", str(path)],
        env=os.environ | {"TALLY_DATA": str(stack.data)},
        capture_output=True,
        text=True,
        check=True,
    )
    outcome = json.loads(result.stdout)
    assert outcome["loaded"] == ROWS, outcome
    rate = ROWS / outcome["seconds"]
    report.add("tally load", rate, "rows/s", ">= 100,000")
    report.add("raw COPY of the same rows into a bare table", raw, "rows/s")
    report.add("tally load against raw COPY", rate / raw, "ratio")
    report.add("tally load: peak memory", outcome["peak_kb"] / 1024, "MB", "<= 1,000")
    path.unlink()
