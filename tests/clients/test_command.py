"""The command by itself, without a stack."""

from __future__ import annotations

from importlib.metadata import version

from tests.conftest import run_tally


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
