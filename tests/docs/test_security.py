"""Every promise of docs/security.md names a test that there is."""

from __future__ import annotations

import re

from tests.conftest import ROOT


def test_each_promise_names_a_test_that_there_is():
    rows = [
        line
        for line in (ROOT / "docs" / "security.md").read_text().splitlines()
        if line.startswith("|") and "`test_" in line
    ]
    known = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)\(", path.read_text(), re.MULTILINE)
    }
    named = {name for row in rows for name in re.findall(r"`(test_\w+)`", row)}
    assert len(rows) >= 20
    assert named <= known, named - known
