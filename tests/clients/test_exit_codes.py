"""Exit codes: one table, said by the command and by the documentation."""

from __future__ import annotations

import os
import re

import typer
from tally.cli.exit_codes import EPILOG, MEANINGS, NO_STACK, USAGE
from typer.testing import CliRunner

from stream_job.cli import publish
from tests.conftest import ROOT, run_tally


def test_the_documentation_and_help_have_the_table_of_exit_codes(tmp_path):
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", page, re.MULTILINE)
    assert {int(code): meaning for code, meaning in rows} == MEANINGS
    shown = run_tally("--help", data=tmp_path).stdout
    assert " ".join(EPILOG.split()) in " ".join(shown.split())


def test_what_reads_a_file_twice_refuses_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    app = typer.Typer()
    app.command()(publish)
    for options in (["--loop"], ["--shift-to-now"]):
        given = [str(tmp_path / "pipe"), *options, "--data", str(tmp_path)]
        done = CliRunner().invoke(app, given, env={"COLUMNS": "500"})
        assert done.exit_code == USAGE
        assert "read a file twice, and not from a pipe" in done.stderr


def test_commands_exit_as_the_table_says(tmp_path):
    assert run_tally("status", data=tmp_path).returncode == NO_STACK
    assert run_tally("load", data=tmp_path).returncode == USAGE
