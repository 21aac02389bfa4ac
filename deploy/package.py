"""Packs the stream job for a Flink cluster of one's own. `make stream-package`; docs/stream.md says how
to submit it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from deploy.jars import jars

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "build" / "stream"
CODE = ("features", "stores", "ingest", "stream_job", "telemetry", "clients/src/tally")
"""What the job imports of ours."""


def pack(target: Path) -> list[Path]:
    """Makes tally.zip, the connector's jars and requirements.lock in a folder; returns them."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    archive = target / "tally.zip"
    with ZipFile(archive, "w", ZIP_DEFLATED) as file:
        for folder in map(ROOT.joinpath, CODE):
            for path in sorted(folder.rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    file.write(path, path.relative_to(folder.parent))
    made = [archive, target / "requirements.lock"]
    shutil.copy(ROOT / "stream_job" / "requirements.lock", made[1])
    for jar in jars("flink"):
        made.append(target / jar.name)
        shutil.copy(jar, made[-1])
    return made


if __name__ == "__main__":
    for made in pack(TARGET):
        sys.stdout.write(f"{made.relative_to(ROOT)}\n")
