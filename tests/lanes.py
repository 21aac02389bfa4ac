"""Which tests run beside one another: `make test` has several lanes, each a process of its own.

Tests that share a fixture of a module, or the stack of the session, stay together and in their order: a module
of them is one group. Each lane that meets such a group starts one stack for all the groups it takes. A test
that shares nothing goes to any lane. Groups that take long begin first, so that none is left at the end.
"""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cached_property
from typing import Any

import pytest

from tests.budgets import BUDGET_S, budget_of
from tests.conftest import session_folder

GROUPS = "groups.json"
USUAL_SHARE = 0.1
"""Of its budget that a test takes which asks for no longer one: most take less than a second."""


def _group(item: pytest.Item) -> str | None:
    """What a test must stay together with; None where that is nothing."""
    marker = item.get_closest_marker("xdist_group")
    if marker is not None:
        return str(marker.args[0])
    names = getattr(item, "fixturenames", ())
    definitions: dict[str, Any] = item._request._arg2fixturedefs  # type: ignore[attr-defined]
    for name in names:
        for definition in definitions.get(name, ()):
            is_ours = definition.baseid.startswith("tests")
            if is_ours and definition.scope != "function":
                return item.nodeid.partition("::")[0]
    return None


def _expected_s(item: pytest.Item) -> float:
    seconds = budget_of(item)
    return seconds if seconds > BUDGET_S else USUAL_SHARE * BUDGET_S


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a lane: puts the group first that takes longest, and says which tests belong together."""
    if not hasattr(config, "workerinput"):
        return
    groups = {item.nodeid: _group(item) or item.nodeid for item in items}
    expected_s: dict[str, float] = defaultdict(float)
    for item in items:
        expected_s[groups[item.nodeid]] += _expected_s(item)
    items.sort(key=lambda item: -expected_s[groups[item.nodeid]])
    folder = session_folder(config)
    draft = folder / f"{config.workerinput['workerid']}.{GROUPS}"
    draft.write_text(json.dumps(groups))
    draft.replace(folder / GROUPS)  # each lane writes the same


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where there are lanes: xdist's own scheduler by scope, with the groups that the lanes name.

    Its `--dist loadgroup` does the same by ids of tests that it changes, which pytest 9.2 ignores.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):  # type: ignore[misc]  # without types of its own
        @cached_property
        def _groups(self) -> dict[str, str]:
            groups: dict[str, str] = json.loads((session_folder(config) / GROUPS).read_text())
            return groups

        def _split_scope(self, nodeid: str) -> str:
            return self._groups[nodeid]

    config.option.loadscopereorder = False  # the lanes' order is better
    return Lanes(config, log)
