"""Settings that cannot be used: which, what it was, and what it should be."""

from __future__ import annotations

import pytest

from server.settings import ServerSettings
from stores.settings import SettingsError, StoreSettings
from tests.conftest import run_tally


def test_every_setting_at_fault_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TALLY_BULK_DEADLINE_S", "soon")
    monkeypatch.setenv("TALLY_WORKERS", "0")
    with pytest.raises(SettingsError) as caught:
        ServerSettings(data=tmp_path)
    text = str(caught.value)
    assert "TALLY_BULK_DEADLINE_S=soon: it should be a valid number" in text
    assert "TALLY_WORKERS=0: it should be greater than or equal to 1" in text


def test_a_secret_is_not_told(monkeypatch, tmp_path):
    monkeypatch.setenv("TALLY_POSTGRES_URL", "postgresql://sesame@here/db")
    with pytest.raises(SettingsError) as caught:
        StoreSettings(data=tmp_path, card_key=[b"open sesame"])
    assert "TALLY_CARD_KEY" in str(caught.value)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("command", [("batch", "list"), ("up",)])
def test_a_command_says_so_in_a_line_or_two(tmp_path, command):
    result = run_tally(*command, data=tmp_path / "data", TALLY_HISTORY_DAYS="all of them")
    assert result.returncode != 0
    assert "TALLY_HISTORY_DAYS=all of them: it should be a valid integer" in result.stderr
    assert "Traceback" not in result.stderr
