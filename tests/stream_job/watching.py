"""What a running stream says of itself, and waiting for it."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress

import psutil

from deploy.cli import _report
from deploy.stack import DataFolder
from tests.conftest import Stack

APPLIED_WITHIN_S = 120.0


def status(stack: Stack) -> dict:
    """What `tally status --json` says, without a process for each look."""
    folder = DataFolder(stack.data)
    description = folder.description()
    assert description is not None, f"no stack is up in {stack.data}"
    report: dict = json.loads(json.dumps(_report(folder, description)))
    return report


def wait_for(what: str, holds: Callable[[], bool], within_s: float = APPLIED_WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {within_s} s"
        time.sleep(0.2)


def is_applied(stack: Stack, since_s: float) -> bool:
    """Whether all that was published before an instant is in both stores, and the store says so."""
    report = status(stack)
    stream = report.get("stream")
    if not isinstance(stream, dict) or stream["lag_events"] or report["online_store"] != "serving":
        return False
    return bool(stream["complete_through_ms"] / 1000 > since_s)


def wait_until_applied(stack: Stack) -> None:
    """Waits until all that was published before this call is in both stores."""
    now_s = time.time()
    wait_for("what was published", lambda: is_applied(stack, now_s))


def is_probed(stack: Stack) -> bool:
    """Whether a freshness probe was seen: the job runs then."""
    stream = status(stack).get("stream")
    return isinstance(stream, dict) and stream["fresh_after_ms"] is not None


def _metrics_url(stack: Stack) -> str:
    description = DataFolder(stack.data).description()
    assert description is not None
    return str(description["stream_metrics"])


def metric(stack: Stack, name: str) -> float:
    """A figure of the stream's Prometheus port."""
    with urllib.request.urlopen(_metrics_url(stack), timeout=5) as response:
        text = response.read().decode()
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


def processes(stack: Stack) -> dict[str, psutil.Process]:
    """The processes that can be killed, by name. The Python worker is Java's child."""
    known: dict[str, psutil.Process] = {}
    for name, pid in status(stack)["processes"].items():
        with suppress(psutil.NoSuchProcess):  # it may be about to be started again
            known[name] = psutil.Process(pid)
            if name == "stream":
                for child in known[name].children(recursive=True):
                    if "python" in child.name() and "beam_boot" in " ".join(child.cmdline()):
                        known["worker"] = child
    return known
