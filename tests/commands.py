"""The `tally` command as tests call it: in a process of its own, or in this one.

A process of its own imports for a second before it does anything. Most tests are about what a command does and
not about its process: for them it is called here, from the same entry point, with the output, arguments and
environment that its process would have.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import structlog
from tally.cli import main

TALLY = Path(sys.executable).parent / "tally"
OF_THEIR_OWN = frozenset({"up", "down", "status"})
"""Commands that start and end processes, or whose threads may outlive the call."""
JAVA_VARIABLE = "JAVA_TOOL_OPTIONS"
OF_JAVA = {JAVA_VARIABLE: "-XX:TieredStopAtLevel=1", "TALLY_PASS_ENVIRONMENT": JAVA_VARIABLE}
"""Java processes of tests run for seconds: to compile their code to the utmost takes longer than it saves."""
COMMON = {
    "COLUMNS": "160",
    # Kafka and Flink take ten seconds to come up: the tests of the stream ask for them.
    "TALLY_STREAM_OFF": "true",
}
TIMEOUT_S = 240


def environment_of(data: Path, changed: Mapping[str, str]) -> dict[str, str]:
    """The environment of a command: this process's, without settings of Tally's but those of all tests, and
    what a test says."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TALLY_")}
    java = {} if JAVA_VARIABLE in changed else OF_JAVA
    return inherited | java | COMMON | {"TALLY_DATA": str(data)} | dict(changed)


def run(
    arguments: Sequence[str | Path], data: Path, changed: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs the command as a person would, in a process of its own."""
    return subprocess.run(
        [TALLY, *map(str, arguments)],
        env=environment_of(data, changed),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def call(
    arguments: Sequence[str | Path], data: Path, changed: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Calls the command in this process where that makes no difference, and runs it elsewhere."""
    given = [*map(str, arguments)]
    needs_process = (
        given[0] in OF_THEIR_OWN
        or "spark" in given
        or not all(name.startswith("TALLY_") for name in changed)
        or threading.current_thread() is not threading.main_thread()
    )
    if needs_process:
        return run(arguments, data, changed)
    output, errors = _stream(), _stream()
    with (
        _as_environment(environment_of(data, changed)),
        _as_arguments(given),
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        status = _exit_status()
    return subprocess.CompletedProcess(given, status, _text(output), _text(errors))


def _exit_status() -> int:
    """What `main` ends with; it always exits."""
    try:
        main()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    finally:
        structlog.reset_defaults()  # its logs went to streams that end here
    return 0


def _stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


def _text(stream: io.TextIOWrapper) -> str:
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode()


@contextmanager
def _as_environment(environment: Mapping[str, str]) -> Iterator[None]:
    kept = dict(os.environ)
    _change_environment(environment)
    try:
        yield
    finally:
        _change_environment(kept)


def _change_environment(wanted: Mapping[str, str]) -> None:
    """Changes what differs only: threads of libraries read the rest meanwhile."""
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    for name, value in wanted.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


@contextmanager
def _as_arguments(arguments: Sequence[str]) -> Iterator[None]:
    kept = sys.argv
    sys.argv = [str(TALLY), *arguments]
    try:
        yield
    finally:
        sys.argv = kept
