"""Commands on terminals that are not UTF-8: they print what can be shown, and never fail of it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.batch_job.kaggle_rows import row, write
from tests.batch_job.test_load import new_card, new_id
from tests.commands import TALLY
from tests.conftest import Stack

ENCODINGS = {
    "ascii": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
    "latin-1": {"LC_ALL": "C", "PYTHONIOENCODING": "latin-1"},
    "the locale's": {"LC_ALL": "C"},
    "strict UTF-8": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8:strict"},
}


def run(
    data: Path, encoding: str, *arguments: str | bytes | Path
) -> subprocess.CompletedProcess[bytes]:
    """Runs a command as on such a terminal; nothing coerces Python to UTF-8."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TALLY_", "LC_", "LANG"))}
    return subprocess.run(
        [bytes(TALLY), *map(os.fsencode, arguments)],
        env=kept
        | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "160"}
        | {"TALLY_DATA": str(data), "TALLY_STREAM_OFF": "true"}
        | ENCODINGS[encoding],
        capture_output=True,
        timeout=60,
        check=False,
    )


def assert_well(done: subprocess.CompletedProcess[bytes], code: int = 0) -> None:
    assert done.returncode == code, done.stderr
    for said in (done.stdout, done.stderr):
        assert b"Unicode" not in said
        assert b"Traceback" not in said


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tables_are_shown_in_any_encoding(stack: Stack, encoding):
    shown = run(stack.data, encoding, "get", "4000123412341234", "--at", "2024-03-01")
    assert_well(shown)
    assert b"1234 (unknown)" in shown.stdout
    if encoding != "strict UTF-8":
        assert shown.stdout.decode("ascii")


@pytest.mark.parametrize("command", ["status", "catalog", "load --help"])
def test_commands_say_in_ascii_what_they_can(stack: Stack, command):
    assert_well(run(stack.data, "ascii", *command.split()))


@pytest.mark.parametrize("encoding", ["ascii", "strict UTF-8"])
def test_names_of_files_may_be_no_text_in_any_encoding(stack: Stack, tmp_path, encoding):
    card = new_card()
    path = tmp_path / os.fsdecode(b"caf\xe9 \xe2\x80\xa6.csv")
    rows = [row(cc_num=card, trans_num=new_id(), merchant="fraud_Café Noël…") for _ in range(2)]
    plain = write(tmp_path / "a.csv", [*rows, row(amt="x", trans_num=new_id(), merchant="fraud_é")])
    plain.rename(path)
    assert_well(run(stack.data, encoding, "load", path))  # a sentence with the names of two files
    done = run(stack.data, encoding, "load", path, "--json")
    assert_well(done)
    outcome = json.loads(done.stdout.decode("ascii"))
    assert (outcome["duplicates"], outcome["rejected"]) == (2, 1)
    (reject,) = map(json.loads, Path(outcome["rejects_file"]).read_text("utf-8").splitlines())
    assert "é" in reject["raw"]


@pytest.mark.parametrize("encoding", ["ascii", "strict UTF-8"])
def test_outputs_may_have_names_that_are_no_text(stack: Stack, tmp_path, encoding):
    card = new_card()
    points = tmp_path / os.fsdecode(b"p\xe9.csv")
    points.write_text(f"card,event_time,mine\n{card},2024-03-01T00:00:00Z,é…\n", "utf-8")
    output = tmp_path / os.fsdecode(b"out\xe9.parquet")
    assert_well(run(stack.data, encoding, "historical", points, "-o", output, "-f", "amt"))
    with output.open("rb") as file:
        assert pq.read_table(file)["mine"].to_pylist() == ["é…"]
    export = tmp_path / os.fsdecode(b"exported\xe9")
    assert_well(run(stack.data, encoding, "export", "-o", export, "--to", "1971-01-01", "--json"))


def test_a_file_that_is_not_there_is_named_as_well_as_can_be(tmp_path):
    done = run(tmp_path, "ascii", "load", os.fsencode(tmp_path) + b"/caf\xe9.csv")
    assert_well(done, 2)
    assert b"caf" in done.stderr


def test_generated_files_are_utf8_in_any_locale(stack: Stack, tmp_path):
    path = tmp_path / "rows.csv"
    assert_well(run(stack.data, "ascii", "synth", "-o", path, "--rows", "10"))
    assert path.read_bytes().decode("utf-8")
