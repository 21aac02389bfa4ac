"""The command by itself, without a stack."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points, version
from typing import Any

import pytest
import typer.main
from tally.cli.app import app
from tally.cli.commands import COMMANDS, PLUGINS, load

from tests.conftest import run_tally

LINE_MAX = 1_000
"""Characters of a help line, which no terminal here cuts."""


def listed() -> dict[str, Any]:
    """What `tally --help` lists, by name."""
    group: Any = typer.main.get_command(app)
    return {name: group.get_command(None, name) for name in group.list_commands(None)}


def test_it_says_its_version(tmp_path):
    said = run_tally("--version", data=tmp_path)
    assert (said.returncode, said.stdout.strip()) == (0, f"tally {version('tally')}")


def test_without_arguments_it_explains_itself(tmp_path):
    said = run_tally(data=tmp_path)
    assert said.returncode == 2
    for command in ("historical", "export", "sync", "batch"):
        assert f"\n  {command} " in said.stdout + said.stderr


def test_a_command_that_is_not_there_is_wrong_usage(tmp_path):
    said = run_tally("histrical", data=tmp_path)
    assert said.returncode == 2
    assert "Traceback" not in said.stderr
    assert "histrical" in said.stderr


@pytest.mark.parametrize("name", sorted(listed()))
def test_the_list_of_commands_says_of_each_what_its_own_help_says(name):
    shown = listed()[name].get_short_help_str(LINE_MAX)
    assert shown == load(name).get_short_help_str(LINE_MAX)
    assert shown


def test_every_command_is_in_the_list():
    operators = {point.name for point in entry_points(group=PLUGINS)}
    assert set(listed()) == set(COMMANDS) | operators
    assert len(operators) > 10  # those of the store, which is installed here


SLOW = {
    *("adbc_driver_manager", "confluent_kafka", "cryptography", "grpc", "numba", "numpy", "pandas"),
    *("psycopg", "pyarrow", "pydantic", "redis", "rich.console", "uvloop", "yoyo"),
}
"""What takes a tenth of a second or more to import, by itself or together."""


def imported(code: str) -> set[str]:
    """The modules that a process has imported at the end of some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules, sep='\\n')"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(done.stdout.splitlines())


def test_to_list_the_commands_imports_none_of_them():
    names = imported(
        "import sys; sys.argv = ['tally', '--help']\n"
        "from tally.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass"
    )
    assert "tally.cli.app" in names
    assert not names & SLOW
    assert len(names) < 400


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        # A stack starts with all of them but `tally load`.
        ("deploy.cli", SLOW - {"pydantic", "rich.console", "numpy"}),
        ("deploy.supervisor", {"grpc", "numba", "pandas", "uvloop"}),
        ("batch_job.cli", {"grpc", "numba", "pandas", "pyspark", "uvloop"}),
        ("server.parent", {"confluent_kafka", "grpc", "numba", "pandas"}),
        ("stream_job.watch", {"numba", "pandas", "pyspark", "uvloop"}),
    ],
)
def test_a_process_imports_nothing_slow_that_it_does_not_use(module, unneeded):
    names = imported(f"import {module}")
    assert module in names
    assert not names & unneeded
