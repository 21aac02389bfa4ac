"""Runs every measurement: `make bench`, or `python -m tests.bench core serving loading`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.bench import core, loading, offline, serving, streaming
from tests.bench.report import Report
from tests.conftest import run_tally, started

PARTS = ("core", "serving", "loading", "offline", "streaming")


def main() -> int:
    """Measures the parts named, or all; exits 1 when a goal is missed."""
    chosen = sys.argv[1:] or PARTS
    report = Report()
    if "core" in chosen:
        core.run(report)
    with tempfile.TemporaryDirectory(prefix="tally-bench-") as name:
        folder = Path(name)
        data = folder / "data"
        try:
            if "serving" in chosen:
                serving.run(report, started(data), folder)
            if "loading" in chosen:
                loading.run(report, started(data), folder)
            if "offline" in chosen:
                offline.run(report, folder)
            if "streaming" in chosen:
                streaming.run(report, folder)
        finally:
            if data.exists():
                run_tally("down", data=data)
    report.finish()
    return 0 if all(figure.holds is not False for figure in report.figures) else 1


if __name__ == "__main__":
    sys.exit(main())
